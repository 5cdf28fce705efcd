"""The training data as token ids on disk: made in one pass over the list-wise file, then read prompt by prompt.

A store is a folder of flat arrays, named by what decides them: the content of the data file, the tokenizer, the budget
of tokens and the number of candidates. Runs with the same inputs share it; it appears whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial as bound
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hps import dist
from hps.data import tokenizers
from hps.io import files
from hps.packing import Block

if TYPE_CHECKING:
    from hps.data.tokens import Example

# Decides a store's name: raise it when the files below, or what becomes of a row, change.
FORMAT = 6
ADVICE = "delete the folder of this token store, it will be made again"
FILES = {
    "tokens": np.dtype("<i4"),  # of each of the R examples the prompt, then its responses, N in all
    "offsets": np.dtype("<i8"),  # (R + N + 1,): where each prompt and response begins, and the one before it ends
    "ids": np.dtype("u1"),  # UTF-8
    "cuts": np.dtype("<i8"),  # (R + 1, 2): which is an example's first response, and where its id begins in `ids`
    "rewards": np.dtype("<f8"),  # (N,), NaN where the row has none
    "identity": np.dtype("<i4"),  # (N,), equal numbers in a row mark equal tokens
    "kept": np.dtype("<i4"),  # (N,), index of a response in its row
    "keys": np.dtype("<u8"),  # (R,), hash of the id
    "lines": np.dtype("<i8"),  # (R,), of the data file, from 1
    "human": np.dtype("<i4"),  # (R, 2): chosen, rejected; -1 where there is none
}


@dataclass(frozen=True)
class Lazy(Sequence[Any]):
    """A sequence of which nothing is held: `read(a, b)` gives its items a to b - 1 when they are asked for."""

    size: int
    read: Callable[[int, int], list[Any]]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.read(index.start, index.stop)
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.read(index, index + 1)[0]


class Store:
    """R examples: small arrays of all of them, and what is larger read when it is asked for."""

    def __init__(self, folder: Path, data: Path, *, length_penalty: float = 0.0) -> None:
        """A store of the data file `data`, taken to be whole, as `open_store` has it; `length_penalty` as there."""
        about = _read_header(folder)
        self.counts: dict[str, int] = about["counts"]  # what was read and left out, by the names of `tokens.COUNTS`
        self.longest: int = about["longest"]  # tokens of the longest prompt with one of its responses
        self.data_hash: str = about["identity"]["data"]  # sha256 of the data file
        self._folder, self._data, self._penalty = folder, data, length_penalty
        # What has a number or two per prompt is mapped; the rest is read, since every page of a map that was once
        # touched counts as this process's memory.
        self._files = {name: (folder / name).open("rb") for name in FILES}
        self._first, self._id_at = self._map("cuts").reshape(-1, 2).T
        self.keys, self.lines = self._map("keys"), self._map("lines")  # (R,) uint64; (R,) int64, of the file, from 1
        self.human = self._map("human").reshape(-1, 2)  # (R, 2) int32: chosen, rejected; -1 where there is none

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def sizes(self) -> np.ndarray:
        """(R,) int64: kept responses."""
        return np.diff(self._first)

    # Made when they are asked for: held, they would hold the store, and its files, until Python looks for circles.
    # Of each row (k,): float64, NaN where it has none; int32, equal numbers for equal tokens; int32, index in the row.
    rewards = property(lambda self: Lazy(len(self), self._rewards))
    identity = property(lambda self: Lazy(len(self), bound(self._per_response, "identity")))
    kept = property(lambda self: Lazy(len(self), bound(self._per_response, "kept")))

    def block(self, i: int, ks: Sequence[int] | np.ndarray) -> Block:
        """The prompt of example i with its responses ks."""
        first, last = self._first[i : i + 2].tolist()
        cuts = self._read("offsets", first + i, last + i + 2).tolist()  # i prompts stand before this one
        prompt = self._read("tokens", cuts[0], cuts[1])
        return Block(prompt, tuple(self._read("tokens", cuts[k + 1], cuts[k + 2]) for k in ks))

    def rewards_of(self, rows: np.ndarray, ks: np.ndarray) -> np.ndarray:
        """Rewards (T,) float64 of the responses `ks` (T,) of the examples `rows` (T,)."""
        r = self._first[rows] + ks
        rewards = self._map("rewards")[r]
        if self._penalty:
            offsets, at = self._map("offsets"), r + rows + 1
            rewards -= self._penalty * (offsets[at + 1] - offsets[at])
        return rewards

    def id(self, i: int) -> str:
        """The id of example i."""
        return self._read("ids", *self._id_at[i : i + 2].tolist()).tobytes().decode()

    def where(self, i: int) -> str:
        """File and line of example i, for messages."""
        return f"{self._data}:{self.lines[i]}"

    def _rewards(self, a: int, b: int) -> list[np.ndarray]:
        first = self._first[a : b + 1]
        rewards = self._read("rewards", first[0], first[-1])
        if self._penalty:
            lengths = np.diff(self._read("offsets", first[0] + a, first[-1] + b + 1))
            rewards = rewards - self._penalty * np.delete(lengths, first[:-1] - first[0] + np.arange(b - a))  # prompts'
        return _split(rewards, first)

    def _per_response(self, name: str, a: int, b: int) -> list[np.ndarray]:
        first = self._first[a : b + 1]
        return _split(self._read(name, first[0], first[-1]), first)

    def _map(self, name: str) -> np.ndarray:
        return np.asarray(np.memmap(self._folder / name, FILES[name], "r"))

    def _read(self, name: str, begin: int, end: int) -> np.ndarray:
        dtype = FILES[name]
        data = os.pread(self._files[name].fileno(), (end - begin) * dtype.itemsize, begin * dtype.itemsize)
        assert len(data) == (end - begin) * dtype.itemsize, f"{self._folder / name} was cut while it was in use"
        return np.frombuffer(data, dtype)


def _split(values: np.ndarray, first: np.ndarray) -> list[np.ndarray]:
    return [values[i:j] for i, j in pairwise((first - first[0]).tolist())]


def open_store(
    root: str | Path,
    data: str | Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    max_length: int,
    truncate: str = "drop",
    closing: bool = False,
    candidates: int = 0,
    limit: int = 0,
    need_rewards: bool = False,
    length_penalty: float = 0.0,
    ranks: dist.Ranks | None = None,
) -> Store:
    """The store of a list-wise file, made if no run before has made it. Collective with `ranks`: the first one alone
    reads the data and hashes the store.

    root: folder of all stores. max_length, truncate, closing: as for `tokens.tokenize`. candidates: the first so many
    responses of each row, 0 for all. limit: the first so many rows, 0 for all. need_rewards: refuse data of which a row
    has no rewards. length_penalty: taken off the rewards for every token of a response, OURS: the data's side of R-DPO,
    which takes alpha L off the reward that the policy is to follow.
    Raises ValueError for what `rows.stream` and `tokens.tokenize` refuse, and for a store that is not whole.
    """
    data, root = Path(data), Path(root)
    how = dict(max_length=max_length, truncate=truncate)

    def make() -> str:
        from hps.data import rows, tokens

        identity = {"format": FORMAT, "data": files.sha256(data), "tokenizer": tokenizers.fingerprint(tokenizer)}
        identity |= how | {"candidates": candidates, "closing": closing, "limit": limit}
        folder = root / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
        about: dict[str, Any] = {"identity": identity, "counts": {}}

        def checked() -> Iterator[rows.Row]:
            for row in islice(rows.stream(data), limit or None):
                if need_rewards and row.rewards is None:
                    raise _without_rewards(row.id, row.where)
                yield rows.only(row, range(len(row.responses))[: candidates or None])
            if files.sha256(data) != identity["data"]:
                raise ValueError(f"{data}: changed while it was read; start again")

        if not folder.exists():
            write(folder, tokens.tokenize(tokenizer, checked(), about["counts"], closing=closing, **how), about)
        header = _read_header(folder)
        if why := files.first_corrupt_file(folder, header["files"]):
            raise ValueError(f"{folder}: {why}; {ADVICE}")
        if need_rewards:  # a run that needs none may have made it
            found = Store(folder, data)
            for i, rewards in enumerate(found.rewards[0 : len(found)]):
                if np.isnan(rewards[0]):
                    raise _without_rewards(found.id(i), found.where(i))
        return folder.name

    return Store(root / dist.from_first(make, ranks), data, length_penalty=length_penalty)


def _without_rewards(id: str, where: str) -> ValueError:
    advice = "score the file first (data_prep.py annotate), or train on its pairs, --method dpo-human"
    return ValueError(f"{where}: row {id!r} has no rewards: {advice}")


def write(folder: Path, examples: Iterable["Example"], about: dict[str, Any]) -> None:
    """Write a store, whole or not at all; one that another process has put there meanwhile stays.

    about: `identity` and `counts` for the header, looked at after the last example.
    """
    with files.explain_disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    from hps.data.rows import row_key
    from hps.data.tokens import longest as longest_of

    longest, offset, cuts = 0, 0, np.zeros(2, np.int64)
    with files.replacing(folder, over=False) as partial:
        partial.mkdir()
        with ExitStack() as stack:
            columns = {name: stack.enter_context((partial / name).open("wb")) for name in FILES}

            def put(name: str, values: Any) -> None:
                columns[name].write(np.ascontiguousarray(values, dtype=FILES[name]))

            put("offsets", offset)
            put("cuts", cuts)
            for e in examples:
                texts = (e.prompt_ids, *e.response_ids)
                ends = offset + np.cumsum([len(ids) for ids in texts])
                offset = ends[-1]
                put("tokens", np.concatenate(texts))
                put("offsets", ends)
                put("ids", np.frombuffer(id := e.id.encode(), np.uint8))
                put("rewards", np.full(len(e.identity), np.nan) if e.rewards is None else e.rewards)
                put("identity", e.identity)
                put("kept", e.kept)
                put("keys", row_key(e.id))
                put("lines", int(e.where.rpartition(":")[2]))
                put("human", [-1 if k is None else k for k in (e.chosen, e.rejected)])
                cuts = cuts + [len(e.response_ids), len(id)]
                put("cuts", cuts)
                longest = max(longest, longest_of(e))
        sums = {name: files.sha256(partial / name) for name in FILES}
        files.write_record(partial / "store.json", about | {"longest": longest, "files": sums})


def _read_header(folder: Path) -> dict[str, Any]:
    return files.read_record(folder / "store.json", ADVICE, files=dict, identity=dict, counts=dict, longest=int)
