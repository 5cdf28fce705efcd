"""Files of the list-wise format (`rows.py` says what it is) read as a sequence, or whole, and written row by row.

Apart from it, since training only streams: nothing here is loaded by train.py.
"""

import copy
import gzip
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from hps.data.rows import KEYS, Places, Row, decode_json, opened, parse_row, stream
from hps.io import files


class Rows(Sequence[Row]):
    """Rows of a list-wise file, read when they are asked for: what is held is where each begins, 16 bytes per row.

    An index gives a row, a slice or an array of indices a sequence of some. The file stays open, so one that takes its
    place changes nothing; a compressed one is unpacked into a temporary file (under $TMPDIR).
    """

    def __init__(self, path: str | Path) -> None:
        """Read the file once and check all of it; errors as `stream`."""
        for _ in stream(path):
            pass
        self._path = path
        with opened(path) as file:
            if isinstance(file, gzip.GzipFile | lzma.LZMAFile):
                self._file = cast(BinaryIO, tempfile.TemporaryFile())
                shutil.copyfileobj(file, self._file)
                self._file.seek(0)
            else:
                self._file = open(path, "rb")
            self._begins = np.append(0, np.cumsum(np.fromiter(map(len, self._file), np.int64)))
        self._written = os.fstat(self._file.fileno()).st_mtime_ns
        self._lines = np.arange(len(self._begins) - 1)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int | np.integer):
            some = copy.copy(self)
            some._lines = self._lines[index]
            return some
        line = int(self._lines[index])
        begin, end = self._begins[line : line + 2].tolist()
        where, found = f"{self._path}:{line + 1}", self._file.fileno()
        if os.fstat(found).st_mtime_ns != self._written:
            raise ValueError(f"{self._path}: changed while it was read; start again")
        return parse_row(decode_json(os.pread(found, end - begin, begin), where), where)


def read(path: str | Path) -> list[Row]:
    """Read a whole list-wise file; errors as `stream`."""
    return list(stream(path))


def write(path: str | Path, rows: Iterable[Row]) -> None:
    """Write rows, as they come, so that `stream` gives them back (apart from `where`); atomic, compressed for .gz, .xz.

    Equal rows give equal bytes. Raises ValueError, and writes nothing, for rows that `stream` would refuse.
    """

    def records() -> Iterable[object]:
        seen, number = Places(), 0
        for number, row in enumerate(rows, 1):
            where = row.where or f"row {row.id!r}"
            seen.add_new(row.id, number, where, path)
            # Through parse_row: it refuses what `stream` would, and gives equal rows equal number types and key orders.
            yield _record(parse_row(_record(row), where))
        if not number:
            raise ValueError(f"{path}: refusing to write a file without rows")

    write_lines(path, records())


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
