"""Peak memory of a step of train.py on a CPU beside the estimate of hps.lab.estimate.

    python benchmarks/memory.py                                    SmolLM2-135M, six ways
    python benchmarks/memory.py --model world --ways lora,full     a new world's model

What is measured: the high-water mark of a process over two steps, above what it held before it loaded the model (its
libraries, the tokenizer and the data), without pages of libraries that were read since then (Linux). glibc keeps freed
memory for later: here, unless --keep_freed is given, it hands every tensor of 64 KiB or more back, so that the mark is
what was in use.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import scale

from hps import config
from hps.data import tokens
from hps.lab import estimate, world


@dataclass
class Options:
    model: str = "runs/models/smollm2-135m-instruct"  # model folder (make model), or world: a new world's
    ways: str = "lora,lora-checkpointed,full,lora-2,lora-sharded-2,full-2"  # comma-separated
    length: int = 256  # tokens of prompt and response together, half of them the prompt's
    blocks: int = 1  # prompts with two responses each of a micro-batch
    keep_freed: bool = False  # leave malloc as it is
    rank_of: str = ""  # used between this script's own processes


WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> ranks, options of train.py
    "lora": (1, {}),
    "lora-checkpointed": (1, dict(gradient_checkpointing=True)),
    "full": (1, dict(lora_rank=0)),
    "lora-2": (2, dict(shard_frozen="false")),
    "lora-sharded-2": (2, dict(shard_frozen="true")),
    "full-2": (2, dict(lora_rank=0)),
}


def mapped() -> float:
    """MiB of weights that are pages of a file."""
    parts = Path("/proc/self/smaps").read_text().split(".safetensors\n")[1:]
    held = [[int(part.split(f"{key}:")[1].split()[0]) for key in ("Rss", "Anonymous")] for part in parts]
    return sum(rss - anonymous for rss, anonymous in held) / 1024


def watched(options: dict[str, Any]) -> None:
    """One rank of a run; rank 0 writes its MiB into the folder of the run."""
    import train

    load, before, peaks = train.load_policy, {}, [0.0]

    def load_policy(*args: Any, **more: Any) -> Any:
        before.update({key: harness.memory(key) for key in ("VmRSS", "RssFile")})
        return load(*args, **more)

    def lr_at(c: Any, step: int, steps: int) -> float:
        if step == 0:
            harness.reset_peak()
        return c.lr

    def peak_gib(_device: Any) -> float:  # the end of a step
        libraries = harness.memory("RssFile") - before["RssFile"] - mapped()
        peaks.append(harness.memory("VmHWM") - before["VmRSS"] - libraries)
        return peaks[-1] / 1024

    train.load_policy, train.lr_at, train.peak_gib = load_policy, lr_at, peak_gib
    harness.train(**options)
    if os.environ.get("RANK", "0") == "0":
        (Path(options["out"]) / "peak.json").write_text(json.dumps(max(peaks)))


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/memory.py", description=str(__doc__).split("\n")[0])
    if c.rank_of:
        sys.path.insert(0, str(harness.ROOT))  # train.py is a script, no package
        return watched(json.loads(c.rank_of))
    rows, found = [], {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT)}
    if not c.keep_freed:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}
    with tempfile.TemporaryDirectory() as temporary:
        folder, model = Path(temporary), c.model
        if model == "world":
            world.write(folder / "world", seed=0, domain="safe", train=1, valid=1, test=1, demonstrations=2)
            model = str(folder / "world" / "model")
        prompt = c.length // 2
        sizes = dict(prompt_tokens=prompt, response_tokens=c.length - prompt, responses=2, method="dpo-bt")
        for way in c.ways.split(","):
            ranks, more = WAYS[way]
            shared: dict[str, Any] = dict(
                prompts_per_step=2 * c.blocks * ranks, tokens_per_micro_batch=c.blocks * (2 * c.length - prompt)
            )
            shared |= more
            data, out = folder / f"{ranks}.jsonl", folder / way
            tokenizer = tokens.load_tokenizer(model)
            scale.write_texts(data, tokenizer, rows=2 * shared["prompts_per_step"], responses=2, length=c.length)
            options = dict(model=model, data=str(data), out=str(out), method="dpo-bt", epochs=1, save_minutes=0)
            options |= dict(token_cache=str(folder / "tokens"), reference_cache=str(folder / "cache")) | shared
            options = {key: str(value).lower() if isinstance(value, bool) else value for key, value in options.items()}
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
            command = [sys.executable, *launch, __file__, f"--rank_of={json.dumps(options)}"]
            subprocess.run(command, env=environment, check=True)
            measured = json.loads((out / "peak.json").read_text())
            shape = estimate.Options(shape=model, world_size=ranks, device="cpu", **sizes, **shared)
            estimated = estimate.step(shape)["bytes_per_rank"]["total"] / 2**20
            found[way] = {"measured": measured, "estimated": estimated}
            rows.append([way, ranks, measured, estimated, estimated / measured])
    title = f"{c.model}: MiB of rank 0, {c.blocks} x {2 * c.length - prompt} tokens a micro-batch"
    harness.print_table(["", "ranks", "measured", "estimated", "ratio"], rows, title)
    harness.finish(found)


if __name__ == "__main__":
    config.run_main(main)
