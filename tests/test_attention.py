"""Attention over packed rows: each way of serving them against the dense mask in float64, values and gradients."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import block_mask, tiny
from torch.nn.attention import flex_attention

from hps import attention, attention_cpu, attention_cuda
from hps.model import PolicyModel
from hps.packing import Block, Packed, pack

SCALE = 0.3  # not Dh ** -.5, so that a forgotten scaling shows
H, G, Dh = 6, 2, 8


def row(spans) -> Packed:
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


@pytest.fixture
def flex_on_a_cpu(monkeypatch) -> Iterator[Callable[[], int]]:
    """Rows as on CUDA, by FlexAttention compiled for autograd alone, whose backward is dense here: its kernels are not
    run. How many graphs were compiled."""
    given = attention.inputs
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)  # which refuses a backward on a CPU
    monkeypatch.setattr(attention_cpu, "layout", lambda packed, _: attention_cuda.layout(packed, "aot_eager"))
    monkeypatch.setattr(attention, "inputs", lambda packed, heads: given(attention_cuda.padded(packed), heads=heads))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def test_one_compiled_graph_serves_rows_of_all_lengths(flex_on_a_cpu):
    """Values and gradients of padded rows are the dense mask's; the first row has as many blocks as key heads."""
    for spans in (SPANS["ragged"], [(150, (90, 40))], [(260, (140, 7, 100))]):
        packed = row(spans)
        N, padded = packed.input_ids.shape[1], attention_cuda.padded(packed)
        exact, ours = qkv(N, torch.float64), qkv(N, torch.float32)
        more = (0, 0, 0, padded.input_ids.shape[1] - N)
        expected = dense(*exact, block_mask(packed))
        found = attention_cuda.layout(padded, "aot_eager")(*(F.pad(x, more) for x in ours), SCALE)
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found[:, :, :N].double(), expected, rtol=0, atol=1e-5)
        expected.sum().backward()
        found[:, :, :N].sum().backward()
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=1e-5 * float(b.grad.abs().max()))
    assert flex_on_a_cpu() == 1


# Passes without a gradient (KTO's z0, a reference, another one of the same sizes), layers whose inputs all need one,
# and LoRA's first layer, whose keys need none. Generation takes no packed rows.
GRAPHS = {"full kto-hps": 2, "lora lipo-pl": 3}


@pytest.mark.parametrize("run", GRAPHS)
def test_a_training_compiles_few_graphs(run, flex_on_a_cpu, tmp_path):
    """And follows the committed trajectory."""
    found = golden.play_all([run], 1, tmp_path)[f"1 {run}"]
    assert golden.difference(found, golden.load()[f"1 {run}"]) < 1e-4
    assert flex_on_a_cpu() == GRAPHS[run]


def test_attention_that_is_not_compiled_is_refused(flex_on_a_cpu, monkeypatch):
    """Not served by a dense (heads, N, N) tensor of scores, which torch would do with a warning."""
    packed = attention_cuda.padded(row(SPANS["ragged"]))
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match="need torch.compile"):
        attention_cuda.layout(packed, "aot_eager")(*qkv(packed.input_ids.shape[1], torch.float32), SCALE)


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


def test_wide_heads_get_tiles_that_small_chips_have(monkeypatch):
    """99 KiB of shared memory: torch's own tiles for bf16 heads of 192 and 256 need 105 to 170 KiB there."""
    chips = {"L4": 101_376, "A100": 166_912}
    properties = [SimpleNamespace(shared_memory_per_block_optin=chips["L4"])]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties[0])
    narrow, wide, fp32 = ((128, torch.bfloat16), (256, torch.bfloat16), (64, torch.float32))
    attention_cuda.tiles.cache_clear()
    small, cuda = {x: attention_cuda.tiles(*x, torch.device("cuda", 0)) for x in (narrow, wide, fp32)}, "cuda:1"
    assert small[narrow] == {} and small[fp32]["fwd_BLOCK_N"] == 16
    M1, N1, M2, N2 = (small[wide][f"bwd_BLOCK_{x}"] for x in ("M1", "N1", "M2", "N2"))
    assert N1 % M1 == M2 % N2 == 0 and all(attention_cuda.BLOCK % x == 0 for x in (M1, N1, M2, N2))
    properties[0] = SimpleNamespace(shared_memory_per_block_optin=chips["A100"])
    assert attention_cuda.tiles(*wide, torch.device(cuda)) == attention_cuda.tiles(*wide, torch.device("cpu")) == {}
    attention_cuda.tiles.cache_clear()
