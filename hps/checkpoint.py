"""Checkpoints that appear whole or not at all, resume exactly, and hold no pickle; export to Hugging Face format.

A checkpoint is a folder `step-00000040`: safetensors shards (one a rank, written by torch's distributed
checkpoint, so another number of ranks can read them) with the trained weights and the optimizer's state, and
`state.json` with their checksums. It is written as `step-00000040.tmp` and renamed when every rank is done.
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
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{option} {path}: folder {folder} cannot be made: {error.strerror}") from error
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
            moments.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state[f"model.{name}"] = p.data
        for key in ("step", "exp_avg", "exp_avg_sq"):
            state[f"optimizer.{name}.{key}"] = moments[key]
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
    with files.explain_disk_errors(final, "the checkpoint before is whole, and the same command goes on from it"):
        if ranks.first:
            for left in folder.glob("step-*.tmp"):  # of runs that were killed while they wrote
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        dist.barrier()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            try:
                dcp.save(_state(model, optimizer), storage_writer=writer, no_dist=not ranks.sharded)
            except dcp.CheckpointException as error:  # which to Python is no Exception
                raise RuntimeError(str(error)) from error
        dist.barrier()
        # Every rank reads back its share: the files may be too large for one.
        shares = sorted(partial.iterdir())[ranks.rank :: ranks.world_size]
        for path in shares:
            files.sync(path)
        sums = dist.gather({path.name: files.sha256(path) for path in shares}, ranks)
        if ranks.first:
            of_all = {name: sum for part in sums for name, sum in part.items()}
            files.write_record(partial / "state.json", state | {"files": of_all})
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
    sums = about.pop("files")
    if why := files.first_corrupt_file(
        path, {name: sums[name] for name in sorted(sums)[ranks.rank :: ranks.world_size]}
    ):
        raise ValueError(f"{path}: {why}; {advice}")
    dist.barrier()
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


def export(lm: nn.Module, tokenizer: Any, out: Path, *, ranks: dist.Ranks, card: str) -> None:
    """Write a model as a Hugging Face folder: its PEFT adapter, or whole safetensors weights. Collective.

    Either loads with plain `peft` / `transformers`; nothing of this repository is needed. card: its README.md.
    """
    adapter = hasattr(lm, "peft_config")
    state = {}
    for name, p in lm.named_parameters():  # tied weights appear once
        if p.requires_grad or not adapter:
            whole = dist.full(p.detach()).cpu()
            if ranks.first:
                state[name] = whole.clone()
    if ranks.first:
        with files.replacing(out) as partial:
            if adapter:
                from hps import adapters

                partial.mkdir()
                adapters.name_base(lm, partial)
            lm.save_pretrained(partial, state_dict=state)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")  # peft has written one that says nothing
    dist.barrier()
