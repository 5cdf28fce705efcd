"""Reference log-probs: computed once, kept on disk, addressed by content.

An entry is found by what was scored (token ids of prompt and response) under what scored it (weights, tokenizer
and template text, dtype), never by file names or row numbers. So all methods, seeds and sizes of a sweep share
one cache, and nothing stale can be read. Shards are safetensors files that appear whole or not at all.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from hps import dist
from hps.model import PolicyModel
from hps.packing import Block, micro_batches, pack, pieces

# Micro-batches a rank scores between two shards: what a kill can cost, against the number of files.
MICRO_BATCHES_A_SHARD = 64
# Packed tokens of the pieces that a prompt with many responses is scored in.
PIECE = 256


@dataclass
class Cache:
    """`folder` holds the shards of one reference; `known` maps a response's key to its summed log-prob (nats)."""

    folder: Path
    known: dict[bytes, float] = field(default_factory=dict)


def open_cache(root: str | Path, *, weights: str, tokenizer: str, dtype: str) -> Cache:
    """Open (or begin) the cache of one reference and read what it holds.

    Args:
        root: folder of all caches. weights, tokenizer: fingerprints. dtype: compute dtype of the scoring pass.

    Raises:
        ValueError: a shard that cannot be read or holds a number that is not a log-prob.
    """
    identity = {"weights": weights, "tokenizer": tokenizer, "dtype": dtype}
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    cache = Cache(Path(root) / name)
    cache.folder.mkdir(parents=True, exist_ok=True)
    description = cache.folder / "reference.json"
    if not description.exists():
        partial = description.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(identity, indent=1))
        partial.rename(description)
    reload(cache)
    return cache


def reload(cache: Cache) -> None:
    """Read all shards on disk into `cache.known`."""
    for path in sorted(cache.folder.glob("shard-*.safetensors")):
        try:
            tensors = load_file(path)
            keys, logps = tensors["keys"], tensors["logps"]
        except Exception as e:  # safetensors raises its own type; whatever it says, the file is not usable
            raise ValueError(f"{path}: not a readable cache shard ({e}); delete it, it will be computed again") from e
        if keys.shape != (len(logps), 16) or not np.all(np.isfinite(logps)) or np.any(logps > 0):
            raise ValueError(f"{path}: holds values that are not log-probs; delete it, it will be computed again")
        cache.known.update(zip(map(bytes, keys), logps.tolist(), strict=True))


def response_key(prompt: np.ndarray, response: np.ndarray) -> bytes:
    """16 bytes that name a scored response: blake2b over the token ids and where the prompt ends."""
    digest = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
    digest.update(np.ascontiguousarray(prompt, dtype="<i4"))
    digest.update(np.ascontiguousarray(response, dtype="<i4"))
    return digest.digest()


def missing(cache: Cache, blocks: Sequence[Block]) -> list[Block]:
    """The blocks cut down to the responses that the cache does not hold; complete blocks are left out."""
    cut = []
    for block in blocks:
        absent = tuple(y for y in block.responses if response_key(block.prompt, y) not in cache.known)
        if absent:
            cut.append(Block(block.prompt, absent))
    return cut


def lookup(cache: Cache, block: Block) -> np.ndarray:
    """Reference log-probs of a block's responses, (K,) float32 nats; ValueError if one is missing."""
    try:
        return np.array([cache.known[response_key(block.prompt, y)] for y in block.responses], dtype=np.float32)
    except KeyError:
        raise ValueError(
            f"{cache.folder}: a reference log-prob is missing. It cannot be computed now that the policy has moved "
            "away from the reference: restore the cache folder, or start the run again in a new --out"
        ) from None


def score(
    model: PolicyModel, blocks: Sequence[Block], *, device: torch.device, budget: int, pad_id: int, progress: str = ""
) -> list[np.ndarray]:
    """Log-probs of all responses under a model on one rank, one (K,) float32 array a block, in order.

    Args:
        budget: packed tokens a micro-batch.
        progress: name of the progress bar; empty for none.
    """
    whole: list[list[float]] = [[] for _ in blocks]
    cut = [(b, piece) for b, block in enumerate(blocks) for piece in pieces(block, tokens=PIECE)]
    scored: list[list[float]] = [[] for _ in cut]
    batches = micro_batches([len(piece) for _, piece in cut], budget=budget, world_size=1)[0]
    for members in tqdm(batches, desc=progress, unit="batch", disable=not progress):
        with torch.no_grad():
            rows = model(pack([cut[i][1] for i in members], pad_id=pad_id).to(device)).tolist()
        for i, row in zip(members, rows, strict=True):
            scored[i] = row[: len(cut[i][1].responses)]
    for (b, _), row in zip(cut, scored, strict=True):
        whole[b] += row
    return [np.array(row, dtype=np.float32) for row in whole]


def _write_shard(cache: Cache, keys: list[bytes], logps: list[float]) -> None:
    name = hashlib.blake2b(b"".join(keys), digest_size=12).hexdigest()
    partial = cache.folder / f"shard-{name}.{os.getpid()}.tmp"
    array = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16)
    save_file({"keys": array, "logps": np.array(logps, dtype=np.float32)}, partial)
    partial.rename(cache.folder / f"shard-{name}.safetensors")


def fill(
    cache: Cache,
    model: PolicyModel,
    blocks: Sequence[Block],
    *,
    ranks: dist.Ranks,
    budget: int,
    pad_id: int,
    share_prompt: bool = True,
) -> int:
    """Score what the cache lacks, with the model as it stands; all ranks share the work through the folder.

    Args:
        blocks: every response that will be looked up.
        budget: packed tokens a micro-batch.

    Returns:
        How many responses were computed (0 on a second run).
    """
    dist.barrier()  # nobody may still be writing when the ranks agree on what is missing
    reload(cache)
    todo = [piece for block in missing(cache, blocks) for piece in pieces(block, tokens=PIECE)]
    computed = sum(len(block.responses) for block in todo)
    group = max(1, budget * MICRO_BATCHES_A_SHARD * ranks.world_size // max(1, max(map(len, todo), default=1)))
    bar = tqdm(total=computed, desc="reference log-probs", unit="response", disable=not ranks.first or not todo)
    for start in range(0, len(todo), group):
        part = todo[start : start + group]
        batches = micro_batches([len(b) for b in part], budget=budget, world_size=ranks.world_size)
        keys, logps = [], []
        for members in batches[ranks.rank]:
            # An idle rank scores a block that another one keeps, so that sharded collectives stay in step.
            chosen = [part[i] for i in members] or [part[0]]
            with torch.no_grad():
                scored = model(pack(chosen, pad_id=pad_id, share_prompt=share_prompt).to(ranks.device)).cpu()
            if members:
                for block, row in zip(chosen, scored.tolist(), strict=True):
                    keys += [response_key(block.prompt, y) for y in block.responses]
                    logps += row[: len(block.responses)]
            # Rank 0 stands for all: exact when alone, and never beyond the total.
            done = ranks.world_size * sum(len(block.responses) for block in chosen)
            bar.update(min(done, computed - bar.n))
        if not np.all(np.isfinite(logps)):
            raise ValueError("the reference gives a response a log-prob that is not finite: check its weights, dtype")
        if keys:
            _write_shard(cache, keys, logps)
    bar.close()
    dist.reshard(model)
    dist.barrier()
    reload(cache)
    return computed
