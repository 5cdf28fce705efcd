"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for.

All of them get the same records. A run that goes on from a checkpoint writes each step once in all of them.
"""

import importlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hps.io import files

MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # whose import tells whether it is installed


def check_names(names: str) -> list[str]:
    """The loggers of a comma-separated list; ValueError for one that does not exist, stands twice, or is missing."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in MODULES or found.count(name) > 1:
            raise ValueError(f"log_to = {names!r}: give each of {', '.join(MODULES)} at most once, comma-separated")
        try:
            importlib.import_module(MODULES[name])
        except ImportError as error:
            raise ValueError(f"log_to = {names!r}: {name} is missing ({error}): pip install {name}") from error
    return found


def open_log(out: Path, names: str, *, done: int, settings: dict[str, Any]) -> Callable[[dict[str, float]], None]:
    """A function that writes the record of each step, from step `done` on: "step", counted from 0, and its values.

    Args:
        out: folder of the run. names: as for `check_names`. settings: of the run, for those who show them.
    """
    cut(out / "metrics.jsonl", done)
    metrics = (out / "metrics.jsonl").open("ab", buffering=0)
    board, run = None, None
    if "tensorboard" in check_names(names):
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote past its last checkpoint is done again: TensorBoard then forgets the first time.
        board = SummaryWriter(str(out / "tensorboard"), purge_step=done)
    if "wandb" in check_names(names):
        import wandb  # pyright: ignore[reportMissingImports]

        # The run is found again by its id. Steps that it has already are passed over by wandb, and would be the same.
        path = out / "wandb-id.txt"
        if not (done and path.exists()):
            path.write_text(uuid.uuid4().hex + "\n")
        run = wandb.init(dir=str(out), id=path.read_text().strip(), resume="allow", name=out.name, config=settings)

    def log(record: dict[str, float]) -> None:
        line = json.dumps(record).encode() + b"\n"
        with files.explain_disk_errors(metrics.name, "what it holds is kept, and the same command goes on from there"):
            while line:  # the system may take a part of it only
                line = line[metrics.write(line) :]
        values = {name: value for name, value in record.items() if name != "step"}
        if board:
            for name, value in values.items():
                board.add_scalar(name, value, record["step"])
            board.flush()  # or a run that is killed loses what its thread had not written yet
        if run:
            run.log(values, step=record["step"])

    return log


def cut(path: Path, until: int) -> None:
    """Take the lines of step `until` and later ones out of a JSON Lines file, and make it where it is absent.

    What follows them, a line torn by a full disk too, goes unread. Raises ValueError for a broken line before.
    """
    kept = []
    for number, line in enumerate(path.read_bytes().splitlines() if until and path.exists() else [], 1):
        try:
            step = json.loads(line)["step"]
            if type(step) is not int:
                raise TypeError("its step is no whole number")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            message = f"{path}:{number}: not a record of a step ({error}); mend it, or delete the file"
            raise ValueError(message) from error
        if step >= until:
            break
        kept.append(line + b"\n")
    with files.replacing(path) as partial:
        partial.write_bytes(b"".join(kept))
