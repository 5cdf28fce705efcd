"""docs/PAPER_MAP.md names code, tests, suites and files that exist, and leaves out no number of the paper."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import train
from hps.evaluate.metrics import METRICS
from hps.lab.suites import SUITES
from hps.losses import LOSSES
from hps.samplers import SAMPLERS, SCHEDULES

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/PAPER_MAP.md").read_text()
NUMBERED = {"Eq.": 20, "Table": 8, "Figure": 1, "Theorem": 3}  # of the printed paper
APPENDICES = "A.1 A.2.1 A.2.2 A.3.1 A.3.2 B.1 B.2.1 B.2.2 C.1 C.2 D.1 D.2 D.3 E".split()


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def entries(text: str) -> list[dict[str, str]]:
    """Entries "* **name**: ..." or "* ..." of a text: name, and what stands after Code, Tests, Measured, Differs."""
    found = []
    for bullet in re.findall(r"^\* .*\n(?:  .*\n)*", text, flags=re.MULTILINE):
        first, *fields = re.split(r"^  (Code|Tests|Measured|Differs): ", bullet, flags=re.MULTILINE)
        name = re.match(r"\* \*\*(.+?)\*\*: ", first)
        found.append(dict(zip(fields[::2], fields[1::2], strict=True)) | {"name": name[1] if name else ""})
    return found


def defined(file: str, name: str) -> bool:
    """Whether `name`, "f", "Class.f" or 'TABLE["key"]', is found in `file`, or in one of those that it matches."""
    for path in ROOT.glob(file):
        found: Any = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        dotted, _, key = name.partition("[")
        for part in dotted.split("."):
            found = getattr(found, part, None)
        if found is not None and (not key or key.strip('"]') in found):
            return True
    return False


def options(script: str) -> set[str]:
    """Names of the options of a script at the root."""
    classes = [x for x in vars(importlib.import_module(script.removesuffix(".py"))).values() if isinstance(x, type)]
    return {field.name for cls in classes if dataclasses.is_dataclass(cls) for field in dataclasses.fields(cls)}


def functions(file: str) -> set[str]:
    """Names of the functions at the top of a file; none if there is no such file."""
    text = (ROOT / file).read_text() if (ROOT / file).exists() else ""
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def missing(reference: str) -> str | None:
    """What is wrong with something in backticks; None if it exists, or has none of the forms of a reference."""
    if match := re.fullmatch(r"(\S+\.py): (\S+)", reference):
        return None if defined(*match.groups()) else f"{match[1]} has no {match[2]}"
    if match := re.fullmatch(r"(tests/\S+\.py)::(\w+)", reference):
        return None if match[2] in functions(match[1]) else f"{match[1]} has no {match[2]}"
    if match := re.fullmatch(r"(\w+\.py) --(\w+)", reference):
        return None if match[2] in options(match[1]) else f"{match[1]} has no option {match[2]}"
    if match := re.fullmatch(r"(\w+) = \w+", reference):
        return None if match[1] in options("train.py") else f"train.py has no option {match[1]}"
    if re.fullmatch(r"[\w/.-]+\.(py|md|toml)", reference):
        return None if (ROOT / reference).exists() else f"there is no {reference}"
    if re.fullmatch(r"[\w/]+", reference):
        named = {*SUITES, "theory", *SAMPLERS, *SCHEDULES, *LOSSES, *METRICS, *options("train.py")}
        said = f'"{reference}"' in Path(train.__file__).read_text()  # a key of metrics.jsonl
        return None if reference in named or said else f"{reference} is no suite, view, loss, metric or option"
    return None


def test_what_the_map_names_exists():
    assert not [problem for problem in map(missing, sorted(set(in_backticks(TEXT)))) if problem]


def test_each_line_of_an_entry_names_its_own_kind():
    """In these lines everything in backticks is a reference of the right kind, so none escapes the test above."""
    assert len(entries(TEXT)) > 100
    for entry in entries(TEXT):
        for name in in_backticks(entry.get("Tests", "")):
            assert re.fullmatch(r"tests/\S+\.py(::\w+)?", name), name
        for name in in_backticks(entry.get("Measured", "")):
            assert name in {*SUITES, "theory"} or re.fullmatch(r"docs/\w+\.md", name), name
        for name in in_backticks(entry.get("Code", "")):
            assert re.fullmatch(r"\S+\.py(: \S+| --\w+)|configs/\S+\.toml|\w+ = \w+", name) or name in SAMPLERS, name


def test_no_number_of_the_paper_is_left_out():
    """Entries "Eq. 1" to "Eq. 20", and so on: each once, and none that the paper does not have."""
    names = [entry["name"] for entry in entries(TEXT.split("## Where the paper contradicts itself")[0])]
    for kind, last in NUMBERED.items():
        found = [int(name.split()[-1]) for name in names if re.fullmatch(rf"{re.escape(kind)} \d+", name)]
        assert sorted(found) == list(range(1, last + 1)), kind
    assert [name.removeprefix("App. ") for name in names if name.startswith("App. ")] == APPENDICES


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("hps/samplers.py: log_q", None),
        ('hps/losses.py: LOSSES["ipo"]', None),
        ("hps/lab/world.py: World.is_harmful", None),
        ("hps/samplers.py: log_p", "hps/samplers.py has no log_p"),
        ("hps/samplin.py: log_q", "hps/samplin.py has no log_q"),
        ('hps/losses.py: LOSSES["lisc"]', 'hps/losses.py has no LOSSES["lisc"]'),
        ("tests/test_paper_map.py::test_nothing", "tests/test_paper_map.py has no test_nothing"),
        ("tests/test_no_file.py::test_nothing", "tests/test_no_file.py has no test_nothing"),
        ("train.py --beta", None),
        ("train.py --gama", "train.py has no option gama"),
        ("gama = 1", "train.py has no option gama"),
        ("docs/NONE.md", "there is no docs/NONE.md"),
        ("tail", "tail is no suite, view, loss, metric or option"),
    ],
)
def test_the_check_itself(reference, problem):
    assert missing(reference) == problem
