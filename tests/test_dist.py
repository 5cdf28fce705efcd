"""Ways to shard a model, against the same model in one process."""

import json
import os
from datetime import timedelta

import numpy as np
import pytest
import torch
from helpers import arguments, blocks_of, losses, on_ranks, run, run_ranks, run_script, tiny
from torch.distributed.tensor import DTensor, Replicate, Shard

from hps import checkpoint, dist, model, sharding
from hps.model import PolicyModel, layers_of
from hps.options import Config
from hps.packing import pack


def options(**changes) -> Config:
    return Config("m", "d", "o", **changes)


def step(policy: PolicyModel, optimizer: torch.optim.Optimizer, share: list) -> torch.Tensor:
    """One update of a rank on its share of the blocks; the norm of the gradient before."""
    (-policy(pack(share, pad_id=0)).sum()).backward()
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
    "lora": [(4, {}), (2, dict(shard_frozen="true")), (4, dict(shard_frozen="true", shard_ranks=2))],
    "full": [(4, dict(shard_ranks=2)), (4, {}), (2, dict(reshard_after_forward="false"))],
}


@pytest.mark.parametrize("size", WAYS)
def test_a_run_goes_on_sharded_in_another_way(tiny_world, tmp_path, size):
    """Two steps in each, from the checkpoint of the one before; the losses and norms are those of one process."""
    options = dict(lora_rank=4, lora_alpha=8, lr=3e-2) if size == "lora" else {}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(tiny_world, whole, **options)
    for part, (ranks, way) in enumerate(WAYS[size], 1):
        run_ranks(tiny_world, parts, ranks, **options, **way, stop_after=2 * part if part < 3 else None)
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
        model.fingerprint = None
    run_script("train", argv)


def test_weights_are_hashed_by_the_first_rank_alone(tiny_world, tmp_path):
    """And under the same name as by a process alone, whose cache serves."""
    options = dict(lora_rank=4, lora_alpha=8, reference=tiny_world / "model", stop_after=1, reference_cache=tmp_path)
    run(tiny_world, tmp_path / "one", **options)
    on_ranks(2, run_where_the_first_rank_alone_may_hash, (arguments(tiny_world, tmp_path / "two", **options),))
    one, two = (json.loads((tmp_path / name / "run.json").read_text())["inputs"] for name in ("one", "two"))
    assert one == two and len(one) == 4
