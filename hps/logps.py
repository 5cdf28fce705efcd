"""Sequence log-probs from hidden states, without ever holding a (T, V) tensor.

Only positions that predict a response token reach the head, so prompts are free. On CUDA the Triton kernels of
`hps.kernels` serve bf16 heads; the chunked path here serves everything else.
"""

import functools
import logging
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits alive at once, (chunk, V): 24 MiB in fp32 on a CPU, which become exponentials and then their gradient in place.
# The whole head is read for every chunk: 16 MiB take 1.1 to 1.2 times as long (V = 49152 and 128256, two threads), and
# with 32 the libraries' buffers grow as well. A GPU wants more tokens in it still.
CHUNK_LOGITS = {"cpu": 3 * 2**21, "cuda": 2**25}


def chunk_for(vocabulary: int, device: str) -> int:
    """Scored tokens per chunk on a device type."""
    return max(1, min(1024, CHUNK_LOGITS[device] // vocabulary))


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """One chunk of tokens after the other: (which ones, logps (t,), exps (t, V), total (t,)), fp32. The softmax is
    exps / total.

    exps lie in the one buffer of all chunks: allocated anew for each, it cost several times.
    """
    buffer = torch.empty(min(chunk, len(targets)), len(weight), dtype=torch.float32, device=weight.device)
    for i in range(0, len(targets), chunk):
        part = slice(i, min(i + chunk, len(targets)))
        logits = buffer[: part.stop - i]
        if weight.dtype == torch.float32:
            torch.mm(hidden[part].float(), weight.T, out=logits)
        else:
            logits.copy_(hidden[part].to(weight.dtype) @ weight.T)
        logits -= logits.amax(dim=-1, keepdim=True)
        target = logits.gather(-1, targets[part, None]).squeeze(-1)  # before exp_ overwrites it
        exps = logits.exp_()
        total = exps.sum(dim=-1)
        yield part, target - total.log(), exps, total


def _logit_gradient(exps: Tensor, total: Tensor, targets: Tensor) -> Tensor:
    """d logp / d logits = onehot(target) - softmax, (t, V), in place of the exponentials."""
    gradient = exps.div_(-total[:, None])
    gradient[torch.arange(len(targets), device=targets.device), targets] += 1
    return gradient


class _FrozenHead(torch.autograd.Function):
    """The gradient to the hidden states is formed in the forward pass while the softmax is at hand, and scaled by
    the incoming (T,) gradient in the backward: two matrix products instead of three, nothing recomputed."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for part, logps, exps, total in _chunks(hidden, weight, targets, chunk):
            out[part] = logps
            if gradient is not None:
                gradient[part] = _logit_gradient(exps, total, targets[part]).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * grad_output[:, None]).to(gradient.dtype), None, None, None


class _TrainableHead(torch.autograd.Function):
    """The head's own gradient weighs tokens by the incoming gradient, which the forward does not know yet: the softmax
    of one chunk is kept for the backward, that of several is made there again."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        out = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        softmax: tuple[Tensor, ...] = ()
        for part, logps, exps, total in _chunks(hidden, weight, targets, chunk):
            out[part] = logps
            softmax = (exps, total) if len(targets) <= chunk else ()
        ctx.save_for_backward(hidden, weight, targets, *softmax)
        ctx.chunk = chunk
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        hidden, weight, targets, *softmax = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)  # summed in fp32
        kept = [(slice(0, len(targets)), None, *softmax)]
        for part, _, exps, total in kept if softmax else _chunks(hidden, weight, targets, ctx.chunk):
            gradient = _logit_gradient(exps, total, targets[part]).mul_(grad_output[part, None]).to(weight.dtype)
            grad_hidden[part] = gradient @ weight
            if weight.dtype == torch.float32:
                torch.addmm(grad_weight, gradient.T, hidden[part].float(), out=grad_weight)  # no second (V, D) tensor
            else:
                grad_weight += gradient.T @ hidden[part].to(weight.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), None, None


@functools.cache  # so that the log says it once
def _kernels_for(dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """hps.kernels if they serve heads of this dtype on this device, else None; the log says which path and why."""
    if device.type != "cuda":
        return None
    try:
        from hps import kernels  # Triton comes with torch for CUDA on Linux only

        reason = kernels.why_not(dtype, device)
    except ImportError:
        kernels, reason = None, "Triton is not installed"
    path = f"chunked, {reason}" if reason else "Triton kernels"
    logging.getLogger(__name__).info("output head: %s", path)
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
    if kernels := _kernels_for(weight.dtype, weight.device):
        return kernels.token_logps(hidden, weight, targets, chunk=chunk or kernels.CHUNK)
    trained = weight.requires_grad and torch.is_grad_enabled()
    if trained and len(targets) <= hidden.shape[1]:  # then all logits, (T, V), are no more than its gradient, (V, D)
        chunk = chunk or len(targets)
    head = _TrainableHead if trained else _FrozenHead
    return head.apply(hidden, weight, targets, chunk or chunk_for(len(weight), weight.device.type))


def sequence_logps(token_logps: Tensor, num_tokens: Tensor) -> Tensor:
    """Sum token log-probs (T,), response after response, into (B, K) fp32; num_tokens (B, K) int64, 0 where there is no
    response. Always in the same order, where adding by index would give other last digits in each run on CUDA."""
    # unsafe: without a look at the lengths, for which the device would be waited for.
    sums = torch.segment_reduce(token_logps, "sum", lengths=num_tokens.flatten(), initial=0, unsafe=True)
    return sums.view(num_tokens.shape).clone()  # FSDP's hook on a view is lost to whoever adds to it in place
