"""What the pages say about the code holds: commands, flags, paths, tests, figures, defaults."""

import ast
import contextlib
import dataclasses
import importlib
import io
import re
import sys
from functools import cache
from typing import Any

import pytest
from helpers import ROOT

from hps import options
from hps.evaluate.metrics import METRICS
from hps.lab.suites import SUITES
from hps.losses import LOSSES
from hps.samplers import SAMPLERS

PAGES = {"README.md": ROOT / "README.md"} | {f"docs/{path.name}": path for path in (ROOT / "docs").glob("*.md")}
# The log names what once was, and that page what is wrong.
PRESENT = {name: path for name, path in PAGES.items() if name not in ("docs/LOG.md", "docs/MISTAKES.md")}


def prose_of(markdown: str) -> str:
    """A text without its fenced blocks, inline code and addresses."""
    fences = re.compile(r"^ *```.*?^ *```", flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`|\(https?[^)]*\)", "", fences.sub("", markdown))


def code_of(markdown: str) -> str:
    """Fenced blocks and inline code, one per line; a backslash at a line's end joins the next one."""
    fenced = re.findall(r"^ *```[^\n]*\n(.*?)^ *```", markdown, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.MULTILINE | re.DOTALL))
    return re.sub(r"\\\n\s*", " ", "\n".join([*fenced, *inline]))


def calls(code: str) -> list[tuple[str, list[str], list[str]]]:
    """Module, sub-command and flags of each command that runs a script or module of ours."""
    found = []
    for line in code.splitlines():
        command = re.split(r"\s#|[|;&>]", line)[0]
        pattern = r"\b(train|eval|data_prep|benchmarks/\w+)\.py\b(.*)|python -m (hps\.[\w.]+)(.*)"
        if match := re.search(pattern, command):
            module = (match[1] or match[3]).replace("/", ".")
            words = (match[2] or match[4] or "").split()
            first = words[:1] if words and re.fullmatch(r"[a-z][a-z-]*", words[0]) else []
            found.append((module, first, [word.split("=")[0] for word in words if word.startswith("--")]))
    return found


def test_links_between_pages_lead_somewhere():
    for path in [*PAGES.values(), *(ROOT / "docs/results").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_paths_of_the_pages_exist():
    for name, path in PRESENT.items():
        inside = re.findall(
            r"\b(?:hps|configs|benchmarks|docs|tests|recipes)/[\w./-]*\w\.(?:py|toml|md|sh|png)\b", path.read_text()
        )
        absent = sorted({path for path in inside if not (ROOT / path).exists()})
        assert not absent, f"{name} names {absent}"


def test_make_targets_of_the_pages_exist():
    targets = set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name, path in PRESENT.items():
        named = set(re.findall(r"\bmake ((?!-)[\w-]+)", code_of(path.read_text())))
        assert named <= targets, f"{name} names {named - targets}"


@cache
def help_of(module: str, *words: str) -> str:
    """What a program, or one of its commands, prints for --help."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.setattr(sys, "argv", [module, *words, "--help"])
        importlib.import_module(module).main()
    assert printed.getvalue(), (module, *words)
    return printed.getvalue()


def test_flags_of_the_pages_exist():
    found = [(name, *call) for name, path in PRESENT.items() for call in calls(code_of(path.read_text()))]
    assert {"train", "eval", "data_prep", "hps.lab.reproduce", "hps.evaluate.judge"} <= {call[1] for call in found}
    for name, module, words, flags in found:
        if not flags:
            continue  # a benchmark may have no options at all, nor a --help
        known = {*re.findall(r"--[\w-]+", help_of(module, *words)), "--help"}
        unknown = sorted({"--" + flag[2:].replace("-", "_") for flag in flags} - known)
        assert not unknown, f"{name}: {' '.join((module, *words))} has no {', '.join(unknown)}"


def test_figures_of_the_readme_stand_in_the_results():
    """A measured number has a point or a unit in it; whoever quotes one quotes a page of results."""
    pattern = r"(?<![\w.])\d*\.\d+(?![\w.])|\d+(?= (?:%|h |min|minutes|seconds|MiB|times))"
    python = {f"3.{minor}" for minor in range(11, 15)}
    figures = set(re.findall(pattern, prose_of(PAGES["README.md"].read_text()))) - python
    results = PAGES["docs/RESULTS.md"].read_text() + PAGES["docs/PERFORMANCE.md"].read_text()
    assert not [x for x in figures if not re.search(rf"(?<![\d.]){re.escape(x)}(?![\d.])", results)]


@cache
def functions(file: str) -> set[str]:
    """Names of the functions at the top of a file; none if there is no such file."""
    text = (ROOT / file).read_text() if (ROOT / file).exists() else ""
    return {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def test_every_statement_of_reliability_has_its_test():
    """Each entry of the two lists of RELIABILITY.md that state a behaviour, and each break that was caught once."""
    page, tests = PAGES["docs/RELIABILITY.md"].read_text(), []
    for title in ("What is the same to the last bit", "What users of other code ran into"):
        section = page.split(f"## {title}")[1].split("\n## ")[0].split("### Neither")[0]
        entries = re.findall(r"^\* .*\n(?:  .*\n)*", section, flags=re.MULTILINE)
        assert len(entries) >= 19
        for entry in entries:
            named = re.findall(r"`(tests/\S+?\.py)::(test_\w+)`", entry)
            assert named, f"no test stands beside {entry}"
            tests += named
    breaks = re.findall(r",([\w/]+\.py)::(test_\w+),", (ROOT / "docs/results/breaks.csv").read_text())
    tests += [(f"tests/{path}", test) for path, test in breaks]
    assert len(breaks) > 100 and not [where for where in tests if where[1] not in functions(where[0])]


def test_names_and_defaults_of_the_readme_are_those_of_the_code():
    """`file.py: name` is defined at the top of that file, and `option = value` is train.py's default."""
    code = code_of(PAGES["README.md"].read_text())
    named = re.findall(r"^(\S+\.py): (\w+)$", code, flags=re.MULTILINE)
    defaults = re.findall(r"^(\w+) = (\w+)$", code, flags=re.MULTILINE)
    assert len(named) >= 6 and len(defaults) >= 3
    for path, name in named:
        body = ast.parse((ROOT / path).read_text()).body
        assert name in {getattr(node, "name", None) for node in body}, f"{path} has no {name}"
    for option, value in defaults:
        assert str(getattr(options.Config, option)) == value, f"{option} is not {value} by default"
    assert f"one every {options.Config.save_minutes:g} minutes" in PAGES["README.md"].read_text()


# -- the map from the paper to the code --

MAP = PAGES["docs/PAPER_MAP.md"].read_text()
NUMBERED = {"Eq.": 20, "Table": 8, "Figure": 1, "Theorem": 3}  # of the printed paper
APPENDICES = "A.1 A.2.1 A.2.2 A.3.1 A.3.2 B.1 B.2.1 B.2.2 C.1 C.2 D.1 D.2 D.3 E".split()


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


def options_of(script: str) -> set[str]:
    """Names of the options of a script at the root."""
    classes = [x for x in vars(importlib.import_module(script.removesuffix(".py"))).values() if isinstance(x, type)]
    return {field.name for cls in classes if dataclasses.is_dataclass(cls) for field in dataclasses.fields(cls)}


def exists(reference: str) -> bool:
    """Whether what stands in backticks is there, if it has one of the forms of a reference."""
    if match := re.fullmatch(r"(tests/\S+\.py)::(\w+)", reference):
        return match[2] in functions(match[1])
    if match := re.fullmatch(r"(\S+\.py): (\S+)", reference):
        return defined(*match.groups())
    if match := re.fullmatch(r"(\w+\.py) --(\w+)", reference):
        return match[2] in options_of(match[1])
    if match := re.fullmatch(r"(\w+) = \w+", reference):
        return match[1] in options_of("train.py")
    if re.fullmatch(r"[\w/.-]+\.(py|md|toml)", reference):
        return (ROOT / reference).exists()
    if re.fullmatch(r"[\w/]+", reference):
        named = {*SUITES, "theory", *SAMPLERS, *LOSSES, *METRICS, *options_of("train.py")}
        named |= {*options.CHOICES["gamma_schedule"]}
        return reference in named or f'"{reference}"' in (ROOT / "train.py").read_text()  # a key of metrics.jsonl
    return True


def test_what_the_map_names_exists():
    assert not [reference for reference in re.findall(r"`([^`\n]+)`", MAP) if not exists(reference)]


def test_no_number_of_the_paper_is_left_out():
    """Entries "Eq. 1" to "Eq. 20", and so on: each once, and none that the paper does not have."""
    names = re.findall(r"^\* \*\*(.+?)\*\*: ", MAP.split("## Where the paper contradicts itself")[0], re.MULTILINE)
    for kind, last in NUMBERED.items():
        found = [int(name.split()[-1]) for name in names if re.fullmatch(rf"{re.escape(kind)} \d+", name)]
        assert sorted(found) == list(range(1, last + 1)), kind
    assert [name.removeprefix("App. ") for name in names if name.startswith("App. ")] == APPENDICES
