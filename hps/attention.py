"""Attention over packed rows: no work between blocks, nor between the responses of one block.

A row is blocks of [prompt | y_1 | ... | y_K]. A token of y_k sees the prompt and its own response's past; the first
response simply continues the prompt, so [prompt | y_1] is one causal sequence. What all prompts begin with may lie once
before the blocks, and is seen by all tokens. `packed_attention` stands in for transformers' own attention
(`AttentionInterface`) and serves a row in one of three ways:

    blockwise  CPU: every causal stretch by itself, and y_2..y_K against the prompt, merged by their log-sum-exp
    padded     CPU, many short responses: one batched call for all of them, each over [a copy of the prompt | itself]
    flex       CUDA: FlexAttention with the block mask

A model that does not hand the layout on to its attention gets the dense mask instead (model.check_paths_agree).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from hps.packing import Packed

NAME = "hps_packed"  # of `packed_attention` among transformers' attention functions

# What a call costs beside its work, in entries of the score matrix: about .18 ms for forward and backward against
# 20 ns an entry (one thread). So a hundred short responses go into one padded call, long ones each into their own.
CALL = 9_000


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
        heads: attention heads a layer. dense: for models that cannot take the layout.
    """
    if packed.causal or dense:
        return {"attention_mask": block_mask(packed)}
    # transformers passes a 4-D mask on as it is; this one keeps it from making an (N, N) mask of its own.
    mask = torch.empty(1, 1, 1, 0, device=packed.input_ids.device)
    return {"attention_mask": mask, "packed_layout": _layout(packed, heads)}


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


def _layout(packed: Packed, heads: int) -> Callable[..., Tensor]:
    """The function of (query, key, value, scaling) that serves this row, its plan made once for all layers."""
    if packed.input_ids.is_cuda:
        return _flex(packed)
    S, N = packed.prefix, packed.input_ids.shape[1]
    longest = S + max(P for P, _ in packed.spans)
    widest = max(max(lengths) for _, lengths in packed.spans)
    sequences = sum(len(lengths) for _, lengths in packed.spans)
    padded = len(packed.spans) * longest**2 + sequences * widest * (longest + widest)
    exact = S * N + sum((P + L[0]) ** 2 + sum(y * (P + y) for y in L[1:]) for P, L in packed.spans)
    calls = 2 * (S > 0) + sum(len(lengths) + (len(lengths) > 1) for _, lengths in packed.spans)
    return _Padded(packed) if heads * padded < heads * exact + CALL * calls else _blockwise(packed)


# -- blockwise --

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _blockwise(packed: Packed) -> Callable[..., Tensor]:
    causal: list[slice] = []  # stretches that see only their own past
    cross: list[tuple[slice, slice]] = []  # (queries y_2..y_K of a block, keys of its prompt), added to those
    at = packed.prefix
    if at:
        causal.append(slice(0, at))
        cross.append((slice(at, packed.input_ids.shape[1]), slice(0, at)))
    for P, (first, *others) in packed.spans:
        prompt, at = slice(at, at + P), at + P + first
        causal.append(slice(prompt.start, at))
        begin = at
        for length in others:
            causal.append(slice(at, at + length))
            at += length
        if others:
            cross.append((slice(begin, at), prompt))

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        return _Blockwise.apply(query, key, value, scaling, causal, cross)

    return attend


class _Blockwise(torch.autograd.Function):
    """Partial attentions merged by their log-sum-exp. The backward of each part is that of flash attention with the
    merged output and log-sum-exp in place of the part's own: then its weights are the merged softmax's."""

    @staticmethod
    def forward(ctx, query, key, value, scaling, causal, cross):
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        for x in causal:
            out[:, :, x], lse[:, :, x] = _forward(
                query[:, :, x], key[:, :, x], value[:, :, x], 0.0, True, scale=scaling
            )
        for q, k in cross:
            other, other_lse = _forward(query[:, :, q], key[:, :, k], value[:, :, k], 0.0, False, scale=scaling)
            share = torch.sigmoid(other_lse - lse[:, :, q]).unsqueeze(-1)  # exp(other) / (exp(other) + exp(own))
            out[:, :, q] = torch.lerp(out[:, :, q].float(), other.float(), share).to(out.dtype)
            lse[:, :, q] = torch.logaddexp(lse[:, :, q], other_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.parts = scaling, causal, cross
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        scaling, causal, cross = ctx.parts
        grads = [torch.empty_like(x) for x in (query, key, value)]

        def part(q: slice, k: slice, is_causal: bool):
            return _backward(
                grad[:, :, q], query[:, :, q], key[:, :, k], value[:, :, k], out[:, :, q], lse[:, :, q], 0.0,
                is_causal, scale=scaling,
            )  # fmt: skip

        for x in causal:
            for whole, own in zip(grads, part(x, x, True), strict=True):
                whole[:, :, x] = own
        for q, k in cross:
            for whole, own, x in zip(grads, part(q, k, False), (q, k, k), strict=True):
                whole[:, :, x] += own
        return *grads, None, None, None


# -- padded --


class _Padded:
    """Prompts in one causal call, responses in another, each over [its prompt | itself], padded to the longest."""

    def __init__(self, packed: Packed):
        B, S = len(packed.spans), sum(len(lengths) for _, lengths in packed.spans)
        start = np.arange(packed.prefix)  # every prompt takes it along; its own results are those of the first one
        P = len(start) + max(P for P, _ in packed.spans)
        L = max(max(lengths) for _, lengths in packed.spans)
        prompts, queries = np.zeros((B, P), dtype=np.int64), np.zeros((S, L), dtype=np.int64)  # 0 on pads
        shared, prompt_length = np.zeros((S, P), dtype=np.int64), np.zeros(S, dtype=np.int64)
        back = [start]  # where each packed token stands in the concatenated results
        at, s = len(start), 0
        for b, (own, responses) in enumerate(packed.spans):
            length = len(start) + own
            prompts[b, :length] = np.concatenate([start, np.arange(at, at + own)])
            back.append(b * P + np.arange(len(start), length))
            at += own
            for n in responses:
                queries[s, :n] = np.arange(at, at + n)
                shared[s], prompt_length[s] = prompts[b], length
                back.append(B * P + s * L + np.arange(n))
                at, s = at + n, s + 1
        prompt_keys = np.broadcast_to((np.arange(P) < prompt_length[:, None])[:, None], (S, L, P))
        own_keys = np.broadcast_to(np.tril(np.ones((L, L), dtype=bool)), (S, L, L))
        self.prompts, self.queries = torch.from_numpy(prompts), torch.from_numpy(queries)
        self.keys = torch.from_numpy(np.concatenate([shared, queries], axis=1))
        self.mask = torch.from_numpy(np.concatenate([prompt_keys, own_keys], axis=2))[:, None]  # (S, 1, L, P + L)
        self.back = torch.from_numpy(np.concatenate(back))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rows = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)]  # (N, heads * Dh) each
        Dh = query.shape[-1]

        def gather(x: Tensor, index: Tensor) -> Tensor:  # -> (batch, heads, length, Dh)
            return x.index_select(0, index.flatten()).view(*index.shape, -1, Dh).transpose(1, 2)

        def attend(q: Tensor, k: Tensor, **mask: Any) -> Tensor:
            parts = gather(rows[0], q), gather(rows[1], k), gather(rows[2], k)
            out = scaled_dot_product_attention(*parts, scale=scaling, enable_gqa=True, **mask)
            return out.transpose(1, 2).reshape(-1, rows[0].shape[1])

        out = torch.cat([attend(self.prompts, self.prompts, is_causal=True),
                         attend(self.queries, self.keys, attn_mask=self.mask)])  # fmt: skip
        return out.index_select(0, self.back).view(1, -1, query.shape[1], Dh).transpose(1, 2)


# -- flex --


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _flex(packed: Packed, attend: Callable[..., Tensor] | None = None) -> Callable[..., Tensor]:
    """FlexAttention; `attend` is its compiled form unless given (uncompiled it holds the (N, N) scores)."""
    from torch.nn.attention.flex_attention import create_block_mask

    N, device = packed.input_ids.shape[1], packed.input_ids.device
    mask = create_block_mask(_may_attend(packed), None, None, N, N, device=device)
    return lambda query, key, value, scaling: (attend or _compiled_flex())(
        query, key, value, block_mask=mask, scale=scaling, enable_gqa=True
    )
