"""Ways to shard a model over ranks, applied from outside; imported where torchrun has started some."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hps import dist


def shard(model: nn.Module, layers: list[nn.Module], c: Any, *, ranks: dist.Ranks, dtype: torch.dtype) -> None:
    """Apply FSDP2 in place, as the options `c` of train.py say: one group per decoder layer, the rest (embeddings,
    head, norm) in the root group; where frozen weights stay whole, the little that is trained beside them is one group.

    Master weights keep their dtype; compute runs in `dtype`; gradients are reduced in fp32.

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
    fits = sum(p.nbytes for p in whole) <= memory(ranks.device) // 2  # the other half is for activations
    if c.shard_frozen == "true" or (c.shard_frozen == "auto" and not all(dist.gather(fits, ranks))):
        whole = set()
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    outer = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    for layer in layers if not whole else ():
        fully_shard(layer, mesh=mesh, mp_policy=inner, reshard_after_forward=c.reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=outer, ignored_params=whole)


def memory(device: torch.device) -> int:
    """Bytes of memory that a rank may call its own: its GPU's, or its share of the host's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
