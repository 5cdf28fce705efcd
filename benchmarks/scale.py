"""How a run grows: RAM and time of data and plan with the prompts, and of a step with length, responses and ranks.

    python benchmarks/scale.py                                    3 GB of disk while it runs
    python benchmarks/scale.py --parts commands                   data_prep.py and eval.py alone
    python benchmarks/scale.py --prompts 20000 --rows 1000 4000 --model world --lengths 64 --responses 2 --ranks 1

Plan: a process opens a token store of --prompts x 100 random rewards on disk and plans its visits (DPO-HPS).
Look-ups: then it asks for the reference log-prob of every visit, all in the cache, as train.py does before step 0.
Data: one process makes the store of a list-wise file; another one opens it, hashing the file, and reads 1,000 prompts.
Commands: data_prep.py import, doctor, generate, annotate and eval.py, one after the other, on pairs of 16 tokens, by an
untrained model and reward model of one layer, whose own cost is small; what they hold should not grow.
Steps: train.py, LoRA, on texts of equal lengths; of --lengths, --responses and --ranks one varies at a time, the others
are the first of their lists. Peaks are those of whole processes, libraries included (Linux).
The share of the sampler is that of plan and look-ups, a visit, in the fastest of the steps.
"""

import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from hps import config, dist, reference
from hps.batches import make_plan, touched_blocks
from hps.data import listwise, store, tokenizers, tokens
from hps.lab import world
from hps.options import Config


@dataclass
class Options:
    parts: tuple[str, ...] = ("plan", "data", "commands", "steps")  # which of these
    prompts: int = 1_000_000  # of the data that is planned
    rows: tuple[str, ...] = ("10000", "100000")  # prompts of the files that are made for data and commands
    # -- steps --
    model: str = "runs/models/smollm2-135m-instruct"  # model folder (make model), or world: a new world's
    lengths: tuple[str, ...] = ("128", "256", "512")  # tokens of a prompt with one response, half and half
    responses: tuple[str, ...] = ("2", "4", "8")  # responses of each prompt in a step (dpo-pl)
    ranks: tuple[str, ...] = ("1", "2")  # processes of train.py


CANDIDATES, EPOCHS = 100, 2  # rewards of a prompt that is planned, visits of it
STEP, STEPS = 4, 3  # prompts of a step, and steps that are timed after one that is not


def cost(function: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call, and GiB of the process at its highest so far."""
    return {"seconds": harness.seconds(function), "gib": harness.memory("VmHWM") / 1024}


def planned(folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of opening a store and planning, then seconds of the look-ups."""
    argv = ["--model=m", "--data=d", "--out=o", f"--epochs={EPOCHS}"]
    settings, _ = config.parse(Config, argv, prog="train.py", description="")
    began = time.perf_counter()
    examples = store.Store(folder, Path("data"))
    plan = make_plan(settings, examples)
    found = {"plan_seconds": time.perf_counter() - began, "plan_gib": harness.memory("VmHWM") / 1024}

    cache = reference.open_cache(folder.parent / "cache", weights="w", tokenizer="t", dtype="fp32")
    touched, _ = touched_blocks(plan, examples)
    keys = reference.response_keys(touched)
    for part in np.array_split(np.sort(keys), -(-len(keys) // 8192)):
        content = {"keys": part.view(np.uint8).reshape(-1, 16), "logps": np.zeros(len(part), dtype=np.float32)}
        save_file(content, cache / f"{reference.shard_name(content['keys'], content['logps'])}.safetensors")
    ranks = dist.Ranks(rank=0, world_size=1, device=torch.device("cpu"), sharded=False)

    def look_up() -> None:
        touched, place = touched_blocks(plan, examples)
        logps, computed = reference.fill(cache, torch.nn.Module(), touched, ranks=ranks, budget=1, pad_id=0)
        assert not computed and len(logps[place]) == (plan.responses >= 0).sum()

    looked_up = {f"lookup_{key}": value for key, value in cost(look_up).items()}
    return found | {"visits": len(plan.row), "entries": len(keys)} | looked_up


def write_store(prompts: int, folder: Path) -> None:
    """Prompts and responses of two tokens each, distinct in a prompt: what the plan reads does not depend on texts."""
    prompt, responses = np.zeros(2, np.int32), tuple(np.array([k, 2], np.int32) for k in range(CANDIDATES))
    places, g = np.arange(CANDIDATES), np.random.default_rng(0)

    def examples() -> Iterator[tokens.Example]:
        for i in range(prompts):
            rewards = g.normal(size=CANDIDATES)
            yield tokens.Example(str(i), prompt, responses, rewards, places, places, None, None, f"data:{i + 1}")

    store.write(folder, examples(), {"identity": {"data": ""}, "counts": {}})


def opened(folder: Path, data: Path, model: str) -> dict[str, float]:
    """Seconds and peak memory of opening (or making) a store and reading 1,000 prompts."""
    tokenizer = tokenizers.load_tokenizer(model)

    def read() -> None:
        examples = store.open_store(folder, data, tokenizer, max_length=2048)
        for i in np.random.default_rng(0).integers(0, len(examples), 1000):
            examples.block(int(i), range(2))

    return cost(read)


def ran(script: str, argv: list[str]) -> dict[str, float]:
    """Seconds and peak memory of one of our scripts."""
    return cost(lambda: importlib.import_module(script).main(argv))


def commands(rows: int, folder: Path, model: str) -> dict[str, dict[str, float]]:
    """What each command takes, of which one reads what another wrote."""
    tokenizer = tokenizers.load_tokenizer(model)
    harness.write_texts(folder / "texts.jsonl", model, rows=rows, responses=2, prompt=8, response=8)
    texts = ((row.prompt, *row.responses) for row in listwise.stream(folder / "texts.jsonl"))
    pairs = (dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts)
    listwise.write_lines(folder / "pairs.jsonl", pairs)
    about = AutoConfig.from_pretrained(model, num_hidden_layers=1, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    for name, kind in (("lm", AutoModelForCausalLM), ("rm", AutoModelForSequenceClassification)):
        kind.from_config(about).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    data, lm, scored = folder / "rows.jsonl", folder / "lm", folder / "scored.jsonl"
    few = dict(model=lm, max_new_tokens=2, temperature=0)
    how = dict(data=scored, reference=lm, out=folder / "eval", reference_cache=folder / "cache", samples=1, **few)
    each: dict[str, tuple[str, dict[str, Any]]] = {
        "import": ("data_prep", dict(source="trl", input=folder / "pairs.jsonl", output=data)),
        "doctor": ("data_prep", dict(input=data, model=lm)),
        "annotate": ("data_prep", dict(input=data, scorer=folder / "rm", output=scored)),
        "generate": ("data_prep", dict(input=data, n=1, output=folder / "drawn.jsonl", **few)),
        "eval": ("eval", how),
    }
    found = {}
    for name, (script, options) in each.items():
        found[name] = harness.alone(ran, script, [name] * (script != "eval") + harness.flags(**options))
        print(f"{name}, {rows:,} rows: {found[name]}", file=sys.stderr)
    return found


def stepped(folder: Path, model: str, length: int, responses: int, ranks: int) -> dict[str, Any]:
    """Seconds of a step and peak memory of the first rank, as train.py writes them."""
    data, out = folder / f"{length}-{responses}.jsonl", folder / f"{length}-{responses}-{ranks}"
    lengths = dict(prompt=length // 2, response=length - length // 2)
    harness.write_texts(data, model, rows=STEP * (STEPS + 1), responses=responses, **lengths)
    options = dict(model=model, data=data, out=out, method="dpo-pl", pl_responses=responses, epochs=1, lr=1e-4)
    options |= dict(prompts_per_step=STEP, tokens_per_micro_batch=2048)
    options |= dict(token_cache=folder / "tokens", reference_cache=folder / "cache")
    train = partial(harness.train, **options)  # one process has all threads
    summary = harness.alone(train) if ranks == 1 else harness.on_ranks(ranks, train)[0]
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    packed = summary["tokens"] / len(log)  # of a step: they are all alike
    assert packed == STEP * (lengths["prompt"] + responses * lengths["response"]), packed
    ends = [packed * (i + 1) / record["perf/tokens_per_s"] for i, record in enumerate(log)]
    step = statistics.median(np.diff(ends).tolist())
    return {"length": length, "K": responses, "ranks": ranks, "step_seconds": step, "gib": log[-1]["perf/peak_gib"]}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/scale.py", description=str(__doc__).split("\n")[0])
    if unknown := {*c.parts} - {*Options.parts}:
        raise ValueError(f"--parts {' '.join(unknown)}: the parts are {' '.join(Options.parts)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder, found = Path(temporary), dict[str, Any]()
        if "plan" in c.parts:
            write_store(c.prompts, folder / "store")
            found |= harness.alone(planned, folder / "store")
            taken = [[part, found[f"{part}_seconds"], found[f"{part}_gib"]] for part in ("plan", "lookup")]
            table = [[*part, 1e6 * part[1] / found["visits"]] for part in taken]
            title = f"{c.prompts:,} prompts x {CANDIDATES} rewards, {found['visits']:,} visits"
            harness.print_table(["", "seconds", "GiB", "us per visit"], table, title)

        world.write(folder / "world", seed=0, domain="safe", train=1, valid=1, test=1, demonstrations=2)
        of_world = str(folder / "world" / "model")
        model = c.model if Path(c.model).exists() else of_world
        if "data" in c.parts:
            found["rows"] = []
            for rows in map(int, c.rows):
                data = folder / f"{rows}.jsonl"
                harness.write_texts(data, model, rows=rows, responses=4, prompt=32, response=32)
                size: dict[str, float] = {"prompts": rows, "file_mb": data.stat().st_size / 1e6}
                for way in ("make", "open"):
                    taken = harness.alone(opened, folder / "tokens", data, model)
                    size |= {f"{way}_{key}": value for key, value in taken.items()}
                found["rows"].append(size)
            harness.print_table(list(size), [size.values() for size in found["rows"]])

        if "commands" in c.parts:
            found["commands"] = by_rows = {}
            for rows in map(int, c.rows):
                (folder / str(rows)).mkdir()
                by_rows[rows] = commands(rows, folder / str(rows), of_world)
            table = [[rows, name, *of.values()] for rows, each in by_rows.items() for name, of in each.items()]
            harness.print_table(["rows", "command", "seconds", "GiB"], table)

        if "steps" in c.parts:
            lists = [[*map(int, values)] for values in (c.lengths, c.responses, c.ranks)]
            first = [values[0] for values in lists]
            varied = [(*first[:i], value, *first[i + 1 :]) for i, values in enumerate(lists) for value in values]
            found["steps"] = steps = [stepped(folder, model, *case) for case in dict.fromkeys(varied)]
            threads = os.environ.get("OMP_NUM_THREADS", "all")
            title = f"{model if model == c.model else 'world'}, {threads} threads, {STEP} prompts per step"
            harness.print_table(list(steps[0]), [step.values() for step in steps], title)
            if "plan" in c.parts:
                visit = min(s["step_seconds"] for s in steps) / STEP
                share = (found["plan_seconds"] + found["lookup_seconds"]) / found["visits"] / visit
                found["sampler_share_of_step"] = share
                print(f"\nplan and look-ups: {share:.3%} of the fastest step")
    harness.finish(found)


if __name__ == "__main__":
    config.run_main(main)
