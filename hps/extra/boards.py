"""TensorBoard and Weights & Biases, beside metrics.jsonl: `train.py --log_to`."""

import importlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def open_boards(out: Path, names: str, *, done: int, settings: dict[str, Any]) -> Callable[[dict[str, float]], None]:
    """A function that shows the record of each step; arguments as `loggers.open_log`."""
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

    def show(record: dict[str, float]) -> None:
        values = {name: value for name, value in record.items() if name != "step"}
        if board:
            for name, value in values.items():
                board.add_scalar(name, value, record["step"])
            board.flush()  # or a run that is killed loses what its thread had not written yet
        if run:
            run.log(values, step=record["step"])

    return show
