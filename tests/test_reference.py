"""The reference cache: the same numbers as a live reference, nothing computed twice, nothing stale or torn read."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALONE, blocks_of, separate_logps, tiny
from safetensors.numpy import load_file, save_file

from hps import reference
from hps.model import PolicyModel
from hps.packing import Block

HOW = dict(ranks=ALONE, budget=64, pad_id=0)


def open_at(root, **changes) -> Path:
    return reference.open_cache(root, **({"weights": "w", "tokenizer": "t", "dtype": "fp32"} | changes))


def put(cache: Path, keys: np.ndarray, logps: np.ndarray) -> str:
    """A shard as another writer might leave it; its name."""
    name = reference.shard_name(keys, logps)
    save_file({"keys": keys, "logps": logps}, cache / f"{name}.safetensors")
    return name


def lookup(cache: Path, blocks: list[Block]) -> np.ndarray:
    return reference.find(cache, reference.response_keys(blocks))


def test_a_second_run_computes_nothing_and_a_wider_one_only_the_rest(tmp_path, monkeypatch):
    """Values by separate forwards. A shard holds a micro-batch here, and so much is what a kill may cost."""
    monkeypatch.setattr(reference, "MICRO_BATCHES_PER_SHARD", 1)
    lm, blocks = tiny("llama"), blocks_of(5, B=20)
    model, cache = PolicyModel(lm), open_at(tmp_path)
    expected = separate_logps(lm, blocks).detach().numpy()
    narrow = [Block(blocks[2].prompt, blocks[2].responses[1:4]), blocks[4]]
    filled, computed = reference.fill(cache, model, narrow, **HOW)
    np.testing.assert_allclose(filled, [*expected[2, 1:4], *expected[4]], rtol=1e-5, atol=1e-4)
    before = len(list(cache.glob("shard-*")))
    filled, rest = reference.fill(open_at(tmp_path), model, blocks, **HOW)
    assert (computed, rest) == (8, 92)
    np.testing.assert_allclose(filled, expected.ravel(), rtol=1e-5, atol=1e-4)
    todo = sum(map(len, blocks)) - sum(map(len, narrow))
    assert len(list(cache.glob("shard-*"))) - before >= todo // (64 + max(map(len, blocks))) > 3
    calls = []
    model.register_forward_hook(lambda *args: calls.append(1))
    again, computed = reference.fill(open_at(tmp_path), model, blocks, **HOW)
    assert computed == 0 and not calls and again.tolist() == lookup(cache, blocks).tolist() == filled.tolist()
    # What one rank still lacks, since another run writes there between two ranks' reading, all of them score.
    monkeypatch.setattr(reference.dist, "all_sum", lambda absent: absent.index_fill_(0, torch.tensor([7]), 1))
    again, computed = reference.fill(cache, model, blocks, **HOW)
    assert computed == len(calls) == 1
    np.testing.assert_allclose(again, filled, rtol=1e-5, atol=1e-4)


def test_entries_are_addressed_by_content(tmp_path):
    """Other weights, tokenizer or dtype: another cache. Other prompt or split point: another key."""
    block = Block(np.array([1, 2]), (np.array([3, 4]),))
    cache = open_at(tmp_path)
    reference.fill(cache, PolicyModel(tiny("llama")), [block], **HOW)

    def known(cache: Path, block: Block) -> bool:
        return not np.isnan(reference.find(cache, reference.response_keys([block]))).any()

    for change in ({"weights": "x"}, {"tokenizer": "x"}, {"dtype": "bf16"}):
        assert not known(open_at(tmp_path, **change), block)
    same_text_other_split = Block(np.array([1, 2, 3]), (np.array([4]),))
    assert known(cache, block) and not known(cache, same_text_other_split)
    assert known(cache, Block(np.array([1, 2], dtype=np.int64), (np.array([3, 4], dtype=np.int32),)))


def test_what_is_found_is_what_a_dict_would_find(tmp_path):
    """Shards in no order, an entry twice, keys that differ in bytes before, between and behind zeros; asked for twice,
    in any order, and for what is not there."""
    g, cache = np.random.default_rng(0), open_at(tmp_path)
    keys = g.integers(0, 3, size=(4000, 16), dtype=np.uint8) * (g.random((4000, 16)) < 0.3)
    keys[:2000] = g.integers(0, 256, size=(2000, 16))
    keys[1000:2000, 12:] = 0
    known: dict[bytes, float] = {}
    shards = {}
    for rows in np.array_split(g.permutation(3000), 7):
        logps = -g.random(len(rows)).astype(np.float32)
        shards[put(cache, keys[rows], logps)] = zip(map(bytes, keys[rows]), logps.tolist(), strict=True)
    for name in sorted(shards):  # of two that hold a response, the last one's value is taken
        known |= shards[name]
    asked = keys[g.integers(0, 4000, size=6000)]
    found = reference.find(cache, asked.view("S16")[:, 0])
    expected = [known.get(bytes(key), np.nan) for key in asked]
    assert 500 < np.isnan(expected).sum() < 3000
    np.testing.assert_array_equal(found, np.array(expected, dtype=np.float32))
    assert found.dtype == np.float32 and len(lookup(cache, [])) == 0


def test_a_shard_is_keyed_by_blake2b_of_the_ids_in_any_order(tmp_path):
    """The key by hand, so that the shards of earlier versions are found; and those that are written now."""
    block = Block(np.array([7, 8, 9], dtype=np.int32), tuple(np.array([i, 2], dtype=np.int32) for i in range(20)))
    ids = [(3).to_bytes(8, "little") + np.array([7, 8, 9, i, 2], "<i4").tobytes() for i in range(20)]
    by_hand = [hashlib.blake2b(each, digest_size=16).digest() for each in ids]
    assert reference.response_keys([block]).tolist() == by_hand
    cache = open_at(tmp_path)
    reference.fill(cache, PolicyModel(tiny("llama")), [block], **HOW)
    shards = [load_file(path)["keys"] for path in cache.glob("shard-*.safetensors")]
    assert sorted(map(bytes, np.concatenate(shards))) == sorted(by_hand)


def test_a_missing_entry_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "_write_shard", lambda *_: None)
    with pytest.raises(ValueError, match="log-probs that were just written there are missing"):
        reference.fill(open_at(tmp_path), PolicyModel(tiny("llama")), blocks_of(1), **HOW)


def test_a_shard_of_what_is_no_log_prob_is_refused(tmp_path):
    cache, keys = open_at(tmp_path), np.eye(2, 16, dtype=np.uint8)
    wrong = [(keys, np.array([-1.5, x], np.float32)) for x in (np.nan, np.inf, -np.inf, 0.5)]
    wrong += [
        (keys, np.array([-1.5, -2.0])),
        (np.eye(2, 8, dtype=np.uint8), np.float32([-1.5, -2])),
        (keys, np.float32([[-1.5, -2]])),
    ]
    for shard in wrong:
        name = put(cache, *shard)
        with pytest.raises(ValueError, match=f"{cache}/{name}.* holds values that are not log-probs"):
            lookup(cache, blocks_of(1))
        (cache / f"{name}.safetensors").unlink()


def test_a_reference_that_gives_nan_is_refused(tmp_path):
    lm = tiny("llama")
    lm.model.embed_tokens.weight.data[:] = torch.nan
    cache = open_at(tmp_path)
    with pytest.raises(ValueError, match="not finite"):
        reference.fill(cache, PolicyModel(lm), blocks_of(2), **HOW)
    assert not list(cache.glob("shard-*"))
