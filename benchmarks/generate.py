"""Candidates a second: ours against transformers' own `generate(num_return_sequences=n)`, same prompts and settings.

    python benchmarks/generate.py --threads 1
    make model && python benchmarks/generate.py --data harmless-base.jsonl.gz

Two models: the self-made world's after a short fine-tuning (a minute with the rest of the set-up), whose responses end
by themselves, and SmolLM2-135M-Instruct on real prompts. transformers gets a prompt a call, as its users write it, and
from three prompts on also several left-padded ones, as many rows a call as ours. Every contestant draws all n responses
of all prompts, ended or not; rounds alternate the contestants in one process; medians. Mean lengths tell whether all
draw from the same distribution. Ours gives log-probs besides.
"""

import contextlib
import io
import itertools
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

from hps import config, pretrained
from hps.data import listwise, tokenizers, tokens
from hps.data.rows import Row
from hps.lab import world
from hps.prepare import generate, importers

TEMPERATURE, ROWS = 0.9, 1024  # sequences that ours decodes at once
WORLD = ((8, 128, 48), (100, 40, 48))  # n, prompts, max_new_tokens
SMOLLM2 = ((8, 8, 96), (100, 2, 96))


@dataclass
class Options:
    data: str = ""  # HH-RLHF rows (.jsonl, .gz) for SmolLM2; without them that part is left out
    smollm2: str = "runs/models/smollm2-135m-instruct"  # the folder of `make model`
    threads: int = 1  # OpenMP threads
    rounds: int = 3  # in which all contestants take their turn
    share: float = 1.0  # of the prompts, for a quick look


def make_world(folder: Path) -> tuple[str, list[Row]]:
    """A world's model after a short supervised fine-tuning, and its prompts."""
    world.write(folder / "world", seed=0, domain="safe", train=1, valid=1, test=128, demonstrations=12_000)
    options = dict(loss="sft", lora_rank=0, lr=6e-3, adam_beta2=0.95, epochs=1, prompts_per_step=48, shuffle="no")
    options |= dict(max_length=128, warmup_steps=30, lr_end=0.05, model=folder / "world/model", out=folder / "sft")
    options |= dict(data=folder / "world/sft.jsonl", token_cache=folder / "tokens")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        harness.train(**options)
    return str(folder / "sft/policy"), listwise.read(folder / "world/test.jsonl")


def contestants(path: str, prompts: list[list[int]], n: int, limit: int) -> dict[str, Callable[[], list[int]]]:
    """Functions that draw n responses to each prompt and return the responses' lengths in tokens."""
    ours, theirs = (pretrained.load_causal_lm(path, dtype=torch.float32) for _ in range(2))
    eos = tokenizers.load_tokenizer(path).eos_token_id
    named, seeds = [(str(i), ids) for i, ids in enumerate(prompts)], itertools.count()

    def of_hps() -> list[int]:
        settings = dict(n=n, eos_token_id=eos, max_new_tokens=limit, temperature=TEMPERATURE, max_rows=ROWS)
        settings |= dict(as_drawn=True, progress=False, seed=next(seeds))
        groups = generate.generate(ours, named, counts=Counter(), **settings)
        return [len(one.token_ids) for _, group in groups for one in group]

    def of_transformers(per_call: int) -> list[int]:
        lengths = []
        for begin in range(0, len(prompts), per_call):
            some = prompts[begin : begin + per_call]
            longest = max(map(len, some))
            pads = [longest - len(ids) for ids in some]
            ids = torch.tensor([[eos] * pad + ids for pad, ids in zip(pads, some, strict=True)])
            mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
            torch.manual_seed(next(seeds))
            out = theirs.generate(
                ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                max_new_tokens=limit, num_return_sequences=n, eos_token_id=eos, pad_token_id=eos,
            )[:, longest:]  # fmt: skip
            ended = out == eos
            lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, limit).tolist()
        return lengths

    found = {"ours": of_hps, "generate": lambda: of_transformers(1)}
    return found | ({"padded": lambda: of_transformers(max(1, ROWS // n))} if len(prompts) > 2 else {})


def measure(c: Options, name: str, path: str, rows: list[Row], n: int, P: int, limit: int) -> dict[str, Any]:
    """Rates and ratios of one case."""
    tokenizer, lengths = tokenizers.load_tokenizer(path), {}
    prompts = [tokens.Encoder(tokenizer).prompt(row.prompt) for row in rows[: max(1, round(P * c.share))]]

    def rate(who: str, draw: Callable[[], list[int]]) -> dict[str, float]:
        drawn: list[int] = []
        taken = harness.seconds(lambda: drawn.extend(draw()))
        lengths.setdefault(who, []).extend(drawn)
        return {"rate": len(drawn) / taken}

    draws = contestants(path, prompts, n, limit)
    found = harness.take_turns(draws, c.rounds, lambda who, r: rate(who, draws[who]))
    result = dict(model=name, n=n, prompts=len(prompts), max_new_tokens=limit)
    result["prompt_tokens"] = round(statistics.mean(map(len, prompts)), 1)
    result |= {f"{who}_per_s": round(m["rate"], 2) for who, m in harness.medians(found).items()}
    result |= {f"{who}_mean_length": round(statistics.mean(values), 1) for who, values in lengths.items()}
    return result | {f"over_{w}": round(harness.ratio(found, "ours", w, "rate"), 2) for w in draws if w != "ours"}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/generate.py", description=str(__doc__).split("\n")[0])
    torch.set_num_threads(c.threads)
    with tempfile.TemporaryDirectory() as folder:
        path, rows = make_world(Path(folder))
        results = [measure(c, "world", path, rows, *case) for case in WORLD]
    if not c.data or not (Path(c.smollm2) / "config.json").exists():
        print(f"SmolLM2 is left out: it needs --data and the folder {c.smollm2} (make model)")
    else:
        rows = list(importers.import_file("hh-rlhf", c.data, limit=SMOLLM2[0][1])[0])
        results += [measure(c, "smollm2", c.smollm2, rows, *case) for case in SMOLLM2]
    columns = {
        "model": "model", "n": "n", "prompts": "prompts", "prompt_tokens": "tokens", "max_new_tokens": "limit",
        "ours_per_s": "ours/s", "generate_per_s": "generate/s", "padded_per_s": "padded/s",
        "over_generate": "/generate", "over_padded": "/padded", "ours_mean_length": "length",
        "generate_mean_length": "its length", "padded_mean_length": "its length",
    }  # fmt: skip
    table = [[r.get(key, "-") for key in columns] for r in results]
    harness.print_table(list(columns.values()), table, "samples a second, and ours over theirs")
    over = {f"{r['model']}, n = {r['n']}": r["over_generate"] for r in results}
    summary = {"over_hf_generate": over["world, n = 100"], "over_hf_generate_by_case": over, "dtype": "fp32"}
    harness.finish(summary | {"max_rows": ROWS, "threads": c.threads, "results": results})


if __name__ == "__main__":
    config.run_main(main)
