"""The training data as token ids on disk: made in one pass over the list-wise file, then mapped, not held in RAM.

A store is a folder of flat arrays, found by what decides them: the content of the data file, the tokenizer, the budget
of tokens and the number of candidates. Runs with the same inputs share it, so that a sweep tokenises a text once. It
appears whole or not at all. What needs the texts themselves (eval.py, doctor) reads the file with `listwise.read`.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hps.data import listwise, tokens
from hps.data.tokens import Example
from hps.packing import Block

# Decides a store's name: raise it when the files below, or what becomes of a row, change.
FORMAT = 1
FILES = {
    "tokens": "<i4",  # of each example the prompt, then its responses
    "ids": "u1",  # UTF-8
    "cuts": "<i8",  # (R + 1, 3): where an example's tokens, responses and id begin, and the one before it ends
    # of each response
    "rewards": "<f8",  # NaN where the row has none
    "lengths": "<i4",  # tokens
    "identity": "<i4",  # equal numbers in a row mark equal tokens
    # of each example
    "keys": "<u8",  # hash of the id
    "lines": "<i8",  # of the data file, from 1
    "prompts": "<i4",  # tokens
    "human": "<i4",  # (R, 2): chosen, rejected; -1 where there is none
}


class Column(Sequence[np.ndarray]):
    """One (k,) array an example, read from disk as slices are asked for."""

    def __init__(self, read: Callable[[int, int], np.ndarray], cuts: np.ndarray) -> None:
        self._read, self._cuts = read, cuts

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return self[index : index + 1][0]
        cuts = self._cuts[index.start : index.stop + 1].tolist()
        values = self._read(cuts[0], cuts[-1])
        return [values[a - cuts[0] : b - cuts[0]] for a, b in pairwise(cuts)]


class Store:
    """R examples: small arrays of all of them, and what is larger read when it is asked for.

    counts: what was read and left out, by the names of `tokens.COUNTS`. longest: tokens of the longest prompt with one
    of its responses. data_hash: sha256 of the data file. keys (R,) uint64. human (R, 2) int32: chosen and rejected
    among the kept responses, -1 where there is none. rewards: (k,) float64 each, NaN where a row has none. identity:
    (k,) int32 each, equal numbers for equal tokens.
    """

    def __init__(self, folder: Path, data: Path, *, length_penalty: float = 0.0) -> None:
        """Map a store of the data file `data`; ValueError if it is not whole. `length_penalty` as in `open_store`."""
        about = _read_header(folder)
        self.counts: dict[str, int] = about["counts"]
        self.longest: int = about["longest"]
        self.data_hash: str = about["identity"]["data"]
        self.without_rewards: list[Any] | None = about["without_rewards"]
        self._folder, self._data, self._penalty = folder, data, length_penalty
        # Plain arrays over the maps: slicing a memmap object takes ten times as long.
        self._maps = {name: np.asarray(np.memmap(folder / name, dtype, "r")) for name, dtype in FILES.items()}
        self._cuts = self._maps["cuts"].reshape(-1, 3)
        self.keys, self.human = self._maps["keys"], self._maps["human"].reshape(-1, 2)
        self.rewards = Column(self._penalised, self._cuts[:, 1])
        self.identity = Column(lambda a, b: self._read("identity", a, b), self._cuts[:, 1])

    def __len__(self) -> int:
        return len(self.keys)

    def block(self, i: int, ks: Sequence[int] | np.ndarray) -> Block:
        """The prompt of example i with its responses ks."""
        (start, first), (_, last) = self._cuts[i : i + 2, :2].tolist()
        text, begin = self._maps["tokens"], start + int(self._maps["prompts"][i])
        cuts = list(accumulate(self._maps["lengths"][first:last].tolist(), initial=begin))
        return Block(text[start:begin], tuple(text[cuts[k] : cuts[k + 1]] for k in ks))

    def rewards_of(self, rows: np.ndarray, ks: np.ndarray) -> np.ndarray:
        """Rewards (T,) float64 of the responses `ks` (T,) of the examples `rows` (T,)."""
        at = self._cuts[rows, 1] + ks
        return self._maps["rewards"][at] - self._penalty * self._maps["lengths"][at]

    def id(self, i: int) -> str:
        """The id of example i."""
        return self._maps["ids"][self._cuts[i, 2] : self._cuts[i + 1, 2]].tobytes().decode()

    def where(self, i: int) -> str:
        """File and line of example i, for messages."""
        return f"{self._data}:{self._maps['lines'][i]}"

    def _read(self, name: str, a: int, b: int) -> np.ndarray:
        # By a read, not through the map: pages that pass by once would count as this process's memory.
        dtype = np.dtype(FILES[name])
        return np.fromfile(self._folder / name, dtype, count=b - a, offset=a * dtype.itemsize)

    def _penalised(self, a: int, b: int) -> np.ndarray:
        rewards = self._read("rewards", a, b)
        return rewards - self._penalty * self._read("lengths", a, b) if self._penalty else rewards


@dataclass(frozen=True)
class Blocks(Sequence[Block]):
    """Blocks that are made when they are asked for, so that none is held."""

    size: int
    make: Callable[[int], Block]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.make(index)


def open_store(
    root: str | Path,
    data: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    overlong: str = "drop",
    candidates: int = 0,
    need_rewards: bool = False,
    length_penalty: float = 0.0,
    makes: bool = True,
) -> Store:
    """The store of a list-wise file, made if no run before has made it.

    root: folder of all stores. max_length, overlong: as for `tokens.tokenize`. candidates: the first so many responses
    of each row, 0 for all. need_rewards: refuse data of which a row has no rewards. length_penalty: taken off the
    rewards for every token of a response, OURS: the data's side of R-DPO, which takes alpha L off the reward that the
    policy is to follow. makes: False waits for another rank to make it.
    Raises ValueError for what `listwise.stream` and `tokens.tokenize` refuse, and for a store that is not whole.
    """
    data = Path(data)
    identity = {"format": FORMAT, "data": file_hash(data), "tokenizer": tokens.fingerprint(tokenizer)}
    identity |= {"max_length": max_length, "overlong": overlong, "candidates": candidates}
    folder = Path(root) / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    while not makes and not folder.exists():
        time.sleep(0.1)
    if not folder.exists():
        about: dict[str, Any] = {"identity": identity, "counts": {}, "without_rewards": None}

        def rows() -> Iterator[listwise.Row]:
            for row in listwise.stream(data, need_rewards=need_rewards):
                if row.rewards is None and about["without_rewards"] is None:
                    about["without_rewards"] = [row.id, int(row.where.rpartition(":")[2])]
                yield listwise.first_responses(row, candidates) if candidates else row
            if file_hash(data) != identity["data"]:
                raise ValueError(f"{data}: changed while it was read; start again")

        examples = tokens.tokenize(tokenizer, rows(), about["counts"], max_length=max_length, overlong=overlong)
        write(folder, examples, about)
    store = Store(folder, data, length_penalty=length_penalty)
    if need_rewards and store.without_rewards:
        id, line = store.without_rewards
        listwise.fail_without_rewards(id, f"{data}:{line}")
    return store


def write(folder: Path, examples: Iterable[Example], about: dict[str, Any]) -> None:
    """Write a store under a temporary name, then rename it; one that another process has put there meanwhile stays.

    about: `identity`, `counts` and `without_rewards` for the header, looked at after the last example.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    examples, longest, cuts = iter(examples), 0, np.zeros((1, 3), dtype=np.int64)
    try:
        with ExitStack() as stack:
            files = {name: stack.enter_context((partial / name).open("wb")) for name in FILES}

            def put(name: str, values: Any) -> None:
                files[name].write(np.ascontiguousarray(values, dtype=FILES[name]))

            put("cuts", cuts)
            while some := list(islice(examples, 256)):
                put("tokens", np.concatenate([ids for e in some for ids in (e.prompt_ids, *e.response_ids)]))
                put("ids", np.frombuffer("".join(e.id for e in some).encode(), dtype=np.uint8))
                rewards = [np.full(len(e.identity), np.nan) if e.rewards is None else e.rewards for e in some]
                put("rewards", np.concatenate(rewards))
                put("lengths", [len(y) for e in some for y in e.response_ids])
                put("identity", np.concatenate([e.identity for e in some]))
                put("keys", [e.key for e in some])
                put("lines", [int(e.where.rpartition(":")[2]) for e in some])
                put("prompts", [len(e.prompt_ids) for e in some])
                put("human", [[-1 if k is None else k for k in (e.chosen, e.rejected)] for e in some])
                blocks = [Block(e.prompt_ids, e.response_ids) for e in some]
                sizes = [(len(b), len(b.responses), len(e.id.encode())) for b, e in zip(blocks, some, strict=True)]
                cuts = cuts[-1] + np.cumsum(sizes, axis=0)
                put("cuts", cuts)
                longest = max(longest, *map(tokens.longest, some))
            for file in files.values():  # a machine that stops must not leave a whole-looking store of zeros
                file.flush()
                os.fsync(file.fileno())
        sizes = {name: (partial / name).stat().st_size for name in FILES}
        content = about | {"longest": longest, "sizes": sizes}
        (partial / "store.json").write_text(json.dumps({"checksum": _checksum(content), "content": content}, indent=1))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def file_hash(path: Path) -> str:
    """sha256 hex of a file's bytes; ValueError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _read_header(folder: Path) -> dict[str, Any]:
    """The content of `store.json`; ValueError unless it is unharmed and every file has the size that it names."""
    why = ""
    try:
        header = json.loads((folder / "store.json").read_text())
        content = header["content"]
        if _checksum(content) != header["checksum"]:
            why = "store.json has another checksum"
        for name, size in content["sizes"].items():
            found = (folder / name).stat().st_size
            why = why or (f"{name} has {found:,} bytes, not {size:,}" if found != size else "")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        raise ValueError(f"{folder}: not a whole token store ({why}); delete this folder, it will be made again")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
