"""Attention over packed rows on CUDA, for `hps.attention`: FlexAttention, compiled once for rows of all lengths."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hps.packing import Packed

BLOCK = 128  # tokens; the mask is made of such squares, and the tiles of the kernels divide them
SMALL = 99 * 1024  # bytes of shared memory that a program may have on compute capabilities 8.6, 8.9 and 12.0


def may_attend(packed: Packed) -> Callable[..., Tensor]:
    """The rule, as FlexAttention asks for it: (batch, head, query, key) indices -> bool.

    A token sees earlier tokens of its own block that belong to the prompt or to its own response.
    """
    block, segment = packed.block[0], packed.segment[0]

    def rule(_batch, _head, q, k):
        return (q >= k) & (block[q] == block[k]) & ((segment[k] == 0) | (segment[k] == segment[q]))

    return rule


def padded(packed: Packed) -> Packed:
    """The row with pads behind it, up to a multiple of BLOCK tokens, and two blocks at least; they see each other only.

    What is compiled for such rows serves all lengths: a ragged end and a single block would each be one more graph, and
    less than 128 queries have another kernel, that for decoding.
    """
    N = packed.input_ids.shape[1]
    more = (0, max(2 * BLOCK, -(-N // BLOCK) * BLOCK) - N)
    pads = {"input_ids": 0, "position_ids": 0, "block": -1, "segment": 0}
    return replace(packed, **{key: F.pad(getattr(packed, key), more, value=pads[key]) for key in pads})


def layout(packed: Packed, backend: str = "inductor") -> Callable[..., Tensor]:
    """The function of (query, key, value, scaling) that serves this `padded` row; backend: of torch.compile."""
    from torch.nn.attention.flex_attention import create_block_mask

    N, device = packed.input_ids.shape[1], packed.input_ids.device
    mask = create_block_mask(may_attend(packed), None, None, N, N, device=device, BLOCK_SIZE=BLOCK)

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        # Equal sizes would be taken for one: a first row of as many blocks as there are key heads would serve no other.
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            return _compiled(backend)(query, key, value, mask, scaling, tiles(query.shape[-1], query.dtype, device))

    return attend


@functools.cache
def tiles(Dh: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Tiles of the kernels for heads of this width where torch's own need more shared memory than the chip has."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin > SMALL:
        return {}
    if dtype == torch.float32:
        return dict(fwd_BLOCK_M=32, fwd_BLOCK_N=16, fwd_num_stages=2)
    if Dh <= 128:
        return {}
    back = dict(bwd_BLOCK_M1=32, bwd_BLOCK_N1=64, bwd_BLOCK_M2=64, bwd_BLOCK_N2=32, bwd_num_stages=1)
    return dict(fwd_BLOCK_M=64, fwd_BLOCK_N=32, fwd_num_stages=2, **back)


@functools.cache
def _compiled(backend: str) -> Callable[..., Tensor]:
    return torch.compile(_flex, dynamic=True, fullgraph=True, backend=backend)


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, options: dict[str, int]) -> Tensor:
    """What is compiled. Uncompiled FlexAttention would hold the (heads, N, N) scores, so it is never run that way."""
    from torch.nn.attention.flex_attention import flex_attention

    if not torch.compiler.is_compiling():
        raise ValueError("packed rows on a GPU need torch.compile: unset TORCH_COMPILE_DISABLE, TORCHDYNAMO_DISABLE")
    torch._check(query.shape[2] % BLOCK == 0)  # known, it spares the kernel all looks for a ragged end
    how: Any = dict(kernel_options=options, scale=scaling, enable_gqa=True)
    return flex_attention(query, key, value, block_mask=mask, **how)
