"""What the pages must be, ten of them for a reader, and what they say about the code: commands, flags, paths, tests."""

import ast
import contextlib
import importlib
import io
import re
import sys
from functools import cache

import pytest
from helpers import ROOT

from hps import options

PAGES = {"README.md": ROOT / "README.md"} | {f"docs/{path.name}": path for path in (ROOT / "docs").glob("*.md")}
NAMES = "RESULTS PERFORMANCE PAPER_MAP DATA METRICS EVALUATION RELIABILITY THEORY LOG".split()
PRESENT = {name: path for name, path in PAGES.items() if name != "docs/LOG.md"}  # the log names what once was


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


def test_reading_commands_out_of_markdown():
    text = (
        "Run `make test`, `python -m hps.lab.theory --out x`.\n```bash\n"
        "torchrun -n 2 train.py --lr 1 \\\n  --beta=2  # no\n./data_prep.py doctor --data x\n```\n"
    )
    expected = [("train", [], ["--lr", "--beta"]), ("data_prep", ["doctor"], ["--data"])]
    assert calls(code_of(text)) == [*expected, ("hps.lab.theory", [], ["--out"])]


def test_there_are_ten_pages_and_the_readme_leads_to_each():
    assert PAGES.keys() == {"README.md", *(f"docs/{name}.md" for name in NAMES)}
    readme = PAGES["README.md"].read_text()
    assert not [name for name in NAMES if f"docs/{name}.md" not in readme]
    assert len(PAGES["docs/RESULTS.md"].read_text().splitlines()) <= 150


def test_lines_and_cells_fit_a_screen():
    """160 characters for a line but for addresses, 100 for a cell of a table."""
    for path in [*PAGES.values(), *(ROOT / "docs/results").glob("*.md")]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(re.sub(r"https?://\S+", "", line)) <= 160, f"{path.name}:{number} is too long"
            if line.startswith("|"):
                assert max(map(len, line.split("|"))) <= 102, f"{path.name}:{number} has a cell that is too long"


def test_numbers_have_their_leading_zero():
    for name, path in PAGES.items():
        found = re.findall(r"(?<![\w.])\.\d+", prose_of(path.read_text()))
        assert not found, f"{name}: {found}"


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
    figures = set(re.findall(pattern, prose_of(PAGES["README.md"].read_text()))) - {"3.11"}  # Python
    results = PAGES["docs/RESULTS.md"].read_text() + PAGES["docs/PERFORMANCE.md"].read_text()
    assert not [x for x in figures if not re.search(rf"(?<![\d.]){re.escape(x)}(?![\d.])", results)]


def test_every_statement_of_reliability_has_its_test():
    """Each entry of the two lists of RELIABILITY.md that state a behaviour, for each a test that exists."""
    page = PAGES["docs/RELIABILITY.md"].read_text()
    for title in ("What is the same to the last bit", "What users of other code ran into"):
        section = page.split(f"## {title}")[1].split("\n## ")[0].split("### Neither")[0]
        entries = re.findall(r"^\* .*\n(?:  .*\n)*", section, flags=re.MULTILINE)
        assert len(entries) >= 19
        for entry in entries:
            named = re.findall(r"`(tests/\S+?\.py)::(test_\w+)`", entry)
            assert named, f"no test stands beside {entry}"
            for path, test in named:
                functions = {
                    n.name for n in ast.parse((ROOT / path).read_text()).body if isinstance(n, ast.FunctionDef)
                }
                assert test in functions, f"{path} has no {test}"


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
