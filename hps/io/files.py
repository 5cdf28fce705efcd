"""Files that appear whole or not at all, records that tell when they were harmed, and folders that one run holds.

Whatever a later run relies on is written through here: to a temporary name, to the disk, and only then to its own name.
"""

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
RIGHTS = {errno.EACCES, errno.EPERM, errno.EROFS}
BROKEN = {errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


@contextmanager
def explain_disk_errors(path: str | Path, keeps: str = "what stood there before is untouched") -> Iterator[None]:
    """Turn what a disk refuses inside into a ValueError with `path`, what to do, and what is not lost (`keeps`).

    The errors of libraries that wrap the system's are recognised by its number in their text.
    """
    try:
        yield
    except Exception as error:  # safetensors, torch and others wrap the system's errors in types of their own
        found = re.search(r"(?:os error|Errno) (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number not in SPACE | RIGHTS | BROKEN:
            raise
        do = "free space on that disk, " if number in SPACE else "make it writable, " if number in RIGHTS else ""
        raise ValueError(f"{path}: cannot be written ({os.strerror(number)}); {do}{keeps}") from error


@contextmanager
def replacing(path: str | Path, *, over: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` for a file or a folder, which takes the place of `path` when the block ends well.

    It is on the disk before it gets its name, so that not even a machine that stops leaves a half of it there; a block
    that fails leaves nothing. over: False keeps what another process has put there meanwhile.

    Raises:
        ValueError: the disk is full or read-only.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with explain_disk_errors(path):
            _remove(partial)
            yield partial
            sync(partial)
            if path.exists() and not over:
                return
            if partial.is_dir():
                _remove(path)  # a folder cannot be renamed over another one
            os.replace(partial, path)
            _flush(path.parent)  # the name alone: another process may be at work on its own files there
    finally:
        with suppress(OSError):
            _remove(partial)


def sync(path: Path) -> None:
    """Have a file, or a folder and the files in it, on the disk."""
    for one in [*(path.iterdir() if path.is_dir() else ()), path]:
        _flush(one)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: Path, name: str = "") -> None:
    """Remove what killed processes have left half-written in `replacing`, of the file `name` or of all in the folder.

    Nobody else may be at work on them: whoever calls this holds their lock. Other files that end in .tmp stay.
    """
    partial = re.compile((re.escape(name) or ".+") + r"\.\d+\.tmp")
    for left in folder.iterdir():
        if partial.fullmatch(left.name):
            _remove(left)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def append(file: io.FileIO, data: bytes) -> None:
    """Add to an unbuffered file, so that it holds the whole of `data` on return; ValueError for a full disk."""
    with explain_disk_errors(str(file.name), "what it holds is kept, and the same command goes on from there"):
        while data:
            data = data[file.write(data) :]


def write_text(path: Path, text: str) -> None:
    """Write a text, as UTF-8."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and programs to read."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file; ValueError with its name if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path}: cannot be read ({why})") from error


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write what a later run relies on: JSON with a checksum in it."""
    write_json(path, record | {"checksum": _checksum(record)})


def read_record(path: Path, advice: str, **holds: type) -> dict[str, Any]:
    """What `write_record` wrote; ValueError, which ends with `advice`, unless it is just that.

    holds: name -> type of what must be in it, which another version of this code may not have written.
    """
    record: Any = None
    try:
        record = read_json(path)
        whole = isinstance(record, dict) and record.pop("checksum", None) == _checksum(record)
    except RecursionError:  # as deep as can be read is deeper than can be written
        whole = False
    except ValueError as error:
        raise ValueError(f"{error}; {advice}") from error
    if not whole:
        raise ValueError(f"{path}: is not what was written there (its checksum differs); {advice}")
    if absent := [name for name, kind in holds.items() if not isinstance(record.get(name), kind)]:
        raise ValueError(f"{path}: does not hold {' and '.join(absent)} as this version writes it; {advice}")
    return record


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """sha256 hex of a file's bytes; ValueError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def first_corrupt_file(folder: Path, sums: dict[str, str]) -> str:
    """Which of a folder's files is not the one that `sums` (name -> sha256) was made of, or the empty string."""
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != expected:
            return f"{name} is not what was written (its checksum differs)"
    return ""


@contextmanager
def lock(path: Path, *, what: str, advice: str) -> Iterator[None]:
    """Hold `path` for the length of the block, against other processes; it is let go whatever ends this one.

    Raises:
        ValueError: another process holds it: says which, what it does (`what`, as it has put it) and `advice`.
    """
    with explain_disk_errors(path):
        file = _take(path, lambda holder: f"{path.parent}: {holder}; {advice}")
    try:
        file.truncate(0)
        about = {"what": what, "process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
        append(file, json.dumps(about).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _take(path: Path, message: Callable[[str], str]) -> io.FileIO:
    while True:
        file = open(path, "ab+", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read()
            file.close()
            try:
                about = json.loads(text)
                holder = "{what} by process {process} on {host} since {since} is at work here".format(**about)
            except (ValueError, KeyError, TypeError, RecursionError):
                holder = "another process is at work here"
            raise ValueError(message(holder)) from None
        # Its last holder may have deleted it between the two lines above: then this is the lock of nothing.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()
