"""The estimate against hand counts, sharded meta tensors, counted FLOPs and what autograd really keeps."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from helpers import ROOT
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hps import attention, config, dist, model
from hps.lab import estimate
from hps.options import Config
from hps.packing import Block, Packed, pack

SMALL = estimate.Shape(96, 64, 112, 3, 4, 2)
LORA = "q_proj,v_proj"


def options(**changes) -> estimate.Options:
    return dataclasses.replace(estimate.Options(), **changes)


def policy(s: estimate.Shape, *, rank: int, targets: str, dtype=torch.float32, ckpt: bool = False) -> model.PolicyModel:
    """The model of train.py: as it computes, adapters in the compute dtype as FSDP casts them."""
    lm = LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(s))).eval()
    lm = model.add_lora(lm, rank=rank, alpha=16, targets=targets.split(","), seed=0) if rank else lm
    if ckpt:
        model.checkpoint_layers(lm)
    return model.PolicyModel(lm.to(dtype))


def batch(*spans: tuple[int, tuple[int, ...]], share_prompt: bool) -> Packed:
    """Prompts and responses of these lengths."""
    draw = np.random.default_rng(0)
    blocks = [Block(draw.integers(0, 96, P), tuple(draw.integers(0, 96, y) for y in ys)) for P, ys in spans]
    return pack(blocks, pad_id=0, share_prompt=share_prompt)


def test_parameters_of_llama_3_8b_by_hand():
    """A layer: q, o 2 * 4096^2, k, v 2 * 4096 * 1024, MLP 3 * 4096 * 14336, norms 2 * 4096 = 218,112,000. 32 of them,
    2 * 128256 * 4096 and a norm make 8,030,261,248. LoRA: (8 * 8192 + 8 * 5120) * 32 = 3,407,872."""
    assert 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096 == 218_112_000
    base, lora = estimate.parameter_shapes(estimate.Shape(), rank=8, targets=LORA.split(","))
    assert estimate.elements(base) == 32 * 218_112_000 + 2 * 128_256 * 4096 + 4096 == 8_030_261_248
    assert estimate.elements(lora) == (8 * (4096 + 4096) + 8 * (4096 + 1024)) * 32 == 3_407_872


@pytest.mark.parametrize("world_size", [4, 64])
@pytest.mark.parametrize("rank", [8, 0])
def test_bytes_of_rank_0_are_those_of_meta_shards(world_size, rank):
    """Llama-3-8B on the meta device, sharded by hps.dist.shard; gradients and moments are AdamW's own tensors."""
    c = options(world_size=world_size, lora_rank=rank, dtype="bf16")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with torch.device("meta"):
            lm = LlamaForCausalLM(LlamaConfig(**dataclasses.asdict(estimate.Shape())))
            if rank:  # as train.py: a frozen bf16 base and fp32 adapters; full training is fp32
                lm = model.add_lora(lm.to(torch.bfloat16), rank=rank, alpha=16, targets=LORA.split(","), seed=0)
        whole = model.PolicyModel(lm)
        ranks = dist.Ranks(rank=0, world_size=world_size, device=torch.device("cpu"), sharded=True)
        dist.shard(whole, whole.layers, ranks=ranks, dtype=torch.bfloat16)
        trained = [p for p in whole.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(trained)
        optimizer.step()
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]

        def held(tensors) -> int:
            return sum(t.to_local().numel() * t.element_size() for t in tensors)

        found = {"weights": held(whole.parameters()), "gradients": held(p.grad for p in trained)}
        found["optimizer"] = held(moments)
    finally:
        distributed.destroy_process_group()
    assert estimate.sharded_bytes(estimate.Shape(), c) == found


def attended(query, key, value, dropout=0.0, causal=False, **_) -> int:
    """FLOPs of one call of the CPU's flash kernel by the shapes that it got: two products over the pairs."""
    batch, heads, length, size = query
    pairs = sum(range(1, length + 1)) if causal else length * key[2]
    return batch * heads * pairs * 2 * (size + size)


def attended_backward(grad, query, key, value, out, lse, dropout=0.0, causal=False, **_) -> int:
    return 2 * attended(query, key, value, dropout, causal)


FLASH = {attention._forward: attended, attention._backward: attended_backward}


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("ckpt", [True, False])
@pytest.mark.parametrize(("rank", "targets"), [(3, LORA), (3, "k_proj,down_proj"), (0, LORA)])
def test_flops_are_the_counted_ones(monkeypatch, share_prompt, ckpt, rank, targets):
    """Exactly, forward and backward of 2 prompts of 7 tokens with 3 responses of 5; what the kernels are called with
    is what is counted of attention, so a call between prompts or siblings would show."""
    monkeypatch.setattr(attention, "_layout", lambda packed, heads: attention._blockwise(packed))
    packed = batch((7, (5, 5, 5)), (7, (5, 5, 5)), share_prompt=share_prompt)
    c = options(lora_rank=rank, lora_targets=targets, gradient_checkpointing=ckpt)
    one = dataclasses.replace(c, prompt_tokens=7, response_tokens=5, responses=3)
    sizes = {key: 2 * n for key, n in estimate.visit(one, shared=share_prompt).items()}
    assert (sizes["N"], sizes["T"]) == (packed.input_ids.numel(), len(packed.targets))
    lm = policy(SMALL, rank=rank, targets=targets, ckpt=ckpt)
    with FlopCounterMode(display=False, custom_mapping=FLASH) as both:
        lm(packed).sum().backward()
    with FlopCounterMode(display=False, custom_mapping=FLASH) as forward, torch.no_grad():
        lm(packed)
    assert estimate.training_flops(SMALL, c, **sizes) == both.get_total_flops()
    assert estimate.forward_flops(SMALL, c, **sizes) == forward.get_total_flops()


def test_pairs_of_attention_are_those_of_the_dense_mask():
    """P = 7, Y = 5, K = 3 and 1."""
    for K in (3, 1):
        packed = batch((7, (5,) * K), share_prompt=True)
        mask = attention.block_mask(packed)
        assert mask is not None
        found = {"N": packed.input_ids.numel(), "T": len(packed.targets), "A": int(mask.sum())}
        assert estimate.counts(7, 5, K) == found


def kept(s: estimate.Shape, packed: Packed, *, rank: int, targets: str, dtype, ckpt: bool) -> int:
    """Bytes that autograd keeps from a forward, each storage once, parameters apart."""
    lm = policy(s, rank=rank, targets=targets, dtype=dtype, ckpt=ckpt)
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    found, alive = {}, []

    def keep(t: torch.Tensor) -> torch.Tensor:
        alive.append(t)  # else its address could be another's
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lm(packed)
    return sum(size for at, size in found.items() if at not in own)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("rank", "targets"), [(3, LORA), (3, "gate_proj,q_proj,down_proj,o_proj"), (0, LORA)])
def test_a_layer_keeps_what_autograd_keeps(share_prompt, dtype, rank, targets):
    """Exactly: the difference of models with 3 and with 2 layers, which takes the first layer's exceptions out. Shared
    prompts of ragged lengths, which hps.attention serves blockwise; repeated ones of one length, without pads."""
    spans = ((120, (40, 8)), (8, (6, 30))) if share_prompt else ((12, (9, 9)),)
    packed = batch(*spans, share_prompt=share_prompt)
    if share_prompt:
        assert not attention.padding_pays(packed, SMALL.num_attention_heads)
    c = options(lora_rank=rank, lora_targets=targets, dtype=dtype, share_prompt=share_prompt)
    how = dict(rank=rank, targets=targets, dtype=model.DTYPES[dtype], ckpt=False)
    less = dataclasses.replace(SMALL, num_hidden_layers=2)
    measured = kept(SMALL, packed, **how) - kept(less, packed, **how)
    assert estimate.layer_bytes(SMALL, c, N=packed.input_ids.numel()) == measured


def test_bytes_of_a_micro_batch_by_hand():
    """P = 100, two responses of 60: 2200 tokens hold 10 blocks of 220, which as plain rows are 10 * 320. Beside its
    layers a model keeps the last norm's input in fp32 with 1 / rms, and the states of 10 * 120 scored tokens. Of
    Llama-3's vocabulary the logits of 2^25 // 128256 = 261 tokens are alive, in bf16 those of 1024."""
    c = options(prompt_tokens=100, response_tokens=60, tokens_per_micro_batch=2200, dtype="bf16")
    layer = estimate.layer_bytes(SMALL, c, N=2200)
    rest = 2200 * (4 * 64 + 4) + 1200 * 64 * 2
    found = {"kept": 3 * layer + rest, "checkpointed": 3 * 2200 * 64 * 2 + layer + rest, "head_chunk": 1024 * 96 * 2}
    assert estimate.activation_bytes(SMALL, c) == found
    apart = estimate.activation_bytes(SMALL, dataclasses.replace(c, share_prompt=False))
    assert apart["kept"] == 3 * estimate.layer_bytes(SMALL, c, N=3200) + rest + 1000 * (4 * 64 + 4)
    whole = estimate.activation_bytes(estimate.Shape(), dataclasses.replace(c, dtype="fp32"))
    assert whole["head_chunk"] == 261 * 128_256 * 4


def test_the_kernels_chunk_is_theirs():
    pytest.importorskip("triton", reason="Triton is for Linux only")
    from hps import kernels

    assert estimate.KERNEL_CHUNK == kernels.CHUNK


def test_tokens_by_hand():
    """P = 100, two responses of 60, 10 prompts, 2 epochs: 220 tokens a visit shared, 320 apart. HPS meets 3 responses
    a prompt: micro-batches of 256 hold (256 - 100) // 60 = 2, so 220 + 160 tokens shared and 3 * 160 apart. BT meets 2.
    Where all three fit into a micro-batch they take 280."""
    c = options(prompts=10, prompt_tokens=100, response_tokens=60, tokens_per_micro_batch=256)
    ways = [estimate.run_work(SMALL, c, shared=s, cached=r) for s in (True, False) for r in (True, False)]
    assert [way["tokens"] for way in ways] == [4400, 4400, 6400, 6400]
    assert [way["reference_tokens"] for way in ways] == [3800, 4400, 4800, 6400]
    bt = estimate.run_work(SMALL, dataclasses.replace(c, method="dpo-bt"), shared=True, cached=True)
    assert bt["reference_tokens"] == 2200
    roomy = estimate.run_work(SMALL, dataclasses.replace(c, tokens_per_micro_batch=280), shared=True, cached=True)
    assert roomy["reference_tokens"] == 2800


def test_hours_by_hand():
    """hours * 3600 s * ranks * peak * share = FLOPs; without the cache a forward stands beside every visit."""
    c = options(prompts=10, prompt_tokens=100, response_tokens=60, world_size=5, tflops=2.0, mfu=0.25)
    way = estimate.run_work(SMALL, c, shared=True, cached=False)
    sizes = dict(N=220, T=120, A=5050 + 2 * (60 * 100 + 1830))
    flops = 20 * (estimate.training_flops(SMALL, c, **sizes) + estimate.forward_flops(SMALL, c, **sizes))
    assert way["flops"] == flops
    assert way["hours"] * 3600 * 5 * 2e12 * 0.25 == pytest.approx(flops)


def test_options_of_train_have_its_defaults():
    theirs = {f.name: f.default for f in dataclasses.fields(Config)}
    shared = [f for f in dataclasses.fields(estimate.Options) if f.name in theirs]
    assert len(shared) == 9 and all(f.default == theirs[f.name] for f in shared)


def test_reads_the_preset_and_a_config_json(tmp_path):
    argv = ["--config", str(ROOT / "configs/llama3-8b.toml"), "--world_size", "8"]
    c, _ = config.parse(estimate.Options, argv, prog="plan", description="", foreign=True)
    assert (c.dtype, c.gradient_checkpointing, c.lora_rank, c.world_size) == ("bf16", True, 8, 8)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LlamaConfig(**dataclasses.asdict(SMALL)).to_dict()))
    assert estimate.read_shape(str(path)) == SMALL
    path.write_text(json.dumps(LlamaConfig(**dataclasses.asdict(SMALL), head_dim=8).to_dict()))
    with pytest.raises(ValueError, match="head_dim"):
        estimate.read_shape(str(path))
