"""Known foreign formats to list-wise rows, and HH-RLHF back.

One function per format turns a decoded record into a Row, or into Dropped where a record of the right format
cannot be used; a file of another format is a ValueError.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hps.data.listwise import Row, check_keys, decode_json, opened, parse_row, read_lines

HH_MARK = re.compile(r"\n\n(Human|Assistant): ?")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
DROPS = (
    "rows_malformed",
    "rows_prompts_differ",
    "rows_empty_response",
    "rows_equal_responses",
    "rows_duplicate",
)
MAX_REASONS = 5

Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Dropped:
    """A record that is left out: the counter (one of DROPS) that it adds to, and what is wrong with it."""

    counter: str
    reason: str


def import_file(
    source: str, path: str | Path, *, limit: int | None = None, skip: int = 0
) -> tuple[list[Row], dict[str, int], list[str]]:
    """Read a foreign file (JSON Lines or one JSON list, plain or .gz) as rows.

    source: "hh-rlhf" or "authors". skip, limit: leave out the first `skip` usable rows, then take at most
    `limit`, so that (limit=a) and (skip=a) are disjoint. Reading stops at the limit.
    Returns the rows; counts (rows_read = rows_kept + rows_skipped + all DROPS); the first 5 reasons, each
    with file:line.
    Raises ValueError for an unknown source, a broken file, one of another format, or no row left.
    """
    if source not in FORMATS:
        near = difflib.get_close_matches(source, FORMATS, n=1, cutoff=0)[0]
        raise ValueError(f"unknown source {source!r}; did you mean {near!r}? Known: {', '.join(FORMATS)}")
    if skip < 0 or (limit is not None and limit < 1):
        raise ValueError(f"skip = {skip} must be at least 0 and limit = {limit} at least 1")
    counts: dict[str, int] = dict.fromkeys(("rows_read", "rows_kept", "rows_skipped", *DROPS), 0)
    rows: list[Row] = []
    reasons: list[str] = []
    first: dict[str, str] = {}
    for where, record in _records(path):
        counts["rows_read"] += 1
        row = FORMATS[source](record, where)
        if isinstance(row, Row) and row.id in first:
            row = Dropped("rows_duplicate", f"the same as {first[row.id]}")
        if isinstance(row, Dropped):
            counts[row.counter] += 1
            if len(reasons) < MAX_REASONS:
                reasons.append(f"{where}: {row.reason}")
            continue
        first[row.id] = where
        if len(first) <= skip:
            counts["rows_skipped"] += 1
            continue
        counts["rows_kept"] += 1
        rows.append(row)
        if len(rows) == limit:
            break
    if not rows:
        lost = ", ".join(f"{key} = {value}" for key, value in counts.items() if value)
        raise ValueError("\n  ".join([f"{path}: no row is left of this {source} file: {lost}", *reasons]))
    return rows, counts, reasons


def hh_rlhf(record: dict[str, object], where: str) -> Row | Dropped:
    """Anthropic's HH-RLHF: whole dialogues "chosen" and "rejected" -> messages and the pair of last answers.

    Dropped: dialogues that do not go Human, Assistant, ..., Assistant; that differ before the last answer;
    whose last answers are empty or equal. Text is kept as it is, whitespace included.
    """
    keys = ("chosen", "rejected")
    check_keys(record, keys, required=keys, where=where)
    texts = [record[key] for key in keys]
    dialogues = []
    for key, text in zip(keys, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"{where}: {key} must be a dialogue as one string")
        turns = _turns(text)
        if isinstance(turns, str):
            return Dropped("rows_malformed", f"{key} {turns}")
        dialogues.append(turns)
    (*prompt, (_, chosen)), (*other, (_, rejected)) = dialogues
    if prompt != other:
        return Dropped("rows_prompts_differ", "chosen and rejected differ before the last answer")
    if not chosen.strip() or not rejected.strip():
        return Dropped("rows_empty_response", "an answer is empty")
    if chosen.strip() == rejected.strip():
        return Dropped("rows_equal_responses", "both answers are the same")
    messages = [{"role": HH_ROLES[speaker], "content": text} for speaker, text in prompt]
    row = {"prompt": messages, "responses": [chosen, rejected], "chosen": 0, "rejected": 1}
    try:
        return _row("hh-rlhf", row, where)
    except ValueError as error:
        return Dropped("rows_malformed", str(error).removeprefix(f"{where}: "))


def authors(record: dict[str, object], where: str) -> Row:
    """The format of the released HPS code: a prompt in its template already, responses, rewards if scored."""
    check_keys(record, ("prompt", "responses", "rewards"), required=("prompt", "responses"), where=where)
    if not isinstance(record["prompt"], str):
        raise ValueError(f"{where}: prompt must be a string (the authors' files hold it as one text)")
    return _row("authors", record, where)


def export_hh_rlhf(rows: Iterable[Row]) -> Iterator[dict[str, str]]:
    """Write rows with a human pair as HH-RLHF records, which `hh_rlhf` reads back to the same texts.

    Raises ValueError for a row without the pair, with a string prompt, or with turns that the format cannot
    hold (a system turn, a speaker twice in a row, a speaker's mark inside a text).
    """
    speakers = {role: speaker for speaker, role in HH_ROLES.items()}
    for row in rows:
        if row.chosen is None or row.rejected is None:
            raise ValueError(f"{row.where}: row {row.id!r} has no chosen and rejected response to export")
        if isinstance(row.prompt, str):
            raise ValueError(f"{row.where}: row {row.id!r} has a string prompt; HH-RLHF needs messages")
        prompt = [(speakers.get(turn["role"], turn["role"]), turn["content"]) for turn in row.prompt]
        record = {}
        for key, index in (("chosen", row.chosen), ("rejected", row.rejected)):
            turns = [*prompt, ("Assistant", row.responses[index])]
            record[key] = "".join(f"\n\n{speaker}: {text}" for speaker, text in turns)
            if _turns(record[key]) != turns:
                raise ValueError(
                    f"{row.where}: row {row.id!r} does not fit HH-RLHF: turns must go Human, Assistant, ..., "
                    f"and no text may hold such a mark; they are {[speaker for speaker, _ in turns]}"
                )
        yield record


Importer = Callable[[dict[str, object], str], Row | Dropped]
FORMATS: dict[str, Importer] = {"hh-rlhf": hh_rlhf, "authors": authors}


def _turns(dialogue: str) -> Turns | str:
    head, *rest = HH_MARK.split(dialogue)
    speakers, texts = rest[::2], rest[1::2]
    if head or not speakers or speakers[0] != "Human":
        return r"does not start with '\n\nHuman: '"
    if speakers[-1] != "Assistant":
        return "does not end with a turn of Assistant"
    if any(a == b for a, b in pairwise(speakers)):
        return "has two turns of one speaker in a row"
    return list(zip(speakers, texts, strict=True))


def _row(source: str, fields: dict[str, object], where: str) -> Row:
    content = json.dumps([fields["prompt"], fields["responses"]]).encode()
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    return parse_row({"id": f"{source}-{digest}", **fields, "source": source}, where)


def _records(path: str | Path) -> Iterator[tuple[str, dict[str, object]]]:
    with opened(path) as file:
        is_list = file.read(1) == b"["
        values = decode_json(b"[" + file.read(), str(path)) if is_list else None
    in_list = isinstance(values, list)
    for where, record in ((f"{path}[{i}]", v) for i, v in enumerate(values)) if in_list else read_lines(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a record must be a JSON object")
        yield where, record
