"""Two ranks on one host, and one of them dies, stops, or computes nonsense; SIGTERM; two runs in one folder.

Every job that is struck ends by itself, says what it was, and leaves a whole checkpoint; the same command goes on from
there, in the end to the trajectory of a run that nothing struck.
"""

import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

import driver
import harness
import jobs
import pytest
from helpers import arguments

import train

TIMEOUT = 0.1  # minutes
LOST = r"error: rank \d: another rank is gone, or has not answered for 0:00:06 \(.*\)\. Look for its own message"
KILLED = r"Signal 9 \(SIGKILL\) received"
SIZES = {"full": dict(lora_rank=0), "lora": dict(lora_rank=8, lr=3e-2)}
STEPS, EVERY = 12, 2  # of a run, and between its checkpoints


class Strike(NamedTuple):
    """A fault in the step before a checkpoint would be written; term: which one gets SIGTERM, torchrun or a rank, in
    the step before that, so that nothing but SIGTERM has the checkpoint written."""

    do: str
    where: str
    rank: int
    term: str = ""


SMALL = [
    [
        ("kill", "gradient", 1),
        ("stop", "step", 1),
        ("nan", "gradient", 1),
        ("wait", "step", 0, "torchrun"),
        ("wait", "step", 0, "1"),
    ]
]
# Four at a time, since a run of 12 steps has room for so many; what strikes before the first step or after the last
# one stands first or last.
FULL = [
    [("kill", "reference", 0), ("kill", "save", 0), ("kill", "load", 0), ("kill", "export", 0)],
    [("kill", "reference", 1), ("kill", "save", 1), ("kill", "load", 1), ("kill", "export", 1)],
    [("kill", "step", 0), ("kill", "step", 1), ("kill", "gradient", 0), ("kill", "gradient", 1)],
    [("stop", "step", 0), ("stop", "step", 1), ("stop", "save", 0), ("stop", "save", 1)],
    [("stop", "gradient", 0), ("stop", "gradient", 1), ("stop", "load", 1), ("kill", "seal", 0)],
    [("nan", "gradient", 0), ("nan", "gradient", 1), ("nan", "loss", 0), ("nan", "loss", 1)],
    [
        ("wait", "step", 0, "torchrun"),
        ("wait", "step", 1, "torchrun"),
        ("wait", "step", 0, "0"),
        ("wait", "step", 0, "1"),
    ],
]


def options(folder: Path, size: str) -> dict[str, object]:
    often = dict(prompts_per_step=4, save_every=EVERY, tokens_per_micro_batch=150)
    return SIZES[size] | often | dict(timeout=TIMEOUT, reference_cache=folder / "cache")


def struck(argv: list[str], folder: Path, out: Path, strike: Strike, slot: int, *, patient: bool) -> float:
    """A job with a fault, from its beginning to its end; seconds between the two.

    torchrun gives a worker that does not end 30 s (no option of its changes that) and then kills it. patient: wait for
    that; otherwise a rank that was stopped goes on as soon as the other one has given up, and finds itself alone.
    """
    before_due = 2 if strike.term else 1
    step = EVERY * (slot + 1) - before_due if strike.where not in ("reference", "load", "export") else None
    mark = folder / f"mark-{slot}"
    fault = driver.fault(strike.do, strike.where, mark, rank=strike.rank, step=step)
    before = jobs.checkpoint_of(out)
    expected = before
    if strike.where == "export":
        expected = STEPS - EVERY
    elif step is not None:
        expected = step + 1 if strike.term else step + 1 - EVERY
    with jobs.job(argv, folder / "log", options=jobs.one_host(2), fault=fault) as job:
        jobs.appears(mark, job)
        began = mark.stat().st_mtime
        if strike.term == "torchrun":
            os.kill(job.agent.pid, signal.SIGTERM)
        elif strike.term:
            (worker,) = (p for p in job.workers() if p.environ()["RANK"] == strike.term)
            worker.send_signal(signal.SIGTERM)
            if int(strike.term) != strike.rank:
                mark.with_suffix(".go").touch()
        if strike.do == "stop" and not patient:
            jobs.says(LOST, job)
            os.kill(int(mark.read_text()), signal.SIGCONT)
        status = job.end(60)
        seconds = time.time() - began
        text = job.text()
    assert status != 0, f"{strike}: a job that did not finish ends with status 0"
    assert jobs.checkpoint_of(out) == expected, f"{strike}: not the checkpoint that was expected\n{text[-3000:]}"
    assert (out / "policy").exists() is False
    if strike.term:
        assert re.search(rf"stopped after {expected} of {STEPS} steps; the same command goes on", text), text[-3000:]
        # torchrun has a status of its own; that of its workers is in what it says.
        assert strike.term == "torchrun" or f"exitcode  : {train.STOPPED_BY_SIGTERM}" in text, text[-3000:]
    elif strike.do == "nan":
        message = rf"error: step {step}: loss [\d.]+, gradient norm nan; no update was made\. Rows: (\S+, ){{3}}\S+\n"
        assert len(re.findall(message, text)) == 2, f"both ranks refuse the step\n{text[-3000:]}"
    elif strike.where in ("reference", "load"):  # torchrun may end the other one before it finds out
        assert re.search(f"{LOST}|{KILLED}", text), text[-3000:]
    else:
        assert re.search(LOST, text), f"{strike}: {text[-3000:]}"
    assert "delete" not in text, f"{strike}: bad advice\n{text[-3000:]}"
    return seconds


@pytest.mark.parametrize("size", SIZES)
def test_faults_one_after_the_other(tiny_world, tmp_path, amount, size):
    """In one run; with --soak in seven runs of each size. What is left to do in the end is done by a job without."""
    if size == "lora" and amount(0, 1) == 0:
        pytest.skip("with --soak only")
    calm = tmp_path / "calm"
    calm.mkdir()
    harness.run("train", arguments(tiny_world, calm / "run", **options(calm, size)), calm / "log")
    for i, chain in enumerate(FULL if amount(0, 1) else SMALL):
        strikes = [Strike(*words) for words in chain]
        folder = tmp_path / f"chain-{i}"
        out = folder / "run"
        folder.mkdir()
        argv = arguments(tiny_world, out, **options(folder, size))
        patient = bool(amount(0, 1))
        took = [struck(argv, folder, out, strike, slot, patient=patient) for slot, strike in enumerate(strikes)]
        left = amount(1, 2)  # one rank does as well, and starts at once
        if left == 1:
            harness.run("train", argv, folder / "log")
        else:
            with jobs.job(argv, folder / "log", options=jobs.one_host(left)) as job:
                assert job.end() == 0, job.text()[-3000:]
        apart = jobs.largest_difference(out, calm / "run")
        assert apart < 1e-5
        shown = "; ".join(f"{' '.join(map(str, s)).strip()} {t:.1f} s" for s, t in zip(strikes, took, strict=True))
        print(f"\n{size}: {shown}; losses apart by at most {apart:.1e}")


def test_a_job_that_restarts_by_itself(tiny_world, tmp_path, amount):
    """torchrun --max_restarts: a rank is killed, and the job goes on from the last checkpoint without anybody."""
    if amount(0, 1) == 0:
        pytest.skip("with --soak only")
    calm = tmp_path / "calm"
    calm.mkdir()
    harness.run("train", arguments(tiny_world, calm / "run", **options(calm, "full")), calm / "log")
    out = tmp_path / "run"
    argv = arguments(tiny_world, out, **options(tmp_path, "full"))
    fault = driver.fault("kill", "gradient", tmp_path / "mark", rank=1, step=5)
    with jobs.job(argv, tmp_path / "log", options=[*jobs.one_host(2), "--max_restarts=1"], fault=fault) as job:
        assert job.end() == 0, job.text()[-3000:]
        assert re.search(LOST, job.text()) and "step-00000004 (4 of 12 steps)" in job.text()
    assert jobs.largest_difference(out, calm / "run") < 1e-5


def test_one_run_a_folder_and_sigterm(tiny_world, tmp_path, amount):
    """A second train.py is refused while the first one runs. SIGTERM ends that one with a checkpoint and status 75; and
    after SIGKILL, which leaves the lock's file, the next run is not refused."""
    more = options(tmp_path, "full")
    calm, out, log = tmp_path / "calm", tmp_path / "run", tmp_path / "log"
    harness.run("train", arguments(tiny_world, calm, **more), log)
    argv = arguments(tiny_world, out, **more)

    def hold(step: int):
        mark = tmp_path / f"mark-{step}"
        holder = harness.start("train", argv, log, driver.setup(driver.fault("wait", "step", mark, step=step)))
        until = time.monotonic() + 60
        while not mark.exists():
            assert time.monotonic() < until and holder.exitcode is None, log.read_text()[-3000:]
            time.sleep(0.02)
        return holder

    def refused(holder) -> None:
        where = rf"{re.escape(str(out))}: train\.py by process {holder.pid} on {re.escape(socket.gethostname())} since "
        with pytest.raises(ValueError, match=rf"{where}\d{{4}}-.* is at work here; wait until it ends, or choose"):
            train.main(argv)

    holder = hold(4)
    try:
        refused(holder)
        if amount(0, 1):  # nor is it let in as a job
            with jobs.job(argv, tmp_path / "second", options=jobs.one_host(2)) as job:
                assert job.end(60) != 0
                assert f"by process {holder.pid} on" in job.text()
        os.kill(holder.pid, signal.SIGTERM)
        holder.join(60)
        assert holder.exitcode == train.STOPPED_BY_SIGTERM == 75
        assert not (out / "lock").exists()
        assert jobs.checkpoint_of(out) == 5
        assert f"stopped after 5 of {STEPS} steps; the same command goes on" in log.read_text()
        holder = hold(7)
        refused(holder)
        holder.kill()
        holder.join(60)
        assert (out / "lock").exists() and jobs.checkpoint_of(out) == 6
    finally:
        holder.kill()
    train.main(argv)
    assert harness.records(out / "metrics.jsonl") == harness.records(calm / "metrics.jsonl")
