"""Where the numbers of a run go: metrics.jsonl always, TensorBoard and Weights & Biases when asked for.

All of them get the same records. A run that goes on from a checkpoint writes each step once in all of them.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hps.io import files


def open_log(out: Path, names: str, *, done: int, settings: dict[str, Any]) -> Callable[[dict[str, float]], None]:
    """A function that writes the record of each step, from step `done` on: "step", counted from 0, and its values.
    names: as for `boards.check_names`. settings: of the run, for those who show them."""
    cut(out / "metrics.jsonl", done)
    metrics = (out / "metrics.jsonl").open("ab", buffering=0)
    show = None
    if names:
        from hps.extra import boards

        show = boards.open_boards(out, names, done=done, settings=settings)

    def log(record: dict[str, float]) -> None:
        line = json.dumps(record).encode() + b"\n"
        with files.explain_disk_errors(metrics.name, "what it holds is kept, and the same command goes on from there"):
            while line:  # the system may take a part of it only
                line = line[metrics.write(line) :]
        if show:
            show(record)

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
