"""The project's data format: JSON Lines (plain, .gz or .xz by suffix), one prompt and its n scored responses each.

    {"id": "a1", "prompt": "Hi" or [{"role": "user", "content": "Hi"}], "responses": ["Hello.", "No."],
     "rewards": [1.5, -0.5], "chosen": 0, "rejected": 1, "source": "toy"}

Optional: rewards (one external scalar per response), chosen and rejected (indices of the pair that a person
compared), source. n may differ from row to row. Other keys are kept as they are. Reading is strict: what is not
understood is an error. Training streams a file once, into a store of tokens (`store.py`); what reads it whole or
writes it goes through `listwise.py`.
"""

import difflib
import functools
import gzip
import hashlib
import json
import lzma
import reprlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np

from hps.io import files

KEYS = ("id", "prompt", "responses", "rewards", "chosen", "rejected", "source")
FOR_TEMPLATES = ("tools", "documents", "chat_template_kwargs")  # of a row, as other programs read it
ROLES = ("system", "user", "assistant", "tool")
MAX_REWARD = 1e30  # of either sign; differences and squares of rewards stay far from the largest float
MAX_LINE_BYTES = 64 * 2**20
RECENT = 2**16  # ids of `Places` that are not yet in its arrays
# What a file that is no JSON Lines begins with, and what to do with it.
BEGINNINGS = {
    b"\x1f\x8b": "gzip: let its name end in .gz",
    b"\xfd7zXZ": "xz: let its name end in .xz",
    b"PAR1": "parquet: data_prep.py import reads that, as .parquet",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
    b"\xef\xbb\xbf": "UTF-8 with a byte order mark: save it without",
}
Prompt = str | tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Row:
    """One prompt with its candidate responses, as read; `where` is "file:line" for messages, `others` what stands under
    other keys than these."""

    id: str
    prompt: Prompt
    responses: tuple[str, ...]
    rewards: tuple[float, ...] | None = None
    chosen: int | None = None
    rejected: int | None = None
    source: str | None = None
    where: str = ""
    others: dict[str, Any] = field(default_factory=dict)


def parse_row(obj: object, where: str) -> Row:
    """A decoded JSON value as a Row; ValueError, behind `where`, "file:line", on what the format does not allow.

    An empty response is allowed here (training drops and counts it), and so is a list of none (yet to be generated).
    """
    row = _typed(obj, f"{where}: a row", "a JSON object", dict)
    others = check_keys(row, KEYS, required=("id", "prompt", "responses"), where=where, others=True)
    if unread := [key for key in FOR_TEMPLATES if others.get(key) and not isinstance(row["prompt"], str)]:
        raise ValueError(
            f"{where}: {unread[0]} is not given to the chat template: write it into a turn, or rename the key"
        )
    id, prompt = _text(row["id"], f"{where}: id"), _prompt(row["prompt"], f"{where}: prompt")
    texts = _typed(row["responses"], f"{where}: responses", "a list", list)
    texts = tuple(_text(text, f"{where}: responses[{i}]", empty=True) for i, text in enumerate(texts))
    rewards = None
    if "rewards" in row:
        values = _typed(row["rewards"], f"{where}: rewards", "a list", list)
        rewards = tuple(_finite(value, f"{where}: rewards[{i}]") for i, value in enumerate(values))
        if len(rewards) != len(texts):
            raise ValueError(f"{where}: {len(texts)} responses but {len(rewards)} rewards: give one per response")
    pair: dict[str, int | None] = {"chosen": None, "rejected": None}
    for key in [key for key in pair if key in row]:
        k = pair[key] = _typed(row[key], f"{where}: {key}", "the index of a response", int)
        if not 0 <= k < len(texts):
            there = f"there are {len(texts)} responses, counted from 0"
            raise ValueError(f"{where}: {key} = {k} is out of range; {there}")
    if pair["rejected"] is not None and pair["chosen"] in (None, pair["rejected"]):
        differs = f"needs a chosen that differs from it, not {pair['chosen']}"
        raise ValueError(f"{where}: rejected = {pair['rejected']} {differs}")
    source = _text(row["source"], f"{where}: source") if "source" in row else None
    return Row(id, prompt, texts, rewards, **pair, source=source, where=where, others=others)


# The same few keys stand in every row.
_nearest = functools.lru_cache(maxsize=1000)(difflib.get_close_matches)


def check_keys(
    record: dict[str, Any], keys: tuple[str, ...], *, required: tuple[str, ...], where: str, others: bool = False
) -> dict[str, Any]:
    """What stands under other keys than `keys`: nothing, or with `others` whatever can be written back as it was read.

    Raises ValueError for a missing key, and for another one, naming the nearest valid one; with `others` only for what
    looks like a misspelling of a key that is not there, which would go unused without a word.
    """
    unknown = {key: value for key, value in record.items() if key not in keys}
    absent = tuple(key for key in keys if key not in record)
    for key in unknown:
        if near := _nearest(key[:99].lower(), absent if others else keys, 1, 0.85 if others else 0):
            valid = f"did you mean {near[0]!r}? Valid keys: {', '.join(keys)}"
            raise ValueError(f"{where}: unknown key {reprlib.repr(key)}; {valid}")
    for key in required:
        if key not in record:
            lacks = {"chosen", "rejected"} - record.keys() if "responses" not in record else {"responses", key}
            what = "other keys are read" if lacks else "pairs of texts become rows"
            key = lacks.pop() if len(lacks) == 1 else key  # of a pair, which has no id
            advice = f"; {what} by data_prep.py import" * others
            raise ValueError(f"{where}: the key {key!r} is missing among {reprlib.repr(list(record))}{advice}")
    try:  # JSON can express halves of surrogate pairs, and numbers beyond any float
        json.dumps(unknown, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {reprlib.repr(list(unknown))[1:-1]} cannot be kept: {error}") from error
    return unknown


def _prompt(value: object, name: str) -> Prompt:
    if isinstance(value, str):
        return _text(value, name)
    messages: list[dict[str, Any]] = []
    for i, turn in enumerate(_typed(value, name, "a string or a list of messages", list)):
        here, keys = f"{name}[{i}]", ("role", "content")
        turn = _typed(turn, here, "an object with role and content", dict)
        others = check_keys(turn, keys, required=keys, where=here, others=True)
        if turn["role"] not in ROLES:
            role = reprlib.repr(turn["role"])
            raise ValueError(f"{here} has the unknown role {role}; use one of {', '.join(ROLES)}")
        # An empty list of calls is none, and some templates stumble over it; many leave calls out without a word.
        if others.pop("tool_calls", None):
            raise ValueError(f"{here} has tool_calls, which not every template writes; put them into its content")
        messages.append({"role": turn["role"], "content": _text(turn["content"], f"{here}.content"), **others})
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = f"a turn of {messages[-1]['role']!r}" if messages else "nothing"
        raise ValueError(
            f"{name} must end with a turn of 'user' or 'tool', whom the responses answer; it ends with {last}"
        )
    return tuple(messages)


def _typed(value: Any, name: str, what: str, *types: type) -> Any:
    if not isinstance(value, types) or isinstance(value, bool):
        kinds = {dict: "an object", list: "a list", str: "a string", bool: "true/false", type(None): "null"}
        raise ValueError(f"{name} must be {what}, not {kinds.get(type(value), 'a number')}")
    return value


def _text(value: object, name: str, *, empty: bool = False) -> str:
    text: str = _typed(value, name, "a string", str)
    if not empty and not text.strip():
        raise ValueError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"half of a surrogate pair (\\u{ord(text[error.start]):04x})"
        raise ValueError(f"{name} holds {half} at character {error.start}") from error
    return text


def _finite(value: object, name: str) -> float:
    if not abs(_typed(value, name, "a number", int, float)) <= MAX_REWARD:  # so written it catches NaN too
        raise ValueError(f"{name} must be a finite number, of {MAX_REWARD:g} at most: no score is larger, masks are")
    return float(value)  # pyright: ignore[reportArgumentType]


def only(row: Row, kept: Sequence[int]) -> Row:
    """The row with some of its responses; its human pair goes where a part of it does."""
    lost = any(k is not None and k not in kept for k in (row.chosen, row.rejected))
    chosen, rejected = (None if k is None or lost else kept.index(k) for k in (row.chosen, row.rejected))
    texts, rewards = (values and tuple(values[k] for k in kept) for values in (row.responses, row.rewards))
    return replace(row, responses=texts, rewards=rewards, chosen=chosen, rejected=rejected)


def stream(path: str | Path) -> Iterator[Row]:
    """Read a list-wise file row by row; all that stays in memory is 16 bytes per row, for its id.

    path: .jsonl, .jsonl.gz or .jsonl.xz.
    Raises ValueError, with file and line, on the first thing wrong: an unreadable or empty file, a broken or
    blank line, a row that `parse_row` refuses, an id that was there before.
    """
    seen = Places()
    for number, (where, obj) in enumerate(read_lines(path), 1):  # one row per line
        row = parse_row(obj, where)
        seen.add_new(row.id, number, where, path)
        yield row


def row_key(id: str) -> int:
    """64-bit hash of a row's id, which seeded draws are keyed by."""
    return int.from_bytes(hashlib.blake2b(id.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


class Places:
    """A whole number for each id: 16 bytes per id, half of it a hash (of ten million, two are alike by 3 in 10^6)."""

    def __init__(self) -> None:
        self._keys, self._places = np.zeros(0, np.uint64), np.zeros(0, np.int64)  # in order of the keys
        self._recent: dict[int, int] = {}

    def add(self, id: str, place: int) -> int | None:
        """Note the place of an id; the one that it has already, which then stays."""
        if (before := self._at(key := row_key(id))) is None:
            self._recent[key] = place
            if len(self._recent) == RECENT:
                keys = np.concatenate([self._keys, np.fromiter(self._recent, np.uint64)])
                places = np.concatenate([self._places, np.fromiter(self._recent.values(), np.int64)])
                order = np.argsort(keys)
                self._keys, self._places, self._recent = keys[order], places[order], {}
        return before

    def add_new(self, id: str, line: int, where: str, path: str | Path) -> None:
        """Note the line of an id; ValueError for one that has a line already."""
        if (first := self.add(id, line)) is not None:
            raise ValueError(f"{where}: id {id!r} is already used at {path}:{first}; ids must be unique")

    def get(self, id: str) -> int | None:
        return self._at(row_key(id))

    def _at(self, key: int) -> int | None:
        i = int(np.searchsorted(self._keys, np.uint64(key)))
        return int(self._places[i]) if i < len(self._keys) and self._keys[i] == key else self._recent.get(key)

    def __contains__(self, id: object) -> bool:
        return self.get(cast(str, id)) is not None


def read_lines(path: str | Path) -> Iterator[tuple[str, object]]:
    """Decode a JSON Lines file (plain, .gz or .xz), strictly: yields ("file:line", value).

    Raises ValueError when the file is missing, empty, broken in its compression or not what its manifest describes, and
    for a line that is blank, too long (which is not loaded), not UTF-8 or not JSON (NaN and repeated keys included).
    """
    check_manifest(path)
    number = 0
    with opened(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{where}: the line is longer than {MAX_LINE_BYTES >> 20} MiB; is this JSON Lines?")
            if not line.strip():
                raise ValueError(f"{where}: blank line; remove it (one row a line)")
            try:
                value = decode_json(line, where)
            except ValueError as error:
                if number > 1:
                    raise
                guess = next((f"this is {what}" for begin, what in BEGINNINGS.items() if line.startswith(begin)), "")
                guess = guess or "is this JSON Lines? data_prep.py import reads other files"
                raise ValueError(f"{error}; {guess}") from error
            yield where, value
    if number == 0:
        raise ValueError(f"{path}: the file is empty")


def holds_pairs(path: str | Path) -> bool:
    """Whether a file is one to import: pairs of texts, as other trainers take them, a table or a JSON list."""
    if Path(path).suffix in (".parquet", ".csv"):
        return True
    with opened(path) as file:
        if file.read(1) == b"[":
            return True
    _, first = next(read_lines(path))
    return isinstance(first, dict) and "responses" not in first and {"chosen", "rejected"} <= first.keys()


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


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is there twice")
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON: give one, or leave that response out")
