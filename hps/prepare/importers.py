"""Files of foreign preference data to list-wise rows and back, with a count of everything that is left out.

The formats themselves are in hps/prepare/formats.py.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hps.data.rows import Row, decode_json, opened, read_lines
from hps.io import files
from hps.prepare import formats
from hps.prepare.formats import DROPS, FORMATS, Dropped, Record

MAX_REASONS = 5
EXPORT_DROPS = ("rows_no_pair", "rows_unsupported", "rows_empty_response", "rows_equal_responses")


class Converted(NamedTuple):
    """rows of one format as those of another; counts: rows_read = rows_kept (rows_written) + rows_skipped + all drops;
    the first 5 reasons, each with file:line; the columns of a foreign file that no row holds, by name."""

    rows: list[Any]
    counts: dict[str, int]
    reasons: list[str]
    columns_left_out: list[str]


def import_file(
    source: str, path: str | Path, *, order: str = "", limit: int | None = None, skip: int = 0
) -> Converted:
    """Read a foreign file as rows: JSON Lines or one JSON list, plain, .gz or .xz, or .parquet (with pyarrow).

    source, order: keys of FORMATS and of its orders; a source with several needs one named. skip, limit: leave out the
    first `skip` usable rows, then take at most `limit`, so that (limit=a) and (skip=a) are disjoint. Reading stops at
    the limit.

    Raises:
        ValueError: an unknown order, a broken file, one of another format, or no row left.
    """
    if order not in (orders := FORMATS[source].orders):
        if "" in orders:
            raise ValueError(f"order = {order!r} is of no use: source {source} has one order; leave it out")
        raise ValueError(f"source {source} needs an order, one of {', '.join(orders)}; it is {order!r}")
    if skip < 0 or (limit is not None and limit < 1):
        raise ValueError(f"skip = {skip} must be at least 0 and limit = {limit} at least 1")
    counts: dict[str, int] = dict.fromkeys(("rows_read", "rows_kept", "rows_skipped", *DROPS), 0)
    rows: list[Row] = []
    reasons: list[str] = []
    left_out: set[str] = set()
    first: dict[str, str] = {}  # where each id was met
    for where, record in _records(path):
        counts["rows_read"] += 1
        try:
            row = formats.read(source, record, where, order=order)
            if row.id in first:
                raise Dropped("rows_duplicate", f"the same as {first[row.id]}")
        except Dropped as dropped:
            _count(dropped, where, counts, reasons)
            continue
        first[row.id] = where
        if len(first) <= skip:
            counts["rows_skipped"] += 1
            continue
        rows.append(row)
        left_out |= record.keys() - formats.columns_of(source, order) - row.others.keys()
        if len(rows) == limit:
            break
    counts["rows_kept"] = len(rows)
    if not rows:
        raise ValueError(_nothing_left(f"{path}: no row is left of this {source} file", counts, reasons))
    return Converted(rows, counts, reasons, sorted(left_out))


def export_rows(format: str, rows: Iterable[Row], *, pair: str = "human") -> Converted:
    """Rows as records of pairs: the answers that do not fit a pair, and the rewards, are not in them.

    format: a key of EXPORTS. pair: "human" (chosen, rejected) or "rewards" (the highest against the lowest, the first
    of equals). A row is left out and counted where it has no such pair (all rewards equal, say), or
    where the format would not give the same texts back.

    Raises:
        ValueError: no record left, and prompts of both kinds, strings and messages: a TRL data set holds one kind.
    """
    counts: dict[str, int] = dict.fromkeys(("rows_read", "rows_written", "responses_left_out", *EXPORT_DROPS), 0)
    records: list[Record] = []
    reasons: list[str] = []
    kinds: dict[type, str] = {}
    for row in rows:
        counts["rows_read"] += 1
        try:
            records.append(formats.write(format, row, *_pair_of(row, pair)))
        except Dropped as dropped:
            _count(dropped, row.where or f"row {row.id!r}", counts, reasons)
            continue
        counts["responses_left_out"] += len(row.responses) - 2
        kinds.setdefault(type(row.prompt), row.where)
    counts["rows_written"] = len(records)
    if len(kinds) == 2:
        raise ValueError(
            f"a TRL data set holds prompts of one kind, but that of {kinds[str]} is a string and that of "
            f"{kinds[tuple]} a list of messages; export the two kinds from two files"
        )
    if not records:
        raise ValueError(_nothing_left(f"no row can be exported to {format} with pair {pair}", counts, reasons))
    return Converted(records, counts, reasons, [])


def write_manifest(input: str | Path, output: str | Path, facts: dict[str, Any], *, name: str = "") -> Path:
    """Write OUTPUT.manifest.json: `facts` (options, counts) and what identifies both files; returns its path.

    name: what the input is called instead of its path, which may be that of a cache.

    The hashes are SHA-256 of the files as they lie, so that `sha256sum` checks them. Equal files and facts give
    equal bytes: there is no time in it.
    """
    about = {
        key: {"path": called, "bytes": Path(path).stat().st_size, "sha256": files.sha256(Path(path))}
        for key, path, called in (("input", input, name or str(input)), ("output", output, str(output)))
    }
    manifest = Path(f"{output}.manifest.json")
    files.write_record(manifest, about | facts)
    return manifest


def _count(dropped: Dropped, where: str, counts: dict[str, int], reasons: list[str]) -> None:
    counts[dropped.counter] += 1
    if len(reasons) < MAX_REASONS:
        reasons.append(f"{where}: {dropped}")


def _pair_of(row: Row, pair: str) -> tuple[int, int]:
    """The indices of a row's preferred and dispreferred response; Dropped where it has no such pair."""
    chosen, rejected = row.chosen, row.rejected
    if pair == "rewards":
        if not row.rewards or min(row.rewards) == max(row.rewards):
            raise Dropped("rows_no_pair", f"row {row.id!r} has no two different rewards")
        chosen, rejected = (row.rewards.index(of(row.rewards)) for of in (max, min))
    if chosen is None or rejected is None:
        raise Dropped("rows_no_pair", f"row {row.id!r} has no chosen and rejected response")
    return chosen, rejected


def _nothing_left(what: str, counts: dict[str, int], reasons: list[str]) -> str:
    lost = ", ".join(f"{key} = {value}" for key, value in counts.items() if value)
    return "\n  ".join([f"{what}: {lost}", *reasons])


def _records(path: str | Path) -> Iterator[tuple[str, Record]]:
    for where, record in _parquet(path) if Path(path).suffix == ".parquet" else _json(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a record must be a JSON object")
        yield where, record


def _json(path: str | Path) -> Iterator[tuple[str, object]]:
    with opened(path) as file:
        is_list = file.read(1) == b"["
        values = decode_json(b"[" + file.read(), str(path)) if is_list else None
    if isinstance(values, list):
        return ((f"{path}[{i}]", value) for i, value in enumerate(values))
    return read_lines(path)


def _parquet(path: str | Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow  # only here: JSON needs none of it
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):  # not the whole file: it holds more than is kept
                for record in batch.to_pylist():
                    yield f"{path}[{number}]", record
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from error
