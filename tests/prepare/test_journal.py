"""The journal of a long run: what is read back, after which kinds of an end."""

import json

import pytest

from hps.prepare import journal

SETTINGS = {"n": 8, "temperature": 0.9, "model": "abc"}
RECORDS = [{"id": "a", "responses": ["one\ntwo", "\u00fc"]}, {"id": "b", "responses": []}]


def write(output, rank, records, settings=SETTINGS):
    one = journal.Journal(output, rank, settings)
    for record in records:
        one.write(record)


def test_what_all_ranks_wrote_is_read_back(tmp_path):
    output = tmp_path / "new" / "out.jsonl"
    assert journal.read(output, SETTINGS) == {} and journal.files(output) == []
    write(output, 0, RECORDS[:1])
    write(output, 11, RECORDS[1:])
    write(output.with_name("out.jsonl2"), 0, [{"id": "of another output"}])
    assert journal.read(output, SETTINGS) == {"a": RECORDS[0], "b": RECORDS[1]}
    assert [path.name for path in journal.files(output)] == ["out.jsonl.journal-0", "out.jsonl.journal-11"]


def test_every_line_is_on_disk_when_write_returns(tmp_path):
    one = journal.Journal(tmp_path / "out", 0, SETTINGS)
    for at, record in enumerate(RECORDS, 1):
        one.write(record)
        assert len((tmp_path / "out.journal-0").read_bytes().splitlines()) == 1 + at


def test_cut_anywhere_it_keeps_the_whole_lines_and_can_be_taken_up(tmp_path):
    path = tmp_path / "out.journal-0"
    write(tmp_path / "out", 0, RECORDS)
    whole = path.read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        kept = max(sum(end <= cut for end in ends) - 1, 0)
        assert list(journal.read(tmp_path / "out", SETTINGS)) == ["a", "b"][:kept]
        write(tmp_path / "out", 0, RECORDS[kept:])
        assert path.read_bytes() == whole

    path.write_bytes(whole + b'{"id": "c", "responses": ["a long one, of which nothing may be left')
    write(tmp_path / "out", 0, [{"id": "d"}])
    assert path.read_bytes() == whole + b'{"id": "d"}\n'


def test_other_settings_and_broken_lines_are_refused(tmp_path):
    write(tmp_path / "out", 0, RECORDS)
    with pytest.raises(ValueError, match=r"out.journal-0 .* differs in n, seed\. .* delete out.journal-\*"):
        journal.read(tmp_path / "out", SETTINGS | {"n": 9, "seed": 1})
    with open(tmp_path / "out.journal-0", "ab") as file:
        file.write(b'{"id": "c", \n' + json.dumps({"id": "d"}).encode() + b"\n")
    with pytest.raises(ValueError, match="out.journal-0:4: broken JSON"):
        journal.read(tmp_path / "out", SETTINGS)
