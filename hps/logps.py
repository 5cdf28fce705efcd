"""Sequence log-probs from hidden states, without ever holding a (T, V) tensor.

Only positions that predict a response token reach the head, so prompts are free. On CUDA the Triton kernels of
`hps.kernels` serve bf16 heads; the chunked path here serves everything else, and the dense path is the oracle that
tests compare with.
"""

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hps import products

# Logits alive at once, (chunk, V): 24 MiB in fp32 on a CPU, which become exponentials and then their gradient in place.
# The whole head is read for every chunk: 16 MiB take 1.1 to 1.2 times as long (V = 49152 and 128256, two threads), and
# with 32 the libraries' buffers grow as well. A GPU wants more tokens in it still.
CHUNK_LOGITS = {"cpu": 3 * 2**21, "cuda": 2**25}


def dense_token_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[targets], (T,) fp32, the plain way. Arguments as `token_logps`."""
    logits = (hidden.to(weight.dtype) @ weight.T).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def chunk_for(vocabulary: int, device: str) -> int:
    """Scored tokens a chunk on a device type."""
    return max(1, min(1024, CHUNK_LOGITS[device] // vocabulary))


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
    """(t, V) fp32, in the first rows of `buffer` (chunk, V) fp32 if there is one. The product runs in the weight's
    dtype, or in fp32 where the CPU would emulate it."""
    if products.in_fp32(weight):
        logits = products.times_transposed(hidden, weight)
    elif buffer is not None and weight.dtype == torch.float32:
        return torch.mm(hidden.float(), weight.T, out=buffer[: len(hidden)])
    else:
        logits = hidden.to(weight.dtype) @ weight.T
    return logits.float() if buffer is None else buffer[: len(hidden)].copy_(logits)


def _buffer(weight: Tensor, rows: int) -> Tensor:
    """(rows, V) fp32 for the logits of one chunk after the other: allocated anew for each, they cost several times."""
    return torch.empty(rows, len(weight), dtype=torch.float32, device=weight.device)


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logps (t,), exps (t, V), total (t,)) of one chunk, fp32: the softmax is exps / total; exps are in `buffer`."""
    logits = _logits(hidden, weight, buffer)
    logits -= logits.amax(dim=-1, keepdim=True)
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    exps = logits.exp_()
    total = exps.sum(dim=-1)
    return target - total.log(), exps, total


def _logit_gradient(exps: Tensor, total: Tensor, targets: Tensor) -> Tensor:
    """d logp / d logits = onehot(target) - softmax, (t, V), in place of the exponentials."""
    gradient = exps.div_(-total[:, None])
    gradient[torch.arange(len(targets), device=targets.device), targets] += 1
    return gradient


def _to_hidden(gradient: Tensor, weight: Tensor) -> Tensor:
    """(t, D): the gradient of the logits (t, V) fp32 carried back through the head."""
    if products.in_fp32(weight):
        return products.times(gradient, weight)
    return gradient.to(weight.dtype) @ weight


class _FrozenHead(torch.autograd.Function):
    """The gradient to the hidden states is formed in the forward pass while the softmax is at hand, and scaled by
    the incoming (T,) gradient in the backward: two matrix products instead of three, nothing recomputed."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        buffer = _buffer(weight, min(chunk, len(targets)))
        for i in range(0, len(targets), chunk):
            part = slice(i, i + chunk)
            out[part], exps, total = _chunk(hidden[part], weight, targets[part], buffer)
            if gradient is not None:
                gradient[part] = _to_hidden(_logit_gradient(exps, total, targets[part]), weight)
        ctx.save_for_backward(gradient)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * grad_output[:, None]).to(gradient.dtype), None, None, None


class _TrainableHead(torch.autograd.Function):
    """The head's own gradient weighs tokens by the incoming gradient, which the forward does not know yet: each
    chunk's softmax is made again in the backward."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        buffer = _buffer(weight, min(chunk, len(targets)))
        for i in range(0, len(targets), chunk):
            part = slice(i, i + chunk)
            out[part] = _chunk(hidden[part], weight, targets[part], buffer)[0]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        hidden, weight, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        buffer = _buffer(weight, min(ctx.chunk, len(targets)))
        for i in range(0, len(targets), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            _, exps, total = _chunk(hidden[part], weight, targets[part], buffer)
            gradient = _logit_gradient(exps, total, targets[part]).mul_(grad_output[part, None]).to(weight.dtype)
            grad_hidden[part] = gradient @ weight
            grad_weight += gradient.T @ hidden[part].to(weight.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


@functools.cache
def _log_once(line: str) -> None:
    logging.getLogger(__name__).info(line)


@functools.cache
def _kernels() -> ModuleType | None:
    """hps.kernels where Triton, which comes with torch for CUDA on Linux only, can be imported."""
    try:
        from hps import kernels
    except ImportError:
        return None
    return kernels


def _kernels_for(weight: Tensor) -> ModuleType | None:
    """hps.kernels if it serves this head, else None; which one and why goes to the log once."""
    if not weight.is_cuda:
        return None
    kernels = _kernels()
    reason = kernels.why_not(weight) if kernels else "Triton is not installed"
    _log_once(f"output head: chunked, {reason}" if reason else "output head: Triton kernels")
    return None if reason else kernels


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None) -> Tensor:
    """Log-probability of each target token, log softmax(hidden @ weight.T)[targets], without a (T, V) tensor.

    Args:
        hidden: (T, D), the states that predict the targets.
        weight: (V, D), the output head; it gets a gradient only if it requires one.
        targets: (T,) int64.
        chunk: tokens whose (chunk, V) logits are alive at once; None is the path's own choice.

    Returns:
        (T,) fp32 nats; log-softmax in fp32 whatever the dtype of the product.
    """
    if kernels := _kernels_for(weight):
        return kernels.token_logps(hidden, weight, targets, chunk=chunk or kernels.CHUNK)
    head = _TrainableHead if weight.requires_grad and torch.is_grad_enabled() else _FrozenHead
    return head.apply(hidden, weight, targets, chunk or chunk_for(len(weight), weight.device.type))


def sequence_logps(token_logps: Tensor, sequence: Tensor, shape: torch.Size) -> Tensor:
    """Sum token log-probs (T,) into (B, K) fp32 by `sequence` = b * K + k; columns without tokens are 0."""
    total = token_logps.new_zeros(shape.numel())
    return total.index_add(0, sequence, token_logps).view(shape)


def token_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """Exact next-token KL(policy || reference) at each position, (T,) fp32 nats >= 0; no gradient.

    Args:
        hidden, ref_hidden: (T, D) states of the two models at the same positions. weight, ref_weight: (V, D) heads.
    """
    kl = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    chunk = chunk_for(len(weight), weight.device.type)
    with torch.no_grad():
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logps = torch.log_softmax(_logits(hidden[part], weight), dim=-1)
            ref = torch.log_softmax(_logits(ref_hidden[part], ref_weight), dim=-1)
            kl[part] = (logps.exp() * (logps - ref)).sum(-1)
    return kl.clamp(min=0)  # rounding may leave -1e-8 where the two agree
