"""Cost of a training step by preference model: BT, HPS, HPS with 8 draws, PL-5, PL-8, on HH-RLHF prompts and responses.

    make model && python benchmarks/cost.py --data harmless-base.jsonl.gz

The paper's hours are 62.8 (BT) : 64.4 (HPS) : 168.4 (PL). Every prompt has its own response and those of other rows
that are nearest to it in length, so that a step's time tells what a method does and not which lengths it drew. Each run
is train.py in a process of its own; rounds alternate.
"""

import tempfile
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch

from hps import config
from hps.data import listwise, tokenizers, tokens
from hps.data.rows import Row, row_key
from hps.prepare import importers


@dataclass
class Options:
    data: str  # HH-RLHF rows (.jsonl, .gz)
    model: str = "runs/models/smollm2-135m-instruct"  # a model folder, the one of `make model`
    threads: int = 2  # OpenMP threads
    prompts: int = 16  # of a run
    rounds: int = 3  # in which all contestants take their turn


STEP = 8  # prompts of an optimizer step
# name -> (candidates of a prompt, options of train.py)
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


def candidates(c: Options, n: int) -> list[Row]:
    """`c.prompts` prompts with n responses of about one length each, rewards in no order of length."""
    rows = list(importers.import_file("hh-rlhf", c.data).rows)
    tokenizer = tokenizers.load_tokenizer(c.model)
    texts = sorted({text for row in rows for text in row.responses})
    lengths = {text: len(next(tokens.Encoder(tokenizer).responses([text]))) for text in texts}
    by_length = sorted(texts, key=lengths.__getitem__)
    found = []
    for row in rows[: c.prompts]:
        at = bisect_left(by_length, lengths[row.responses[0]], key=lengths.__getitem__)
        start = max(0, min(at - n // 2, len(by_length) - n))
        near = tuple(sorted(by_length[start : start + n], key=row_key))  # a hash knows nothing of length
        found.append(replace(row, responses=near, rewards=tuple(map(float, range(n))), chosen=None, rejected=None))
    return found


def measure(c: Options, name: str) -> dict[str, float]:
    """Seconds and thousands of packed tokens of an optimizer step."""
    torch.set_num_threads(c.threads)
    n, options = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        listwise.write(Path(folder) / "data.jsonl", candidates(c, n))
        paths = {"data": f"{folder}/data.jsonl", "out": f"{folder}/run"}
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
