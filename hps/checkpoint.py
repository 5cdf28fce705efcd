"""Checkpoints that appear whole or not at all, resume exactly, and hold no pickle.

A checkpoint is a folder `step-00000040`: safetensors files of each rank's shards of the trained weights and of the
optimizer's state, which torch's distributed checkpoint reads for any number of ranks, and `state.json` with their
checksums. It is written as `step-00000040.tmp` and renamed when every rank is done.
"""

import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hps import dist
from hps.io import files


@contextmanager
def held(c: Any, ranks: dist.Ranks, *, what: str, caches: Sequence[str] = ()) -> Iterator[None]:
    """Hold the folder --out, or the file --output, of a script (`what`) with options `c` against other runs. Its folder
    is made now and not after hours of work, and cleared of what killed runs left half-written; all ranks must see it,
    and the folders that the options `caches` name, on one disk. Collective."""
    option = "out" if hasattr(c, "out") else "output"
    path = Path(getattr(c, option))
    folder, lock = (path, path / "lock") if option == "out" else (path.parent, Path(f"{path}.lock"))
    holding = nullcontext()
    if ranks.first:
        with files.explain_disk_errors(folder, f"choose another --{option}"):
            folder.mkdir(parents=True, exist_ok=True)
        holding = files.lock(lock, what=what, advice=f"wait until it ends, or choose another --{option}")
    with holding:
        if ranks.first:
            written = [path.name, f"{path.name}.manifest.json"] if option == "output" else []
            files.remove_stale_temporaries(folder, *written)
        if ranks.world_size > 1:
            from hps import hosts

            hosts.check(c, {option: folder} | {cache: Path(getattr(c, cache)) for cache in caches}, ranks)
        yield


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of those that a gradient reaches, in a fixed order; of a sharded model the shards.

    After a pass without gradient FSDP leaves the root group (embeddings, norm, head) gathered, and the model then names
    the gathered copies: an optimizer made of them would train nothing, and a checkpoint fill nothing, without a word.
    """
    sharded = isinstance(model, FSDPModule)
    if sharded:
        model.reshard()
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not sharded or all(isinstance(p, DTensor) for p in found.values())
    return found


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained weights and Adam's moments under flat names; moments that do not exist yet are zeros."""
    state: dict[str, Tensor] = {}
    for name, p in trained(model).items():
        moments = optimizer.state[p]
        if not moments:
            moments.update(step=torch.zeros((), device=p.device))
            moments.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state[f"model.{name}"] = p.data
        state |= {f"optimizer.{name}.{key}": moment for key, moment in moments.items()}
    return state


def save(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], *, ranks: dist.Ranks
) -> None:
    """Write the checkpoint of `state["step"]` finished steps into `folder`, then remove older ones. Collective.

    Raises:
        ValueError: the disk is full or read-only; the checkpoint before is whole.
    """
    final = folder / f"step-{state['step']:08d}"
    partial = final.with_suffix(".tmp")
    from hps import sharding

    with files.explain_disk_errors(final, "the checkpoint before is whole, and the same command goes on from it"):
        if ranks.first:
            for left in folder.glob("step-*.tmp"):  # of runs that were killed while they wrote
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        dist.barrier()
        sums = sharding.write(partial, _state(model, optimizer), ranks=ranks)
        if ranks.first:
            files.write_record(partial / "state.json", state | {"files": sums})
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            files.sync(folder)
            for old in folder.glob("step-????????"):
                if old != final:
                    shutil.rmtree(old)
        dist.barrier()


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    complete = [p for p in folder.glob("step-????????") if (p / "state.json").exists()]
    return max(complete, default=None)


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, ranks: dist.Ranks) -> dict[str, Any]:
    """Restore weights and optimizer in place, saved on any number of ranks; returns `state.json`. Collective.

    Raises:
        ValueError: a file is not what was saved, or the weights are another model's.
    """
    advice = "restore it, or delete this checkpoint to go on from the start"
    about = files.read_record(path / "state.json", advice, files=dict, step=int)
    sums = sorted(about.pop("files").items())
    for i in range(0, len(sums), ranks.world_size):  # each rank one, and then a sign of life
        mine = dict(sums[i : i + ranks.world_size][ranks.rank : ranks.rank + 1])
        if why := next(filter(None, dist.gather(files.first_corrupt_file(path, mine), ranks)), ""):
            raise ValueError(f"{path}: {why}; {advice}")
    state = _state(model, optimizer)  # the tensors themselves: loading fills them in place
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(state, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=not ranks.sharded)
        except (Exception, dcp.CheckpointException) as e:  # the second is to Python none of the first
            if dist.rank_is_lost(e):  # then nothing is wrong with the checkpoint
                raise RuntimeError(str(e)) from e
            raise ValueError(f"{path}: cannot be loaded ({e}); {advice}") from e
    return about
