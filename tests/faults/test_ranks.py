"""Several ranks, of which one dies, stops, or computes nonsense.

Every job that is struck ends by itself, says what it was, and leaves a whole checkpoint; the same command goes on from
there, in the end to the trajectory of a run that nothing struck.
"""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import harness
from harness import LOST, TIMEOUT
from helpers import arguments

KILLED = r"Signal 9 \(SIGKILL\) received"
SIZES: dict[str, dict[str, Any]] = {"full": dict(lora_rank=0), "lora": dict(lora_rank=8, lr=3e-2)}
STEPS, EVERY = 12, 2  # of a run, and between its checkpoints


def test_one_rank_tells_of_a_mistake(tiny_world, tmp_path):
    """All have made it; torchrun's own words come behind."""
    with harness.Job(arguments(tiny_world, tmp_path / "out", method="dpo_hps"), tmp_path / "log", ranks=2) as job:
        assert job.end() != 0 and job.text().count("error: method = 'dpo_hps' does not exist") == 1


class Strike(NamedTuple):
    """A fault in the step before a checkpoint would be written; term: which one gets SIGTERM, torchrun or a rank, in
    the step before that, so that nothing but SIGTERM has the checkpoint written."""

    do: str
    where: str
    rank: int
    term: str = ""


SMALL = ["kill gradient 1, stop step 1, nan gradient 1, wait step 0 1, kill load 1"]
# Four at a time, since a run of 12 steps has room for so many; what strikes before the first step or after the last
# one stands first or last.
FULL = [
    "kill reference 0, kill save 0, kill load 0, kill export 0",
    "kill reference 1, kill save 1, kill load 1, kill export 1",
    "kill step 0, kill step 1, kill gradient 0, kill gradient 1",
    "stop step 0, stop step 1, stop save 0, stop save 1",
    "stop gradient 0, stop gradient 1, stop load 1, kill seal 0",
    "nan gradient 0, nan gradient 1, nan loss 0, nan loss 1",
    "wait step 0 torchrun, wait step 1 torchrun, wait step 0 0, wait step 0 1",
]


def options(folder: Path, size: str) -> dict[str, Any]:
    often = dict(prompts_per_step=4, save_every=EVERY, tokens_per_micro_batch=150)
    return SIZES[size] | often | dict(timeout=TIMEOUT, reference_cache=folder / "cache")


def struck(argv: list[str], folder: Path, out: Path, strike: Strike, slot: int, *, patient: bool) -> float:
    """A job with a fault, from its beginning to its end; seconds between the two.

    torchrun gives a worker that does not end 30 s (no option of its changes that) and then kills it. patient: wait for
    that; otherwise a rank that was stopped goes on as soon as the other one has given up, and finds itself alone.
    """
    outside = strike.where in ("reference", "load", "export")
    step = None if outside else EVERY * (slot + 1) - (2 if strike.term else 1)
    expected = harness.checkpoint_of(out)
    if step is not None:
        expected = step + 1 if strike.term else step + 1 - EVERY
    elif strike.where == "export":
        expected = STEPS
    mark = folder / f"mark-{slot}"
    fault = harness.Fault(strike.do, strike.where, mark, rank=strike.rank, step=step)
    with harness.Job(argv, folder / "log", ranks=2, fault=fault) as job:
        job.wait(mark)
        began = mark.stat().st_mtime
        if strike.term == "torchrun":
            os.kill(job.pid, signal.SIGTERM)
        elif strike.term:
            os.kill(job.rank(int(strike.term)), signal.SIGTERM)
            if int(strike.term) != strike.rank:
                mark.with_suffix(".go").touch()
        if strike.do == "stop" and not patient:
            job.wait(LOST)
            os.kill(int(mark.read_text()), signal.SIGCONT)
        assert job.end(60) != 0, f"{strike}: a job that did not finish ends with status 0"
        seconds, text = time.time() - began, job.text()
    told = f"{strike}\n{text[-3000:]}"
    assert harness.checkpoint_of(out) == expected and not (out / "policy").exists(), told
    if strike.term:
        assert f"stopped after {expected} of {STEPS} steps; the same command goes on" in text, told
        # torchrun has a status of its own; that of its workers is in what it says.
        assert strike.term == "torchrun" or "exitcode  : 75" in text, told
    elif strike.do == "nan":
        message = rf"error: step {step}: loss [\d.]+, gradient norm nan; no update was made\. Rows: (\S+, ){{3}}\S+\n"
        assert len(re.findall(message, text)) == 1, f"the step is refused, which one rank tells: {told}"
    else:  # early on, torchrun may end the other one before it finds out
        assert re.search(f"{LOST}|{KILLED}" if strike.where in ("reference", "load") else LOST, text), told
    assert "delete" not in text, f"bad advice: {told}"
    return seconds


def test_a_rank_is_struck_and_the_command_goes_on(tiny_world, tmp_path, amount):
    """One fault after the other in one run; with --soak in seven of each size. The rest is done by a job without."""
    soak = bool(amount(0, 1))
    for size in list(SIZES)[: amount(1, 2)]:
        folder = tmp_path / size
        folder.mkdir()
        harness.run(arguments(tiny_world, folder / "calm", **options(folder, size)), folder / "log")
        for i, chain in enumerate(FULL if soak else SMALL):
            words = map(str.split, chain.split(", "))
            strikes = [Strike(do, where, int(rank), *term) for do, where, rank, *term in words]
            there = folder / f"chain-{i}"
            there.mkdir()
            argv = arguments(tiny_world, there / "run", **options(there, size))
            took = [struck(argv, there, there / "run", s, slot, patient=soak) for slot, s in enumerate(strikes)]
            harness.run(argv, there / "log", ranks=amount(1, 2))  # one rank does as well, and starts at once
            apart = harness.check_follows(there / "run", folder / "calm")
            print(f"\n{size}: {chain}: ended after {[f'{t:.1f}' for t in took]} s; losses apart by at most {apart:.1e}")
