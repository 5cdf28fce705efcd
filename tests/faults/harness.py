"""Commands in processes of their own, to be killed, stopped, spoiled or cut off, and what they leave behind."""

import hashlib
import itertools
import math
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
from helpers import fork, jsonl, redirect, run_script

import train
from hps import checkpoint, dist, reference, sharding
from hps.io import files
from hps.options import Config, settings

SECONDS = 120  # what a command without a fault may take on a busy machine
DRAWN = ("step", "epoch", "gamma", "effective_negatives")  # of a line of the log: what was drawn, not computed
LOST = r"error: rank \d: another rank is gone, or has not answered for 0:00:06 \(.*\)\. Look for its own message"
TIMEOUT = 0.1  # minutes, those of LOST

# Where a fault can strike: right before this is called.
PLACES = {
    "reference": (reference, "_write_shard"),  # the reference pass has scored some responses
    "load": (checkpoint.dcp, "load"),  # a run goes on, its checkpoint is found whole
    "step": (train, "lr_at"),  # a step begins, the others are about to wait for this rank's weights
    "gradient": (dist, "clip_gradients"),  # the gradients are there, the update is not
    "save": (sharding, "_write"),  # the step is done, the checkpoint's folder is empty
    "seal": (files, "write_record"),  # the shards are on the disk, the checkpoint has no name yet; rank 0 alone
    "export": (sharding, "export"),  # all steps are done
}


class Fault(NamedTuple):
    """What goes wrong, once.

    do: kill, stop, nan (the gradient; where: gradient, in this rank's share alone, or loss, in what it adds to all
        shares), wait (until SIGTERM or a file `mark`.go).
    where: a name of PLACES. mark: a file that is made at that moment, with the process in it; there is no second time
        once it exists. rank, step: in which, None for any.
    """

    do: str
    where: str
    mark: Path
    rank: int | None = None
    step: int | None = None


# -- in the child --


def install(fault: Fault | None) -> None:
    """Put a fault into the modules."""
    step: list[int | None] = [None]
    if fault:
        put(fault, step)
    before(train, "lr_at", lambda c, now, steps: step.__setitem__(0, now))


def before(module: Any, name: str, do: Callable[..., Any], patch: Any = None, *, call: int | None = None) -> None:
    """Have `do` called with the arguments of every call of a function, or of that one, right before it.

    patch: pytest's monkeypatch, where it shall not be for good.
    """
    real, calls = getattr(module, name), itertools.count()

    def wrapped(*args: Any, **more: Any) -> Any:
        if call in (None, next(calls)):
            do(*args)
        return real(*args, **more)

    (patch or pytest.MonkeyPatch()).setattr(module, name, wrapped)


def put(fault: Fault, step: list[int | None]) -> None:
    def now() -> bool:
        mine = fault.rank in (None, int(os.environ.get("RANK", 0)))
        return mine and fault.step in (None, step[0]) and not fault.mark.exists()

    def strike(*args: Any) -> None:
        if not now():
            return
        fault.mark.with_suffix(".part").write_text(str(os.getpid()))
        fault.mark.with_suffix(".part").rename(fault.mark)
        if fault.do == "wait":
            wait(fault.mark.with_suffix(".go"))
        elif fault.do == "nan" and fault.where == "loss":
            args[0].register_hook(lambda gradient: gradient * math.nan)
        elif fault.do == "nan":
            for p in args[0]:
                getattr(p.grad, "_local_tensor", p.grad).fill_(math.nan)
        else:
            os.kill(os.getpid(), signal.SIGKILL if fault.do == "kill" else signal.SIGSTOP)

    if fault.where == "loss":
        real = train.batches.objective

        def objective(c: Any) -> Callable[..., Any]:
            loss = real(c)
            return lambda *args: (per_prompt := loss(*args), strike(per_prompt))[0]

        train.batches.objective = objective
    else:
        before(*PLACES[fault.where], strike)


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


def work(script: str, argv: list[str], setup: str, fault: Fault | None) -> None:
    """A script with what is put into it; `setup` is code that runs before it."""
    exec(setup, {})
    if script == "train":
        install(fault)
    run_script(script, argv)


def work_of_a_rank(log: str, *args: Any) -> None:
    Path(f"{log}.rank-{os.environ['RANK']}").write_text(str(os.getpid()))
    redirect(log)
    work(*args)


def agent(words: Sequence[str], server: dict, log: str, environment: dict, script: str, argv: list, setup: str, *more):
    """torchrun itself, but its workers come from the server of forks too, instead of importing everything anew."""
    from torch.distributed import run

    vars(forkserver._forkserver).update(server)
    forkserver._forkserver.ensure_running = lambda: None
    real, setup_of_rank = run.config_from_args, f"import os\nos.environ.update({environment!r})\n{setup}"
    args = [log, script, argv, setup_of_rank, *more]
    run.config_from_args = lambda parsed: (real(parsed)[0], work_of_a_rank, args)
    exec(setup, {})
    run.main(["--start_method=forkserver", *words, "worker"])


# -- a command --


class Job:
    """A script in one process, or train.py's workers under torchrun, for the length of a with block: nothing of it is
    left behind. More than one rank: under torchrun."""

    def __init__(
        self, argv: list[str], log: Path, *, script: str = "train", ranks: int = 1, torchrun: Sequence[str] = (),
        fault: Fault | None = None, env: dict[str, str] | None = None, setup: str = "",
    ) -> None:  # fmt: skip
        self.log, args, environment = log, (script, argv, setup, fault), env or {}
        for path in (log, *log.parent.glob(f"{log.name}.rank-*")):
            path.unlink(missing_ok=True)
        if ranks > 1:
            torchrun = ["--standalone", f"--nproc_per_node={ranks}", *torchrun]
        if torchrun:
            forkserver.ensure_running()
            where = ("_forkserver_address", "_forkserver_authkey")  # Python 3.14 wants a key
            server = {key: value for key, value in vars(forkserver._forkserver).items() if key in where}
            self.process = fork(agent, (torchrun, server, str(log), environment, *args), log, environment)
        else:
            self.process = fork(work, args, log, environment)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def end(self, seconds: float = SECONDS) -> int:
        """The status that it ends with, within a time; otherwise it hangs, and the test fails."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            pytest.fail(f"it hangs for {seconds} s\n{self.text()[-4000:]}")
        return self.process.exitcode

    def rank(self, number: int) -> int:
        """The process of a rank."""
        return int(Path(f"{self.log}.rank-{number}").read_text())

    def kill(self) -> None:
        """SIGKILL for all that is left of it, the workers of a dead torchrun too."""
        self.process.kill()
        self.process.join(10)
        for path in self.log.parent.glob(f"{self.log.name}.rank-*"):
            with suppress(psutil.NoSuchProcess, ValueError):
                psutil.Process(int(path.read_text())).kill()

    def wait(self, for_what: Path | str) -> None:
        """Until there is a file, or until something like a pattern is said."""
        until = time.monotonic() + SECONDS

        def come() -> bool:
            return for_what.exists() if isinstance(for_what, Path) else bool(re.search(for_what, self.text()))

        while not come():
            if (time.monotonic() > until or self.process.exitcode is not None) and not come():
                pytest.fail(f"waited for {for_what} (status {self.process.exitcode})\n{self.text()[-4000:]}")
            time.sleep(0.02)


def run(argv: list[str], log: Path, **how: Any) -> float:
    """To a good end; the seconds it took. `how` as of `Job`."""
    began = time.perf_counter()
    with Job(argv, log, **how) as made:
        assert made.end(300) == 0, made.text()[-4000:]
    return time.perf_counter() - began


def kill_until_done(argv: list[str], log: Path, *, seconds: float, rng: random.Random, **how: Any) -> int:
    """The same command again and again, each time killed at a random moment of its length, until one comes through;
    how often it was killed."""
    for killed in itertools.count():
        with Job(argv, log, **how) as made:
            made.process.join(rng.uniform(0.0, 1.1 * seconds))
            if made.process.exitcode is not None:
                assert made.process.exitcode == 0, made.text()[-3000:]
                return killed
            os.kill(made.pid, signal.SIGKILL)
            made.process.join()
    raise AssertionError


# -- what a command leaves --

RUN = {"config": settings(Config("a/b", "d", "o", lr=1e-4)), "changed": ["lr"],
       "inputs": {"model": "ab", "tokenizer": "cd", "data": "ef"}, "world_size": 1, "argv": []}  # fmt: skip
SUMMARY = {"steps": 6, "seconds": 1.5, "tokens": 900, "counts": {"rows_read": 9, "rows_kept": 8}}
EVALUATION = {"config": {"model": "policy", "data": "t.jsonl", "reference": "a/b"},
              "metrics": {"rm2": {"mean": 0.1, "low": 0.0, "high": 0.2, "prompts": 3}}}  # fmt: skip


def records(out: Path) -> list[dict]:
    """The lines of a run's log without what depends on the clock and on memory."""
    lines = jsonl(out / "metrics.jsonl")
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(out: Path) -> tuple[list[dict], list[str]]:
    """A finished run: its log, and its weights to the bit."""
    return records(out), [digest(path) for path in sorted((out / "policy").glob("*.safetensors"))]


def checkpoint_of(out: Path) -> int:
    """Steps of the newest checkpoint, 0 without one; fails if a byte of it is not what was written."""
    path = checkpoint.latest(out / "checkpoints")
    if path is None:
        return 0
    about = files.read_record(path / "state.json", "")
    assert files.first_corrupt_file(path, about["files"]) == ""
    return about["step"]


def check_follows(out: Path, calm: Path, tolerance: float = 1e-5) -> float:
    """The losses of one run are those of another that did each step once, in order, with the same draws."""
    found, expected = records(out), records(calm)
    assert [record["step"] for record in found] == list(range(len(expected)))
    for key in DRAWN:
        assert [record.get(key) for record in found] == [record.get(key) for record in expected], key
    losses = [[record["loss"] for record in lines] for lines in (found, expected)]
    assert np.std(losses[1][1:]) > 1e-3  # a trajectory that does not move would equal anything
    apart = float(np.abs(np.subtract(*losses)).max())
    assert apart < tolerance
    return apart
