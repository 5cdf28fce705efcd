"""The estimate against hand counts, sharded tensors, FLOPs counted and bytes kept by the model of train.py."""

import dataclasses

import numpy as np
import pytest
import torch
from helpers import ROOT
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from hps import adapters, attention_cpu, config, dist, model, sharding
from hps.lab import estimate
from hps.options import Config
from hps.packing import Block, Packed, pack

LORA = "q_proj,v_proj"
SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2)  # fmt: skip
MODELS = {"llama": LlamaConfig(**SIZES), "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True)}
# Model, LoRA rank and its targets, shared prompts, checkpointing (of the FLOPs) or bf16 (of the bytes).
CASES = [
    ("llama", 3, LORA, True, True),
    ("llama", 0, LORA, False, False),
    ("qwen2", 3, "k_proj,o_proj,down_proj", False, True),
    ("qwen2", 0, LORA, True, False),
    ("qwen2", 0, LORA, True, True),
]


@pytest.fixture
def shape(tmp_path):
    """Folder of a config.json by the name of the model."""
    for name, about in MODELS.items():
        about.save_pretrained(tmp_path / name)
    return lambda name: str(tmp_path / name)


def options(**changes) -> estimate.Options:
    return dataclasses.replace(estimate.Options(), **changes)


def policy(name: str, c: estimate.Options) -> model.PolicyModel:
    """The model of train.py on the CPU, adapters in the compute dtype as FSDP casts them."""
    lm = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    targets = c.lora_targets.split(",")
    lm = adapters.add_lora(lm, rank=c.lora_rank, alpha=16, targets=targets, seed=0) if c.lora_rank else lm
    if c.gradient_checkpointing:
        model.checkpoint_layers(lm)
    return model.PolicyModel(lm.to(model.DTYPES[c.dtype]))


def batch(share_prompt: bool) -> Packed:
    """Two prompts of 7 tokens with 3 responses of 5."""
    draw = np.random.default_rng(0)
    blocks = [Block(draw.integers(0, 96, 7), tuple(draw.integers(0, 96, 5) for _ in range(3))) for _ in range(2)]
    return pack(blocks, pad_id=0, share_prompt=share_prompt)


def test_parameters_of_llama_3_8b_by_hand():
    """A layer: q, o 2 * 4096^2, k, v 2 * 4096 * 1024, MLP 3 * 4096 * 14336, norms 2 * 4096 = 218,112,000. 32 of them,
    2 * 128256 * 4096 and a norm make 8,030,261,248. LoRA: (8 * 8192 + 8 * 5120) * 32 = 3,407,872."""
    lm = estimate.build(options())
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert trained == (8 * (4096 + 4096) + 8 * (4096 + 1024)) * 32 == 3_407_872
    assert sum(p.numel() for p in lm.parameters()) - trained == 32 * 218_112_000 + 2 * 128_256 * 4096 + 4096


@pytest.mark.parametrize(("world_size", "rank"), [(4, 8), (64, 0)])
def test_bytes_of_rank_0_are_those_of_meta_shards(world_size, rank):
    """Llama-3-8B on the meta device, sharded by hps.sharding.shard; gradients and moments are AdamW's own tensors."""
    c = options(world_size=world_size, lora_rank=rank, dtype="bf16")
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(LlamaConfig(**estimate.LLAMA_3_8B))
            if rank:  # as train.py: a frozen bf16 base and fp32 adapters; full training is fp32
                lm = adapters.add_lora(lm.to(torch.bfloat16), rank=rank, alpha=16, targets=LORA.split(","), seed=0)
        whole = model.PolicyModel(lm)
        ranks = dist.Ranks(rank=0, world_size=world_size, device=torch.device("cpu"), sharded=True)
        all_of_it = Config("m", "d", "o", shard_frozen="true")
        sharding.shard(whole, model.layers_of(whole.lm), all_of_it, ranks=ranks, dtype=torch.bfloat16)
        trained = [p for p in whole.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer = torch.optim.AdamW(trained)
        optimizer.step()
        moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]

        def held(tensors) -> int:
            return sum(t.to_local().numel() * t.element_size() for t in tensors)

        expected = {"weights": held(whole.parameters()), "gradients": held(p.grad for p in trained)}
        expected["optimizer"] = held(moments)
    finally:
        distributed.destroy_process_group()
    assert expected.items() <= estimate.memory(c, estimate.build(c), kept=0).items()


def attended(query, key, value, dropout=0.0, causal=False, **_) -> int:
    """FLOPs of one call of the CPU's flash kernel by the shapes that it got: two products over the pairs."""
    rows, heads, length, size = query
    pairs = sum(range(1, length + 1)) if causal else length * key[2]
    return rows * heads * pairs * 2 * (size + size)


def attended_backward(grad, query, key, value, out, lse, dropout=0.0, causal=False, **_) -> int:
    return 2 * attended(query, key, value, dropout, causal)


FLASH = {attention_cpu._forward: attended, attention_cpu._backward: attended_backward}


@pytest.mark.parametrize(("name", "rank", "targets", "share_prompt", "checkpointing"), CASES)
def test_flops_are_the_counted_ones(monkeypatch, shape, name, rank, targets, share_prompt, checkpointing):
    """Forward, and forward with backward, exactly; what the kernels are called with is what is counted of attention."""
    monkeypatch.setattr(attention_cpu, "layout", lambda packed, heads: attention_cpu.blockwise(packed))
    c = options(lora_rank=rank, lora_targets=targets, gradient_checkpointing=checkpointing, share_prompt=share_prompt)
    c = dataclasses.replace(c, shape=shape(name), prompts=2, epochs=1, prompt_tokens=7, response_tokens=5, responses=3)
    work = estimate.estimate(c)["work"]  # one epoch: the reference scores what is trained on
    packed, lm = batch(share_prompt), policy(name, c)
    assert work["tokens"] == work["reference_tokens"] == packed.input_ids.numel()
    with FlopCounterMode(display=False, custom_mapping=FLASH) as both:
        lm(packed).sum().backward()
    with FlopCounterMode(display=False, custom_mapping=FLASH) as forward, torch.no_grad():
        lm(packed)
    assert work["FLOPs"] == both.get_total_flops() + forward.get_total_flops()


@pytest.mark.parametrize(("name", "rank", "targets", "share_prompt", "bf16"), CASES)
def test_a_decoder_keeps_what_autograd_keeps(monkeypatch, shape, name, rank, targets, share_prompt, bf16):
    """Of the bytes that autograd keeps of the model of train.py, each storage once, parameters and small change apart:
    cosines and masks, of which a large model's are nothing beside its states."""
    monkeypatch.setattr(attention_cpu, "layout", lambda packed, heads: attention_cpu.blockwise(packed))
    c = options(shape=shape(name), lora_rank=rank, lora_targets=targets, dtype="bf16" if bf16 else "fp32")
    packed, lm = batch(share_prompt), policy(name, c)
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        lm.hidden(packed)
    measured = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    found = estimate.run(estimate.build(c), packed.input_ids.numel())["kept"]
    assert found == pytest.approx(measured, rel=0.02)


def test_checkpointing_keeps_inputs_and_one_layer(shape):
    """96 tokens of 3 layers of width 64 in bf16: two layers less all but their inputs."""
    c = options(shape=shape("llama"), dtype="bf16", prompt_tokens=48, response_tokens=24, tokens_per_micro_batch=96)
    whole, less = (
        estimate.estimate(dataclasses.replace(c, gradient_checkpointing=ckpt))["bytes_per_rank"]["activations"]
        for ckpt in (False, True)
    )
    layer = (whole - less) / 2  # without its input
    assert 0.25 < less / whole < 0.5 and layer > 10 * 96 * 64 * 2


def test_bytes_of_a_micro_batch_by_hand(shape):
    """P = 100, two responses of 60: 2200 tokens hold 10 blocks of 220, which as plain rows are 10 * 320. 10 * 120
    scored tokens; of Llama-3's vocabulary the logits of 2^25 // 128256 = 261 tokens are alive, in bf16 those of
    1024. All weights of the tiny model's root, 2 * 96 * 64 + 64, and of two layers are whole."""
    c = options(prompt_tokens=100, response_tokens=60, tokens_per_micro_batch=2200, dtype="bf16", lora_rank=0)
    assert estimate.micro_batch(c) == (2200, 1200)
    assert estimate.micro_batch(dataclasses.replace(c, share_prompt=False)) == (3200, 1200)
    small = dataclasses.replace(c, shape=shape("llama"))
    found = estimate.memory(small, estimate.build(small), kept=5)
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 112 + 2 * 64
    assert found["gathered"] == 2 * (2 * 96 * 64 + 64 + 2 * layer)
    assert found["activations"] == 5 + 1200 * 64 * 2
    assert found["head"] == 1024 * 96 * 2 + (4 + 2) * 96 * 64
    large = dataclasses.replace(c, dtype="fp32", lora_rank=8)
    assert estimate.memory(large, estimate.build(large), kept=0)["head"] == 261 * 128_256 * 4


def test_tokens_and_hours_by_hand(shape):
    """P = 100, two responses of 60, 10 prompts, 2 epochs: 220 tokens a visit shared, 320 apart. HPS meets 3 responses
    of a prompt: micro-batches of 256 hold (256 - 100) // 60 = 2, so 220 + 160 tokens shared and 3 * 160 apart. BT meets
    2. Where all three fit into a micro-batch they take 280. Hours * 3600 s * ranks * peak * share are FLOPs."""
    c = options(shape=shape("llama"), prompts=10, prompt_tokens=100, response_tokens=60, tokens_per_micro_batch=256)
    c = dataclasses.replace(c, world_size=5, tflops=2.0, mfu=0.25)
    for changes, tokens, reference_tokens in (
        ({}, 4400, 3800),
        (dict(share_prompt=False), 6400, 4800),
        (dict(method="dpo-bt"), 4400, 2200),
        (dict(tokens_per_micro_batch=280), 4400, 2800),
    ):
        work = estimate.estimate(dataclasses.replace(c, **changes))["work"]
        assert (work["tokens"], work["reference_tokens"]) == (tokens, reference_tokens)
        assert work["hours"] * 3600 * 5 * 2e12 * 0.25 == pytest.approx(work["FLOPs"])


def test_options_are_those_of_train_and_its_presets():
    theirs = {f.name: f.default for f in dataclasses.fields(Config)}
    shared = [f for f in dataclasses.fields(estimate.Options) if f.name in theirs]
    assert len(shared) == 9 and all(f.default == theirs[f.name] for f in shared)
    argv = ["--config", str(ROOT / "configs/llama3-8b.toml"), "--world_size", "8"]
    c, _ = config.parse(estimate.Options, argv, prog="", description="", foreign=True)
    assert (c.dtype, c.gradient_checkpointing, c.lora_rank, c.world_size) == ("bf16", True, 8, 8)


def test_mistakes_and_too_small_gpus_are_told(shape, tmp_path):
    for changes, message in (
        (dict(shape=str(tmp_path / "none")), "--shape .*none"),
        (dict(shape=shape("llama"), lora_targets="c_attn"), "c_attn"),
        (dict(responses=1), "responses must be at least 2"),
        (dict(mfu=1.5), "mfu"),
        (dict(dtype="fp16"), "fp16"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate.estimate(options(**changes))
    fits = [estimate.estimate(options(shape=shape("llama"), gpu_gib=gib))["fits"] for gib in (1e-6, 1.0)]
    assert fits == [False, True]
