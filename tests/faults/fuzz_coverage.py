"""python fuzz_coverage.py TARGET FOLDER [options of libFuzzer] [corpus]: inputs that reach new lines of hps."""

import sys
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
with atheris.instrument_imports(include=["hps", "train"]):
    import fuzz_targets

fuzz_targets.SECONDS = 0  # libFuzzer's own alarm looks at the clock
name, folder, *options = sys.argv[1:]


def one(data: bytes) -> None:
    fuzz_targets.outcome(name, data, Path(folder))


atheris.Setup([sys.argv[0], *options], one)
atheris.Fuzz()
