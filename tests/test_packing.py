"""Packed rows: the literal layout, the budget, and the block mask against a brute-force reading of its rule."""

import itertools

import numpy as np
import pytest
from helpers import block_mask

from hps.packing import Block, micro_batches, pack, pieces


def random_blocks(seed: int, B: int = 7, most: int = 5) -> list[Block]:
    g = np.random.default_rng(seed)
    return [
        Block(g.integers(3, 99, g.integers(1, 9)), tuple(g.integers(3, 99, g.integers(1, 7)) for _ in range(k)))
        for k in g.integers(1, most + 1, B)
    ]


def test_the_layout_of_the_docstring():
    packed = pack([Block(np.array([7, 8]), (np.array([5, 2]), np.array([6, 9, 2])))], pad_id=0)
    assert packed.input_ids.tolist() == [[7, 8, 5, 2, 6, 9, 2]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert packed.segment.tolist() == [[0, 0, 1, 1, 2, 2, 2]]
    assert packed.predictor.tolist() == [1, 2, 1, 4, 5]
    assert packed.last.tolist() == [[3, 6]]
    assert packed.targets.tolist() == [5, 2, 6, 9, 2]
    assert packed.num_tokens.tolist() == [[2, 3]]


@pytest.mark.parametrize("share_prompt", [True, False])
def test_every_token_is_scored_once_by_its_predecessor(share_prompt):
    """Whatever the layout: targets are the responses' tokens, and each predictor is the token just before."""
    blocks = random_blocks(0)
    packed = pack(blocks, pad_id=0, share_prompt=share_prompt)
    flat, at = packed.input_ids.flatten(), 0
    if share_prompt:  # one row without pads
        assert flat.tolist() == [t for b in blocks for part in (b.prompt, *b.responses) for t in part]
        assert packed.spans == tuple((len(b.prompt), tuple(map(len, b.responses))) for b in blocks)
    for b, block in enumerate(blocks):
        for k, y in enumerate(block.responses):
            mine = slice(at, at + len(y))
            at += len(y)
            assert packed.targets[mine].tolist() == y.tolist()
            assert flat[packed.predictor[mine]].tolist() == [block.prompt[-1], *y[:-1]]
            assert flat[packed.last[b, k]] == y[-1]
            assert packed.num_tokens[b, k] == len(y)
        assert packed.valid[b].tolist() == [k < len(block.responses) for k in range(packed.num_tokens.shape[1])]


def test_block_mask_is_the_rule():
    """Brute force over every pair of positions, each carrying (block, segment) written out from the blocks."""
    packed = pack(random_blocks(1), pad_id=0)
    mask = block_mask(packed)[:, 0]
    block, segment = packed.block[0].tolist(), packed.segment[0].tolist()
    for i, j in itertools.product(range(len(block)), repeat=2):
        assert mask[0, i, j] == (block[i] == block[j] and segment[j] in (0, segment[i]) and j <= i)
    assert mask.any(-1).all()  # no empty softmax row


def test_micro_batches_cover_all_within_budget_alike():
    """On every number of ranks, of packed rows and of plain ones, whose pads count; none is empty for blocks that are
    longer than the budget."""
    blocks = random_blocks(3, B=23)
    for budget, world_size, share in itertools.product((1, 30, 100, 10_000), (1, 2, 3), (True, False)):
        ranks = micro_batches(blocks, budget=budget, world_size=world_size, share_prompt=share)
        assert sorted(i for batches in ranks for members in batches for i in members) == list(range(23))
        assert len({len(batches) for batches in ranks}) == 1  # or sharded collectives hang
        for members in filter(None, itertools.chain.from_iterable(ranks)):
            rows = pack([blocks[i] for i in members], pad_id=0, share_prompt=share).input_ids
            assert len(members) == 1 or rows.numel() <= budget
    alike = [Block(np.zeros(600, int), (np.zeros(100, int),))] * 8
    for share in (True, False):
        one_each = micro_batches(alike, budget=512, world_size=1, share_prompt=share)
        assert sorted(one_each[0]) == [[i] for i in range(8)]
        assert [len(x) for x in micro_batches(alike[:7], budget=1, world_size=2, share_prompt=share)] == [4, 4]


def test_plain_rows_of_like_lengths_go_together():
    """Of 4 long rows and 40 short ones by turns none is padded by much."""
    blocks = [Block(np.zeros(90 if i % 11 == 0 else 9, int), (np.zeros(10, int),)) for i in range(44)]
    (batches,) = micro_batches(blocks, budget=400, world_size=1, share_prompt=False)
    padded = sum(pack([blocks[i] for i in m], pad_id=0, share_prompt=False).input_ids.numel() for m in batches)
    assert padded <= 1.05 * sum(map(len, blocks))


def test_pieces_hold_all_responses_in_order():
    block = random_blocks(4, B=1, most=1)[0]
    block = Block(block.prompt, tuple(np.full(n, n) for n in range(1, 30)))
    for share, least in ((True, 8), (False, 15)):
        cut = pieces(block, tokens=80, share_prompt=share)
        assert [y.tolist() for piece in cut for y in piece.responses] == [y.tolist() for y in block.responses]
        rows = [pack([piece], pad_id=0, share_prompt=share).input_ids.numel() for piece in cut]
        assert max(rows) <= 80 and len(cut) <= least
    assert pieces(Block(block.prompt, ()), tokens=80, share_prompt=False) == []
