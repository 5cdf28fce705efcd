"""The rules that keep the house small: what `import train` loads, no import circle, and who may import whom."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "eval", "data_prep")
OUTER = ("hps.prepare", "hps.evaluate", "hps.lab")  # rooms that training never enters
CLOSURE_LINES = 3500  # of all files that `import train` loads; may only fall
OF_OURS_LINES = 14001  # of hps and the scripts; room for checks of what users bring, see docs/RELIABILITY.md
# Rooms from the inside out: a module may import its own room and those before it.
ROOMS = ("core", "hps.data", "hps.extra", "hps.prepare", "hps.evaluate", "hps.lab")
# A method's facts are looked up by its name, and answers during training are those of the decoder.
OUTWARDS = {
    ("hps.methods", "hps.extra.losses"),
    ("hps.methods", "hps.extra.boards"),
    ("hps.io.loggers", "hps.extra.boards"),
    ("hps.batches", "hps.extra.losses"),
    ("hps.batches", "hps.prepare.importers"),
    ("hps.start", "hps.extra.quantised"),
    ("hps.start", "hps.extra.reward_model"),
    ("hps.extra.samples", "hps.prepare.generate"),
}


def modules_of(root: Path) -> dict[str, Path]:
    files = [*sorted((root / "hps").rglob("*.py")), *(root / f"{name}.py" for name in SCRIPTS)]
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = modules_of(ROOT)


def imports(path: Path, known: dict[str, Path], *, anywhere: bool) -> set[str]:
    """Names of ours that a file imports: at its top, or anywhere in it; `from hps import dist` gives hps.dist."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; write the full name"
            names = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            found |= names or {node.module or ""}
    return found & known.keys()


def closure(start: str, known: dict[str, Path]) -> set[str]:
    """What importing `start` loads of ours, packages of the imported modules included."""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports(known[name], known, anywhere=False)
            waiting += [parent for parent in [name.rpartition(".")[0]] if parent in known]
    return seen


def circle(known: dict[str, Path]) -> list[str]:
    """The modules of one import circle, imports inside functions included, or none."""
    arrows = {name: imports(path, known, anywhere=True) for name, path in known.items()}
    while free := {name for name, to in arrows.items() if not to & arrows.keys()}:
        arrows = {name: to for name, to in arrows.items() if name not in free}
    return sorted(arrows)


def room(name: str) -> str:
    """The room of a module: `core` for what stands in hps/ itself and in hps/io."""
    part = ".".join(name.split(".")[:2])
    return part if part in ROOMS else "core"


def lines(names) -> int:
    return sum(len(MODULES[name].read_text(encoding="utf-8").splitlines()) for name in names)


def test_what_import_train_loads():
    loaded = closure("train", MODULES)
    assert lines(loaded) <= CLOSURE_LINES, "training has grown: import what it needs rarely where it needs it"
    entered = sorted(name for name in loaded if name.startswith(OUTER))
    assert not entered, "training must load nothing of the outer rooms"


def test_all_of_ours_stays_small():
    assert lines(MODULES) <= OF_OURS_LINES


def test_no_import_circle():
    assert circle(MODULES) == []


def test_rooms_import_inwards():
    wrong = []
    for name, path in MODULES.items():
        for imported in imports(path, MODULES, anywhere=True):
            outwards = name not in SCRIPTS and ROOMS.index(room(imported)) > max(1, ROOMS.index(room(name)))
            if imported in SCRIPTS or (outwards and (name, imported) not in OUTWARDS):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_losses_and_options_stand_alone():
    """The losses import nothing of ours, and reading options asks for nothing but the standard library."""
    assert not imports(MODULES["hps.losses"], MODULES, anywhere=True)
    alone = {"hps", "hps.config", "hps.options"}
    assert closure("hps.options", MODULES) == alone
    nodes = [node for name in alone for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8")))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in modules - {"hps"}} <= sys.stdlib_module_names
