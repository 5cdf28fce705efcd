"""The list-wise format: what is accepted, every message for what is not, and exact round trips."""

import gzip
import json
import re
import weakref
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hps.data import listwise, rows
from hps.data.listwise import Rows, read, write
from hps.data.rows import ROLES, Row, only, parse_row, stream

TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
GOOD = {"id": "a", "prompt": "Hi", "responses": ["yes", "no"], "rewards": [1, -0.5]}


def put(path, *lines):
    data = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    path.write_bytes(b"".join(data))
    return path


def test_every_field_is_read():
    full = {**GOOD, "prompt": TALK, "chosen": 1, "rejected": 0, "source": "toy", "model": {"name": ["x", None]}}
    assert parse_row(full, "f:3") == Row(
        "a", tuple(TALK), ("yes", "no"), (1.0, -0.5), 1, 0, "toy", "f:3", {"model": {"name": ["x", None]}}
    )
    assert parse_row({"id": "a", "prompt": "p", "responses": []}, "f:1") == Row("a", "p", (), where="f:1")
    assert parse_row({"id": "a", "prompt": "p", "responses": [""]}, "f:1").responses == ("",)


def test_tool_turns_and_other_keys_of_messages():
    """An answer to what a tool said; no calls are no key, and what else a message has goes to the template with it."""
    call = {"role": "assistant", "content": "look(7)", "tool_calls": []}
    said = {"role": "tool", "content": "rain", "name": "look", "tool_call_id": "1"}
    row = parse_row({**GOOD, "prompt": [*TALK, call, {**said, "tool_calls": None}]}, "f:1")
    assert row.prompt == (*TALK, {"role": "assistant", "content": "look(7)"}, said)


REFUSED = (
    ({"rewards": ..., "reward": [1, 2]}, "unknown key 'reward'; did you mean 'rewards'. Valid keys: id, prompt"),
    ({"Source": "x"}, "unknown key 'Source'; did you mean 'source'"),
    ({"note": ["a\ud800"]}, "'note' cannot be kept: .*surrogates not allowed"),
    ({"note": float("inf")}, "'note' cannot be kept: Out of range float"),
    *(({key: ...}, f"the key '{key}' is missing") for key in ("id", "prompt", "responses")),
    ({"id": 3}, "id must be a string, not a number"),
    ({"id": " "}, "id is empty"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "\ude00"}, r"prompt holds half of a surrogate pair \(\\ude00\) at character 0"),
    ({"prompt": {"role": "user"}}, "prompt must be a string or a list of messages, not an object"),
    ({"prompt": []}, "it ends with nothing"),
    ({"prompt": ["Hi"]}, r"prompt\[0\] must be an object with role and content, not a string"),
    ({"prompt": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'; use one of system, user, assistant, tool"),
    ({"prompt": [{"role": "user", "contents": "x"}]}, r"prompt\[0\]: unknown key 'contents'; .* 'content'"),
    ({"prompt": [{"role": "user", "text": "x"}]}, r"prompt\[0\]: the key 'content' is missing"),
    ({"prompt": [{"role": "user", "content": "\n"}]}, r"prompt\[0\].content is empty"),
    ({"prompt": [{**TALK[1], "tool_calls": [{}]}]}, r"prompt\[0\] has tool_calls, which not every template writes"),
    ({"prompt": [{**TALK[1], "name": "\udc00"}]}, r"prompt\[0\]: 'name' cannot be kept"),
    ({"prompt": [*TALK, {"role": "assistant", "content": "x"}]}, "must end with a turn of 'user' or 'tool'"),
    ({"responses": "yes"}, "responses must be a list, not a string"),
    ({"responses": ["yes", None]}, r"responses\[1\] must be a string, not null"),
    ({"responses": ["yes", "a\ud800b"]}, r"responses\[1\] holds half of a surrogate pair \(\\ud800\) at character 1"),
    ({"rewards": [1]}, "2 responses but 1 rewards"),
    ({"rewards": [1, True]}, r"rewards\[1\] must be a number, not true/false"),
    ({"rewards": [float("nan"), 1]}, r"rewards\[0\] must be a finite number"),
    *(
        ({"rewards": [x, 1]}, r"rewards\[0\] must be a finite number, of 1e\+30 at most")
        for x in (1.1e30, -3.4e38, 10**400)
    ),
    ({"rewards": None}, "rewards must be a list, not null"),
    ({"chosen": 2}, "chosen = 2 is out of range; there are 2 responses"),
    ({"chosen": True}, "chosen must be the index of a response, not true/false"),
    ({"rejected": 0}, "rejected = 0 needs a chosen that differs from it, not None"),
    ({"chosen": 1, "rejected": 1}, "rejected = 1 needs a chosen that differs"),
    ({"source": 1}, "source must be a string"),
)


def test_what_is_refused():
    for change, message in REFUSED:
        row = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
        with pytest.raises(ValueError, match=rf"^data/x.jsonl:7: .*{message}"):
            parse_row(row, "data/x.jsonl:7")
    near = {**GOOD, "reward": 1, "ids": [], "responses_2": 3}  # what they look like is there: no misspellings
    assert parse_row(near, "f:1").others == {"reward": 1, "ids": [], "responses_2": 3}


BROKEN = (
    (b'{"id": "b", \n', r":2: broken JSON at character \d+"),
    (b'{"id": "b", "prompt": "p", "responses": ["x"], "rewards": [NaN]}\n', ":2: .*NaN is no number of JSON"),
    (b'{"id": "b", "prompt": "p", "responses": [""], "rewards": [1e999]}\n', r":2: rewards\[0\] must be"),
    (b'{"id": "b", "prompt": "p", "responses": [], "note": 1e999}\n', r":2: 'note' cannot be kept"),
    (b'{"id": "b", "id": "c", "prompt": "p", "responses": []}\n', ":2: .*the key 'id' is there twice"),
    (b'{"id": "b", "prompt": "caf\xe9", "responses": []}\n', ":2: not UTF-8 at byte 27"),
    (b"[" * 100_000 + b"\n", ":2: broken JSON"),
    (b"[1" + b"0" * 5000 + b"]\n", ":2: broken JSON"),
    (b"[]\n", ":2: a row must be a JSON object, not a list"),
    (b"\n", ":2: blank line"),
    (GOOD, r":2: id 'a' is already used at .*x.jsonl:1;"),
)


def test_broken_files_name_the_line(tmp_path):
    for second, message in BROKEN:
        with pytest.raises(ValueError, match=r"x.jsonl" + message):
            read(put(tmp_path / "x.jsonl", GOOD, second))
    assert len(read(put(tmp_path / "x.jsonl", GOOD, json.dumps({**GOOD, "id": "b"}).encode()))) == 2  # no last newline


def test_files_that_are_no_listwise_data(tmp_path):
    rows = gzip.compress(b"".join(json.dumps({**GOOD, "id": str(i)}).encode() + b"\n" for i in range(99)))
    half, one = len(rows) // 2, json.dumps(GOOD).encode()
    no_value, guess = (
        ":1: broken JSON at character 1: Expecting value; ",
        "is this JSON Lines? data_prep.py import reads other files",
    )
    for name, content, message in (
        ("none.jsonl", None, ": cannot be read: No such file or directory"),
        ("", None, ": cannot be read: Is a directory"),
        ("empty.jsonl", b"", ": the file is empty"),
        ("x.csv", b"id,prompt\na,why\n", f"{no_value}{guess}"),
        ("x.json", b'[\n {"id": "a"}\n]\n', f":1: broken JSON at character 3: Expecting value; {guess}"),
        ("x.png", b"\x89PNG\r\n\x1a\n", f":1: not UTF-8 at byte 1: invalid start byte; {guess}"),
        ("x.jsonl", one.decode().encode("utf-16"), ":1: not UTF-8 at byte 1: invalid start byte; this is UTF-16: "),
        ("x.jsonl", b"\xef\xbb\xbf" + one, ":1: broken JSON at character 1: Unexpected UTF-8 BOM"),
        ("x.jsonl", rows, ":1: not UTF-8 at byte 2: invalid start byte; this is gzip: let its name end in .gz"),
        ("x.parquet", b"PAR1\x15\x04\n", f"{no_value}this is parquet: data_prep.py import reads that, as .parquet"),
        ("plain.jsonl.gz", one, ": broken gzip file: Not a gzipped file"),
        ("plain.jsonl.xz", one, ": broken xz"),
        ("cut.jsonl.gz", rows[:half], ": broken gzip file: Compressed file ended before the end-of-stream marker"),
        ("flipped.jsonl.gz", rows[:half] + bytes([rows[half] ^ 255]) + rows[half + 1 :], ":"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name}{message}")):
            read(tmp_path / name)


def test_long_lines_are_refused_without_loading_them(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    file = MagicMock(wraps=put(tmp_path / "x.jsonl", GOOD, {**GOOD, "id": "b" * 200}).open("rb"))
    file.__enter__.return_value = file
    monkeypatch.setattr(rows, "open", lambda *_: file, raising=False)
    with pytest.raises(ValueError, match=r"x.jsonl:2: the line is longer than"):
        read(tmp_path / "x.jsonl")
    assert [call.args for call in file.readline.call_args_list] == [(101,), (101,)]


def test_a_stream_reads_no_further_than_it_is_asked(tmp_path):
    """Row one comes out before the broken line two is seen."""
    rows = stream(put(tmp_path / "x.jsonl", GOOD, b"{\n"))
    assert next(rows).id == "a"
    with pytest.raises(ValueError, match=r"x.jsonl:2: broken JSON"):
        write(tmp_path / "z.jsonl", rows)


text = st.text(st.characters(exclude_categories=["Cs"]))
filled = text.filter(str.strip)
turn = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": filled}, optional={"name": text})
talk = st.builds(lambda turns, last: (*turns, {"role": "user", "content": last}), st.lists(turn, max_size=2), filled)


@st.composite
def random_rows(draw):
    n = draw(st.integers(0, 4))
    pair = draw(st.permutations(range(n)))[:2] if n > 1 else []
    rewards = st.tuples(*[st.floats(-1e30, 1e30)] * n)
    return Row(
        id=draw(filled),
        prompt=draw(filled | talk),
        responses=draw(st.tuples(*[text] * n)),
        rewards=draw(st.none() | rewards),
        chosen=pair[0] if pair else None,
        rejected=draw(st.sampled_from([None, pair[1]])) if pair else None,
        source=draw(st.none() | filled),
        others=draw(st.dictionaries(st.sampled_from(["note", "\u00fc", "a b"]), text | st.lists(st.integers()))),
    )


row_lists = st.lists(random_rows(), min_size=1, max_size=3, unique_by=lambda row: row.id)


@settings(deadline=None, max_examples=60)
@given(row_lists, st.sampled_from(["x.jsonl", "x.jsonl.gz"]))
def test_write_then_read_gives_the_rows_back(tmp_path_factory, rows, name):
    path = tmp_path_factory.mktemp("rows") / name
    write(path, rows)
    back = read(path)
    assert [replace(row, where="") for row in back] == rows
    assert [row.where for row in back] == [f"{path}:{i + 1}" for i in range(len(rows))]
    first = path.read_bytes()
    write(path, iter(back))
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == [name]  # no temporary file stays


def test_keys_are_written_in_order(tmp_path):
    """Absent ones are left out, other keys stand last; equal rows give equal bytes."""
    row = Row("a", "caf\u00e9", ("x", "y"), (0.1, 2), 1, 0, "s", "", {"note": {"b": 1, "a": None}})
    write(tmp_path / "x.jsonl", [row, Row("b", ({"content": "Hi", "role": "user"},), ())])
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == (
        '{"id": "a", "prompt": "caf\u00e9", "responses": ["x", "y"], "rewards": [0.1, 2.0], "chosen": 1, '
        '"rejected": 0, "source": "s", "note": {"b": 1, "a": null}}\n'
        '{"id": "b", "prompt": [{"role": "user", "content": "Hi"}], "responses": []}\n'
    )
    write(tmp_path / "x.jsonl.gz", [Row("b", "q", ())])
    packed = (tmp_path / "x.jsonl.gz").read_bytes()
    assert packed[3:8] == bytes(5)  # gzip header: no file name, time 0
    assert gzip.decompress(packed) == b'{"id": "b", "prompt": "q", "responses": []}\n'


def test_a_failed_write_leaves_the_old_file(tmp_path):
    old = put(tmp_path / "x.jsonl", GOOD).read_bytes()
    for wrong in ([], [Row("a", "p", ("x",), (float("nan"),))], [Row("a", "p", ())] * 2, [Row("a", "", ())]):
        with pytest.raises(ValueError):
            write(tmp_path / "x.jsonl", wrong)
    with pytest.raises(TypeError, match="not JSON serializable"):
        listwise.write_lines(tmp_path / "x.jsonl", [{"fine": 1}, {"not JSON": object()}])
    with pytest.raises(ValueError, match=r"name it \.jsonl, \.jsonl\.gz or \.jsonl\.xz"):
        listwise.write_lines(tmp_path / "x.parquet", [{}])
    assert (tmp_path / "x.jsonl").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def test_rows_are_read_when_they_are_asked_for(tmp_path):
    """By number, slice or array, in any order; from the file that was checked, whatever has its name by now."""
    for name in ("x.jsonl", "x.jsonl.gz", "x.jsonl.xz"):
        path = tmp_path / name
        write(path, [Row(f"caf\u00e9 {i}", "p" * (i + 1), ("x",) * i) for i in range(9)])
        whole, found = read(path), Rows(path)
        assert list(found) == whole and len(found) == 9
        assert found[np.int64(7)] == whole[7] and found[-1] == whole[-1]
        some = found[np.array([8, 0, 3])]
        assert list(some) == [whole[8], whole[0], whole[3]] and list(some[1:]) == [whole[0], whole[3]]
        with pytest.raises(IndexError):
            found[9]
        write(path, [Row("b", "another", ())])
        assert list(found) == whole
    plain = Rows(put(tmp_path / "y.jsonl", GOOD))
    put(tmp_path / "y.jsonl", {**GOOD, "prompt": "Ho"})
    with pytest.raises(ValueError, match=r"y.jsonl: changed while it was read; start again"):
        plain[0]
    with pytest.raises(ValueError, match=r"y.jsonl:2: id 'a' is already used at .*y.jsonl:1;"):
        Rows(put(tmp_path / "y.jsonl", GOOD, GOOD))


def test_places_are_those_of_a_dict(monkeypatch):
    monkeypatch.setattr(rows, "RECENT", 4)
    places, expected = rows.Places(), {}
    for i, id in enumerate("abcdefghijaekz\u00fc"):
        assert places.add(id, i) == expected.get(id)
        expected.setdefault(id, i)
    assert {id: places.get(id) for id in expected} == expected and "y" not in places and "a" in places


def test_few_rows_are_alive_while_they_are_written(tmp_path):
    made = []

    def rows():
        for i in range(50):
            row = Row(str(i), "p", ("x",))
            made.append(weakref.ref(row))
            yield row
            del row
            assert sum(one() is not None for one in made) <= 3

    write(tmp_path / "x.jsonl", rows())


def test_some_responses_keep_or_drop_the_human_pair_whole():
    row = Row("a", "p", ("x", "y", "z"), (1.0, 2.0, 3.0), 0, 1, None, "f:1")
    two = only(row, range(2))
    assert (two.responses, two.rewards, two.chosen, two.rejected) == (("x", "y"), (1.0, 2.0), 0, 1)
    one = only(row, range(1))
    assert (one.responses, one.rewards, one.chosen, one.rejected) == (("x",), (1.0,), None, None)
    assert only(row, range(len(row.responses))) == row
