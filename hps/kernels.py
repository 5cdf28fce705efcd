"""The output head fused with its log-softmax for CUDA, in Triton: no (T, V) tensor.

Two ways to the gradient, chosen by whether the head trains and by its width:

* One pass (`_OnePass`: frozen head, D <= WIDEST). d logp_t / d h_t = W[y_t] - sum_v p_v W_v is known up to the
  incoming scalar, so the forward carries sum_v exp(z_v - max) W_v beside the running maximum and sum, like attention
  with the states as queries and W as both keys and values. Two products, nothing recomputed.
* Recompute (`_Recompute`: the head trains, or D is larger). The forward keeps the logsumexp alone; the backward makes
  the logits again, `chunk` tokens at a time, writes g (onehot - softmax) in the weight's dtype, and leaves the
  products with W and h to cuBLAS. At D = 4096 the sums of the one pass would be 256 KiB, a multiprocessor's whole
  register file, for 16 tokens. Sums in memory by atomics would do at any D, but no two runs would agree in the last
  bit.

The vocabulary is cut into splits, so that few tokens still fill the chip; their partial results are joined in fp32.
`python benchmarks/kernels.py` prints tiles, registers, bytes and FLOPs; it needs no GPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

WIDEST = 576  # of the one pass: (64, 576) fp32 sums take 144 of the 255 registers of each of 256 threads; 640 spills
CHUNK = 1024  # tokens whose (CHUNK, V) gradient of the logits is alive at once: 96 MiB for V = 49,152
WAVES = 2  # programs for each multiprocessor: more waste less of the last wave, and keep more partial sums


# -- device code: T tokens, V vocabulary, D width; y the targets --


@triton.jit
def _logits(h, w, rows, cols, T, V, D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """(BT, BV) fp32 tile of h @ w.T; -inf in the columns past V."""
    tile = tl.zeros((BT, BV), dtype=tl.float32)
    for d in range(0, D, BD):
        inner = d + tl.arange(0, BD)
        a = tl.load(h + rows[:, None] * D + inner[None, :], (rows[:, None] < T) & (inner[None, :] < D), 0.0)
        b = tl.load(w + cols[:, None] * D + inner[None, :], (cols[:, None] < V) & (inner[None, :] < D), 0.0)
        tile = tl.dot(a, b.T, tile, input_precision="ieee")
    return tl.where(cols[None, :] < V, tile, float("-inf"))


@triton.jit(do_not_specialize=["T"])  # else a T divisible by 16, another T and T = 1 are compiled apart, in mid-run
def _logsumexp(
    h, w, y, lse, picked, T, V, per_split,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """lse, picked (splits, T) fp32: logsumexp of one split's logits, and the target's logit or -inf."""
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    target = tl.load(y + rows, rows < T, -1)
    start = tl.program_id(1) * per_split
    top = tl.full((BT,), float("-inf"), tl.float32)
    found = tl.full((BT,), float("-inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    for v in range(start, min(start + per_split, V), BV):
        cols = (v + tl.arange(0, BV)).to(tl.int64)
        z = _logits(h, w, rows, cols, T, V, D, BT, BV, BD)
        found = tl.maximum(found, tl.max(tl.where(cols[None, :] == target[:, None], z, float("-inf")), 1))
        new_top = tl.maximum(top, tl.max(z, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)
        top = new_top
    at = tl.program_id(1) * T + rows
    tl.store(lse + at, top + tl.log(total), rows < T)
    tl.store(picked + at, found, rows < T)


@triton.jit(do_not_specialize=["T"])
def _logsumexp_and_mean(
    h, w, y, lse, picked, mean, T, V, per_split,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
):  # fmt: skip
    """As `_logsumexp`, and mean (splits, T, D) fp32: sum_{v != y} p_v W_v over one split, p normalised within it.

    The width is cut into DA + DB, powers of two that Triton's tiles must be (576 = 512 + 64); DB may be 0. The target
    is left out of the sum and added by the caller as (1 - p_y) W_y: where p_y is near 1 the difference of two rounded
    products would be all error.
    """
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    target = tl.load(y + rows, rows < T, -1)
    start = tl.program_id(1) * per_split
    a, b = tl.arange(0, DA), DA + tl.arange(0, DB if DB > 0 else 16)
    h_a = tl.load(h + rows[:, None] * D + a[None, :], (rows[:, None] < T) & (a[None, :] < D), 0.0)
    sum_a = tl.zeros((BT, DA), tl.float32)
    if DB > 0:
        h_b = tl.load(h + rows[:, None] * D + b[None, :], (rows[:, None] < T) & (b[None, :] < D), 0.0)
        sum_b = tl.zeros((BT, DB), tl.float32)
    top = tl.full((BT,), float("-inf"), tl.float32)
    found = tl.full((BT,), float("-inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    for v in range(start, min(start + per_split, V), BV):
        cols = (v + tl.arange(0, BV)).to(tl.int64)
        w_a = tl.load(w + cols[:, None] * D + a[None, :], (cols[:, None] < V) & (a[None, :] < D), 0.0)
        z = tl.dot(h_a, w_a.T, input_precision="ieee")
        if DB > 0:
            w_b = tl.load(w + cols[:, None] * D + b[None, :], (cols[:, None] < V) & (b[None, :] < D), 0.0)
            z = tl.dot(h_b, w_b.T, z, input_precision="ieee")
        z = tl.where(cols[None, :] < V, z, float("-inf"))
        is_target = cols[None, :] == target[:, None]
        found = tl.maximum(found, tl.max(tl.where(is_target, z, float("-inf")), 1))
        new_top = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp(top - new_top)
        p = tl.exp(z - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        p = tl.where(is_target, 0.0, p).to(w_a.dtype)
        sum_a = tl.dot(p, w_a, sum_a * shrink[:, None], input_precision="ieee")
        if DB > 0:
            sum_b = tl.dot(p, w_b, sum_b * shrink[:, None], input_precision="ieee")
        top = new_top
    at = tl.program_id(1).to(tl.int64) * T + rows
    tl.store(lse + at, top + tl.log(total), rows < T)
    tl.store(picked + at, found, rows < T)
    tl.store(mean + at[:, None] * D + a[None, :], sum_a / total[:, None], (rows[:, None] < T) & (a[None, :] < D))
    if DB > 0:
        tl.store(mean + at[:, None] * D + b[None, :], sum_b / total[:, None], (rows[:, None] < T) & (b[None, :] < D))


@triton.jit(do_not_specialize=["T"])
def _logit_gradient(
    h, w, y, lse, upstream, out, T, V,
    D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out (T, V): upstream_t (onehot(y_t) - softmax(z_t)), in out's dtype."""
    rows = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    cols = (tl.program_id(1) * BV + tl.arange(0, BV)).to(tl.int64)
    target = tl.load(y + rows, rows < T, -1)
    scale = tl.load(upstream + rows, rows < T, 0.0)
    norm = tl.load(lse + rows, rows < T, 0.0)
    p = tl.exp(_logits(h, w, rows, cols, T, V, D, BT, BV, BD) - norm[:, None])
    gradient = (tl.where(cols[None, :] == target[:, None], 1.0, 0.0) - p) * scale[:, None]
    inside = (rows[:, None] < T) & (cols[None, :] < V)
    tl.store(out + rows[:, None] * V + cols[None, :], gradient.to(out.dtype.element_ty), inside)


# -- host code --


@dataclass(frozen=True)
class Tile:
    """A program's tokens and vocabulary entries at a time, the slice of D of each product, and its launch options."""

    tokens: int
    vocabulary: int
    width: int
    stages: int
    warps: int = 8


def tile(kernel: str, dtype: torch.dtype, major: int) -> Tile:
    """The tile of kernel "one_pass" or "logits" for compute capability `major`; none spills (benchmarks/kernels.py).

    Products of 64 tokens are the smallest that Hopper and data-centre Blackwell (9, 10) run at full rate; the others
    hold operands in registers too and may have 99 KiB of shared memory only (the one pass takes 74).
    """
    if dtype == torch.float32:  # no tensor cores at full precision: correct, not fast
        return Tile(16, 16, 0, 2) if kernel == "one_pass" else Tile(64, 64, 32, 3)
    large = major in (9, 10)
    if kernel == "one_pass":
        return Tile(64 if large else 32, 32, 0, 2)
    return Tile(128, 128, 64 if large else 32, 3)


def _parts(D: int) -> tuple[int, int]:
    """Two powers of two >= 16 (or the second 0) that cover D: 576 is 512 + 64."""
    first = max(16, 1 << (D.bit_length() - 1))
    return first, 0 if D <= first else max(16, 1 << (D - first - 1).bit_length())


def constants(kernel: str, D: int, t: Tile) -> dict[str, int]:
    """The compile-time arguments of a kernel of this kind of tile."""
    if kernel == "one_pass":
        first, second = _parts(D)
        return dict(D=D, BT=t.tokens, BV=t.vocabulary, DA=first, DB=second)
    return dict(D=D, BT=t.tokens, BV=t.vocabulary, BD=t.width)


def split(T: int, V: int, t: Tile, multiprocessors: int) -> tuple[int, int]:
    """(splits, vocabulary entries of each): enough programs for WAVES, none without an entry."""
    tiles = triton.cdiv(V, t.vocabulary)
    wanted = triton.cdiv(WAVES * multiprocessors, max(1, triton.cdiv(T, t.tokens)))
    per_split = triton.cdiv(tiles, min(tiles, wanted)) * t.vocabulary
    return triton.cdiv(V, per_split), per_split


def _chip(device: torch.device) -> tuple[int, int]:
    """(compute capability, multiprocessors); on the CPU the interpreter's, small so that splits are met there."""
    if device.type == "cpu":
        return 8, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(logps, logsumexp), each (T,) fp32."""
    (T, D), V = hidden.shape, len(weight)
    major, multiprocessors = _chip(hidden.device)
    t = tile("logits", weight.dtype, major)
    splits, per_split = split(T, V, t, multiprocessors)
    lse, picked = torch.empty((2, splits, T), dtype=torch.float32, device=hidden.device)
    _logsumexp[(triton.cdiv(T, t.tokens), splits)](
        hidden, weight, targets, lse, picked, T, V, per_split,
        **constants("logits", D, t), num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    total = lse.logsumexp(0)
    return picked.amax(0) - total, total


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        (T, D), V = hidden.shape, len(weight)
        major, multiprocessors = _chip(hidden.device)
        t = tile("one_pass", weight.dtype, major)
        splits, per_split = split(T, V, t, multiprocessors)
        lse, picked = torch.empty((2, splits, T), dtype=torch.float32, device=hidden.device)
        mean = torch.empty((splits, T, D), dtype=torch.float32, device=hidden.device)
        _logsumexp_and_mean[(triton.cdiv(T, t.tokens), splits)](
            hidden, weight, targets, lse, picked, mean, T, V, per_split,
            **constants("one_pass", D, t), num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
        total = lse.logsumexp(0)
        logps = picked.amax(0) - total
        mean = mean.mul_((lse - total).exp_()[..., None]).sum(0)
        gradient = weight[targets].float().mul_(-torch.expm1(logps)[:, None]).sub_(mean)
        ctx.save_for_backward(gradient.to(hidden.dtype))
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * grad_output[:, None]).to(gradient.dtype), None, None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        logps, lse = _log_probs(hidden, weight, targets)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.chunk = chunk
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        (T, D), V = hidden.shape, len(weight)
        t = tile("logits", weight.dtype, _chip(hidden.device)[0])
        grad_output = grad_output.contiguous()  # that of a plain sum has stride 0
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        buffer = weight.new_empty((min(T, ctx.chunk), V))
        for i in range(0, T, ctx.chunk):
            part = slice(i, min(i + ctx.chunk, T))
            rows = part.stop - i
            gradient = buffer[:rows]
            _logit_gradient[(triton.cdiv(rows, t.tokens), triton.cdiv(V, t.vocabulary))](
                hidden[part], weight, targets[part], lse[part], grad_output[part], gradient, rows, V,
                **constants("logits", D, t), num_warps=t.warps, num_stages=t.stages,
            )  # fmt: skip
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.T @ hidden[part]
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Log-probability of each target token, log softmax(hidden @ weight.T)[targets], for `hps.logps`.

    Args:
        hidden: (T, D), the states that predict the targets; cast to the weight's dtype.
        weight: (V, D) bf16 or fp32, the output head; it gets a gradient only if it requires one.
        targets: (T,) int64 in [0, V); a kernel cannot raise: the log-prob of one outside is -inf.
        chunk: tokens whose (chunk, V) gradient of the logits is alive at once; used by the recompute only.

    Returns:
        (T,) fp32 nats. Products of the weight's dtype, everything after them in fp32.
    """
    assert weight.dtype in (torch.bfloat16, torch.float32), f"no kernel for {weight.dtype}"
    hidden, weight, targets = hidden.to(weight.dtype).contiguous(), weight.contiguous(), targets.contiguous()
    with torch.cuda.device_of(hidden):  # a kernel starts on the current device, which need not be the tensors'
        if weight.requires_grad and torch.is_grad_enabled():
            return _Recompute.apply(hidden, weight, targets, chunk)
        if not (hidden.requires_grad and torch.is_grad_enabled()):
            return _log_probs(hidden, weight, targets)[0]
        if sum(_parts(hidden.shape[1])) <= WIDEST:
            return _OnePass.apply(hidden, weight, targets)
        return _Recompute.apply(hidden, weight, targets, chunk)


def why_not(weight: Tensor) -> str:
    """Why a head on a CUDA device is better served by the chunked path of `hps.logps`, or the empty string."""
    if weight.dtype != torch.bfloat16:
        return f"{weight.dtype} has no tensor cores at full precision"
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "bf16 products need compute capability 8.0"
    return ""
