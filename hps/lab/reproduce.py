"""The paper's comparison on the self-made world, end to end, offline: `python -m hps.lab.reproduce --suite headline`.

world -> SFT -> candidates -> rewards -> one preference run and one evaluation per method and seed -> table, figures.
Every stage is one of the repository's own commands, written to OUT/commands.log as a user would type it, and run in
one single-threaded process per core. Finished stages are kept: the same command again goes on where it was.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hps import config
from hps.data import listwise
from hps.evaluate import metrics, report

BAR = "{l_bar}{bar}| {elapsed}<{remaining}"
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Options:
    suite: str = "headline"  # headline, methods (Table 2), transfer (5), responses (6-7), beta (8), schedule, cost, all
    seeds: int = 3  # preference seeds of each method; one SFT model serves all
    out: str = "runs/reproduce"  # results.json, RESULTS.md, report.html, figures/ and every stage's files
    small: bool = False  # a tenth of the size: checks the path, not the claim
    split: str = "test"  # prompts that are reported on: test, or valid to choose settings
    lr: float = 2e-4  # learning rate of all preference runs
    jobs: int = 0  # processes at once; 0 means one a core


# Standardised rewards times .5: on raw ones gamma = -5 .. 5 is nearly an argmax (docs/RESULTS.md). Our choice.
SCALED = ["--reward_norm", "zscore", "--reward_scale", "0.5"]
PL = ["--pl_responses", "8"]


@dataclass(frozen=True)
class Suite:
    """`methods`: row name -> flags of train.py beside configs/world.toml. `pairs`: rows that are compared, a - b.

    `splits`: row name -> (training prompts, test prompts) where these are not "train" and the reported split; with
    `domain` both, "train-help" and the like are the prompts of one domain.
    """

    methods: dict[str, list[str]]
    pairs: list[tuple[str, str]]
    domain: str = "safe"
    splits: dict[str, tuple[str, str]] = field(default_factory=dict)


def headline() -> Suite:
    """The question of the paper, with the control that it lacks: a uniformly drawn dispreferred response."""
    methods = {
        "DPO-BT": ["--method", "dpo-bt"],
        "DPO-PL-8": ["--method", "dpo-pl", *PL],
        "DPO-uniform": ["--method", "dpo-uniform"],
        "DPO-HPS": ["--method", "dpo-hps", *SCALED],
        "DPO-HPS raw": ["--method", "dpo-hps"],
    }
    return Suite(methods, [("DPO-HPS", other) for other in methods if other != "DPO-HPS"])


def all_methods() -> Suite:
    """The paper's Table 2: five losses under three preference models."""
    methods, pairs = {}, []
    for loss in ("dpo", "exo", "ipo", "sppo", "nca"):
        name = loss.upper()
        methods[f"{name}-BT"] = ["--method", f"{loss}-bt"]
        methods[f"{name}-PL-8"] = ["--method", f"{loss}-pl", *PL]
        methods[f"{name}-HPS"] = ["--method", f"{loss}-hps", *SCALED]
        pairs += [(f"{name}-HPS", f"{name}-BT"), (f"{name}-HPS", f"{name}-PL-8")]
    return Suite(methods, pairs)


def betas() -> Suite:
    """The paper's Table 8: reward margin against KL over beta."""
    methods, pairs = {}, []
    for beta in ("0.1", "0.25", "0.5", "0.75", "1"):
        for view, extra in (("bt", []), ("pl", PL), ("hps", SCALED)):
            methods[f"DPO-{view.upper()} beta {beta}"] = ["--method", f"dpo-{view}", "--beta", beta, *extra]
        pairs += [(f"DPO-HPS beta {beta}", f"DPO-{other} beta {beta}") for other in ("BT", "PL")]
    return Suite(methods, pairs)


def schedules() -> Suite:
    """What gamma's course over training does, and the forms of HPS."""
    hps = ["--method", "dpo-hps", *SCALED]
    methods = {"DPO-HPS": hps}
    for gamma in (-5, 0, 5):
        methods[f"gamma {gamma}"] = [*hps, "--gamma_schedule", "constant", f"--gamma_start={gamma}"]
    methods |= {
        "gamma 5 to -5": [*hps, "--gamma_start=5", "--gamma_end=-5"],
        "gamma 0 to 5": [*hps, "--gamma_start=0"],
        "gamma inclusive": [*hps, "--gamma_schedule", "inclusive"],
        "gamma linear": [*hps, "--gamma_schedule", "linear"],
        "gamma mixture": [*hps, "--gamma_schedule", "mixture"],
        "N factor n - 1": [*hps, "--n_factor", "n_minus_one"],
        "8 draws": [*hps, "--hps_samples", "8"],
        "runner-up": ["--method", "dpo-top2"],
        "random pairs": ["--method", "dpo-random"],
    }
    return Suite(methods, [(other, "DPO-HPS") for other in methods if other != "DPO-HPS"])


def responses() -> Suite:
    """The paper's Tables 6 and 7: how many candidates a prompt has in training."""
    methods, pairs = {}, []
    for n in ("5", "20", "50", "100"):
        for view, extra in (("bt", []), ("pl", PL), ("hps", SCALED)):
            if (n, view) != ("5", "pl"):
                methods[f"DPO-{view.upper()} n {n}"] = ["--method", f"dpo-{view}", "--candidates", n, *extra]
        pairs.append((f"DPO-HPS n {n}", f"DPO-BT n {n}"))
    methods["DPO-PL n 5"] = ["--method", "dpo-pl", "--candidates", "5", "--pl_responses", "5"]
    return Suite(methods, [*pairs, *((f"DPO-HPS n {n}", f"DPO-PL n {n}") for n in ("5", "20", "50", "100"))])


def transfer() -> Suite:
    """The paper's Table 5: trained on one domain, tested on the other; the SFT model knows both."""
    methods, pairs, splits = {}, [], {}
    for source, target in (("help", "safe"), ("safe", "help")):
        for view, extra in (("bt", []), ("pl", PL), ("uniform", []), ("hps", SCALED)):
            name = f"DPO-{view.upper()} {source} to {target}"
            methods[name] = ["--method", f"dpo-{view}", *extra]
            splits[name] = f"train-{source}", f"test-{target}"
            if view != "hps":
                pairs.append((f"DPO-HPS {source} to {target}", name))
    return Suite(methods, pairs, domain="both", splits=splits)


def cost() -> Suite:
    """The paper's 62.8 : 64.4 : 168.4 hours: seconds and packed tokens of training by preference model."""
    methods = {
        "DPO-BT": ["--method", "dpo-bt"],
        "DPO-HPS": ["--method", "dpo-hps", *SCALED],
        "DPO-HPS 8 draws": ["--method", "dpo-hps", *SCALED, "--hps_samples", "8"],
        "DPO-PL-5": ["--method", "dpo-pl", "--pl_responses", "5"],
        "DPO-PL-8": ["--method", "dpo-pl", *PL],
    }
    return Suite(methods, [(other, "DPO-BT") for other in methods if other != "DPO-BT"])


SUITES = {
    "headline": headline,
    "methods": all_methods,
    "transfer": transfer,
    "responses": responses,
    "beta": betas,
    "schedule": schedules,
    "cost": cost,
}
COMPARED = ("rm2", "rm10", "rmgap", "true_reward", "harm", "win", "kl_exact")
SIZES = {
    False: dict(demonstrations=48_000, train=400, valid=100, test=300, n=100, samples=8),
    True: dict(demonstrations=14_400, train=96, valid=16, test=64, n=24, samples=4),
}


def run_command(argv: list[str], log: str) -> float:
    """Run one of the repository's scripts in this worker, its output into a file; seconds taken.

    The script runs as `python SCRIPT ...` would, only that the libraries are already loaded.
    """
    began = time.perf_counter()
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        before, sys.argv = sys.argv, argv
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as e:
            if e.code:
                raise RuntimeError(f"{shlex.join(argv)} ended with status {e.code}: {tail(log)}") from None
        finally:
            sys.argv = before
    return time.perf_counter() - began


def tail(log: str) -> str:
    """The last line of a log file."""
    lines = Path(log).read_text().replace("\r", "\n").strip().splitlines()
    return lines[-1] if lines else "no output"


def workers(jobs: int) -> ProcessPoolExecutor:
    """Worker processes that end with this one, even if it is killed: an orphan would go on writing beside a restart."""
    jobs, spawn = jobs or os.cpu_count() or 1, multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_follow, initargs=(os.getpid(),))


def _follow(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Stages:
    """Runs commands in worker processes, skips those whose product exists, and moves one progress bar."""

    def __init__(self, pool: ProcessPoolExecutor, out: Path, bar: tqdm):
        self.pool, self.out, self.bar = pool, out, bar
        self.kept = 0  # stages of an earlier start, which this one's seconds do not hold

    def start(self, product: Path, argv: list[str], *, weight: float) -> Future:
        """Queue `argv`, which writes `product`; `weight` is its share of the bar, about its seconds."""
        if product.exists():
            done: Future = Future()
            done.set_result(0.0)
            self.kept += 1
            self.bar.update(weight)
            return done
        with (self.out / "commands.log").open("a") as log:
            log.write(f"python {shlex.join(argv)}\n")
        name = "-".join(product.relative_to(self.out).parts)
        future = self.pool.submit(run_command, argv, str(self.out / "logs" / f"{name}.log"))
        future.add_done_callback(lambda _: self.bar.update(weight))
        return future


def sweep(c: Options, suite: Suite, run: Stages, out: Path) -> dict[str, list[Path]]:
    """Run everything; the folders of each row's evaluations, one a seed."""
    size = SIZES[c.small]
    base = out if suite.domain == "safe" else out / suite.domain
    world, sft = base / "world", base / "sft"
    cache = ["--reference_cache", str(out / "reference_cache")]
    twice = 2 if suite.domain == "both" else 1  # so that each domain has as many prompts as when it is alone
    sizes = {key: twice * size[key] for key in ("train", "valid", "test")} | {"demonstrations": size["demonstrations"]}
    argv = ["data_prep.py", "world", "--out", str(world), "--domain", suite.domain]
    argv += [word for key, n in sizes.items() for word in (f"--{key}", str(n))]
    run.start(world / "world.json", argv, weight=8).result()
    argv = ["train.py", "--config", "configs/world-sft.toml", "--model", str(world / "model")]
    argv += ["--data", str(world / "sft.jsonl"), "--out", str(sft)]
    run.start(sft / "policy", argv, weight=90 if not c.small else 20).result()
    start = str(sft / "policy")

    # Candidates of every split that a row names, with the rewards that its use calls for: the noisy training reward
    # to train on, the true one to test on.
    splits = {name: suite.splits.get(name, ("train", c.split)) for name in suite.methods}
    drawing, scoring = [], []
    for split in dict.fromkeys(split for pair in splits.values() for split in pair):
        prompts = world / f"{split}.jsonl"
        if not prompts.exists():
            whole, domain = split.split("-")
            rows = listwise.read(world / f"{whole}.jsonl")
            listwise.write(prompts, [row for row in rows if row.source == f"world-{domain}"])
        drawn, scored = base / f"{split}-candidates.jsonl", base / f"{split}.jsonl"
        argv = ["data_prep.py", "generate", "--model", start, "--input", str(prompts), "--output", str(drawn)]
        argv += ["--n", str(size["n"]), "--max_new_tokens", "48"]
        drawing.append(run.start(drawn, argv, weight=size[split.split("-")[0]] * size["n"] / 1000))
        argv = ["data_prep.py", "annotate", "--scorer", "world-est" if split.startswith("train") else "world-true"]
        scoring.append((scored, [*argv, "--input", str(drawn), "--output", str(scored)]))
    wait(drawing)
    wait([run.start(product, argv, weight=2) for product, argv in scoring])

    heavy = 30 if not c.small else 5

    def evaluation(model: Path, test: str, folder: Path, name: str, extra: list[str]) -> Future:
        argv = ["eval.py", "--model", str(model), "--reference", start, "--data", str(base / f"{test}.jsonl")]
        argv += ["--out", str(folder), "--name", name, "--scorer", "world-true", *cache, *extra]
        argv += ["--samples", str(size["samples"]), "--max_new_tokens", "48", "--max_length", "128"]
        return run.start(folder / "eval.json", argv, weight=heavy)

    tests = dict.fromkeys(test for _, test in splits.values())
    baselines = {test: base / "cells" / "SFT" / f"eval-{test}" for test in tests}
    wait([evaluation(Path(start), test, folder, "SFT", []) for test, folder in baselines.items()])
    cells = {"SFT" if len(tests) == 1 else f"SFT on {test}": [folder] for test, folder in baselines.items()}
    runs: dict[Future, tuple[str, Path]] = {}
    for seed in range(c.seeds):
        for name in sorted(suite.methods, key=quick):  # a slow one left to the end would leave a core idle
            train, test = splits[name]
            folder = base / "cells" / f"{name} lr {c.lr:g}" / f"seed-{seed}"
            argv = ["train.py", "--config", "configs/world.toml", *suite.methods[name], "--seed", str(seed)]
            argv += ["--lr", str(c.lr), "--model", start, "--data", str(base / f"{train}.jsonl")]
            argv += ["--out", str(folder), *cache]
            weight = (8 if quick(name) else 24) if not c.small else 3
            runs[run.start(folder / "policy", argv, weight=weight)] = (name, folder)
            cells.setdefault(name, []).append(folder / f"eval-{test}")
    evaluations = []
    for done in as_completed(runs):
        done.result()
        name, folder = runs[done]
        test = splits[name][1]
        extra = ["--baseline", str(baselines[test])]
        evaluations.append(evaluation(folder / "policy", test, folder / f"eval-{test}", name, extra))
    wait(evaluations)
    return {name: cells[name] for name in (*(n for n in cells if n not in suite.methods), *suite.methods)}


def quick(name: str) -> bool:
    """Whether a row's method sees two responses a prompt, and not many."""
    return not ("PL" in name or "draws" in name)


def wait(futures: list[Future]) -> None:
    """Until all are done; the first failure ends the rest."""
    for future in as_completed(futures):
        future.result()


def table_of(folders: list[Path]) -> dict[str, np.ndarray]:
    """metric -> (seeds, prompts) of one row's evaluations, nan where a prompt has none, prompts by id."""
    tables = [json.loads((folder / "per_prompt.json").read_text()) for folder in folders]
    ids = sorted(tables[0]["rm2"])
    return {
        metric: np.array([[table[metric].get(id, np.nan) for id in ids] for table in tables])
        for metric in report.METRICS
        if metric in tables[0]
    }


def summarise(
    cells: dict[str, list[Path]], pairs: list[tuple[str, str]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the table with intervals over prompts (and seeds), and paired differences of the named pairs."""
    values = {name: table_of(folders) for name, folders in cells.items()}
    rows = []
    for name, columns in values.items():
        found = {m: interval(metrics.bootstrap_mean(v, valid=~np.isnan(v))) for m, v in columns.items()}
        if not name.startswith("SFT"):
            runs = [json.loads((folder.parent / "summary.json").read_text()) for folder in cells[name]]
            for metric, key, unit in (("train_seconds", "seconds", 1), ("train_tokens", "tokens", 1000)):
                spent = [run[key] / unit for run in runs]  # with the range over seeds, not an interval
                found[metric] = interval((float(np.mean(spent)), min(spent), max(spent)))
        rows.append({"method": name, "seeds": len(cells[name]), "metrics": found})
    comparisons = []
    for name, other in pairs:
        for metric in COMPARED:
            if metric in values[name] and metric in values[other]:
                a, b = values[name][metric], values[other][metric]
                valid = ~(np.isnan(a).any(0) | np.isnan(b).any(0))
                difference = interval(metrics.bootstrap_difference(a, b, valid=valid))
                comparisons.append({"a": name, "b": other, "metric": metric, **difference})
    return rows, comparisons


def interval(triple: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("mean", "low", "high"), map(float, triple), strict=True))


def curves_of(cells: dict[str, list[Path]]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Training curves, the mean over seeds, and the sampler's gamma and effective number of negatives."""
    curves, schedule = {}, {}
    for name, folders in cells.items():
        if name.startswith("SFT"):
            continue
        logs = [
            [json.loads(line) for line in (folder.parent / "metrics.jsonl").read_text().splitlines()]
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


def commit() -> str:
    """Short hash of the checked-out commit, `-dirty` where files differ from it; `unknown` outside a checkout."""
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def ask(*words: str) -> str:
        return subprocess.run([git, "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return (ask("rev-parse", "--short=10", "HEAD") or "unknown") + ("-dirty" if ask("status", "--porcelain") else "")


def machine() -> str:
    """CPU model and number of cores."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores, CPU only"


def main() -> None:
    c, _ = config.parse(Options, prog="python -m hps.lab.reproduce", description=str(__doc__).split("\n")[0])
    if c.suite not in (*SUITES, "all"):
        raise ValueError(f"unknown suite {c.suite!r}; choose one of {', '.join(SUITES)}, all")
    if c.split not in ("test", "valid"):
        raise ValueError(f"split = {c.split!r} does not exist; choose test or valid")
    if c.seeds < 1:
        raise ValueError("seeds must be at least 1")
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the workers: two threads on two busy cores run slower than one
    out = Path(c.out)
    for name in SUITES if c.suite == "all" else [c.suite]:
        run_suite(c, name, out, out / name if c.suite == "all" else out)


def run_suite(c: Options, name: str, out: Path, folder: Path) -> None:
    """One suite: its stages' files go to `out`, where suites share what they can, its report to `folder`."""
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    size, suite = SIZES[c.small], SUITES[name]()
    candidates = (size["train"] + size[c.split]) * size["n"] / 1000
    if c.small:
        total = 28 + candidates + 4 + 5 + c.seeds * len(suite.methods) * 8
    else:
        total = 98 + candidates + 4 + 30 + c.seeds * sum(38 if quick(row) else 54 for row in suite.methods)
    with (
        workers(c.jobs) as pool,
        tqdm(total=round(total), desc=f"{name}, {c.seeds} seeds", bar_format=BAR) as bar,
    ):
        try:
            run = Stages(pool, out, bar)
            cells = sweep(c, suite, run, out)
        except RuntimeError as e:
            pool.shutdown(wait=False, cancel_futures=True)
            raise ValueError(f"a stage failed; its output is in {out / 'logs'}: {e}") from e
    rows, comparisons = summarise(cells, suite.pairs)
    curves, schedule = curves_of(cells)
    results = {
        "suite": name,
        "commit": commit(),
        "machine": machine(),
        "seconds": time.time() - began,
        "rows": rows,
        "comparisons": comparisons,
        "settings": config.as_dict(c) | size | {"suite": name, "sft_seeds": 1, "stages_kept": run.kept},
        "curves": curves,
    }
    report.write_report(results | ({"schedule": schedule} if schedule else {}), folder)
    print(report.table(results))
    print(report.comparisons_table(results))
    print(f"{time.time() - began:.0f} s; {folder / 'RESULTS.md'}, {folder / 'report.html'}, {folder / 'figures'}")


if __name__ == "__main__":
    config.run_main(main)
