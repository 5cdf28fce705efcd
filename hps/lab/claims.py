"""What the paper claims in its experiments, beside what our suites measure: claims.csv, and a function that judges.

A line of claims.csv is one claim, with the figures of the paper's Tables 2 to 8 and Section 6 in its column `paper`. It
holds if `sign` times (what is measured - `bound`) is above 0. Measured is, by `kind`, the metric's paired difference
a - b, its value for a, or the ratio of its means a / b; with `less`, "c - d", it is (a - b) - (c - d). `reason` says
why nothing is measured here. What stands for what:
  RM_DPO    rm_dpo, on the labelled pair of each test prompt; RM_R-DPO differs from it by a number that depends on
            the test set alone, so a difference between two methods decides both
  Theorem 3 "the closest dispreferred response": rm2, the runner-up, and rm10, the ten hardest (OURS)
  harm      the paper infers it from the margins; here it is counted in the samples
  Reward    true_reward, another reward than that of training, as the paper's ArmoRM is
  Table 4   win: a sample's true reward against the SFT model's sample; two methods are compared by that share
  PL        contrasts 8 ranks (OURS): rows named -PL-8
The worlds' domain `help` is like HH-RLHF and `safe` like PKU-SafeRLHF. Bounds are OURS: "comparable" BLEU is at most
0.01 lower, the largest loss from BT to HPS that Table 2 calls so (EXO on PKU-SafeRLHF); reward at most 0.1, a third of
what the world pays for an opener, its smallest gain; costs are "about" equal within 1.1 and "far below" under 0.5.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hps.evaluate.metrics import METRICS

Interval = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True)
class Claim:
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

    @property
    def rows(self) -> set[str]:
        """The rows that it needs."""
        return {name for pair in self.pairs for name in pair}


def read(path: Path) -> list[Claim]:
    """The claims of a file like claims.csv."""
    claims = []
    with path.open(encoding="utf-8", newline="") as lines:
        for x in csv.DictReader(lines):
            pairs = [tuple(filter(None, (x["a"], x["b"]))), tuple(filter(None, x["less"].split(" - ")))]
            about = (x["metric"], tuple(filter(None, pairs)), int(x["sign"] or 1), float(x["bound"] or 0), x["kind"])
            claims.append(Claim(x["claim"], x["paper"], tuple(x["suites"].split()), *about, x["reason"]))
    return claims


CLAIMS = read(Path(__file__).with_name("claims.csv"))


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of one suite beside its figures, as report.py's `claims`.

    results: a suite's, as report.py takes them. Verdict: "holds" or "does not hold" if the whole interval lies on one
    side of the claim's bound, "unresolved" if not. A claim whose rows are not there is left out; one whose rows lack
    the numbers is "not measured here", and says so. A ratio has the range over runs for an interval; a difference of
    two differences has the outer bounds of their intervals, wider than a paired one. ValueError: a cost of 0 or less.
    """
    rows = {row["method"]: row["metrics"] for row in results["rows"]}
    differences = {(x["a"], x["b"], x["metric"]): x for x in results.get("comparisons", [])}
    found = []
    for claim in CLAIMS:
        if results["suite"] not in claim.suites or not claim.rows <= rows.keys():
            continue
        item = {"claim": claim.text, "paper": claim.paper}
        interval = None if claim.reason else measure(claim, rows, differences)
        if interval is None:
            compared = "comparison of " if claim.kind == "difference" else ""
            reason = claim.reason or f"no {compared}{METRICS[claim.metric].title} of these rows in the results"
            found.append(item | {"verdict": "not measured here", "reason": reason})
            continue
        mean, low, high = interval
        worst, best = sorted(claim.sign * (end - claim.bound) for end in (low, high))
        verdict = "holds" if worst > 0 else "does not hold" if best < 0 else "unresolved"
        item |= {"verdict": verdict, "kind": claim.kind, "metric": claim.metric}
        found.append(item | {"mean": mean, "low": low, "high": high})
    return found


def measure(claim: Claim, rows: dict[str, Any], differences: dict[tuple[str, ...], Any]) -> Interval | None:
    """What decides the claim, with its interval; None where a number is missing."""
    if claim.kind == "difference":
        found = [differences.get((*pair, claim.metric)) for pair in claim.pairs]
    else:
        found = [rows[name].get(claim.metric) for name in claim.pairs[0]]
    present = [x for x in found if x is not None]
    if len(present) < len(found):
        return None
    (mean, low, high), *second = [(x["mean"], x["low"], x["high"]) for x in present]
    if not second:
        return mean, low, high
    other, other_low, other_high = second[0]
    if claim.kind == "difference":
        return mean - other, low - other_high, high - other_low
    if min(low, other_low) <= 0:
        rows_named = " and ".join(claim.pairs[0])
        raise ValueError(f"{claim.metric} of {rows_named} must be above 0: a run without cost was not a run")
    return mean / other, low / other_high, high / other_low
