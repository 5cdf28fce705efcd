"""Attention over packed rows: no work between blocks, nor between the responses of one block.

A row is blocks of [prompt | y_1 | ... | y_K], behind what all prompts begin with, if that is laid out once. A token of
y_k sees the start, its prompt and its own response's past. `packed_attention` stands in for transformers' own attention
(`AttentionInterface`): on CUDA FlexAttention with the block mask, on a CPU the calls of `hps.attention_cpu`. A model
that does not hand the layout on to its attention gets the dense mask instead (model.check_paths_agree).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hps.packing import Packed

NAME = "hps_packed"  # of `packed_attention` among transformers' attention functions


class LayoutLost(ValueError):
    """The model does not hand `packed_layout` on to its attention."""


def block_mask(packed: Packed) -> Tensor | None:
    """The dense mask of packed rows, (R, 1, N, N) bool, True where query (row) may attend to key (column).

    A token sees earlier tokens of its own block that belong to the prompt or to its own response, and the start that
    all prompts share. None where plain causal is enough: the pads stand at the end of a row, so no real token looks at
    them.
    """
    if packed.causal:
        return None
    at = torch.arange(packed.input_ids.shape[1], device=packed.input_ids.device)
    return _may_attend(packed)(0, 0, at[:, None], at)[None, None]


def _may_attend(packed: Packed) -> Callable[..., Tensor]:
    """The rule, as FlexAttention asks for it: (batch, head, query, key) indices -> bool."""
    block, segment, shared = packed.block[0], packed.segment[0], len(packed.spans)

    def rule(_batch, _head, q, k):
        own = (block[q] == block[k]) & ((segment[k] == 0) | (segment[k] == segment[q]))
        return (q >= k) & (own | (block[k] == shared))

    return rule


def inputs(packed: Packed, *, heads: int, dense: bool = False) -> dict[str, Any]:
    """What a decoder's forward is called with for this micro-batch.

    Args:
        heads: attention heads per layer. dense: for models that cannot take the layout.
    """
    if packed.causal or dense:
        return {"attention_mask": block_mask(packed)}
    # transformers passes a 4-D mask on as it is; this one keeps it from making an (N, N) mask of its own.
    mask = torch.empty(1, 1, 1, 0, device=packed.input_ids.device)
    if packed.input_ids.is_cuda:
        layout = flex(packed)
    else:
        from hps import attention_cpu

        layout = attention_cpu.layout(packed, heads)
    return {"attention_mask": mask, "packed_layout": layout}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packed_layout: Callable[..., Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row; without a layout transformers' own `sdpa`, for padded batches and generation.

    Args:
        query: (1, H, N, Dh). key, value: (1, G, N, Dh), H a multiple of G.

    Returns:
        (1, N, H, Dh), and no weights.

    Raises:
        LayoutLost: there should be a layout, and it did not get here.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if packed_layout is not None:
        return packed_layout(query, key, value, scaling).transpose(1, 2), None
    if attention_mask is not None and attention_mask.numel() == 0:
        raise LayoutLost(f"{type(module).__name__} got no packed layout: the model does not pass it on")
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def install(lm: nn.Module) -> None:
    """Make `packed_attention` the attention of a transformers model, in place."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    lm.set_attn_implementation(NAME)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(packed: Packed, attend: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """FlexAttention; `attend` is its compiled form unless given (uncompiled it holds the (N, N) scores)."""
    from torch.nn.attention.flex_attention import create_block_mask

    N, device = packed.input_ids.shape[1], packed.input_ids.device
    mask = create_block_mask(_may_attend(packed), None, None, N, N, device=device)
    return lambda query, key, value, scaling: (attend or _compiled_flex())(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=True
    )
