"""Attention over packed rows on a CPU, for `hps.attention`, which says what may see what.

blockwise  every causal stretch by itself, and y_2..y_K against the prompt, merged by their log-sum-exp
padded     many short responses: one batched call for y_2..y_K, each over [a copy of the prompt | itself]
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from hps.packing import Packed

# What a call costs beside its work, in entries of the score matrix: about 0.18 ms for forward and backward against 20
# ns per entry (one thread). So a hundred short responses go into one padded call, long ones each into their own.
ENTRIES_PER_CALL = 9_000


def layout(packed: Packed, heads: int) -> Callable[..., Tensor]:
    """The function of (query, key, value, scaling) that serves this row, its plan made once for all layers."""
    return padded(packed) if padding_pays(packed, heads) else blockwise(packed)


def padding_pays(packed: Packed, heads: int) -> bool:
    """Whether on a CPU the pads of two calls cost less than the calls that do without them."""
    parts = _parts(packed)
    exact = sum((q.stop - q.start) * (k.stop - k.start) / (1 + causal) for q, k, causal in parts)
    prompt, first = max(P for P, _ in packed.spans), max(P + lengths[0] for P, lengths in packed.spans)
    others = [n for _, lengths in packed.spans for n in lengths[1:]]
    longest = max(others, default=0)
    padded = len(packed.spans) * first**2 / 2 + len(others) * longest * (prompt + longest)
    return heads * (padded - exact) < ENTRIES_PER_CALL * (len(parts) - 4)  # what is gathered for it is worth some calls


# -- blockwise: no pads, many calls --

# torch's own flash attention on CPUs, below autograd: only here does it give, and take, the log-sum-exp (1, H, N).
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _parts(packed: Packed) -> list[tuple[slice, slice, bool]]:
    """(queries, keys, is causal) of each call. Causal stretches, which see their own past, cover the row and come
    first; then what their tokens see beside it: y_2..y_K their prompt."""
    causal, beside, at = [], [], 0
    for P, lengths in packed.spans:
        prompt, second = slice(at, at + P), at + P + lengths[0]
        for length in (P + lengths[0], *lengths[1:]):  # the first response simply goes on
            causal.append((slice(at, at + length), slice(at, at + length), True))
            at += length
        if at > second:
            beside.append((slice(second, at), prompt, False))
    return causal + beside


def blockwise(packed: Packed) -> Callable[..., Tensor]:
    parts = _parts(packed)
    return lambda query, key, value, scaling: _Blockwise.apply(query, key, value, scaling, parts)


class _Blockwise(torch.autograd.Function):
    """Partial attentions merged by their log-sum-exp. The backward of each part is that of flash attention with the
    merged output and log-sum-exp in place of the part's own: then its weights are the merged softmax's."""

    @staticmethod
    def forward(ctx, query, key, value, scaling, parts):
        out = torch.empty_like(query)
        lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        for q, k, causal in parts:
            part, part_lse = _forward(query[:, :, q], key[:, :, k], value[:, :, k], 0.0, causal, scale=scaling)
            if causal:
                out[:, :, q], lse[:, :, q] = part, part_lse
            else:
                share = torch.sigmoid(part_lse - lse[:, :, q]).unsqueeze(-1)  # exp(part) / (exp(part) + exp(so far))
                out[:, :, q] = torch.lerp(out[:, :, q].float(), part.float(), share).to(out.dtype)
                lse[:, :, q] = torch.logaddexp(lse[:, :, q], part_lse)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scaling, ctx.parts = scaling, parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        query, key, value, out, lse = (x.float() for x in ctx.saved_tensors)  # torch's bf16 backward is 2 to 6 x slower
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for q, k, causal in ctx.parts:
            inputs = query[:, :, q], key[:, :, k], value[:, :, k], out[:, :, q], lse[:, :, q]
            found = _backward(grad[:, :, q].float(), *inputs, 0.0, causal, scale=ctx.scaling)
            for whole, part, x in zip(grads, found, (q, k, k), strict=True):
                if causal:  # the first to write there
                    whole[:, :, x] = part
                else:
                    whole[:, :, x] += part
        return *grads, None, None


# -- padded: two calls, with pads --


def padded(packed: Packed) -> Callable[..., Tensor]:
    """Prompts with their first responses in one causal call, the other responses in a second, each over [its prompt |
    itself], all padded to the longest."""
    N, segment = packed.input_ids.shape[1], packed.segment[0]
    at = torch.arange(N)
    # Which packed token stands where in each call, (prompts or responses, longest); N on pads, so that a token sees the
    # keys up to its own index, pads (or softmax would be NaN there) see anything, and nobody else sees a pad.
    begins = at[segment <= 1].split([P + lengths[0] for P, lengths in packed.spans])
    first = pad_sequence(begins, batch_first=True, padding_value=N)
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = [(first, first, {"is_causal": True})]
    if others := [n for _, lengths in packed.spans for n in lengths[1:]]:
        owner = torch.tensor([b for b, (_, lengths) in enumerate(packed.spans) for _ in lengths[1:]])
        prompts = [begin[:P] for begin, (P, _) in zip(begins, packed.spans, strict=True)]
        queries = pad_sequence(at[segment > 1].split(others), batch_first=True, padding_value=N)
        keys = torch.cat([pad_sequence(prompts, batch_first=True, padding_value=N)[owner], queries], dim=1)
        calls.append((queries, keys, {"attn_mask": (keys[:, None] <= queries[:, :, None])[:, None]}))
    # Where the result of each packed token is among those of all calls.
    there = torch.cat([queries.flatten() for queries, _, _ in calls])
    back = torch.empty(N + 1, dtype=torch.int64).index_put_((there,), torch.arange(len(there)))[:N]
    calls = [(queries.clamp(max=N - 1), keys.clamp(max=N - 1), how) for queries, keys, how in calls]

    def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        rows = [x[0].transpose(0, 1).flatten(1) for x in (query, key, value)]  # (N, heads * Dh) each
        Dh = query.shape[-1]

        def gather(x: Tensor, index: Tensor) -> Tensor:  # -> (batch, heads, length, Dh)
            return x.index_select(0, index.flatten()).view(*index.shape, -1, Dh).transpose(1, 2)

        def call(q: Tensor, k: Tensor, **how: Any) -> Tensor:
            parts = gather(rows[0], q), gather(rows[1], k), gather(rows[2], k)
            out = scaled_dot_product_attention(*parts, scale=scaling, enable_gqa=True, **how)
            return out.transpose(1, 2).reshape(-1, rows[0].shape[1])

        out = torch.cat([call(queries, keys, **how) for queries, keys, how in calls])
        return out.index_select(0, back).view(1, -1, query.shape[1], Dh).transpose(1, 2)

    return attend
