"""train.py with a fault put into it, and with a journal of what it trains on: the script of the jobs of these tests.

The environment says which: FAULT, the JSON of `fault`, and JOURNAL, a folder. Without them it is train.py.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

# Started by torchrun from its own folder: the root must be on the path first.
import train
from hps import batches, checkpoint, config, dist, reference
from hps.io import files

# Where a fault can strike: right before this is called.
PLACES = {
    "reference": (reference, "_write_shard"),  # the reference pass has scored some responses
    "load": (checkpoint.dcp, "load"),  # a run goes on, its checkpoint is found whole
    "step": (train, "lr_at"),  # a step begins, the others are about to wait for this rank's weights
    "gradient": (dist, "clip_gradients"),  # the gradients are there, the update is not
    "save": (checkpoint.dcp, "save"),  # the step is done, the checkpoint's folder is empty
    "seal": (files, "write_record"),  # the shards are on the disk, the checkpoint has no name yet; rank 0 alone
    "export": (checkpoint, "export"),  # all steps are done
}


def fault(do: str, where: str, mark: Path, *, rank: int | None = None, step: int | None = None) -> dict[str, Any]:
    """What goes wrong, once.

    do: kill, stop, nan (the gradient; where: gradient, in this rank's share alone, or loss, in what it adds to all
        shares), wait (until SIGTERM or a file `mark`.go).
    where: a name of PLACES. mark: a file that is made at that moment, with the process in it; there is no second time
        once it exists. rank, step: in which, None for any.
    """
    return {"do": do, "where": where, "mark": str(mark), "rank": rank, "step": step}


def environment(fault: dict[str, Any] | None, journal: Path | None) -> dict[str, str]:
    """The variables by which a job gets its fault."""
    return {"FAULT": json.dumps(fault), "JOURNAL": str(journal or "")}


def install() -> None:
    """Put the fault and the journal of the environment into the modules."""
    step: list[int | None] = [None]
    if what := json.loads(os.environ.get("FAULT", "null")):
        put(what, step)
    before(train, "lr_at", lambda c, now, steps: step.__setitem__(0, now))
    if folder := os.environ.get("JOURNAL"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = Path(folder) / f"{os.getpid()}.jsonl"
        before(batches.Run, "micro_batches", lambda *args, **more: write_visits(file, *args))


def before(module: Any, name: str, do: Callable[..., Any]) -> None:
    """Have `do` called with the arguments of every call of a function, right before it."""
    real = getattr(module, name)

    def wrapped(*args: Any, **more: Any) -> Any:
        do(*args, **more)
        return real(*args, **more)

    setattr(module, name, wrapped)


def put(what: dict[str, Any], step: list[int | None]) -> None:
    mark = Path(what["mark"])

    def now() -> bool:
        mine = what["rank"] in (None, int(os.environ.get("RANK", 0)))
        return mine and what["step"] in (None, step[0]) and not mark.exists()

    def strike(*args: Any, **more: Any) -> None:
        if not now():
            return
        mark.with_suffix(".part").write_text(str(os.getpid()))
        mark.with_suffix(".part").rename(mark)
        if what["do"] in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if what["do"] == "kill" else signal.SIGSTOP)
        elif what["do"] == "wait":
            wait(mark.with_suffix(".go"))
        else:
            for p in args[0]:
                getattr(p.grad, "_local_tensor", p.grad).fill_(math.nan)

    if what["where"] != "loss":
        before(*PLACES[what["where"]], strike)
        return
    real = train.objective

    def objective(c: Any) -> Callable[..., Any]:
        loss = real(c)

        def spoiled(*args: Any) -> Any:
            per_prompt = loss(*args)
            if now():
                mark.write_text(str(os.getpid()))
                per_prompt.register_hook(lambda gradient: gradient * math.nan)
            return per_prompt

        return spoiled

    train.objective = objective


def wait(go: Path) -> None:
    """Until SIGTERM has come to the one who handles it, or there is a file."""
    come, handler = threading.Event(), signal.getsignal(signal.SIGTERM)

    def handle(*args: Any) -> None:
        come.set()
        if callable(handler):
            handler(*args)

    signal.signal(signal.SIGTERM, handle)
    while not (come.is_set() or go.exists()):
        time.sleep(0.02)
    signal.signal(signal.SIGTERM, handler)


def write_visits(file: Path, run: batches.Run, step: int, blocks: list) -> None:
    """Write down each visit by the rank and in the step that trains on it: epoch, prompt, responses."""
    visits, plan = run.plan.step(step), run.plan
    mine = [visits[i] for members in run.shares([len(block) for block in blocks]) for i in members]
    with file.open("a") as journal:
        for v in mine:
            about = {"epoch": int(plan.epoch[v]), "id": run.examples.id(plan.row[v]), "step": step}
            about |= {"responses": plan.responses[v].tolist(), "rank": run.ranks.rank}
            journal.write(json.dumps(about) + "\n")


if __name__ == "__main__":
    install()
    config.run_main(train.main)
