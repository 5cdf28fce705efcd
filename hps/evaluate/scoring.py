"""What a finished model gives to responses, on one rank: log-probs or rewards, and the exact KL between two models."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hps.logps import chunk_for, sequence_logps
from hps.model import PolicyModel
from hps.packing import Block, micro_batches, pack, pieces

MICRO_BATCHES_AT_ONCE = 64  # into which the blocks that are read together are sorted by their lengths


def windows(blocks: Sequence[Block], *, budget: int) -> Iterator[list[Block]]:
    """The blocks in order, so many at a time as fill some micro-batches of `budget` packed tokens; one at least."""
    some, tokens = [], 0
    for block in blocks:
        some.append(block)
        tokens += len(block)
        if tokens >= budget * MICRO_BATCHES_AT_ONCE:
            yield some
            some, tokens = [], 0
    if some:
        yield some


def score(
    model: nn.Module, blocks: Sequence[Block], *, device: torch.device, budget: int, pad_id: int, progress: str = ""
) -> Iterator[np.ndarray]:
    """What a model gives to all responses: one (K,) float32 array per block, in order, as they are taken.

    Args:
        model: packed prompts -> (B, K), a PolicyModel (log-probs, nats) or a reward model (rewards).
        blocks: gone through once; a few micro-batches of them are in memory.
        budget: packed tokens per micro-batch.
        progress: name of the progress bar; empty for none.
    """
    how = dict(share_prompt=not getattr(model, "padded", False))
    with tqdm(total=len(blocks), desc=progress, unit="prompt", disable=not progress) as bar:
        for some in windows(blocks, budget=budget):
            cut = [(b, piece) for b, block in enumerate(some) for piece in pieces(block, tokens=budget, **how)]
            scored: list[list[float]] = [[] for _ in cut]
            for members in micro_batches([piece for _, piece in cut], budget=budget, world_size=1, **how)[0]:
                with torch.no_grad():
                    rows = model(pack([cut[i][1] for i in members], pad_id=pad_id, **how).to(device)).tolist()
                for i, row in zip(members, rows, strict=True):
                    scored[i] = row[: len(cut[i][1].responses)]
                bar.update(sum(i == 0 or cut[i - 1][0] != cut[i][0] for i in members))  # by the first piece of each
            whole: list[list[float]] = [[] for _ in some]
            for (b, _), row in zip(cut, scored, strict=True):
                whole[b] += row
            yield from (np.array(row, dtype=np.float32) for row in whole)


def exact_kl(
    policy: PolicyModel, ref: PolicyModel, winners: Sequence[Block], *, device: torch.device, budget: int
) -> Iterator[float]:
    """For each one-response block the sum over its positions of `token_kl`, nats; `budget` as in `score`."""
    shared = not (policy.padded or ref.padded)
    for some in windows(winners, budget=budget):
        found = np.empty(len(some))
        for members in micro_batches(some, budget=budget, world_size=1, share_prompt=shared)[0]:
            packed = pack([some[i] for i in members], pad_id=0, share_prompt=shared).to(device)
            with torch.no_grad():
                ours, theirs = ((one.hidden(packed), None if one.padded else one.head) for one in (policy, ref))
                kl = token_kl(*ours, *theirs)
            found[members] = sequence_logps(kl, packed.num_tokens)[:, 0].cpu()
        yield from found.tolist()


def token_kl(hidden: Tensor, weight: Tensor | None, ref_hidden: Tensor, ref_weight: Tensor | None) -> Tensor:
    """Exact next-token KL(policy || reference) at each position, (T,) fp32 nats >= 0; no gradient.

    Args:
        hidden, ref_hidden: (T, D) states of the two models at the same positions. weight, ref_weight: (V, D) heads;
            without one the states are logits already, (T, V).
    """
    kl = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    vocabulary = hidden.shape[1] if weight is None else len(weight)
    chunk = chunk_for(vocabulary, hidden.device.type)

    def log_softmax(states: Tensor, head: Tensor | None) -> Tensor:
        logits = states if head is None else states.to(head.dtype) @ head.T
        return torch.log_softmax(logits.float(), dim=-1)

    with torch.no_grad():
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logps, ref = log_softmax(hidden[part], weight), log_softmax(ref_hidden[part], ref_weight)
            kl[part] = (logps.exp() * (logps - ref)).sum(-1)
    return kl.clamp(min=0)  # rounding may leave -1e-8 where the two agree
