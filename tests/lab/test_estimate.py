"""The estimate against hand counts, and against what torch's allocator gave out in real steps of train.py's model."""

import dataclasses
import json
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import ROOT, on_ranks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from hps import attention_cpu, config, dist, start
from hps.lab import estimate
from hps.options import Config
from hps.packing import Block, pack

SIZES = dict(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)  # fmt: skip
EXPERTS = dict(head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
MODELS = {"llama": LlamaConfig(**SIZES), "moe": Qwen3MoeConfig(**SIZES, **EXPERTS, tie_word_embeddings=True)}
P, Y, K, BLOCKS = 160, 120, 3, 3  # tokens of a prompt, of a response, responses, blocks of a micro-batch
LENGTHS = dict(prompt_tokens=P, response_tokens=Y, responses=K, tokens_per_micro_batch=BLOCKS * (P + K * Y))
# Model, ranks, micro-batches of a step, options of train.py.
STEPS = {
    "LoRA": ("llama", 1, 2, {}),
    "all, checkpointed": ("llama", 1, 1, dict(lora_rank=0, gradient_checkpointing=True)),
    "plain rows": ("llama", 1, 1, dict(share_prompt=False, dtype="bf16", tokens_per_micro_batch=BLOCKS * K * (P + Y))),
    "experts": ("moe", 1, 2, dict(dtype="bf16", lora_targets="q_proj,o_proj")),
    "LoRA, whole on each rank": ("llama", 2, 1, dict(shard_frozen="false")),
    "all, sharded": ("llama", 2, 2, dict(lora_rank=0, dtype="bf16")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random models by name."""
    folder = tmp_path_factory.mktemp("models")
    for name, about in MODELS.items():
        AutoModelForCausalLM.from_config(about).save_pretrained(folder / name)
    return folder


options = partial(estimate.Options, device="cpu")


def real_steps(folder: Path, name: str, passes: int, changes: dict, out: Path) -> None:
    """Two steps of the model that train.py loads; the most bytes that were alive in the second, in a file of rank 0."""
    ranks = dist.init(timeout=timedelta(minutes=2))
    c = Config(str(folder / name), "", "", **changes)
    policy, *_ = start.load_policy(c, ranks, None, longest=P + Y)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = start.make_optimizer(c, trained)
    draw = np.random.default_rng(0)
    blocks = [Block(draw.integers(0, 96, P), tuple(draw.integers(0, 96, Y) for _ in range(K))) for _ in range(BLOCKS)]

    def step() -> None:
        for _ in range(passes):
            policy(pack(blocks, pad_id=0, share_prompt=c.share_prompt)).sum().backward()
        dist.clip_gradients(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with mock.patch.object(attention_cpu, "padding_pays", lambda *_: False):
        step()
        moments = [m for state in optimizer.state.values() for m in state.values()]
        tensors = (getattr(t, "_local_tensor", t) for t in (*policy.parameters(), *policy.buffers(), *moments))
        held = {t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    more = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max()
    if ranks.first:
        out.write_text(json.dumps(sum(held.values()) + int(more)))


@pytest.mark.parametrize("case", STEPS)
def test_memory_is_what_the_allocator_gave_out(folder, tmp_path, case):
    name, ranks, passes, changes = STEPS[case]
    what = (folder, name, passes, changes, tmp_path / "bytes")
    on_ranks(ranks, real_steps, what) if ranks > 1 else real_steps(*what)
    sizes = dict(world_size=ranks, prompts_per_step=BLOCKS * passes * ranks) | LENGTHS | changes
    found = estimate.step(options(shape=str(folder / name), **sizes))["bytes_per_rank"]
    assert found["total"] == sum(size for part, size in found.items() if part != "total")
    assert found["total"] == pytest.approx(json.loads((tmp_path / "bytes").read_text()), rel=0.03)


def test_parameters_of_llama_3_8b_by_hand():
    """A layer: q, o 2 * 4096^2, k, v 2 * 4096 * 1024, MLP 3 * 4096 * 14336, norms 2 * 4096 = 218,112,000. 32 of them,
    2 * 128256 * 4096 and a norm make 8,030,261,248. LoRA: (8 * 8192 + 8 * 5120) * 32 = 3,407,872."""
    c = options(world_size=1)
    with estimate.unrun(c) as ranks:
        policy = estimate.build(c, ranks, FakeTensorMode(allow_non_fake_inputs=True))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert trained == (8 * (4096 + 4096) + 8 * (4096 + 1024)) * 32 == 3_407_872
    assert sum(p.numel() for p in policy.parameters()) - trained == 32 * 218_112_000 + 2 * 128_256 * 4096 + 4096


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_tokens_and_hours_by_hand(folder, checkpointing):
    """P = 100, two responses of 60, 10 prompts, 2 epochs: 220 tokens a visit. HPS meets 3 responses of a prompt, of
    which micro-batches of 256 tokens hold (256 - 100) // 60 = 2, so 220 + 160 tokens are scored. All weights train:
    each product has two more in the backward, the head's too, of one chunk; checkpointed layers are made again."""
    how = dict(lora_rank=0, gradient_checkpointing=checkpointing, world_size=5, prompts=10, tflops=2.0, mfu=0.25)
    how |= dict(prompt_tokens=100, response_tokens=60, tokens_per_micro_batch=256)
    work = estimate.estimate(options(shape=str(folder / "llama"), **how))["work"]
    assert (work["tokens"], work["reference_tokens"]) == (20 * 220, 10 * (220 + 160))

    def parts(responses: int) -> tuple[int, int, int]:
        """Forward FLOPs of layers' products, of attention and of the head."""
        pairs = 100 * 101 // 2 + responses * (100 * 60 + 60 * 61 // 2)
        layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 112
        return 2 * 2 * layer * (100 + responses * 60), 2 * 4 * 64 * pairs, 2 * 64 * 96 * responses * 60

    linear, attention, head = parts(2)
    down = 2 * 2 * 64 * 112 * 220  # a layer's last product: nothing behind it is kept, so it is not made again
    again = linear - down + attention if checkpointing else 0
    visit = 3 * (linear + attention + head) + again
    assert work["FLOPs"] == 20 * visit + 10 * (sum(parts(2)) + sum(parts(1)))
    assert work["hours"] * 3600 * 5 * 2e12 * 0.25 == pytest.approx(work["FLOPs"])


def test_blocks_that_the_reference_scores():
    sizes = dict(prompt_tokens=100, response_tokens=60, tokens_per_micro_batch=280)
    for changes, lengths in (({}, [280]), (dict(method="dpo-bt"), [220]), (dict(share_prompt=False), [160] * 3)):
        assert [len(piece) for piece in estimate.scored_once(options(**sizes, **changes))] == lengths


def test_what_does_not_fit_is_told_with_a_remedy(folder):
    """In order: that a tiny base is sharded helps too little, recomputed layers are enough."""
    c = options(shape=str(folder / "llama"), world_size=2, prompts_per_step=BLOCKS * 2, **LENGTHS)
    whole = estimate.step(c)
    small = dataclasses.replace(c, gpu_gib=0.8 * whole["bytes_per_rank"]["total"] / 2**30)
    told = estimate.remedy(small, whole | {"fits": False})
    given = "--shard_frozen true --gradient_checkpointing true"
    assert whole["fits"] and f"{given} make it" in told and "not" not in told[9:]
    tiny = dataclasses.replace(c, gpu_gib=1e-6, lora_rank=0, tokens_per_micro_batch=900)
    told = estimate.remedy(tiny, estimate.step(tiny))
    given = "--gradient_checkpointing true --tokens_per_micro_batch 112 --lora_rank 8"
    assert f"{given} make it" in told and "which is not enough" in told


def test_options_are_those_of_train_and_its_presets():
    theirs = {f.name: f.default for f in dataclasses.fields(Config)}
    shared = [f for f in dataclasses.fields(estimate.Options) if f.name in theirs]
    assert len(shared) == 12 and all(f.default == theirs[f.name] for f in shared)
    argv = ["--config", str(ROOT / "configs/llama3-8b.toml"), "--world_size", "8"]
    c, _ = config.parse(estimate.Options, argv, prog="", description="", foreign=True)
    assert (c.dtype, c.gradient_checkpointing, c.lora_rank, c.world_size) == ("bf16", False, 8, 8)


def test_mistakes_are_told(folder, tmp_path):
    for changes, message in (
        (dict(shape="none/of/these"), "shape .*none"),
        (dict(shape=str(folder / "llama"), lora_targets="c_attn"), "c_attn"),
        (dict(responses=1), "responses must be at least 2"),
        (dict(mfu=1.5), "mfu"),
        (dict(dtype="fp16"), "fp16"),
        (dict(prompts=0), "prompts must be positive"),
        (dict(method="hps-dpo"), "'hps-dpo' does not exist. A method is LOSS-SAMPLER"),
        (dict(shape="configs/shapes/llama-3"), "no such folder; configs/shapes has llama-3-70b, llama-3-8b, qwen3"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate.estimate(options(**changes))
