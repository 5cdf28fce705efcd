"""Attention over packed rows: no work between blocks, nor between the responses of one block.

A row is blocks of [prompt | y_1 | ... | y_K], behind what all prompts begin with, if that is laid out once. A token of
y_k sees the start, its prompt and its own response's past. `packed_attention` stands in for transformers' own attention
(`AttentionInterface`): on CUDA FlexAttention with the block mask, on a CPU the calls of `hps.attention_cpu`. A model
that does not hand the layout on, or whose attention is more than a softmax, gets plain rows (hps.limits).
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hps.packing import Packed

NAME = "hps_packed"  # of `packed_attention` among transformers' attention functions


def may_attend(packed: Packed) -> Callable[..., Tensor]:
    """The rule, as FlexAttention asks for it: (batch, head, query, key) indices -> bool.

    A token sees earlier tokens of its own block that belong to the prompt or to its own response.
    """
    block, segment = packed.block[0], packed.segment[0]

    def rule(_batch, _head, q, k):
        return (q >= k) & (block[q] == block[k]) & ((segment[k] == 0) | (segment[k] == segment[q]))

    return rule


def inputs(packed: Packed, *, heads: int) -> dict[str, Any]:
    """What a decoder's forward is called with for this micro-batch. heads: attention heads per layer."""
    if packed.causal:  # the pads stand at the end of a row, so no real token looks at them
        return {"attention_mask": None}
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
        ValueError: there should be a layout and it did not get here, or the model asks for more than a softmax.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if more := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ValueError(f"{type(module).__name__} asks for {', '.join(more)}")
    if packed_layout is not None:
        return packed_layout(query, key, value, scaling).transpose(1, 2), None
    if attention_mask is not None and attention_mask.numel() == 0:
        raise ValueError(f"{type(module).__name__} got no packed layout: the model does not pass it on")
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def install(lm: Any) -> bool:
    """Make `packed_attention` the attention of a transformers model, in place; False where it only takes its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return put(lm, NAME)


def put(lm: Any, name: str = "") -> bool:
    """Set a transformers model's attention by its name, by default to its own; whether it has it then."""
    name = name or ("sdpa" if lm._supports_sdpa else "eager")
    if lm.config._attn_implementation != name and lm._can_set_attn_implementation():
        lm.set_attn_implementation(name)
    return lm.config._attn_implementation == name


@contextmanager
def instead(lm: Any, name: str) -> Iterator[None]:
    """A transformers model with another attention for a while, if it can have one."""
    before = lm.config._attn_implementation
    put(lm, name)
    try:
        yield
    finally:
        put(lm, before)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(packed: Packed, attend: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """FlexAttention; `attend` is its compiled form unless given (uncompiled it holds the (N, N) scores)."""
    from torch.nn.attention.flex_attention import create_block_mask

    N, device = packed.input_ids.shape[1], packed.input_ids.device
    mask = create_block_mask(may_attend(packed), None, None, N, N, device=device)
    return lambda query, key, value, scaling: (attend or _compiled_flex())(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=True
    )
