"""Attention over packed rows: each way of serving them against the dense mask in float64, values and gradients."""

import numpy as np
import pytest
import torch
from helpers import block_mask, tiny
from torch.nn.attention.flex_attention import flex_attention

from hps import attention, attention_cpu
from hps.model import PolicyModel
from hps.packing import Block, pack

SCALE = 0.3  # not Dh ** -.5, so that a forgotten scaling shows
H, G, Dh = 6, 2, 8


def row(spans) -> attention.Packed:
    g = np.random.default_rng(0)
    blocks = [Block(g.integers(0, 9, P), tuple(g.integers(0, 9, y) for y in ys)) for P, ys in spans]
    return pack(blocks, pad_id=0)


def qkv(N: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, heads, N, Dh, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for heads in (H, G, G)
    ]


def dense(query, key, value, mask) -> torch.Tensor:
    """softmax(scale q k^T) v by the book, keys and values repeated for their group of heads."""
    key, value = (x.repeat_interleave(H // G, dim=1) for x in (key, value))
    scores = (query @ key.mT * SCALE).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


SPANS = {
    "a pair of real text": [(125, (45, 50)), (98, (40, 7))],
    "one token each": [(1, (1, 1)), (1, (1,))],
    "one response": [(5, (7,)), (1, (3,))],
    "many responses": [(9, (3, 17, 1, 8, 8, 12, 5, 30)), (20, (2, 2, 2))],
    "ragged": [(3, (4,)), (30, (1, 2, 3, 4, 5)), (2, (9, 1))],
}


@pytest.mark.parametrize("way", [attention_cpu.blockwise, attention_cpu.padded])
@pytest.mark.parametrize("spans", SPANS.values(), ids=SPANS)
def test_packed_attention_is_dense_attention(way, spans):
    """fp32 values and gradients to 1e-5 of the largest, against float64 and the (N, N) mask."""
    packed = row(spans)
    N = packed.input_ids.shape[1]
    exact, ours = qkv(N, torch.float64), qkv(N, torch.float32)
    upstream = torch.randn(1, H, N, Dh, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = dense(*exact, block_mask(packed))
    found = way(packed)(*ours, SCALE)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.detach().abs().max()))
    expected.backward(upstream)
    found.backward(upstream.float())
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=1e-5 * float(b.grad.abs().max()))


def test_the_flex_mask_is_the_dense_mask():
    """Uncompiled FlexAttention on a CPU, forward only (it has no backward there); its CUDA kernel is not run here."""
    for name in ("many responses", "ragged"):
        packed = row(SPANS[name])
        query, key, value = (x.detach() for x in qkv(packed.input_ids.shape[1], torch.float32))
        found = attention.flex(packed, flex_attention)(query, key, value, SCALE)
        torch.testing.assert_close(found, dense(query, key, value, block_mask(packed)), rtol=0, atol=1e-5)


def test_bf16_is_as_close_as_dense_bf16():
    """Against float64 the blockwise path in bf16 may err at most 1.5 times as much as dense attention in bf16."""
    packed = row(SPANS["a pair of real text"])
    rounded = qkv(packed.input_ids.shape[1], torch.bfloat16)
    mask = block_mask(packed)
    exact = dense(*[x.detach().double() for x in rounded], mask)
    plain = dense(*rounded, mask)
    ours = attention_cpu.blockwise(packed)(*rounded, SCALE)
    assert (ours.double() - exact).abs().max() <= 1.5 * (plain.double() - exact).abs().max()


def test_many_short_responses_share_a_call_and_long_ones_do_not():
    """Nine heads, as SmolLM2 has; the world's model has four. Which way wins was measured."""
    world = row([(8, (12, 20))] * 16)
    candidates = row([(8, (15,) * 100)] * 2)
    pairs = row(SPANS["a pair of real text"])
    assert attention_cpu.padding_pays(world, 4) and attention_cpu.padding_pays(candidates, 4)
    assert not attention_cpu.padding_pays(pairs, 9)


def test_generation_and_saved_folders_do_not_notice(tmp_path):
    """The same tokens from the model's own sdpa attention, left-padded prompts too; no trace in a saved config."""
    lm = tiny("llama")
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 3]])
    options = dict(attention_mask=(prompts > 0).long(), do_sample=False, max_new_tokens=6, pad_token_id=0)
    expected = lm.generate(prompts, **options)
    PolicyModel(lm)
    assert lm.config._attn_implementation == attention.NAME
    assert torch.equal(lm.generate(prompts, **options), expected)
    lm.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
