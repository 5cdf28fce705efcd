"""The output head fused with its log-softmax for CUDA, in Triton: no (T, V) tensor.

The forward keeps the logsumexp of each token and nothing of its logits. The backward makes them again, `chunk` tokens
at a time, writes g (onehot - softmax) in the weight's dtype, and leaves the products with W and h to cuBLAS. Sums by
atomics would spare that buffer, but no two runs would agree in the last bit.

The vocabulary is cut into splits, so that few tokens still fill the chip; their partial results are joined in fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1024  # tokens whose (CHUNK, V) gradient of the logits is alive at once: 96 MiB for V = 49,152
WAVES = 2  # programs for each multiprocessor: more waste less of the last wave, and keep more partial sums


# -- device code: T tokens, V vocabulary, D width; BT, BV, BD of them at a time; y the targets --


@triton.jit
def _logits(h, w, rows, cols, T, V, D: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr):
    """(BT, BV) fp32 tile of h @ w.T; -inf in the columns past V. rows, cols int64: T V passes 2^31."""
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
        new_top = tl.maximum(top, tl.max(z, 1))  # finite: no split is without an entry, and `top` may be -inf
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(z - new_top[:, None]), 1)
        top = new_top
    at = tl.program_id(1) * T + rows
    tl.store(lse + at, top + tl.log(total), rows < T)
    tl.store(picked + at, found, rows < T)


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
    p = tl.exp(_logits(h, w, rows, cols, T, V, D, BT, BV, BD) - norm[:, None])  # 0 past V
    gradient = (tl.where(cols[None, :] == target[:, None], 1.0, 0.0) - p) * scale[:, None]
    inside = (rows[:, None] < T) & (cols[None, :] < V)
    tl.store(out + rows[:, None] * V + cols[None, :], gradient.to(out.dtype.element_ty), inside)


# -- host code --


def launch_options(D: int, dtype: torch.dtype, major: int) -> dict[str, int]:
    """What a kernel is compiled with for products of this dtype on compute capability `major`; none spills a register.

    BD is the slice of the width of each product. Hopper and data-centre Blackwell (9, 10) hold operands in shared
    memory; the others hold them in registers too and may have 99 KiB of shared memory only.
    """
    if dtype == torch.float32:  # no tensor cores at full precision: correct, not fast
        return dict(D=D, BT=64, BV=64, BD=32, num_warps=8, num_stages=3)
    return dict(D=D, BT=128, BV=128, BD=64 if major in (9, 10) else 32, num_warps=8, num_stages=3)


def split(T: int, V: int, options: dict[str, int], multiprocessors: int) -> tuple[int, int]:
    """(splits, vocabulary entries of each): enough programs for WAVES, none without an entry."""
    tiles = triton.cdiv(V, options["BV"])
    wanted = triton.cdiv(WAVES * multiprocessors, max(1, triton.cdiv(T, options["BT"])))
    per_split = triton.cdiv(tiles, min(tiles, wanted)) * options["BV"]
    return triton.cdiv(V, per_split), per_split


def _chip(device: torch.device) -> tuple[int, int]:
    """(compute capability, multiprocessors); on the CPU the interpreter's, small so that splits are met there."""
    if device.type == "cpu":
        return 8, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        (T, D), V = hidden.shape, len(weight)
        major, multiprocessors = _chip(hidden.device)
        options = launch_options(D, weight.dtype, major)
        splits, per_split = split(T, V, options, multiprocessors)
        # Each split's own logsumexp, and the target's logit from the one split that holds it, -inf from the others.
        lse, picked = torch.empty((2, splits, T), dtype=torch.float32, device=hidden.device)
        grid = (triton.cdiv(T, options["BT"]), splits)
        _logsumexp[grid](hidden, weight, targets, lse, picked, T, V, per_split, **options)
        total = lse.logsumexp(0)  # (T,) fp32
        ctx.save_for_backward(hidden, weight, targets, total)
        ctx.options, ctx.chunk = options, chunk
        return picked.amax(0) - total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        hidden, weight, targets, lse = ctx.saved_tensors
        T, V = len(hidden), len(weight)
        grad_output = grad_output.contiguous()  # that of a plain sum has stride 0
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        buffer = weight.new_empty((min(T, ctx.chunk), V))  # the gradient of the logits, one chunk after the other
        for i in range(0, T, ctx.chunk):
            part = slice(i, min(i + ctx.chunk, T))
            rows = part.stop - i
            gradient = buffer[:rows]
            grid = (triton.cdiv(rows, ctx.options["BT"]), triton.cdiv(V, ctx.options["BV"]))
            inputs = hidden[part], weight, targets[part], lse[part], grad_output[part]
            _logit_gradient[grid](*inputs, gradient, rows, V, **ctx.options)
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.T @ hidden[part]  # summed over chunks in fp32
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Log-probability of each target token, log softmax(hidden @ weight.T)[targets], for `hps.logps`.

    Args:
        hidden: (T, D), the states that predict the targets; cast to the weight's dtype.
        weight: (V, D) bf16 or fp32, the output head; it gets a gradient only if it requires one.
        targets: (T,) int64 in [0, V); a kernel cannot raise: the log-prob of one outside is -inf.
        chunk: tokens whose (chunk, V) gradient of the logits is alive at once.

    Returns:
        (T,) fp32 nats. Products of the weight's dtype, everything after them in fp32.
    """
    assert weight.dtype in (torch.bfloat16, torch.float32), f"no kernel for {weight.dtype}"
    hidden, weight, targets = hidden.to(weight.dtype).contiguous(), weight.contiguous(), targets.contiguous()
    with torch.cuda.device_of(hidden):  # a kernel starts on the current device, which need not be the tensors'
        return _FusedHead.apply(hidden, weight, targets, chunk)


def why_not(dtype: torch.dtype, device: torch.device) -> str:
    """Why a head on a CUDA device is better served by the chunked path of `hps.logps`, or the empty string."""
    if dtype != torch.bfloat16:
        return f"{dtype} has no tensor cores at full precision"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "bf16 products need compute capability 8.0"
    return ""
