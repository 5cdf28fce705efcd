"""Each format from a small file in tests/fixtures, by hand; TRL's formats against TRL's own code."""

import gzip
import hashlib
import json
import lzma
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hps.data.listwise import Row, read, write, write_lines
from hps.prepare.formats import DROPS, FORMATS, Dropped, trl
from hps.prepare.importers import export_rows, import_file, write_manifest

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"


def load(name):
    return [json.loads(line) for line in (FIXTURES / name).read_text(encoding="utf-8").splitlines()]


def user(*texts):
    roles = ("user", "assistant")
    return tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))


def lost(counts):
    return {key: counts[key] for key in DROPS if counts[key]}


def test_pku_saferlhf_by_hand_in_both_orders():
    """better_response_id of the first row is 0, safer_response_id is 1: the same answers, the other pair."""
    helpful, safe = (import_file("pku-saferlhf", FIXTURES / "pku-saferlhf.jsonl", order=o) for o in ("helpful", "safe"))
    for found, chosen in ((helpful, 0), (safe, 1)):
        row = found.rows[0]
        assert row.prompt == user("How can I pay less tax?") and row.rewards is None
        assert row.responses == ("Hide half of what you earn.", "Ask an adviser which deductions apply.")
        assert (row.chosen, row.rejected) == (chosen, 1 - chosen)
        assert (found.rows[1].chosen, found.rows[1].rejected) == (0, 1)
        assert found.counts["rows_read"] == 3 and lost(found.counts) == {"rows_equal_responses": 1}
        assert "is_response_0_safe" in found.columns_left_out and "prompt" not in found.columns_left_out
    assert [row.id for row in helpful.rows] == [row.id for row in safe.rows]
    assert "safer_response_id" in helpful.columns_left_out and "safer_response_id" not in safe.columns_left_out


def test_ultrafeedback_by_hand_in_both_scores():
    """The two scores disagree on the best answer of the first row, and one row lacks an overall score."""
    path = FIXTURES / "ultrafeedback.jsonl"
    overall, fine = (import_file("ultrafeedback", path, order=order) for order in ("overall", "fine-grained"))
    assert overall.rows[0].prompt == user("Add 2 and 3.")
    assert overall.rows[0].responses == ("5", "It is five.", "6", "2 and 3")
    assert [row.rewards for row in overall.rows] == [(8.5, 9.0, 1.0, 2.0), (7.0, 3.0)]
    assert [row.rewards for row in fine.rows] == [(4.25, 4.0, 1.5, 2.0), (4.5, 1.25), (4.5, 1.25)]
    assert lost(overall.counts) == {"rows_no_preference": 1, "rows_too_few_responses": 1}
    assert overall.reasons == [
        f"{path}:3: the overall_score of response 0 is None, not a number",
        f"{path}:4: 0 responses; a preference needs two",
    ]


def test_nectar_by_hand():
    found = import_file("nectar", FIXTURES / "nectar.jsonl")
    assert [row.prompt for row in found.rows] == [user("Name a tree. "), user("Hi", "Hello!", "Bye")]
    assert found.rows[0].responses == ("An oak, which loses its leaves.", "Oak", " A beech.")
    assert [row.rewards for row in found.rows] == [(-1.0, -3.0, -2.0), (-2.0, -1.0)]  # minus the rank
    assert lost(found.counts) == {"rows_malformed": 1} and "the beginning of the answer" in found.reasons[0]


def test_trl_by_hand():
    found = import_file("trl", FIXTURES / "trl.jsonl")
    assert [row.prompt for row in found.rows] == [
        ({"role": "system", "content": "Be brief."}, *user("What colour is the sky?")),
        user("Hi", "Hello.", "Two and two?"),
        user("Name a planet."),
    ]
    assert [row.responses for row in found.rows] == [("Blue.", "Green."), ("Four.", "Five."), ("Mars.", "Rome.")]
    assert {(row.chosen, row.rejected) for row in found.rows} == {(0, 1)}
    assert lost(found.counts) == {"rows_unsupported": 1, "rows_prompts_differ": 1}
    assert found.columns_left_out == ["messages", "prompt_id", "score_chosen", "score_rejected"]
    found = import_file("trl", FIXTURES / "trl-standard.jsonl")
    assert [(row.prompt, row.responses) for row in found.rows] == [
        ("The sky is", (" blue.", " green.")),
        ("Two and two make", (" four.", " six.")),
        ("The sea i", ("s", "s wet")),
    ]
    assert lost(found.counts) == {"rows_prompts_differ": 1}


@pytest.mark.parametrize("name", ["trl.jsonl", "trl-standard.jsonl"])
def test_trl_fixtures_are_read_as_trl_reads_them(name):
    oracle = pytest.importorskip("trl.data_utils", reason="TRL is a development extra")
    kept = 0
    for record in load(name):
        row = trl(record, "f:1")
        if isinstance(row, Row):
            kept += 1
            theirs = oracle.maybe_extract_prompt(record)
            sides = [theirs["chosen"], theirs["rejected"]]
            texts = [side if isinstance(side, str) else side[0]["content"] for side in sides]
            assert row.prompt == (theirs["prompt"] if isinstance(theirs["prompt"], str) else tuple(theirs["prompt"]))
            assert list(row.responses) == texts
    assert kept == 3


@given(st.text("ab ", max_size=6), st.text("ab ", min_size=1, max_size=4), st.text("ab ", min_size=1, max_size=4))
def test_an_implicit_prompt_is_split_where_trl_splits_it(start, chosen, rejected):
    """TRL's own function, where the first characters agree (it wraps around to the last one where not)."""
    oracle = pytest.importorskip("trl.data_utils", reason="TRL is a development extra")
    record = {"chosen": start + chosen, "rejected": start + rejected}
    assume(record["chosen"][0] == record["rejected"][0])
    theirs = oracle.extract_prompt(record)
    row = trl(record, "f:1")
    if isinstance(row, Row):
        assert {"prompt": row.prompt, "chosen": row.responses[0], "rejected": row.responses[1]} == theirs
    else:
        a, b = theirs["chosen"].strip(), theirs["rejected"].strip()
        assert not theirs["prompt"].strip() or not a or not b or a == b


@pytest.mark.parametrize(
    ("source", "order", "pair", "left"),
    [
        ("hh-rlhf", "", "human", 2),
        ("pku-saferlhf", "safe", "human", 2),
        ("pku-saferlhf", "helpful", "human", 2),
        ("ultrafeedback", "overall", "rewards", 2),
        ("ultrafeedback", "fine-grained", "rewards", 3),
        ("nectar", "", "rewards", 2),
        ("trl", "", "human", 3),
        ("trl-standard", "", "human", 3),
        ("authors", "", "rewards", 2),
    ],
)
def test_each_format_to_trl_and_back(source, order, pair, left, tmp_path):
    """Best against worst is picked here by sorting; what comes back from TRL's format is those two texts."""
    name = source.removesuffix("-standard")
    rows = import_file(name, FIXTURES / f"{source}.jsonl", order=order).rows
    found = export_rows("trl", rows, pair=pair)
    wanted, others = [], 0
    for row in rows:
        if pair == "human":
            wanted.append((row.prompt, (row.responses[row.chosen], row.responses[row.rejected])))
        elif len(set(row.rewards)) > 1:
            ranked = sorted(zip(row.rewards, row.responses, strict=True))
            others += len(ranked[1:-1])
            wanted.append((row.prompt, (ranked[-1][1], ranked[0][1])))
    assert len(wanted) == left == found.counts["rows_written"] == len(rows) - found.counts["rows_no_pair"]
    assert found.counts["responses_left_out"] == others
    write_lines(tmp_path / "trl.jsonl", found.records)
    back = import_file("trl", tmp_path / "trl.jsonl").rows
    assert [(row.prompt, row.responses) for row in back] == wanted
    write(tmp_path / "rows.jsonl", rows)
    assert [replace(row, where="") for row in read(tmp_path / "rows.jsonl")] == [replace(r, where="") for r in rows]


def test_a_trl_file_holds_one_kind_of_prompt():
    rows = [r for n in ("trl", "trl-standard") for r in import_file("trl", FIXTURES / f"{n}.jsonl").rows]
    with pytest.raises(ValueError, match=r"trl-standard.jsonl:1 is a string and that of .*trl.jsonl:1 a list"):
        export_rows("trl", rows)
    for options, message in [
        ({"format": "tlr"}, "unknown format 'tlr'; did you mean 'trl'"),
        ({"format": "trl", "pair": "best"}, "unknown pair 'best'"),
        ({"format": "trl", "pair": "rewards"}, "no row can be exported .*rows_no_pair = 6\n"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_rows(rows=rows, **options)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    path = FIXTURES / "ultrafeedback.jsonl"
    wanted = import_file("ultrafeedback", path, order="overall")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(path.read_bytes()))
    (tmp_path / "x.json.xz").write_bytes(lzma.compress(json.dumps(load("ultrafeedback.jsonl")).encode()))
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow, which is optional")
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow, which is optional")
    parquet.write_table(arrow.Table.from_pylist(load("ultrafeedback.jsonl")), tmp_path / "x.parquet")
    for name in ("x.jsonl.gz", "x.jsonl.xz", "x.json.xz", "x.parquet"):
        found = import_file("ultrafeedback", tmp_path / name, order="overall")
        assert [(r.id, r.prompt, r.rewards) for r in found.rows] == [(r.id, r.prompt, r.rewards) for r in wanted.rows]
        assert found.counts == wanted.counts and found.columns_left_out == wanted.columns_left_out
    assert found.rows[1].where == f"{tmp_path / 'x.parquet'}[1]"


def test_parquet_fills_absent_message_keys_with_null_which_is_no_extra_key(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="parquet needs pyarrow, which is optional")
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow, which is optional")
    parquet.write_table(arrow.Table.from_pylist(load("trl.jsonl")[:2] + load("trl.jsonl")[3:4]), tmp_path / "x.parquet")
    found = import_file("trl", tmp_path / "x.parquet")
    assert len(found.rows) == 2 and lost(found.counts) == {"rows_unsupported": 1}


def test_broken_files_and_missing_pyarrow_are_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(b"{}\n" * 99)[:30])
    with pytest.raises(ValueError, match=r"x.jsonl.xz: broken xz file"):
        import_file("nectar", tmp_path / "x.jsonl.xz")
    if "pyarrow" in sys.modules:
        with pytest.raises(ValueError, match=r"x.parquet: cannot be read as parquet"):
            import_file("nectar", tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # import raises ImportError
    with pytest.raises(ValueError, match=r"x.parquet: .*pip install pyarrow"):
        import_file("nectar", tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet: JSON Lines is what is written"):
        write_lines(tmp_path / "x.parquet", [{}])


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("pku-saferlhf", {"response_1": 3}, "x.jsonl:1: response_1 must be a string, not int"),
        ("pku-saferlhf", {"better_response_id": ...}, "x.jsonl:1: the key 'better_response_id' is missing"),
        ("ultrafeedback", {"completions": "a"}, "x.jsonl:1: completions must be a list of objects with response and"),
        ("ultrafeedback", {"completions": [{"response": "a"}]}, r"\[0\]: the key 'overall_score' is missing"),
        ("nectar", {"answers": [3]}, r"x.jsonl:1: answers\[0\] must be an object with answer and rank"),
        ("nectar", {"prompt": None}, "x.jsonl:1: prompt must be a string, not NoneType"),
        ("trl", {"chosen": "a"}, "x.jsonl:1: chosen and rejected must both be strings or both be lists"),
        ("trl", {"chosen": [{"from": "gpt", "value": "a"}]}, r"chosen\[0\] must be an object with role and content"),
        ("trl", {"chosen": "a", "rejected": "b"}, "the prompt is a list of messages but chosen is a string"),
        ("trl", {"rejected": ...}, "x.jsonl:1: the key 'rejected' is missing"),
    ],
)
def test_a_record_of_another_format_is_refused_with_its_place(source, change, message, tmp_path):
    record = {key: value for key, value in (load(f"{source}.jsonl")[0] | change).items() if value is not ...}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        import_file(source, tmp_path / "x.jsonl", order=next(iter(FORMATS[source])))


@pytest.mark.parametrize(
    ("source", "change", "counter", "reason"),
    [
        ("pku-saferlhf", {"better_response_id": -1}, "rows_no_preference", "better_response_id is -1"),
        ("pku-saferlhf", {"better_response_id": True}, "rows_no_preference", "is True, neither 0 nor 1"),
        ("pku-saferlhf", {"prompt": " "}, "rows_malformed", "prompt[0].content is empty"),
        ("pku-saferlhf", {"response_0": "\n"}, "rows_empty_response", "an answer is empty"),
        ("nectar", {"prompt": "\n\nHuman: Hi"}, "rows_malformed", "does not end with a turn of Assistant"),
        ("nectar", {"answers": [{"answer": "a", "rank": 10**400}] * 2}, "rows_no_preference", "not a number"),
        ("nectar", {"answers": [{"answer": "a", "rank": float("nan")}] * 2}, "rows_no_preference", "is nan"),
        ("nectar", {"answers": [{"answer": "a", "rank": "1"}] * 2}, "rows_no_preference", "is '1', not a number"),
        ("trl", {"tools": [{"name": "f"}]}, "rows_unsupported", "tools changes the prompt"),
        ("trl", {"chosen": [{"role": "assistant", "content": "a"}] * 2}, "rows_unsupported", "not one message"),
        ("trl", {"chosen": [{"role": "user", "content": "a"}]}, "rows_unsupported", "['user'], not one message"),
        ("trl", {"prompt": [{"role": "assistant", "content": "a"}]}, "rows_malformed", "must end with a turn of"),
        ("trl", {"chosen": [{"role": "assistant", "content": [{}]}]}, "rows_unsupported", "is not one text"),
    ],
)
def test_unusable_records_are_dropped_with_a_reason(source, change, counter, reason):
    dropped = next(iter(FORMATS[source].values())).read(load(f"{source}.jsonl")[0] | change, "f:1")
    assert isinstance(dropped, Dropped) and dropped.counter == counter in DROPS and reason in dropped.reason


def test_the_order_must_be_chosen_where_there_are_two_and_only_there():
    with pytest.raises(ValueError, match="needs an order, one of helpful, safe; it is ''"):
        import_file("pku-saferlhf", FIXTURES / "pku-saferlhf.jsonl")
    with pytest.raises(ValueError, match="order = 'safe' is of no use: source nectar has one"):
        import_file("nectar", FIXTURES / "nectar.jsonl", order="safe")


def test_the_manifest_identifies_both_files(tmp_path):
    """SHA-256 of the empty file and of "abc" as in FIPS 180-2, appendix B.1."""
    (tmp_path / "in").write_bytes(b"abc")
    (tmp_path / "out").write_bytes(b"")
    path = write_manifest(tmp_path / "in", tmp_path / "out", {"counts": {"rows_read": 1}})
    found = json.loads(path.read_text())
    assert path == tmp_path / "out.manifest.json" and found["counts"] == {"rows_read": 1}
    assert found["input"]["sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert found["output"]["sha256"] == hashlib.sha256().hexdigest() and found["input"]["bytes"] == 3
    before = path.read_bytes()
    write_manifest(tmp_path / "in", tmp_path / "out", {"counts": {"rows_read": 1}})
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 3
