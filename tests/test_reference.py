"""The reference cache: the same numbers as a live reference, nothing computed twice, nothing stale or torn read."""

import numpy as np
import pytest
import torch
from test_model import blocks_of, separate_logps, tiny

from hps import reference
from hps.dist import Ranks
from hps.model import PolicyModel
from hps.packing import Block

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), sharded=False)
HOW = dict(ranks=ALONE, budget=64, pad_id=0)


def open_at(root, **changes) -> reference.Cache:
    return reference.open_cache(root, **({"weights": "w", "tokenizer": "t", "dtype": "fp32"} | changes))


def test_filled_entries_are_the_reference_log_probs(tmp_path):
    lm, blocks = tiny("llama"), blocks_of(5)
    cache = open_at(tmp_path)
    assert reference.fill(cache, PolicyModel(lm), blocks, **HOW) == 15
    expected = separate_logps(lm, blocks).detach().numpy()
    for block, row in zip(blocks, expected, strict=True):
        np.testing.assert_allclose(reference.lookup(cache, block), row, rtol=1e-5, atol=1e-4)


def test_a_second_run_computes_nothing_and_a_wider_one_only_the_rest(tmp_path):
    lm, blocks = tiny("llama"), blocks_of(5)
    model = PolicyModel(lm)
    narrow = [Block(b.prompt, b.responses[:2]) for b in blocks]
    assert reference.fill(open_at(tmp_path), model, narrow, **HOW) == 6
    assert reference.fill(open_at(tmp_path), model, blocks, **HOW) == 9
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    assert reference.fill(open_at(tmp_path), model, blocks, **HOW) == 0
    assert not calls


def test_entries_are_addressed_by_content(tmp_path):
    """Other weights, tokenizer or dtype: another cache. Other prompt or split point: another key."""
    block = Block(np.array([1, 2]), (np.array([3, 4]),))
    cache = open_at(tmp_path)
    reference.fill(cache, PolicyModel(tiny("llama")), [block], **HOW)
    for change in ({"weights": "x"}, {"tokenizer": "x"}, {"dtype": "bf16"}):
        assert reference.missing(open_at(tmp_path, **change), [block])
    same_text_other_split = Block(np.array([1, 2, 3]), (np.array([4]),))
    assert reference.missing(cache, [same_text_other_split])
    assert not reference.missing(cache, [Block(np.array([1, 2], dtype=np.int64), (np.array([3, 4], dtype=np.int32),))])


def test_a_missing_entry_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="a reference log-prob is missing.*restore the cache folder"):
        reference.lookup(open_at(tmp_path), blocks_of(1)[0])


def test_torn_and_poisoned_shards_are_named(tmp_path):
    cache = open_at(tmp_path)
    reference.fill(cache, PolicyModel(tiny("llama")), blocks_of(2), **HOW)
    (shard,) = cache.folder.glob("shard-*.safetensors")
    whole = shard.read_bytes()
    (cache.folder / "shard-00.9.tmp").write_bytes(whole[:50])  # a killed writer leaves this, nobody reads it
    open_at(tmp_path)
    shard.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=f"{shard.name}: not a readable cache shard"):
        open_at(tmp_path)
    from safetensors.numpy import save_file

    save_file({"keys": np.zeros((1, 16), np.uint8), "logps": np.array([np.nan], np.float32)}, shard)
    with pytest.raises(ValueError, match="not log-probs"):
        open_at(tmp_path)


def test_score_keeps_order_over_pieces(tmp_path):
    """More candidates than a piece holds, scored in pieces, come back whole and in order."""
    lm = tiny("llama")
    blocks = blocks_of(70, B=2)
    rows = reference.score(PolicyModel(lm), blocks, device=torch.device("cpu"), budget=512, pad_id=0)
    expected = separate_logps(lm, blocks).detach().numpy()
    np.testing.assert_allclose(np.stack(rows), expected, rtol=1e-5, atol=1e-4)


def test_a_reference_that_gives_nan_is_refused(tmp_path):
    lm = tiny("llama")
    lm.model.embed_tokens.weight.data[:] = torch.nan
    cache = open_at(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        reference.fill(cache, PolicyModel(lm), blocks_of(2), **HOW)
    assert not list(cache.folder.glob("shard-*"))
