"""Peak of a rank's own memory while a run loads, checks its model, steps, writes its checkpoint and exports; sampled.

    python benchmarks/host_memory.py                                  135 million random weights, on 4 ranks
    python benchmarks/host_memory.py --size 1b --ways lora            1.1 billion

Each way is train.py on gloo ranks of this machine. What is counted is anonymous memory (RssAnon): pages of the model's
files, which ranks of a machine share, and which the system may drop, are not in it. Imports are taken off. On GPUs the
columns load, checkpoint and export are the host's; check, step and held (between two steps) are the GPU's.
"""

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

from hps import config, limits, sharding
from hps.lab import world


@dataclass
class Options:
    size: str = "135m"  # of the random model: 135m (SmolLM2's) or 1b
    stored: str = "bf16"  # dtype of its files, fp32 or bf16
    dtype: str = "fp32"  # compute dtype, fp32 or bf16
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


def make(folder: Path, size: str, stored: str) -> None:
    """A world's data and tokenizer, and a random model of that size in its place."""
    from transformers import LlamaConfig, LlamaForCausalLM

    world.write(folder, seed=0, domain="safe", train=1, valid=1, test=1, demonstrations=8)
    torch.set_default_dtype(torch.bfloat16 if stored == "bf16" else torch.float32)
    lm = LlamaForCausalLM(LlamaConfig(**SIZES[size], tie_word_embeddings=True))
    for left in (folder / "model").glob("*.safetensors"):
        left.unlink()
    lm.save_pretrained(folder / "model")


def watched(options: dict[str, Any], start_only: bool) -> dict[str, float]:
    """Peaks of one rank's anonymous memory by phase, MiB, and what it holds between steps."""
    import train

    now, peaks, done = ["load"], dict.fromkeys(PHASES, 0.0), threading.Event()

    def sample() -> None:
        while not done.is_set():
            phase = now[0]
            peaks[phase] = max(peaks[phase], harness.memory("RssAnon"))
            time.sleep(SECONDS_BETWEEN_SAMPLES)

    def during(module: Any, name: str, phase: str) -> None:
        real = getattr(module, name)

        def wrapped(*args: Any, **more: Any) -> Any:
            before, now[0] = now[0], phase
            try:
                return real(*args, **more)
            finally:
                now[0] = before

        setattr(module, name, wrapped)

    def lr_at(*args: Any) -> float:
        now[0] = "step"
        held.append(harness.memory("RssAnon"))
        if start_only:
            raise EndOfStart
        return learning_rate(*args)

    learning_rate, train.lr_at = train.lr_at, lr_at
    during(limits, "check", "check")
    during(train.checkpoint, "save", "checkpoint")
    during(sharding, "export", "export")
    import peft  # noqa: F401  before the line that is drawn here
    import transformers.models.llama.modeling_llama  # noqa: F401

    held: list[float] = []
    before = harness.memory("RssAnon")
    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        harness.train(**options)
    except EndOfStart:
        pass
    finally:
        done.set()
        sampler.join()
    found = {phase: peak - before for phase, peak in peaks.items() if peak}
    return found | {"held": held[-1] - before}


class EndOfStart(Exception):
    """The first step would begin."""


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/host_memory.py", description=str(__doc__).split("\n")[0])
    ways = c.ways.split(",")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**17)  # what is freed goes back at once, and what is left is in use
    config.check_choices(c, size=SIZES, stored=["fp32", "bf16"], dtype=["fp32", "bf16"])
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        harness.alone(make, folder / "world", c.size, c.stored)
        shared = dict(model=folder / "world" / "model", data=folder / "world" / "sft.jsonl", loss="sft", epochs=1)
        shared |= dict(save_minutes=0, save_every=1, prompts_per_step=4, tokens_per_micro_batch=128, dtype=c.dtype)
        shared |= dict(token_cache=folder / "tokens")
        for way in ways:
            options = shared | WAYS[way] | {"out": folder / way}
            of_ranks = harness.on_ranks(c.ranks, watched, options, c.start_only)
            found[way] = {key: max(one[key] for one in of_ranks) for key in of_ranks[0]}
            tqdm.write(f"{way}: {found[way]}", file=sys.stderr)
    columns = list(found[ways[0]])
    table = [[way, *(of[key] for key in columns)] for way, of in found.items()]
    title = f"{c.size} in {c.stored} files, computed in {c.dtype}, {c.ranks} ranks: peak MiB of a rank's own memory"
    harness.print_table(["", *columns], table, title)
    harness.finish(found)


if __name__ == "__main__":
    config.run_main(main)
