"""What a model can take: positions and window, and whether packed rows give its responses what its own forward gives.

`check` tries it on a few tokens, once a run. A model that packed rows cannot serve gets plain ones: one response per
row with its whole prompt, by the model's own attention and its own logits.
"""

import logging
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hps import attention, dist, loading
from hps.model import decoder_of, states, unwrapped
from hps.packing import Block, Packed, pack

# Tokens that are compared of the longest prompt with its response: below 128 attention has kernels for decoding, and on
# a CPU another way than for texts.
PROBE_TOKENS = 144
MIDDLE = (1, 1)  # the response whose gradient is looked at, between two others, behind another prompt
BF16_TOLERANCE = 0.02  # share of a value that rounding to bf16 may move


def positions(config: Any) -> float:
    """Tokens that prompt and response may have together, by a model's config; of a composite model its text's."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    rope = getattr(text, "rope_parameters", None) or {}
    for one in (rope, *(x for x in rope.values() if isinstance(x, dict))):
        # Beyond its first length the rotation of all rows depends on the longest one beside them.
        if one.get("rope_type") in ("dynamic", "longrope"):
            found.append(one.get("original_max_position_embeddings"))
    return min(filter(None, found), default=math.inf)


def window(config: Any) -> float:
    """Tokens that a layer looks back at most, by a model's config; infinite where all layers see everything."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    sliding = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    some = {"sliding": sliding, "chunked": getattr(text, "attention_chunk_size", None)}
    used = [n for kind, n in some.items() if n and (kinds is None or any(kind in str(k) for k in kinds))]
    return min(used, default=math.inf)


def check(model: Any, *, longest: float = math.inf, share_prompt: bool = True, ranks: dist.Ranks | None = None) -> None:
    """Set `padded` of a policy or reward model, with a line in the log, where packed rows cannot serve it. Collective,
    and the same on all `ranks`, where they are given: as a model that is sharded needs it.

    Catches what would make every number silently wrong: capped or scaled logits, a head bias, a window, layers that
    carry a sibling's tokens along, positions that do not restart.

    Args:
        longest: tokens of the longest prompt with one response. share_prompt: whether prompts are laid out once.

    Raises:
        ValueError: the model has fewer positions, or gets wrong values from plain rows too.
    """
    lm = unwrapped(model.lm)
    name, limit, reach = type(lm).__name__, positions(lm.config), window(lm.config)
    if math.inf > longest > limit:
        raise ValueError(f"a row has {longest} tokens, the model {limit} positions: set --max_length {limit}")
    if model.padded:
        reason = "it takes no attention but its own"
    elif longest > reach:
        reason = f"rows may be longer than its window of {reach} tokens"
    else:
        reason = _wrong(model, min(longest, limit), share_prompt=share_prompt, ranks=ranks)
    if reason:
        model.padded = True
        attention.put(lm)
        if wrong := _wrong(model, min(longest, limit), share_prompt=False, ranks=ranks):
            raise ValueError(f"{name} cannot be trained or scored here: {wrong}")
        how = "one response per row by its own forward, slower and with more memory"
        logging.getLogger(__name__).warning("%s cannot take packed rows (%s): %s", name, reason, how)


def _wrong(model: Any, longest: float, *, share_prompt: bool, ranks: dist.Ranks | None) -> str:
    """What is wrong on any rank with a model's values as it is set up, or nothing, on a few tokens, `longest` per row
    at most."""
    found = _wrong_here(model, longest, share_prompt=share_prompt)
    if hasattr(model, "reset_iter_state"):  # FSDP is left in the midst of a pass where one fails, and gathered anyway
        model.reset_iter_state()
    return next(filter(None, dist.gather(found, ranks)), "")


def _wrong_here(model: Any, longest: float, *, share_prompt: bool) -> str:
    parameter = next(model.parameters())
    try:
        blocks = probe(model, tokens=int(min(PROBE_TOKENS, longest)))
        packed = pack(blocks, pad_id=0, share_prompt=share_prompt).to(parameter.device)
        values, gradient, leaks = tried(model, packed, MIDDLE)
        own, own_gradient = _by_itself(model, blocks)
        apart, largest = float((values - own).abs().max()), float(own.abs().max())
        bent = float((gradient - own_gradient).float().norm() / own_gradient.float().norm())
        # In bf16 what is left to tell are other logits; which tokens are seen needs no tolerance.
        coarse = (model.autocast or gradient.dtype) != torch.float32
        tolerance = max(0.5, BF16_TOLERANCE * largest) if coarse else max(1e-3, 1e-5 * largest)
    except Exception as error:  # whatever its code raises on what it does not know
        return loading.said(error)
    if not apart <= tolerance:  # NaN too
        return f"its values are {apart:.3g} apart from those of its own forward of each"
    if not bent <= (0.5 if coarse else 1e-2):
        return f"a gradient differs by {bent:.3g} of its length from that of its own forward"
    return "a response's value depends on tokens that are none of its own" if leaks else ""


def probe(model: Any, *, tokens: int) -> list[Block]:
    """Two prompts, of one and three responses; the one of MIDDLE has `tokens` with its prompt, half of them its own."""
    draw, rows = np.random.default_rng(0), len(unwrapped(model.lm).get_input_embeddings().weight)
    y = max(1, tokens // 2)
    P = max(1, tokens - y)
    lengths = min(P, 11), P, min(y, 4), min(y, 4), y, min(y, 2)
    one, two, *responses = (draw.integers(0, rows, size=n) for n in lengths)
    return [Block(one, tuple(responses[:1])), Block(two, tuple(responses[1:]))]


def _values(model: Any, packed: Packed) -> Tensor:
    """A policy's log-probs (B, K); of a reward model, whose head may begin at zero, a mixture of its last states."""
    if hasattr(model, "head"):
        return model(packed)
    if hasattr(model, "reset_iter_state"):  # a sharded model takes calls of its whole alone
        found: list[Tensor] = []
        with decoder_of(model.lm).register_forward_hook(lambda *given: found.append(given[2].last_hidden_state)):
            model(packed)
        last = found[0].flatten(0, 1)[packed.last].float()
    else:
        last = states(model, packed)[packed.last].float()
    mixture = torch.linspace(-1, 1, last.shape[-1], device=last.device) / last.shape[-1] ** 0.5
    return torch.where(packed.valid, last @ mixture, 0.0)


def _by_itself(model: Any, blocks: list[Block]) -> tuple[Tensor, Tensor]:
    """What each response gets in a row of its own with the attention that defines the model, (B, K); and the gradient
    of MIDDLE's as in `tried`."""
    device = next(model.parameters()).device
    values, gradient = torch.zeros(len(blocks), max(len(b.responses) for b in blocks), device=device), None
    before, model.padded = model.padded, True
    try:
        with attention.instead(unwrapped(model.lm), "eager"):
            for b, block in enumerate(blocks):
                for k, y in enumerate(block.responses):
                    alone = pack([Block(block.prompt, (y,))], pad_id=0, share_prompt=False).to(device)
                    value, found, _ = tried(model, alone, (0, 0))
                    values[b, k] = value
                    gradient = found if (b, k) == MIDDLE else gradient
    finally:
        model.padded = before
    assert gradient is not None
    return values, gradient


def tried(model: Any, packed: Packed, response: tuple[int, int]) -> tuple[Tensor, Tensor, bool]:
    """The values (B, K); the gradient of one response's by the embeddings of its prompt and itself, (P + y, D); and
    whether it depends on anything else. Where nothing is seen a gradient is exactly 0, in every dtype."""
    found: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, embedded: Tensor) -> Tensor:
        found.append(embedded.detach().requires_grad_())
        return found[0]

    with unwrapped(model.lm).get_input_embeddings().register_forward_hook(keep):
        values = _values(model, packed)
    b, k = response
    (gradient,) = torch.autograd.grad(values[b, k], found)
    gradient = gradient[:, : packed.input_ids.shape[1]]
    own = packed.segment == k + 1
    allowed = (packed.block == b) & ((packed.segment == 0) | own)
    if packed.causal:  # the prompt stands in each row
        allowed &= (own & (packed.block == b)).any(1, keepdim=True)
    part = gradient[allowed]
    if hasattr(model, "head"):  # a log-prob, which must not know the token that it is of
        allowed.view(-1)[packed.last[b, k]] = False
    return values.detach(), part, bool(((gradient != 0).any(-1) & ~allowed).any())
