"""run.json: the settings of a run and the hashes of what it began with, which a run that goes on must match."""

import sys
from pathlib import Path

from hps import dist
from hps.io import files
from hps.methods import changed_settings
from hps.options import Config, settings

RECORD = "restore it, or start again in a new --out"


def check_folder(out: Path, c: Config, started: bool) -> None:
    """ValueError where the folder holds a run with other settings."""
    path = out / "run.json"
    if path.exists() and (started or (out / "policy").exists()):
        before = files.read_record(path, RECORD, config=dict)["config"]
        pairs = [(k, before.get(k), v) for k, v in settings(c).items()]  # a path may go by another of its names
        changed = [f"{k}: {a!r} -> {b!r}" for k, a, b in pairs if Path(str(a)).resolve() != Path(str(b)).resolve()]
        if changed:
            raise ValueError(f"{out} holds a run with other settings ({'; '.join(changed)}): choose another --out")


def claim(out: Path, c: Config, inputs: dict[str, str], started: bool, ranks: dist.Ranks) -> None:
    """Write run.json; for a run that goes on, ValueError if what its paths hold is not what it began with."""
    path = out / "run.json"
    if started:
        before = files.read_record(path, RECORD, inputs=dict)["inputs"]
        changed = [key for key in inputs if inputs[key] != before.get(key)]
        if changed:
            raise ValueError(
                f"{out}: the {' and '.join(changed)} of this run changed since it began, so it cannot go on: restore "
                "what it began with, or start again in a new --out"
            )
    dist.barrier()
    if ranks.first:
        record = {"config": settings(c), "changed": changed_settings(c), "inputs": inputs}
        record |= {"world_size": ranks.world_size, "argv": sys.argv[1:]}
        files.write_record(path, record)
