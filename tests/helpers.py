"""What several test files need: a results file of a report."""

import math


def interval(mean, low, high):
    return {"mean": mean, "low": low, "high": high}


def results(sft="SFT", bt="DPO-BT", hps="HPS|x"):
    """A results file of three methods, by names that may be hostile."""
    steps = list(range(1, 41))
    columns = {  # of the three methods
        "rm2": [(0, 0, 0), (0.512, 0.3, 0.7), (0.6, 0.45, 0.77)],
        "kl_exact": [(0, 0, 0), (6.1, 5.5, 6.6), (5.2, 4.9, 5.6)],
        "harm": [(32.7, 30, 35), (2.84, 2, 4), (3.6, 3, 4)],
        "true_reward": [(0.59, 0.5, 0.7), (1.14, 1.0, 1.3), (1.78, 1.6, 1.9)],
        "length": [(17, 16, 18), (19, 18, 20), (18, 17, 19)],
        "win": [None, (54.5, 51, 57), (70.25, 68, 73)],
    }
    rows = []
    for i, (method, seeds) in enumerate(((sft, 1), (bt, 3), (hps, 3))):
        found = {name: interval(*column[i]) for name, column in columns.items() if column[i]}
        rows.append({"method": method, "seeds": seeds, "metrics": found})
    claims = [  # text, the paper's figure, verdict, kind, metric, numbers
        ("a < b", "Table 2: 1 vs 2", "holds", "difference", "true_reward", (0.641, 0.5, 0.8)),
        ("c|d", "Table 3", "does not hold", "value", "harm", (3.6, 3, 4)),
        ("as cheap", "Sec. 6: x 1.03", "unresolved", "ratio", "train_tokens", (1.016, 0.96, 1.16)),
        ("a constant", "Sec. 6", "holds", "difference", "harm", (-2, -2, -2)),
    ]
    keys = ("claim", "paper", "verdict", "kind", "metric")
    unmeasured = {"claim": "people like it", "paper": "Table 3: 3.93", "verdict": "not measured here"}
    return {
        "suite": "tiny",
        "commit": "abc1234",
        "machine": "two cores",
        "seconds": 90.0,
        "settings": {"beta": 0.1, "prompts": 300},
        "rows": rows,
        "comparisons": [
            {"a": hps, "b": bt, "metric": "true_reward", **interval(0.64, 0.5, 0.8), "p": 0.00321},
            {"a": hps, "b": bt, "metric": "rm2", **interval(-0.001, -0.2, 0.2)},
            {"a": hps, "b": sft, "metric": "harm", **interval(-29.1, -32, -26)},
        ],
        "curves": {
            method: {
                "step": steps,
                "loss": [scale * math.exp(-0.1 * s) for s in steps],
                "margin": [scale * s for s in steps],
            }
            for method, scale in ((bt, 0.7), (hps, 9))
        },
        "schedule": {
            "step": steps,
            "gamma": [-5.0 + s // 8 for s in steps],
            "effective_negatives": [2.0 + s for s in steps],
        },
        "series": {
            "strength": {
                "x": {"metric": "kl_exact"},
                "panels": ["rm2", "junk", "true_reward"],
                "lines": {"down": [hps, bt, sft], "one": [bt]},
            },
            "n": {
                "x": {"label": "candidates", "values": {bt: 5, hps: 20.5}},
                "panels": ["win"],
                "lines": {"up": [bt, hps]},
            },
        },
        "claims": [dict(zip(keys, claim)) | interval(*numbers) for *claim, numbers in claims]
        + [unmeasured | {"reason": "needs human raters"}],
    }
