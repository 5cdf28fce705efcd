"""The project's data format: JSON Lines (plain, .gz or .xz by suffix), one prompt and its n scored responses each.

    {"id": "a1", "prompt": "Hi" or [{"role": "user", "content": "Hi"}], "responses": ["Hello.", "No."],
     "rewards": [1.5, -0.5], "chosen": 0, "rejected": 1, "source": "toy"}

Optional: rewards (one external scalar a response), chosen and rejected (indices of the pair that a person
compared), source. n may differ from row to row. Reading is strict: what is not understood is an error.
Training streams a file once, into a store of tokens (`store.py`); what needs the texts reads it whole.
"""

import difflib
import gzip
import hashlib
import itertools
import json
import lzma
import reprlib
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import numpy as np

from hps.io import files

KEYS = ("id", "prompt", "responses", "rewards", "chosen", "rejected", "source")
ROLES = ("system", "user", "assistant")
MAX_LINE_BYTES = 64 * 2**20
# What a file that is no JSON Lines begins with, and what to do with it.
BEGINNINGS = {
    b"\x1f\x8b": "gzip: let its name end in .gz",
    b"\xfd7zXZ": "xz: let its name end in .xz",
    b"PAR1": "parquet: data_prep.py import reads that, as .parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\xef\xbb\xbf": "UTF-8 with a byte order mark: save it without",
}

Prompt = str | tuple[dict[str, str], ...]


@dataclass(frozen=True)
class Row:
    """One prompt with its candidate responses, as read; `where` is "file:line" for messages."""

    id: str
    prompt: Prompt
    responses: tuple[str, ...]
    rewards: tuple[float, ...] | None = None
    chosen: int | None = None
    rejected: int | None = None
    source: str | None = None
    where: str = ""


def parse_row(obj: object, where: str) -> Row:
    """Check one decoded JSON value and return it as a Row.

    obj: the decoded line. where: "file:line", put in front of every message.
    Raises ValueError on anything that the format does not allow. An empty response is allowed here (the
    training path drops and counts it), and so is an empty list of responses (yet to be generated).
    """
    if not isinstance(obj, dict):
        _fail(where, f"a row must be a JSON object, not {_kind(obj)}")
    row = cast(dict[str, object], obj)
    check_keys(row, KEYS, required=("id", "prompt", "responses"), where=where)
    responses = _list(row["responses"], "responses", where)
    texts = tuple(_text(r, f"responses[{i}]", where, empty=True) for i, r in enumerate(responses))
    rewards = None
    if "rewards" in row:
        values = _list(row["rewards"], "rewards", where)
        rewards = tuple(_reward(r, f"rewards[{i}]", where) for i, r in enumerate(values))
        if len(rewards) != len(texts):
            _fail(where, f"{len(texts)} responses but {len(rewards)} rewards; give one reward a response")
    chosen, rejected = (_index(row, key, len(texts), where) for key in ("chosen", "rejected"))
    if rejected is not None and chosen in (None, rejected):
        _fail(where, f"rejected = {rejected} needs a chosen that differs from it, not {chosen}")
    return Row(
        id=_text(row["id"], "id", where),
        prompt=_prompt(row["prompt"], where),
        responses=texts,
        rewards=rewards,
        chosen=chosen,
        rejected=rejected,
        source=_text(row["source"], "source", where) if "source" in row else None,
        where=where,
    )


def first_responses(row: Row, n: int) -> Row:
    """The row with its first n responses only; its human pair goes where a part of it does."""
    pair = (row.chosen, row.rejected)
    kept = pair if all(k is None or k < n for k in pair) else (None, None)
    rewards = None if row.rewards is None else row.rewards[:n]
    return replace(row, responses=row.responses[:n], rewards=rewards, chosen=kept[0], rejected=kept[1])


def read(path: str | Path) -> list[Row]:
    """Read a whole list-wise file; errors as `stream`."""
    return list(stream(path))


def stream(path: str | Path, *, need_rewards: bool = False) -> Iterator[Row]:
    """Read a list-wise file row by row; all that stays in memory is a hash of each id, 16 bytes a row.

    path: .jsonl, .jsonl.gz or .jsonl.xz. need_rewards: refuse rows without rewards.
    Raises ValueError, with file and line, on the first thing wrong: an unreadable or empty file, a broken or
    blank line, a row that `parse_row` refuses; at the end of the file, an id that is there twice.
    """
    hashes = bytearray()
    for where, obj in read_lines(path):
        row = parse_row(obj, where)
        if need_rewards and row.rewards is None:
            fail_without_rewards(row.id, where)
        hashes += hashlib.blake2b(row.id.encode(), digest_size=16).digest()
        yield row
    ids = np.frombuffer(hashes, dtype="S16")
    order = np.argsort(ids, kind="stable")  # equal ids stay in the order of the file
    again = order[1:][ids[order][1:] == ids[order][:-1]]
    if len(again):
        second = int(again.min())
        first = int(np.flatnonzero(ids == ids[second])[0])
        where, obj = next(itertools.islice(read_lines(path), second, None))  # a row a line, so row 0 is line 1
        id = parse_row(obj, where).id
        _fail(where, f"id {id!r} is already used at {path}:{first + 1}; ids must be unique")


def fail_without_rewards(id: str, where: str) -> NoReturn:
    """Raise the ValueError of a row that lacks the rewards which it needs."""
    _fail(where, f"row {id!r} has no rewards; score the file first: data_prep.py annotate")


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows so that `read` gives them back (apart from `where`); atomic, compressed for .gz and .xz.

    Equal rows give equal bytes. Raises ValueError, and writes nothing, for rows that `read` would refuse.
    """
    rows = list(rows)
    if not rows:
        raise ValueError(f"{path}: refusing to write a file without rows")
    check_unique(rows)
    # Through parse_row: it refuses what `read` would, and gives equal rows equal number types and key orders.
    parsed = [parse_row(_record(row), row.where or f"row {row.id!r}") for row in rows]
    write_lines(path, map(_record, parsed))


def read_lines(path: str | Path) -> Iterator[tuple[str, object]]:
    """Decode a JSON Lines file (plain, .gz or .xz), strictly: yields ("file:line", value).

    Raises ValueError when the file is missing, empty or broken in its compression, and for a line that is blank,
    too long (over 64 MiB, which is not loaded), not UTF-8 or not JSON (NaN and repeated keys included); and for a file
    that its manifest, where one lies beside it, does not describe.
    """
    check_manifest(path)
    number = 0
    with opened(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                _fail(where, f"the line is longer than {MAX_LINE_BYTES / 2**20:g} MiB; is this JSON Lines?")
            if not line.strip():
                _fail(where, "blank line; remove it (one row a line)")
            try:
                value = decode_json(line, where)
            except ValueError as error:
                if number > 1:
                    raise
                guess = next((what for begin, what in BEGINNINGS.items() if line.startswith(begin)), None)
                guess = f"this is {guess}" if guess else "is this JSON Lines, one object a line?"
                raise ValueError(f"{error}; {guess}") from error
            yield where, value
    if number == 0:
        raise ValueError(f"{path}: the file is empty")


def check_manifest(path: str | Path) -> None:
    """ValueError unless a file is the one that PATH.manifest.json describes; without a manifest there is no telling."""
    manifest = Path(f"{path}.manifest.json")
    if not manifest.exists() or not Path(path).exists():
        return
    about = files.read_record(manifest, f"delete {manifest} to use {path} as it is", output=dict)
    if files.sha256(Path(path)) != about["output"].get("sha256"):
        raise ValueError(
            f"{path}: is not the file that {manifest} describes: make it again, or delete the manifest if this "
            "change is wanted"
        )


def write_lines(path: str | Path, records: Iterable[object]) -> None:
    """Write JSON Lines, whole or not at all; compressed for .gz and .xz.

    Raises ValueError for a name that ends in .parquet, which would not be what it says.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        raise ValueError(f"{path}: JSON Lines is what is written; name it .jsonl, .jsonl.gz or .jsonl.xz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial, open(partial, "wb") as raw:
        # No name and no time in the gzip header: equal rows give equal bytes.
        packed = None
        if path.suffix == ".gz":
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
        elif path.suffix == ".xz":
            packed = lzma.LZMAFile(raw, "wb")
        for record in records:
            line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
            (packed or raw).write(line.encode())
        if packed:
            packed.close()
        Path(f"{path}.manifest.json").unlink(missing_ok=True)  # it describes what stood here before


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """Open a plain, .gz or .xz file (by suffix) for reading bytes; raises ValueError where that fails."""
    suffix = Path(path).suffix
    try:
        with {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)(path, "rb") as file:
            yield cast(BinaryIO, file)
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise ValueError(f"{path}: broken {'xz' if suffix == '.xz' else 'gzip'} file: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def decode_json(line: bytes, where: str) -> object:
    """Decode UTF-8 JSON; NaN, infinities and repeated keys are a ValueError that starts with `where`."""
    try:
        return json.loads(line.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start + 1}: {error.reason}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON at character {error.pos + 1}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: broken JSON: {error}") from error


def check_keys(record: dict[str, object], keys: tuple[str, ...], *, required: tuple[str, ...], where: str) -> None:
    """Raise ValueError for a key outside `keys`, naming the nearest valid one, or for a missing one."""
    for key in record:
        if key not in keys:
            near = difflib.get_close_matches(key[:99], keys, n=1, cutoff=0)[0]
            _fail(where, f"unknown key {reprlib.repr(key)}; did you mean {near!r}? Valid keys: {', '.join(keys)}")
    for key in required:
        if key not in record:
            _fail(where, f"the key {key!r} is missing")


def check_unique(rows: Iterable[Row]) -> None:
    """Raise ValueError when two rows share an id, naming both places."""
    seen: dict[str, str] = {}
    for row in rows:
        if row.id in seen:
            _fail(row.where, f"id {row.id!r} is already used at {seen[row.id]}; ids must be unique")
        seen[row.id] = row.where


def _record(row: Row) -> dict[str, object]:
    record: dict[str, object] = {}
    for key in KEYS:
        value = getattr(row, key)
        if value is not None:
            record[key] = list(value) if isinstance(value, tuple) else value
    return record


def _prompt(value: object, where: str) -> Prompt:
    if isinstance(value, str):
        return _text(value, "prompt", where)
    turns = _list(value, "prompt", where, what="a string or a list of messages")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            _fail(where, f"prompt[{i}] must be an object with role and content, not {_kind(turn)}")
        check_keys(turn, ("role", "content"), required=("role", "content"), where=f"{where}: prompt[{i}]")
        if turn["role"] not in ROLES:
            role = reprlib.repr(turn["role"])
            _fail(where, f"prompt[{i}] has the unknown role {role}; use one of {', '.join(ROLES)}")
        content = _text(turn["content"], f"prompt[{i}].content", where)
        messages.append({"role": turn["role"], "content": content})
    if not messages or messages[-1]["role"] != "user":
        last = f"a turn of {messages[-1]['role']!r}" if messages else "nothing"
        _fail(where, f"prompt must end with a turn of 'user', whom the responses answer; it ends with {last}")
    return tuple(messages)


def _text(value: object, name: str, where: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        _fail(where, f"{name} must be a string, not {_kind(value)}")
    if not empty and not value.strip():
        _fail(where, f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        bad = ord(value[error.start])
        _fail(where, f"{name} holds half of a surrogate pair (\\u{bad:04x}) at character {error.start}")
    return value


def _list(value: object, name: str, where: str, *, what: str = "a list") -> list[object]:
    if not isinstance(value, list):
        _fail(where, f"{name} must be {what}, not {_kind(value)}")
    return cast(list[object], value)


def _reward(value: object, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail(where, f"{name} must be a number, not {_kind(value)}")
    if not abs(value) <= sys.float_info.max:  # in this form it catches NaN and integers beyond any float too
        _fail(where, f"{name} must be a finite number")
    return float(value)


def _index(row: dict[str, object], key: str, n: int, where: str) -> int | None:
    if key not in row:
        return None
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int):
        _fail(where, f"{key} must be the index of a response, not {_kind(value)}")
    if not 0 <= value < n:
        _fail(where, f"{key} = {value} is out of range; there are {n} responses, counted from 0")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is there twice")
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _fail(where: str, message: str) -> NoReturn:
    raise ValueError(f"{where}: {message}")
