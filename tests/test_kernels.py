"""The Triton head against float64 within an explicit error budget, and what its kernels take of each chip.

Without a GPU the kernels run in Triton's interpreter. It replaces kernels while they are being defined, and Triton's
own library of them with the import of triton, so TRITON_INTERPRET has to be set before: all cases run in one process
of their own, this file as a script, which writes inputs and results for the tests to compare. benchmarks/gpu.py
compares them on a GPU.
"""

import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

triton = pytest.importorskip("triton", reason="Triton is for Linux only")
from hps import kernels, logps  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# T, D, V, factor of the states: odd ones, several chunks, slices of D and splits of V, logits up to 10^4.
SHAPES = [(1, 5, 7, 1), (13, 8, 101, 1), (33, 40, 200, 1), (40, 64, 161, 1), (17, 72, 700, 100)]
HEADS = ("frozen", "trained")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def draw(T: int, D: int, V: int, factor: float, dtype: torch.dtype):
    g = torch.Generator().manual_seed(T)
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g)
    targets = torch.randint(0, V, (T,), generator=g)
    hidden[::3] = 4 * weight[targets[::3]]  # some softmaxes are saturated, at their target
    hidden, upstream = hidden * factor, torch.randn(T, generator=g)
    return hidden.to(dtype), weight.to(dtype), targets, upstream


# -- the child: everything that the interpreter runs --


def exact_bf16_in_the_interpreter() -> None:
    """As a GPU does: fp32 products, nearest even; the interpreter multiplies bit patterns of bf16 and truncates."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def wide(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def to_bf16(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy()

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    interpreter._convert_float = to_bf16


def run(head: str, hidden, weight, targets, upstream) -> dict[str, torch.Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(head == "trained")
    value = kernels.token_logps(hidden, weight, targets, chunk=16)
    (value.sum() if upstream is None else (value * upstream).sum()).backward()
    assert hidden.grad is not None and (weight.grad is not None) == (head == "trained")
    found = dict(value=value.detach(), hidden=hidden.grad)
    return found | ({"weight": weight.grad} if weight.grad is not None else {})


def child(out: str) -> None:
    exact_bf16_in_the_interpreter()
    results = {}
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            for head in HEADS:
                found = run(head, *draw(*shape, dtype))
                results |= {f"{shape}/{name}/{head}/{key}": value for key, value in found.items()}
    hidden, weight, targets, upstream = draw(*SHAPES[1], torch.float32)
    results["strides"] = run("trained", hidden.T.contiguous().T, weight, targets, None)["hidden"]
    results["ones"] = run("trained", hidden, weight, targets, torch.ones(len(targets)))["hidden"]
    results["mixed"] = run("trained", hidden, weight.bfloat16(), targets, upstream)["hidden"]
    results["bf16"] = run("trained", hidden.bfloat16(), weight.bfloat16(), targets, upstream)["hidden"]
    with torch.no_grad():
        results["scored"] = kernels.token_logps(hidden, weight, targets)
        targets[0], targets[-1] = len(weight), -1
        results["outside"] = kernels.token_logps(hidden, weight, targets)
    save_file({key: value.contiguous() for key, value in results.items()}, out)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("kernels") / "results.safetensors"
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


# -- the budget --


def budgets(hidden, weight, targets, upstream) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(float64 truth, largest admissible error) of the value and both gradients, inputs taken as exact.

    e = 2^-24 and u are the unit roundoffs of fp32 and of the inputs' dtype (bf16: 2^-8). n roundings in a row count as
    4 sqrt(n), a random walk to four standard deviations, not the n of the worst case; a tensor core that truncates has
    room in it, as these widths use a tenth.

    * Logits: |dz_v| <= e 4 sqrt(D) Z, Z = max_v sum_d |h_d W_vd|. The logsumexp moves by no more, and its sum of V
      terms adds e (4 sqrt(V) + 4 Z + 8): exp's argument is rounded by e |z|, so are the maximum plus log and the
      difference to the target's logit. b = e (8 sqrt(D) Z + 4 Z + 4 sqrt(V) + 8) for the value.
    * d/dh = (1 - p_y) W_y - sum_{v != y} p_v W_v. As |dp_v| <= 2 b p_v and |d(1 - p_y)| <= b, with M = sum_{v != y}
      p_v |W_v| the fp32 part errs by (2 b + 4 e sqrt(V)) (M + |W_y|). Rounding the weights p to the inputs' dtype adds
      u (M + (1 - p_y) |W_y|), storing the gradient u times the entry, and scaling it again. A target in the rounded
      sum would add u |W_y| where p_y = 1 and all of this is 0.
    * d/dW = G^T h, G = g (onehot - p): rounding G adds u N, N = |G|^T |h|, rounding the products of the chunks u N
      storing u times the entry; fp32 (2 b |g| (p + onehot))^T |h| + 4 e sqrt(T) N.
    * Below 2^-126 a p may be flushed to 0, which is no relative error: `tiny` in each of the sums.
    """
    e, tiny, u = 2**-24, 2**-126, 2**-8 if hidden.dtype == torch.bfloat16 else 2**-24
    T, D, V = *hidden.shape, len(weight)
    h, w, g = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), upstream.double()
    value = torch.log_softmax(h @ w.T, -1)[torch.arange(T), targets]
    grad_h, grad_w = torch.autograd.grad((value * g).sum(), (h, w))
    h, w, value = h.detach(), w.detach(), value.detach()
    z = (h.abs() @ w.abs().T).amax(-1)
    b = e * (8 * math.sqrt(D) * z + 4 * z + 4 * math.sqrt(V) + 8)
    p, onehot = torch.softmax(h @ w.T, -1), torch.nn.functional.one_hot(targets, V)
    apart = p * (1 - onehot)  # the target's share is 1 - p_y, from the others: exact where p_y is 1
    miss = apart.sum(-1, keepdim=True)
    m, w_y = apart @ w.abs(), w[targets].abs()
    of_h = (2 * b[:, None] + 4 * e * math.sqrt(V)) * (m + w_y) + u * (m + miss * w_y) + tiny * w.abs().sum(0)
    n = ((apart + miss * onehot) * g.abs()[:, None]).T @ h.abs()
    of_w = (2 * (b * g.abs())[:, None] * (p + onehot)).T @ h.abs() + 4 * e * math.sqrt(T) * n + 2 * u * n
    of_w = of_w + tiny * (g.abs() @ h.abs())
    return {
        "value": (value, b),
        "hidden": (grad_h, of_h * g.abs()[:, None] + 2 * u * grad_h.abs()),
        "weight": (grad_w, of_w + u * grad_w.abs()),
    }


def worst(found: torch.Tensor, truth: torch.Tensor, budget: torch.Tensor) -> float:
    """The largest error as a share of its budget."""
    assert torch.isfinite(found).all()
    return float(((found.double() - truth).abs() / budget).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_are_within_the_budget(interpreted, dtype):
    for shape in SHAPES:
        expected = budgets(*draw(*shape, DTYPES[dtype]))
        for head, keys in (("frozen", ("value", "hidden")), ("trained", ("value", "hidden", "weight"))):
            found = {key: interpreted[f"{shape}/{dtype}/{head}/{key}"] for key in keys}
            assert found["value"].dtype == torch.float32 and found["hidden"].dtype == DTYPES[dtype]
            shares = {key: worst(tensor, *expected[key]) for key, tensor in found.items()}
            assert all(share <= 1 for share in shares.values()), (shape, head, shares)


def test_what_callers_may_bring(interpreted):
    """Column-major states and a gradient of stride 0 change nothing; fp32 states are cast, their gradient is not; a
    pass without gradients has the same values; a target outside the vocabulary is loud."""
    assert torch.equal(interpreted["strides"], interpreted["ones"])
    assert interpreted["mixed"].dtype == torch.float32
    assert torch.equal(interpreted["mixed"], interpreted["bf16"].float())
    assert torch.equal(interpreted["scored"], interpreted[f"{SHAPES[1]}/fp32/frozen/value"])
    outside = interpreted["outside"]
    assert outside[0] == outside[-1] == -torch.inf and torch.isfinite(outside[1:-1]).all()


# -- compiled for chips that are not here --

# Shared memory one program may have, bytes (CUDA programming guide, compute capabilities).
SHARED = {89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


def compile_for(arch: int, kernel) -> tuple[int, int, bool]:
    """Of a kernel for bf16 and D = 4096 on compute capability `arch` / 10: shared memory (bytes a program), spilled
    bytes, use of tensor cores."""
    types = dict.fromkeys(("h", "w", "out"), "*bf16") | dict.fromkeys(("lse", "picked", "upstream"), "*fp32")
    types |= dict(y="*i64", T="i32", V="i32", per_split="i32")
    constants = kernels.launch_options(4096, torch.bfloat16, arch // 10)
    options = {key: constants.pop(key) for key in ("num_warps", "num_stages")}
    names = kernel.arg_names
    # What the launcher finds out by itself: pointers and these integers are multiples of 16.
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*") or name in ("V", "per_split")]
    source = triton.compiler.ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=options)
    ptx, nvidia = compiled.asm["ptx"], triton.knobs.nvidia
    ptxas = (nvidia.ptxas_blackwell if arch >= 100 else nvidia.ptxas).path
    argv = [ptxas, "-v", f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}", "-", "-o", "/dev/null"]
    said = subprocess.run(argv, input=ptx, capture_output=True, text=True, check=True)
    spills = list(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said.stderr)))  # no metadata of Triton's
    assert len(spills) == 2
    return compiled.metadata.shared, sum(spills), bool(re.search(r"\b(mma\.sync|wgmma\.mma|tcgen05\.mma)", ptx))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter's kernels cannot be compiled")
@pytest.mark.parametrize("arch", SHARED)
def test_kernels_fit_the_chip(arch):
    """ptxas spills no register, a program's shared memory is below the chip's, products are the tensor cores'."""
    for kernel in (kernels._logsumexp, kernels._logit_gradient):
        shared, spills, tensor_cores = compile_for(arch, kernel)
        assert spills == 0 and shared <= SHARED[arch] and tensor_cores, (kernel.__name__, spills, shared)


def test_splits_cover_the_vocabulary_and_none_is_empty():
    options = kernels.launch_options(576, torch.bfloat16, 9)
    for T in (1, 64, 65, 129, 5000):
        for V in (7, 128, 4099, 49_152):
            splits, per_split = kernels.split(T, V, options, 132)
            assert (splits - 1) * per_split < V <= splits * per_split and per_split % options["BV"] == 0
            tiles = math.ceil(V / options["BV"])
            # Each tile its own split, or the waves full but for a rounding of at most 2.
            assert splits == tiles or 2 * math.ceil(T / options["BT"]) * splits >= kernels.WAVES * 132


# -- who gets the kernels --


def test_dispatch(monkeypatch, caplog):
    """Heads on the CPU never reach the kernels; on CUDA bf16 ones do from capability 8.0; the log says it once."""
    caplog.set_level(logging.INFO, "hps.logps")
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    chooses, bf16, fp32 = logps._kernels_for, torch.bfloat16, torch.float32
    cuda = torch.device("cuda", 0)
    chooses.cache_clear()
    assert chooses(bf16, torch.device("cpu")) is None and not caplog.records
    assert chooses(bf16, cuda) is chooses(bf16, cuda) is kernels and chooses(fp32, cuda) is None
    chooses.cache_clear()
    capability[0] = 7
    assert chooses(bf16, cuda) is None
    chooses.cache_clear()
    monkeypatch.setitem(sys.modules, "hps.kernels", None)  # what an absent package looks like
    monkeypatch.delattr("hps.kernels")
    assert chooses(bf16, cuda) is None
    said = [record.message.removeprefix("output head: ") for record in caplog.records]
    assert [line.split(" ")[0] for line in said] == ["Triton", "chunked,", "chunked,", "chunked,"]
    assert said[-1] == "chunked, Triton is not installed"
    chooses.cache_clear()


if __name__ == "__main__":
    child(sys.argv[1])
