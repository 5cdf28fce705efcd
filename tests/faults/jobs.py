"""Jobs of several processes under torchrun, how they end, and the trajectory that they leave."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import driver
import harness
import numpy as np
import psutil
import pytest

from hps import checkpoint
from hps.io import files

SECONDS = 120  # what a job without a fault may take on a busy machine
EXACT = ("step", "epoch", "gamma", "effective_negatives")  # of a record: what was drawn, not computed


class Job:
    """One torchrun and its workers. `torchrun` itself begins in a process that has imported torch already."""

    def __init__(self, argv: list[str], log: Path, *, options: list[str], env: dict[str, str], setup: str = "") -> None:
        self.log, self.argv = log, argv
        words = [*options, str(driver.ROOT / "tests/faults/driver.py"), *argv]
        code = f"import os\nos.environ.update({env!r})\n{setup}"
        self.process = harness.start("torch.distributed.run", words, log, code)
        self.agent = psutil.Process(self.process.pid)

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def end(self, seconds: float = SECONDS) -> int:
        """The status that the job ends with, within a time; otherwise it hangs, and the test fails."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill()
            pytest.fail(f"the job hangs for {seconds} s\n{self.text()[-4000:]}")
        return self.process.exitcode

    def workers(self) -> list[psutil.Process]:
        return workers(self.argv, self.log)

    def kill(self) -> None:
        """SIGKILL for all that is left of it, the workers of a dead torchrun too."""
        try:
            left = [*self.agent.children(recursive=True), self.agent]
        except psutil.NoSuchProcess:
            left = []
        for process in [*left, *self.workers()]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.join(10)


def workers(argv: list[str], log: Path) -> list[psutil.Process]:
    """The workers of a job that are alive, by their command and (two hosts have the same one) by where they write."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.cmdline()[-len(argv) :] == argv and process.environ().get("JOB_LOG") == str(log):
                found.append(process)
    return found


@contextmanager
def job(
    argv: list[str],
    log: Path,
    *,
    options: list[str],
    fault: dict[str, Any] | None = None,
    journal: Path | None = None,
    env: dict[str, str] | None = None,
    setup: str = "",
) -> Iterator[Job]:
    """A job for the length of a block; nothing of it is left behind."""
    log.unlink(missing_ok=True)
    variables = driver.environment(fault, journal) | {"OMP_NUM_THREADS": "1", "JOB_LOG": str(log)}
    made = Job(argv, log, options=options, env=variables | (env or {}), setup=setup)
    try:
        yield made
    finally:
        made.kill()


def one_host(ranks: int) -> list[str]:
    """torchrun's options."""
    return ["--standalone", f"--nproc_per_node={ranks}"]


def appears(path: Path, job: Job) -> None:
    """Wait for a file that a job makes."""
    _wait(path.exists, job, f"{path.name} does not appear")


def says(pattern: str, job: Job) -> None:
    """Wait for what a job writes."""
    _wait(lambda: re.search(pattern, job.text()), job, f"nothing like {pattern} is said")


def _wait(come: Callable[[], object], job: Job, otherwise: str) -> None:
    until = time.monotonic() + SECONDS
    while not come():
        if (time.monotonic() > until or job.process.exitcode is not None) and not come():
            pytest.fail(f"{otherwise} (status {job.process.exitcode})\n{job.text()[-4000:]}")
        time.sleep(0.02)


def checkpoint_of(out: Path) -> int:
    """Steps of the newest checkpoint, 0 without one; fails if a byte of it is not what was written."""
    path = checkpoint.latest(out / "checkpoints")
    if path is None:
        return 0
    about = files.read_record(path / "state.json", "")
    assert files.first_corrupt_file(path, about["files"]) == ""
    return about["step"]


def largest_difference(out: Path, calm: Path) -> float:
    """Between the losses of two runs; fails unless both did each step once, in order, with the same draws."""
    found, expected = harness.records(out / "metrics.jsonl"), harness.records(calm / "metrics.jsonl")
    assert [record["step"] for record in found] == list(range(len(expected)))
    for key in EXACT:
        assert [record.get(key) for record in found] == [record.get(key) for record in expected], key
    losses = [[record["loss"] for record in records] for records in (found, expected)]
    assert np.std(losses[1][1:]) > 1e-3  # a trajectory that does not move would equal anything
    return float(np.abs(np.subtract(*losses)).max())


def visits(journal: Path) -> list[dict[str, Any]]:
    """All visits of the processes that kept a journal there, in the order of the steps."""
    lines = [json.loads(line) for path in journal.iterdir() for line in path.read_text().splitlines()]
    return sorted(lines, key=lambda visit: (visit["step"], visit["id"]))
