"""What is the same to the last bit and what is close: the statements of docs/RELIABILITY.md that no other test has."""

import harness
import numpy as np
import pytest
from helpers import arguments, run_ranks

from hps.data import listwise


@pytest.mark.parametrize("threads", [1, 2])
def test_one_process_twice(tiny_world, tmp_path, threads):
    """On one machine with one number of threads: losses, gradient norms and weights to the last bit."""
    found = []
    for name in "ab":
        caches = {"token_cache": tmp_path / name / "tokens", "reference_cache": tmp_path / name / "cache"}
        argv = arguments(tiny_world, tmp_path / name / "run", **caches)
        harness.run("train", argv, tmp_path / f"log-{name}", f"import torch; torch.set_num_threads({threads})")
        run = tmp_path / name / "run"
        found.append((harness.records(run / "metrics.jsonl"), harness.digest(run / "policy/model.safetensors")))
    assert found[0] == found[1]


def test_two_ranks_twice(tiny_world, tmp_path, amount):
    if not amount(0, 1):
        pytest.skip("two launches of torchrun: make soak")
    found = []
    for name in "ab":
        caches = {"token_cache": tmp_path / name / "tokens", "reference_cache": tmp_path / name / "cache"}
        run_ranks(tiny_world, tmp_path / name / "run", 2, **caches)
        run = tmp_path / name / "run"
        found.append((harness.records(run / "metrics.jsonl"), harness.digest(run / "policy/model.safetensors")))
    assert found[0] == found[1]


def test_a_shared_start_changes_rounding_only(tiny_world, tmp_path, monkeypatch):
    """A system prompt that all prompts begin with is computed once a row, or with every prompt."""
    from hps import packing

    data = tmp_path / "data.jsonl"
    start = " <user> " + " ".join(["may i eat this"] * 4)
    rows = listwise.read(tiny_world / "train.jsonl")
    rows = [listwise.replace(row, prompt=f"{start} {row.prompt[-1]['content']}") for row in rows]
    listwise.write(data, rows)
    import train

    seen: list[int] = []
    real = packing.pack

    def watched(*args, **more):
        packed = real(*args, **more)
        seen.append(packed.prefix)
        return packed

    monkeypatch.setattr(train.batches, "pack", watched)
    losses = {}
    for least in (8, 10**9):
        monkeypatch.setattr(packing, "MIN_PREFIX", least)
        out = tmp_path / str(least)
        options = dict(data=data, token_cache=tmp_path / "tokens", reference_cache=tmp_path / f"cache-{least}")
        train.main(arguments(tiny_world, out, **options))
        losses[least] = [record["loss"] for record in harness.records(out / "metrics.jsonl")]
    assert max(seen[: len(seen) // 2]) >= 16 and not any(seen[len(seen) // 2 :])
    assert losses[8] != losses[10**9] or not np.std(losses[8])
    np.testing.assert_allclose(losses[8], losses[10**9], rtol=0, atol=1e-5)
