"""Bytes that a rank receives in a training step, by the way in which the weights are sharded; counted, not timed.

    python benchmarks/traffic.py            the world's model, on 4 ranks

Each way is train.py on gloo ranks of this machine, one step of which is looked at. What is counted is what torch's
collectives are asked for: of an all-gather and a reduce-scatter all but the own part, of an all-reduce twice that.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
import torch.distributed

from hps import config
from hps.lab import world


@dataclass
class Options:
    ranks: int = 4  # processes, an even number


PROMPTS = 16  # of a step
# name -> options of train.py; "group" stands for half of the ranks
WAYS: dict[str, dict[str, Any]] = {
    "LoRA, base sharded": dict(lora_rank=8, shard_frozen="true"),
    "LoRA, base whole": dict(lora_rank=8, shard_frozen="false"),
    "full": dict(lora_rank=0),
    "full, kept until the backward": dict(lora_rank=0, reshard_after_forward="false"),
    "full, HSDP": dict(lora_rank=0, shard_ranks="group"),
}
RECEIVED: dict[str, Callable[..., float]] = {  # torch's name -> bytes, of its arguments
    "all_gather_single": lambda out, own, *_: out.nbytes - own.nbytes,
    "reduce_scatter_single": lambda out, own, *_: own.nbytes - out.nbytes,
    "all_gather": lambda out, own, *_: sum(t.nbytes for t in out) - own.nbytes,
    "all_reduce": lambda t, *_: 2 * t.nbytes,  # times what a group of W leaves: (W - 1) / W
}


def counted(options: dict[str, Any]) -> dict[str, float]:
    """Collectives and bytes of the second step of train.py on one rank; the first one also sets things up."""
    total, at_steps = {"collectives": 0, "bytes": 0.0}, []

    def counting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            tensors = [more.get(key) for key in ("output_tensor", "input_tensor", "output", "input", "tensor")]
            given = [*args, *(t for t in tensors if t is not None)]
            size = torch.distributed.get_world_size(more.get("group"))
            share = (size - 1) / size if name == "all_reduce" else 1
            total["collectives"] += 1
            total["bytes"] += RECEIVED[name](*given) * share
            return real(*args, **more)

        return wrapped

    for name in RECEIVED:
        setattr(torch.distributed, name, counting(name, getattr(torch.distributed, name)))
    import train

    learning_rate = train.lr_at
    train.lr_at = lambda *args: (at_steps.append(dict(total)), learning_rate(*args))[1]
    harness.train(**options)
    first, second = at_steps[1:3]
    return {key: second[key] - first[key] for key in total}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/traffic.py", description=str(__doc__).split("\n")[0])
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        world.write(folder / "world", seed=0, domain="safe", train=1, valid=1, test=1, demonstrations=3 * PROMPTS)
        shared = dict(model=folder / "world" / "model", data=folder / "world" / "sft.jsonl", loss="sft", epochs=1)
        shared |= dict(prompts_per_step=PROMPTS, tokens_per_micro_batch=512, save_minutes=0)
        for i, (name, options) in enumerate(WAYS.items()):
            own = {key: c.ranks // 2 if value == "group" else value for key, value in options.items()}
            own |= dict(out=folder / str(i), token_cache=folder / "tokens")
            found[name] = max(harness.on_ranks(c.ranks, counted, shared | own), key=lambda of_rank: of_rank["bytes"])
    table = [[name, of["collectives"], of["bytes"] / 2**20] for name, of in found.items()]
    harness.print_table(["", "collectives", "MiB"], table, f"world, {c.ranks} ranks: a rank and step")
    harness.finish(found)


if __name__ == "__main__":
    config.run_main(main)
