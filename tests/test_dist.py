"""Ways to shard a model, against the same model in one process."""

import json
import os
import shutil
import tracemalloc
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALONE, VOCABULARY, arguments, blocks_of, losses, noisy, on_ranks, run, run_ranks, run_script, tiny
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaForSequenceClassification

from hps import checkpoint, dist, limits, pretrained, sharding
from hps.extra.reward_model import RewardModel
from hps.model import PolicyModel, layers_of
from hps.options import Config
from hps.packing import pack


def options(**changes) -> Config:
    return Config("m", "d", "o", **changes)


def step(policy: PolicyModel | RewardModel, optimizer: torch.optim.Optimizer, share: list) -> torch.Tensor:
    """One update of a rank on its share of the blocks; the norm of the gradient before."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="FSDP2-wrapped module .* returned a view")
        (-policy(pack(share, pad_id=0, share_prompt=not policy.padded)).sum()).backward()
    norm = dist.clip_gradients([p for group in optimizer.param_groups for p in group["params"]], 0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def train_after_a_pass_without_gradient(expected: list[float], weights: dict[str, torch.Tensor]) -> None:
    blocks = blocks_of(2, B=4)
    with dist.session(timeout=timedelta(minutes=1)) as ranks:
        policy, share = PolicyModel(tiny("llama")), blocks[ranks.rank :: 2]
        sharding.shard(policy, layers_of(policy.lm), options(), ranks=ranks, dtype=torch.float32)
        norms = []
        for early in (True, False):  # the optimizer, before the first such pass or after it
            if early:
                optimizer = torch.optim.SGD(checkpoint.trained(policy).values(), lr=1e-3)
            with torch.no_grad():
                policy(pack(share, pad_id=0))
            if not early:
                optimizer = torch.optim.SGD(checkpoint.trained(policy).values(), lr=1e-3)
            norms.append(float(step(policy, optimizer, share)) * 2)  # FSDP averages over the two
        torch.testing.assert_close(norms, expected)
        for name, p in checkpoint.trained(policy).items():
            torch.testing.assert_close(dist.full(p.detach()), weights[name])


def test_a_pass_without_gradient_costs_no_gradient():
    """FSDP keeps the root's gathered weights after it: neither the next step may run on copies that no optimizer
    knows, nor an optimizer be made of them."""
    policy, blocks = PolicyModel(tiny("llama")), blocks_of(2, B=4)
    optimizer = torch.optim.SGD(checkpoint.trained(policy).values(), lr=5e-4)
    norms = [float(step(policy, optimizer, blocks)) for _ in range(2)]
    on_ranks(2, train_after_a_pass_without_gradient, (norms, {n: p.detach() for n, p in policy.named_parameters()}))


def fails_on_packed_rows() -> PolicyModel:
    """In the midst of its second layer."""

    def fail(_layer, _args, given) -> None:
        if given.get("packed_layout") is not None:
            raise RuntimeError("what is this?")

    lm = tiny("llama")
    layers_of(lm)[1].register_forward_pre_hook(fail, with_kwargs=True)
    return PolicyModel(lm)


def capped() -> PolicyModel:
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    more = dict(num_key_value_heads=2, intermediate_size=48, final_logit_softcapping=2.0)
    torch.manual_seed(0)
    return PolicyModel(noisy(AutoModelForCausalLM.from_config(Gemma2Config(**sizes, **more))))


def rewarding() -> RewardModel:
    lm = LlamaForSequenceClassification(tiny("llama").config)
    lm.score = torch.nn.Linear(32, 1, bias=False)
    lm.model.load_state_dict(tiny("llama").model.state_dict())
    torch.nn.init.zeros_(lm.score.weight)
    return RewardModel(lm.eval())


MODELS: dict[str, Callable] = {"plain": lambda: PolicyModel(tiny("llama")), "fails": fails_on_packed_rows}
MODELS |= {"capped": capped, "rewarding": rewarding}


def place_and_step(expected: dict[str, tuple[bool, float]]) -> None:
    blocks = blocks_of(2, B=4)
    with dist.session(timeout=timedelta(minutes=1)) as ranks:
        for name, make in MODELS.items():
            policy = make()
            sharding.place(policy, options(), ranks, cast=None, longest=20)
            assert all(isinstance(p, DTensor) for p in policy.parameters())
            optimizer = torch.optim.SGD(checkpoint.trained(policy).values(), lr=1e-3)
            norm = float(step(policy, optimizer, blocks[ranks.rank :: 2])) * 2
            assert (policy.padded, norm) == (expected[name][0], pytest.approx(expected[name][1], rel=1e-4)), name
        real = limits._wrong_here
        if ranks.rank:  # a rank whose processor rounds otherwise, say
            limits._wrong_here = lambda policy, *a, **b: real(policy, *a, **b) or "other values" * (not policy.padded)
        policy = MODELS["plain"]()
        sharding.place(policy, options(), ranks, cast=None, longest=20)
        assert policy.padded


def test_a_sharded_model_is_checked_as_a_whole_one(caplog):
    """What packed rows cannot serve gets plain ones, on all ranks, and then the gradient of one process; also where the
    pass that shows it ends in the midst of a layer."""
    expected = {}
    for name, make in MODELS.items():
        policy = make()
        sharding.place(policy, options(), ALONE, cast=None, longest=20)
        expected[name] = (
            policy.padded,
            float(step(policy, torch.optim.SGD(policy.parameters(), lr=1), blocks_of(2, B=4))),
        )
    assert [padded for padded, _ in expected.values()] == [False, True, True, False]
    on_ranks(2, place_and_step, (expected,))


def update(ranks: dist.Ranks, share: list) -> tuple[PolicyModel, torch.optim.Optimizer]:
    """A model after one step, with a gradient that is the mean over four blocks' sums."""
    policy = PolicyModel(tiny("llama"))
    if ranks.sharded:
        sharding.shard(policy, layers_of(policy.lm), options(shard_ranks=2), ranks=ranks, dtype=torch.float32)
    optimizer = torch.optim.AdamW(checkpoint.trained(policy).values(), lr=1e-2)
    (-policy(pack(share, pad_id=0)).sum() / len(share)).backward()
    optimizer.step()
    return policy, optimizer


def save_in_parts(folder: Path) -> None:
    sharding.PART_BYTES = 4096
    with dist.session(timeout=timedelta(minutes=1)) as ranks:
        policy, optimizer = update(ranks, blocks_of(2, B=4)[ranks.rank :: 4])
        checkpoint.save(folder, policy, optimizer, {"step": 1}, ranks=ranks)


def test_parts_of_a_checkpoint_make_the_whole(tmp_path):
    """Of four ranks, two of which hold the same, and read by one process: every number once, at its place."""
    on_ranks(4, save_in_parts, (tmp_path,))
    policy, optimizer = PolicyModel(tiny("llama")), None
    optimizer = torch.optim.AdamW(checkpoint.trained(policy).values())
    checkpoint.load(tmp_path / "step-00000001", policy, optimizer, ranks=ALONE)
    found, expected = (checkpoint._state(*one) for one in ((policy, optimizer), update(ALONE, blocks_of(2, B=4))))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-6)
    files = [load_file(path) for path in (tmp_path / "step-00000001").glob("*.safetensors")]
    numbers = sum(values.numel() for values in expected.values())
    assert sum(values.numel() for file in files for values in file.values()) == numbers
    assert len(files) > 8


def test_a_save_holds_one_part_in_memory(tmp_path, monkeypatch):
    state = {f"{i}": torch.ones(2**16) for i in range(64)}  # 16 MiB
    monkeypatch.setattr(sharding, "PART_BYTES", 2**20)
    tracemalloc.start()
    sums = sharding.write(tmp_path, state, ranks=ALONE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sums) == 16 and peak < 3 * 2**20


def look_at_what_is_sharded() -> None:
    """Which parameters are shards, on four ranks in groups of two, in each way; every third is frozen."""
    with dist.session(timeout=timedelta(minutes=1)) as ranks:
        large = 1 << 40  # bytes that every rank has but the first, which has `room`
        for way, room, kept in (("true", large, False), ("false", 0, True), ("auto", large, True), ("auto", 0, False)):
            policy = PolicyModel(tiny("llama"))
            for p in list(policy.parameters())[::3]:
                p.requires_grad_(False)
            sharding.memory = lambda _, room=room: room if ranks.first else large
            c = options(shard_frozen=way, shard_ranks=2)
            sharding.shard(policy, layers_of(policy.lm), c, ranks=ranks, dtype=torch.float32)
            for p in policy.parameters():
                assert isinstance(p, DTensor) == (p.requires_grad or not kept)
                if isinstance(p, DTensor):
                    assert p.placements == (Replicate(), Shard(0)) and p.device_mesh.shape == (2, 2)
        with pytest.raises(ValueError, match="shard_ranks = 3 must divide the number of ranks, 4"):
            sharding.shard(policy, layers_of(policy.lm), options(shard_ranks=3), ranks=ranks, dtype=torch.float32)


def test_what_is_sharded_over_whom():
    """auto: a base that one of the ranks has no room for is sharded on all."""
    on_ranks(4, look_at_what_is_sharded, ())


WAYS = {
    "lora": [(1, {}), (4, {}), (2, dict(shard_frozen="true")), (4, dict(shard_frozen="true", shard_ranks=2))],
    "full": [(4, dict(shard_ranks=2)), (4, {}), (2, dict(reshard_after_forward="false")), (1, {})],
}


@pytest.mark.parametrize("size", WAYS)
def test_a_run_goes_on_sharded_in_another_way(tiny_world, tmp_path, size):
    """Each from the checkpoint of the one before; the losses and norms are those of one process."""
    options = dict(lora_rank=4, lora_alpha=8, lr=3e-2) if size == "lora" else {}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(tiny_world, whole, **options)
    for stop, (ranks, way) in zip((1, 3, 5, None), WAYS[size], strict=True):
        go_on = partial(run_ranks, ranks=ranks) if ranks > 1 else run
        go_on(tiny_world, parts, **options, **way, stop_after=stop)
    assert len(expected) == 6 and np.std(expected[1:]) > 1e-3
    np.testing.assert_allclose(losses(parts), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses(parts, "grad_norm"), losses(whole, "grad_norm"), rtol=1e-4)


def test_a_base_that_is_whole_gives_the_bits_of_a_sharded_one(tiny_world, tmp_path):
    found = []
    for way in ("true", "false"):
        run_ranks(tiny_world, tmp_path / way, 2, lora_rank=4, lora_alpha=8, lr=3e-2, shard_frozen=way)
        lines = [json.loads(line) for line in (tmp_path / way / "metrics.jsonl").read_text().splitlines()]
        found.append([{key: value for key, value in line.items() if "perf" not in key} for line in lines])
        found[-1].append((tmp_path / way / "policy" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


def run_where_the_first_rank_alone_may_hash(argv: list[str]) -> None:
    if int(os.environ["RANK"]):
        pretrained.fingerprint = None
    run_script("train", argv)


def test_weights_are_hashed_by_the_first_rank_alone(tiny_world, tmp_path):
    """And under the same name as by a process alone, whose cache serves."""
    options = dict(lora_rank=4, lora_alpha=8, reference=tiny_world / "model", stop_after=1, reference_cache=tmp_path)
    run(tiny_world, tmp_path / "one", **options)
    on_ranks(2, run_where_the_first_rank_alone_may_hash, (arguments(tiny_world, tmp_path / "two", **options),))
    one, two = (json.loads((tmp_path / name / "run.json").read_text())["inputs"] for name in ("one", "two"))
    assert one == two and len(one) == 4


def test_weights_stored_in_bf16_train_in_fp32(tiny_world, tmp_path):
    """On two ranks, which cast shard by shard, as in one process from files that hold the same numbers in fp32; and the
    policy is rounded to what the model came in, unless told otherwise."""
    shutil.copytree(tiny_world / "model", tmp_path / "bf16")
    shutil.copytree(tiny_world / "model", tmp_path / "fp32")
    weights = {name: w.bfloat16() for name, w in load_file(tmp_path / "bf16/model.safetensors").items()}
    save_file(weights, tmp_path / "bf16/model.safetensors", metadata={"format": "pt"})
    whole = {name: w.float() for name, w in weights.items()}
    save_file(whole, tmp_path / "fp32/model.safetensors", metadata={"format": "pt"})
    short = dict(epochs=1, reference_cache=tmp_path / "cache")
    expected = run(tiny_world, tmp_path / "a", model=tmp_path / "fp32", **short)
    assert run(tiny_world, tmp_path / "b", model=tmp_path / "bf16", **short) == expected
    ours = run_ranks(tiny_world, tmp_path / "c", 2, model=tmp_path / "bf16", **short, export_dtype="fp32")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    inputs = [json.loads((tmp_path / out / "run.json").read_text())["inputs"] for out in "abc"]
    assert inputs[0] == inputs[1] == inputs[2]
    a, b, c = (load_file(tmp_path / out / "policy/model.safetensors") for out in "abc")
    for name, values in a.items():
        assert torch.equal(b[name], values.bfloat16()) and c[name].dtype == torch.float32
        torch.testing.assert_close(c[name], values, rtol=1e-3, atol=1e-4)  # Adam follows signs near 0
    dtypes = [AutoConfig.from_pretrained(tmp_path / out / "policy").dtype for out in "abc"]
    assert dtypes == [torch.float32, torch.bfloat16, torch.float32]
