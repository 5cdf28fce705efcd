"""The Triton output head before it meets a GPU: what each kernel takes of a chip, what each path moves and computes.

    python benchmarks/kernels.py

Kernels are compiled ahead of time; registers and spills are what ptxas reports. Traffic and floors are predictions,
not measurements: every tensor goes to memory once a step, and each step takes the longer of its bytes and its
products on one H100. The last line is JSON.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hps import kernels, logps

TOKENS = 4096  # scored tokens of a micro-batch
WIDTHS, VOCABULARIES = (576, 4096), (49_152, 128_256)  # SmolLM2-135M, Llama-3.1-8B
# Shared memory one program may have, bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
H100 = dict(multiprocessors=132, bytes_per_s=3.35e12, flops=989e12)  # SXM data sheet, dense bf16
KERNELS = {
    "one_pass": (kernels._logsumexp_and_mean,),
    "logits": (kernels._logsumexp, kernels._logit_gradient),
}


def resources(kind: str, kernel: triton.JITFunction, dtype: torch.dtype, D: int, arch: int) -> dict:
    """A kernel's shared memory (bytes a program), registers (a thread), spilled bytes, use of tensor cores."""
    pointer = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    types = dict(h=pointer, w=pointer, out=pointer, y="*i64", T="i32", V="i32", per_split="i32")
    types |= dict.fromkeys(("lse", "picked", "mean", "upstream"), "*fp32")
    tile = kernels.tile(kind, dtype, arch // 10)
    names = kernel.arg_names
    # What the launcher finds out by itself: pointers and these integers are multiples of 16.
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name in ("V", "per_split")]
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in kernels.constants(kind, D, tile).items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = dict(num_warps=tile.warps, num_stages=tile.stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    ptx = compiled.asm["ptx"]
    ptxas = (knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas).path
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:  # spills are not in Triton's own metadata
        file.write(ptx)
        file.flush()
        gpu = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        argv = [ptxas, "-v", gpu, file.name, "-o", "/dev/null"]
        said = subprocess.run(argv, capture_output=True, text=True, check=True)
    stores, loads = map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said.stderr))
    (registers,) = map(int, re.findall(r"Used (\d+) registers", said.stderr))
    tensor_cores = bool(re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx))
    shared = compiled.metadata.shared
    return dict(shared=shared, registers=registers, spills=stores + loads, tensor_cores=tensor_cores)


def steps(path: str, D: int, V: int, trains: bool) -> list[tuple[float, float]]:
    """(bytes to and from memory, FLOPs) of each step of a forward and backward, per token of TOKENS."""
    product, w = 2 * D * V, 2 * D * V  # FLOPs of one (1, D) x (D, V) product; bytes of W in bf16
    if path == "dense":  # bf16 product; fp32 copy 6, log-softmax 8, its backward 4 + 12, bf16 copy 6; product(s)
        every = [(w / TOKENS + 2 * V, product), (36 * V, 0), (w / TOKENS + 2 * V, product)]
        return every + [(w / TOKENS + 2 * V, product)] * trains
    if path == "chunked":
        chunk = logps.chunk_for(V, "cuda")
        forward = [(w / chunk + 2 * V, product), (14 * V, 0)]  # product; fp32 copy 6, log-softmax 8
        backward = [((30 if trains else 22) * V, 0), (w / chunk + 2 * V, product)]  # exp 8, neg 8, (scale 8,) copy 6
        head = [(w / chunk + 2 * V, product), (5 * w / chunk, 0)]  # its product; fp32 sum over chunks
        return forward + (forward + backward + head if trains else backward)
    tile = kernels.tile("one_pass" if path == "one_pass" else "logits", torch.bfloat16, 9)
    rows = triton.cdiv(TOKENS, tile.tokens)
    passes = triton.cdiv(rows, H100["multiprocessors"])  # programs in flight at once share what they read of W
    splits, _ = kernels.split(TOKENS, V, tile, H100["multiprocessors"])
    if path == "one_pass":
        return [(passes * w / TOKENS, 2 * product), (splits * D * 8, 0)]  # partial sums, written and joined in fp32
    chunk = kernels.CHUNK
    ours = [(passes * w / TOKENS, product), (w / chunk + 2 * V, product), (w / chunk + 2 * V, product)]
    return ours + [(w / chunk + 2 * V, product), (5 * w / chunk, 0)] * trains


def main() -> None:
    report: dict[str, list] = {"resources": [], "traffic": []}
    line = "{:>4} {:<20} {:>5} {:>15} {:>13} {:>10} {:>7}"
    print(line.format("sm", "kernel", "D", "tile", "shared, KiB", "registers", "spills"))
    for arch, limit in SHARED.items():
        for kind, group in KERNELS.items():
            for kernel in group:
                for D in (kernels.WIDEST,) if kind == "one_pass" else WIDTHS:
                    t = kernels.tile(kind, torch.bfloat16, arch // 10)
                    found = resources(kind, kernel, torch.bfloat16, D, arch)
                    tile = f"{t.tokens} x {t.vocabulary}" + (f" x {t.width}" if t.width else "")
                    shared = f"{found['shared'] / 1024:.0f} of {limit // 1024}"
                    name = kernel.__name__
                    print(line.format(arch, name, D, tile, shared, found["registers"], found["spills"]), flush=True)
                    report["resources"].append({"sm": arch, "kernel": name, "D": D, **found})
    print(f"\nper token of {TOKENS}, forward and backward: memory traffic, FLOPs, floor of the time on one H100")
    line = "{:>5} {:>8} {:>8} {:<10} {:>8} {:>8} {:>8}"
    print(line.format("D", "V", "head", "path", "MB", "GFLOP", "us"))
    for D in WIDTHS:
        for V in VOCABULARIES:
            for trains in (False, True):
                one_pass = ["one_pass"] if D <= kernels.WIDEST and not trains else []
                for path in ["dense", "chunked", *one_pass, "recompute"]:
                    parts = steps(path, D, V, trains)
                    moved, flops = (sum(part[i] for part in parts) for i in (0, 1))
                    us = 1e6 * sum(max(b / H100["bytes_per_s"], f / H100["flops"]) for b, f in parts)
                    row = dict(D=D, V=V, head="trained" if trains else "frozen", path=path)
                    row |= dict(mb=round(moved / 1e6, 3), gflop=round(flops / 1e9, 3), us=round(us, 3))
                    print(line.format(*row.values()))
                    report["traffic"].append(row)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
