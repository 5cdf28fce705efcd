"""Runs and their evaluations -> one table with intervals, paired differences, curves: what suites and recipes report.

    python -m hps.lab.results --runs runs/smollm2 --first DPO-HPS

A row of the table is a folder RUNS/ROW of runs that differ in their seed: run-0, run-1, ... of train.py, each with its
evaluation by eval.py in the folder `test`. Rows without training (the reference's own) have run-0/test alone.
"""

import json
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hps import config
from hps.data import listwise
from hps.evaluate import metrics, report
from hps.io import files

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("rm_dpo", "rm2", "rm10", "rmgap", "true_reward", "harm", "junk", "win", "bleu_char", "kl_exact")

Cells = dict[str, list[list[Path]]]  # row -> folders of its evaluations, [world][repeat]; the run is the parent folder
Item = dict[str, Any]


@dataclass
class Options:
    runs: str  # folder that holds a folder of runs per row; results.json, RESULTS.md, report.html, figures/ go there
    first: str = ""  # row that the others are compared with; empty: the last by name
    annotated: str = ""  # comma-separated files of human pairs with rewards: how often these agree with people


def table_of(worlds: list[list[Path]]) -> dict[str, np.ndarray]:
    """metric -> (worlds, repeats, prompts) of one row's evaluations, nan where a prompt has none, prompts by id."""
    tables = [[files.read_json(folder / "per_prompt.json") for folder in folders] for folders in worlds]
    ids = [sorted(set().union(*repeats[0].values())) for repeats in tables]
    return {
        metric: np.array(
            [
                [[table[metric].get(id, np.nan) for id in names] for table in repeats]
                for names, repeats in zip(ids, tables, strict=True)
            ]
        )
        for metric in metrics.METRICS
        if metric in tables[0][0]
    }


def summarise(cells: Cells, pairs: list[tuple[str, str]]) -> tuple[list[Item], list[Item]]:
    """Rows of the table with intervals over worlds, repeats and prompts, and paired differences of the named pairs."""
    values = {name: table_of(worlds) for name, worlds in cells.items()}
    rows = []
    for name, columns in values.items():
        found = {m: interval(metrics.bootstrap_mean(v, valid=~np.isnan(v))) for m, v in columns.items()}
        runs = [folder.parent for folders in cells[name] for folder in folders]
        spent = [files.read_json(run / "summary.json") for run in runs if (run / "summary.json").exists()]
        for metric, key, unit in (("train_seconds", "seconds", 1), ("train_tokens", "tokens", 1000)) if spent else ():
            each = [one[key] / unit for one in spent]  # with the range over runs, not an interval
            found[metric] = interval((float(np.mean(each)), min(each), max(each)))
        rows.append({"method": name, "seeds": len(runs), "metrics": found})
    comparisons = []
    for name, other in pairs:
        for metric in COMPARED:
            if metric in values[name] and metric in values[other]:
                a, b = values[name][metric], values[other][metric]
                valid = ~(np.isnan(a).any(1, keepdims=True) | np.isnan(b).any(1, keepdims=True))
                difference = interval(metrics.bootstrap_difference(a, b, valid=valid))
                difference["p"] = metrics.wilcoxon_p(a, b, valid=valid)
                comparisons.append({"a": name, "b": other, "metric": metric, **difference})
    return rows, comparisons


def interval(triple: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), map(float, triple), strict=True))


def curves_of(cells: Cells) -> dict[str, Any]:
    """`curves` of the report: loss and margin of training, the mean over runs; and DPO-HPS's `schedule` of gamma."""
    found: dict[str, Any] = {"curves": {}}
    for name, worlds in cells.items():
        paths = [folder.parent / "metrics.jsonl" for folders in worlds for folder in folders]
        logs = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths if path.exists()]
        if logs:
            steps = [record["step"] for record in logs[0]]

            def mean(key: str, logs: list = logs) -> list[float]:
                return np.mean([[record[key] for record in log] for log in logs], axis=0).tolist()

            found["curves"][name] = {"step": steps, "loss": mean("loss"), "margin": mean("rewards/margins")}
            if name == "DPO-HPS":
                found["schedule"] = {"step": steps} | {key: mean(key) for key in ("gamma", "effective_negatives")}
    return found


def agreement(path: Path) -> dict[str, float]:
    """How often the rewards of a file agree with its human pairs, ties half, with a bootstrap interval over rows."""
    signs = []
    for row in listwise.read(path):
        if row.rewards is not None and row.chosen is not None and row.rejected is not None:
            signs.append(np.sign(row.rewards[row.chosen] - row.rewards[row.rejected]))
    if not signs:
        raise ValueError(f"{path}: no row has rewards and a human pair; annotate human pairs first")
    return interval(metrics.bootstrap_mean(0.5 + 0.5 * np.array(signs)))


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
    seconds = sum(row["metrics"].get("train_seconds", {"mean": 0.0})["mean"] * row["seeds"] for row in rows)
    results = {"suite": out.name, "commit": commit(), "machine": machine(), "seconds": seconds}
    results |= {"rows": rows, "comparisons": comparisons, "settings": {"agreement with people": agreements}}
    publish(results | curves_of(cells), out)
    for name, found in agreements.items():
        low, high = found["low"], found["high"]
        print(f"{name}: the rewards agree with people on {found['mean']:.2f} [{low:.2f}, {high:.2f}] of the pairs")


if __name__ == "__main__":
    config.run_main(main)
