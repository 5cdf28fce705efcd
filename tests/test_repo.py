"""The rules of the house that a machine can check, and what the README and docs/DATA.md say about the code."""

import ast
import importlib.metadata
import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "eval", "data_prep")
# Level of each core module: it may import those of lower levels, and its own level only where named here.
LEVELS = {
    "hps.losses": 0, "hps.sampling": 0, "hps.config": 0, "hps.dist": 0, "hps.kernels": 0, "hps.products": 0,
    "hps.loggers": 1,  # third-party loggers, which level 0 does without
    "hps.logps": 1, "hps.packing": 1, "hps.attention": 1, "hps.losses_listwise": 1, "hps.plan": 1,
    "hps.model": 2, "hps.checkpoint": 2,
    "hps.reference": 3, "hps.reward_model": 3,
}  # fmt: skip
SAME_LEVEL = {("hps.attention", "hps.packing")}
LOSSES_MAY_IMPORT = {"torch", "numpy"}
LEVEL_0_MAY_IMPORT = {"torch", "numpy", "triton"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


PACKAGE = {name_of(path): path for path in sorted((ROOT / "hps").rglob("*.py"))}
MODULES = PACKAGE | {name: ROOT / f"{name}.py" for name in SCRIPTS if (ROOT / f"{name}.py").exists()}


def tracked() -> list[Path]:
    """The files of git's index and the new ones beside them that git does not ignore."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(path: Path) -> set[str]:
    """Full names of what a file imports anywhere in it: `from hps import dist` gives hps.dist."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            ours = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= ours or {node.module or ""}
    return found


def house_violation(module: str, imported: str) -> str:
    """Why `module` must not import `imported` (both ours), or the empty string."""
    if imported in SCRIPTS:
        return "nothing imports a script"
    if module == "hps.losses":
        return "losses.py imports nothing of ours"
    if module in SCRIPTS or module.startswith("hps.lab."):
        return ""
    part = {"hps.data": 1, "hps.evaluate": 2, "hps.lab": 3}
    of_module, of_imported = (part.get(".".join(name.split(".")[:2]), 0) for name in (module, imported))
    if of_imported > of_module:
        return "imports go from lab to evaluate to data to the core, never back"
    if of_module == 1 and LEVELS.get(imported, 0) > 2:
        return "hps.data uses the core's levels 0 to 2"
    if of_module == 0 and LEVELS[imported] >= LEVELS[module] and (module, imported) not in SAME_LEVEL:
        return f"level {LEVELS[module]} of the core imports lower levels only"
    return ""


def test_every_core_module_has_a_level():
    core = {name for name in PACKAGE if name.count(".") == 1 and PACKAGE[name].name != "__init__.py"}
    assert core <= LEVELS.keys(), "give the new module a level here"


def test_import_directions():
    wrong = []
    for module, path in MODULES.items():
        for imported in sorted(name for name in imports(path) if name in MODULES):
            if reason := house_violation(module, imported):
                wrong.append(f"{module} imports {imported}: {reason}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "imported", "allowed"),
    [
        ("hps.model", "hps.logps", True),
        ("hps.logps", "hps.model", False),
        ("hps.packing", "hps.attention", False),
        ("hps.attention", "hps.packing", True),
        ("hps.losses", "hps.config", False),
        ("hps.model", "hps.data.tokens", False),
        ("hps.data.tokens", "hps.model", True),
        ("hps.data.tokens", "hps.reference", False),
        ("hps.data.tokens", "hps.evaluate.metrics", False),
        ("hps.evaluate.judge", "hps.data.generate", True),
        ("hps.evaluate.judge", "hps.lab.world", False),
        ("hps.lab.world", "hps.evaluate.metrics", True),
        ("hps.lab.world", "train", False),
        ("train", "eval", False),
        ("train", "hps.lab.world", True),
    ],
)
def test_the_direction_check_itself(module, imported, allowed):
    assert (house_violation(module, imported) == "") is allowed


def test_third_party_imports_of_the_lowest_level_and_of_losses():
    for module, path in PACKAGE.items():
        if LEVELS.get(module) == 0:
            outside = {name.split(".")[0] for name in imports(path)} - {"hps"} - sys.stdlib_module_names
            assert outside <= LEVEL_0_MAY_IMPORT, f"{module} imports {outside}"
    if "hps.config" in PACKAGE:
        assert {name.split(".")[0] for name in imports(PACKAGE["hps.config"])} <= sys.stdlib_module_names


def test_importing_everything_has_no_side_effects():
    no_triton = importlib.util.find_spec("triton") is None  # it is for Linux only; hps.logps does without
    names = [name for name in MODULES if not (no_triton and name == "hps.kernels")]
    code = f"""
import contextlib, importlib, io, logging, os, random
import numpy, torch, transformers, peft  # what these do themselves is not ours
def state():
    flags = (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision(),
             torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
             torch.cuda.is_initialized(), torch.distributed.is_initialized())
    seeds = (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate())
    return flags, seeds, dict(os.environ), list(logging.getLogger().handlers), os.getcwd()
before = state()
printed = io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    for name in {names!r}:
        importlib.import_module(name)
        for what, old, new in zip(("flags", "seeds", "environment", "logging", "folder"), before, state()):
            assert old == new, f"importing {{name}} changes {{what}}"
assert not printed.getvalue(), printed.getvalue()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_text_files_are_ascii():
    for path in tracked():
        if path.suffix in {".py", ".toml", ".md", ".cff", ".lock"} or path.name in ("Makefile", "run"):
            lines = path.read_bytes().splitlines()
            wrong = [number for number, line in enumerate(lines, 1) if not line.isascii()]
            assert not wrong, f"{path.relative_to(ROOT)}: not ASCII in lines {wrong}"


def test_the_package_is_not_ignored_by_git():
    files = {path for path in tracked() if path.suffix == ".py"}
    ignored = sorted(str(path.relative_to(ROOT)) for path in set(MODULES.values()) - files)
    assert not ignored, f".gitignore hides {ignored}"


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def forbidden(path: Path) -> list[str]:
    """Uses of what could run code out of a file or hide where a name comes from."""
    found = []
    for node in ast.walk(tree(path)):
        text = ""
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            text = "wildcard import"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            text = ", ".join(name for name in names if name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.Attribute):
            text = name if (name := ast.unparse(node)) in ("torch.load", "torch.save", "os.system") else ""
        elif isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle", "trust_remote_code"):
            off = isinstance(node.value, ast.Constant) and not node.value.value
            text = "" if off else f"{node.arg}="
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec"):
            text = node.id
        if text:
            found.append(f"{path.name}:{getattr(node, 'lineno', 0)}: {text}")
    return found


def test_no_pickle_no_shell_no_wildcard():
    found = [line for path in MODULES.values() for line in forbidden(path)]
    allowed = [["reward_model.py", " trust_remote_code="]]  # behind --remote_revision
    assert [line.split(":")[0::2] for line in found] == allowed


def test_the_forbidden_check_itself(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(
        "from os import *\nimport pickle as p\nfrom joblib import dump\nimport torch\ntorch.load('x')\n"
        "run('x', shell=True)\nrun('x', shell=False)\nmodel.eval()\neval('1')\nimport jobliberty\n"
    )
    assert sorted(int(line.split(":")[1]) for line in forbidden(path)) == [1, 2, 3, 5, 6, 9]


def untyped(path: Path) -> list[str]:
    """Public functions, and public methods of public classes, with an unannotated argument or return."""
    body = tree(path).body
    classes = [node for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    found = []
    for node in [*body, *(child for cls in classes for child in cls.body)]:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [child for child in ast.walk(node.args) if isinstance(child, ast.arg)]
            names = [a.arg for a in arguments if not a.annotation and a.arg not in ("self", "cls", "ctx")]
            if names or node.returns is None:
                found.append(f"{path.name}:{node.lineno}: {node.name} {' '.join(names) or 'return type'}")
    return found


def test_public_signatures_are_typed():
    assert not [line for path in PACKAGE.values() for line in untyped(path)]


def test_the_typing_check_itself(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def a(x: int) -> int: 1\ndef b(x: int): 1\ndef c(*, y) -> int: 1\ndef _d(x): 1\n")
    assert [line.split()[1] for line in untyped(path)] == ["b", "c"]


# -- packaging --


def test_the_citation_names_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_lock_pins_every_dependency_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("#")[0].split(";")[0].strip() for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[0-9][\w.]*", pin) for pin in pins), "name==version, no local tag"
    locked = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    needed = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert {re.split(r"[^\w-]", line)[0].lower() for line in needed} <= locked
    for pin in pins:  # what the locked packages need is locked as well, so that pip has nothing to choose
        try:
            requires = importlib.metadata.requires(pin.split("==")[0]) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a package of another platform
        names = [re.split(r"[^\w.-]", line)[0] for line in requires if ";" not in line]
        wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in names} - {"setuptools"}
        assert wanted <= locked, f"{pin} needs {wanted - locked}"


def test_the_makefile_installs_the_locked_torch():
    pin = re.search(r"^torch==\S+", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pin and f"install --quiet {pin[0]}\n" in (ROOT / "Makefile").read_text()


# -- the README --


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def code_of(markdown: str) -> str:
    """Fenced blocks and inline code, one per line; a backslash at a line's end joins the next one."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL))
    return re.sub(r"\\\n\s*", " ", "\n".join([*fenced, *inline]))


def script_calls(code: str) -> list[tuple[str, list[str], list[str]]]:
    """Script, sub-command words and flags of each command that names one of our scripts."""
    calls = []
    for line in code.splitlines():
        command = re.split(r"\s#|[|;&>]", line)[0]
        if found := re.search(r"\b(train|eval|data_prep)\.py\b(.*)", command):
            words = found[2].split()
            first = words[:1] if words and re.fullmatch(r"[a-z][a-z-]*", words[0]) else []
            flags = [word.split("=")[0] for word in words if word.startswith("--")]
            calls.append((found[1], first, flags))
    return calls


def test_reading_commands_out_of_markdown():
    text = (
        "Run `make test`.\n```bash\ntorchrun -n 2 train.py --lr 1 \\\n  --beta=2  # --no\n"
        "./data_prep.py doctor --data x\n```\n"
    )
    calls = [("train", [], ["--lr", "--beta"]), ("data_prep", ["doctor"], ["--data"])]
    assert script_calls(code_of(text)) == calls


@pytest.fixture
def readme() -> str:
    return (ROOT / "README.md").read_text()


@cache
def help_of(*words: str) -> str:
    """What a script, or one of its commands, prints for --help."""
    argv = [sys.executable, f"{words[0]}.py", *words[1:], "--help"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(argv[1:])}: {done.stderr}"
    return done.stdout


def test_make_targets_of_the_readme_exist(readme):
    named = set(re.findall(r"\bmake ((?!-)[\w-]+)", code_of(readme)))
    assert named, "the README names no make target"
    assert named <= make_targets()


@pytest.mark.parametrize("page", ["README.md", "docs/DATA.md"])
def test_flags_of_the_pages_exist(page):
    calls = script_calls(code_of((ROOT / page).read_text()))
    assert {"train", "data_prep"} <= {script for script, _, _ in calls}, f"{page} shows no command"
    for script, command, flags in calls:
        known = {*re.findall(r"--[\w-]+", help_of(script, *command)), "--help"}
        unknown = sorted({"--" + flag[2:].replace("-", "_") for flag in flags} - known)
        assert not unknown, f"{page}: {' '.join((script, *command))} has no {', '.join(unknown)}"


@pytest.mark.parametrize("page", ["README.md", "docs/DATA.md"])
def test_paths_of_the_pages_exist(page):
    text = (ROOT / page).read_text()
    inside = re.findall(r"\b(?:hps|configs|benchmarks|docs|tests)/[\w./-]*\w\.(?:py|toml|md)\b", text)
    absent = sorted({path for path in inside if not (ROOT / path).exists()})
    assert not absent, f"{page} names {absent}"
