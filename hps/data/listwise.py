"""Files of the list-wise format (`rows.py` says what it is) read whole and written.

Apart from it, since training only streams: nothing here is loaded by train.py.
"""

import gzip
import json
import lzma
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

from hps.data.rows import KEYS, Row, id_is_repeated, parse_row, stream
from hps.io import files


def read(path: str | Path) -> list[Row]:
    """Read a whole list-wise file; errors as `stream`."""
    return list(stream(path))


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows so that `read` gives them back (apart from `where`); atomic, compressed for .gz and .xz.

    Equal rows give equal bytes. Raises ValueError, and writes nothing, for rows that `read` would refuse.
    """
    parsed: dict[str, Row] = {}
    for row in rows:
        if row.id in parsed:
            raise id_is_repeated(row.id, row.where, parsed[row.id].where)
        # Through parse_row: it refuses what `read` would, and gives equal rows equal number types and key orders.
        parsed[row.id] = parse_row(_record(row), row.where or f"row {row.id!r}")
    if not parsed:
        raise ValueError(f"{path}: refusing to write a file without rows")
    write_lines(path, map(_record, parsed.values()))


def _record(row: Row) -> dict[str, object]:
    found = {key: value for key in KEYS if (value := getattr(row, key)) is not None}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()} | row.others


def write_lines(path: str | Path, records: Iterable[object]) -> None:
    """Write JSON Lines, whole or not at all; compressed for .gz and .xz.

    Raises ValueError for a name that ends in .parquet, which would not be what it says.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        raise ValueError(f"{path}: JSON Lines is what is written; name it .jsonl, .jsonl.gz or .jsonl.xz")
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as partial, open(partial, "wb") as raw:
        packed = nullcontext(raw)
        if path.suffix == ".gz":  # with no name and no time in its header, so that equal rows give equal bytes
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0)
        elif path.suffix == ".xz":
            packed = lzma.LZMAFile(raw, "wb")
        with packed as file:
            for record in records:
                file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
        Path(f"{path}.manifest.json").unlink(missing_ok=True)  # it describes what stood here before
