"""Cost of a training step by preference model: BT, HPS, HPS with 8 draws, PL-5, PL-8.

    make model && python benchmarks/cost.py

The paper's hours are 62.8 (BT) : 64.4 (HPS) : 168.4 (PL). Texts are of equal lengths, so that a step's time tells what
a method does and not which lengths it drew. Each run is train.py in a process of its own; rounds alternate.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

from hps import config


@dataclass
class Options:
    model: str = "runs/models/smollm2-135m-instruct"  # a model folder, the one of `make model`
    threads: int = 2  # OpenMP threads
    prompts: int = 16  # of a run
    rounds: int = 3  # in which all contestants take their turn


LENGTHS = {"prompt": 114, "response": 43}  # tokens: means of HH-RLHF
STEP = 8  # prompts of an optimizer step
# name -> (candidates per prompt, options of train.py)
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "BT": (100, {"method": "dpo-bt"}),
    "HPS": (100, {"method": "dpo-hps"}),
    "HPS, n = 2": (2, {"method": "dpo-hps"}),
    "HPS-8": (100, {"method": "dpo-hps", "hps_samples": 8}),
    "PL-5": (100, {"method": "dpo-pl", "pl_responses": 5}),
    "PL-8": (100, {"method": "dpo-pl", "pl_responses": 8}),
}
RATIOS = {
    "hps_over_bt": ("HPS", "BT"),
    "n100_over_n2": ("HPS", "HPS, n = 2"),
    "pl5_over_bt": ("PL-5", "BT"),
    "pl8_over_bt": ("PL-8", "BT"),
    "hps8_over_bt": ("HPS-8", "BT"),
}


def measure(c: Options, name: str) -> dict[str, float]:
    """Seconds and thousands of packed tokens of an optimizer step."""
    torch.set_num_threads(c.threads)
    n, options = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.jsonl"
        harness.write_texts(data, c.model, rows=c.prompts, responses=n, **LENGTHS)
        paths = {"data": data, "out": f"{folder}/run"}
        paths |= {"token_cache": f"{folder}/tokens", "reference_cache": f"{folder}/cache"}
        found = harness.train(**paths, model=c.model, epochs=1, prompts_per_step=STEP, **options)
    return {"seconds": found["seconds"] / found["steps"], "tokens": found["tokens"] / found["steps"] / 1000}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/cost.py", description=str(__doc__).split("\n")[0])
    found = harness.take_turns(RUNS, c.rounds, lambda name, r: harness.alone(measure, c, name))
    median = harness.medians(found)
    table = [[name, *(x for key in m for x in (m[key], m[key] / median["BT"][key]))] for name, m in median.items()]
    title = f"a step of {STEP} prompts, fp32, {c.threads} threads, medians of {c.rounds} rounds"
    harness.print_table(["", "seconds", "x BT", "k tokens", "x BT"], table, title)
    ratios = {key: round(harness.ratio(found, a, b, "seconds"), 3) for key, (a, b) in RATIOS.items()}
    harness.finish({"dtype": "fp32", "threads": c.threads, "prompts": c.prompts} | ratios | {"medians": median})


if __name__ == "__main__":
    config.run_main(main)
