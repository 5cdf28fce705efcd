"""What the paper claims in its experiments, beside what our suites measure: data, and one function that judges.

Figures are those of the paper's Tables 2 to 8 and Section 6. What stands for what here:
  RM_DPO    rm_dpo, on the labelled pair of each test prompt; RM_R-DPO differs from it by a number that depends on
            the test set alone, so a difference between two methods decides both
  Theorem 3 "the closest dispreferred response": rm2, the runner-up, and rm10, the ten hardest (OURS)
  harm      the paper infers it from the margins; here it is counted in the samples
  Reward    true_reward, another reward than that of training, as the paper's ArmoRM is
  Table 4   win: a sample's true reward against the SFT model's sample; two methods are compared by that share
  PL        contrasts 8 ranks (OURS): rows named -PL-8
The worlds' domain `help` is like HH-RLHF and `safe` like PKU-SafeRLHF. The bounds of "comparable" and "about" are OURS.
"""

from dataclasses import dataclass
from typing import Any

from hps.evaluate.metrics import METRICS

# Tables 2 (fine-tuning) and 5 (transfer): BLEU, Reward and RM_DPO on HH-RLHF, then on PKU-SafeRLHF.
TABLE_2 = {
    "DPO-PL": (0.230, 0.430, -0.795, 0.305, 0.412, -6.852),
    "DPO-BT": (0.230, 0.431, 0.349, 0.306, 0.417, -5.441),
    "DPO-HPS": (0.232, 0.430, 2.723, 0.306, 0.407, -5.359),
    "EXO-PL": (0.232, 0.432, -0.724, 0.303, 0.409, -5.455),
    "EXO-BT": (0.231, 0.430, 0.816, 0.324, 0.421, -5.553),
    "EXO-HPS": (0.232, 0.432, 1.079, 0.314, 0.425, -5.495),
    "IPO-PL": (0.223, 0.429, -5.199, 0.309, 0.401, -66.337),
    "IPO-BT": (0.232, 0.428, -0.382, 0.310, 0.405, -23.070),
    "IPO-HPS": (0.231, 0.424, -0.321, 0.308, 0.406, -21.607),
    "SPPO-PL": (0.225, 0.430, -7.630, 0.297, 0.413, -67.474),
    "SPPO-BT": (0.231, 0.432, -0.978, 0.297, 0.433, -13.442),
    "SPPO-HPS": (0.231, 0.432, -0.969, 0.298, 0.435, -5.273),
    "NCA-PL": (0.221, 0.431, -5.760, 0.300, 0.411, -70.910),
    "NCA-BT": (0.229, 0.432, -1.702, 0.305, 0.410, -5.135),
    "NCA-HPS": (0.231, 0.432, -0.822, 0.304, 0.411, -5.109),
}
TABLE_5 = {  # its other losses are not trained in the suite `transfer`
    "DPO-PL": (0.219, 0.435, -5.122, 0.307, 0.407, 0.144),
    "DPO-BT": (0.219, 0.437, -5.053, 0.308, 0.407, 1.346),
    "DPO-HPS": (0.219, 0.438, -4.816, 0.310, 0.407, 5.725),
}
TABLE_4 = {  # DPO-HPS against: (win, lose) on HH-RLHF, then on PKU-SafeRLHF, in per cent
    "SFT": (63.875, 13.225, 67.100, 5.150),
    "DPO-BT": (58.712, 13.600, 56.100, 11.150),
    "DPO-PL": (57.612, 13.875, 57.650, 10.350),
}
TABLE_6 = {  # responses a prompt: BLEU, Reward and RM_DPO of DPO-BT, then of DPO-HPS, on HH-RLHF
    5: (0.229, 0.432, 0.166, 0.229, 0.431, 0.600),
    20: (0.231, 0.430, 0.227, 0.224, 0.432, 0.822),
    50: (0.230, 0.431, 0.279, 0.230, 0.431, 1.645),
    100: (0.230, 0.431, 0.349, 0.232, 0.430, 2.723),
}
TABLE_8 = {  # beta: KL and RM_R-DPO of DPO-BT, then of DPO-HPS, on HH-RLHF
    0.1: (8.463, -0.455, 11.767, 2.040),
    0.25: (5.888, -1.188, 6.972, -0.828),
    0.5: (2.661, -1.022, 3.091, -0.911),
    0.75: (2.996, -1.046, 2.192, -0.925),
    1.0: (2.043, -1.990, 2.015, -1.178),
}
HOURS = {"DPO-BT": 62.8, "DPO-HPS": 64.4, "DPO-PL": 168.4}  # Section 6, Implementation: GPU hours of fine-tuning

BLEU_LOSS = 0.01  # the largest that Table 2 has from BT to HPS and the paper calls comparable (EXO on PKU-SafeRLHF)
REWARD_LOSS = 0.1  # a third of what the world's true reward pays for an opener, its smallest gain
ABOUT, FAR_BELOW = 1.1, 0.5  # of another's cost; the paper's ratios are 1.03 and .38

FINE_TUNING = ("headline", "methods")


@dataclass(frozen=True)
class Claim:
    """`sign` times (what is measured - `bound`) is above 0 if the claim holds.

    Measured is, by `kind`, the metric's paired difference a - b, its value for a, or the ratio of its means a / b.
    `less`: a second pair (c, d), and measured is (a - b) - (c - d). `reason`: why nothing is measured here.
    """

    text: str
    where: str  # in the paper
    figures: str  # the paper's own; empty where it gives none
    suites: tuple[str, ...]
    metric: str = ""
    a: str = ""
    b: str = ""
    sign: int = 1
    bound: float = 0.0
    kind: str = "difference"
    less: tuple[str, str] | None = None
    reason: str = ""

    @property
    def rows(self) -> set[str]:
        """The rows that it needs."""
        return {self.a, self.b, *(self.less or ())} - {""}


def ours(method: str) -> str:
    """The paper's name of a method -> the suites'."""
    return f"{method}-8" if method.endswith("-PL") else method


def both_sets(table: dict[str, tuple[float, ...]], a: str, b: str, column: int) -> str:
    """The paper's figures of a and b on its two data sets."""
    of_a, of_b = table[a], table[b]
    return f"HH {of_a[column]:.3f} vs {of_b[column]:.3f}, PKU {of_a[column + 3]:.3f} vs {of_b[column + 3]:.3f}"


def larger_margin(metric: str, a: str, b: str, where: str, figures: str, *suites: str) -> Claim:
    return Claim(f"{a} has a larger {METRICS[metric].title} than {b}", where, figures, suites, metric, a, b)


def less_harm(a: str, b: str, where: str, *suites: str) -> Claim:
    return Claim(f"{a} writes less harm than {b}", where, "", suites, "harm", a, b, sign=-1)


def no_worse(a: str, b: str, where: str, bleu: str, reward: str, *suites: str) -> list[Claim]:
    """Comparable BLEU and Reward, read as: at most a small loss."""
    return [
        Claim(
            f"{a} is at most {BLEU_LOSS:g} of BLEU below {b}", where, bleu, suites, "bleu_char", a, b, bound=-BLEU_LOSS
        ),
        Claim(
            f"{a} is at most {REWARD_LOSS:g} of reward below {b}",
            where,
            reward,
            suites,
            "true_reward",
            a,
            b,
            bound=-REWARD_LOSS,
        ),
    ]


def fine_tuning() -> list[Claim]:
    """Section 6.1 and Tables 2 to 4."""
    margins, hardest, harm, quality, signs = [], [], [], [], []
    for loss in ("DPO", "EXO", "IPO", "SPPO", "NCA"):
        hps, suites = f"{loss}-HPS", FINE_TUNING if loss == "DPO" else FINE_TUNING[1:]
        for base in (f"{loss}-BT", f"{loss}-PL"):
            a, b = hps, ours(base)
            margins.append(larger_margin("rm_dpo", a, b, "Table 2", both_sets(TABLE_2, hps, base, 2), *suites))
            hardest += [larger_margin(m, a, b, "Sec. 6.1, Theorem 3", "", *suites) for m in ("rm2", "rm10")]
            harm.append(less_harm(a, b, "Sec. 6.1", *suites))
        base = f"{loss}-BT"
        figures = (both_sets(TABLE_2, hps, base, column) for column in (0, 1))
        quality += no_worse(hps, base, "Table 2", *figures, *suites)
    for method, sign, suites in (
        ("DPO-HPS", 1, FINE_TUNING),
        ("DPO-PL", -1, FINE_TUNING),
        ("SPPO-PL", -1, FINE_TUNING[1:]),
        ("SPPO-BT", -1, FINE_TUNING[1:]),
    ):
        row, word = ours(method), "positive" if sign > 0 else "negative"
        figures = f"HH {TABLE_2[method][2]:.3f}, PKU {TABLE_2[method][5]:.3f}"
        signs.append(
            Claim(
                f"{row} has a {word} RM_DPO",
                "Sec. 6.1, Table 2",
                figures,
                suites,
                "rm_dpo",
                row,
                sign=sign,
                kind="value",
            )
        )
    wins = []
    for other, (hh_win, hh_lose, pku_win, pku_lose) in TABLE_4.items():
        figures = f"win : lose, HH {hh_win:.3f} : {hh_lose:.3f}, PKU {pku_win:.3f} : {pku_lose:.3f}"
        if other == "SFT":
            wins.append(
                Claim(
                    "DPO-HPS wins more than half of its samples against SFT",
                    "Table 4",
                    figures,
                    FINE_TUNING,
                    "win",
                    "DPO-HPS",
                    bound=50.0,
                    kind="value",
                )
            )
        else:
            row = ours(other)
            wins.append(
                Claim(
                    f"DPO-HPS wins more often against SFT than {row}",
                    "Table 4",
                    figures,
                    FINE_TUNING,
                    "win",
                    "DPO-HPS",
                    row,
                )
            )
    absent = [
        Claim(
            "People rate DPO-HPS above DPO-BT, DPO-PL and SFT",
            "Table 3",
            "3.93 vs 3.82, 3.69, 3.63",
            FINE_TUNING,
            reason="needs human raters",
        ),
        Claim(
            "Qwen2.5-72B-Instruct prefers DPO-HPS",
            "Table 4",
            "about 60 % wins",
            FINE_TUNING,
            reason="needs that judge; the lines on wins compare true rewards",
        ),
        Claim(
            "The margin grows by 89 % on average, from DPO-PL by 442.51 %",
            "Sec. 1 and 6.1",
            "",
            FINE_TUNING,
            reason="a percentage of a margin that can be negative says nothing; its differences are judged",
        ),
    ]
    return margins + signs + hardest + harm + quality + wins + absent


def transfer() -> list[Claim]:
    """Section 6.2 and Table 5: trained on the one domain, tested on the other; `help to safe` is its PKU column."""
    claims = []
    for course, column in (("help to safe", 3), ("safe to help", 0)):
        of_set = {method: values[column : column + 3] for method, values in TABLE_5.items()}
        name, a = "PKU" if column else "HH", f"DPO-HPS {course}"
        for base in ("DPO-BT", "DPO-PL"):
            bleu, reward, margin = (
                f"{name} {x:.3f} vs {y:.3f}" for x, y in zip(of_set["DPO-HPS"], of_set[base], strict=True)
            )
            b = f"{ours(base)} {course}"
            claims.append(larger_margin("rm_dpo", a, b, "Table 5", margin, "transfer"))
            claims.append(larger_margin("rm10", a, b, "Sec. 6.2", "", "transfer"))
            if course == "help to safe":
                claims.append(less_harm(a, b, "Sec. 6.2", "transfer"))
            claims += no_worse(a, b, "Table 5", bleu, reward, "transfer")
    absent = [
        (
            "EXO-, IPO-, SPPO- and NCA-HPS have larger margins than their BT and PL",
            "Table 5",
            "so in all but NCA on HH, -5.378 vs -4.673 of BT",
            "only DPO is trained for transfer",
        ),
        (
            "EXO-HPS has a larger RM_DPO in transfer than fine-tuned",
            "Sec. 6.2",
            "PKU 2.903 vs -5.495",
            "only DPO is trained for transfer",
        ),
        (
            "The margin grows by 83 % on average",
            "Sec. 1",
            "",
            "a percentage of a margin that can be negative says nothing; its differences are judged",
        ),
    ]
    return claims + [Claim(text, where, figures, ("transfer",), reason=why) for text, where, figures, why in absent]


def responses() -> list[Claim]:
    """Section 6.3 and Table 6."""
    claims, suite = [], "responses"
    for n, values in TABLE_6.items():
        a, b = f"DPO-HPS n {n}", f"DPO-BT n {n}"
        claims.append(larger_margin("rm_dpo", a, b, "Table 6", f"{values[5]:.3f} vs {values[2]:.3f}", suite))
        claims.append(larger_margin("rm10", a, b, "Sec. 6.3", "", suite))
    few, many = TABLE_6[5], TABLE_6[100]
    for method, start in (("DPO-HPS", 3), ("DPO-BT", 0)):
        bleu, reward, margin = (f"{many[i]:.3f} vs {few[i]:.3f}" for i in range(start, start + 3))
        a, b = f"{method} n 100", f"{method} n 5"
        claims.append(larger_margin("rm_dpo", a, b, "Table 6", margin, suite))
        claims.append(larger_margin("rm10", a, b, "Sec. 6.3", "", suite))
        claims += no_worse(a, b, "Table 6", bleu, reward, suite)
    grown = f"{many[5] - few[5]:+.3f} vs {many[2] - few[2]:+.3f}"
    claims += [
        Claim(
            f"{METRICS[metric].title} grows more from n 5 to 100 under DPO-HPS than under DPO-BT",
            where,
            figures,
            (suite,),
            metric,
            "DPO-HPS n 100",
            "DPO-HPS n 5",
            less=("DPO-BT n 100", "DPO-BT n 5"),
        )
        for metric, where, figures in (("rm_dpo", "Table 6", grown), ("rm10", "Sec. 6.3", ""))
    ]
    table_7 = "PKU, n 5 to 100: HPS 1.191 to 5.725, BT 0.856 to 1.346"
    why = "the suite varies the number of candidates without transfer"
    return [*claims, Claim("The same holds under transfer", "Table 7", table_7, (suite,), reason=why)]


def beta() -> list[Claim]:
    """Appendix C.2 and Table 8: the largest RM_R-DPO at every beta."""
    claims = []
    for strength, (bt_kl, bt_margin, kl, margin) in TABLE_8.items():
        a, b = f"DPO-HPS beta {strength:g}", f"DPO-BT beta {strength:g}"
        figures = f"RM_R-DPO {margin:.3f} vs {bt_margin:.3f} at KL {kl:.3f} vs {bt_kl:.3f}"
        claims.append(larger_margin("rm_dpo", a, b, "Table 8", figures, "beta"))
        claims.append(larger_margin("rm10", a, b, "App. C.2", "", "beta"))
    return claims


def cost() -> list[Claim]:
    """Section 6, Implementation: the hours of fine-tuning, here in seconds and in packed tokens."""
    claims = []
    for other, bound in (("DPO-BT", ABOUT), ("DPO-PL", FAR_BELOW)):
        figures = f"{HOURS['DPO-HPS']:g} vs {HOURS[other]:g} hours, x {HOURS['DPO-HPS'] / HOURS[other]:.2f}"
        for metric, unit in (("train_seconds", "seconds"), ("train_tokens", "tokens")):
            text = f"DPO-HPS trains in less than {bound:g} times the {unit} of {ours(other)}"
            claims.append(
                Claim(
                    text,
                    "Sec. 6, Implementation",
                    figures,
                    ("cost",),
                    metric,
                    "DPO-HPS",
                    ours(other),
                    sign=-1,
                    bound=bound,
                    kind="ratio",
                )
            )
    return claims


CLAIMS = [*fine_tuning(), *transfer(), *responses(), *beta(), *cost()]

Interval = tuple[float, float, float]  # mean, low, high


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of one suite beside its figures, as report.py's `claims`.

    results: a suite's, by report.py's schema. Verdict: "holds" or "does not hold" if the whole interval lies on one
    side of the claim's bound, "unresolved" if not. A claim whose rows are not there is left out; one whose rows lack
    the numbers is "not measured here", and says so. A ratio has the range over runs for an interval; a difference of
    two differences has the outer bounds of their intervals, wider than a paired one. ValueError: a cost of 0 or less.
    """
    rows = {row["method"]: row["metrics"] for row in results["rows"]}
    found = []
    for claim in CLAIMS:
        if results["suite"] not in claim.suites or not claim.rows <= rows.keys():
            continue
        item = {"claim": claim.text, "paper": f"{claim.where}: {claim.figures}" if claim.figures else claim.where}
        interval = None if claim.reason else measure(claim, rows, results.get("comparisons", []))
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


def measure(claim: Claim, rows: dict[str, Any], comparisons: list[dict[str, Any]]) -> Interval | None:
    """What decides the claim, with its interval; None where a number is missing."""

    def difference(a: str, b: str) -> Interval | None:
        for item in comparisons:
            if (item["a"], item["b"], item["metric"]) == (a, b, claim.metric):
                return item["mean"], item["low"], item["high"]
        return None

    if claim.kind == "difference":
        first = difference(claim.a, claim.b)
        if claim.less is None or first is None:
            return first
        second = difference(*claim.less)
        return None if second is None else (first[0] - second[0], first[1] - second[2], first[2] - second[1])
    a = rows[claim.a].get(claim.metric)
    if claim.kind == "value":
        return None if a is None else (a["mean"], a["low"], a["high"])
    b = rows[claim.b].get(claim.metric)
    if a is None or b is None:
        return None
    if min(a["low"], b["low"]) <= 0:
        raise ValueError(f"{claim.metric} of {claim.a} and {claim.b} must be above 0: a run without cost was not a run")
    return a["mean"] / b["mean"], a["low"] / b["high"], a["high"] / b["low"]
