"""Commands in processes of their own, to be killed, stopped or cut off at any moment, and what they leave behind."""

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import driver
import numpy as np
import psutil
import pytest
from helpers import ROOT

from hps import checkpoint
from hps.io import files

SECONDS = 120  # what a command without a fault may take on a busy machine
DRAWN = ("step", "epoch", "gamma", "effective_negatives")  # of a line of the log: what was drawn, not computed

# A fork of a process that has imported everything starts in a hundredth of a second instead of five. It runs no test
# code, so it has no threads and no state of the tests.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "data_prep", "eval", "torch.distributed.run"])


def command(script: str, argv: list[str], log: str, setup: str) -> None:
    """In the child: what `python SCRIPT.py ARGV` does; `setup` is code that runs before it."""
    sys.path.insert(0, str(ROOT))
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    exec(setup, {})
    from hps import config

    config.run_main(lambda: importlib.import_module(script).main(argv))


class Job:
    """A script in one process, or train.py's workers under a torchrun that has imported torch already."""

    def __init__(self, argv: list[str], log: Path, script: str, torchrun: list[str], env: dict, setup: str) -> None:
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # the server imports the scripts from there
        self.log, self.argv = log, argv
        setup = f"import os\nos.environ.update({env | {'JOB_LOG': str(log)}!r})\n{setup}\n"
        if torchrun:
            script, argv = "torch.distributed.run", [*torchrun, driver.__file__, *argv]
        elif env["FAULT"] != "null" or env["JOURNAL"]:
            setup += f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport driver\ndriver.install()"
        self.process = SERVER.Process(target=command, args=(script, argv, str(log), setup))
        self.process.start()

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

    def workers(self) -> list[psutil.Process]:
        """Those alive, by their command and (two hosts have the same one) by where they write."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                mine = process.cmdline()[-len(self.argv) :] == self.argv
                if mine and process.environ().get("JOB_LOG") == str(self.log):
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL for all that is left of it, the workers of a dead torchrun too."""
        left = []
        with suppress(psutil.NoSuchProcess):
            agent = psutil.Process(self.pid)
            left = [*agent.children(recursive=True), agent]
        for process in [*left, *self.workers()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.join(10)

    def wait(self, for_what: Path | str) -> None:
        """Until there is a file, or until something like a pattern is said."""
        until = time.monotonic() + SECONDS

        def come() -> bool:
            return for_what.exists() if isinstance(for_what, Path) else bool(re.search(for_what, self.text()))

        while not come():
            if (time.monotonic() > until or self.process.exitcode is not None) and not come():
                pytest.fail(f"waited for {for_what} (status {self.process.exitcode})\n{self.text()[-4000:]}")
            time.sleep(0.02)


@contextmanager
def job(
    argv: list[str],
    log: Path,
    *,
    script: str = "train",
    ranks: int = 1,
    torchrun: list[str] | None = None,
    fault: dict[str, Any] | None = None,
    journal: Path | None = None,
    env: dict[str, str] | None = None,
    setup: str = "",
) -> Iterator[Job]:
    """A command for the length of a block; nothing of it is left behind. More than one rank: under torchrun."""
    log.unlink(missing_ok=True)
    if ranks > 1:
        torchrun = ["--standalone", f"--nproc_per_node={ranks}", *(torchrun or [])]
    made = Job(argv, log, script, torchrun or [], driver.environment(fault, journal) | (env or {}), setup)
    try:
        yield made
    finally:
        made.kill()


def run(argv: list[str], log: Path, **how: Any) -> float:
    """To a good end; the seconds it took. `how` as in `job`."""
    began = time.perf_counter()
    with job(argv, log, **how) as made:
        assert made.end(300) == 0, made.text()[-4000:]
    return time.perf_counter() - began


def kill_until_done(
    argv: list[str], log: Path, *, seconds: float, rng: random.Random, state: Callable[[], str], **how: Any
) -> Counter[str]:
    """The same command again and again, each time killed at a random moment of its length, until one comes through.

    Returns how often it was killed in which `state`, as the disk shows it.
    """
    killed: Counter[str] = Counter()
    while True:
        with job(argv, log, **how) as made:
            made.process.join(rng.uniform(0.0, 1.1 * seconds))
            if made.process.exitcode is None:
                os.kill(made.pid, signal.SIGKILL)
                made.process.join()
                killed[state()] += 1
                continue
            assert made.process.exitcode == 0, made.text()[-3000:]
            return killed


# ----------------------------------------------------------------------------------- what a command leaves


def records(out: Path) -> list[dict]:
    """The lines of a run's log without what depends on the clock and on memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
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


def visits(journal: Path) -> list[dict[str, Any]]:
    """All visits of the processes that kept a journal there, in the order of the steps."""
    lines = [json.loads(line) for path in journal.iterdir() for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda visit: (visit["step"], visit["id"]))
