"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for.

All of them get the same records. A run that goes on from a checkpoint writes each step once in all of them.
"""

import importlib
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hps.io import files

Record = dict[str, float]  # "step", counted from 0, and the step's values by name
Write = Callable[[Record], None]


class Logger(NamedTuple):
    module: str  # whose import tells whether it is installed
    open: Callable[[Path, int, dict[str, Any]], Write]  # folder of the run, first step, settings


def chosen(names: str) -> list[str]:
    """The loggers of a comma-separated list; ValueError for one that does not exist, stands twice, or is missing."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in LOGGERS or found.count(name) > 1:
            raise ValueError(f"log_to = {names!r}: give each of {', '.join(LOGGERS)} at most once, comma-separated")
        try:
            importlib.import_module(LOGGERS[name].module)
        except ImportError as error:
            raise ValueError(f"log_to = {names!r}: {name} is missing ({error}): pip install {name}") from error
    return found


def open_log(out: Path, names: str, *, done: int, settings: dict[str, Any]) -> Write:
    """A function that writes the record of each step, from step `done` on.

    Args:
        out: folder of the run. names: as for `chosen`. settings: of the run, for those who show them.
    """
    writers = [_jsonl(out / "metrics.jsonl", done)]
    writers += [LOGGERS[name].open(out, done, settings) for name in chosen(names)]

    def log(record: Record) -> None:
        for write in writers:
            write(record)

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


def _jsonl(path: Path, done: int) -> Write:
    cut(path, done)
    file = path.open("ab", buffering=0)

    def write(record: Record) -> None:
        files.append(file, json.dumps(record).encode() + b"\n")

    return write


def _tensorboard(out: Path, done: int, settings: dict[str, Any]) -> Write:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote past its last checkpoint is done again: TensorBoard then forgets the first time.
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=done)

    def write(record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                writer.add_scalar(name, value, record["step"])
        writer.flush()  # or a run that is killed loses what its thread had not written yet

    return write


def _wandb(out: Path, done: int, settings: dict[str, Any]) -> Write:
    import wandb  # pyright: ignore[reportMissingImports]

    # The run is found again by its id. Steps that it has already are passed over by wandb, and would be the same.
    path = out / "wandb-id.txt"
    if not (done and path.exists()):
        path.write_text(uuid.uuid4().hex + "\n")
    run = wandb.init(dir=str(out), id=path.read_text().strip(), resume="allow", name=out.name, config=settings)

    def write(record: Record) -> None:
        run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    return write


LOGGERS = {"tensorboard": Logger("torch.utils.tensorboard", _tensorboard), "wandb": Logger("wandb", _wandb)}
