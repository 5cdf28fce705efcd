"""Products with frozen bf16 weights on CPUs without bf16 instructions, where torch emulates them several times slower
than fp32: there each weight is read as fp32, a part at a time, and the result is rounded once."""

import functools

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

PART = 2**22  # numbers of a weight that are fp32 at a time: 16 MiB


@functools.cache
def bf16_is_emulated() -> bool:
    """Whether this CPU has no fast bf16 products: oneDNN wants AVX-512, or its like, for them."""
    return not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def in_fp32(factor: Tensor) -> bool:
    """Whether products with this weight, or query, should be made in fp32."""
    return factor.dtype == torch.bfloat16 and factor.device.type == "cpu" and bf16_is_emulated()


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., in) @ weight (out, in).T in fp32, (..., out)."""
    x, parts = x.float(), weight.split(max(1, PART // weight.shape[1]))
    products = [x @ part.float().T for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., out) @ weight (out, in) in fp32, (..., in)."""
    rows = max(1, PART // weight.shape[1])
    first, *others = (a.float() @ part.float() for a, part in zip(x.split(rows, dim=-1), weight.split(rows)))
    for product in others:
        first += product
    return first


class _Linear(torch.autograd.Function):
    """x W^T + b with a frozen W: forward and backward keep W alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        y = times_transposed(x, weight)
        return (y if bias is None else y.add_(bias)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        return times(grad, weight).to(grad.dtype), None, None


def use_fp32_products(lm: nn.Module) -> nn.Module:
    """Let the linear layers of a bf16 model multiply as above where that pays, in place; others are left alone."""
    for module in lm.modules():
        if type(module) is nn.Linear and in_fp32(module.weight):
            module.forward = functools.partial(_forward, module)
    return lm


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    if module.weight.requires_grad or not in_fp32(module.weight):
        return linear(x, module.weight, module.bias)
    return _Linear.apply(x, module.weight, module.bias)
