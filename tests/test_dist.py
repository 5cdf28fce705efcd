"""Sharded models on several ranks, against the same model in one process."""

import torch
from helpers import blocks_of, on_ranks, tiny

from hps import checkpoint, dist
from hps.model import PolicyModel
from hps.packing import pack


def step(policy: PolicyModel, optimizer: torch.optim.Optimizer, share: list) -> torch.Tensor:
    """One update of a rank on its share of the blocks; the norm of the gradient before."""
    (-policy(pack(share, pad_id=0)).sum()).backward()
    norm = dist.clip_gradients([p for group in optimizer.param_groups for p in group["params"]], 0)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def train_after_a_pass_without_gradient(expected: list[float], weights: dict[str, torch.Tensor]) -> None:
    from datetime import timedelta

    blocks = blocks_of(2, B=4)
    with dist.session(timeout=timedelta(minutes=1)) as ranks:
        policy, share = PolicyModel(tiny("llama")), blocks[ranks.rank :: 2]
        dist.shard(policy, policy.layers, ranks=ranks, dtype=torch.float32)
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
