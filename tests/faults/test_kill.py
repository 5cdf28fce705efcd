"""SIGKILL at random moments, SIGTERM, two runs in one folder, an hour of training; and the same command again: nothing
twice, nothing missing, the same bits in the end."""

import json
import os
import random
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import psutil
import pytest
from helpers import arguments, classifier, flags
from safetensors.numpy import load_file

import train
from hps.data import listwise, tokenizers
from hps.data.rows import Row

SMALL_SHARDS = "from hps import reference; reference.MICRO_BATCHES_PER_SHARD = 1"  # so that the cache fills in pieces
STEPS = 12


class Work(NamedTuple):
    """A command that can be killed. script: which; argv(folder): what writes into a folder; result(folder): what must
    come out of it, to the bit."""

    script: str
    argv: Callable[[Path], list[str]]
    result: Callable[[Path], Any]
    kills: tuple[int, int]  # in make test, in make soak


def training(world: Path, **options) -> Work:
    """Six steps, a checkpoint at each, and its own caches."""
    options |= dict(save_every=1, prompts_per_step=4, epochs=1, tokens_per_micro_batch=100)

    def argv(folder: Path) -> list[str]:
        caches = dict(token_cache=folder / "tokens", reference_cache=folder / "cache")
        return arguments(world, folder / "run", **options | caches)

    def result(folder: Path) -> Any:
        left = [p.name for p in (folder / "run").rglob("*") if p.name == "lock" or p.suffix == ".tmp"]
        assert not left, f"the run that came through left {left}"
        scored = [load_file(path) for path in sorted((folder / "cache").rglob("shard-*.safetensors"))]
        pairs = [(key.tobytes(), float(x)) for s in scored for key, x in zip(s["keys"], s["logps"], strict=True)]
        assert len(pairs) == len(dict(pairs)), "a response was scored twice"
        assert len(harness.records(folder / "run")) == STEPS // 2
        return harness.outcome(folder / "run"), dict(pairs)

    return Work("train", argv, result, (2, 25))


def making(command: str, count: int, **options) -> Work:
    """A command of data_prep.py that writes one row for each of `count` prompts."""

    def result(folder: Path) -> Any:
        assert {path.name for path in folder.iterdir()} == {"out.jsonl", "out.jsonl.manifest.json"}
        rows = listwise.read(folder / "out.jsonl")
        assert len({row.id for row in rows}) == len(rows) == count
        assert np.isfinite([x for row in rows for x in row.rewards or ()]).all()
        return harness.digest(folder / "out.jsonl")

    return Work("data_prep", lambda folder: [command, *flags(output=folder / "out.jsonl", **options)], result, (1, 25))


@pytest.mark.parametrize("name", ["full", "lora", "generate", "annotate"])
def test_killed_at_any_moment_and_started_again(tiny_world, tmp_path, amount, name):
    """As two runs that nobody disturbs, which are the same to the bit: losses, weights, reference log-probs, texts."""
    if name in ("full", "lora"):
        work = training(tiny_world, **(dict(lora_rank=4) if name == "lora" else {}))
    else:
        rows = (listwise.read(tiny_world / "train.jsonl") * 4)[: amount(12, 96)]
        bare = [Row(f"{i}", row.prompt, row.responses[:3] * (name == "annotate")) for i, row in enumerate(rows)]
        listwise.write(tmp_path / "in.jsonl", bare)
        options: dict[str, Any] = dict(model=tiny_world / "model", n=2, max_new_tokens=amount(12, 24), max_rows=4)
        if name == "annotate":
            rm = classifier(tokenizers.load_tokenizer(str(tiny_world / "model")), tmp_path / "rm")
            options = dict(scorer=rm, tokens_per_micro_batch=64)
        work = making(name, len(rows), input=tmp_path / "in.jsonl", **options)
    log, how = tmp_path / "log", dict(script=work.script, setup=SMALL_SHARDS)
    seconds = 0.0
    for which in ("calm", "again"):  # the first one starts the server as well
        (tmp_path / which).mkdir()
        for written in ("out.jsonl", "out.jsonl.manifest.json"):  # as a kill in the midst of writing them leaves it
            (tmp_path / which / f"{written}.1.tmp").touch()
        seconds = harness.run(work.argv(tmp_path / which), log, **how)
    expected = work.result(tmp_path / "calm")
    assert work.result(tmp_path / "again") == expected
    rng, killed, chains = random.Random(len(name)), 0, 0
    while killed < amount(*work.kills):
        folder = tmp_path / f"chain-{chains}"
        folder.mkdir()
        killed += harness.kill_until_done(work.argv(folder), log, seconds=seconds, rng=rng, **how)
        assert work.result(folder) == expected
        chains += 1
    print(f"\n{killed} kills of {name} in {chains} runs")


def test_two_threads_give_the_same_bits_twice(tiny_world, tmp_path):
    for name in "ab":  # few steps: two threads beside another process wait for each other most of the time
        caches = dict(token_cache=tmp_path / name / "tokens", reference_cache=tmp_path / name / "cache")
        argv = arguments(tiny_world, tmp_path / name / "run", epochs=1, **caches)
        harness.run(argv, tmp_path / "log", setup="import torch; torch.set_num_threads(2)")
    assert harness.outcome(tmp_path / "a/run") == harness.outcome(tmp_path / "b/run")


def test_one_run_per_folder_and_sigterm(tiny_world, tmp_path, amount):
    """A second train.py is refused while the first one runs. SIGTERM ends that one with a checkpoint and status 75; and
    after SIGKILL, which leaves the lock's file, the next run is not refused."""
    more = dict(prompts_per_step=4, save_every=2, tokens_per_micro_batch=150, reference_cache=tmp_path / "cache")
    calm, out, log = tmp_path / "calm", tmp_path / "run", tmp_path / "log"
    harness.run(arguments(tiny_world, calm, **more), log)
    argv = arguments(tiny_world, out, **more)

    def refused(pid: int) -> None:
        where = rf"{re.escape(str(out))}: train\.py by process {pid} on {re.escape(socket.gethostname())} since "
        with pytest.raises(ValueError, match=rf"{where}\d{{4}}-.* is at work here; wait until it ends, or choose"):
            train.main(argv)

    mark = tmp_path / "mark"
    with harness.Job(argv, log, fault=harness.Fault("wait", "step", mark, step=4)) as holder:
        holder.wait(mark)
        refused(holder.pid)
        if amount(0, 1):  # nor is it let in as a job
            with harness.Job(argv, tmp_path / "second", ranks=2) as second:
                assert second.end(60) != 0
                assert f"by process {holder.pid} on" in second.text()
        os.kill(holder.pid, signal.SIGTERM)
        assert holder.end(60) == 75
        assert not (out / "lock").exists()
        assert harness.checkpoint_of(out) == 5
        assert f"stopped after 5 of {STEPS} steps; the same command goes on" in holder.text()
    mark.unlink()
    with harness.Job(argv, log, fault=harness.Fault("wait", "step", mark, step=7)) as holder:
        holder.wait(mark)
        refused(holder.pid)
    assert (out / "lock").exists() and harness.checkpoint_of(out) == 6
    mark.unlink()
    with harness.Job(argv, log, fault=harness.Fault("wait", "export", mark)) as holder:
        holder.wait(mark)
        os.kill(holder.pid, signal.SIGTERM)
        assert holder.end(60) == 75
        assert "stopped before the policy was written; the same command goes on" in holder.text()
    assert harness.checkpoint_of(out) == STEPS and not (out / "policy").exists()
    (out / "policy.1.tmp").mkdir()  # as a kill in the export leaves it
    train.main(argv)  # without a step
    assert not (out / "policy.1.tmp").exists()
    assert harness.outcome(out) == harness.outcome(calm)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (out, calm)]
    assert summaries[0].pop("seconds") > 0 < summaries[1].pop("seconds")
    assert summaries[0] == summaries[1]


def test_memory_and_open_files_stay_flat(tiny_world, tmp_path, monkeypatch, amount):
    """A hundred steps with several checkpoints, or with --soak an hour of them."""
    me, samples = psutil.Process(), []  # seconds of the processor, MiB, open files
    many, every = amount(120, 70_000), amount(3, 1000)

    def sample(c: Any, step: int, steps: int) -> None:
        if step % every == 0:
            samples.append((sum(me.cpu_times()[:2]), me.memory_info().rss / 2**20, me.num_fds()))

    harness.before(train, "lr_at", sample, monkeypatch)
    changes = dict(epochs=many // 6 + 1, lr=1e-6, save_every=amount(20, 50), lora_rank=4, prompts_per_step=4)
    train.main(arguments(tiny_world, tmp_path / "run", **changes, stop_after=many))
    cpu, memory, descriptors = np.array(samples).T
    fifth = len(samples) // 5
    series = (np.diff(cpu) / every, memory, descriptors)
    step, rss, opened = ([float(np.median(x)) for x in (xs[1 : 1 + fifth], xs[-fifth:])] for xs in series)
    print(f"\nfirst and last: {step} s of processor for a step, {rss} MiB, {opened} files")
    assert step[1] < 1.3 * step[0] or amount(1, 0)  # in a minute another process on the core is more than that
    assert rss[1] - rss[0] < amount(20, 40) and opened[1] <= opened[0]
    steps = [record["step"] for record in harness.records(tmp_path / "run")]
    assert steps == list(range(many))
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 1
