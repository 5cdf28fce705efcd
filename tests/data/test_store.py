"""The token store: what it holds equals what tokenising in memory gives; only whole and matching stores are read."""

import json
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from helpers import ALONE, on_ranks, tokenize_rows

from hps import batches, config, dist
from hps.data import listwise, store, tokenizers, tokens
from hps.data.rows import Row, only, row_key
from hps.options import Config


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return tokenizers.load_tokenizer(str(tiny_world / "model"))


def odd_rows(world: Path) -> list[Row]:
    """The world's rows, three of them with what the tokeniser drops, one without rewards, some with human pairs."""
    rows = listwise.read(world / "train.jsonl")
    texts = {0: ("", *rows[0].responses[1:]), 1: rows[1].responses[:1], 2: ("the " * 200, *rows[2].responses[1:])}
    found = []
    for i, row in enumerate(rows):
        responses = texts.get(i, row.responses)
        rewards = None if i == 5 else row.rewards[: len(responses)]
        chosen, rejected = {2: (0, 1), 7: (1, 0), 8: (2, None)}.get(i, (None, None))
        found.append(Row(f"caf\u00e9-{i}", row.prompt, responses, rewards, chosen, rejected, None, ""))
    found[3] = Row("long", "the " * 200, ("yes .",), (1.0,), None, None, None, "")
    found[4] = Row("twice", found[4].prompt, found[4].responses * 2, found[4].rewards * 2, None, None, None, "")
    return found


def opened(root: Path, data: Path, tokenizer, **changes) -> store.Store:
    return store.open_store(root, data, tokenizer, **dict(max_length=128) | changes)


def check_equal(found: store.Store, examples: list[tokens.Example]) -> None:
    assert len(found) == len(examples)
    assert found.keys.tolist() == [row_key(e.id) for e in examples]
    assert found.longest == max(map(tokens.longest, examples))
    columns = (found.rewards[0 : len(found)], found.identity[0 : len(found)], found.human.tolist())
    for i, (e, rewards, identity, human) in enumerate(zip(examples, *columns, strict=True)):
        assert (found.id(i), found.where(i)) == (e.id, e.where)
        block = found.block(i, range(len(e.response_ids)))
        assert block.prompt.tolist() == e.prompt_ids.tolist()
        assert [y.tolist() for y in block.responses] == [y.tolist() for y in e.response_ids]
        assert identity.tolist() == e.identity.tolist()
        np.testing.assert_array_equal(rewards, np.full(len(identity), np.nan) if e.rewards is None else e.rewards)
        assert human == [-1 if k is None else k for k in (e.chosen, e.rejected)]


@pytest.mark.parametrize(("suffix", "candidates"), [("jsonl", 3), ("jsonl.gz", 0), ("jsonl.xz", 3)])
def test_a_store_holds_what_memory_does(tiny_world, tmp_path, tokenizer, suffix, candidates):
    data = tmp_path / f"x.{suffix}"
    listwise.write(data, odd_rows(tiny_world))
    rows = listwise.read(data)
    rows = [only(row, range(len(row.responses))[:candidates]) for row in rows] if candidates else rows
    examples, counts = tokenize_rows(tokenizer, rows, max_length=128)
    assert counts["rows_overlong_prompt"] == counts["responses_empty"] == 1 and counts["pairs_broken"] == 1
    for _ in ("made", "found"):
        found = opened(tmp_path / "stores", data, tokenizer, candidates=candidates)
        assert found.counts == counts
        check_equal(found, examples)
    assert [path.suffix for path in (tmp_path / "stores").iterdir()] == [""]  # one store, no temporary folder


def test_what_a_run_reads_of_a_plan(tiny_world, tmp_path, tokenizer):
    """Blocks of visits, every touched response once with its place, and SFT's responses, against rows in memory."""
    data = tmp_path / "x.jsonl"
    listwise.write(data, [row for row in odd_rows(tiny_world) if row.rewards])
    examples, _ = tokenize_rows(tokenizer, listwise.read(data), max_length=128)
    found = opened(tmp_path / "stores", data, tokenizer)
    argv = ["--model=m", "--data=d", "--out=o", "--method=dpo-pl", "--pl_responses=4", "--prompts_per_step=8"]
    c, _ = config.parse(Config, argv, prog="train.py", description="")
    p = batches.make_plan(c, found)
    visited_blocks = batches.Run(c, p, found, ALONE, pad_id=0).blocks
    assert (p.responses < 0).any()  # ragged
    touched, at = batches.touched_blocks(p, found)
    flat = [(b.prompt.tolist(), y.tolist()) for b in touched for y in b.responses]
    asked = []
    for v, (row, ks) in enumerate(zip(p.row, p.responses, strict=True)):
        some = [examples[row].response_ids[k].tolist() for k in ks if k >= 0]
        assert [y.tolist() for y in visited_blocks(v // 8)[v % 8].responses] == some
        asked += [(examples[row].prompt_ids.tolist(), y) for y in some]
    assert [flat[i] for i in at] == asked and len(touched) == len(set(p.row))
    visited = {(row, k) for row, ks in zip(p.row, p.responses.tolist(), strict=True) for k in ks if k >= 0}
    assert len(flat) == len(visited)
    by_hand = [int(np.argmax(e.rewards)) if e.chosen is None else e.chosen for e in examples]
    assert batches.preferred(found).tolist() == by_hand
    unscored = [Row("a", "p", ("yes .",)), Row("b", "p", ("yes .", "no ."), None, 1), Row("c", "p", ("no .", "so ."))]
    listwise.write(data, unscored[:2])
    assert batches.preferred(opened(tmp_path / "stores", data, tokenizer)).tolist() == [0, 1]
    listwise.write(data, unscored)
    with pytest.raises(ValueError, match=r"x\.jsonl:3: several responses, and neither chosen nor rewards"):
        batches.preferred(opened(tmp_path / "stores", data, tokenizer))


def test_only_equal_inputs_share_a_store(tiny_world, tmp_path, tokenizer):
    data, copy = tiny_world / "train.jsonl", tmp_path / "copy.jsonl"
    shutil.copy(data, copy)
    other = tmp_path / "model"
    shutil.copytree(tiny_world / "model", other)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<assistant>", "<user>"))
    stores = tmp_path / "stores"
    opened(stores, data, tokenizer)

    def count() -> int:
        return len(list(stores.iterdir()))

    assert opened(stores, copy, tokenizer).where(0) == f"{copy}:1" and count() == 1  # content decides, not the name
    opened(stores, data, tokenizer, length_penalty=0.5, need_rewards=True)
    assert count() == 1
    changes = [dict(max_length=127), dict(truncate="error"), dict(candidates=2)]
    for n, change in enumerate(changes, 2):
        opened(stores, data, tokenizer, **change)
        assert count() == n
    opened(stores, data, tokenizers.load_tokenizer(str(other)))
    assert count() == 5
    copy.write_text(copy.read_text().replace('"id": "', '"id": "z', 1))
    assert opened(stores, copy, tokenizer).id(0).startswith("z") and count() == 6


def test_a_failed_pass_leaves_nothing(tiny_world, tmp_path, tokenizer, monkeypatch):
    """A mistake in the last line; and data that is another file's by the time that it has been read."""
    data, stores = tmp_path / "x.jsonl", tmp_path / "stores"
    lines = (tiny_world / "train.jsonl").read_text().splitlines(keepends=True)
    for last, message in (("{}\n", "the key 'id' is missing"), (lines[0], "id .* is already used at .*x.jsonl:1;")):
        data.write_text("".join([*lines, last]))
        with pytest.raises(ValueError, match=f"x.jsonl:25: {message}"):
            opened(stores, data, tokenizer)
        assert not list(stores.iterdir())
    data.write_text("".join(lines))
    real, read = store.files.sha256, []

    def hash_of_growing(path):
        read.append(path)
        return real(path) + str(len(read))

    monkeypatch.setattr(store.files, "sha256", hash_of_growing)
    with pytest.raises(ValueError, match="x.jsonl: changed while it was read"):
        opened(stores, data, tokenizer)
    assert set(read) == {data} and len(read) == 2 and not list(stores.iterdir())


def test_of_two_that_make_a_store_the_first_stays(tiny_world, tmp_path, tokenizer):
    data, folder = tiny_world / "train.jsonl", tmp_path / "both" / "s"
    examples, counts = tokenize_rows(tokenizer, listwise.read(data), max_length=128)
    about = {"identity": {"data": "h"}, "counts": counts}
    store.write(folder, examples, about)
    before = (folder / "store.json").stat().st_mtime_ns
    store.write(folder, examples[:3], about)
    assert (folder / "store.json").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir()] == ["s"]
    check_equal(store.Store(folder, data), examples)


def rank_of_two(folder: Path, data: Path, model: str) -> None:
    """Open stores as one of two ranks and note what was hashed and what came of it."""
    tokenizer, hashed, found = tokenizers.load_tokenizer(model), [], {}
    sha256 = store.files.sha256
    store.files.sha256 = lambda path: hashed.append(path.name) or sha256(path)
    with dist.session(timeout=timedelta(minutes=2)) as ranks:
        found["size"] = len(opened(folder / "stores", data, tokenizer, ranks=ranks))
        found["hashed"] = sorted(set(hashed))
        with pytest.raises(ValueError) as mistake:
            opened(folder / "stores", data, tokenizer, ranks=ranks, max_length=2)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found | {"mistake": str(mistake.value)}))


def test_the_first_rank_alone_hashes_and_makes(tiny_world, tmp_path):
    """The others wait for it, and hear of its mistake."""
    on_ranks(2, rank_of_two, (tmp_path, tiny_world / "train.jsonl", str(tiny_world / "model")))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["size"] == second["size"] == 24
    assert first["hashed"] == sorted([*store.FILES, "train.jsonl"]) and second["hashed"] == []
    assert "max_length = 2; it must hold" in first["mistake"] == second["mistake"]


def test_rows_without_rewards_are_named(tiny_world, tmp_path, tokenizer):
    """Line 6, while the store is made, and of one that a run without need of rewards has made."""
    data, stores = tmp_path / "x.jsonl", tmp_path / "stores"
    listwise.write(data, odd_rows(tiny_world))
    for make in (True, False):
        with pytest.raises(ValueError, match=r"x\.jsonl:6: row 'caf\u00e9-5' has no rewards: .*data_prep\.py annotate"):
            opened(stores, data, tokenizer, need_rewards=True)
        if make:
            assert not list(stores.iterdir())
            opened(stores, data, tokenizer)
