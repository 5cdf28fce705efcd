"""Work on many rows that is shared out over ranks, and goes on where it was when it is killed.

OUTPUT.journal-RANK-N holds the run's settings and then a JSON line for every row that a process has done. It is
flushed with each, and a last line without its end, torn when the run was killed, is as if it had not been written.
"""

import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hps import checkpoint, dist, hosts
from hps.data.listwise import Rows
from hps.data.rows import Places, Row, decode_json

# Options that change nothing of what is written.
SPEED = {"max_rows", "tensor_parallel", "tokens_per_micro_batch", "timeout"}
FREE = SPEED | {"output", "pairs"}  # and of what a journal holds: a run that was killed may go on with others

RECORD = {"id": str, "found": list, "counts": dict}  # the texts or numbers found for a row, and what became of it

Found = Iterator[tuple[str, list]]
Work = Callable[[Sequence[Row], Counter[str], dist.Ranks], Found]


def in_shares(
    c: Any, rows: Rows, work: Work, write: Callable[[Iterator[tuple[Row, list]], Counter[str]], None]
) -> None:
    """Do `work` on the rows that no journal beside c.output has, every world_size-th on each rank, then `write` once.

    Args:
        c: options of the command, with `output` and `timeout` (minutes that ranks wait for each other, but for their
            shares). Where a journal has others, but for FREE, nothing is begun.
        work: (rows, counts, ranks) -> (id, what was found: texts or numbers) of each row, as it is done; it adds to
            `counts` what becomes of the row.
        write: each row with what was found for it, and counts, which are whole after the last row; called on the first
            rank.

    Raises:
        ValueError: another process is at work on this output, or another run has left it unfinished.
    """
    output = Path(c.output)
    settings = {key: hosts.behind(key, value) for key, value in vars(c).items() if key not in FREE}
    with dist.session(timeout=timedelta(minutes=c.timeout)) as ranks, checkpoint.held(c, ranks, what="data_prep.py"):
        done = Records(output, settings)
        dist.barrier()  # none may write before all have read
        todo = np.flatnonzero(np.fromiter((row.id not in done for row in rows), bool))
        if len(mine := rows[todo[ranks.rank :: ranks.world_size]]):
            counts: Counter[str] = Counter()
            file = None  # opened with the first record: a run that ends before has left nothing behind
            for id, found in work(mine, counts, ranks):
                file = file or begin(output, ranks.rank, settings)
                note(file, {"id": id, "found": found, "counts": counts})
                counts.clear()
        dist.gather("done", ranks, days=True)  # a rank may be done days before another
        if ranks.first:
            done, total = Records(output, settings), Counter[str]()

            def each() -> Iterator[tuple[Row, list]]:
                for row in rows:
                    record = done[row.id]
                    total.update(record["counts"])  # which, unlike a sum of counters, keeps zeros
                    yield row, record["found"]

            write(each(), total)
            for path in journals(output):
                path.unlink()


def journals(output: str | Path) -> list[Path]:
    """The journals beside an output, of all ranks that have ever written one."""
    path = Path(output)
    return sorted(path.parent.glob(f"{glob.escape(path.name)}.journal-*"))


class Records:
    """What the journals beside an output hold, by id: a record is read when it is asked for. ValueError for a journal
    of other settings, or a line that is no such record."""

    def __init__(self, output: str | Path, settings: dict[str, object]) -> None:
        self._paths, self._places = journals(output), Places()
        for file, path in enumerate(self._paths):
            begin = 0
            for number, line in enumerate(path.open("rb"), 1):
                if not line.endswith(b"\n"):
                    break  # torn
                record: Any = decode_json(line, f"{path}:{number}")
                if number == 1:
                    before = record if isinstance(record, dict) else {}
                    if other := [key for key in {**before, **settings} if before.get(key) != settings.get(key)]:
                        raise ValueError(
                            f"{path} is what another run left unfinished: it differs in {', '.join(other)}. Start that "
                            f"run again to finish it, or delete {Path(output).name}.journal-* to begin anew"
                        )
                elif not isinstance(record, dict) or {key: type(record[key]) for key in record} != RECORD:
                    raise ValueError(f"{path}:{number}: no record of a finished prompt; remove that line")
                else:
                    self._places.add(record["id"], begin * len(self._paths) + file)
                begin += len(line)

    def __contains__(self, id: str) -> bool:
        return id in self._places

    def __getitem__(self, id: str) -> dict[str, Any]:
        place = self._places.get(id)
        assert place is not None, f"{id!r} is in no journal"
        begin, file = divmod(place, len(self._paths))
        with open(self._paths[file], "rb") as opened:
            opened.seek(begin)
            return json.loads(opened.readline())


def begin(output: str | Path, rank: int, settings: dict[str, object]) -> BinaryIO:
    """A new journal of a rank; those of processes before it stay as they are."""
    file = open(f"{output}.journal-{rank}-{len(journals(output))}", "xb")
    note(file, settings)
    return file


def note(file: BinaryIO, record: dict[str, Any]) -> None:
    """Append one record, which is on its way to the disk when this returns."""
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()
