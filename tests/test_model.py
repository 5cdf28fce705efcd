"""Packed log-probs against separate padded forwards of the plain transformers model, over architectures and K."""

import pytest
import torch
from helpers import blocks_of, separate_logps, tiny

from hps.adapters import add_lora
from hps.model import PolicyModel, layers_of
from hps.packing import pack
from hps.pretrained import checkpoint_layers, compute_dtype, fingerprint


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_packed_equals_separate_forwards(name):
    """Values and weight gradients in fp32, packed or in plain rows, of prompts with one response, with several, and of
    both together."""
    lm = tiny(name)
    policy = PolicyModel(lm)
    blocks = [blocks_of(k, seed=k, B=1)[0] for k in (3, 1, 8, 2)]
    for some in (blocks, blocks[1:2], blocks[::-1][:2]):
        K = max(len(block.responses) for block in some)
        upstream = torch.randn(len(some), K, generator=torch.Generator().manual_seed(1))
        values = [separate_logps(lm, [block])[0] for block in some]
        lm.zero_grad()
        sum((row * upstream[b, : len(row)]).sum() for b, row in enumerate(values)).backward()
        expected = {n: p.grad.clone() for n, p in lm.named_parameters()}
        for share_prompt in (True, False):
            packed = pack(some, pad_id=0, share_prompt=share_prompt)
            ours = policy(packed)
            for row, found in zip(values, ours, strict=True):
                torch.testing.assert_close(found[: len(row)], row, rtol=1e-5, atol=1e-4)
                assert not found[len(row) :].any()
            lm.zero_grad()
            (ours * upstream).sum().backward()
            for n, p in lm.named_parameters():
                torch.testing.assert_close(p.grad, expected[n], rtol=1e-3, atol=2e-4 * float(expected[n].abs().max()))


@pytest.mark.parametrize(("name", "share_prompt"), [("gpt2", True), ("llama", False)])
def test_gradient_checkpointing_changes_memory_only(name, share_prompt):
    """Training mode would switch dropout on: GPT-2's layers, and Llama's attention, which plain rows leave to torch."""
    grads = []
    for recompute in (False, True):
        lm = tiny(name)
        for layer in lm.model.layers if name == "llama" else []:
            layer.self_attn.attention_dropout = 0.3
        if recompute:
            checkpoint_layers(lm)
        torch.manual_seed(5)
        PolicyModel(lm)(pack(blocks_of(2), pad_id=0, share_prompt=share_prompt)).sum().backward()
        grads.append([p.grad for p in lm.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_lora_starts_as_the_reference_and_trains_only_the_adapter():
    lm = tiny("llama")
    before = PolicyModel(lm)(pack(blocks_of(2), pad_id=0)).detach()
    adapted = PolicyModel(add_lora(lm, rank=4, alpha=8, targets=["q_proj", "v_proj"], seed=0))
    after = adapted(pack(blocks_of(2), pad_id=0))
    assert torch.equal(before, after.detach())
    after.sum().backward()
    with_gradient = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in adapted.named_parameters() if ".lora_" in n}
    assert len(layers_of(adapted.lm)) == 2
    with pytest.raises(ValueError, match=r"lora_targets \['qkv'\] cannot be used.*k_proj"):
        add_lora(tiny("llama"), rank=4, alpha=8, targets=["qkv"], seed=0)
    with pytest.raises(ValueError, match="lm_head"):
        add_lora(tiny("qwen2"), rank=4, alpha=8, targets=["lm_head"], seed=0)


def test_bf16_on_a_cpu_that_emulates_it_is_said(monkeypatch, caplog):
    known = {"avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, instruction, lines in (("fp32", "", 0), ("bf16", "", 1), ("bf16", "amx_bf16", 0)):
        compute_dtype.cache_clear()
        caplog.clear()
        known[instruction] = True
        assert compute_dtype(name) is compute_dtype(name) is {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        assert caplog.messages == ["this CPU emulates bf16, 8 to 27 times slower: use --dtype fp32"] * lines
    compute_dtype.cache_clear()


def test_fingerprint_names_content():
    lm = tiny("llama")
    name = fingerprint(lm)
    assert name == fingerprint(tiny("llama"))
    lm.config._name_or_path = "/elsewhere"
    assert name == fingerprint(lm)
    lm.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-6
    assert name != fingerprint(lm)
    other = tiny("llama")
    other.config.rms_norm_eps = 1e-3
    assert name != fingerprint(other)
