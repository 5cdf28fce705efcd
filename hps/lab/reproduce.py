"""The paper's comparisons on self-made worlds, end to end, offline: `python -m hps.lab.reproduce --suite headline`.

For every seed: world -> SFT -> candidates -> rewards -> one preference run and one evaluation per row of the suite;
then tables, figures, intervals over worlds. Every stage is one of the repository's own commands (`hps.lab.sweep`), in
one single-threaded process per core. Finished stages are kept: the same command again goes on where it was, and suites
in one OUT share what they have in common.
"""

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps import config
from hps.data.rows import stream
from hps.evaluate import report
from hps.evaluate.compare import ROOT, Cells, commit, machine, publish, summarise
from hps.io import files
from hps.lab import claims, suites
from hps.lab.suites import LR, SUITES, Row, Suite
from hps.lab.sweep import Stage, flags, run_in_workers, stage_seconds
from hps.methods import all_losses


@dataclass
class Options:
    suite: str = "headline"  # one of hps/lab/suites.py (headline, methods, transfer, ...), theory, or all of them
    seeds: int = 8  # worlds, each with facts, prompts, SFT model and candidates of its own; some take fewer in `all`
    first_seed: int = 0  # the worlds are this one and those that follow; `tune` takes later ones
    out: str = "runs/reproduce"  # results.json, RESULTS.md, report.html, figures/ and every stage's files
    small: bool = False  # a tenth of the size: checks the path, not the claim
    jobs: int = 0  # processes at once; 0 means one per core


# Of the variance of one world's difference in reward between HPS and BT 82 % is between worlds, 17 % between runs and
# 1 % between 100 prompts (3 % of RM10, a third of RM_DPO). So the minutes go to worlds, one run in each, and prompts,
# candidates to test on (`test_n`) and samples are few.
SIZES = {
    False: dict(demonstrations=26_000, train=240, test=100, n=100, test_n=30, samples=5),
    True: dict(demonstrations=14_400, train=96, test=64, n=24, test_n=24, samples=4),
}


def cell(row: Row, train: str) -> str:
    """The folder name of a row's runs: what decides them, so that suites share them."""
    words = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()]
    return ",".join([str(row["method"]), *words[1:], *([] if train == "train" else [train])])


def plan(c: Options, suite: Suite, out: Path) -> tuple[list[Stage], Cells]:
    """All stages of a suite, and of each row of its table the evaluations' folders, [world][run]: one run in each."""
    stages: dict[Path, Stage] = {}
    cells: Cells = {}
    for seed in range(c.first_seed, c.first_seed + c.seeds):
        plan_world(c, suite, seed, out, stages, cells)
    order = [*(name for name in cells if name not in suite.rows), *suite.rows]
    return list(stages.values()), {name: cells[name] for name in order}


def plan_world(c: Options, suite: Suite, seed: int, out: Path, stages: dict[Path, Stage], cells: Cells) -> None:
    """Add one world's stages, by product, to `stages`, and its evaluations' folders to `cells`."""
    size = SIZES[c.small]
    base = out / (f"world-{seed}" if suite.domain == "safe" else f"world-{seed}-{suite.domain}")
    world, policy = base / "world", base / "sft" / "policy"
    texts, cache = f"--token_cache={out / 'token_cache'}", f"--reference_cache={out / 'reference_cache'}"

    def stage(product: Path, argv: list[str], seconds: float, *needs: Path) -> Path:
        stages.setdefault(product, Stage(product, argv, seconds, needs))
        return product

    twice = 2 if suite.domain == "both" else 1  # so that each domain has as many prompts as when it is alone
    sizes = {key: twice * size[key] for key in ("train", "test")} | {"demonstrations": size["demonstrations"]}
    argv = ["data_prep.py", "world", *flags({"out": world, "seed": seed, "domain": suite.domain, "valid": 0} | sizes)]
    about = stage(world / "world.json", argv, 2)
    argv = ["train.py", "--config=configs/world-sft.toml", f"--model={world / 'model'}"]
    argv += [f"--data={world / 'sft.jsonl'}", f"--out={policy.parent}", f"--seed={seed}", texts]
    stage(policy, argv, 0.0019 * size["demonstrations"], about)

    # Candidates of every split that a row names, with the rewards that its use calls for: the noisy training reward
    # to train on; to test on, the true one, and a labelled pair like a data set's.
    def scored(split: str, scorer: str, *more: str) -> Path:
        drawn, product = base / f"{split}-candidates.jsonl", base / f"{split}.jsonl"
        argv = ["data_prep.py", "generate", f"--model={policy}", f"--input={world / split}.jsonl", f"--output={drawn}"]
        n = size["n"] if split.startswith("train") else size["test_n"]
        argv += [f"--n={n}", "--max_new_tokens=48", f"--seed={seed}"]
        stage(drawn, argv, 0.0008 * n * size[split.split("-")[0]], policy)
        argv = ["data_prep.py", "annotate", f"--scorer={scorer}", f"--input={drawn}", f"--output={product}", *more]
        return stage(product, argv, 1, drawn)

    def evaluation(model: Path, test: str, folder: Path, *needs: Path, baseline: Path | None = None) -> Path:
        data = scored(test, f"world-true:{seed}", "--pairs")
        argv = ["eval.py", f"--model={model}", f"--reference={policy}", f"--data={data}", f"--out={folder}"]
        argv += [f"--name={folder.parent.parent.name}", f"--scorer=world-true:{seed}", cache]
        argv += [f"--samples={size['samples']}", "--max_new_tokens=48", "--max_length=128", f"--seed={seed}"]
        argv += [f"--baseline={baseline.parent}"] if baseline else []
        return stage(folder / "eval.json", argv, 1 + 0.015 * size[test.split("-")[0]], data, *needs)

    baselines: dict[str, Path] = {}
    for name, row in suite.rows.items():
        train, test = suite.prompts.get(name, ("train", "test"))
        if test not in baselines:
            baselines[test] = evaluation(policy, test, base / "cells" / "SFT" / test)
            cells.setdefault("SFT" if not suite.prompts else f"SFT on {test}", []).append([baselines[test].parent])
        data = scored(train, f"world-est:{seed}")
        options = {**row, "lr": row.get("lr", LR)}
        folder = base / "cells" / cell(options, train) / "run-0"
        argv = ["train.py", "--config=configs/world.toml"]
        argv += flags(options | {"seed": row.get("seed", 0) + seed, "model": policy})
        argv += [f"--data={data}", f"--out={folder}", texts]
        argv += [cache] if all_losses()[row["method"].split("-")[0]].needs_reference else []
        everything = row.get("hps_form") == "full" or row.get("pl_responses") == 0
        responses = row.get("pl_responses", 2) + row.get("hps_samples", 1) - 1
        responses = row.get("candidates", size["n"]) if everything else responses
        trained = stage(folder / "policy", argv, 0.5 + 0.005 * responses * size["train"], data)
        found = evaluation(trained, test, folder / test, trained, baselines[test], baseline=baselines[test])
        cells.setdefault(name, []).append([found.parent])


def run_suite(c: Options, name: str, out: Path, folder: Path) -> None:
    """One suite: its stages' files go to `out`, where suites share what they can, its report to `folder`."""
    began = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    if name == "theory":
        argv = ["hps/lab/theory.py", f"--out={out / name}", f"--small={str(c.small).lower()}"]
        run_in_workers([Stage(out / name / "theory.json", argv, 180)], 1, out, name)
        print(f"theory: {out / name / 'THEORY.md'}")
        return
    suite = suites.trial() if name == "trial" else SUITES[name]()
    seeds = min(c.seeds, suite.worlds) if c.suite == "all" else c.seeds
    c = dataclasses.replace(c, suite=name, seeds=seeds, first_seed=c.first_seed + suite.later)
    while True:
        stages, cells = plan(c, suite, out)
        run_in_workers(stages, c.jobs, out, f"{name}, worlds: {seeds}")
        rows, comparisons = summarise(cells, suite.pairs, suite.frontiers)
        if name != "tune":
            break
        reward = {row["method"]: row["metrics"]["true_reward"]["mean"] for row in rows}
        wider = suites.widened(suite, reward)
        if wider.rows.keys() == suite.rows.keys():
            best = suites.best_settings(suite, reward).items()
            lines = [f'"{method}" = {{ beta = {row["beta"]:g}, lr = {row["lr"]:g} }}\n' for method, row in best]
            files.write_text(folder / "settings.toml", "".join(lines))
            break
        suite = wider
    settings = vars(c) | SIZES[c.small] | {"stage_seconds": stage_seconds(stages, out)}
    results: dict[str, Any] = {"suite": name, "commit": commit(), "machine": machine(), "seconds": time.time() - began}
    results |= {"worlds": seeds, "rows": rows, "comparisons": comparisons, "settings": settings, "series": suite.series}
    options = {row: " ".join(flags({"lr": LR} | given)) for row, given in suite.rows.items()}
    publish(results | {"claims": claims.judge(results), "options": options}, folder)
    trained, start = cells[next(iter(suite.rows))][0][0].parent / "policy", stages[1].product
    print(f"Go on: open {folder / 'report.html'}; make reproduce SUITE=methods; or talk to a policy and its start:")
    print(f"{os.path.relpath(sys.executable)} -m hps.evaluate.chat --model {trained} --reference {start}")
    if name == "trial":
        show_samples({method: folders[0][0] for method, folders in cells.items()})


def show_samples(evaluations: dict[str, Path], prompts: int = 3) -> None:
    """Print the answers of several evaluations to the same first prompts, one below the other."""
    width = max(map(len, evaluations))
    samples = {name: stream(folder / "samples.jsonl") for name, folder in evaluations.items()}
    for _ in range(prompts):
        rows = {name: next(of) for name, of in samples.items()}
        print(f"\n> {next(iter(rows.values())).prompt[-1]['content']}")
        for name, row in rows.items():
            assert row.rewards is not None  # eval.py had the world's own reward
            print(f"{name:>{width}}: {row.responses[0]} (true reward {row.rewards[0]:.2f})")


def main() -> None:
    c, _ = config.parse(Options, prog="python -m hps.lab.reproduce", description=str(__doc__).split("\n")[0])
    names = [*SUITES, "theory"]
    if c.suite not in (*names, "all", "trial"):
        names = [*names, "all", "trial"]
        raise ValueError(f"unknown suite {c.suite!r}{config.meant(c.suite, names)} Choose one of {', '.join(names)}")
    if c.seeds < 1 or min(c.first_seed, c.jobs) < 0:
        raise ValueError("seeds must be at least 1, first_seed and jobs not negative")
    out = Path(c.out)
    os.chdir(ROOT)
    # For the workers: two threads on two busy cores run slower than one, and models this small gain nothing on a GPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in names if c.suite == "all" else [c.suite]:
        run_suite(c, name, out, out / name if c.suite == "all" else out)
    if c.suite == "all":
        judged = [item for name in SUITES for item in files.read_json(out / name / "results.json")["claims"]]
        parts = ["# The paper's claims", *report.sections(report.claims_tables(claims.decide(judged)))]
        files.write_text(out / "CLAIMS.md", "\n\n".join(parts) + "\n")
        print(out / "CLAIMS.md")


if __name__ == "__main__":
    config.run_main(main)
