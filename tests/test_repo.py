"""The rules of the house that a machine can check."""

import ast
import importlib.metadata
import importlib.util
import inspect
import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted((ROOT / "hps").rglob("*.py")), *(ROOT / f"{name}.py" for name in ("train", "eval", "data_prep"))]
MODULES = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in FILES}


def tracked() -> list[Path]:
    """The files of git's index and the new ones beside them that git does not ignore."""
    argv = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


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


def test_text_files_are_ascii_and_name_no_registry():
    """Where packages come from is the machine's own affair."""
    for path in tracked():
        if path.suffix in {".py", ".toml", ".md", ".cff", ".lock"} or path.name in ("Makefile", "run"):
            lines = path.read_bytes().splitlines()
            wrong = [number for number, line in enumerate(lines, 1) if not line.isascii()]
            assert not wrong, f"{path.relative_to(ROOT)}: not ASCII in lines {wrong}"
            pattern = rb"(--(extra-)?index-url|--trusted-host|--find-links|index_url|pypi\.org/simple)"
            named = re.search(pattern, b"\n".join(lines))
            assert named is None or path.name == "test_repo.py", f"{path.name}: {named and named[0]}"


# The value that is forbidden for a keyword is every one but this.
KEYWORDS = {"allow_pickle": False, "trust_remote_code": False, "weights_only": True, "use_safetensors": True}


def loose(module: ast.Module) -> list[str]:
    """Calls that could run code of a file's: a keyword with a forbidden value, or without one that transformers needs.

    What else could, pyproject.toml has ruff forbid.
    """
    found = []
    for call in (node for node in ast.walk(module) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {word.arg: word.value for word in call.keywords}
        for word in given.keys() & KEYWORDS.keys():
            value = given[word]
            if not (isinstance(value, ast.Constant) and value.value is KEYWORDS[word]):
                found.append(f"{name} with {word}")
        if re.fullmatch(r"[Aa]uto\w*\.from_pretrained", name):
            needed = {"trust_remote_code"} if name[0] == "A" else set()  # auto: what load_whole is given
            needed |= {"use_safetensors"} if name.startswith(("AutoModel", "auto")) else set()
            found += [f"{name} without {word}" for word in sorted(needed - given.keys())]
    return found


def test_no_file_can_run_its_code():
    found = {f"{path.name}: {line}" for path in MODULES.values() for line in loose(tree(path))}
    assert found == {
        "smollm2.py: AutoModelForCausalLM.from_pretrained without use_safetensors",  # a GGUF file of a fixed package
    }


def test_ruff_forbids_what_else_could():
    lint = [
        "from os import *", "import pickle", "import joblib", "from torch import load", "import shelve", "exec('')",
        "eval('1')", "os.system('x')", "yaml.load(x)", "subprocess.run('x', shell=True)", "torch.load(x)",
        "pandas.read_pickle(x)", "def f(x) -> int: return 1", "def g(): return 1",
    ]  # fmt: skip
    text = "import os, pandas, subprocess, torch, yaml\n" + "\n".join(lint)
    argv = [sys.executable, "-m", "ruff", "check", "--stdin-filename=hps/x.py", "--output-format=concise", "-"]
    said = subprocess.run(argv, cwd=ROOT, input=text, capture_output=True, text=True).stdout
    rules = r"x\.py:(\d+):\d+: (?:F403|S\d+|TID251|ANN\d+)"
    assert {int(line) for line in re.findall(rules, said)} == set(range(2, 2 + len(lint)))


def options_of(path: Path) -> set[str]:
    """The options of the dataclasses of a file that `config` fills: Config, Options, or a command's."""
    classes = [node for node in tree(path).body if isinstance(node, ast.ClassDef) and node.decorator_list]
    filled = [node for node in classes if path.name == "data_prep.py" or node.name in ("Config", "Options")]
    return {ast.unparse(field.target) for node in filled for field in node.body if isinstance(field, ast.AnnAssign)}


def test_every_option_is_read():
    """Somewhere, as an attribute, by its name in a string, or as the argument of a loss or of what writes a world."""
    from hps.lab import world
    from hps.methods import all_losses
    from hps.samplers import SAMPLERS, sampler_options

    paths = [*MODULES.values(), *(ROOT / "benchmarks").glob("*.py")]
    options = set().union(*map(options_of, paths))
    read = {*inspect.signature(world.write).parameters, *re.findall(r'[."](\w+)', "".join(map(Path.read_text, paths)))}
    read |= read.union(*map(sampler_options, SAMPLERS), *(loss.options for loss in all_losses().values()))
    assert len(options) > 100 and not options - read


# -- packaging --


def test_the_lock_pins_every_dependency_exactly():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    entries = text.replace("\\\n", " ").splitlines()
    pins = [re.split("[ ;]", entry)[0] for entry in entries]
    assert all(re.fullmatch(r"[\w.-]+==[0-9][\w.]*", pin) for pin in pins), "name==version, no local tag"
    for entry in entries:  # of every file that the version has, so that every platform is served
        hashed = r"\S+( ?; [^-]+)?(\s+--hash=sha256:[0-9a-f]{64})+"
        assert re.fullmatch(hashed, entry.strip()), f"name==version --hash=sha256:... ...: {entry[:99]}"
    locked = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins} | {"torch"}  # in the Makefile
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name != "bnb"}  # of GPUs
    needed = [*project["dependencies"], *itertools.chain(*extras.values())]
    assert {re.split(r"[^\w-]", line)[0].lower() for line in needed} <= locked
    for pin in [*pins, "torch"]:  # what the locked packages need is locked as well, so that pip has nothing to choose
        try:
            requires = importlib.metadata.requires(pin.split("==")[0]) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a package of another platform
        names = [re.split(r"[^\w.-]", line)[0] for line in requires if ";" not in line]
        wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
        assert wanted <= locked, f"{pin} needs {wanted - locked}"
