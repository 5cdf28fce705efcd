"""A run at paper scale on paper: parameters, bytes a rank, tokens, FLOPs and hours, without running it.

    python -m hps.lab.estimate --config configs/llama3-8b.toml --world_size 4

Premises. The model is a Llama: RMSNorm, rotary positions, grouped keys, gated MLP, no biases. The run is torchrun's,
so all is sharded (hps.dist.shard). Every prompt has the mean length and every response too, and nothing is padded or
idle. One product of (m, k) and (k, n) is 2 m k n FLOPs; nothing else counts as one. Of attention only pairs of a query
and a key that it may see are counted, of m causal tokens m (m + 1) / 2, whatever computes them: a kernel works in tiles
and does some more, a dense mask (hps.attention's last resort, not estimated here) all N^2. Letters: N packed tokens, T
of them scored, A such pairs; P prompt and Y response tokens, K responses; D width, Q = heads x head size, F MLP width,
V vocabulary, L layers, r LoRA rank, w bytes of a number in the compute dtype.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

from hps import config
from hps.io import files
from hps.logps import chunk_for

KERNEL_CHUNK = 1024  # hps.kernels.CHUNK, which cannot be imported where there is no Triton


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
    share_prompt: bool = True  # of the bytes: compute a prompt once for all its responses (FLOPs are given both ways)
    tokens_per_micro_batch: int = 4096  # packed tokens of one forward
    # -- of the run --
    shape: str = ""  # config.json of a Llama model; empty means Llama-3-8B
    world_size: int = 4  # ranks
    prompts: int = 40_000  # prompts of the data (the lengths and this are examples: measure your own)
    prompt_tokens: int = 200  # mean length of a prompt with its template
    response_tokens: int = 200  # mean length of a response
    responses: int = 2  # of a visit: 2 for BT and HPS, the ranks for PL
    # -- of the device --
    tflops: float = 362.0  # peak, 1e12 FLOPs a second (L40S, dense bf16 by its data sheet)
    mfu: float = 0.4  # share of the peak that is reached, on the FLOPs of the table, recomputed ones counted
    json: str = ""  # file that gets the table too; empty for none


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama, named as in its config.json; every count below follows from them."""

    vocab_size: int = 128_256
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    tie_word_embeddings: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of a layer's linear maps."""
        D, F, kv = self.hidden_size, self.intermediate_size, self.head_size * self.num_key_value_heads
        attention = {"q_proj": (D, self.Q), "k_proj": (D, kv), "v_proj": (D, kv), "o_proj": (self.Q, D)}
        return attention | {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def Q(self) -> int:
        return self.num_attention_heads * self.head_size


def read_shape(path: str) -> Shape:
    """The shape in a config.json, Llama-3-8B's for an empty path; ValueError if it is not a plain Llama's."""
    if not path:
        return Shape()
    values = files.read_json(Path(path))
    names = list(Shape.__dataclass_fields__)
    missing = [key for key in names[:-1] if key not in values]
    if values.get("model_type") != "llama" or missing or values.get("attention_bias") or values.get("mlp_bias"):
        raise ValueError(f"--shape {path}: give the config.json of a Llama without biases, with {', '.join(names)}")
    shape = Shape(**{key: values[key] for key in names if key in values})
    if values.get("head_dim") not in (None, shape.head_size):
        raise ValueError(f"--shape {path}: its head_dim is not hidden_size / num_attention_heads, as is assumed here")
    return shape


# -- parameters --


def parameter_shapes(s: Shape, *, rank: int, targets: list[str]) -> tuple[list[tuple], list[tuple]]:
    """(base, adapters): shapes of all tensors; an adapter of an (in, out) map is A (r, in) and B (out, r)."""
    D, V, L = s.hidden_size, s.vocab_size, s.num_hidden_layers
    base = [(V, D)] * (1 if s.tie_word_embeddings else 2) + [(D,)] * (2 * L + 1)
    base += [(o, i) for i, o in s.linears.values()] * L
    lora = [shape for t in targets for i, o in [s.linears[t]] for shape in ((rank, i), (o, rank))] * L
    return base, lora if rank else []


def elements(shapes: list[tuple]) -> int:
    """Numbers in tensors of these shapes."""
    return sum(map(math.prod, shapes))


def fullest(shapes: list[tuple], world_size: int) -> int:
    """Numbers on rank 0. fully_shard cuts the first axis into ceil(rows / ranks) rows a rank, from rank 0 on, so rank
    0 has the most: of A (8, D) on 64 ranks a row, as have 7 others, and 56 ranks have none."""
    return elements([(-(-shape[0] // world_size), *shape[1:]) for shape in shapes])


# -- memory --


def sharded_bytes(s: Shape, c: Options) -> dict[str, int]:
    """Weights, gradients and AdamW's two moments on rank 0, the fullest, in bytes.

    Trained weights are fp32 and so are their gradients and moments; a frozen base is kept in the compute dtype.
    """
    base, lora = parameter_shapes(s, rank=c.lora_rank, targets=c.lora_targets.split(","))
    frozen, trained = (base, lora) if c.lora_rank else ([], base)
    mine = 4 * fullest(trained, c.world_size)
    weights = width(c) * fullest(frozen, c.world_size) + mine
    return {"weights": weights, "gradients": mine, "optimizer": 2 * mine}


def gathered_bytes(s: Shape, c: Options) -> int:
    """Whole weights in the compute dtype on every rank at a time: the root group (embeddings, head, last norm), which
    stays from forward to backward, one layer at work, and the next one on its way."""
    base, lora = parameter_shapes(s, rank=c.lora_rank, targets=c.lora_targets.split(","))
    V, D, L = s.vocab_size, s.hidden_size, s.num_hidden_layers
    root = V * D * (1 if s.tie_word_embeddings else 2) + D
    layer = (elements(base) + elements(lora) - root) // L
    return width(c) * (root + min(2, L) * layer)


def layer_bytes(s: Shape, c: Options, *, N: int) -> int:
    """What one layer keeps for its backward, without checkpointing, bytes.

    A token: the two norms keep their input in fp32 (4 D) and 1 / rms (4); attention q, k, v and its output, keys not
    repeated for their group of heads, and a log-sum-exp a head; the MLP silu's input and both factors of its product
    (3 F). A frozen matrix keeps nothing of its input. An adapter keeps its inputs, D (q, k, v share one; gate and up
    too; o's is attention's output) and r; full training keeps the inputs of all and the norms' outputs before their
    weight (D). Left out is what CPUs alone do: many short responses share a padded call, which keeps copies of prompts.
    """
    D, F, w = s.hidden_size, s.intermediate_size, width(c)
    trains = set(c.lora_targets.split(",")) if c.lora_rank else set(s.linears)
    inputs = D * bool(trains & {"q_proj", "k_proj", "v_proj"}) + D * bool(trains & {"gate_proj", "up_proj"})
    inputs += F * ("down_proj" in trains) + (c.lora_rank * len(trains) if c.lora_rank else 2 * D)
    attention = w * sum(s.linears[t][1] for t in ("q_proj", "k_proj", "v_proj")) + w * s.Q + 4 * s.num_attention_heads
    return N * (2 * (4 * D + 4) + attention + w * 3 * F + w * inputs)


def activation_bytes(s: Shape, c: Options) -> dict[str, int]:
    """Kept between forward and backward of a micro-batch, bytes; gradients on their way are not counted.

    With checkpointing a layer keeps its input alone, N D, and one layer at a time all that `layer_bytes` says. Both
    ways the last norm keeps its input in fp32 and the head T D.
    head_chunk: a chunk's fp32 logits, which become their softmax and gradient in place; of bf16 heads, which go to the
    Triton kernels on GPUs, their buffer in bf16. A head that trains also has its fp32 gradient and one more product in
    the compute dtype.
    """
    # The budget counts a prompt once, also where plain rows repeat it.
    blocks = max(1, min(c.tokens_per_micro_batch // visit(c, shared=True)["N"], c.prompts_per_step // c.world_size))
    one = visit(c, shared=c.share_prompt)
    N, T = blocks * one["N"], blocks * one["T"]
    D, V, L, w = s.hidden_size, s.vocab_size, s.num_hidden_layers, width(c)
    layer = layer_bytes(s, c, N=N)
    rest = N * (4 * D + 4) + T * D * w
    chunk = 2 * min(KERNEL_CHUNK, T) * V if c.dtype == "bf16" else 4 * min(chunk_for(V, "cuda"), T) * V
    chunk += 0 if c.lora_rank else (4 + w) * V * D
    return {"kept": L * layer + rest, "checkpointed": L * N * D * w + layer + rest, "head_chunk": chunk}


def width(c: Options) -> int:
    """Bytes of a number in the compute dtype."""
    return {"fp32": 4, "bf16": 2}[c.dtype]


# -- work --


def forward_flops(s: Shape, c: Options, *, N: int, T: int, A: int) -> int:
    """2 in out a token and linear map, 2 r (in + out) an adapter, 4 Q a pair of attention, 2 D V a scored token."""
    maps = sum(2 * i * o for i, o in s.linears.values()) + sum(2 * c.lora_rank * sum(s.linears[t]) for t in adapted(c))
    return s.num_hidden_layers * (N * maps + A * 4 * s.Q) + 2 * T * s.hidden_size * s.vocab_size


def adapted(c: Options) -> list[str]:
    """Linear maps with an adapter."""
    return c.lora_targets.split(",") if c.lora_rank else []


def training_flops(s: Shape, c: Options, *, N: int, T: int, A: int, recompute_head: bool = False) -> int:
    """Forward and backward.

    A trained product costs twice its forward in the backward, a frozen one once; attention twice (its kernels make
    the scores again, which is not counted). Nothing flows into the first layer's input when the base is frozen: of
    its q, k and v the base has no backward, and their adapters' A one product less. (At least one of the three has an
    adapter; attention's kernels then make all three gradients.) Checkpointing runs each layer's forward again but for
    its last product (down_proj, or its adapter's B), whose result no backward needs, and asks for the gradient of the
    first layer's input after all. A frozen head makes its gradient while the logits are there, 2 D V more; the Triton
    kernels of a wide one make them again (`recompute_head`), and so does a head that trains.
    """
    L, head = s.num_hidden_layers, 2 * T * s.hidden_size * s.vocab_size
    forward = forward_flops(s, c, N=N, T=T, A=A)
    layers = forward - head
    last = c.lora_rank if "down_proj" in adapted(c) else s.intermediate_size
    again = layers - L * N * 2 * last * s.hidden_size if c.gradient_checkpointing else 0
    if not c.lora_rank:
        return forward + 2 * layers + again + 3 * head
    adapters = L * N * sum(2 * c.lora_rank * sum(s.linears[t]) for t in adapted(c))
    attention = L * A * 4 * s.Q
    qkv = ("q_proj", "k_proj", "v_proj")
    first = sum(2 * math.prod(s.linears[t]) + 2 * c.lora_rank * s.linears[t][0] * (t in adapted(c)) for t in qkv)
    first = 0 if c.gradient_checkpointing else N * first
    return forward + layers + adapters + attention - first + again + head * (2 if recompute_head else 1)


def counts(P: int, Y: int, K: int) -> dict[str, int]:
    """N, T, A of [prompt | y_1 | .. | y_K]: a response's tokens see the prompt and the past of their own."""

    def causal(m: int) -> int:
        return m * (m + 1) // 2

    return {"N": P + K * Y, "T": K * Y, "A": causal(P) + K * (Y * P + causal(Y))}


def visit(c: Options, *, shared: bool) -> dict[str, int]:
    """N, T, A of one visit: its responses behind one prompt, or each behind a prompt of its own."""
    P, Y, K = c.prompt_tokens, c.response_tokens, c.responses
    return counts(P, Y, K) if shared else {key: K * n for key, n in counts(P, Y, 1).items()}


def scored_once(c: Options, *, shared: bool) -> list[dict[str, int]]:
    """N, T, A of the blocks in which a prompt's responses are scored for the cache, each once.

    A view that draws opponents meets the best response and, at most, other opponents in every epoch; BT and PL meet
    the same ones. hps.reference scores them in pieces of at most a micro-batch's tokens, each with the whole prompt.
    """
    P, Y = c.prompt_tokens, c.response_tokens
    draws = c.method.split("-")[1] in ("hps", "uniform")
    left = 1 + (c.epochs if draws else 1) * (c.responses - 1)
    most = max(1, (max(c.tokens_per_micro_batch, 2 * P) - P) // Y) if shared else 1
    return [counts(P, Y, min(most, left - done)) for done in range(0, left, most)]


def run_work(s: Shape, c: Options, *, shared: bool, cached: bool) -> dict[str, float]:
    """Tokens, FLOPs and hours of the whole run, all ranks together but for the hours, which are the clock's.

    Without the cache the reference scores every visit's responses again, as a second model in the loop would.
    """
    one, visits = visit(c, shared=shared), c.prompts * c.epochs
    rows, times = (scored_once(c, shared=shared), c.prompts) if cached else ([one], visits)
    # On GPUs bf16 heads go to the Triton kernels, which at this width make the logits again.
    flops = visits * training_flops(s, c, **one, recompute_head=c.dtype == "bf16")
    flops += times * sum(forward_flops(s, c, **row) for row in rows)
    hours = flops / (c.world_size * c.tflops * 1e12 * c.mfu) / 3600
    reference = times * sum(row["N"] for row in rows)
    return {"tokens": visits * one["N"], "reference_tokens": reference, "flops": flops, "hours": hours}


def estimate(s: Shape, c: Options) -> dict:
    """All of it: counts, bytes a rank, and the four ways of running; ValueError for an option out of range."""
    unknown = [t for t in adapted(c) if t not in s.linears]
    if unknown or c.dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype is fp32 or bf16, lora_targets are of {', '.join(s.linears)}: {c.dtype}, {unknown}")
    for key in ("epochs", "prompts_per_step", "tokens_per_micro_batch", "world_size", "prompts", "prompt_tokens"):
        if getattr(c, key) < 1:
            raise ValueError(f"{key} must be positive, got {getattr(c, key)}")
    if c.response_tokens < 1 or c.responses < 2 or c.lora_rank < 0 or not (c.tflops > 0 and 0 < c.mfu <= 1):
        raise ValueError("response_tokens >= 1, responses >= 2, lora_rank >= 0, tflops > 0 and 0 < mfu <= 1, please")
    base, lora = parameter_shapes(s, rank=c.lora_rank, targets=c.lora_targets.split(","))
    moving = activation_bytes(s, c)
    fixed = sharded_bytes(s, c) | {"gathered": gathered_bytes(s, c), "head_chunk": moving.pop("head_chunk")}
    fixed |= {f"activations_{key}": value for key, value in moving.items()}
    fixed["total"] = sum(fixed.values()) - moving["kept" if c.gradient_checkpointing else "checkpointed"]
    ways = [
        {"share_prompt": shared, "cache": cached} | run_work(s, c, shared=shared, cached=cached)
        for shared in (True, False)
        for cached in (True, False)
    ]
    parameters = {"all": elements(base + lora), "trained": elements(lora or base)}
    steps = c.epochs * -(-c.prompts // c.prompts_per_step)
    return {"options": asdict(c), "parameters": parameters, "bytes_per_rank": fixed, "steps": steps, "ways": ways}


def table(found: dict) -> str:
    """The estimate for people; GiB are 2^30 bytes."""
    lines = [f"parameters     {key:<26}{value:>16,}" for key, value in found["parameters"].items()]
    lines += [f"GiB per rank   {key:<26}{value / 2**30:>16.3f}" for key, value in found["bytes_per_rank"].items()]
    lines += [f"steps          {'':<26}{found['steps']:>16,}", ""]
    lines += ["share_prompt  reference cache  training tokens  reference tokens     FLOPs    hours"]
    for way in found["ways"]:
        lines.append(
            f"{'yes' if way['share_prompt'] else 'no':<14}{'yes' if way['cache'] else 'no':<15}"
            f"{way['tokens']:>17,}{way['reference_tokens']:>18,}{way['flops']:>10.3g}{way['hours']:>9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    c, _ = config.parse(
        Options, prog="python -m hps.lab.estimate", description="A run on paper, before it is rented.", foreign=True
    )
    found = estimate(read_shape(c.shape), c)
    print(table(found))
    if c.json:
        files.write_json(Path(c.json), found)


if __name__ == "__main__":
    config.run_main(main)
