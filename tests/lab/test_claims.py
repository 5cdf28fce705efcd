"""claims.py: verdicts on made-up results, worked out by hand, and claims that name rows and metrics that exist."""

import pytest

from hps.evaluate.metrics import METRICS
from hps.lab import claims
from hps.lab.suites import SUITES


def judged(suite, *, rows=None, comparisons=()):
    """claim text -> item, of results with values by world: `rows` is method -> metric -> values, `comparisons` (a, b,
    metric, values)."""
    found = {"suite": suite, "worlds": 3, "rows": [], "comparisons": []}
    for name, metrics in (rows or {}).items():
        each = {metric: {"values": values} for metric, values in metrics.items()}
        found["rows"].append({"method": name, "runs": 3, "metrics": each})
    for a, b, metric, values in comparisons:
        found["comparisons"].append({"a": a, "b": b, "metric": metric, "values": values})
    items = claims.judge(found)
    by_text = {item["claim"]: item for item in items}
    assert len(by_text) == len(items), "a claim stands twice in one table"
    return by_text


TWO = {"DPO-HPS": {}, "DPO-BT": {}}
MARGIN = "DPO-HPS has a larger RM_DPO than DPO-BT"
WORST = "DPO-HPS has a larger RM worst than DPO-BT"
HARM = "DPO-HPS writes less harm than DPO-BT"
BLEU = "DPO-HPS is at most 0.01 of BLEU below DPO-BT"
REWARD = "DPO-HPS is at most 0.1 of best-of-5 reward below DPO-BT"
HOLDS, NOT, OPEN = "holds", "does not hold", "unresolved"
T = 4.302653  # Student's t of two degrees of freedom, 97.5 %
CASES = [  # claim, metric, low, high, verdict
    (MARGIN, "rm_dpo", 0.2, 0.4, HOLDS),
    (MARGIN, "rm_dpo", -0.1, 0.4, OPEN),
    (MARGIN, "rm_dpo", -1e-4, 0.4, OPEN),  # touches
    (MARGIN, "rm_dpo", -0.4, -0.1, NOT),
    (HARM, "harm", -6.0, -2.0, HOLDS),  # less is better
    (HARM, "harm", 2.0, 6.0, NOT),
    (REWARD, "best_of_k_reward", -0.09, -0.02, HOLDS),  # the bound is -0.1, not 0
    (REWARD, "best_of_k_reward", -0.3, -0.11, NOT),
    (BLEU, "bleu_char", -0.009, -0.002, HOLDS),  # the bound is -0.01
    (BLEU, "bleu_char", -0.02, -0.011, NOT),
]


def three(low, high):
    """Values of three worlds whose mean has the 95 % interval [low, high]: their spread s is half sqrt(3) / t."""
    mean, spread = (low + high) / 2, (high - low) / 2 * 3**0.5 / T
    return [mean - spread, mean, mean + spread]


def test_the_intervals_side_of_the_bound_decides():
    for claim, metric, low, high, verdict in CASES:
        item = judged("methods", rows=TWO, comparisons=[("DPO-HPS", "DPO-BT", metric, three(low, high))])[claim]
        assert (item["verdict"], item["after_holm"]) == (verdict, verdict) and item["kind"] == "difference"
        assert (item["low"], item["high"]) == pytest.approx((low, high), abs=1e-5)
        assert item["table"] == claims.TABLES[metric == "harm"] and item["metric"] == metric
    for low, high, positive, negative in ((0.5, 2.0, HOLDS, NOT), (-1.0, 2.0, OPEN, OPEN), (-2.0, -0.5, NOT, HOLDS)):
        metrics = {"rm_dpo": three(low, high)}  # a value, judged by its own interval
        found = judged("headline", rows={"DPO-HPS": metrics, "DPO-PL-8": metrics})
        assert found["DPO-HPS has a positive RM_DPO"]["verdict"] == positive
        assert found["DPO-PL-8 has a negative RM_DPO"]["verdict"] == negative
        assert found["DPO-PL-8 has a negative RM_DPO"]["kind"] == "value"
    for low, high, verdict in ((51, 57, HOLDS), (49, 57, OPEN), (40, 49.5, NOT)):  # half of the samples
        found = judged("headline", rows={"DPO-HPS": {"win": three(low, high)}})
        assert found["DPO-HPS wins more than half of its samples against SFT"]["verdict"] == verdict


def test_one_world_decides_nothing_and_holm_is_by_metric():
    found = judged("methods", rows=TWO, comparisons=[("DPO-HPS", "DPO-BT", "rm_dpo", [3.0])])
    assert (found[MARGIN]["verdict"], found[MARGIN]["low"]) == (OPEN, None)
    rows, other = TWO | {"DPO-PL-8": {}}, MARGIN.replace("BT", "PL-8")
    pairs = [("DPO-HPS", b, "rm_dpo", three(0.02, 1)) for b in ("DPO-BT", "DPO-PL-8")]  # p of 0.04 each
    found = judged("methods", rows=rows, comparisons=pairs)
    assert [(found[x]["verdict"], found[x]["after_holm"]) for x in (MARGIN, other)] == [(HOLDS, OPEN)] * 2
    pairs[1] = ("DPO-HPS", "DPO-BT", "rm_worst_case", three(0.02, 1))
    found = judged("methods", rows=rows, comparisons=pairs)
    assert [(found[x]["verdict"], found[x]["after_holm"]) for x in (MARGIN, WORST)] == [(HOLDS, HOLDS)] * 2


def test_a_claim_of_two_suites_counts_once():
    """As it was measured, whichever suite did; adjusted for what both measure, the paper's metrics first."""
    rows, other = TWO | {"DPO-PL-8": {}}, MARGIN.replace("BT", "PL-8")
    bt, pl = (("DPO-HPS", b, "rm_dpo", three(0.02, 1)) for b in ("DPO-BT", "DPO-PL-8"))
    both = judged("headline", rows=rows, comparisons=[bt, ("DPO-HPS", "DPO-BT", "harm", three(1, 2))])
    merged = claims.decide([*both.values(), *judged("methods", rows=rows, comparisons=[pl]).values()])
    by_text = {item["claim"]: item for item in merged}
    assert len(by_text) == len(merged)
    assert [(by_text[x]["verdict"], by_text[x]["after_holm"]) for x in (MARGIN, other)] == [(HOLDS, OPEN)] * 2
    assert both[MARGIN]["after_holm"] == HOLDS  # of its own suite, which measures one claim on this metric
    assert by_text[HARM]["verdict"] == NOT
    tables = [claims.TABLES.index(item["table"]) for item in merged]
    assert tables == sorted(tables) and set(tables) == {0, 1}


def test_what_is_not_there_is_left_out_or_said():
    found = judged("methods", rows=TWO, comparisons=[("DPO-BT", "DPO-HPS", "rm_dpo", [1, 0.5, 2])])
    assert not any("PL-8" in text or "EXO" in text for text in found)  # no such rows
    assert found[MARGIN]["verdict"] == "not measured here"  # b - a is not a - b
    assert found[MARGIN]["reason"] == "no comparison of RM_DPO of these rows in the results"
    assert found["DPO-HPS has a positive RM_DPO"]["reason"] == "no RM_DPO of these rows in the results"
    people = found["People rate DPO-HPS above DPO-BT, DPO-PL and SFT"]
    assert people.pop("claim") and people == {
        "paper": "Table 3: 3.93 vs 3.82, 3.69, 3.63",
        "table": claims.TABLES[0],
        "verdict": "not measured here",
        "reason": "needs human raters",
    }
    assert judged("schedule", rows=TWO) == {}


def test_cost_is_a_ratio_in_each_world():
    rows = {
        "DPO-HPS": {"train_seconds": [36, 40, 44], "train_tokens": [80, 82, None]},
        "DPO-BT": {"train_seconds": [50, 50, 55], "train_tokens": [80, 80, 80]},
        "DPO-PL-8": {"train_seconds": [150, 150, 160], "train_tokens": [81, 80, 79]},
    }
    found = judged("cost", rows=rows)
    text = "DPO-HPS trains in less than {} times the {} of {}"
    item = found[text.format("1.1", "seconds", "DPO-BT")]
    assert item["values"] == pytest.approx([0.72, 0.8, 0.8]) and item["verdict"] == HOLDS
    assert item["kind"] == "ratio" and item["paper"].endswith(": 64.4 vs 62.8 hours, x 1.03")
    assert found[text.format("1.1", "tokens", "DPO-BT")]["values"] == pytest.approx([1, 82 / 80])  # a world without
    assert found[text.format("0.5", "seconds", "DPO-PL-8")]["verdict"] == HOLDS
    assert found[text.format("0.5", "tokens", "DPO-PL-8")]["verdict"] == NOT
    rows["DPO-BT"]["train_seconds"][1] = 0
    with pytest.raises(ValueError, match="train_seconds of DPO-HPS and DPO-BT must be above 0"):
        judged("cost", rows=rows)


def test_growth_with_n_is_a_difference_of_differences():
    text = "RM_DPO grows more from n 5 to 100 under DPO-HPS than under DPO-BT"
    hps = ("DPO-HPS n 100", "DPO-HPS n 5", "rm_dpo", [2.0, 3.0, 4.0])
    for bt, verdict in (([0.5, 1.4, 2.6], HOLDS), ([0.0, 3.0, 1.0], OPEN), ([4.0, 5.1, 6.1], NOT)):
        pairs = [hps, ("DPO-BT n 100", "DPO-BT n 5", "rm_dpo", bt)]
        rows = {name: {} for pair in pairs for name in pair[:2]}
        found = judged("responses", rows=rows, comparisons=pairs)
        assert found[text]["verdict"] == verdict and found[text]["paper"] == "Table 6: +2.123 vs +0.183"
        assert found[text]["values"] == pytest.approx([a - b for a, b in zip(hps[3], bt, strict=True)])
        assert found["DPO-HPS n 100 has a larger RM_DPO than DPO-HPS n 5"]["verdict"] == HOLDS
        assert judged("responses", rows=rows, comparisons=[hps])[text]["verdict"] == "not measured here"


def test_every_claim_names_what_the_sweep_makes():
    """Rows, metric and comparison are the suite's; each claim speaks for its first row."""
    for claim in claims.CLAIMS:
        assert claim.suites and bool(claim.reason) != bool(claim.metric), claim
        for suite in (SUITES[name]() for name in claim.suites):
            assert claim.rows <= suite.rows.keys(), claim
            if claim.kind == "difference":
                assert set(claim.pairs) <= set(suite.pairs), claim
        if claim.metric:
            assert claim.kind in ("difference", "value", "ratio"), claim
            assert claim.sign == METRICS[claim.metric].better or claim.kind == "value", claim


def test_every_table_of_the_paper_has_its_claims():
    judged_suites = {name for claim in claims.CLAIMS for name in claim.suites}
    assert judged_suites == {
        *("headline", "methods", "confirm", "transfer", "responses", "transfer_responses", "beta", "cost")
    }
    margins = [claim for claim in claims.CLAIMS if claim.metric == "rm_dpo" and claim.kind == "difference"]
    assert sum("methods" in claim.suites for claim in margins) == 5 * 2
    assert sum("headline" in claim.suites for claim in margins) == 2 + 2  # tuned
    assert sum("beta" in claim.suites for claim in margins) == 5
