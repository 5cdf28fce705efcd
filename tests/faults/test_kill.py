"""SIGKILL at random moments, and the same command again: nothing twice, nothing missing, the same bits in the end."""

import random

import harness
import numpy as np
import pytest
from helpers import arguments, classifier
from safetensors.numpy import load_file

from hps.data import listwise, tokens

SMALL_SHARDS = "from hps import reference; reference.MICRO_BATCHES_A_SHARD = 1"  # so that the cache fills in pieces


def phase(out) -> str:
    """Where in a run it was killed, as the disk shows it."""
    checkpoints = out / "checkpoints"
    if not (out / "run.json").exists():
        return "before run.json"
    if any(checkpoints.glob("*.tmp")):
        return "writing a checkpoint"
    if any(out.glob("policy.*.tmp")) or (out / "policy").exists():
        return "exporting"
    if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text():
        return "between steps and in them"
    return "reference pass or loading"


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_training(tiny_world, tmp_path, amount, lora_rank):
    """One rank: the losses, the weights and the reference log-probs of an undisturbed run, to the last bit."""

    def command(where, **more):
        caches = dict(token_cache=where / "tokens", reference_cache=where / "cache")
        options = dict(lora_rank=lora_rank, save_every=1, prompts_per_step=4, tokens_per_micro_batch=100, epochs=2)
        lora = {"lora_alpha": None, "lora_targets": None} if lora_rank == 0 else {}
        return arguments(tiny_world, where / "run", **(options | caches | lora | more))

    calm, log = tmp_path / "calm", tmp_path / "log"
    calm.mkdir()
    argv = command(calm)
    harness.run("train", argv, log, SMALL_SHARDS)  # the first one starts the server as well
    again = tmp_path / "again"
    again.mkdir()
    seconds = harness.run("train", command(again), log, SMALL_SHARDS)
    expected = harness.records(calm / "run/metrics.jsonl")
    assert len(expected) == 12 and harness.records(again / "run/metrics.jsonl") == expected
    name = "adapter_model.safetensors" if lora_rank else "model.safetensors"
    weights = harness.digest(calm / f"run/policy/{name}")

    rng, total, chains = random.Random(lora_rank), 0, 0
    found = {}
    while total < amount(3, 25):
        where = tmp_path / f"chain-{chains}"
        where.mkdir()
        killed = harness.kill_until_done(
            "train", command(where), log, seconds=seconds, rng=rng, setup=SMALL_SHARDS,
            state=lambda where=where: phase(where / "run"),
        )  # fmt: skip
        assert harness.records(where / "run/metrics.jsonl") == expected
        assert harness.digest(where / f"run/policy/{name}") == weights
        assert cache_of(where / "cache") == cache_of(calm / "cache")  # which says as well that none was computed twice
        left = [p.name for p in (where / "run").rglob("*") if p.name == "lock" or p.suffix == ".tmp"]
        assert not left, f"the run that came through left {left}"
        total, chains = total + sum(killed.values()), chains + 1
        found = {key: found.get(key, 0) + killed[key] for key in {*found, *killed}}
    print(f"\n{total} kills of training (lora_rank {lora_rank}), {chains} runs: {found}")


def cache_of(root) -> dict[bytes, float]:
    found, count = {}, 0
    for path in root.rglob("shard-*.safetensors"):
        shard = load_file(path)
        count += len(shard["logps"])
        found |= {key.tobytes(): float(x) for key, x in zip(shard["keys"], shard["logps"], strict=True)}
    assert count == len(found), "a response was scored twice"
    return found


def test_generation_and_annotation(tiny_world, tmp_path, amount):
    """Every prompt once, the texts and the rewards of an undisturbed run."""
    reward_model = classifier(tokens.load_tokenizer(str(tiny_world / "model")), tmp_path / "rm")
    log = tmp_path / "log"
    bare = tmp_path / "prompts.jsonl"
    rows = listwise.read(tiny_world / "train.jsonl")
    copies = range(amount(1, 4))
    listwise.write(bare, [listwise.Row(f"{row.id}-{i}", row.prompt, ()) for i in copies for row in rows])

    def generate(out):
        options = dict(model=tiny_world / "model", input=bare, output=out, n=4, max_new_tokens=24, max_rows=8)
        return ["generate", *(f"--{key}={value}" for key, value in options.items())]

    def annotate(out):
        options = dict(scorer=reward_model, input=tmp_path / "calm-generate.jsonl", output=out)
        return ["annotate", *(f"--{key}={value}" for key, value in (options | {"tokens_per_micro_batch": 64}).items())]

    for name, command in (("generate", generate), ("annotate", annotate)):
        calm = tmp_path / f"calm-{name}.jsonl"
        harness.run("data_prep", command(calm), log)
        seconds = harness.run("data_prep", command(tmp_path / f"again-{name}.jsonl"), log)
        assert harness.digest(tmp_path / f"again-{name}.jsonl") == harness.digest(calm)
        rng, total, chain = random.Random(0), 0, 0
        states = {}
        while total < amount(1, 25):
            out = tmp_path / f"{name}-{chain}.jsonl"

            def state(out=out) -> str:
                journals = [p for p in out.parent.iterdir() if p.name.startswith(f"{out.name}.journal")]
                return "some prompts done" if journals else "none done, or all"

            killed = harness.kill_until_done(
                "data_prep", command(out), log, seconds=seconds, rng=rng, state=state, setup=""
            )
            assert harness.digest(out) == harness.digest(calm)
            beside = {p.name.removeprefix(out.name) for p in out.parent.iterdir() if p.name.startswith(out.name)}
            assert beside == {"", ".manifest.json"}
            total, chain = total + sum(killed.values()), chain + 1
            states = {key: states.get(key, 0) + killed[key] for key in {*states, *killed}}
        print(f"\n{total} kills of {name}, {chain} runs: {states}")
    done = listwise.read(tmp_path / "calm-annotate.jsonl")
    assert len({row.id for row in done}) == len(done) == len(copies) * len(rows)
    assert np.isfinite(np.concatenate([row.rewards for row in done if row.rewards])).all()
