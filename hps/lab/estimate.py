"""What a run with these options of train.py takes on so many GPUs: memory per rank, tokens, FLOPs and hours, unrun.

    python -m hps.lab.estimate --config configs/llama3-8b.toml --world_size 4 --gpu_gib 48

Any causal LM of transformers is built on the meta device, without weights, and run there forward and backward: its
parameters, the tensors that autograd keeps and the FLOPs of its products are counted and not derived. Premises: all
parameters are sharded (--shard_frozen true); every prompt has the mean length and every response too; nothing is padded
or idle; attention keeps what flash kernels keep, and works on pairs of a query and a key that it may see. Not in it:
gradients on their way, copies that the allocator holds, what CUDA and NCCL take (some GiB).
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from hps import adapters, config, loading, model
from hps.logps import chunk_for

LLAMA_3_8B = dict(vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=8)  # fmt: skip


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
    tokens_per_micro_batch: int = 4096  # packed tokens of one forward
    # -- of the run --
    shape: str = ""  # folder or hub name of a model, whose config.json alone is read; empty means Llama-3-8B
    world_size: int = 4  # ranks
    prompts: int = 40_000  # prompts of the data (the lengths and this are examples: measure your own)
    prompt_tokens: int = 200  # mean length of a prompt with its template
    response_tokens: int = 200  # mean length of a response
    responses: int = 2  # of a visit: 2 for BT and HPS, the ranks for PL
    # -- of the device --
    gpu_gib: float = 48.0  # memory of one GPU (L40S), GiB
    tflops: float = 362.0  # peak, 1e12 FLOPs a second (L40S, dense bf16 by its data sheet)
    mfu: float = 0.4  # share of the peak that is reached, on the FLOPs of the table, recomputed ones counted


class FlashAttention(torch.autograd.Function):
    """What flash kernels keep of a call: q, k, v, the output, and a log-sum-exp per head and token; no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def build(c: Options) -> nn.Module:
    """The causal LM that trains, on the meta device, in the compute dtype; ValueError where there is no such model."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, LlamaConfig

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **_: Any) -> tuple[Tensor, None]:
        return FlashAttention.apply(q, k, v).transpose(1, 2), None

    AttentionInterface.register("on_meta", attend)
    try:
        about = AutoConfig.from_pretrained(c.shape, trust_remote_code=False) if c.shape else LlamaConfig(**LLAMA_3_8B)
        with torch.device("meta"):
            how = dict(attn_implementation="on_meta", trust_remote_code=False)
            lm = AutoModelForCausalLM.from_config(about, **how).eval()
            if c.lora_rank:
                targets = c.lora_targets.split(",")
                lm = adapters.add_lora(lm, rank=c.lora_rank, alpha=16, targets=targets, seed=0)
    except (OSError, ValueError) as error:
        raise ValueError(f"--shape {c.shape or 'Llama-3-8B'}: {loading.why_not(c.shape, error)}") from error
    return lm.to(model.DTYPES[c.dtype])


def run(lm: nn.Module, N: int) -> dict[str, int]:
    """Forward and backward of the decoder on N tokens: FLOPs of its products, and bytes that autograd keeps."""
    kept: dict[int, Any] = {}  # storages, by identity; alive, or an address could be another's
    own = {p.untyped_storage()._cdata for p in lm.parameters()}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    place = torch.arange(N, device="meta")[None]
    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        states = model.decoder_of(lm)(input_ids=place, position_ids=place, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        states.sum().backward()
    size = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops(), "kept": size}


def counts(P: int, Y: int, K: int, *, shared: bool = True) -> dict[str, int]:
    """N packed tokens, T scored ones and A pairs of attention of [prompt | y_1 | .. | y_K], where a response's tokens
    see the prompt and the past of their own; or of a prompt before each response."""
    if not shared:
        return {key: K * n for key, n in counts(P, Y, 1).items()}

    def causal(m: int) -> int:
        return m * (m + 1) // 2

    return {"N": P + K * Y, "T": K * Y, "A": causal(P) + K * (Y * P + causal(Y))}


def scored_once(c: Options) -> list[dict[str, int]]:
    """The blocks in which a prompt's responses are scored for the cache, each once.

    A sampler that draws opponents meets the best response and, at most, other opponents in every epoch; BT and PL meet
    the same ones. hps.reference scores them in pieces of at most a micro-batch's tokens, each with the whole prompt.
    """
    P, Y = c.prompt_tokens, c.response_tokens
    left = 1 + (c.epochs if c.method.split("-")[-1] in ("hps", "uniform") else 1) * (c.responses - 1)
    most = max(1, (max(c.tokens_per_micro_batch, 2 * P) - P) // Y) if c.share_prompt else 1
    return [counts(P, Y, min(most, left - done)) for done in range(0, left, most)]


def work(c: Options, lm: nn.Module, forward_flops: float, backward_flops: float) -> dict[str, float]:
    """Tokens, FLOPs (all ranks) and hours (by the clock) of the run, the reference's among them. *_flops: of the
    decoder's products, per token."""
    about = model.decoder_of(lm).config.get_text_config()
    D, V, layers = about.hidden_size, about.vocab_size, about.num_hidden_layers
    width = getattr(about, "head_dim", None) or D // about.num_attention_heads
    pair = 4 * about.num_attention_heads * width * layers  # forward; the backward has two products for each of two
    # A frozen head makes its gradient with the logits, or makes these again in its kernels (bf16 on GPUs); one that
    # trains makes them again and has one product more.
    head = 2 * D * V * ((3 if c.dtype == "bf16" else 2) if c.lora_rank else 4)
    passes = 4 if c.gradient_checkpointing else 3  # of attention: checkpointing repeats its forward
    one, once = counts(c.prompt_tokens, c.response_tokens, c.responses, shared=c.share_prompt), scored_once(c)
    visits = c.prompts * c.epochs
    training = one["N"] * (forward_flops + backward_flops) + passes * one["A"] * pair + one["T"] * head
    scoring = sum(row["N"] * forward_flops + row["A"] * pair + row["T"] * 2 * D * V for row in once)
    flops = visits * training + c.prompts * scoring
    hours = flops / (c.world_size * c.tflops * 1e12 * c.mfu) / 3600
    reference_tokens = c.prompts * sum(row["N"] for row in once)
    return {"tokens": visits * one["N"], "reference_tokens": reference_tokens, "FLOPs": flops, "hours": hours}


def micro_batch(c: Options) -> tuple[int, int]:
    """Packed and scored tokens of a full one; the budget counts a prompt once, also where plain rows repeat it."""
    lengths = (c.prompt_tokens, c.response_tokens, c.responses)
    blocks = max(1, min(c.tokens_per_micro_batch // counts(*lengths)["N"], c.prompts_per_step // c.world_size))
    one = counts(*lengths, shared=c.share_prompt)
    return blocks * one["N"], blocks * one["T"]


def memory(c: Options, lm: nn.Module, kept: int) -> dict[str, int]:
    """Bytes of rank 0 by part; kept: what the decoder keeps of a micro-batch.

    Trained weights are fp32 and so are their gradients and AdamW's two moments; a frozen base is kept in the compute
    dtype.
    """
    wide = model.DTYPES[c.dtype].itemsize

    def shard(p: Tensor) -> int:
        """fully_shard cuts the first axis into ceil(rows / ranks) rows, from rank 0 on, so rank 0 has the most."""
        return -(-p.shape[0] // c.world_size) * math.prod(p.shape[1:])

    trained = 4 * sum(shard(p) for p in lm.parameters() if p.requires_grad)
    frozen = wide * sum(shard(p) for p in lm.parameters() if not p.requires_grad)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in model.layers_of(lm)]
    root = sum(p.numel() for p in lm.parameters()) - sum(sizes)
    about, (_, T) = model.decoder_of(lm).config.get_text_config(), micro_batch(c)
    D, V = about.hidden_size, about.vocab_size
    chunk = min(T, 1024 if c.dtype == "bf16" else chunk_for(V, "cuda")) * V * wide
    return {
        "weights": frozen + trained,
        "gradients": trained,
        "optimizer": 2 * trained,
        # The embeddings, head and last norm, whole from forward to backward, a layer at work and the next on its way.
        "gathered": wide * (root + 2 * max(sizes)),
        "activations": kept + T * D * wide,
        # A chunk's logits become their gradient in place; a head that trains has its own in fp32 and one more product.
        "head": chunk + (0 if c.lora_rank else (4 + wide) * V * D),
    }


def estimate(c: Options) -> dict[str, Any]:
    """All of it; ValueError for an option out of range."""
    config.check_choices(c, dtype=model.DTYPES)
    at_least = dict.fromkeys(("epochs", "prompts_per_step", "tokens_per_micro_batch", "world_size", "prompts"), 1)
    for key, least in (at_least | {"prompt_tokens": 1, "response_tokens": 1, "responses": 2, "lora_rank": 0}).items():
        if getattr(c, key) < least:
            raise ValueError(f"{key} must be at least {least}, got {getattr(c, key)}")
    if not (c.tflops > 0 and c.gpu_gib > 0 and 0 < c.mfu <= 1):
        raise ValueError("tflops and gpu_gib must be positive, and mfu lie in (0, 1]")
    lm, (N, _) = build(c), micro_batch(c)
    counted = run(lm, N)
    kept = counted["kept"]
    if c.gradient_checkpointing:  # the layers' inputs, and one layer at a time all that it keeps otherwise
        model.checkpoint_layers(lm)
        counted = run(lm, N)
        kept = counted["kept"] + (kept - counted["kept"]) // len(model.layers_of(lm))
    parameters = {"all": sum(p.numel() for p in lm.parameters())}
    parameters["trained"] = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    parts = memory(c, lm, kept)
    total = sum(parts.values())
    found = {"parameters": parameters, "bytes_per_rank": parts | {"total": total}, "fits": total < c.gpu_gib * 2**30}
    found["steps"] = c.epochs * -(-c.prompts // c.prompts_per_step)
    return {"options": vars(c)} | found | {"work": work(c, lm, counted["forward"] / N, counted["backward"] / N)}


def main() -> None:
    about = dict(prog="python -m hps.lab.estimate", description=str(__doc__).split("\n")[0])
    c, _ = config.parse(Options, foreign=True, **about)
    found = estimate(c)
    for key, value in found["parameters"].items():
        print(f"parameters     {key:<26}{value:>16,}")
    for key, value in found["bytes_per_rank"].items():
        print(f"GiB per rank   {key:<26}{value / 2**30:>16.3f}")
    print(f"fits           {f'into {c.gpu_gib:g} GiB':<26}{'yes' if found['fits'] else 'no':>16}")
    print(f"steps          {'':<26}{found['steps']:>16,}")
    for key, value in found["work"].items():
        print(f"work           {key:<26}{value:>16{',' if 'tokens' in key else '.4g'}}")
    print(json.dumps(found))


if __name__ == "__main__":
    config.run_main(main)
