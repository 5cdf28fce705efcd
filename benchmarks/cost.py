"""Cost of a training step by preference model: BT, HPS, HPS with 8 draws, PL-5, PL-8, on HH-RLHF prompts and responses.

    make model && python benchmarks/cost.py --data harmless-base.jsonl.gz

The paper's hours are 62.8 (BT) : 64.4 (HPS) : 168.4 (PL). Every prompt has its own response and those of other rows
that are nearest to it in length, so that a step's time tells what a method does and not which lengths it drew. Each run
is train.py in a process of its own; rounds alternate. The last line is JSON.
"""

import json
import statistics
import sys
import tempfile
from bisect import bisect_left
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from step import in_fresh_process

from hps import config
from hps.data import listwise, tokens
from hps.prepare import importers


@dataclass
class Options:
    data: str  # HH-RLHF rows (.jsonl, .gz)
    model: str = "runs/models/smollm2-135m-instruct"  # a model folder, the one of `make model`
    dtype: str = "fp32"  # fp32 or bf16
    threads: int = 2  # OpenMP threads
    prompts: int = 16  # of a run
    rounds: int = 3  # in which all contestants take their turn
    prompts_per_step: int = 8  # of an optimizer step


# name -> (candidates of a prompt, options of train.py)
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "BT": (100, {"method": "dpo-bt"}),
    "HPS": (100, {"method": "dpo-hps"}),
    "HPS, n = 2": (2, {"method": "dpo-hps"}),
    "HPS-8": (100, {"method": "dpo-hps", "hps_samples": 8}),
    "PL-5": (100, {"method": "dpo-pl", "pl_responses": 5}),
    "PL-8": (100, {"method": "dpo-pl", "pl_responses": 8}),
}


def candidates(c: Options, n: int) -> list[listwise.Row]:
    """`c.prompts` prompts with n responses of about one length each, rewards in no order of length."""
    rows = importers.import_file("hh-rlhf", c.data)[0]
    tokenizer = tokens.load_tokenizer(c.model)
    texts = sorted({text for row in rows for text in row.responses})
    lengths = {text: len(tokens.encode_response(tokenizer, text)) for text in texts}
    by_length = sorted(texts, key=lengths.__getitem__)
    found = []
    for row in rows[: c.prompts]:
        at = bisect_left(by_length, lengths[row.responses[0]], key=lengths.__getitem__)
        start = max(0, min(at - n // 2, len(by_length) - n))
        near = tuple(sorted(by_length[start : start + n], key=tokens.row_key))  # a hash knows nothing of length
        found.append(replace(row, responses=near, rewards=tuple(map(float, range(n))), chosen=None, rejected=None))
    return found


def child(c: Options, name: str, out: Connection) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train.py is a script, no package
    import train

    torch.set_num_threads(c.threads)
    n, options = RUNS[name]
    with tempfile.TemporaryDirectory() as folder:
        listwise.write(Path(folder) / "data.jsonl", candidates(c, n))
        paths = {"data": f"{folder}/data.jsonl", "out": f"{folder}/run"}
        paths |= {"token_cache": f"{folder}/tokens", "reference_cache": f"{folder}/cache"}
        common = dict(model=c.model, dtype=c.dtype, epochs=1, prompts_per_step=c.prompts_per_step)
        train.main([f"--{key}={value}" for key, value in (paths | common | options).items()])
        out.send(json.loads((Path(folder) / "run/summary.json").read_text()))


def measure(c: Options, name: str) -> dict[str, float]:
    """Seconds and thousands of packed tokens of an optimizer step."""
    found = in_fresh_process(child, c, name)
    return {"seconds": found["seconds"] / found["steps"], "tokens": found["tokens"] / found["steps"] / 1000}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/cost.py", description=str(__doc__).split("\n")[0])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for _ in range(c.rounds):
        for name in RUNS:
            found[name].append(measure(c, name))
    print(f"\na step of {c.prompts_per_step} prompts, {c.dtype}, {c.threads} threads, medians of {c.rounds} rounds")
    print(f"{'':12}{'seconds':>9}{'x BT':>7}{'k tokens':>10}{'x BT':>7}")
    median = {name: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for name, runs in found.items()}
    for name, m in median.items():
        seconds, count = m["seconds"] / median["BT"]["seconds"], m["tokens"] / median["BT"]["tokens"]
        print(f"{name:12}{m['seconds']:>9.2f}{seconds:>7.3f}{m['tokens']:>10.2f}{count:>7.3f}")

    def ratio(a: str, b: str) -> float:
        """Median over rounds, so that a busy moment of the machine falls on both."""
        return statistics.median(x["seconds"] / y["seconds"] for x, y in zip(found[a], found[b], strict=True))

    keys = {
        "hps_over_bt": ratio("HPS", "BT"),
        "n100_over_n2": ratio("HPS", "HPS, n = 2"),
        "pl5_over_bt": ratio("PL-5", "BT"),
        "pl8_over_bt": ratio("PL-8", "BT"),
        "hps8_over_bt": ratio("HPS-8", "BT"),
    }
    settings = {"dtype": c.dtype, "threads": c.threads, "prompts": c.prompts}
    print(json.dumps(settings | {key: round(value, 3) for key, value in keys.items()} | {"medians": median}))


if __name__ == "__main__":
    config.run_main(main)
