"""One prompt and its K responses side by side, all prompts of a micro-batch in one packed row without pads.

row      [ p p p p | a a a | b b ]        prompt tokens are computed once for all K responses
position   0 1 2 3   4 5 6   4 5          positions restart at each response
segment    0 0 0 0   1 1 1   2 2          a response sees the prompt (0) and itself, not its siblings
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Block:
    """One prompt with its K responses as token ids; every response ends in its end token."""

    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest response."""
        return len(self.prompt) + max(map(len, self.responses), default=0)


def pieces(block: Block, *, tokens: int, share_prompt: bool = True) -> list[Block]:
    """Cut a block with many responses into blocks of at most `tokens` tokens as `pack` lays them out.

    So that a hundred candidates of a prompt fit into the budget of a micro-batch; a piece of one response, or of a
    packed prompt that is half the budget, may be longer. Pieces in order hold the responses in order.
    """
    if not share_prompt:
        n = max(1, tokens // block.longest)
        return [Block(block.prompt, block.responses[i : i + n]) for i in range(0, len(block.responses), n)]
    room = max(tokens, 2 * len(block.prompt)) - len(block.prompt)
    cut: list[list[np.ndarray]] = []
    for y in block.responses:
        if not cut or sum(map(len, cut[-1])) + len(y) > room:
            cut.append([])
        cut[-1].append(y)
    return [Block(block.prompt, tuple(responses)) for responses in cut]


@dataclass(frozen=True)
class Packed:
    """A micro-batch. R rows of N packed tokens; T scored tokens; B prompts of at most K responses.

    input_ids, position_ids: (R, N) int64.
    block: (R, N) int64, the prompt's index in the micro-batch, -1 on pads.
    segment: (R, N) int64, 0 on prompt tokens, k + 1 on response k.
    predictor: (T,) int64, index into the flattened R * N positions of the hidden state that predicts the token.
    last: (B, K) int64, index into the same of each response's last token, 0 where there is none.
    targets: (T,) int64 token ids, response after response.
    num_tokens: (B, K) int64, how many of the T each response has. valid: (B, K) bool.
    spans: B pairs (length of the prompt, its responses' lengths), in the order of the row.
    causal: True where each row holds one prompt with one response, so that the plain causal mask is enough.
    """

    input_ids: Tensor
    position_ids: Tensor
    block: Tensor
    segment: Tensor
    predictor: Tensor
    last: Tensor
    targets: Tensor
    num_tokens: Tensor
    valid: Tensor
    spans: tuple[tuple[int, tuple[int, ...]], ...]
    causal: bool

    def to(self, device: torch.device) -> "Packed":
        """The same micro-batch on another device, which is not waited for."""
        return replace(self, **{k: to_device(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; only from pinned memory does CUDA copy while the host goes on."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pack(blocks: Sequence[Block], *, pad_id: int, share_prompt: bool = True) -> Packed:
    """Lay blocks out, in order.

    Args:
        blocks: B prompts with up to K responses each.
        pad_id: fills the ends of rows where there are several; never attended to by real tokens, never scored.
        share_prompt: False repeats the prompt before each response, one response per row: plain causal padded
            batches, and the path that the packed one is tested against.

    Example: one block with prompt [7, 8] and responses [5, 2] and [6, 9, 2] gives input_ids
        [[7, 8, 5, 2, 6, 9, 2]], position_ids [[0, 1, 2, 3, 2, 3, 4]], predictor [1, 2, 1, 4, 5], last [[3, 6]],
        targets [5, 2, 6, 9, 2], num_tokens [[2, 3]].
    """
    assert all(len(text) > 0 for block in blocks for text in (block.prompt, *block.responses)), "empty text"
    num_tokens = pad_sequence([torch.tensor([len(y) for y in block.responses]) for block in blocks], batch_first=True)
    last = torch.zeros_like(num_tokens)

    # Rows of (index of the prompt, index of the first response, block): one for all blocks, or one for each response.
    rows = [[(b, 0, block) for b, block in enumerate(blocks)]]
    if not share_prompt:
        rows = [[(b, k, Block(block.prompt, (y,)))] for b, _, block in rows[0] for k, y in enumerate(block.responses)]
    R, N = len(rows), max(sum(len(block) for _, _, block in row) for row in rows)
    input_ids = np.full((R, N), pad_id, dtype=np.int64)
    position_ids = np.tile(np.arange(N), (R, 1))  # pads count on: a jump back looks like a new text to transformers
    owner = np.full((R, N), -1, dtype=np.int64)
    segment = np.zeros((R, N), dtype=np.int64)
    predictor, targets = [], []  # (y,) each, one after the other response
    for r, row in enumerate(rows):
        at = 0
        for b, first, block in row:
            P = len(block.prompt)
            owner[r, at : at + len(block)] = b
            input_ids[r, at : at + P] = block.prompt
            position_ids[r, at : at + P] = np.arange(P)
            at += P
            last_prompt = at - 1
            for k, y in enumerate(block.responses, start=first):
                input_ids[r, at : at + len(y)] = y
                position_ids[r, at : at + len(y)] = np.arange(P, P + len(y))
                segment[r, at : at + len(y)] = k + 1
                # The prompt's last position predicts the first token of every response.
                predictor.append(r * N + np.concatenate([[last_prompt], np.arange(at, at + len(y) - 1)]))
                targets.append(y)
                at += len(y)
                last[b, k] = r * N + at - 1
    return Packed(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        block=torch.from_numpy(owner),
        segment=torch.from_numpy(segment),
        predictor=torch.from_numpy(np.concatenate(predictor)).long(),
        last=last,
        targets=torch.from_numpy(np.concatenate(targets)).long(),
        num_tokens=num_tokens,
        valid=num_tokens > 0,
        spans=tuple((len(block.prompt), tuple(map(len, block.responses))) for block in blocks),
        causal=not share_prompt,
    )


def micro_batches(
    blocks: Sequence[Block], *, budget: int, world_size: int, share_prompt: bool = True
) -> list[list[list[int]]]:
    """Deal the blocks of one optimizer step to ranks and micro-batches of at most `budget` tokens.

    Args:
        budget: tokens a micro-batch may hold, pads too; a longer block gets a micro-batch of its own.
        share_prompt: as `pack` will lay them out.

    Returns:
        batches[rank][i] = block indices; every rank has the same number of micro-batches, some perhaps empty,
        because sharded collectives hang when ranks disagree on how often they run.
    """
    if not share_prompt:  # a row is as long as the longest beside it, so that like ones go together
        bins: list[list[int]] = []
        rows = width = 0
        for i in sorted(range(len(blocks)), key=lambda i: -blocks[i].longest):
            rows += len(blocks[i].responses)
            if not bins or rows * width > budget:
                bins.append([])
                rows, width = len(blocks[i].responses), blocks[i].longest
            bins[-1].append(i)
        bins += [[]] * (-len(bins) % world_size)
        return [bins[rank::world_size] for rank in range(world_size)]
    lengths = [len(block) for block in blocks]
    # A longer block fills one, and no second one that would be empty.
    per_rank = -(-sum(min(length, budget) for length in lengths) // (budget * world_size))
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while True:
        bins = [[] for _ in range(per_rank * world_size)]
        loads = [(0, b) for b in range(len(bins))]  # a heap of (tokens, bin)
        for i in order:  # longest first into the emptiest bin
            load, b = heapq.heappop(loads)
            bins[b].append(i)
            heapq.heappush(loads, (load + lengths[i], b))
        if all(load <= budget or len(bins[b]) == 1 for load, b in loads):
            return [[sorted(members) for members in bins[rank::world_size]] for rank in range(world_size)]
        per_rank += 1
