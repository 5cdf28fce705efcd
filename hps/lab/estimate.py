"""What a run with these options of train.py takes on so many GPUs: memory per rank, tokens, FLOPs and hours, unrun.

    python -m hps.lab.estimate --config configs/llama3-8b.toml --world_size 4 --gpu_gib 48

One step of train.py on tensors without content: the model of a config.json, adapters, sharding over ranks that send
nothing, packing, forward, backward and optimizer are those of the run; torch's trackers say what is alive and count
products. Premises: all prompts are of one length, and all responses; attention keeps what flash kernels keep; the head
is the chunked one. Not in it: gaps between tensors, and what CUDA and NCCL take for themselves (some GiB).
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from hps import adapters, attention_cpu, config, dist, loading, logps, model, pretrained, sharding
from hps.methods import check_method
from hps.options import Config
from hps.packing import Block, micro_batches, pack, pieces


@dataclass
class Options:
    # -- of train.py: same names, same defaults, and from the same file --
    method: str = "dpo-hps"  # decides how many responses of a prompt the reference scores over the run
    epochs: int = 2  # passes over the prompts
    prompts_per_step: int = 64  # prompts of one optimizer step over all ranks
    lora_rank: int = 8  # 0 trains all weights
    lora_targets: str = "q_proj,v_proj"  # linear layers that get an adapter, comma-separated
    dtype: str = "fp32"  # compute dtype, fp32 or bf16
    gradient_checkpointing: bool = False  # recompute activations in the backward
    share_prompt: bool = True  # compute a prompt once for all its responses
    shard_frozen: str = "auto"  # the weights below a LoRA adapter: true, false, auto (where they exceed half a GPU)
    shard_ranks: int = 0  # shard over groups of so many ranks; 0: all
    reshard_after_forward: bool = True  # false keeps gathered layers until the backward
    tokens_per_micro_batch: int = 4096  # packed tokens of one forward
    # -- of the run --
    shape: str = "configs/shapes/llama-3-8b"  # folder or hub name of a model, whose config.json alone is read
    world_size: int = 4  # ranks
    prompts: int = 40_000  # prompts of the data (the lengths and this are examples: measure your own)
    prompt_tokens: int = 200  # mean length of a prompt with its template
    response_tokens: int = 200  # mean length of a response
    responses: int = 2  # of a visit: 2 for BT and HPS, the ranks for PL
    # -- of the device --
    device: str = "cuda"  # cuda, or cpu: decides how many logits are alive at once
    gpu_gib: float = 48.0  # memory of one GPU (L40S), GiB
    tflops: float = 362.0  # peak, 1e12 FLOPs a second (L40S, dense bf16 by its data sheet)
    mfu: float = 0.4  # share of the peak that is reached, on the FLOPs of the table, recomputed ones counted


# What is alive, by torch's words for it. What was there before the step, weights apart, are gradients.
PARTS = {"gradients": "Other", "optimizer": "Optstate", "forward": "Activation", "backward": "Temp"}


def flash(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **_: Any) -> int:
    """FLOPs of flash attention by the shapes: two products over the pairs of a query and a key that it may see."""
    rows, heads, length, width = query
    return 4 * rows * heads * width * (length * (length + 1) // 2 if causal else length * key[2])


FLOPS = {  # of kernels that torch's counter does not know
    attention_cpu._forward: flash,
    attention_cpu._backward: lambda _, q, k, v, *rest, **__: 2 * flash(q, k, v, *rest[2:4]),
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],  # experts
}


class Tracker(MemTracker):
    """torch's tracker of tensors and its counter of FLOPs in one, without their tables of modules: the one's may hold
    no frozen parameter, and the other's keeps recomputed tensors alive."""

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = lambda *_: None

    def __init__(self) -> None:
        super().__init__()
        self.counter = FlopCounterMode(display=False, custom_mapping=FLOPS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        count = self.counter._count_flops
        return made if made is NotImplemented else count(func._overloadpacket, made, args, kwargs or {})


@contextmanager
def unrun(c: Options) -> Iterator[dist.Ranks]:
    """Rank 0 of ranks that send nothing, with the choices that the device would make."""
    ranks = dist.Ranks(rank=0, world_size=c.world_size, device=torch.device("cpu"), sharded=c.world_size > 1)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=c.world_size)
    try:
        with (
            mock.patch.object(sharding, "memory", lambda _: int(c.gpu_gib * 2**30)),
            mock.patch.object(dist, "gather", lambda value, _: [value]),
            # Two that look at contents: a layout for CPUs alone, and for texts that follow each other in a plain row.
            mock.patch.object(attention_cpu, "padding_pays", lambda *_: False),
            mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None),
            mock.patch.dict(logps.CHUNK_LOGITS, cpu=logps.CHUNK_LOGITS[c.device]),
        ):
            yield ranks
    finally:
        distributed.destroy_process_group()


def build(c: Options, ranks: dist.Ranks, fake: FakeTensorMode) -> model.PolicyModel:
    """The policy as train.py makes it, without content."""
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype, about = model.DTYPES[c.dtype], AutoConfig.from_pretrained(c.shape, trust_remote_code=False)
    with torch.device("meta"):
        loaded = dtype if c.lora_rank else torch.float32
        lm = AutoModelForCausalLM.from_config(about, dtype=loaded, trust_remote_code=False).eval()
        if c.lora_rank:
            lm = adapters.add_lora(lm, rank=c.lora_rank, alpha=16, targets=c.lora_targets.split(","), seed=0)
    if c.gradient_checkpointing:
        pretrained.checkpoint_layers(lm)
    autocast = dtype if not c.lora_rank and not ranks.sharded and dtype != torch.float32 else None
    policy = model.PolicyModel(lm, autocast=autocast)
    with fake:
        policy.to_empty(device="cpu")
        model.unwrapped(lm).tie_weights()
    if ranks.sharded:
        shared = {key: value for key, value in vars(c).items() if hasattr(Config, key)}
        sharding.shard(policy, model.layers_of(lm), Config("", "", "", **shared), ranks=ranks, dtype=dtype)
    return policy


def block(prompt: int, response: int, responses: int) -> Block:
    return Block(np.zeros(prompt, np.int64), (np.zeros(response, np.int64),) * responses)


def scored_once(c: Options) -> list[Block]:
    """The blocks in which a prompt's responses are scored for the cache, each once: a sampler that draws meets the best
    one and, at most, other opponents in every epoch; BT and PL meet the same ones."""
    drawn = c.epochs if c.method.split("-")[-1] in ("hps", "uniform") else 1
    whole = block(c.prompt_tokens, c.response_tokens, 1 + drawn * (c.responses - 1))
    return pieces(whole, tokens=c.tokens_per_micro_batch, share_prompt=c.share_prompt)


def step(c: Options) -> dict[str, Any]:
    """A step of train.py after its first: bytes of rank 0 by part at the moment when they are most; parameters; FLOPs
    of a visit, and of what the reference scores of a prompt."""
    visit = block(c.prompt_tokens, c.response_tokens, c.responses)
    how = dict(budget=c.tokens_per_micro_batch, share_prompt=c.share_prompt)
    shares = micro_batches([visit] * c.prompts_per_step, world_size=c.world_size, **how)[0]
    most = max(map(len, shares))  # blocks of the largest micro-batch
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with unrun(c) as ranks:
        policy = build(c, ranks, fake)
        trained = [p for p in policy.parameters() if p.requires_grad]
        parameters = {"all": sum(p.numel() for p in policy.parameters()), "trained": sum(p.numel() for p in trained)}
        optimizer, tracker, reference = torch.optim.AdamW(trained, fused=True), Tracker(), Tracker()

        packed = partial(pack, pad_id=0, share_prompt=c.share_prompt)
        with fake:
            for p in trained:  # the step before has made the moments
                p.grad = torch.zeros_like(p)
            optimizer.step()
            if len(shares) == 1:  # else the micro-batches before this one have left their gradients
                optimizer.zero_grad()
            tracker.track_external(*policy.parameters(), *policy.buffers())
            (held,) = tracker.get_tracker_snapshot().values()
            tracker.track_external(*(p.grad for p in trained), optimizer)
            with tracker:
                policy(packed([visit] * most)).sum().backward()
                dist.clip_gradients(trained, 1.0)
                optimizer.step()
            with torch.no_grad(), reference:
                for piece in scored_once(c):
                    policy(packed([piece]))
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    by = {"weights": held["Total"]} | {name: peak[kind] for name, kind in PARTS.items()} | {"total": peak["Total"]}
    by["gradients"] -= held["Total"]
    flops = {"visit": tracker.counter.get_total_flops() / most, "reference": reference.counter.get_total_flops()}
    return {"parameters": parameters, "bytes_per_rank": by, "fits": by["total"] < c.gpu_gib * 2**30} | flops


def estimate(c: Options) -> dict[str, Any]:
    """All of it; ValueError for an option out of range."""
    check_method(c.method)
    if "/" in c.shape and not Path(c.shape).is_dir() and (parent := Path(c.shape).parent).is_dir():
        there = ", ".join(sorted(path.name for path in parent.iterdir()))
        raise ValueError(f"shape {c.shape}: no such folder; {parent} has {there}")
    config.check_choices(c, dtype=model.DTYPES, device=logps.CHUNK_LOGITS, shard_frozen=["auto", "true", "false"])
    positive = "epochs prompts_per_step tokens_per_micro_batch world_size prompts prompt_tokens response_tokens"
    if wrong := [key for key in f"{positive} gpu_gib tflops mfu".split() if getattr(c, key) <= 0]:
        raise ValueError(f"{wrong[0]} must be positive, got {getattr(c, wrong[0])}")
    if c.responses < 2 or c.mfu > 1:
        raise ValueError("responses must be at least 2, and mfu at most 1")
    with loading.explain_load_errors("shape", c.shape):  # also of what torch cannot do without content
        found, visits, repeats = step(c), c.prompts * c.epochs, 1 if c.share_prompt else c.responses
    work: dict[str, float] = {"steps": c.epochs * -(-c.prompts // c.prompts_per_step)}
    work["tokens"] = visits * (repeats * c.prompt_tokens + c.responses * c.response_tokens)
    work["reference_tokens"] = c.prompts * sum(map(len, scored_once(c)))
    work["FLOPs"] = visits * found.pop("visit") + c.prompts * found.pop("reference")
    work["hours"] = work["FLOPs"] / (c.world_size * c.tflops * 1e12 * c.mfu) / 3600
    return {"options": vars(c)} | found | {"work": work}


def remedy(c: Options, found: dict[str, Any]) -> str:
    """What does not fit as `found`, and the options that make it fit: one on top of the other, cheapest first."""
    changes: list[dict[str, Any]] = [{"shard_frozen": "true"}] * bool(c.lora_rank and c.world_size > 1)
    changes += [{"gradient_checkpointing": True}]
    changes += [{"tokens_per_micro_batch": max(1, c.tokens_per_micro_batch // n)} for n in (2, 4, 8)]
    changes += [{"lora_rank": 8}] * (not c.lora_rank)
    given: dict[str, Any] = {}
    for change in changes:
        if not found["fits"] and not change.items() <= (vars(c) | given).items():
            given |= change
            found = step(replace(c, **given))
    what = " ".join(f"--{key} {str(value).lower()}" for key, value in given.items()) or "its options"
    told = f"does not fit into {c.gpu_gib:g} GiB: {what} make it {found['bytes_per_rank']['total'] / 2**30:.1f} GiB"
    return told if found["fits"] else f"{told}, which is not enough: it takes more or larger GPUs"


def main() -> None:
    about = str(__doc__).split("\n")[0]
    c, _ = config.parse(Options, prog="python -m hps.lab.estimate", description=about, foreign=True)
    found = estimate(c)
    gib = {key: value / 2**30 for key, value in found["bytes_per_rank"].items()}
    for group, values in {"parameters": found["parameters"], "GiB per rank": gib, "work": found["work"]}.items():
        for key, value in values.items():
            print(f"{group:<15}{key:<26}{value:>16{',' if isinstance(value, int) else '.4g'}}")
    verdict = f"fits into {c.gpu_gib:g} GiB" if found["fits"] else remedy(c, found)
    print(f"the run {verdict}\n{json.dumps(found | {'verdict': verdict})}")


if __name__ == "__main__":
    config.run_main(main)
