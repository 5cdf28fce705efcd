"""Attention over packed rows: no work between blocks, nor between the responses of one block.

A row is blocks of [prompt | y_1 | ... | y_K]. A token of y_k sees its prompt and its own response's past.
`packed_attention` stands in for transformers' own attention (`AttentionInterface`): on CUDA FlexAttention with the
block mask (`hps.attention_cuda`), on a CPU the calls of `hps.attention_cpu`. A model that does not hand the layout on,
or whose attention is more than a softmax, gets plain rows (hps.limits).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hps.packing import Packed

NAME = "hps_packed"  # of `packed_attention` among transformers' attention functions


def inputs(packed: Packed, *, heads: int) -> dict[str, Any]:
    """What a decoder's forward is called with for this micro-batch, and gives states for, its pads behind the rest.

    heads: attention heads per layer.
    """
    mask, more = None, {}  # of plain rows: the pads stand at the end, so no real token looks at them
    if not packed.causal:
        if packed.input_ids.is_cuda:
            from hps import attention_cuda

            packed = attention_cuda.padded(packed)
            more["packed_layout"] = attention_cuda.layout(packed)
        else:
            from hps import attention_cpu

            more["packed_layout"] = attention_cpu.layout(packed, heads)
        # transformers passes a 4-D mask on as it is; this one keeps it from making an (N, N) mask of its own.
        mask = torch.empty(1, 1, 1, 0, device=packed.input_ids.device)
    return dict(input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=mask, **more)


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
