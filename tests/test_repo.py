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
SCRIPTS = ("train", "eval", "data_prep")


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


PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
LOADERS = {("torch", "load"), ("torch", "save"), ("torch.serialization", "load"), ("os", "system"), ("os", "popen"),
           ("subprocess", "getoutput"), ("subprocess", "getstatusoutput"), ("yaml", "load"), ("yaml", "unsafe_load"),
           ("yaml", "full_load"), ("pandas", "read_pickle"), ("pd", "read_pickle")}  # fmt: skip
# The value that is forbidden for a keyword is every one but this.
KEYWORDS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True,
            "use_safetensors": True}  # fmt: skip


def forbidden(path: Path) -> list[str]:
    """Uses of what could run code out of a file or hide where a name comes from."""
    found = []
    for node in ast.walk(tree(path)):
        texts = []
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            texts = ["wildcard import"]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [alias.name for alias in node.names]
            texts = [name for name in [*names, module] if name.split(".")[0] in PICKLES]
            texts += [f"{module}.{name}" for name in names if (module, name) in LOADERS]
        elif isinstance(node, ast.Attribute):
            texts = [name for name in [ast.unparse(node)] if tuple(name.rsplit(".", 1)) in LOADERS]
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            texts = [node.id]
        elif isinstance(node, ast.Call):
            texts = [f"{word.arg}=" for word in node.keywords if word.arg in KEYWORDS and not fixed(word)]
            texts += lacks(node)
        found += [f"{path.name}:{getattr(node, 'lineno', 0)}: {text}" for text in texts]
    return found


def fixed(word: ast.keyword) -> bool:
    return isinstance(word.value, ast.Constant) and word.value.value is KEYWORDS[str(word.arg)]


def lacks(call: ast.Call) -> list[str]:
    """What a call of transformers' from_pretrained does not say, and must: no code of a model's, and no pickle."""
    name = ast.unparse(call.func)
    if not re.fullmatch(r"Auto\w+\.from_pretrained", name):
        return []
    given = {word.arg for word in call.keywords}
    needed = {"trust_remote_code"} | ({"use_safetensors"} if name.startswith("AutoModel") else set())
    return [f"{name} without {word}" for word in sorted(needed - given)]


def test_no_pickle_no_shell_no_wildcard():
    found = [line for path in MODULES.values() for line in forbidden(path)]
    allowed = [["reward_model.py", " trust_remote_code="]]  # behind --remote_revision
    pinned = [line for line in found if "smollm2.py" in line]  # a GGUF file of a package whose version is fixed
    assert [line.split(": ")[1] for line in pinned] == ["AutoModelForCausalLM.from_pretrained without use_safetensors"]
    assert [line.split(":")[0::2] for line in found if line not in pinned] == allowed


def test_the_forbidden_check_itself(tmp_path):
    path = tmp_path / "bad.py"
    bad = [
        "from os import *", "import pickle as p", "from joblib import dump", "torch.load('x')", "run('x', shell=True)",
        "eval('1')", "from torch import load", "import marshal", "import shelve", "os.popen('x')", "yaml.load(x)",
        "np.load(x, allow_pickle=flag)", "f(x, weights_only=False)", "subprocess.getoutput('x')", "__import__('x')",
        "AutoConfig.from_pretrained(x)", "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=False, use_safetensors=None)", "pd.read_pickle(x)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=True)", "run('x', shell=0)",
    ]  # fmt: skip
    good = [
        "import torch", "run('x', shell=False)", "model.eval()", "import jobliberty", "re.compile('x')", "json.load(x)",
        "yaml.safe_load(x)", "np.load(x)", "np.load(x, allow_pickle=False)", "f(x, weights_only=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=False, use_safetensors=True)",
        "AutoTokenizer.from_pretrained(x, trust_remote_code=False)", "PeftModel.from_pretrained(base, x)",
    ]  # fmt: skip
    path.write_text("\n".join([*bad, *good]))
    assert sorted({int(line.split(":")[1]) for line in forbidden(path)}) == list(range(1, len(bad) + 1))


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


def options_of(path: Path) -> dict[str, set[str]]:
    """Names of the options of each dataclass of a file that `config` fills: Config, Options, or a command's."""
    found = {}
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            commands = path.name == "data_prep.py"
            if commands or node.name in ("Config", "Options"):
                found[node.name] = {ast.unparse(f.target) for f in node.body if isinstance(f, ast.AnnAssign)}
    return found


def named(path: Path) -> set[str]:
    """Attributes and strings of a file outside its dataclasses of options."""
    classes = options_of(path)
    found = set()
    for node in tree(path).body:
        if not (isinstance(node, ast.ClassDef) and node.name in classes):
            for child in ast.walk(node):
                if isinstance(child, ast.Attribute):
                    found.add(child.attr)
                elif isinstance(child, ast.Constant) and isinstance(child.value, str):
                    found.add(child.value)
    return found


def unread(path: Path, elsewhere: set[str]) -> list[str]:
    """Options of a file that nothing in it reads, as an attribute or by their name in a string, nor `elsewhere`."""
    read = named(path) | elsewhere
    classes = options_of(path)
    return [f"{path.name}: {name}.{option}" for name, options in classes.items() for option in sorted(options - read)]


def test_every_option_is_read():
    from hps.lab import world
    from hps.options import all_losses
    from hps.samplers import SAMPLERS, sampler_options

    # By the table of losses and all over train.py, and as the arguments of the function that writes a world.
    of_train = [
        path
        for module, path in MODULES.items()
        if module in ("train", "hps.options", "hps.batches", "hps.objective", "hps.statistics", "hps.record")
        or module.startswith("hps.extra.")
    ]
    of_methods = [*map(sampler_options, SAMPLERS), *(loss.options for loss in all_losses().values())]
    elsewhere = {"hps.options": set().union(*map(named, of_train), *of_methods)}
    elsewhere |= {"data_prep": set(inspect.signature(world.write).parameters)}
    modules = MODULES | {path.stem: path for path in (ROOT / "benchmarks").glob("*.py")}
    assert sum(len(options) for path in modules.values() for options in options_of(path).values()) > 150
    assert not [line for name, path in modules.items() for line in unread(path, elsewhere.get(name, set()))]


# -- packaging --


def test_the_citation_names_the_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()


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
    needed = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert {re.split(r"[^\w-]", line)[0].lower() for line in needed} <= locked
    for pin in [*pins, "torch"]:  # what the locked packages need is locked as well, so that pip has nothing to choose
        try:
            requires = importlib.metadata.requires(pin.split("==")[0]) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # a package of another platform
        names = [re.split(r"[^\w.-]", line)[0] for line in requires if ";" not in line]
        wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in names}
        assert wanted <= locked, f"{pin} needs {wanted - locked}"


def test_the_makefile_installs_by_hash_and_torch_by_version():
    """pip must choose nothing: hashes are required of all but torch, which comes when all that it needs is there."""
    made = (ROOT / "Makefile").read_text().split("$(STAMP):")[1].split("\n\n")[0]
    installs = re.findall(r"pip install --quiet (.*)", made)
    assert installs[0] == "--require-hashes --no-deps --requirement requirements.lock"
    assert re.fullmatch(r"torch==[0-9.]+", installs[1])
    assert installs[2] == "--editable . --no-deps --no-build-isolation" and "pip check" in made
    version = installs[1].partition("==")[2]
    assert f"torch {version} asks for" in (ROOT / "requirements.lock").read_text()  # of triton
    assert importlib.metadata.version("torch").split("+")[0] == version


def test_no_file_names_a_registry():
    """Where packages come from is the machine's own affair."""
    for path in tracked():
        if path.suffix in {".py", ".toml", ".lock", ".md"} or path.name in ("Makefile", "run"):
            text = path.read_text(encoding="utf-8")
            named = re.search(r"(--(extra-)?index-url|--trusted-host|--find-links|index_url|pypi\.org/simple)", text)
            assert named is None or path.name == "test_repo.py", f"{path.name}: {named and named[0]}"
