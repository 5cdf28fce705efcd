"""Commands of the repository in processes of their own that start at once, to be killed at any moment."""

import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from helpers import ROOT

# A fork of a process that has imported everything starts in a hundredth of a second instead of five. It runs no test
# code, so it has no threads and no state of the tests.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train", "data_prep", "eval"])


def command(script: str, argv: list[str], log: str, setup: str = "") -> None:
    """In the child: what `python SCRIPT.py ARGV` does; `setup` is code that runs before, to make room for a fault."""
    sys.path.insert(0, str(ROOT))
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(ROOT)
    if setup:
        exec(setup, {})
    from hps import config

    config.run_main(lambda: importlib.import_module(script).main(argv))


def start(script: str, argv: list[str], log: Path, setup: str = ""):
    os.environ["PYTHONPATH"] = str(ROOT)  # the server imports the scripts from there
    os.environ["OMP_NUM_THREADS"] = "1"
    process = SERVER.Process(target=command, args=(script, argv, str(log), setup))
    process.start()
    return process


def run(script: str, argv: list[str], log: Path, setup: str = "") -> float:
    """Run to the end; the seconds it took."""
    began = time.perf_counter()
    process = start(script, argv, log, setup)
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-3000:]
    return time.perf_counter() - began


def kill_until_done(
    script: str, argv: list[str], log: Path, *, seconds: float, rng: random.Random, state: Callable[[], str], setup: str
) -> Counter[str]:
    """The same command again and again, each time killed at a random moment of its length, until one comes through.

    Returns how often it was killed in which `state`, as the disk shows it.
    """
    killed: Counter[str] = Counter()
    while True:
        process = start(script, argv, log, setup)
        process.join(rng.uniform(0.0, 1.1 * seconds))
        if process.exitcode is None and process.pid is not None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed[state()] += 1
            continue
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()[-3000:]
        if process.exitcode == 0:
            return killed


def records(path: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock and on memory."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
