"""Margins of the runs of recipes/lists.sh at equal KL to the reference, and at equal length -> OUT/equal.json, a table.

    python recipes/equal.py OUT BASELINE NAME...

Equal KL: the smallest that the chosen settings have on the test prompts. A method's margin there lies between the two
of its settings on either side of it, the reference and the tuning runs among them (`compare.on_frontier`).
Equal length: RM_DPO regressed on the length of the pair's best answer less the other's, over prompts; where that is 0.
Differences are to BASELINE, prompt by prompt; 95 % intervals by Student's t over prompts.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import stats

from hps import config
from hps.evaluate import compare, md, metrics
from hps.io import files


def at_equal_length(values: compare.Values, other: compare.Values) -> dict[str, float]:
    """RM_DPO of one row less that of another, at no difference in length: what a straight line through prompts says."""
    ids = list(values["rm_dpo"])
    margins, scaled = (np.array([values[name][id] for id in ids]) for name in ("rm_dpo", "rm_rdpo_tokens"))
    x, y = (
        (margins - scaled) / 0.01,
        margins - [other["rm_dpo"][id] for id in ids],
    )  # tokens by which the best is longer
    spread, free = float(((x - x.mean()) ** 2).sum()), len(ids) - 2
    slope = float((x - x.mean()) @ y) / spread
    mean = float(y.mean() - slope * x.mean())
    variance = float(((y - mean - slope * x) ** 2).sum()) / free * (1 / len(ids) + float(x.mean()) ** 2 / spread)
    half = float(stats.t.ppf(0.975, free)) * variance**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    out, baseline, *names = Path(sys.argv[1]), *sys.argv[2:]
    found = {name: compare.per_prompt(sorted(out.glob(f"{name}/run-*/test"))) for name in ["reference", *names]}
    lines = {}
    for name in names:
        tuned = [compare.per_prompt([folder]) for folder in out.glob(f"tune/{name}/*/test")]
        some = [found["reference"], *tuned, found[name]]
        lines[name] = sorted(some, key=lambda values: np.mean(list(values["kl_exact"].values())))
    kl = min(float(np.mean(list(found[name]["kl_exact"].values()))) for name in names)
    level = {name: compare.on_frontier(lines[name], kl) for name in names}
    rows, zeros = {}, found["reference"]
    for name in names:
        rows[name] = {"rm_dpo_at_equal_length": at_equal_length(found[name], zeros)}
        if name != baseline:
            rows[name]["rm_dpo_at_equal_length_difference"] = at_equal_length(found[name], found[baseline])
        for metric in ("rm_dpo", "rm10", "rm_worst_case"):
            mine, theirs = level[name][metric], level[baseline][metric]
            rows[name][f"{metric}_at_equal_kl"] = metrics.world_interval(list(mine.values()))
            if name != baseline:
                difference = [mine[id] - theirs[id] for id in mine]
                rows[name][f"{metric}_at_equal_kl_difference"] = metrics.world_interval(difference)
    files.write_json(out / "equal.json", {"kl": kl, "baseline": baseline, "rows": rows})
    columns = list(rows[next(name for name in names if name != baseline)])
    cells = [[name, *(md.interval(row[c], 2) if c in row else "-" for c in columns)] for name, row in rows.items()]
    print(f"At a KL of {kl:.2f} nats; differences to {baseline}.\n\n{md.table(['method', *columns], cells)}")


if __name__ == "__main__":
    config.run_main(main)
