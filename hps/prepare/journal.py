"""What a long run has finished so far, line by line beside its output, so that a killed run goes on where it was.

OUTPUT.journal-RANK holds the run's settings and then a JSON line for every finished piece. It is appended to and
flushed, and a last line without its end, torn when the run was killed, is as if it had not been written.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from hps.data.listwise import decode_json


def files(output: str | Path) -> list[Path]:
    """The journals beside an output, of all ranks that have ever written one."""
    begin = f"{Path(output).name}.journal-"
    folder = Path(output).parent
    return sorted(path for path in folder.iterdir() if path.name.startswith(begin)) if folder.exists() else []


def read(output: str | Path, settings: dict[str, object], **holds: tuple[type, type]) -> dict[str, dict]:
    """id -> record of all that is in the journals beside an output.

    holds: what each record has beside its id, by name: a list or a dict, and of what.

    Raises:
        ValueError: a journal was written with other settings, or a line in it is no such record.
    """
    records = {}
    for path in files(output):
        for number, line in enumerate(_whole_lines(path), 1):
            record: Any = decode_json(line, f"{path}:{number}")
            if number == 1 and record != settings:
                before = record if isinstance(record, dict) else {}
                other = [key for key in {**before, **settings} if before.get(key) != settings.get(key)]
                raise ValueError(
                    f"{path} is what another run left unfinished: it differs in {', '.join(other)}. Start that run "
                    f"again to finish it, or delete {Path(output).name}.journal-* to begin anew"
                )
            if number > 1:
                good = isinstance(record, dict) and type(record.get("id")) is str
                if not good or not all(_holds(record.get(name), *kinds) for name, kinds in holds.items()):
                    raise ValueError(f"{path}:{number}: no record of a finished prompt; remove that line")
                records[record["id"]] = record
    return records


def _holds(value: Any, kind: type, inner: type) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return isinstance(value, kind) and all(type(item) is inner for item in items)


class Journal:
    """The journal that one rank appends to. All ranks must have read before one of them begins.

    The file appears with its first record: a run that ends before has left nothing behind that a run on mended data
    would have to be told to forget.
    """

    def __init__(self, output: str | Path, rank: int, settings: dict[str, object]):
        self.path, self.settings = Path(f"{output}.journal-{rank}"), settings
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO | None = None

    def write(self, record: dict) -> None:
        """Append one record, which has an `id`."""
        lines = [record]
        if self.file is None:
            self.path.touch()
            whole = sum(map(len, _whole_lines(self.path)))
            self.file = open(self.path, "r+b")
            self.file.truncate(whole)
            self.file.seek(whole)
            lines = [record] if whole else [self.settings, record]
        self.file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self.file.flush()


def _whole_lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line
