"""Ranks and what they tell each other. Rank variables are read here alone, and where a mistake is told."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. `sharded` is True under torchrun, whatever the number of processes; `patient` is then
    the group of all ranks that waits for days."""

    rank: int
    world_size: int
    device: torch.device
    sharded: bool
    patient: dist.ProcessGroup | None = None

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
        # Told its device, NCCL connects here, and a barrier needs no guess of which GPU is this rank's.
        backend, of_device = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timeout, device_id=of_device)
        dist.barrier()  # NCCL asks no sooner whether all have come; the next group would wait for days
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return Ranks(dist.get_rank(), dist.get_world_size(), device, sharded=True, patient=patient)


def rank_is_lost(error: BaseException) -> bool:
    """Whether an error under torchrun says that another rank is gone or silent."""
    return "RANK" in os.environ and bool(re.search(LOST_RANK, str(error), re.IGNORECASE))


@contextmanager
def session(*, timeout: timedelta) -> Iterator[Ranks]:
    """`init` for the length of a block. Where another rank is gone or silent it ends with status 1 and a line on that.

    timeout: how long ranks wait for each other. torchrun ends all of them when one dies, however long it is, and NCCL
    ends a process that waits in vain by itself.
    """
    if timeout <= timedelta(0):
        raise ValueError("timeout must be positive")
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


def gather(value: Any, ranks: Ranks | None, *, days: bool = False) -> list[Any]:
    """What each rank gives (JSON), on all ranks; days: wait for the others that long if need be. Collective."""
    if ranks is None or not dist.is_initialized():
        return [value]
    how = {"group": ranks.patient if days else None}
    text = json.dumps(value).encode()
    size = torch.tensor([len(text)], device="cpu" if days else ranks.device)
    dist.all_reduce(size, dist.ReduceOp.MAX, **how)
    padded = bytearray(text.ljust(int(size)))  # JSON may end in blanks
    mine = torch.frombuffer(padded, dtype=torch.uint8).to(size.device)
    found = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(found, mine, **how)
    return [json.loads(bytes(one.tolist())) for one in found]


def from_first(make: Callable[[], Any], ranks: Ranks | None, *, days: bool = True) -> Any:
    """What `make` gives on the first rank (JSON), on all ranks; `days` as in `gather`. Collective.

    Raises:
        ValueError: that of `make` on the first rank, on all ranks.
    """
    if ranks is None or not dist.is_initialized():
        return make()
    answer = None
    if ranks.first:
        try:
            answer = {"made": make()}
        except ValueError as error:
            answer = {"error": str(error)}
    answer = gather(answer, ranks, days=days)[0]
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["made"]


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
