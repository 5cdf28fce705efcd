"""A long run on the world: its memory, its open files and the time of a step stay what they were, and SIGTERM ends it
with a checkpoint from which it goes on.
"""

import json
import os
import signal
import time
from pathlib import Path

import harness
import numpy as np
import psutil
from helpers import arguments

import train


def test_memory_files_and_steps_stay_flat(tiny_world, tmp_path, amount):
    out, log = tmp_path / "run", tmp_path / "log"
    options = dict(epochs=30_000, lr=1e-6, save_every=50, lora_rank=4, warmup_steps=10, log_to="")
    argv = arguments(tiny_world, out, **options)
    process = harness.start("train", argv, log)
    assert process.pid is not None
    seen, metrics = psutil.Process(process.pid), out / "metrics.jsonl"
    while not metrics.exists() or metrics.stat().st_size == 0:
        assert process.exitcode is None, log.read_text()[-2000:]
        time.sleep(0.2)
    samples = []  # seconds of the processor (others may be at work on it), steps, MiB, open files
    until = time.time() + amount(20, 3600)
    while time.time() < until or len(samples) < 8:
        time.sleep(amount(1, 20))
        assert process.exitcode is None, log.read_text()[-2000:]
        with metrics.open("rb") as file:
            steps = sum(1 for _ in file)
        if not samples or steps > samples[-1][1]:  # on a busy machine a step may take longer than that
            cpu = sum(seen.cpu_times()[:2])
            samples.append((cpu, steps, seen.memory_info().rss / 2**20, seen.num_fds()))
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == train.STOPPED_BY_SIGTERM
    cpu, steps, memory, descriptors = np.array(samples).T
    rate = np.diff(cpu) / np.diff(steps)
    fifth = max(2, len(rate) // 5)
    first, last = np.median(rate[1 : 1 + fifth]), np.median(rate[-fifth:])
    grown = np.median(memory[-fifth:]) - np.median(memory[1 : 1 + fifth])
    print(
        f"\n{steps[-1]:.0f} steps in {amount(20, 3600)} s: a step {1000 * first:.1f} ms of processor at first and "
        f"{1000 * last:.1f} in the end; memory {memory[0]:.0f} -> {memory[-1]:.0f} MiB; "
        f"open files {descriptors[0]:.0f} -> {descriptors[-1]:.0f}"
    )
    # A core whose twin gets busy takes longer for the same step, in processor seconds too: 20 s cannot tell that apart.
    assert last < amount(30, 13) / 10 * first
    assert grown < amount(10, 40)
    assert np.median(descriptors[-fifth:]) <= np.median(descriptors[1 : 1 + fifth])
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    saved = checkpoints(out)
    assert saved == [f"step-{len(lines):08d}"]
    # It goes on from just there.
    harness.run("train", [*argv, f"--stop_after={len(lines) + 2}"], log)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(len(lines) + 2))


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())
