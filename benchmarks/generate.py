"""Candidates per second: ours against transformers' own `generate(num_return_sequences=n)`, same prompts and settings.

    python benchmarks/generate.py --threads 1                               a self-made world's model
    python benchmarks/generate.py --model FOLDER --data prompts.jsonl       any model, on list-wise rows

The world's model is made after a short fine-tuning (a minute with the rest of the set-up), so that its responses end by
themselves. transformers gets one prompt per call, as its users write it, and from three prompts on also several
left-padded ones, as many rows per call as ours. Every contestant draws all n responses of all prompts, ended or not;
rounds alternate the contestants in one process; medians. Mean lengths tell whether all draw from the same distribution.
Ours gives log-probs besides.
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
from hps.lab import world
from hps.prepare import generate

TEMPERATURE, ROWS = 0.9, 1024  # sequences that ours decodes at once
CASES = {8: 128, 100: 40}  # n -> prompts


@dataclass
class Options:
    model: str = ""  # model folder; empty: a world's, made here
    data: str = ""  # list-wise file of prompts; empty: the world's
    max_new_tokens: int = 48  # of a response
    threads: int = 1  # OpenMP threads
    rounds: int = 3  # in which all contestants take their turn
    share: float = 1.0  # of the prompts, for a quick look


def make_world(folder: Path) -> tuple[str, Path]:
    """A world's model after a short supervised fine-tuning, and its prompts."""
    world.write(folder / "world", seed=0, domain="safe", train=1, valid=1, test=128, demonstrations=12_000)
    options = dict(loss="sft", lora_rank=0, lr=6e-3, adam_beta2=0.95, epochs=1, prompts_per_step=48, shuffle="no")
    options |= dict(max_length=128, warmup_steps=30, lr_end=0.05, model=folder / "world/model", out=folder / "sft")
    options |= dict(data=folder / "world/sft.jsonl", token_cache=folder / "tokens")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        harness.train(**options)
    return str(folder / "sft/policy"), folder / "world/test.jsonl"


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


def measure(c: Options, path: str, prompts: list[list[int]], n: int) -> dict[str, Any]:
    """Rates, mean lengths and ratios of one case."""

    def rate(draw: Callable[[], list[int]]) -> dict[str, float]:
        drawn: list[int] = []
        taken = harness.seconds(lambda: drawn.extend(draw()))
        return {"per_s": len(drawn) / taken, "mean_length": statistics.mean(drawn)}

    draws = contestants(path, prompts, n, c.max_new_tokens)
    found = harness.take_turns(draws, c.rounds, lambda who, r: rate(draws[who]))
    result: dict[str, Any] = dict(n=n, prompts=len(prompts))
    result["prompt_tokens"] = statistics.mean(map(len, prompts))
    result |= {f"{who}_{key}": value for who, m in harness.medians(found).items() for key, value in m.items()}
    return result | {f"over_{who}": harness.ratio(found, "ours", who, "per_s") for who in draws if who != "ours"}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/generate.py", description=str(__doc__).split("\n")[0])
    if bool(c.model) != bool(c.data):
        raise ValueError("--model and --data go together: a folder, and a list-wise file of prompts for it")
    torch.set_num_threads(c.threads)
    with tempfile.TemporaryDirectory() as folder:
        path, data = (c.model, Path(c.data)) if c.model else make_world(Path(folder))
        encoder = tokens.Encoder(tokenizers.load_tokenizer(path))
        prompts = [encoder.prompt(row.prompt) for row in listwise.read(data)]
        results = [measure(c, path, prompts[: max(1, round(P * c.share))], n) for n, P in CASES.items()]
    title = (
        f"at most {c.max_new_tokens} tokens, {c.threads} threads: samples per second, ours over theirs, mean lengths"
    )
    harness.print_table(list(results[0]), [[r.get(key, "-") for key in results[0]] for r in results], title)
    over = {f"n = {r['n']}": round(r["over_generate"], 2) for r in results}
    summary = {"over_hf_generate": over["n = 100"], "over_hf_generate_by_case": over, "dtype": "fp32"}
    harness.finish(summary | {"max_rows": ROWS, "threads": c.threads, "results": results})


if __name__ == "__main__":
    config.run_main(main)
