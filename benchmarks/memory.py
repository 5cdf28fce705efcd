"""Peak memory of a step of train.py on a CPU beside the estimate of hps.lab.estimate.

    python benchmarks/memory.py                                    SmolLM2-135M, six ways
    python benchmarks/memory.py --model world --ways lora,full     a new world's model

What is measured: a process's own memory over two steps, sampled as by host_memory.py, above what it held before it
loaded the model (its libraries, the tokenizer and the data), and the weights that are pages of the model's files.
"""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import host_memory
import scale

from hps import config
from hps.data import tokenizers
from hps.lab import estimate, world


@dataclass
class Options:
    model: str = "runs/models/smollm2-135m-instruct"  # model folder (make model), or world: a new world's
    ways: str = "lora,lora-checkpointed,full,lora-2,lora-sharded-2,full-2"  # comma-separated


TOKENS = 128  # of a prompt, and of each of its two responses: a micro-batch of its own
WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> ranks, options of train.py
    "lora": (1, {}),
    "lora-checkpointed": (1, dict(gradient_checkpointing=True)),
    "full": (1, dict(lora_rank=0)),
    "lora-2": (2, dict(shard_frozen="false")),
    "lora-sharded-2": (2, dict(shard_frozen="true")),
    "full-2": (2, dict(lora_rank=0)),
}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/memory.py", description=str(__doc__).split("\n")[0])
    os.environ |= host_memory.HAND_BACK
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary), c.model
        if model == "world":
            world.write(folder / "world", seed=0, domain="safe", train=1, valid=1, test=1, demonstrations=2)
            model = str(folder / "world" / "model")
        for way in c.ways.split(","):
            ranks, more = WAYS[way]
            shared: dict[str, Any] = dict(prompts_per_step=2 * ranks, tokens_per_micro_batch=3 * TOKENS) | more
            data, tokenizer = folder / f"{ranks}.jsonl", tokenizers.load_tokenizer(model)
            scale.write_texts(data, tokenizer, rows=4 * ranks, responses=2, length=2 * TOKENS)
            options = dict(model=model, data=data, out=folder / way, method="dpo-bt", epochs=1, save_minutes=0)
            options |= dict(token_cache=folder / "tokens", reference_cache=folder / "cache") | shared
            first = harness.on_ranks(ranks, host_memory.watched, options)[0]
            sizes = dict(world_size=ranks, prompt_tokens=TOKENS, response_tokens=TOKENS) | shared
            shape = estimate.Options(shape=model, device="cpu", method="dpo-bt", **sizes)
            estimated = estimate.step(shape)["bytes_per_rank"]["total"] / 2**20
            found[way] = {"measured": first["step"] + first["mapped"], "estimated": estimated}
    rows = [[way, WAYS[way][0], *of.values(), of["estimated"] / of["measured"]] for way, of in found.items()]
    title = f"{c.model}: MiB of rank 0, {3 * TOKENS} tokens a micro-batch"
    harness.print_table(["", "ranks", "measured", "estimated", "ratio"], rows, title)
    harness.finish(found)


if __name__ == "__main__":
    config.run_main(main)
