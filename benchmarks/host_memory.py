"""Peak of a rank's own memory while a run loads, checks its model, steps, writes its checkpoint and exports; sampled.

    python benchmarks/host_memory.py                                  135 million random weights, on 4 ranks
    python benchmarks/host_memory.py --size 1b --ways lora            1.1 billion

Each way is train.py on gloo ranks of this machine, in fp32, of a model in bf16 files. What is counted is anonymous
memory (RssAnon) above what there was before the model was loaded: pages of its files, which ranks of a machine share,
and which the system may drop, are not in it. On GPUs the columns load, checkpoint and export are the host's; check,
step and held (between two steps) are the GPU's.
"""

import contextlib
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch
from tqdm import tqdm

from hps import config, limits, sharding, start
from hps.lab import world


@dataclass
class Options:
    size: str = "135m"  # of the random model: 135m (SmolLM2's) or 1b
    ranks: int = 4  # processes
    ways: str = "lora,lora-sharded,full"  # comma-separated
    start_only: bool = False  # end before the first step, where the machine has no room for one


SIZES: dict[str, dict[str, int]] = {
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                 num_key_value_heads=3, vocab_size=49152),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=65536),
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {  # name -> options of train.py
    "lora": dict(lora_rank=8, shard_frozen="false"),
    "lora-sharded": dict(lora_rank=8, shard_frozen="true"),
    "full": dict(lora_rank=0),
}
PHASES = ("load", "check", "step", "checkpoint", "export")
SECONDS_BETWEEN_SAMPLES = 0.001
# What is freed goes back at once, and what is left is in use: glibc would keep it for later.
HAND_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}


def make(folder: Path, size: str) -> None:
    """A world's data and tokenizer, and a random model of that size in its place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    world.write(folder, seed=0, domain="safe", train=1, valid=1, test=1, demonstrations=8)
    torch.set_default_dtype(torch.bfloat16)
    lm = LlamaForCausalLM(LlamaConfig(**SIZES[size], tie_word_embeddings=True))
    for left in (folder / "model").glob("*.safetensors"):
        left.unlink()
    lm.save_pretrained(folder / "model")


def mapped() -> float:
    """MiB of weights that are pages of a file."""
    parts = Path("/proc/self/smaps").read_text().split(".safetensors\n")[1:]
    held = [[int(part.split(f"{key}:")[1].split()[0]) for key in ("Rss", "Anonymous")] for part in parts]
    return sum(rss - anonymous for rss, anonymous in held) / 1024


class EndOfStart(Exception):
    """The first step would begin."""


def watched(options: dict[str, Any], start_only: bool = False) -> dict[str, float]:
    """Peaks of one rank's anonymous memory by phase, MiB, what it holds between steps, and of weights in `mapped`."""
    # Imported for what importing takes, which stays on this side of the line that is drawn.
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import train

    now, peaks, held, done = ["start"], {"start": 0.0}, {}, threading.Event()

    def sample() -> None:
        while not done.is_set():
            phase = now[0]
            peaks[phase] = max(peaks.get(phase, 0.0), harness.memory("RssAnon"))
            time.sleep(SECONDS_BETWEEN_SAMPLES)

    def during(module: Any, name: str, phase: str) -> None:
        real = getattr(module, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            before, now[0] = now[0], phase
            held.setdefault("before", harness.memory("RssAnon"))  # the first to be called loads
            try:
                return real(*args, **more)
            finally:
                now[0] = before

        setattr(module, name, wrapped)

    def lr_at(*args: Any) -> float:
        held.update(held=harness.memory("RssAnon"), mapped=mapped())
        if start_only:
            raise EndOfStart
        now[0] = "step"
        return learning_rate(*args)

    learning_rate, train.lr_at = train.lr_at, lr_at
    during(start, "load_policy", "load")
    during(limits, "check", "check")
    during(train.checkpoint, "save", "checkpoint")
    during(sharding, "export", "export")
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        with contextlib.suppress(EndOfStart):
            harness.train(**options)
    finally:
        done.set()
        sampler.join()
    found = {phase: peaks[phase] for phase in PHASES if phase in peaks} | {"held": held["held"]}
    return {key: value - held["before"] for key, value in found.items()} | {"mapped": held["mapped"]}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/host_memory.py", description=str(__doc__).split("\n")[0])
    config.check_choices(c, size=SIZES)
    os.environ |= HAND_BACK
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        harness.alone(make, folder / "world", c.size)
        shared = dict(model=folder / "world" / "model", data=folder / "world" / "sft.jsonl", loss="sft", epochs=1)
        shared |= dict(save_minutes=0, save_every=1, prompts_per_step=4, tokens_per_micro_batch=128)
        shared |= dict(token_cache=folder / "tokens")
        for way in c.ways.split(","):
            of_ranks = harness.on_ranks(c.ranks, watched, shared | WAYS[way] | {"out": folder / way}, c.start_only)
            found[way] = {key: max(one.get(key, 0.0) for one in of_ranks) for key in of_ranks[0] if key != "mapped"}
            tqdm.write(f"{way}: {found[way]}", file=sys.stderr)
    columns = list(found[way])
    table = [[way, *(of[key] for key in columns)] for way, of in found.items()]
    title = f"{c.size} in bf16 files, computed in fp32, {c.ranks} ranks: peak MiB of a rank's own memory"
    harness.print_table(["", *columns], table, title)
    harness.finish(found)


if __name__ == "__main__":
    config.run_main(main)
