"""Ranks, sharding and reductions. The only file that reads rank variables; the model never mentions any of it."""

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. `sharded` is True under torchrun, whatever the number of processes."""

    rank: int
    world_size: int
    device: torch.device
    sharded: bool

    @property
    def first(self) -> bool:
        return self.rank == 0


# How torch and gloo say that a collective has come to nothing, in any case.
LOST_RANK = "timed out|timeout|closed by peer|connection (reset|refused|closed)|broken pipe|no route|unreachable"


def init(*, timeout: timedelta) -> Ranks:
    """Join the process group that torchrun announces (nccl on GPUs, gloo on CPUs), or run alone without one."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(rank=0, world_size=1, device=device, sharded=False)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.type == "cpu" and local_world * torch.get_num_threads() > (os.cpu_count() or 1):
        warnings.warn(
            f"{local_world} processes x {torch.get_num_threads()} threads on {os.cpu_count()} cores run several "
            "times slower than with fewer threads: set OMP_NUM_THREADS",
            stacklevel=2,
        )
    return Ranks(rank=dist.get_rank(), world_size=dist.get_world_size(), device=device, sharded=True)


def rank_is_lost(error: BaseException) -> bool:
    """Whether an error under torchrun says that another rank is gone or silent."""
    return "RANK" in os.environ and bool(re.search(LOST_RANK, str(error), re.IGNORECASE))


@contextmanager
def session(*, timeout: timedelta = timedelta(minutes=10)) -> Iterator[Ranks]:
    """`init` for the length of a block. Where another rank is gone or silent it ends with status 1 and a line on that.

    timeout: how long ranks wait for each other. torchrun ends all of them when one dies, however long it is, and NCCL
    ends a process that waits in vain by itself.
    """
    try:
        yield init(timeout=timeout)
    except RuntimeError as error:
        if not rank_is_lost(error):
            raise
        rank, why = os.environ["RANK"], str(error).splitlines()[0]
        print(
            f"error: rank {rank}: another rank is gone, or has not answered for {timeout} ({why}). Look for its own "
            "message, then start the same command again: it goes on from what is on disk",
            file=sys.stderr,
        )
        raise SystemExit(1) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def from_first(make: Callable[[], Any], ranks: Ranks | None) -> Any:
    """What `make` gives on the first rank (JSON), on all ranks; they wait for it, days if need be. Collective.

    Raises:
        ValueError: that of `make` on the first rank, on all ranks.
    """
    if ranks is None or ranks.world_size == 1:
        return make()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))  # the ranks' own group gives up after minutes
    answer: dict[str, Any] = {}
    if ranks.first:
        try:
            answer = {"made": make()}
        except ValueError as error:
            answer = {"error": str(error)}
    sent = bytearray(json.dumps(answer).encode())
    size = torch.tensor([len(sent)])
    dist.broadcast(size, 0, group=group)
    message = torch.frombuffer(sent, dtype=torch.uint8) if ranks.first else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(message, 0, group=group)
    answer = json.loads(bytes(message.tolist()))
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["made"]


def shard(model: nn.Module, layers: list[nn.Module], *, ranks: Ranks, dtype: torch.dtype) -> None:
    """Apply FSDP2 in place: one group per decoder layer, the rest (embeddings, head, norm) in the root group.

    Master weights keep their dtype; compute runs in `dtype`; gradients are reduced in fp32. Does nothing for a
    process that was not started by torchrun.
    """
    if not ranks.sharded:
        return
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world_size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def reshard(model: nn.Module) -> None:
    """Give the gathered weights of a forward without gradient back. Must follow every such pass before training.

    FSDP keeps the root group (embeddings, norm, head) gathered after a forward: parameters that are taken from the
    model then are gathered copies, and an optimizer made of them would not train the shards, without a word.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def all_sum(values: Tensor) -> Tensor:
    """Sum a tensor over ranks, in place; itself when alone."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Collective: every rank must call it in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most `max_norm`; the norm before, a scalar tensor."""
    return full(torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else float("inf")))
