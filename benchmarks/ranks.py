"""What a rank of train.py takes: its own memory by phase, beside the estimate, and bytes from the other ranks.

    python benchmarks/ranks.py                                            a new world's model, on 4 ranks
    python benchmarks/ranks.py --model FOLDER --ranks 1 --ways lora full  any model

Each way is train.py on gloo ranks of this machine, three steps of two micro-batches. Memory is sampled and anonymous
(RssAnon), above what there was before the model was loaded: pages of its files, which ranks of a machine share, and
which the system may drop, are `mapped` instead. `measured` is step and mapped together, of the first rank, `estimated`
is hps.lab.estimate's; the other columns are of the rank that takes most. On GPUs load, checkpoint and export are the
host's; check, step and held (between two steps) are the GPU's. Of the second step it is counted what torch's
collectives are asked for: of an all-gather and a reduce-scatter all but the own part, of an all-reduce twice that.
"""

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

from hps import config, limits, sharding, start
from hps.lab import estimate, world

TOKENS, STEPS = 128, 3  # of a prompt, and of each of its two responses: a micro-batch of its own
WAYS: dict[str, dict[str, Any]] = {  # name -> options of train.py
    "lora": dict(shard_frozen="false"),
    "lora-sharded": dict(shard_frozen="true"),
    "lora-checkpointed": dict(shard_frozen="false", gradient_checkpointing=True),
    "full": dict(lora_rank=0),
    "full-kept": dict(lora_rank=0, reshard_after_forward=False),  # until the backward
    "full-hsdp": dict(lora_rank=0, shard_ranks=2),
}


@dataclass
class Options:
    model: str = "world"  # model folder, or world: a new world's
    ranks: int = 4  # processes, one of them or an even number
    ways: tuple[str, ...] = tuple(WAYS)  # which of these


SECONDS_BETWEEN_SAMPLES = 0.001
# What is freed goes back at once, and what is left is in use: glibc would keep it for later.
HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
RECEIVED: dict[str, Callable[..., float]] = {  # torch's name -> bytes, of its arguments
    "all_gather_single": lambda out, own, *_: out.nbytes - own.nbytes,
    "reduce_scatter_single": lambda out, own, *_: own.nbytes - out.nbytes,
    "all_gather": lambda out, own, *_: sum(t.nbytes for t in out) - own.nbytes,
    "all_reduce": lambda t, *_: 2 * t.nbytes,  # times what a group of W leaves: (W - 1) / W
}


def mapped() -> float:
    """MiB of weights that are pages of a file."""
    parts = Path("/proc/self/smaps").read_text().split(".safetensors\n")[1:]
    held = [[int(part.split(f"{key}:")[1].split()[0]) for key in ("Rss", "Anonymous")] for part in parts]
    return sum(rss - anonymous for rss, anonymous in held) / 1024


def watched(options: dict[str, Any]) -> dict[str, float]:
    """MiB of one rank by phase, at their highest, between steps and mapped; what it received in the second step."""
    # Imported for what importing takes, which stays on this side of the line that is drawn.
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import train

    phase, done, steps = ["start"], threading.Event(), []
    peaks = dict.fromkeys(("start", "load", "check", "step", "checkpoint", "export"), 0.0)
    total = {"collectives": 0, "received MiB": 0.0}

    def sample() -> None:
        while not done.is_set():
            now = phase[0]
            peaks[now] = max(peaks[now], harness.memory("RssAnon"))
            time.sleep(SECONDS_BETWEEN_SAMPLES)

    def during(module: Any, name: str, called: str) -> None:
        real = getattr(module, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            before, phase[0] = phase[0], called
            peaks.setdefault("before", harness.memory("RssAnon"))  # the first to be called loads
            try:
                return real(*args, **more)
            finally:
                phase[0] = before

        setattr(module, name, wrapped)

    def counting(name: str) -> None:
        real = getattr(torch.distributed, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            tensors = [more.get(key) for key in ("output_tensor", "input_tensor", "output", "input", "tensor")]
            given = [*args, *(t for t in tensors if t is not None)]
            size = torch.distributed.get_world_size(more.get("group"))
            share = (size - 1) / size if name == "all_reduce" else 1
            total["collectives"] += 1
            total["received MiB"] += RECEIVED[name](*given) * share / 2**20
            return real(*args, **more)

        setattr(torch.distributed, name, wrapped)

    def step_begins(*args: Any) -> float:
        phase[0] = "step"
        steps.append({"held": harness.memory("RssAnon"), "mapped": mapped()} | total)
        return learning_rate(*args)

    learning_rate, train.lr_at = train.lr_at, step_begins
    during(start, "load_policy", "load")
    during(limits, "check", "check")
    during(train.checkpoint, "save", "checkpoint")
    during(sharding, "export", "export")
    for name in RECEIVED:
        counting(name)
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        harness.train(**options)
    finally:
        done.set()
        sampler.join()
    before, second, third = peaks.pop("before"), *steps[-2:]
    del peaks["start"]  # up to the load
    found = {key: value - before for key, value in (peaks | {"held": third["held"]}).items()}
    return found | {"mapped": third["mapped"]} | {key: third[key] - second[key] for key in total}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/ranks.py", description=str(__doc__).split("\n")[0])
    if unknown := {*c.ways} - WAYS.keys():
        raise ValueError(f"--ways {' '.join(unknown)}: the ways are {' '.join(WAYS)}")
    os.environ |= HAND_BACK
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary), c.model
        if model == "world":
            world.write(folder / "world", seed=0, domain="safe", train=1, valid=1, test=1, demonstrations=2)
            model = str(folder / "world" / "model")
        prompts = 2 * c.ranks  # of a step
        lengths = dict(prompt=TOKENS, response=TOKENS)
        harness.write_texts(folder / "data.jsonl", model, rows=STEPS * prompts, responses=2, **lengths)
        for way in c.ways:
            how: dict[str, Any] = dict(method="dpo-bt", epochs=1, prompts_per_step=prompts)
            how |= dict(tokens_per_micro_batch=3 * TOKENS) | WAYS[way]
            paths = dict(model=model, data=folder / "data.jsonl", out=folder / way, token_cache=folder / "tokens")
            paths |= dict(reference_cache=folder / "cache")
            ranks = harness.on_ranks(c.ranks, watched, how | paths | dict(save_minutes=0))
            found[way] = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            shape = estimate.Options(shape=model, device="cpu", world_size=c.ranks, prompt_tokens=TOKENS,
                                     response_tokens=TOKENS, **how)  # fmt: skip
            found[way]["measured"] = ranks[0]["step"] + ranks[0]["mapped"]
            found[way]["estimated"] = estimate.step(shape)["bytes_per_rank"]["total"] / 2**20
            print(f"{way}: {found[way]}", file=sys.stderr)
    rows = [[way, *of.values()] for way, of in found.items()]
    title = f"{c.model}, {c.ranks} ranks, {3 * TOKENS} tokens per micro-batch, two per step: MiB of a rank"
    harness.print_table(["", *found[way]], rows, title)
    harness.finish(found)


if __name__ == "__main__":
    config.run_main(main)
