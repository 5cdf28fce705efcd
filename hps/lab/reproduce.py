"""The paper's comparisons on self-made worlds, end to end, offline: `python -m hps.lab.reproduce --suite headline`.

For every seed: world -> SFT -> candidates -> rewards -> one preference run and one evaluation per row of the suite;
then tables, figures, paired intervals. Every stage is one of the repository's own commands (`hps.lab.sweep`), in one
single-threaded process per core. Finished stages are kept: the same command again goes on where it was, and suites in
one OUT share what they have in common.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hps import config
from hps.evaluate import metrics, report
from hps.io import files
from hps.lab import claims
from hps.lab.suites import LR, SUITES, Row, Suite
from hps.lab.sweep import ROOT, Stage, commit, course, flags, machine, run_in_workers


@dataclass
class Options:
    suite: str = "headline"  # one of hps/lab/suites.py (headline, methods, transfer, ...), theory, or all of them
    seeds: int = 3  # worlds, each with facts, prompts, SFT model and candidates of its own
    repeats: int = 0  # preference runs of each row in each world; 0: what the suite says, 1 but for `confirm`
    first_seed: int = 0  # the worlds are this one and those that follow; `confirm` takes later ones
    out: str = "runs/reproduce"  # results.json, RESULTS.md, report.html, figures/ and every stage's files
    small: bool = False  # a tenth of the size: checks the path, not the claim
    jobs: int = 0  # processes at once; 0 means one a core


COMPARED = ("rm_dpo", "rm2", "rm10", "rmgap", "true_reward", "harm", "junk", "win", "bleu_char", "kl_exact")
SIZES = {
    False: dict(demonstrations=48_000, train=400, valid=100, test=300, n=100, samples=8),
    True: dict(demonstrations=14_400, train=96, valid=16, test=64, n=24, samples=4),
}


def cell(row: Row, train: str) -> str:
    """The folder name of a row's runs: what decides them, so that suites share them."""
    words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()]
    return ",".join([str(row["method"]), *words[1:], *([] if train == "train" else [train])])


def plan(c: Options, suite: Suite, out: Path) -> tuple[list[Stage], dict[str, list[list[Path]]]]:
    """All stages of a suite, and of each row of its table the evaluations' folders, [world][repeat]."""
    stages: dict[Path, Stage] = {}
    cells: dict[str, list[list[Path]]] = {}
    for seed in range(c.first_seed, c.first_seed + c.seeds):
        base = out / (f"world-{seed}" if suite.domain == "safe" else f"world-{seed}-{suite.domain}")
        for stage in plan_world(c, suite, seed, base, cells, out):
            stages[stage.product] = stage
    order = [*(name for name in cells if name not in suite.rows), *suite.rows]
    return list(stages.values()), {name: cells[name] for name in order}


def plan_world(
    c: Options, suite: Suite, seed: int, base: Path, cells: dict[str, list[list[Path]]], out: Path
) -> list[Stage]:
    """The stages of one world; its evaluations' folders go into `cells`."""
    size, scale = SIZES[c.small], 0.1 if c.small else 1.0
    world, policy = base / "world", base / "sft" / "policy"
    texts, cache = f"--token_cache={out / 'token_cache'}", f"--reference_cache={out / 'reference_cache'}"
    twice = 2 if suite.domain == "both" else 1  # so that each domain has as many prompts as when it is alone
    sizes = {key: twice * size[key] for key in ("train", "valid", "test")} | {"demonstrations": size["demonstrations"]}
    about = world / "world.json"
    argv = ["data_prep.py", "world", *flags({"out": world, "seed": seed, "domain": suite.domain} | sizes)]
    stages = [Stage(about, argv, 6)]
    argv = ["train.py", "--config=configs/world-sft.toml", f"--model={world / 'model'}"]
    argv += [f"--data={world / 'sft.jsonl'}", f"--out={policy.parent}", f"--seed={seed}", texts]
    stages.append(Stage(policy, argv, 60 * scale, (about,)))

    # Candidates of every split that a row names, with the rewards that its use calls for: the noisy training reward
    # to train on; to test on, the true one, and a labelled pair like a data set's.
    def candidates(split: str) -> Path:
        drawn = base / f"{split}-candidates.jsonl"
        argv = ["data_prep.py", "generate", f"--model={policy}", f"--input={world / split}.jsonl", f"--output={drawn}"]
        argv += [f"--n={size['n']}", "--max_new_tokens=48"]
        stages.append(Stage(drawn, argv, 0.05 * size[split.split("-")[0]] * scale, (policy,)))
        return drawn

    def scored(split: str, name: str, scorer: str, *more: str) -> Path:
        drawn, product = candidates(split), base / f"{name}.jsonl"
        argv = ["data_prep.py", "annotate", f"--scorer={scorer}", f"--input={drawn}", f"--output={product}", *more]
        stages.append(Stage(product, argv, 3 * scale, (drawn,)))
        return product

    def evaluation(model: Path, test: str, folder: Path, *more: str, needs: tuple[Path, ...]) -> Path:
        data = scored(test, test, f"world-true:{seed}", "--pairs")
        argv = ["eval.py", f"--model={model}", f"--reference={policy}", f"--data={data}", f"--out={folder}"]
        argv += [f"--name={folder.parent.parent.name}", f"--scorer=world-true:{seed}", cache]
        argv += [f"--samples={size['samples']}", "--max_new_tokens=48", "--max_length=128", *more]
        product = folder / "eval.json"
        stages.append(Stage(product, argv, 0.04 * size[test.split("-")[0]] * scale, (data, *needs)))
        return product

    baselines: dict[str, Path] = {}
    for name, row in suite.rows.items():
        train, test = suite.prompts.get(name, ("train", suite.split))
        if test not in baselines:
            baselines[test] = evaluation(policy, test, base / "cells" / "SFT" / test, needs=())
            cells.setdefault("SFT" if not suite.prompts else f"SFT on {test}", []).append([baselines[test].parent])
        noise = suite.noise.get(name)
        trained_on = train if noise is None else f"{train}-noise-{noise:g}"
        data = scored(train, trained_on, f"world-est:{seed}" + ("" if noise is None else f":{noise:g}"))
        options = {**row, "lr": row.get("lr", LR)}
        responses = row.get("pl_responses", 2) + row.get("hps_samples", 1) - 1
        folders = []
        for repeat in range(c.repeats):
            folder = base / "cells" / cell(options, trained_on) / f"run-{repeat}"
            argv = ["train.py", "--config=configs/world.toml", *flags(options), f"--seed={repeat}", f"--model={policy}"]
            argv += [f"--data={data}", f"--out={folder}", texts, cache]
            stages.append(Stage(folder / "policy", argv, (2 + 1.4 * responses) * scale, (data,)))
            more = f"--baseline={baselines[test].parent}"
            needs = (folder / "policy", baselines[test])
            folders.append(evaluation(folder / "policy", test, folder / test, more, needs=needs).parent)
        cells.setdefault(name, []).append(folders)
    return stages


def table_of(worlds: list[list[Path]]) -> dict[str, np.ndarray]:
    """metric -> (worlds, repeats, prompts) of one row's evaluations, nan where a prompt has none, prompts by id."""
    tables = [[files.read_json(folder / "per_prompt.json") for folder in folders] for folders in worlds]
    found = {}
    for metric in metrics.METRICS:
        if metric in tables[0][0]:
            ids = [sorted(repeats[0]["rm2"]) for repeats in tables]
            values = [
                [[t[metric].get(id, np.nan) for id in names] for t in repeats]
                for names, repeats in zip(ids, tables, strict=True)
            ]
            found[metric] = np.array(values)
    return found


def check_length_terms(cells: dict[str, list[list[Path]]]) -> None:
    """ValueError unless every method of a world has the same RM_DPO - RM_R-DPO on a prompt.

    That difference is .01 (chosen - rejected length): it depends on the data alone. The paper's Tables 2 and 5 break
    this, so no table of ours is made without the check.
    """
    for folders in zip(*cells.values(), strict=True):  # one world's runs, by method
        known: dict[tuple[str, str], tuple[float, Path]] = {}
        for folder in (folder for runs in folders for folder in runs):
            table = files.read_json(folder / "per_prompt.json")
            margin = table.get("rm_dpo", table["rm2"])
            for metric in ("rm_rdpo_chars", "rm_rdpo_tokens"):
                for id, value in table.get(metric, {}).items():
                    term, other = known.setdefault((metric, id), (margin[id] - value, folder))
                    if abs(margin[id] - value - term) > 1e-6:
                        raise ValueError(
                            f"{folder} and {other} differ in RM_DPO - {metric} on prompt {id}, which depends on the "
                            "data alone: they were not evaluated on the same pairs; delete the older and start again"
                        )


def summarise(
    cells: dict[str, list[list[Path]]], pairs: list[tuple[str, str]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the table with intervals over worlds, repeats and prompts, and paired differences of the named pairs."""
    values = {name: table_of(worlds) for name, worlds in cells.items()}
    rows = []
    for name, columns in values.items():
        found = {m: interval(metrics.bootstrap_mean(v, valid=~np.isnan(v))) for m, v in columns.items()}
        runs = [folder for folders in cells[name] for folder in folders]
        if not name.startswith("SFT"):
            spent = [files.read_json(folder.parent / "summary.json") for folder in runs]
            for metric, key, unit in (("train_seconds", "seconds", 1), ("train_tokens", "tokens", 1000)):
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


def curves_of(cells: dict[str, list[list[Path]]]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Training curves, the mean over runs, and the sampler's gamma and effective number of negatives."""
    curves, schedule = {}, {}
    for name, worlds in cells.items():
        if name.startswith("SFT"):
            continue
        logs = [
            [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
            for folders in worlds
            for folder in folders
        ]
        columns = {key: np.mean([[r[key] for r in log] for log in logs], axis=0) for key in ("loss", "rewards/margins")}
        steps = [r["step"] for r in logs[0]]
        curves[name] = {
            "step": steps,
            "loss": columns["loss"].tolist(),
            "margin": columns["rewards/margins"].tolist(),
        }
        if name == "DPO-HPS":
            schedule = {"step": steps} | {
                key: np.mean([[r[key] for r in log] for log in logs], axis=0).tolist()
                for key in ("gamma", "effective_negatives")
            }
    return curves, schedule


def main() -> None:
    c, _ = config.parse(Options, prog="python -m hps.lab.reproduce", description=str(__doc__).split("\n")[0])
    names = [*SUITES, "theory"]
    if c.suite not in (*names, "all"):
        raise ValueError(f"unknown suite {c.suite!r}; choose one of {', '.join(names)}, all")
    if c.seeds < 1 or min(c.repeats, c.first_seed, c.jobs) < 0:
        raise ValueError("seeds must be at least 1, repeats, first_seed and jobs not negative")
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers: two threads on two busy cores run slower than one
    out = Path(c.out)
    for name in names if c.suite == "all" else [c.suite]:
        folder = out / name if c.suite == "all" else out
        if name == "theory":
            run_theory(c, folder)
        else:
            run_suite(c, name, out, folder)


def run_theory(c: Options, folder: Path) -> None:
    """The theorems, measured, in a process of their own (about as long as the headline)."""
    if not (folder / "theory.json").exists():
        argv = [sys.executable, "-m", "hps.lab.theory", f"--out={folder}", f"--small={str(c.small).lower()}"]
        subprocess.run(argv, check=True)
    print(f"theory: {folder / 'THEORY.md'}")


def run_suite(c: Options, name: str, out: Path, folder: Path) -> None:
    """One suite: its stages' files go to `out`, where suites share what they can, its report to `folder`."""
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    suite = SUITES[name]()
    c = dataclasses.replace(
        c,
        seeds=min(c.seeds, suite.worlds or c.seeds),
        repeats=c.repeats or suite.repeats,
        first_seed=c.first_seed + suite.later,
    )
    stages, cells = plan(c, suite, out)
    kept = run_in_workers(stages, c.jobs, out, f"{name}, {c.seeds} seeds")
    check_length_terms(cells)
    rows, comparisons = summarise(cells, suite.pairs)
    curves, schedule = curves_of(cells)
    results = {
        "suite": name,
        "commit": commit(),
        "machine": machine(),
        "seconds": time.time() - began,
        "rows": rows,
        "comparisons": comparisons,
        "settings": config.as_dict(c) | SIZES[c.small] | {"suite": name} | course(stages, kept, out),
        "curves": curves,
        "series": suite.series,
    }
    results |= {"schedule": schedule} if schedule else {}
    results["claims"] = claims.judge(results)
    report.write_report(results, folder)
    print(report.table(results))
    print(report.comparisons_table(results))
    print(f"{time.time() - began:.0f} s; {folder / 'RESULTS.md'}, {folder / 'report.html'}, {folder / 'figures'}")


if __name__ == "__main__":
    config.run_main(main)
