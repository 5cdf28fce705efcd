"""The fused head against the dense oracle in float64: values, both gradients, odd shapes, bf16 within its budget."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hps.logps import chunk_for, sequence_logps, token_logps

SHAPES = [(1, 5, 7), (13, 8, 101), (64, 16, 257), (130, 32, 1000)]


def draw(T: int, D: int, V: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(T)
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g)
    # Some softmaxes are saturated: their target's weight row points along the state.
    targets = torch.randint(0, V, (T,), generator=g)
    hidden[::3] = 4 * weight[targets[::3]]
    return hidden.to(dtype), weight.to(dtype), targets, torch.randn(T, generator=g)


def oracle(hidden, weight, targets, upstream):
    """Value and gradients in float64 by autograd through the whole (T, V) softmax."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logps = torch.log_softmax(h @ w.T, -1)[torch.arange(len(targets)), targets]
    gh, gw = torch.autograd.grad((logps * upstream.double()).sum(), (h, w))
    return logps.detach(), gh, gw


@pytest.mark.parametrize("frozen", [True, False])
def test_chunked_head_equals_the_dense_oracle(frozen):
    for shape, chunk in [(shape, chunk) for shape in SHAPES for chunk in (1, 7, 4096)]:
        hidden, weight, targets, upstream = draw(*shape)
        logps, gh, gw = oracle(hidden, weight, targets, upstream)
        h, w = hidden.requires_grad_(), weight.requires_grad_(not frozen)
        ours = token_logps(h, w, targets, chunk=chunk)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), logps, rtol=1e-5, atol=2e-4)
        (ours * upstream).sum().backward()
        torch.testing.assert_close(h.grad.double(), gh, rtol=1e-4, atol=1e-4)
        assert (w.grad is None) == frozen
        if not frozen:
            torch.testing.assert_close(w.grad.double(), gw, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not token_logps(h, w, targets).requires_grad


def dense_token_logps(hidden, weight, targets):
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("frozen", [True, False])
def test_bf16_error_is_that_of_the_plain_bf16_path(frozen):
    """Error budget: against float64 of the same bf16 inputs, no worse than autograd through the dense bf16 path."""
    hidden, weight, targets, upstream = draw(96, 64, 500, dtype=torch.bfloat16)
    logps, gh, gw = oracle(hidden, weight, targets, upstream)
    errors = {}
    for name, function in (("ours", token_logps), ("dense", dense_token_logps)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        value = function(h, w, targets)
        (value * upstream).sum().backward()
        errors[name] = [(value.double() - logps).abs().max(), (h.grad.double() - gh).abs().max()]
        if not frozen:
            errors[name].append((w.grad.double() - gw).abs().max())
    for ours, dense in zip(errors["ours"], errors["dense"], strict=True):
        assert ours <= 1.5 * dense + 1e-3


def test_a_short_batch_keeps_its_softmax_for_the_head_s_gradient():
    """Three products where several chunks have four: a head that trains has room for the logits of T <= D tokens."""
    for T, products in ((16, 3), (17, 4)):
        hidden, weight, targets, _ = draw(T, 16, 2**19)
        hidden.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            token_logps(hidden, weight.requires_grad_(), targets).sum().backward()
        assert counter.get_total_flops() == products * 2 * T * 16 * 2**19


def test_sequence_logps_sums_by_response():
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    summed = sequence_logps(logps, torch.tensor([[1, 0], [1, 2]]))
    assert summed.tolist() == [[-1.0, 0.0], [-2.0, -12.0]]
    (summed * torch.tensor([[1.0, 7.0], [2.0, 3.0]])).sum().backward()
    assert logps.grad.tolist() == [1.0, 2.0, 3.0, 3.0]


def test_one_chunk_of_logits_is_all_that_the_frozen_head_holds():
    """24 MiB on a CPU. By torch's own record of allocations: softmax and gradient are made in the logits' memory, and
    one chunk's are gone before the next one's are made."""
    assert [chunk_for(V, "cpu") for V in (220, 32_000, 49_152, 128_256)] == [1024, 196, 128, 49]
    assert [chunk_for(V, "cuda") for V in (220, 32_000, 49_152, 128_256)] == [1024, 1024, 682, 261]
    hidden, weight, targets, _ = draw(144, 8, 128_256)  # three chunks
    hidden.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profiler:
        token_logps(hidden, weight, targets).sum().backward()
    changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 1.0 <= np.cumsum(changes).max() / (4 * chunk_for(128_256, "cpu") * 128_256) < 1.05
