"""Any evaluations of eval.py side by side: one table, paired differences, wins on the same prompts, samples to read.

    python -m hps.evaluate.compare BT=runs/bt/eval HPS=runs/hps/eval --baseline BT --out runs/compare

A folder may also hold several evaluations, of runs that differ by their seed: they are averaged by prompt. Writes
RESULTS.md, report.html, results.json and figures/ and, where there are samples, samples.html: all answers to a prompt
beside each other, prompt by prompt. Intervals are over the prompts: they say nothing of other runs or data.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hps import config
from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import metrics, page, report
from hps.evaluate.survey import turns
from hps.io import files

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ("rm_dpo", "rm_worst_case", "rm10", "true_reward", "best_of_k_reward", "lead", "bleu_char", "harm", "junk",
            "kl_exact", "kl_samples")  # fmt: skip
FIRST = ("true_reward", "harm", "rm_dpo", "rm10", "kl_exact", "train_tokens")  # what is printed; a page has the others

Cells = dict[str, list[list[Path]]]  # row -> folders of its evaluations, [world][repeat]; the run is the parent folder
Item = dict[str, Any]
Values = dict[str, dict[str, float]]  # metric -> prompt -> value
# Options of eval.py in which evaluations may not differ.
ALIKE = ("data", "reference", "scorer", "scorer_dtype", "objectives", "samples", "seed", "temperature",
         "max_new_tokens", "max_length", "dtype")  # fmt: skip
FORMATS = ("alpaca_eval", "arena_hard")  # files that their judges read


@dataclass
class Options:
    evaluations: tuple[str, ...]  # NAME=FOLDER NAME=FOLDER ...: of eval.py, or of several runs of it
    baseline: str  # the NAME that each of the others is compared with
    out: str  # folder for RESULTS.md, report.html, results.json, figures/ and samples.html
    formats: str = ""  # write the samples for other judges too: alpaca_eval, arena_hard, or both, comma-separated


# ---- numbers ---------------------------------------------------------------------------------------


def per_prompt(folders: list[Path]) -> Values:
    """metric -> id -> mean over the runs of one world; by run, what a run has spent."""
    tables = [files.read_json(folder / "per_prompt.json") for folder in folders]
    found: Values = {}
    for metric in metrics.METRICS:
        columns = [table.get(metric, {}) for table in tables]
        ids = dict.fromkeys(id for column in columns for id in column)
        found[metric] = {id: float(np.mean([column[id] for column in columns if id in column])) for id in ids}
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

    found: dict[str, list[float]] = defaultdict(list)
    for i in range(max(len(a), len(b))):
        ours, theirs = rewards(a[i % len(a)]), rewards(b[i % len(b)])
        for id in ours.keys() & theirs.keys():
            shares = metrics.win_tie_lose(ours[id], theirs[id])
            found[id].append(shares["win"] - shares["lose"])
    return {id: float(np.mean(leads)) for id, leads in found.items()}


def measured(worlds: list[dict[str, float]]) -> tuple[Item, list[float]]:
    """Mean and interval of id -> value of each world, with every world's own mean, None where it has none; and the
    numbers that are behind the interval: the worlds' means, or, of a single world, its prompts' values."""
    values = [float(np.mean(list(world.values()))) if world else None for world in worlds]
    numbers = [x for x in (values if len(worlds) > 1 else worlds[0].values()) if x is not None]
    return metrics.world_interval(numbers) | {"values": values}, numbers


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
    metrics.adjust(comparisons)
    return rows, comparisons


def commit() -> str:
    """Short hash of the checked-out commit, `-dirty` where code or configs differ; `unknown` outside a checkout."""

    def ask(*words: str) -> str:
        argv = ["git", "-C", str(ROOT), *words]
        return subprocess.run(argv, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""

    changed = ask("status", "--porcelain", "--", "hps", "configs", "*.py")  # not the pages of a record, nor one's data
    return (ask("rev-parse", "--short=10", "HEAD") or "unknown") + ("-dirty" if changed else "")


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
    """Write a report under `out`, and print what came out, in short, and where all of it is."""
    report.write_report(results, out)
    print("\n".join(report.answer(results)), report.table(results, FIRST), sep="\n\n")
    print(f"{results['seconds']:.0f} s; all tables: {out / 'RESULTS.md'}, {out / 'report.html'}; {out / 'figures'}")


# ---- the command -----------------------------------------------------------------------------------


def find(words: tuple[str, ...], baseline: str) -> Cells:
    """NAME=FOLDER words -> name -> [its evaluations' folders]; ValueError for what cannot be compared."""
    named = dict(word.partition("=")[::2] for word in words)
    if len(named) < max(2, len(words)) or not all(name and folder for name, folder in named.items()):
        raise ValueError(f"{' '.join(words)}: give NAME=FOLDER NAME=FOLDER ..., two or more different names")
    if baseline not in named:
        raise ValueError(f"--baseline {baseline}: choose one of {', '.join(named)}")
    cells, at = {}, {}
    for name, folder in named.items():
        if Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name}={folder}: a name becomes that of a file: without slashes, and no dot first")
        if (other := at.setdefault(Path(folder).resolve(), name)) != name:
            raise ValueError(f"{other} and {name} are one folder, {folder}")
        cells[name] = [sorted(path.parent for path in Path(folder).rglob("eval.json"))]
        if not cells[name][0]:
            near = config.meant(Path(folder).name, [x.parent.name for x in Path(folder).parent.glob("*/eval.json")])
            raise ValueError(f"{name}={folder}: no eval.json there or below{near} eval.py makes one in its --out")
    return cells


def check_alike(cells: Cells) -> int:
    """How many prompts all evaluations share; ValueError unless they looked at the same data in the same way."""
    folders = [folder for ((*folders,),) in cells.values() for folder in folders]
    about = {folder: files.read_json(folder / "eval.json").get("config") for folder in folders}
    for folder, config_of in about.items():
        if not isinstance(config_of, dict):
            raise ValueError(f"{folder / 'eval.json'}: is not what eval.py writes; evaluate that policy again")
        for key in ALIKE:
            if config_of.get(key) != (first := about[folders[0]].get(key)):
                one, other = f"{folders[0]}: {key} {first}", f"{folder}: {config_of.get(key)}"
                raise ValueError(f"{one}; {other}. Evaluate them the same way, or what differs is not the policy")
    ids = [set().union(*files.read_json(folder / "per_prompt.json").values()) for folder in folders]
    if not (shared := set.intersection(*ids)):
        raise ValueError(f"{', '.join(map(str, folders))}: no prompt that all of them have; evaluate them on one file")
    return len(shared)


def read_samples(cells: Cells) -> dict[str, dict[str, Row]]:
    """name -> id -> prompt and samples, of each name's first evaluation; without those that have none."""
    paths = {name: folders[0][0] / "samples.jsonl" for name, folders in cells.items()}
    return {name: {row.id: row for row in listwise.read(path)} for name, path in paths.items() if path.exists()}


def samples_page(samples: dict[str, dict[str, Row]], baseline: str) -> str:
    """A page with all methods' samples of a prompt beside each other, one prompt at a time."""
    prompts = []
    for id, row in next(iter(samples.values())).items():
        if all(id in rows for rows in samples.values()):
            answers = [[rows[id].responses, rows[id].rewards] for rows in samples.values()]
            prompts.append({"id": id, "turns": turns(row.prompt), "samples": answers})
    study = {"methods": list(samples), "baseline": list(samples).index(baseline), "prompts": prompts}
    return page.render("samples.html", study=study)


def write_for_judges(samples: dict[str, dict[str, Row]], formats: list[str], out: Path) -> None:
    """Each method's first sample of each prompt, as alpaca_eval and arena-hard-auto v2 read a model's outputs (without
    the counts of the latter's style control). Both know one turn alone, so several are their texts in a row.
    """
    for name, rows in samples.items():
        answers = [(id, "\n\n".join(text for _, text in turns(x.prompt)), x.responses[0]) for id, x in rows.items()]
        if "alpaca_eval" in formats:
            records = [{"instruction": asked, "output": said, "generator": name} for _, asked, said in answers]
            (out / "alpaca_eval").mkdir(parents=True, exist_ok=True)
            files.write_json(out / "alpaca_eval" / f"{name}.json", records)
        if "arena_hard" in formats:
            lines = ""
            for id, asked, said in answers:
                spoken = [{"role": "user", "content": asked}, {"role": "assistant", "content": {"answer": said}}]
                lines += json.dumps({"uid": id, "ans_id": id, "model": name, "messages": spoken}) + "\n"
            (out / "arena_hard" / "model_answer").mkdir(parents=True, exist_ok=True)
            files.write_text(out / "arena_hard" / "model_answer" / f"{name}.jsonl", lines)


def main(argv: list[str] | None = None) -> None:
    began, words = time.time(), sys.argv[1:] if argv is None else argv
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))  # NAME=FOLDER come before
    words = [*(["--evaluations", *words[:first]] if first else []), *words[first:]]
    c, _ = config.parse(Options, words, prog="python -m hps.evaluate.compare", description=str(__doc__).split("\n")[0])
    formats = [name.strip() for name in c.formats.split(",") if name.strip()]
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"--formats {', '.join(unknown)}: choose among {', '.join(FORMATS)}")
    cells, out = find(c.evaluations, c.baseline), Path(c.out)
    if not c.out or out.is_file():
        raise ValueError(f"--out {c.out!r}: name a folder, which is made if it is missing")
    shared, samples = check_alike(cells), read_samples(cells)
    if formats and not samples:
        raise ValueError("--formats: no evaluation has samples; run eval.py with --samples")
    rows, comparisons = summarise(cells, [(name, c.baseline) for name in cells if name != c.baseline])
    settings = {name: [str(folder) for folder in folders[0]] for name, folders in cells.items()}
    results: dict[str, Any] = {"suite": out.name, "commit": commit(), "machine": machine(), "worlds": 1}
    results |= {"rows": rows, "comparisons": comparisons, "settings": settings | {"prompts shared": shared}}
    print(*report.sections([report.comparisons_table(results)]), sep="\n\n", end="\n\n")
    publish(results | {"seconds": time.time() - began}, out)
    if len(samples) > 1:
        files.write_text(out / "samples.html", samples_page(samples, c.baseline))
        print(f"{out / 'samples.html'}: the samples of {', '.join(samples)}, prompt by prompt")
    write_for_judges(samples, formats, out)


if __name__ == "__main__":
    config.run_main(main)
