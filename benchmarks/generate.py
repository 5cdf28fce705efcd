"""Candidates a second: ours against transformers' own `generate(num_return_sequences=n)`, same prompts and settings.

    python benchmarks/generate.py --threads 1
    make model && python benchmarks/generate.py --data harmless-base.jsonl.gz

Two models: the self-made world's after a short fine-tuning (a minute with the rest of the set-up), whose responses end
by themselves, and SmolLM2-135M-Instruct on real prompts. transformers gets a prompt a call, as its users write it, and
from three prompts on also several left-padded ones, as many rows a call as ours. Every contestant draws all n responses
of all prompts, ended or not; rounds alternate the contestants in one process; medians. Mean lengths tell whether all
draw from the same distribution. Ours gives log-probs besides. The last line is JSON.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hps import config, model
from hps.data import listwise, tokens
from hps.lab import world
from hps.prepare import generate, importers

TEMPERATURE = 0.9
WORLD = ((8, 128, 48), (100, 40, 48))  # n, prompts, max_new_tokens
SMOLLM2 = ((8, 8, 96), (100, 2, 96))


@dataclass
class Options:
    data: str = ""  # HH-RLHF rows (.jsonl, .gz) for SmolLM2; without them that part is left out
    smollm2: str = "runs/models/smollm2-135m-instruct"  # the folder of `make model`
    dtype: str = "fp32"  # fp32 or bf16
    threads: int = 1  # OpenMP threads
    rounds: int = 3  # in which all contestants take their turn
    max_rows: int = 1024  # sequences that ours decodes at once
    share: float = 1.0  # of the prompts, for a quick look


def make_world(folder: Path) -> tuple[str, list[listwise.Row]]:
    """A world's model after a short supervised fine-tuning, and its prompts."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train.py is a script, no package
    import train

    world.write(folder / "world", seed=0, domain="safe", train=1, valid=1, test=128, demonstrations=12_000)
    options = dict(loss="sft", lora_rank=0, lr=6e-3, adam_beta2=0.95, epochs=1, prompts_per_step=48, shuffle="no")
    options |= dict(max_length=128, warmup_steps=30, lr_end=0.05, model=folder / "world/model", out=folder / "sft")
    options |= dict(data=folder / "world/sft.jsonl", token_cache=folder / "tokens")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        train.main([f"--{key}={value}" for key, value in options.items()])
    return str(folder / "sft/policy"), listwise.read(folder / "world/test.jsonl")


Draw = Callable[[], list[int]]


def contestants(c: Options, path: str, prompts: list[list[int]], n: int, limit: int) -> dict[str, Draw]:
    """Functions that draw n responses to each prompt and return the responses' lengths in tokens."""
    ours, theirs = (model.load_causal_lm(path, dtype=model.DTYPES[c.dtype]) for _ in range(2))
    tokenizer = tokens.load_tokenizer(path)
    eos, named = tokenizer.eos_token_id, [(str(i), ids) for i, ids in enumerate(prompts)]
    seeds = iter(range(10**9))

    def of_hps() -> list[int]:
        settings = dict(n=n, eos_token_id=eos, max_new_tokens=limit, temperature=TEMPERATURE, max_rows=c.max_rows)
        settings |= dict(unique=False, keep_unfinished=True, oversample=1.0, progress=False, seed=next(seeds))
        groups = generate.generate(ours, named, counts=Counter(), **settings)
        return [len(one.token_ids) for _, group in groups for one in group]

    def of_transformers(per_call: int) -> list[int]:
        lengths = []
        for begin in range(0, len(prompts), per_call):
            some = prompts[begin : begin + per_call]
            longest = max(map(len, some))
            pads = [longest - len(ids) for ids in some]
            ids = torch.tensor([[eos] * pad + ids for pad, ids in zip(pads, some)])
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
    per_call = max(1, c.max_rows // n)
    return found | ({"padded": lambda: of_transformers(per_call)} if len(prompts) > 2 else {})


def measure(
    c: Options, name: str, path: str, rows: list[listwise.Row], cases: tuple[tuple[int, int, int], ...]
) -> list[dict]:
    """Rates and ratios of each case, printed as table rows too."""
    tokenizer = tokens.load_tokenizer(path)
    results = []
    for n, P, limit in cases:
        P = max(1, round(P * c.share))
        prompts = [tokens.encode_prompt(tokenizer, row.prompt) for row in rows[:P]]
        found = contestants(c, path, prompts, n, limit)
        rates: dict[str, list[float]] = {who: [] for who in found}
        lengths: dict[str, list[int]] = {who: [] for who in found}
        for _ in range(c.rounds):
            for who, run in found.items():
                began = time.perf_counter()
                drawn = run()
                rates[who].append(len(drawn) / (time.perf_counter() - began))
                lengths[who] += drawn
        result = dict(model=name, n=n, prompts=P, prompt_tokens=round(sum(map(len, prompts)) / P, 1))
        result |= dict(max_new_tokens=limit)
        result |= {f"{who}_per_s": round(statistics.median(values), 2) for who, values in rates.items()}
        result |= {f"{who}_mean_length": round(statistics.mean(values), 1) for who, values in lengths.items()}
        for who in found.keys() - {"ours"}:
            pairs = zip(rates["ours"], rates[who])
            result[f"over_{who}"] = round(statistics.median(a / b for a, b in pairs), 2)
        results.append(result)
        shown = [f"{result.get(f'{who}_per_s', '-'):>10}" for who in ("ours", "generate", "padded")]
        shown += [f"{result.get(f'over_{who}', '-'):>10}" for who in ("generate", "padded")]
        means = "/".join(str(result[f"{who}_mean_length"]) for who in found)
        print(f"{name:<9}{n:>5}{P:>9}{result['prompt_tokens']:>8}{limit:>7}{''.join(shown)}  {means}", flush=True)
    return results


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/generate.py", description=str(__doc__).split("\n")[0])
    torch.set_num_threads(c.threads)
    with tempfile.TemporaryDirectory() as folder:
        path, rows = make_world(Path(folder))
        print("samples a second, and ours over theirs")
        print(f"{'model':<9}{'n':>5}{'prompts':>9}{'tokens':>8}{'limit':>7}{'ours':>10}{'generate':>10}{'padded':>10}"
              f"{'/generate':>10}{'/padded':>10}  mean lengths")  # fmt: skip
        results = measure(c, "world", path, rows, WORLD)
    if not c.data or not (Path(c.smollm2) / "config.json").exists():
        print(f"SmolLM2 is left out: it needs --data and the folder {c.smollm2} (make model)")
    else:
        rows = importers.import_file("hh-rlhf", c.data, order="", limit=SMOLLM2[0][1], skip=0)[0]
        results += measure(c, "smollm2", c.smollm2, list(rows), SMOLLM2)
    over = {f"{r['model']}, n = {r['n']}": r["over_generate"] for r in results}
    summary = {"over_hf_generate": over["world, n = 100"], "over_hf_generate_by_case": over, "dtype": c.dtype}
    summary |= {"max_rows": c.max_rows}
    print(json.dumps(summary | {"threads": c.threads, "results": results}))


if __name__ == "__main__":
    config.run_main(main)
