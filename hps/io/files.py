"""Files that appear whole or not at all, records that tell when they were corrupted, and folders that one run holds.

Whatever a later run relies on is written through here: to a temporary name, to the disk, and only then to its own name.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout  # comes with torch and transformers

# What a disk may refuse, and what the user can do about it.
ADVICE_BY_ERRNO = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space on that disk, "),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable, "),
    **dict.fromkeys((errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), ""),
}


@contextmanager
def explain_disk_errors(path: str | Path, keeps: str = "what stood there before is untouched") -> Iterator[None]:
    """Turn what a disk refuses inside into a ValueError with `path`, what to do, and what is not lost (`keeps`)."""
    try:
        yield
    except ValueError:  # whoever raised it has said what it is of: what is written may be read meanwhile
        raise
    except Exception as error:  # safetensors and torch wrap the system's errors: its number is left in their text
        found = re.search(r"(?:os error|Errno) (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number not in ADVICE_BY_ERRNO:
            raise
        advice = ADVICE_BY_ERRNO[number] + keeps
        raise ValueError(f"{path}: cannot be written ({os.strerror(number)}); {advice}") from error


@contextmanager
def replacing(path: str | Path, *, over: bool = True) -> Iterator[Path]:
    """A temporary name beside `path` for a file or a folder, which takes the place of `path` when the block ends well.

    It is on the disk before it gets its name, so that not even a machine that stops leaves a half of it there; a block
    that fails leaves nothing. over: False keeps what another process has put there meanwhile.

    Raises:
        ValueError: the disk is full or read-only.
    """
    path = Path(path)
    partial, old = (path.with_name(f"{path.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old"))
    try:
        with explain_disk_errors(path):
            _clear(partial, path)
            yield partial
            sync(partial)
            if path.exists() and not over:
                return
            if path.is_dir() and partial.is_dir():
                # A folder cannot be renamed over another one. A process that is killed between these two renames leaves
                # the whole old folder beside the new one, and `remove_stale_temporaries` gives it its name back.
                _clear(old, path)
                os.replace(path, old)
            os.replace(partial, path)
            sync(path.parent, inside=False)  # the name alone: other processes may be at work on their files there
    finally:
        with suppress(OSError):
            _clear(partial, path)
            _clear(old, path)


def remove_stale_temporaries(folder: Path, *names: str) -> None:
    """Remove what killed processes have left behind in `replacing`, of the files `names` or of all in the folder.

    Nobody else may be at work on them: whoever calls this holds their lock. Other files that end in .tmp stay.
    """
    stale = re.compile(rf"({'|'.join(map(re.escape, names)) or '.+'})\.\d+\.(tmp|old)")
    for left in folder.iterdir():
        if found := stale.fullmatch(left.name):
            _clear(left, folder / found[1])


def _clear(left: Path, path: Path) -> None:
    """Remove what a `replacing` of `path` has left; an old folder whose successor never got its name gets it back."""
    if left.suffix == ".old" and left.exists() and not path.exists():
        os.replace(left, path)
    elif left.is_dir():
        shutil.rmtree(left)
    else:
        left.unlink(missing_ok=True)


def sync(path: Path, *, inside: bool = True) -> None:
    """Have a file, or a folder and the files inside it, on the disk."""
    for one in [*(path.iterdir() if inside and path.is_dir() else ()), path]:
        descriptor = os.open(one, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
    held, holder = FileLock(path, timeout=0), ""
    try:
        with explain_disk_errors(path):
            held.acquire()
    except Timeout:
        with suppress(OSError):  # it may have ended by now
            holder = path.read_text(errors="replace")
        raise ValueError(f"{path.parent}: {holder or 'another process'} is at work here; {advice}") from None
    try:
        with explain_disk_errors(path):
            path.write_text(f"{what} by process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: FileLock takes no file that has lost its name
        held.release()
        with suppress(OSError):  # of a folder that nothing was written to
            path.parent.rmdir()
