"""Reference log-probs: computed once, kept on disk, addressed by content.

An entry is found by what was scored (token ids of prompt and response) under what scored it (weights, tokenizer
and template text, dtype), never by file names or row numbers. So all methods, seeds and sizes of a sweep share
one cache, and nothing stale can be read. Shards are safetensors files that appear whole or not at all, named by a
checksum of their arrays `keys` (T, 16) uint8 and `logps` (T,) float32 in nats, in any order.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from hps import dist
from hps.io import files
from hps.model import PolicyModel
from hps.packing import Block, micro_batches, pack, pieces

# Micro-batches a rank scores between two shards: what a kill can cost, against the number of files.
MICRO_BATCHES_PER_SHARD = 64


def open_cache(root: str | Path, *, weights: str, tokenizer: str, dtype: str) -> Path:
    """Open (or begin) the cache of one reference: the folder of its shards, which the functions here take.

    Args:
        root: folder of all caches. weights, tokenizer: fingerprints. dtype: compute dtype of the scoring pass.
    """
    identity = {"weights": weights, "tokenizer": tokenizer, "dtype": dtype}
    cache = Path(root) / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    with files.explain_disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
    return cache


def response_keys(blocks: Iterable[Block]) -> np.ndarray:
    """What names each scored response, (T,) of 16 bytes: blake2b over where the prompt ends and all token ids."""
    digests = bytearray()
    for block in blocks:
        prompt = hashlib.blake2b(len(block.prompt).to_bytes(8, "little"), digest_size=16)
        prompt.update(np.ascontiguousarray(block.prompt, dtype="<i4"))
        for y in block.responses:
            digest = prompt.copy()
            digest.update(np.ascontiguousarray(y, dtype="<i4"))
            digests += digest.digest()
    return np.frombuffer(digests, dtype="S16")


def find(cache: Path, keys: np.ndarray) -> np.ndarray:
    """Log-probs of responses by their keys (T,), as far as they are there: (T,) float32 nats, NaN where they are not.

    Memory is that of the keys: shards pass by one at a time, and what is wanted is searched for in what is sorted, so
    a cache may be much larger than what a run touches.

    Raises:
        ValueError: a shard that cannot be read or holds a number that is not a log-prob.
    """
    if not len(keys):
        return np.zeros(0, dtype=np.float32)
    wanted, place = np.unique(keys, return_inverse=True)
    found = np.full(len(wanted), np.nan, dtype=np.float32)
    for path in sorted(cache.glob("shard-*.safetensors")):
        try:
            tensors = load_file(path)
            shard, logps = tensors["keys"], tensors["logps"]
        except Exception as e:  # safetensors raises its own type; whatever it says, the file is not usable
            raise ValueError(f"{path}: not a readable cache shard ({e}); delete it, it will be computed again") from e
        if path.stem != shard_name(shard, logps):
            raise ValueError(f"{path}: is not what was written (its checksum); delete it, it will be computed again")
        formed = (shard.dtype, shard.shape, logps.dtype, logps.ndim) == (np.uint8, (logps.size, 16), np.float32, 1)
        if not formed or not np.all(np.isfinite(logps)) or np.any(logps > 0):
            raise ValueError(f"{path}: holds values that are not log-probs; delete it, it will be computed again")
        shard = shard.view("S16")[:, 0]
        at = np.searchsorted(wanted, shard).clip(max=len(wanted) - 1)
        hit = wanted[at] == shard
        found[at[hit]] = logps[hit]
    return found[place]


def shard_name(keys: np.ndarray, logps: np.ndarray) -> str:
    """A shard's name is the checksum of what it holds."""
    digest = hashlib.blake2b(f"{keys.dtype} {keys.shape} {logps.dtype} {logps.shape}".encode(), digest_size=12)
    digest.update(keys)
    digest.update(logps)
    return f"shard-{digest.hexdigest()}"


def _write_shard(cache: Path, keys: np.ndarray, logps: list[float]) -> None:
    order = np.argsort(keys)  # `find` is several times faster in sorted shards
    array, values = keys[order].view(np.uint8).reshape(-1, 16), np.array(logps, dtype=np.float32)[order]
    with files.replacing(cache / f"{shard_name(array, values)}.safetensors") as partial:
        save_file({"keys": array, "logps": values}, partial)


def _parts(
    blocks: Iterable[Block], absent: np.ndarray, *, budget: int, tokens: int, share_prompt: bool
) -> Iterator[list[Block]]:
    """The absent (T,) bool ones of the blocks' responses, in pieces of a micro-batch's `budget` at most, about `tokens`
    packed tokens at a time."""
    part: list[Block] = []
    size, lacking = 0, iter(absent)
    for block in blocks:
        lacks = itertools.compress(block.responses, lacking)
        for piece in pieces(Block(block.prompt, tuple(lacks)), tokens=budget, share_prompt=share_prompt):
            part.append(piece)
            size += len(piece)
            if size >= tokens:
                yield part
                part, size = [], 0
    if part:
        yield part


def fill(
    cache: Path,
    model: PolicyModel,
    blocks: Iterable[Block],
    *,
    ranks: dist.Ranks,
    budget: int,
    pad_id: int,
    share_prompt: bool = True,
) -> tuple[np.ndarray, int]:
    """Log-probs of all responses; what the cache lacks is scored with the model as it stands, and kept.

    All ranks share the work through the folder.

    Args:
        blocks: iterated over once, and again where something is lacking.
        budget: packed tokens a micro-batch.

    Returns:
        (T,) float32 nats, of the blocks' responses in order; and how many were computed (0 on a second run).
    """
    dist.barrier()  # nobody may still be writing when the ranks agree on what is missing
    keys = response_keys(blocks)
    found = find(cache, keys)
    absent = torch.from_numpy(np.isnan(found)).int()
    # Another run may write into the same folder: what one rank still lacks all of them score, or collectives hang.
    absent = dist.all_sum(absent.to(ranks.device)).cpu().numpy() > 0
    computed = int(absent.sum())
    if not computed:
        return found, 0
    share_prompt = share_prompt and not model.padded
    bar = tqdm(total=computed, desc="reference log-probs", unit="response", disable=not ranks.first)
    how = dict(budget=budget, share_prompt=share_prompt)
    for part in _parts(blocks, absent, tokens=budget * MICRO_BATCHES_PER_SHARD * ranks.world_size, **how):
        batches = micro_batches(part, world_size=ranks.world_size, **how)
        mine: list[Block] = []
        logps: list[float] = []
        for members in batches[ranks.rank]:
            # An idle rank scores a block that another one keeps, so that sharded collectives stay in step.
            batch = [part[i] for i in members] or [part[0]]
            with torch.no_grad():
                scored = model(pack(batch, pad_id=pad_id, share_prompt=share_prompt).to(ranks.device)).cpu()
            if members:
                mine += batch
                for block, row in zip(batch, scored.tolist(), strict=True):
                    logps += row[: len(block.responses)]
            # Rank 0 stands for all: exact when alone, and never beyond the total.
            done = ranks.world_size * sum(len(block.responses) for block in batch)
            bar.update(min(done, computed - bar.n))
        if not np.all(np.isfinite(logps)):
            raise ValueError("the reference gives a response a log-prob that is not finite: check its weights, dtype")
        if mine:
            _write_shard(cache, response_keys(mine), logps)
    bar.close()
    dist.barrier()
    found = find(cache, keys)
    if np.isnan(found).any():
        raise ValueError(f"{cache}: log-probs that were just written there are missing; start the same command again")
    return found, computed
