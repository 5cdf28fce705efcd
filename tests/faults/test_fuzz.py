"""Mutated inputs to every reader of a file from outside: accepted and finite, or a ValueError that says where.

`make test` draws some dozens each, `make soak` thousands; each odd value in each place is tried by both.
"""

import json
import math
import os
import re
import struct
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fuzz_targets
import pytest
from fuzz_targets import NEVER_REFUSE, TARGETS, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# ---- strategies ----------------------------------------------------------------------------------

RAW = "@raw "  # begins a string that stands for JSON which json.dumps would not write
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1.0, 5, 1e308, 2**63, -(2**63) - 1, 10**400, "", " ", "0", "none",
    "\x00", "\ud83d", "\u2028", "../../x", "a" * 3000, [], {}, [[]], {"": 0}, [None], {"id": "a"}, ["x", "y"],
    f"{RAW}1e999", f"{RAW}-1e999", f"{RAW}NaN", f"{RAW}-Infinity", f"{RAW}0x{'f' * 5000}", f"{RAW}{'9' * 5000}",
    [32], [2, 2],  # shapes of as many numbers as a shard's keys, as a linear model's weights have
    f"{RAW}1979-05-27", f"{RAW}{{a = 1}}", f"{RAW}[{{{'a.' * 3000}a = 1}}]", f'{RAW}{{"a": 1, "a": 2}}',
]  # fmt: skip
CHUNKS = [b"\x00", b"\xff", b"\xed\xa0\xbd", b"\\ud83d", b"1e999", b"NaN", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000,
          b'"', b"\n", b"\r", b"\n\n", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"null", b"-", b"{}", b",", b"{", b"}", b"]",
          b'"id":"a",', b"\x1f\x8b", b"= ", b"[[a]]\n", b'"""']  # fmt: skip


def deep(depth: int, kind: str) -> str:
    return RAW + ("[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "0" + "}" * depth)


def readable(text: str) -> bool:
    try:
        json.loads(text)
    except RecursionError:
        return False
    return True


# What can just be read may be too deep to be compared, shown or written again.
DEEPEST = next(depth for depth in range(990, 0, -1) if readable("[" * depth + "]" * depth))
VALUES += [deep(DEEPEST - less, "list") for less in (-1, 1, 3, 6, 12, 24)]
VALUE = st.one_of(
    st.sampled_from(VALUES),
    st.builds(deep, st.integers(1, 1000) | st.integers(880, 1000), st.sampled_from(["list", "dict"])),
    st.just(deep(5000, "list")),
)


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


@st.composite
def documents(draw: st.DrawFn, name: str) -> bytes:
    """A seed of a target with a few values changed, then a few bytes."""
    target = TARGETS[name]
    values = list(draw(st.sampled_from(target.seeds)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(values) - 1))
        path = draw(st.sampled_from(places(values[at])))
        how = draw(st.sampled_from(["put", "put", "put", "leave out", "rename", "add", "twice", "wrap", "write"]))
        values[at] = changed(values[at], path, how, draw(VALUE))
    data = bytearray(target.join([text_of(value) for value in values]))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 4]))):
        a, b = sorted(draw(st.integers(0, len(data))) for _ in range(2))
        how = draw(st.sampled_from(["flip", "cut", "end", "insert", "again"]))
        if how == "flip" and a < len(data):
            data[a] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[a : min(b, a + 40)]
        elif how == "end":
            del data[b:]
        elif how == "insert":
            data[a:a] = draw(st.sampled_from(CHUNKS) | st.binary(max_size=8))
        elif how == "again":
            data[b:b] = data[a:b][:500]
    return bytes(data)


@pytest.fixture(scope="module")
def folder():
    """In memory where there is such a place: some of the readers have what they write on the disk before they go on."""
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        yield Path(name)


@pytest.fixture
def place(folder):
    """A new folder in it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        yield Path(name)


# ---- tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_inputs(name, amount, place):
    ends: Counter[str] = Counter()

    @settings(max_examples=amount(30, 4000), suppress_health_check=list(HealthCheck))
    @given(documents(name))
    def one(data):
        ends[outcome(name, data, place)] += 1

    one()
    assert ends["accepted"] and (ends["refused"] or name in NEVER_REFUSE), ends
    print(f"\n{name}: {dict(ends)}")


@pytest.mark.parametrize("name", TARGETS)
def test_each_value_in_each_place(name, place):
    """One thing at a time, all of them: where a reader lacks one check, few of the inputs drawn above come by it."""
    target, done = TARGETS[name], []
    for seed in target.seeds:
        assert outcome(name, target.join([json.dumps(value) for value in seed]), place) == "accepted"
        for at, value in enumerate(seed):
            for path in places(value):
                if (alike := (sorted(value) if isinstance(value, dict) else at, kind_of(value, path))) in done:
                    continue
                done.append(alike)
                ways = [("put", new) for new in VALUES] + [(how, 0) for how in ("leave out", "twice", "wrap", "write")]
                for how, new in ways:
                    values = [*seed[:at], changed(value, path, how, new), *seed[at + 1 :]]
                    outcome(name, target.join([text_of(value) for value in values]), place)


def kind_of(value: Any, path: tuple) -> tuple:
    """What a place is like: the items of a list are alike, and so are those of a type in an object of very many."""
    names = []
    for key in path:
        names.append("*" if isinstance(value, list) or len(value) > 20 else key)
        value = value[key]
    return (*names, type(value))


@pytest.mark.parametrize("name", ["shard", "named shard"])
def test_numbers_that_are_none_in_each_place(name, place):
    """NaN, infinity and a number that is too large for what it is, in the place of each of the last ten."""
    target = TARGETS[name]
    data = target.join([json.dumps(value) for value in target.seeds[0]])
    for at in range(len(data) - 40, len(data), 4):
        for number in (math.nan, math.inf, -math.inf, 3e38):
            outcome(name, data[:at] + struct.pack("<f", number) + data[at + 4 :], place)


def test_a_reader_that_breaks_the_rule_is_found(monkeypatch, place):
    """Each of what is not allowed: another error, a refusal without a place, a number that is not finite, no end."""

    def late(data, folder):
        while True:
            time.sleep(0.01)

    def infinite(data, folder):
        fuzz_targets.finite([1.0, {"a": float("inf")}])

    def nowhere(data, folder):
        raise ValueError("broken")

    def other(data, folder):
        raise KeyError("id")

    monkeypatch.setattr(fuzz_targets, "SECONDS", 1)
    for run in (late, infinite, nowhere, other):
        monkeypatch.setitem(TARGETS, "data", TARGETS["data"]._replace(run=run))
        with pytest.raises(KeyError if run is other else AssertionError):
            outcome("data", b"", place)
