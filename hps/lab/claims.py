"""What the paper claims in its experiments, beside what our suites measure: claims.csv, and a function that judges.

A line of claims.csv is one claim, with the figures of the paper's Tables 2 to 8 and Section 6 in its column `paper`. It
holds if `sign` times (what is measured - `bound`) is above 0. Measured is, by `kind` and in each world, the metric's
paired difference a - b, its value for a, or the ratio a / b; with `less`, "c - d", it is (a - b) - (c - d). `reason`
says why nothing is measured here. What stands for what, in the paper's own metrics:
  RM_DPO     rm_dpo, on the labelled pair of each test prompt; RM_R-DPO differs from it by a number that depends on
             the test set alone, so a difference between two methods decides both, and counts once
  Theorem 3  rm_worst_case: the best response above whichever dispreferred one has the largest log-ratio
  Reward     best_of_k_reward of five samples, by another reward than that of training, as the paper's ArmoRM is
  Table 4    lead: a's samples against b's of the same number, by true reward; against SFT the share that wins
  PL         contrasts 8 ranks (OURS): rows named -PL-8
Ours are RM10, and harm and junk, which are counted in the samples; the paper infers harm from the margins. What the
paper says of methods at one setting is asked once more of each method at its own beta and lr, in a table of its own.
The worlds' domain `help` is like HH-RLHF and `safe` like PKU-SafeRLHF. Bounds are OURS: "comparable" BLEU is at most
0.01 lower, the largest loss from BT to HPS that Table 2 calls so (EXO on PKU-SafeRLHF); reward at most 0.1, a third of
what the world pays for an opener, its smallest gain; costs are "about" equal within 1.1 and "far below" under 0.5.
"""

import csv
from pathlib import Path
from typing import Any, NamedTuple

from hps.evaluate.metrics import METRICS, adjust, world_interval, world_p
from hps.lab.suites import TUNED

OURS = ("rm10", "harm", "junk")
TABLES = ("The paper's claims, by its own metrics", "Its claims, by metrics of ours")
TABLES += ("Its claims, with each method at its own beta and lr",)


class Claim(NamedTuple):
    """A line of claims.csv."""

    text: str
    paper: str  # where it stands, and the paper's own figures where it gives some
    suites: tuple[str, ...]
    metric: str
    pairs: tuple[tuple[str, ...], ...]  # rows (a, b) or (a,), and those of `less`
    sign: int
    bound: float
    kind: str
    reason: str

    @classmethod
    def of(cls, x: dict[str, str]) -> "Claim":
        pairs = [tuple(filter(None, (x["a"], x["b"]))), tuple(filter(None, x["less"].split(" - ")))]
        about = (x["metric"], tuple(filter(None, pairs)), int(x["sign"] or 1), float(x["bound"] or 0), x["kind"])
        return cls(x["claim"], x["paper"], tuple(x["suites"].split()), *about, x["reason"])

    @property
    def rows(self) -> set[str]:
        """The rows that it needs."""
        return {name for pair in self.pairs for name in pair}

    @property
    def table(self) -> str:
        return TABLES[2 if any(name.endswith(TUNED) for name in self.rows) else self.metric in OURS]

    def tuned(self) -> "Claim":
        """The same of the rows with settings of their own."""
        pairs = tuple(tuple(name + TUNED for name in pair) for pair in self.pairs)
        suites = ("confirm", *({"headline"} & {*self.suites}))
        return self._replace(text=f"{self.text}, each tuned", suites=suites, pairs=pairs)


with Path(__file__).with_name("claims.csv").open(encoding="utf-8", newline="") as lines:
    CLAIMS = [Claim.of(line) for line in csv.DictReader(lines)]
CLAIMS += [claim.tuned() for claim in CLAIMS if claim.pairs and {"headline", "methods"} & {*claim.suites}]


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of one suite beside its figures, as report.py's `claims`, those by the paper's metrics first.

    results: a suite's, as report.py takes them. Verdict: "holds" or "does not hold" if the interval over worlds lies on
    one side of the claim's bound, "unresolved" if not; `after_holm` the same by p adjusted for the measured claims of
    its metric. A claim whose rows are not there is left out; one whose rows lack the numbers is "not measured
    here", and says so. ValueError: a cost of 0 or less.
    """
    rows = {row["method"]: row["metrics"] for row in results["rows"]}
    differences = {(x["a"], x["b"], x["metric"]): x for x in results.get("comparisons", [])}
    items = []
    for claim in CLAIMS:
        if results["suite"] not in claim.suites or not claim.rows <= rows.keys():
            continue
        numbers = [] if claim.reason else measure(claim, rows, differences)
        found: dict[str, Any] = {"claim": claim.text, "paper": claim.paper, "table": claim.table}
        if numbers:
            found |= {"kind": claim.kind, "metric": claim.metric, **world_interval(numbers), "values": numbers}
            found |= {"p": world_p(numbers, claim.bound), "right": claim.sign * (found["mean"] - claim.bound) > 0}
        else:
            compared = "comparison of " if claim.kind == "difference" else ""
            reason = claim.reason or f"no {compared}{METRICS[claim.metric].title} of these rows in the results"
            found |= {"verdict": "not measured here", "reason": reason}
        items.append(found)
    return decide(items)


def decide(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The claims with their verdicts, those by the paper's metrics first; of several suites each claim stands once, as
    it was measured. What is given stays as it is: a suite's own verdicts are adjusted for its own claims."""
    once = {found["claim"]: {**found} for found in sorted(items, key=lambda found: "p" in found)}
    items = sorted(once.values(), key=lambda found: (TABLES.index(found["table"]), "p" not in found))
    measured = [found for found in items if "p" in found]
    for table in TABLES:
        adjust([found for found in measured if found["table"] == table])
    for found in measured:
        side = "holds" if found["right"] else "does not hold"
        found["verdict"] = side if found["p"] < 0.05 else "unresolved"
        found["after_holm"] = side if found["p_holm"] < 0.05 else "unresolved"
    return items


def measure(claim: Claim, rows: dict[str, Any], differences: dict[tuple[str, ...], Any]) -> list[float]:
    """What decides the claim, one number per world; none where a row or a comparison is missing."""
    sides: list[Any]
    if claim.kind == "difference":
        sides = [differences.get((*pair, claim.metric)) for pair in claim.pairs]
    else:
        sides = [rows[name].get(claim.metric) for name in claim.pairs[0]]
    if None in sides:
        return []
    worlds = [numbers for numbers in zip(*(side["values"] for side in sides)) if None not in numbers]
    if claim.kind != "ratio":
        return [first - sum(less) for first, *less in worlds]
    if any(cost <= 0 for numbers in worlds for cost in numbers):
        rows_named = " and ".join(claim.pairs[0])
        raise ValueError(f"{claim.metric} of {rows_named} must be above 0: a run without cost was not a run")
    return [a / b for a, b in worlds]
