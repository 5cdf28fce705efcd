"""What the hosts of a run must share, or have alike, asked of all ranks before any work; imported for several ranks.

Without it a host that lacks the common disk would wait for files which never come, or train on others.
"""

import hashlib
import secrets
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from hps import dist
from hps.io import files, hub

MODELS = {"model", "reference"}  # options that name a folder or a model on the hub
PATHS = {*MODELS, "data", "input", "scorer"}  # options whose files every rank reads, or may have to
BY_HOST = {"max_rows", "timeout"}  # options that each host may set for itself
GLANCE_BYTES = 2**20  # of each of a folder's files, at its beginning and at its end


def check(c: Any, shared: dict[str, Path], ranks: dist.Ranks) -> None:
    """ValueError, the same one on all ranks, unless each sees the folders and has the options of the first. Collective.

    Args:
        c: the script's options. shared: option -> folder that all write to, or read what others wrote; made on the
            first rank's host alone.
    """
    host = socket.gethostname()
    mark = f"shared.{secrets.randbits(63)}.tmp"  # no network disk has cached that this name is absent
    mine = {option: behind(option, value) for option, value in vars(c).items() if option not in {*shared, *BY_HOST}}

    def begin() -> list[Any]:
        for folder in shared.values():
            with files.explain_disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / mark).touch()
        return [host, mark, mine]

    try:
        first, there, expected = dist.from_first(begin, ranks, days=False)
        unseen = [option for option, folder in shared.items() if not (folder / there).exists()]
        other = [option for option in mine if mine[option] != expected.get(option)]
        wrong = [f"does not see the --{', --'.join(unseen)} of {first} (rank 0)"] if unseen else []
        wrong += [f"has another --{', --'.join(other)} than {first} (rank 0)"] if other else []
        found = dist.gather(f"{host} (rank %d) {' and '.join(wrong)}" if wrong else "", ranks)
    finally:
        for folder in shared.values() if ranks.first else ():
            (folder / mark).unlink(missing_ok=True)
    # Each host once, with its first rank: the others there see the same.
    if told := "; ".join(text % found.index(text) for text in dict.fromkeys(found) if text):
        raise ValueError(
            f"{told}. All hosts must share --{', --'.join(shared)}, on one disk, and have the same options, and the "
            "same files behind them"
        )


def behind(option: str, value: Any) -> Any:
    """An option's value; of a file its hash, of a folder that of its files' names, sizes, beginnings and ends, of a
    model on the hub its commit."""
    if option in MODELS and value:
        with suppress(ValueError):  # loading it will say what is wrong
            value = "@".join(filter(None, hub.resolve(value)))
    path = Path(str(value))
    if option not in PATHS or not value or not path.exists():
        return value
    if not path.is_dir():
        return files.sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file():
            with file.open("rb") as opened:
                size = file.stat().st_size
                digest.update(f"{file.name} {size}\n".encode() + opened.read(GLANCE_BYTES))
                opened.seek(max(0, size - GLANCE_BYTES))
                digest.update(opened.read())
    return digest.hexdigest()
