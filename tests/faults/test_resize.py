"""A run that is stopped and goes on with another number of ranks: the same losses, the same draws, every prompt once
an epoch."""

from collections import Counter
from pathlib import Path

import driver
import harness
import jobs
import pytest
from helpers import arguments

from hps.data import listwise

SFT = dict(loss="sft", method=None, beta=None, reference_cache=None)
METHODS: dict[str, dict[str, object]] = {
    "dpo-hps": dict(method="dpo-hps"),
    "dpo-pl": dict(method="dpo-pl"),
    "nca-bt": dict(method="nca-bt"),
    "kto-bt": dict(method="kto-bt"),
    "simpo-hps": dict(method="simpo-hps", beta=2.0, target_margin=0.3, reference_cache=None),
    "ipo-uniform": dict(method="ipo-uniform"),
    "sft": SFT,
}
SIZES = {"lora": dict(lora_rank=8, lr=3e-2), "full": dict(lora_rank=0)}


def train(argv: list[str], ranks: int, folder: Path, journal: Path) -> None:
    """To the end of the part that `argv` asks for."""
    if ranks == 1:
        harness.run("train", argv, folder / "log", driver.setup(journal=journal))
        return
    with jobs.job(argv, folder / "log", options=jobs.one_host(ranks), journal=journal) as job:
        assert job.end() == 0, job.text()[-4000:]


def chain(world: Path, folder: Path, ranks: list[int], options: dict[str, object]) -> float:
    """A run in as many parts as there are numbers of ranks, beside one that nobody disturbs; how far their losses are
    apart."""
    whole, parts = folder / "whole", folder / "parts"
    folder.mkdir()
    train(arguments(world, whole, **options), 1, folder, folder / "calm")
    steps = len(harness.records(whole / "metrics.jsonl"))
    assert steps >= len(ranks)
    for i, n in enumerate(ranks):
        stop = (i + 1) * steps // len(ranks)
        more = {} if stop == steps else {"stop_after": stop}
        train(arguments(world, parts, **options, **more), n, folder, folder / "journal")
        assert (parts / "policy").exists() == (stop == steps)
        assert jobs.checkpoint_of(parts) == (stop if stop < steps else i * steps // len(ranks))

    # Every prompt once an epoch, by whichever rank; the same responses of it in the same step as without a stop.
    seen, calm = jobs.visits(folder / "journal"), jobs.visits(folder / "calm")
    data = options.get("data", world / "train.jsonl")
    ids = [row.id for row in listwise.read(str(data))]
    assert Counter((visit["epoch"], visit["id"]) for visit in seen) == {(e, id): 1 for e in range(2) for id in ids}
    assert {visit["rank"] for visit in seen} == set(range(max(ranks)))
    without_rank = [[{k: v for k, v in visit.items() if k != "rank"} for visit in some] for some in (seen, calm)]
    assert without_rank[0] == without_rank[1]
    return jobs.largest_difference(parts, whole)


@pytest.mark.parametrize("size", SIZES)
def test_resize(tiny_world, tmp_path, amount, size):
    """One rank, two, one; with --soak several methods and up to four ranks, six parts each."""
    methods = list(METHODS)[: amount(1, len(METHODS))]
    ranks = [1, 2, 1] if amount(0, 1) == 0 else [1, 2, 4, 3, 2, 1]
    options = SIZES[size] | dict(tokens_per_micro_batch=150, prompts_per_step=amount(8, 4))
    apart = {}
    for method in methods:
        own = {"data": tiny_world / "sft.jsonl"} if method == "sft" else {}
        apart[method] = chain(tiny_world, tmp_path / method, ranks, options | METHODS[method] | own)
        assert apart[method] < 1e-5
    print(f"\n{size}, ranks {ranks}: losses apart by at most " + ", ".join(f"{k} {v:.1e}" for k, v in apart.items()))
