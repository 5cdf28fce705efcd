"""Changed inputs to every reader of a file from outside: accepted and finite, or a ValueError that says where. Files
that carry a checksum of ours are those of tests/faults/test_corruption.py.

A table of readers with valid files of theirs, and one driver: each odd value in each place, and drawn changes of
bytes; `make test` draws some dozens for each, `make soak` thousands.
"""

import dataclasses
import json
import math
import os
import random
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import EVALUATION, RUN, SUMMARY
from helpers import ROOT, jsonl

from hps import methods, options
from hps.data import listwise
from hps.data.rows import Row, parse_row
from hps.evaluate import export, judge, survey
from hps.io import loggers
from hps.prepare import importers
from hps.prepare.formats import FORMATS

SECONDS = 20  # that an input may take, on a busy machine


# ---- readers: each is given a path, and looks at what comes out ------------------------------------


def finite(value: Any) -> None:
    """Every number in a JSON value is, whatever holds it."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            finite(item)
    assert not isinstance(value, float) or math.isfinite(value), value


def check_row(row: Any) -> None:
    assert isinstance(row, Row) and row.where
    finite(row.rewards)
    n = len(row.responses)
    assert row.rewards is None or len(row.rewards) == n
    assert all(k is None or 0 <= k < n for k in (row.chosen, row.rejected))
    assert parse_row(json.loads(json.dumps(listwise._record(row)).encode()), row.where) == row


def data(path: Path) -> None:
    for row in listwise.read(path):
        check_row(row)


def imported(source: str, order: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        found = importers.import_file(source, path, order=order)
        for row in found.rows:
            check_row(row)
        counts = Counter({key: n for key, n in found.counts.items() if key.startswith("rows_")})
        assert counts["rows_read"] == counts.total() - counts["rows_read"] and counts["rows_kept"]
        assert len(found.reasons) <= importers.MAX_REASONS

    return read


def training_options(path: Path) -> None:
    argv = ["--model=m", "--data=d", "--out=o", "--config", str(path)]
    c, given = options.read(argv)
    finite(vars(c))
    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        assert type(value) is field.type and (field.type is not int or abs(value) <= 2**63), (field.name, value)
    methods.check(c, given)
    json.dumps(options.settings(c), allow_nan=False)


class Enough(BaseException):
    pass


def exported(path: Path) -> None:
    """run.json, summary.json and eval.json, one a line, as the export of a policy reads them."""

    def stop(*_, **__):
        raise Enough

    about = path.read_bytes().replace(b'"policy"', json.dumps(str(path.with_name("policy"))).encode()).split(b"\n")
    for name, part in zip(("run.json", "summary.json", "eval.json"), (about + 3 * [b""])[:3], strict=True):
        path.with_name(name).write_bytes(part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export.tokenizers, "load_tokenizer", lambda _: None)
        patch.setattr(export.pretrained, "load_causal_lm", stop)
        patch.setattr(export.reward_model, "load_reward_model", stop)
        words = {"model": "policy", "out": "out", "eval_json": "eval.json"}
        try:
            export.main([f"--{key}={path.with_name(name)}" for key, name in words.items()])
        except Enough:
            pass


def metrics(path: Path) -> None:
    loggers.cut(path, 2)
    kept = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(type(line["step"]) is int and line["step"] < 2 for line in kept)


def answers(path: Path) -> None:
    for some in judge.read_answers(path, 9, judge.parse_scores).values():
        found = judge.first_read(some, judge.parse_scores)
        assert found is None or list(found) == list(judge.CRITERIA)
        assert all(type(x) is float and 0 <= x <= 5 and (2 * x).is_integer() for x in (found or {}).values())
        assert all(type(line["model"]) is str for line in some)


def ratings(path: Path) -> None:
    found = survey.read_ratings(path.parent, KEY)
    finite(found)
    finite(survey.results_of(KEY, found))


# ---- valid files, as lists of JSON values and as what makes bytes of their texts, changed or not -----


def lines(parts: list[str]) -> bytes:
    return "\n".join([*parts, ""]).encode(errors="surrogatepass")


def whole(parts: list[str]) -> bytes:
    return parts[0].encode(errors="surrogatepass")


def toml(parts: list[str]) -> bytes:
    return "\n".join(f"{key} = {text}" for key, text in zip(TRAIN, parts)).encode(errors="surrogatepass")


def fixture(name: str) -> list[Any]:
    return jsonl(ROOT / f"tests/fixtures/{name}.jsonl")


ROW = {"id": "a", "prompt": "why", "responses": ["tea is hot", ""], "rewards": [1, -0.5], "chosen": 0, "rejected": 1}
TALK = {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "why"}], "responses": [],
        "id": "b", "source": "toy"}  # fmt: skip
TRAIN = {"method": "dpo-hps", "lr": 2e-4, "positives": 2, "hps_form": "full", "positive_lambda": "1,0.5", "beta": 0.1,
         "lora_rank": 8, "gamma_schedule": "left_knots", "epochs": 2, "shuffle": "epochs", "seed": 3, "dtype": "bf16",
         "save_every": 8, "log_to": "", "exclude_positives": True}  # fmt: skip
STEPS = [{"step": i, "loss": 0.5, "lr": 1e-4} for i in range(3)]
SCORES = dict.fromkeys(judge.CRITERIA, 3.5)
ANSWERS = [{"item": item, "model": "m", "answer": json.dumps(SCORES), "max_tokens": 9} for item in ("i1", "i2")]
KEY = {"study": "s1", "methods": ["SFT", "HPS"], "pairs": [
    {"prompt": "a", "a": "HPS", "b": "SFT"}, {"prompt": "b", "a": "SFT", "b": "HPS"}]}  # fmt: skip
RATER = {"study": "s1", "rater": "ann", "votes": ["a", None]}
OPTIONS = "|".join(field.name for field in dataclasses.fields(options.Config))


class Target(NamedTuple):
    """A reader, the name of its file, valid inputs of it, and what a refusal must name."""

    file: str
    seeds: list[list[Any]]
    join: Callable[[list[str]], bytes]
    read: Callable[[Path], object]
    place: str = ""  # a regular expression; empty: the folder's name


TARGETS: dict[str, Target] = {
    "data": Target("x.jsonl", [[ROW, TALK]], lines, data),
    **{f"{source} {order}".strip(): Target(
        "x.jsonl", [fixture(source)] + ([fixture("trl-standard")] if source == "trl" else []), lines,
        imported(source, order)) for source, form in FORMATS.items() for order in form.orders},
    "options": Target("x.toml", [list(TRAIN.values())], toml, training_options, rf"x\.toml|\b({OPTIONS})\b"),
    "export": Target("all", [[RUN, SUMMARY, EVALUATION]], lines, exported),
    "metrics.jsonl": Target("metrics.jsonl", [STEPS], lines, metrics),
    "answers.jsonl": Target("answers.jsonl", [ANSWERS], lines, answers),
    "ratings": Target("1.json", [[RATER], [RATER | {"votes": ["tie", "b"]}]], whole, ratings),
}  # fmt: skip
# ---- what is changed -------------------------------------------------------------------------------

RAW = "@raw "  # begins a string that stands for JSON which json.dumps would not write
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1.0, 5, 1e308, 2**63, -(2**63) - 1, 10**400, "", " ", "0", "none",
    "\x00", "\ud83d", "\u2028", "../../x", "a" * 3000, [], {}, [[]], {"": 0}, [None], {"id": "a"}, ["x", "y"],
    f"{RAW}1e999", f"{RAW}-1e999", f"{RAW}NaN", f"{RAW}-Infinity", f"{RAW}0x{'f' * 5000}", f"{RAW}{'9' * 5000}",
    f"{RAW}1979-05-27", f"{RAW}{{a = 1}}", f"{RAW}[{{{'a.' * 3000}a = 1}}]", f'{RAW}{{"a": 1, "a": 2}}',
]  # fmt: skip
CHUNKS = [b"\x00", b"\xff", b"\xed\xa0\xbd", b"\\ud83d", b"1e999", b"NaN", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000,
          b'"', b"\n", b"\r", b"\n\n", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"null", b"-", b"{}", b",", b"{", b"}", b"]",
          b'"id":"a",', b"= ", b"[[a]]\n", b'"""']  # fmt: skip


def deep(depth: int) -> str:
    return RAW + "[" * depth + "]" * depth


def readable(text: str) -> bool:
    try:
        json.loads(text)
    except RecursionError:
        return False
    return True


# What can just be read may be too deep to be compared, shown or written again.
DEEPEST = next(depth for depth in range(990, 0, -1) if readable("[" * depth + "]" * depth))
VALUES += [deep(depth) for depth in (*(DEEPEST - less for less in (-1, 1, 3, 6, 12, 24)), 5000)]


def text_of(value: Any) -> str:
    # The escapes of a string that stands for JSON are those that json.dumps has just made.
    return re.sub(f'"{RAW}((?:[^"\\\\]|\\\\.)*)"', lambda found: json.loads(f'"{found[1]}"'), json.dumps(value))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to every value within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def changed(value: Any, path: tuple, how: str, new: Any) -> Any:
    """A copy with one thing changed at a place."""
    if path:
        copy = dict(value) if isinstance(value, dict) else list(value)
        if len(path) == 1 and how == "leave out":
            del copy[path[0]]
        elif len(path) == 1 and how == "rename" and isinstance(copy, dict):
            copy = {(str(new)[:300] if key == path[0] else key): item for key, item in copy.items()}
        else:
            copy[path[0]] = changed(value[path[0]], path[1:], how, new)
        return copy
    if how == "add" and isinstance(value, dict):
        return value | {"more": new}
    if how in ("add", "twice") and isinstance(value, list):
        return [*value, new] if how == "add" else value * 2
    return {"put": new, "wrap": [value], "write": json.dumps(value)}.get(how, new)


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """With one to four bits flipped, stretches cut out, put in, or there twice."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        a, b = sorted(rng.randint(0, len(data)) for _ in range(2))
        how = rng.choice(["flip", "cut", "insert", "again"])
        if how == "flip" and a < len(data):
            data[a] ^= 1 << rng.randrange(8)
        elif how == "cut":
            del data[a : rng.choice([a + 1, a + 40, len(data)])]
        elif how == "insert":
            data[a:a] = rng.choice(CHUNKS)
        elif how == "again":
            data[b:b] = data[a:b][:500]
    return bytes(data)


# ---- the driver ------------------------------------------------------------------------------------


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory where there is such a place: some of the readers have what they write on the disk before they go on."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


@contextmanager
def time_limit() -> Iterator[None]:
    def late(*_):
        raise AssertionError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(target: Target, content: bytes, folder: Path) -> str:
    """ "accepted" or "refused"; AssertionError, or what the reader raised, for what is neither."""
    (folder / target.file).write_bytes(content)
    try:
        with time_limit():
            target.read(folder / target.file)
    except ValueError as mistake:
        said = str(mistake)
        assert re.search(target.place or re.escape(str(folder)), said), f"refused without a place: {said[:500]}"
        assert len(said) < 20_000, f"a message of {len(said)} characters: {said[:500]}"
        return "refused"
    return "accepted"


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs(name, amount, place):
    target, rng, ends = TARGETS[name], random.Random(name), Counter()
    for _ in range(amount(30, 4000)):
        content = target.join([text_of(value) for value in rng.choice(target.seeds)])
        ends[outcome(target, spoiled(content, rng), place)] += 1
    assert ends["refused"], ends
    print(f"\n{name}: {dict(ends)}")


@pytest.mark.parametrize("name", TARGETS)
def test_each_value_in_each_place(name, place):
    """One thing at a time, all of them: where a reader lacks one check, few of the inputs drawn above come by it."""
    target, done = TARGETS[name], []
    for seed in target.seeds:
        assert outcome(target, target.join([json.dumps(value) for value in seed]), place) == "accepted"
        for at, value in enumerate(seed):
            for path in places(value):
                if (alike := (sorted(value) if isinstance(value, dict) else at, kind_of(value, path))) in done:
                    continue
                done.append(alike)
                ways = [("put", new) for new in VALUES]
                ways += [(how, 0) for how in ("leave out", "rename", "add", "twice", "wrap", "write")]
                for how, new in ways:
                    values = [*seed[:at], changed(value, path, how, new), *seed[at + 1 :]]
                    outcome(target, target.join([text_of(value) for value in values]), place)


def kind_of(value: Any, path: tuple) -> tuple:
    """What a place is like: the items of a list are alike, and so are those of a type in an object of very many."""
    names = []
    for key in path:
        names.append("*" if isinstance(value, list) or len(value) > 20 else key)
        value = value[key]
    return (*names, type(value))
