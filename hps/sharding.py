"""How a model lies on the ranks, applied from outside: moved to their devices, sharded over them, and from there to the
disk, as shards or whole. Imported where one is placed or written."""

import hashlib
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save as as_bytes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hps import dist, limits
from hps.io import files
from hps.model import DTYPES, layers_of

PART_BYTES = 2**28  # of a rank's share of a checkpoint: one file, and what a save takes of the host's memory


def place(model: Any, c: Any, ranks: dist.Ranks, *, cast: torch.dtype | None, longest: int) -> None:
    """Put a policy or reward model on the device, sharded under torchrun, as the options `c` of train.py say; then see
    whether packed rows serve it. Collective.

    Args:
        cast: dtype that all weights get; None keeps theirs. longest: as in limits.check.
    """
    if ranks.sharded:
        shard(model, layers_of(model.lm), c, ranks=ranks, dtype=DTYPES[c.dtype], cast=cast)
    else:
        model.to(device=ranks.device, dtype=cast)
    limits.check(model, longest=longest, share_prompt=c.share_prompt, ranks=ranks)


def shard(
    model: nn.Module,
    layers: list[nn.Module],
    c: Any,
    *,
    ranks: dist.Ranks,
    dtype: torch.dtype,
    cast: torch.dtype | None = None,
) -> None:
    """Apply FSDP2 in place, as the options `c` of train.py say: one group per decoder layer, the rest (embeddings,
    head, norm) in the root group; where frozen weights stay whole, the little that is trained beside them is one group.

    Layers go to the device one by one, and of each a rank keeps its share: weights that are pages of their files, as
    loading leaves them, are never whole in its own memory. Compute runs in `dtype`; gradients are reduced in fp32.
    cast: dtype that all weights get; None keeps theirs.

    Raises:
        ValueError: the number of ranks is no multiple of shard_ranks.
    """
    over = c.shard_ranks or ranks.world_size
    if ranks.world_size % over:
        raise ValueError(f"shard_ranks = {over} must divide the number of ranks, {ranks.world_size}")
    if over == ranks.world_size:
        mesh = init_device_mesh(ranks.device.type, (over,))
    else:  # by hand, since the groups that a mesh makes have a timeout of their own
        table, wait = torch.arange(ranks.world_size).view(-1, over), timedelta(minutes=c.timeout)
        groups = [torch.distributed.new_subgroups_by_enumeration(t.tolist(), wait)[0] for t in (table.T, table)]
        mesh = DeviceMesh.from_group(groups, ranks.device.type, table, mesh_dim_names=("replicate", "shard"))
    whole = {p for p in model.parameters() if not p.requires_grad}
    bytes_whole = sum(p.numel() * (cast or p.dtype).itemsize for p in whole)
    fits = bytes_whole <= memory(ranks.device) // 2  # the other half is for activations
    if c.shard_frozen == "true" or (c.shard_frozen == "auto" and not all(dist.gather(fits, ranks))):
        whole = set()
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    outer = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for layer in layers if not whole else ():
        move(layer, ranks.device, cast)
        fully_shard(layer, mesh=mesh, mp_policy=inner, reshard_after_forward=c.reshard_after_forward)
    move(model, ranks.device, cast)
    fully_shard(model, mesh=mesh, mp_policy=outer, ignored_params=whole)


def move(module: nn.Module, device: torch.device, cast: torch.dtype | None) -> None:
    """Put what is not sharded yet on a device, in place; only then cast it, in the device's memory."""
    for t in (*module.parameters(), *module.buffers()):
        if not (isinstance(t, DTensor) or t.is_meta):
            t.data = t.data.to(device).to(dtype=cast if t.is_floating_point() else None)


def memory(device: torch.device) -> int:
    """Bytes of memory that a rank may call its own: its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def write(folder: Path, state: dict[str, Tensor], *, ranks: dist.Ranks) -> dict[str, str]:
    """Write the shards of tensors into a folder, as torch's distributed checkpoint reads them; name of each file of all
    ranks -> sha256. Collective."""
    sums: dict[str, str] = {}
    part: dict[str, Tensor] = {}
    size, last = 0, len(state) - 1
    for i, (name, tensor) in enumerate(state.items()):
        part[name] = tensor
        size += tensor.numel() * tensor.itemsize  # of all ranks together
        if size >= PART_BYTES * ranks.world_size or i == last:
            written = _write(folder / f"rank-{ranks.rank:05d}-{i:05d}.safetensors", part, ranks=ranks)
            for of_rank in dist.gather(written, ranks):  # a sign of life with each: a slow disk is no lost rank
                sums |= of_rank
            part, size = {}, 0
    return sums


def _write(path: Path, part: dict[str, Tensor], *, ranks: dist.Ranks) -> dict[str, str]:
    """Write this rank's shards of a part, if there are any; the file's name -> sha256."""
    mine: dict[str, Tensor] = {}
    places: dict[str, Any] = {}  # where in its tensor a shard begins
    for name, tensor in part.items():
        offsets, first = [0] * tensor.dim(), ranks.first
        if isinstance(tensor, DTensor):
            at = zip(tensor.device_mesh.get_coordinate() or (), tensor.placements, strict=True)
            first = not any(place for place, how in at if how.is_replicate())  # of those that hold the same
            offsets, tensor = list(tensor.__create_chunk_list__()[0].offsets), tensor.to_local()
        if first and tensor.numel():
            mine[name], places[name] = tensor.cpu(), {"saved_offsets": offsets}
    if not mine:
        return {}
    content = as_bytes(mine, metadata={"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)})
    path.write_bytes(content)
    files.sync(path)
    return {path.name: hashlib.sha256(content).hexdigest()}


def export(
    lm: Any, tokenizer: Any, out: Path, *, ranks: dist.Ranks, card: str, dtype: torch.dtype | None = None
) -> None:
    """Write a model as a Hugging Face folder: its PEFT adapter, or whole safetensors weights. Collective.

    Either loads with plain `peft` / `transformers`; nothing of this repository is needed. On the first rank alone it
    takes memory of the host, that of one copy.

    Args:
        card: its README.md. dtype: of whole weights; None keeps that of each, as an adapter does in any case.
    """
    adapter = hasattr(lm, "peft_config")
    state = {}
    for name, p in lm.named_parameters():  # tied weights appear once
        if p.requires_grad or not adapter:
            whole = dist.full(p.detach().to(None if adapter else dtype))
            if ranks.first:
                state[name] = whole.cpu()
            del whole  # before the next one is gathered
    if ranks.first:
        with files.replacing(out) as partial:
            if adapter:
                from hps import adapters

                partial.mkdir()
                adapters.name_base(lm, partial)
            lm.save_pretrained(partial, state_dict=state)
            if dtype is not None and not adapter:
                lm.config.dtype = dtype
                lm.config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / "README.md").write_text(card, encoding="utf-8")  # peft has written one that says nothing
    dist.gather("written", ranks, days=True)
