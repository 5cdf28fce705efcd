"""Foreign formats: dialogues by hand, every reason to leave a row out, the real HH-RLHF file both ways."""

import gzip
import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hps.data.listwise import Row, read, write
from hps.prepare.formats import DROPS, Dropped, hh_rlhf, to_hh_rlhf
from hps.prepare.importers import export_rows, import_file

ASK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Tea?"
ONE_TURN = ({"role": "user", "content": "u"},)
GOOD = {"chosen": ASK + "\n\nAssistant: Yes.", "rejected": ASK + "\n\nAssistant: No."}


def put(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def talk(answer, ask=ASK):
    return f"{ask}\n\nAssistant: {answer}"


def test_a_dialogue_by_hand():
    row = hh_rlhf(GOOD, "f:1")
    assert row.prompt == (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Tea?"},
    )
    assert (row.responses, row.chosen, row.rejected, row.rewards) == (("Yes.", "No."), 0, 1, None)
    assert (row.source, row.where) == ("hh-rlhf", "f:1")
    assert to_hh_rlhf(row, 0, 1) == GOOD


def test_the_id_is_stable_and_depends_on_every_text():
    row = hh_rlhf(GOOD, "f:1")
    assert row.id == "hh-rlhf-07fd934152cd6ff1"  # written down: files of different years must not differ
    others = [
        {"chosen": talk("Yes"), "rejected": talk("No.")},
        {"chosen": talk("Yes."), "rejected": talk("No")},
        {"chosen": GOOD["rejected"], "rejected": GOOD["chosen"]},
        {key: text.replace("Hello", "Hallo") for key, text in GOOD.items()},
    ]
    assert len({row.id, *(hh_rlhf(other, "g:9").id for other in others)}) == 5
    assert hh_rlhf(GOOD, "g:9").id == row.id


@pytest.mark.parametrize(
    ("chosen", "counter", "reason"),
    [
        ("Human: Hi\n\nAssistant: Yes.", "rows_malformed", "chosen does not start"),
        ("", "rows_malformed", "chosen does not start"),
        ("Well." + talk("Yes."), "rows_malformed", "chosen does not start"),
        ("\n\nAssistant: Yes.", "rows_malformed", "chosen does not start"),
        (ASK, "rows_malformed", "chosen does not end with a turn of Assistant"),
        (talk("Yes.\n\nAssistant: Maybe."), "rows_malformed", "two turns of one speaker in a row"),
        (talk("Yes.", ASK + "\n\nHuman: Well?"), "rows_malformed", "two turns of one speaker in a row"),
        (talk("Yes.", "\n\nHuman: Tea?"), "rows_prompts_differ", "differ before the last answer"),
        (talk("Yes.", ASK + " "), "rows_prompts_differ", "differ before the last answer"),
        (talk(" \n"), "rows_empty_response", "an answer is empty"),
        (ASK + "\n\nAssistant:", "rows_empty_response", "an answer is empty"),
        (talk("No. "), "rows_equal_responses", "both answers are the same"),
        (talk("Yes \ud800"), "rows_malformed", "half of a surrogate pair"),
    ],
)
def test_unusable_records_are_dropped_with_a_reason(chosen, counter, reason):
    dropped = hh_rlhf({"chosen": chosen, "rejected": GOOD["rejected"]}, "f:1")
    assert isinstance(dropped, Dropped) and dropped.counter == counter in DROPS and reason in dropped.reason


def test_an_empty_turn_of_the_prompt_is_malformed():
    pair = {key: talk(answer, "\n\nHuman: ") for key, answer in (("chosen", "Yes."), ("rejected", "No."))}
    assert hh_rlhf(pair, "f:1") == Dropped("rows_malformed", "prompt[0].content is empty")


def test_counts_and_reasons_say_what_was_lost(tmp_path):
    other = {"chosen": talk("Sure."), "rejected": talk("No.")}
    bad = [{**GOOD, "chosen": talk("")}] * 6
    path = put(tmp_path / "x.jsonl", GOOD, {**GOOD, "chosen": ASK}, GOOD, *bad, other)
    rows, counts, reasons, _ = import_file("hh-rlhf", path)
    assert [row.responses[0] for row in rows] == ["Yes.", "Sure."]
    assert counts.keys() == {"rows_read", "rows_kept", "rows_skipped", *DROPS}
    assert {key: n for key, n in counts.items() if n} == {
        "rows_read": 10,
        "rows_kept": 2,
        "rows_malformed": 1,
        "rows_empty_response": 6,
        "rows_duplicate": 1,
    }
    assert reasons == [
        f"{path}:2: chosen does not end with a turn of Assistant",
        f"{path}:3: the same as {path}:1",
        *(f"{path}:{line}: an answer is empty" for line in (4, 5, 6)),
    ]


def test_limit_and_skip_split_the_usable_rows(tmp_path):
    records = [{"chosen": talk(f"Yes {i}."), "rejected": talk("No.")} for i in range(6)]
    bad = {**GOOD, "chosen": ASK}
    path = put(tmp_path / "x.jsonl", records[0], bad, *records[1:3], records[0], *records[3:])
    whole = [row.id for row in import_file("hh-rlhf", path)[0]]
    assert len(whole) == 6
    first, counts, *_ = import_file("hh-rlhf", path, limit=4)
    assert (counts["rows_kept"], counts["rows_duplicate"], counts["rows_read"]) == (4, 1, 6)
    second, counts, *_ = import_file("hh-rlhf", path, skip=4)
    assert (counts["rows_kept"], counts["rows_skipped"]) == (2, 4)
    assert [row.id for row in first + second] == whole
    assert [row.id for row in import_file("hh-rlhf", path, skip=2, limit=3)[0]] == whole[2:5]


def test_the_authors_format_as_list_and_as_lines(tmp_path):
    records = [
        {"prompt": "<|user|>Hi<|assistant|>", "responses": ["a", "b", "c"], "rewards": [1.5, 2, -1]},
        {"prompt": "p", "responses": ["a"]},
    ]
    lines, *_ = import_file("authors", put(tmp_path / "x.jsonl", *records))
    assert [(row.prompt, row.responses, row.rewards) for row in lines] == [
        ("<|user|>Hi<|assistant|>", ("a", "b", "c"), (1.5, 2.0, -1.0)),
        ("p", ("a",), None),
    ]
    assert lines[0].id.startswith("authors-") and lines[0].source == "authors"
    (tmp_path / "x.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    for name in ("x.json", "x.json.gz"):
        rows, counts, *_ = import_file("authors", tmp_path / name)
        assert [(row.id, row.rewards) for row in rows] == [(row.id, row.rewards) for row in lines]
        assert rows[1].where == f"{tmp_path / name}[1]" and counts["rows_read"] == 2


def test_what_is_refused(tmp_path):
    path = put(tmp_path / "x.jsonl", GOOD)
    with pytest.raises(ValueError, match="unknown source 'hhrlhf'; did you mean 'hh-rlhf'"):
        import_file("hhrlhf", path)
    with pytest.raises(ValueError, match="skip = -1 must be"):
        import_file("hh-rlhf", path, skip=-1)
    with pytest.raises(ValueError, match="limit = 0 at least 1"):
        import_file("hh-rlhf", path, limit=0)
    with pytest.raises(ValueError, match=r"no row is left .*rows_read = 1, rows_skipped = 1"):
        import_file("hh-rlhf", path, skip=1)
    with pytest.raises(ValueError, match=r"x.jsonl:1: unknown key 'chosen'; did you mean"):
        import_file("authors", path)
    for record, message in [
        ({"chosen": "x"}, "y.jsonl:1: the key 'rejected' is missing"),
        ({"chosen": [], "rejected": ""}, "y.jsonl:1: chosen must be a string, not list"),
        ({**GOOD, "margin": 1}, "y.jsonl:1: unknown key 'margin'"),
        (3, "y.jsonl:1: a record must be a JSON object"),
    ]:
        with pytest.raises(ValueError, match=message):
            import_file("hh-rlhf", put(tmp_path / "y.jsonl", record))
    for record, message in [
        ({"prompt": [], "responses": []}, "prompt must be a string"),
        ({"prompt": "p", "responses": ["a"], "rewards": [1, 2]}, "1 responses but 2 rewards"),
    ]:
        with pytest.raises(ValueError, match=f"y.jsonl:1: {message}"):
            import_file("authors", put(tmp_path / "y.jsonl", record))
    (tmp_path / "cut.json").write_text('[{"prompt": "p",')
    with pytest.raises(ValueError, match=r"cut.json: broken JSON at character 17"):
        import_file("authors", tmp_path / "cut.json")
    with pytest.raises(ValueError, match=r"nowhere.jsonl: cannot be read"):
        import_file("authors", tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("change", "counter", "reason"),
    [
        ({"rejected": None}, "rows_no_pair", "row 'a' has no chosen and rejected"),
        ({"prompt": "Hi"}, "rows_unsupported", "the prompt is a string"),
        ({"prompt": ({"role": "system", "content": "s"}, *ONE_TURN)}, "rows_unsupported", "they are system, Human"),
        ({"prompt": ONE_TURN * 2}, "rows_unsupported", "they are Human, Human, Assistant"),
        ({"responses": ("x\n\nHuman: y", "z")}, "rows_unsupported", "no such mark inside a text"),
        ({"responses": ("x", " ")}, "rows_empty_response", "an answer is empty"),
        ({"responses": ("x", "x ")}, "rows_equal_responses", "both answers are the same"),
    ],
)
def test_export_leaves_out_and_counts_what_would_not_come_back(change, counter, reason):
    row = Row("a", ONE_TURN, ("x", "y"), chosen=0, rejected=1, where="f:1")
    records, counts, reasons = export_rows("hh-rlhf", [row, replace(row, **change, where="f:2")])
    assert records == [{key: f"\n\nHuman: u\n\nAssistant: {a}" for key, a in (("chosen", "x"), ("rejected", "y"))}]
    assert {key: n for key, n in counts.items() if n} == {"rows_read": 2, "rows_written": 1, counter: 1}
    assert len(reasons) == 1 and reasons[0].startswith("f:2: ") and reason in reasons[0]


pieces = st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " ", "\n", "Tea", "\ud800", "Human: "])
dialogues = st.lists(pieces, max_size=9).map("".join)


@settings(deadline=None)
@given(dialogues, dialogues)
def test_any_pair_of_texts_is_a_row_or_dropped(chosen, rejected):
    row = hh_rlhf({"chosen": chosen, "rejected": rejected}, "f:1")
    if isinstance(row, Row):
        assert hh_rlhf(to_hh_rlhf(row, 0, 1), "f:1") == row
    else:
        assert row.counter in DROPS


def test_the_real_file_both_ways(hh_rlhf_path, tmp_path):
    rows, counts, reasons, _ = import_file("hh-rlhf", hh_rlhf_path)
    assert counts["rows_read"] == 1500 == sum(counts.values()) - 1500
    assert counts["rows_kept"] == len(rows) > 1480 and len(reasons) == 5
    with gzip.open(hh_rlhf_path, "rt", encoding="utf-8") as file:
        real = [json.loads(line) for line in file]
    kept = [real[int(row.where.rpartition(":")[2]) - 1] for row in rows]
    assert export_rows("hh-rlhf", rows).records == kept
    for row, record in zip(rows, kept, strict=True):
        # The published rule of thumb, independent of our parser: the answer follows the last "Assistant:".
        assert row.responses[0] == record["chosen"].rpartition("\n\nAssistant: ")[2]
    write(tmp_path / "rows.jsonl.gz", rows)
    assert [row.id for row in read(tmp_path / "rows.jsonl.gz")] == [row.id for row in rows]
