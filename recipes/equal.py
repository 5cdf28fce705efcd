"""Margins of the runs of recipes/lists.sh at equal KL, at equal length, and over seeds -> OUT/equal.json and tables.

    python recipes/equal.py OUT BASELINE NAME...

Equal KL: the smallest that the chosen settings have on the test prompts. A method's margin there lies between the two
of its settings on either side of it, the reference and the tuning runs among them (`compare.on_frontier`).
Equal length: RM_DPO regressed on the length of the pair's best answer less the other's, over prompts; where that is 0.
Over seeds: of each seed the mean over the prompts, which speaks of other runs and not of other prompts.
All as differences to the reference and to BASELINE, prompt by prompt or seed by seed; 95 % intervals by Student's t.
"""

import sys
from pathlib import Path

import numpy as np

from hps import config
from hps.evaluate import compare, md, metrics
from hps.io import files


def at_equal_length(values: compare.Values, other: compare.Values) -> dict[str, float]:
    """RM_DPO of one row less that of another, at no difference in length: what a straight line through prompts says."""
    ids = list(values["rm_dpo"])
    margins, penalised = (np.array([values[name][id] for id in ids]) for name in ("rm_dpo", "rm_rdpo_tokens"))
    longer = (margins - penalised) / 0.01  # tokens, of the pair's best answer; RM_R-DPO takes off 0.01 for each
    y, x = margins - [other["rm_dpo"][id] for id in ids], longer - longer.mean()
    if len(ids) < 3 or not x.any():
        raise ValueError("three prompts at least, whose pairs differ in length, are needed: take a larger TEST")
    slope = float(x @ y / (x @ x))
    mean = float(y.mean() - slope * longer.mean())
    variance = float(((y - mean - slope * longer) ** 2).sum()) / (len(ids) - 2)
    error = (variance * (1 / len(ids) + float(longer.mean()) ** 2 / float(x @ x))) ** 0.5
    half = float(metrics.extra("scipy.stats").t.ppf(0.975, len(ids) - 2)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    out, baseline, *names = Path(sys.argv[1]), *sys.argv[2:]
    runs = {name: sorted(out.glob(f"{name}/run-*/test")) for name in ["reference", *names]}
    found = {name: compare.per_prompt(folders) for name, folders in runs.items()}

    def kl_of(values: compare.Values) -> float:
        return float(np.mean(list(values["kl_exact"].values())))

    kl, level = min(kl_of(found[name]) for name in names), {"reference": found["reference"]}
    for name in names:
        tuned = [compare.per_prompt([folder]) for folder in out.glob(f"tune/{name}/*/test")]
        level[name] = compare.on_frontier(sorted([found["reference"], *tuned, found[name]], key=kl_of), kl)

    def by_seed(name: str, metric: str) -> np.ndarray:
        tables = [compare.per_prompt([folder])[metric] for folder in runs[name]]
        return np.array([np.mean(list(table.values())) for table in tables])

    def less(name: str, other: str) -> dict[str, dict[str, float]]:
        differences = {"rm_dpo_at_equal_length": at_equal_length(found[name], found[other])}
        for metric in ("rm_dpo", "rm10", "rm_worst_case"):
            mine, theirs = level[name][metric], level[other][metric]
            differences[f"{metric}_at_equal_kl"] = metrics.world_interval([mine[id] - theirs[id] for id in mine])
        for metric in ("rm_dpo", "rm10"):
            differences[f"{metric}_over_seeds"] = metrics.world_interval(by_seed(name, metric) - by_seed(other, metric))
        return differences

    rows = {other: {name: less(name, other) for name in names if name != other} for other in ("reference", baseline)}
    files.write_json(out / "equal.json", {"kl": kl, "less": rows})
    for other, found_rows in rows.items():
        columns = list(next(iter(found_rows.values())))
        cells = [[name, *(md.interval(row[c], 2, "+") for c in columns)] for name, row in found_rows.items()]
        print(f"Less {other}; equal KL: {kl:.2f} nats.\n\n{md.table(['method', *columns], cells)}\n")


if __name__ == "__main__":
    config.run_main(main)
