"""Everything that differs on a GPU, checked and timed in under eight minutes; in a tiny form where there is none.

    python benchmarks/gpu.py --out runs/gpu

The output head by each path against float64; packed attention (FlexAttention on CUDA) against a dense mask; training
steps with LoRA and of all weights beside TRL's on the same pairs; peak memory beside the estimate; tokens per second
and the share of the peak FLOPs. Writes gpu.json and gpu.md. A check that fails does not end the others, but the status
is 1.
"""

import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

# E402 from here on: Triton reads the variable above when it is imported, which these do.
import harness  # noqa: E402
import step  # noqa: E402
from head import dense_token_logps  # noqa: E402

from hps import attention_cpu, attention_cuda, config, logps  # noqa: E402
from hps.data.rows import Row  # noqa: E402
from hps.evaluate.compare import commit, machine  # noqa: E402
from hps.lab import estimate, world  # noqa: E402
from hps.packing import Block, pack  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
# Shapes: of a Llama of 1.2 billion parameters, and of a toy.
LLAMA = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
LLAMA |= dict(num_key_value_heads=8, vocab_size=128_256, max_position_embeddings=4096)
TOY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
TOY |= dict(num_key_value_heads=2, vocab_size=512, max_position_embeddings=512)
HEADS = [(T, 2048, V) for V in (49_152, 128_256) for T in (1024, 8192)] if CUDA else [(40, 32, 300)]  # T, D, V
TOKENS = 200 if CUDA else 20  # of a prompt, and of a response
REPEATS, EPOCHS = (5, 8) if CUDA else (1, 3)
FEW = 256  # tokens that float64 checks
Table = list[dict[str, Any]]
Ways = dict[str, Callable[..., Tensor]]


@dataclass
class Options:
    out: str = "runs/gpu"  # folder for gpu.json and gpu.md
    tflops: float = 989.0  # peak of the GPU, 1e12 FLOPs per second (H100 and H200, dense bf16 by their data sheets)


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Median milliseconds of a call after one that is not counted; on CUDA the most GiB above what was held."""

    def wait() -> None:
        torch.cuda.synchronize() if CUDA else None

    run()
    wait()
    torch.cuda.reset_peak_memory_stats() if CUDA else None
    held = torch.cuda.memory_allocated() if CUDA else 0
    ms = 1000 * statistics.median(harness.seconds(lambda: (run(), wait())) for _ in range(REPEATS))
    return {"ms": ms, "GiB": (torch.cuda.max_memory_allocated() - held) / 2**30 if CUDA else 0.0}


def compare(few: Ways, few_inputs: list[Tensor], ways: Ways, inputs: list[Tensor], **about: Any) -> Table:
    """For each way of computing one tensor its error on few inputs and its time on all of them.

    The error is the largest of value and gradients against the way `dense`, the plain one, in float64, as a share of
    the largest entry. It may be twice that of `dense` in the dtype of the inputs.
    """

    def run(way: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
        value = way(*inputs)
        return value.detach(), *torch.autograd.grad((value * torch.arange(1, len(value) + 1).to(value)).sum(), inputs)

    truth, errors = run(few["dense"], [x.detach().double().requires_grad_() for x in few_inputs]), {}
    for name, way in few.items():
        got = run(way, [x.detach().requires_grad_() for x in few_inputs])
        errors[name] = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, truth, strict=True))
    found = []
    for name, way in ways.items():
        cost = timed(partial(run, way, [x.requires_grad_() for x in inputs]))
        right = errors[name] <= 2 * errors["dense"] + 1e-6
        found.append({"path": name} | about | {"error": errors[name]} | cost | {"right": right})
    return found


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The path of a head that trains where no kernel serves it."""
    return logps._TrainableHead.apply(hidden, weight, targets, logps.chunk_for(len(weight), DEVICE.type))


def output_heads(_: Options) -> Table:
    """Value and gradients of each path against float64, on 256 tokens; time of all tokens, forward and backward."""
    paths: Ways = {"dense": dense_token_logps, "chunked": chunked}
    try:
        from hps import kernels

        paths["Triton"] = kernels.token_logps
    except ImportError:
        print("Triton is not installed: its kernels are left out", file=sys.stderr)
    found: Table = []
    for (T, D, V), dtype in itertools.product(HEADS, (torch.float32, torch.bfloat16)):
        if not CUDA and dtype == torch.bfloat16:  # Triton's interpreter multiplies the bit patterns of bf16;
            paths.pop("Triton", None)  # tests/test_kernels.py has a way around that
        draw = torch.Generator().manual_seed(0)
        hidden, weight = torch.randn(T, D, generator=draw), torch.randn(V, D, generator=draw) / D**0.5
        hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
        targets = torch.randint(0, V, (T,), generator=draw).to(DEVICE)
        few, ways = ({name: partial(path, targets=targets[:n]) for name, path in paths.items()} for n in (FEW, T))
        about = {"dtype": str(dtype)[6:], "tokens": T, "vocabulary": V}
        found += compare(few, [hidden[:FEW], weight], ways, [hidden, weight], **about)
    return found


def packed_attention(_: Options) -> Table:
    """Rows of several lengths, against scaled_dot_product_attention with the dense mask, forward and backward."""
    found, draw = [], random.Random(0)
    for prompts in (1, 2, 4):
        lengths = [[draw.randint(TOKENS // 2, TOKENS) for _ in range(5)] for _ in range(prompts)]
        blocks = [Block(np.arange(p), tuple(np.arange(n) for n in y)) for p, *y in lengths]
        packed = pack(blocks, pad_id=0).to(DEVICE)
        packed = attention_cuda.padded(packed) if CUDA else packed
        N, dtype = packed.input_ids.shape[1], torch.bfloat16 if CUDA else torch.float32
        qkv = [torch.randn(1, heads, N, 64, device=DEVICE, dtype=dtype) for heads in (8, 2, 2)]
        at = torch.arange(N, device=DEVICE)
        mask = attention_cuda.may_attend(packed)(0, 0, at[:, None], at)[None, None]
        # FlexAttention has no backward on a CPU.
        ours = attention_cuda.layout(packed) if CUDA else attention_cpu.layout(packed, 8)
        ways = {"dense": partial(sdpa, attn_mask=mask, scale=0.125, enable_gqa=True)}
        ways["packed"] = partial(ours, scaling=0.125)
        found += compare(ways, qkv, ways, qkv, **{"packed tokens": N})
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return [row | {"graphs compiled": graphs, "right": row["right"] and graphs <= 1} for row in found]


def make_inputs(folder: Path) -> list[Row]:
    """A random model with the world's tokenizer in a folder, and eight pairs of its words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = world.build_tokenizer(world.World(0))
    torch.manual_seed(0)
    with DEVICE:
        lm = LlamaForCausalLM(LlamaConfig(**(LLAMA if CUDA else TOY)))
    lm.to(torch.bfloat16 if CUDA else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    draw = random.Random(0)
    texts = [[" " + str(tokenizer.decode(draw.choices(ids, k=TOKENS))) for _ in range(3)] for _ in range(step.STEP)]
    return [Row(f"{i}", p, (a, b), None, 0, 1, f"gpu:{i + 1}") for i, (p, a, b) in enumerate(texts)]


def training(c: Options) -> Table:
    """Steps over one batch: losses and (of all weights) gradient norms beside TRL's, speed of the later steps, memory
    (of the device; without one, of the process) beside the estimate."""
    dtype, found = "bf16" if CUDA else "fp32", []
    with tempfile.TemporaryDirectory() as place:
        rows = make_inputs(Path(place) / "model")
        for rank in (step.RANK, 0):
            how = step.Options(data="", model=f"{place}/model", dtype=dtype, epochs=EPOCHS, lora_rank=rank)
            ours = harness.alone(step.in_folder, step.ours, how, rows, 0)
            trl = harness.alone(step.in_folder, step.trl, how, rows, 2)
            shape: dict[str, Any] = dict(shape=f"{place}/model", world_size=1, lora_rank=rank, dtype=dtype)
            shape |= dict(prompts=step.STEP, prompts_per_step=step.STEP, prompt_tokens=TOKENS, response_tokens=TOKENS)
            shape |= dict(tokens_per_micro_batch=how.tokens_per_micro_batch, epochs=EPOCHS, device=DEVICE.type)
            expected, log = estimate.estimate(estimate.Options(**shape)), ours["log"]
            # Without the first step, in which things are compiled; all steps have the same tokens.
            seconds = [(i + 1) / record["perf/tokens_per_s"] for i, record in enumerate(log)]
            rate, work = (len(log) - 1) / (seconds[-1] - seconds[0]), expected["work"]
            apart = max(abs(a["loss"] - b["loss"]) for a, b in zip(log, trl["log"], strict=True))
            norms = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(log, trl["log"], strict=True))
            norms = 0.0 if rank else norms  # their adapters start differently
            found.append({
                "weights": f"LoRA {rank}" if rank else "all", "dtype": dtype, "loss": log[-1]["loss"],
                "loss apart from TRL's": apart, "gradient norm apart": "-" if rank else norms, "tokens per s": rate,
                "times TRL's": trl["loop"] / ours["loop"], "peak GiB": log[-1]["perf/peak_gib"],
                "estimated GiB": expected["bytes_per_rank"]["total"] / 2**30,
                "MFU": rate * work["FLOPs"] / (work["tokens"] + work["reference_tokens"]) / (c.tflops * 1e12),
                "right": apart < (2e-2 if CUDA else 1e-4) and norms < (5e-2 if CUDA else 1e-3),
            })  # fmt: skip
    return found


SECTIONS = {"The output head": output_heads, "Attention": packed_attention, "Training": training}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/gpu.py", description=str(__doc__).split("\n")[0])
    out, found, wrong = Path(c.out), dict[str, Any](machine=machine(), commit=commit()), []
    page = [f"# On {machine()}", f"torch {torch.__version__}, commit {commit()}."]
    for title, section in SECTIONS.items():
        print(f"{title} ...", file=sys.stderr, flush=True)
        try:
            rows = section(c)
        except Exception:  # what fails on this machine is what the script is for
            rows = [{"failed": traceback.format_exc(), "right": False}]
            print(rows[0]["failed"], file=sys.stderr)
        found[title] = rows
        wrong += [] if all(row["right"] for row in rows) else [title]
        page += [f"## {title}", f"{section.__doc__}", harness.table(list(rows[0]), [row.values() for row in rows])]
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.md").write_text("\n\n".join(page) + "\n")
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    print((out / "gpu.md").read_text())
    if wrong:
        raise SystemExit(f"not right: {', '.join(wrong)}")


if __name__ == "__main__":
    config.run_main(main)
