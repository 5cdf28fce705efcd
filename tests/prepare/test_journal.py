"""Work that is shared out and journalled: what is read back, after which kinds of an end, and who does the rest."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from hps.data import listwise
from hps.data.rows import Row
from hps.dist import Ranks
from hps.prepare import journal

SETTINGS = {"n": 8, "temperature": 0.9, "model": "abc"}
RECORDS = [
    {"id": "a", "found": ["one\ntwo", "\u00fc"], "counts": {"samples": 3}},
    {"id": "b", "found": [], "counts": {}},
]


def write(output, rank, records, settings=SETTINGS):
    with journal.begin(output, rank, settings) as file:
        for record in records:
            journal.note(file, record)


def held(output):
    records = journal.Records(output, SETTINGS)
    return [records[id] for id in "abc" if id in records]


def test_cut_anywhere_it_keeps_the_whole_lines(tmp_path):
    path = tmp_path / "out.journal-0-0"
    file = journal.begin(tmp_path / "out", 0, SETTINGS)
    for at, record in enumerate(RECORDS, 1):
        journal.note(file, record)
        assert len(path.read_bytes().splitlines()) == 1 + at  # on the disk when write returns
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = max(sum(end <= cut for end in ends) - 1, 0)
        assert held(tmp_path / "out") == RECORDS[:kept]
        write(tmp_path / "out", 0, RECORDS[kept:])  # what goes on leaves what is there alone
        assert path.read_bytes() == whole[:cut]
        assert held(tmp_path / "out") == RECORDS
        (tmp_path / "out.journal-0-1").unlink()


def test_other_settings_and_broken_lines_are_refused(tmp_path):
    path = tmp_path / "out.journal-0-0"
    write(tmp_path / "out", 0, RECORDS)
    with pytest.raises(ValueError, match=r"out.journal-0-0 .* differs in n, seed\. .* delete out.journal-\*"):
        journal.Records(tmp_path / "out", SETTINGS | {"n": 9, "seed": 1})
    whole = path.read_bytes()
    for bad in ({"found": "x"}, {"counts": 1}, {"id": 3}, {"more": 1}):
        path.write_bytes(whole + json.dumps(RECORDS[0] | bad).encode() + b"\n")
        with pytest.raises(ValueError, match="out.journal-0-0:4: no record of a finished prompt; remove that line"):
            journal.Records(tmp_path / "out", SETTINGS)
    path.write_bytes(whole + b'{"id": "c", \n')
    with pytest.raises(ValueError, match="out.journal-0-0:4: broken JSON"):
        journal.Records(tmp_path / "out", SETTINGS)


@dataclass
class Command:
    model: str
    input: str
    output: str
    n: int = 8
    max_rows: int = 512
    timeout: float = 10.0


@pytest.fixture
def command(tmp_path):
    listwise.write(tmp_path / "in", [Row(id, "prompt", ()) for id in "abcdefg"])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("weights")
    return Command(str(tmp_path / "model"), str(tmp_path / "in"), str(tmp_path / "new" / "out"))


def run(command, monkeypatch, *, rank=0, world_size=1, ends_before=""):
    """The ids whose work was done now, and the results of all rows where the run came to its end."""
    ranks = Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"), sharded=world_size > 1)
    monkeypatch.setattr(journal.dist, "session", lambda **_: nullcontext(ranks))
    done, written = [], {}

    def work(mine, counts, _):
        for row in mine:
            if row.id == ends_before:
                raise KeyboardInterrupt
            counts["samples"] += 2
            counts["lost"] += 0
            done.append(row.id)
            yield row.id, [row.id * 2]

    def write(found, counts):
        written.update((row.id, texts) for row, texts in found)
        assert journal.journals(command.output)  # until the output is there
        assert counts == {"samples": 14, "lost": 0} and "lost" in counts

    with pytest.raises(KeyboardInterrupt) if ends_before else nullcontext():
        journal.in_shares(command, listwise.Rows(Path(command.output).parents[1] / "in"), work, write)
    return "".join(done), written


def test_a_killed_run_goes_on_where_it_was(command, monkeypatch):
    assert run(command, monkeypatch, ends_before="d") == ("abc", {})
    done, written = run(replace(command, max_rows=7), monkeypatch)  # which changes nothing of what is found
    assert done == "defg" and list(written.items()) == [(id, [id * 2]) for id in "abcdefg"]
    assert journal.journals(command.output) == []


def test_ranks_share_what_no_journal_has(command, monkeypatch):
    """Each takes every third; a run on one rank then reads the journals of all three, but not another output's."""
    assert run(command, monkeypatch, rank=1, world_size=3) == ("be", {})
    write(command.output + "2", 0, [RECORDS[0] | {"id": "g"}])
    assert run(command, monkeypatch, rank=2, world_size=3) == ("d", {})  # of the five that are left then
    assert [path.name for path in journal.journals(command.output)] == ["out.journal-1-0", "out.journal-2-1"]
    done, written = run(command, monkeypatch)
    assert done == "acfg" and list(written) == list("abcdefg")


def test_another_run_than_the_unfinished_one_is_refused(command, monkeypatch, tmp_path):
    run(command, monkeypatch, ends_before="d")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "weights").write_text("weights")
    other = tmp_path / "other"
    other.write_text("others")
    for change, name in ((dict(n=9), "n"), (dict(input=str(other)), "input"), (dict(model="hub/name"), "model")):
        with pytest.raises(ValueError, match=rf"-0 is what another run left unfinished: it differs in {name}\."):
            run(replace(command, **change), monkeypatch)
    (tmp_path / "model" / "weights").write_text("others")
    with pytest.raises(ValueError, match=r"it differs in model\."):
        run(command, monkeypatch)
    assert run(replace(command, model=str(copy)), monkeypatch)[0] == "defg"  # what it holds counts, not its name
