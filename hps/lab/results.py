"""Runs and their evaluations -> one table with intervals, paired differences: what suites and recipes report.

    python -m hps.lab.results --runs runs/smollm2 --first DPO-HPS

A row of the table is a folder RUNS/ROW of runs that differ in their seed: run-0, run-1, ... of train.py, each with its
evaluation by eval.py in the folder `test`. Rows without training (the reference's own) have run-0/test alone.
"""

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hps import config
from hps.data import listwise
from hps.evaluate import md, metrics, report
from hps.io import files

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("rm_dpo", "rm_worst_case", "rm10", "true_reward", "best_of_k_reward", "lead", "bleu_char", "harm", "junk",
            "kl_exact")  # fmt: skip

Cells = dict[str, list[list[Path]]]  # row -> folders of its evaluations, [world][repeat]; the run is the parent folder
Item = dict[str, Any]
Values = dict[str, dict[str, float]]  # metric -> prompt -> value


@dataclass
class Options:
    runs: str  # folder that holds a folder of runs per row; results.json, RESULTS.md, report.html, figures/ go there
    first: str = ""  # row that the others are compared with; empty: the last by name
    annotated: str = ""  # comma-separated files of human pairs with rewards: how often these agree with people


def per_prompt(folders: list[Path]) -> Values:
    """metric -> id -> mean over the runs of one world; by run, what a run has spent."""
    tables = [files.read_json(folder / "per_prompt.json") for folder in folders]
    found: Values = {}
    for metric in metrics.METRICS:
        each: dict[str, list[float]] = {}
        for id, value in ((id, value) for table in tables for id, value in table.get(metric, {}).items()):
            each.setdefault(id, []).append(value)
        found[metric] = {id: float(np.mean(values)) for id, values in each.items()}
    spent = {folder.parent.name: folder.parent / "summary.json" for folder in folders}
    spent = {run: files.read_json(path) for run, path in spent.items() if path.exists()}
    found["train_seconds"] = {run: one["seconds"] for run, one in spent.items()}
    found["train_tokens"] = {run: one["tokens"] / 1000 for run, one in spent.items()}
    return {metric: column for metric, column in found.items() if column}


def head_to_head(a: list[Path], b: list[Path]) -> dict[str, float]:
    """id -> percentage of a's samples that beat b's of the same number less that of those beaten (the paper's Table 4),
    run beside run; a side with fewer runs repeats them."""

    def rewards(folder: Path) -> dict[str, Any]:
        path = folder / "samples.jsonl"
        return {row.id: row.rewards for row in listwise.read(path) if row.rewards} if path.exists() else {}

    found: dict[str, list[float]] = {}
    for i in range(max(len(a), len(b))):
        ours, theirs = rewards(a[i % len(a)]), rewards(b[i % len(b)])
        for id in ours.keys() & theirs.keys():
            shares = metrics.win_tie_lose(ours[id], theirs[id])
            found.setdefault(id, []).append(shares["win"] - shares["lose"])
    return {id: float(np.mean(leads)) for id, leads in found.items()}


def measured(worlds: list[dict[str, float]]) -> tuple[Item, list[float]]:
    """Mean and interval of id -> value of each world, with every world's own mean, None where it has none; and the
    numbers that are behind the interval: the worlds' means, or, of a single world, its prompts' values."""
    values = [float(np.mean(list(world.values()))) if world else None for world in worlds]
    numbers = [x for x in (values if len(worlds) > 1 else worlds[0].values()) if x is not None]
    return metrics.item(metrics.world_interval(numbers)) | {"values": values}, numbers


def on_frontier(worlds: list[Values], kl: float) -> Values:
    """What lies at this KL to the reference, in one world, between those two neighbours of a line of rows that are the
    first on either side of it; linear in KL, prompt by prompt. Empty where the line does not reach it."""
    levels = [float(np.mean(list(world["kl_exact"].values()))) for world in worlds]
    for (low, a), (high, b) in pairwise(zip(levels, worlds)):
        if low <= kl <= high and low < high:
            t = (kl - low) / (high - low)
            shared = {metric: a[metric].keys() & b[metric].keys() for metric in a.keys() & b.keys()}
            return {m: {id: (1 - t) * a[m][id] + t * b[m][id] for id in ids} for m, ids in shared.items() if ids}
    return {}


def summarise(
    cells: Cells, pairs: list[tuple[str, str]], frontiers: dict[str, tuple[float, list[str]]] | None = None
) -> tuple[list[Item], list[Item]]:
    """Rows of the table, and differences of the named pairs, paired by prompt and averaged by world, with p of the t
    test before and after Holm's adjustment, which those of a row with itself (AGAIN) do not have.

    Args:
        frontiers: name of a row that is none of `cells` -> (KL, rows), see `on_frontier`.
    """
    found = {name: [per_prompt(folders) for folders in worlds] for name, worlds in cells.items()}
    for name, (kl, line) in (frontiers or {}).items():
        found[name] = [on_frontier(list(world), kl) for world in zip(*(found[row] for row in line), strict=True)]
    rows = []
    for name, worlds in found.items():
        runs = sum(map(len, cells.get(name, [])))
        known = [metric for metric in metrics.METRICS if any(metric in world for world in worlds)]
        each = {metric: measured([world.get(metric, {}) for world in worlds])[0] for metric in known}
        rows.append({"method": name, "runs": runs, "metrics": each})
    comparisons = []
    for a, b in pairs:
        for metric in COMPARED:
            if metric == "lead":
                worlds = [head_to_head(x, y) for x, y in zip(cells.get(a, []), cells.get(b, []))]
            else:
                both = [(x.get(metric, {}), y.get(metric, {})) for x, y in zip(found[a], found[b], strict=True)]
                worlds = [{id: x[id] - y[id] for id in x if id in y} for x, y in both]
            if any(worlds):
                difference, numbers = measured(worlds)
                comparisons.append({"a": a, "b": b, "metric": metric, **difference, "p": metrics.world_p(numbers)})
    adjust(comparisons)
    return rows, comparisons


def adjust(comparisons: list[Item]) -> None:
    """Give every comparison but those of a row with itself its p after Holm's adjustment."""
    metrics.adjust([x for x in comparisons if x["a"] != x["b"] + metrics.AGAIN])


def agreement(path: Path) -> dict[str, float]:
    """How often the rewards of a file agree with its human pairs, ties half, with an interval over rows."""
    signs = []
    for row in listwise.read(path):
        if row.rewards is not None and row.chosen is not None and row.rejected is not None:
            signs.append(np.sign(row.rewards[row.chosen] - row.rewards[row.rejected]))
    if not signs:
        raise ValueError(f"{path}: no row has rewards and a human pair; annotate human pairs first")
    return metrics.item(metrics.world_interval(0.5 + 0.5 * np.array(signs)))


def commit() -> str:
    """Short hash of the checked-out commit, `-dirty` where files differ from it; `unknown` outside a checkout."""
    git = shutil.which("git")

    def ask(*words: str) -> str:
        argv = [str(git), "-C", str(ROOT), *words]
        return subprocess.run(argv, capture_output=True, text=True).stdout.strip() if git else ""

    return (ask("rev-parse", "--short=10", "HEAD") or "unknown") + ("-dirty" if ask("status", "--porcelain") else "")


def machine() -> str:
    """Models of CPU and GPUs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpus = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    shown = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)] or ["no GPU"]
    cpu = cpus[0] if cpus else platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {', '.join(shown)}"


def publish(results: Item, out: Path) -> None:
    """Write a report under `out`, and print its tables and where it is."""
    report.write_report(results, out)
    print(report.table(results))
    print(report.comparisons_table(results))
    print(f"{results['seconds']:.0f} s; {out / 'RESULTS.md'}, {out / 'report.html'}, {out / 'figures'}")


def main() -> None:
    c, _ = config.parse(Options, prog="python -m hps.lab.results", description=str(__doc__).split("\n")[0])
    out = Path(c.runs)
    cells: Cells = {}
    for path in sorted(out.glob("*/run-*/test/per_prompt.json")):
        cells.setdefault(path.parts[-4], [[]])[0].append(path.parent)
    first = c.first or max(cells, default="")
    if first not in cells:
        found = ", ".join(cells) or "none"
        raise ValueError(f"{out}: no ROW/run-N/test/per_prompt.json of row {first!r} there; rows: {found}")
    rows, comparisons = summarise(cells, [(first, other) for other in cells if other != first])
    agreements = {Path(name).name: agreement(Path(name)) for name in filter(None, c.annotated.split(","))}
    seconds = sum(row["metrics"].get("train_seconds", {"mean": 0.0})["mean"] * row["runs"] for row in rows)
    results = {"suite": out.name, "commit": commit(), "machine": machine(), "seconds": seconds, "worlds": 1}
    results |= {"rows": rows, "comparisons": comparisons, "settings": {"agreement with people": agreements}}
    publish(results, out)
    for name, found in agreements.items():
        print(f"{name}: the rewards agree with people on {md.interval(found, 2)} of the pairs")


if __name__ == "__main__":
    config.run_main(main)
