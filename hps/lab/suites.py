"""The comparisons of the sweep as tables: row name -> options of train.py. Read and edit these; nothing else decides.

A suite is made by a function without arguments; `SUITES` holds them by name. Options of a row stand beside those of
configs/world.toml. What was chosen here by looking at results was chosen on validation prompts (suite `tune`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Row = dict[str, Any]  # options of train.py, `method` among them

LR = 2e-4  # of every row that names no other
# Standardised rewards times .5: on raw ones gamma = -5 .. 5 is nearly an argmax (docs/RESULTS.md). Our choice.
SCALED = {"reward_norm": "zscore", "reward_scale": 0.5}
LOSSES = ("dpo", "exo", "ipo", "sppo", "nca")
VIEWS: dict[str, tuple[str, Row]] = {  # as rows are named: view of train.py and its options
    "BT": ("bt", {}),
    "PL-8": ("pl", {"pl_responses": 8}),
    "uniform": ("uniform", {}),
    "HPS": ("hps", SCALED),
}
N = {"n_factor": "n_minus_one"}


def row(loss: str, view: str, **more: Any) -> Row:
    """Options of the method with this loss and a view of `VIEWS`."""
    name, options = VIEWS[view]
    return {"method": f"{loss}-{name}", **options, **more}


@dataclass(frozen=True)
class Suite:
    """`rows`: what is trained. `pairs`: rows that are compared, a - b. `domain`: of the worlds.

    `prompts`: row -> (training, test) prompts where these are not ("train", the suite's `split`); in a world of `both`
    domains "train-help" and the like are the prompts of one.
    `noise`: row -> standard deviation of the training reward's noise where it is not the world's own.
    `series`: figures of lines through rows, as `report` draws them.
    `repeats`: preference runs of a row in each world. `later`: how far its worlds lie behind those of other suites.
    `worlds`: at most so many.
    """

    rows: dict[str, Row]
    pairs: list[tuple[str, str]]
    domain: str = "safe"
    split: str = "test"
    prompts: dict[str, tuple[str, str]] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    repeats: int = 1
    later: int = 0
    worlds: int | None = None


# The samplers of ours that stand beside the paper's, at BT's cost, and the row that the search settled on.
BEST: Row = row("nca", "uniform", lr=1.6e-3, **N)
OURS: dict[str, Row] = {
    "DPO-HPS mixture": row("dpo", "HPS", gamma_schedule="mixture"),
    "NCA-uniform N tuned": BEST,
}


def headline() -> Suite:
    """The question of the paper, with the control that it lacks: a uniformly drawn dispreferred response."""
    rows = {f"DPO-{view}": row("dpo", view) for view in ("BT", "PL-8", "uniform", "HPS")}
    rows |= {"DPO-HPS raw": {"method": "dpo-hps"}, **OURS}
    paper = [("DPO-HPS", other) for other in ("DPO-BT", "DPO-PL-8", "DPO-uniform", "DPO-HPS raw")]
    others = ("DPO-BT", "DPO-PL-8", "DPO-uniform", "DPO-HPS")
    return Suite(rows, paper + [("NCA-uniform N tuned", other) for other in others])


def methods() -> Suite:
    """The paper's Table 2: five losses under three preference models."""
    rows, pairs = {}, []
    for loss in LOSSES:
        name = loss.upper()
        rows |= {f"{name}-{view}": row(loss, view) for view in ("BT", "PL-8", "HPS")}
        pairs += [(f"{name}-HPS", f"{name}-BT"), (f"{name}-HPS", f"{name}-PL-8")]
    return Suite(rows | OURS, pairs)


def transfer() -> Suite:
    """The paper's Table 5: trained on one domain, tested on the other; the SFT model knows both."""
    rows, pairs, prompts = {}, [], {}
    for source, target in (("help", "safe"), ("safe", "help")):
        for view in VIEWS:
            name = f"DPO-{view} {source} to {target}"
            rows[name] = row("dpo", view)
            prompts[name] = f"train-{source}", f"test-{target}"
            if view != "HPS":
                pairs.append((f"DPO-HPS {source} to {target}", name))
    return Suite(rows, pairs, domain="both", prompts=prompts)


PANELS = ["rm_dpo", "rm10", "true_reward", "harm"]
NUMBERS = (5, 20, 50, 100)


def responses() -> Suite:
    """The paper's Tables 6 and 7: how many candidates a prompt has in training."""
    views = ("BT", "PL-8", "HPS")
    rows: dict[str, Row] = {}
    for view in views:
        for n in NUMBERS:
            options = row("dpo", view) | ({"pl_responses": min(n, 8)} if view == "PL-8" else {})
            rows[f"DPO-{view} n {n}"] = options | ({"candidates": n} if n != NUMBERS[-1] else {})
    lines = {f"DPO-{view}": [f"DPO-{view} n {n}" for n in NUMBERS] for view in views}
    pairs = [(f"DPO-HPS n {n}", f"DPO-{other} n {n}") for n in NUMBERS for other in ("BT", "PL-8")]
    pairs += [(f"DPO-{view} n 100", f"DPO-{view} n 5") for view in views]
    x = {"label": "candidates of a prompt", "values": {f"DPO-{view} n {n}": n for view in views for n in NUMBERS}}
    return Suite(rows, pairs, series={"responses": {"x": x, "panels": PANELS, "lines": lines}})


BETAS = (0.1, 0.25, 0.5, 0.75, 1.0)


def beta() -> Suite:
    """The paper's Table 8: reward margin against KL over beta."""
    rows: dict[str, Row] = {}
    for view in ("BT", "PL-8", "HPS"):
        for b in BETAS:
            rows[f"DPO-{view} beta {b:g}"] = row("dpo", view) | ({"beta": b} if b != BETAS[0] else {})
    lines = {f"DPO-{view}": [f"DPO-{view} beta {b:g}" for b in BETAS] for view in ("BT", "PL-8", "HPS")}
    pairs = [(f"DPO-HPS beta {b:g}", f"DPO-{other} beta {b:g}") for b in BETAS for other in ("BT", "PL-8")]
    return Suite(rows, pairs, series={"beta": {"x": {"metric": "kl_exact"}, "panels": PANELS, "lines": lines}})


def schedule() -> Suite:
    """What gamma's course over training does, and the forms of HPS."""
    hps = row("dpo", "HPS")
    rows: dict[str, Row] = {"DPO-HPS": hps}
    for gamma in (-5, 0, 5):
        rows[f"gamma {gamma}"] = {**hps, "gamma_schedule": "constant", "gamma_start": gamma}
    rows |= {
        "gamma 5 to -5": {**hps, "gamma_start": 5, "gamma_end": -5},
        "gamma 0 to 5": {**hps, "gamma_start": 0},
        "gamma inclusive": {**hps, "gamma_schedule": "inclusive"},
        "gamma linear": {**hps, "gamma_schedule": "linear"},
        "DPO-HPS mixture": {**hps, "gamma_schedule": "mixture"},
        "N factor n - 1": {**hps, "n_factor": "n_minus_one"},
        "DPO-HPS 8 draws": {**hps, "hps_samples": 8},
        "random pairs": {"method": "dpo-random"},
    }
    return Suite(rows, [(other, "DPO-HPS") for other in rows if other != "DPO-HPS"])


LEVELS = (0.0, 0.4, 1.0, 2.0)


def noise() -> Suite:
    """How much noise in the training reward the samplers bear (the world's own is .4, and a liking for length)."""
    views = ("BT", "uniform", "HPS")
    rows = {f"DPO-{view} noise {level:g}": row("dpo", view) for view in views for level in LEVELS}
    levels = {f"DPO-{view} noise {level:g}": level for view in views for level in LEVELS}
    lines = {f"DPO-{view}": [f"DPO-{view} noise {level:g}" for level in LEVELS] for view in views}
    pairs = [(f"DPO-HPS noise {x:g}", f"DPO-{other} noise {x:g}") for x in LEVELS for other in ("BT", "uniform")]
    x = {"label": "standard deviation of the training reward's noise", "values": levels}
    own = {name: level for name, level in levels.items() if level != 0.4}
    return Suite(rows, pairs, noise=own, series={"noise": {"x": x, "panels": PANELS, "lines": lines}})


def cost() -> Suite:
    """The paper's 62.8 : 64.4 : 168.4 hours: seconds and packed tokens of training by preference model."""
    rows: dict[str, Row] = {f"DPO-{view}": row("dpo", view) for view in ("BT", "HPS", "PL-8")}
    rows["DPO-HPS 8 draws"] = row("dpo", "HPS", hps_samples=8)
    rows["DPO-PL-5"] = {"method": "dpo-pl", "pl_responses": 5}
    return Suite(rows, [(other, "DPO-BT") for other in rows if other != "DPO-BT"])


# What `tune` sweeps: betas and learning rates around the best of each loss in wider searches on the same prompts.
GRIDS = {
    "dpo": ((0.5, 1.0), (4e-4, 8e-4, 1.6e-3)),
    "exo": ((0.2, 0.5), (4e-4, 8e-4)),
    "ipo": ((0.5, 2.0), (4e-4, 8e-4)),
    "sppo": ((0.02, 0.1), (8e-4, 1.6e-3)),
    "nca": ((0.1, 0.2), (8e-4, 1.6e-3)),
}


def tune() -> Suite:
    """Every method at every beta and lr of a grid, on validation prompts: where the settings of `confirm` are from."""
    swept = {f"{loss.upper()}-{view}": row(loss, view) for loss in LOSSES for view in ("BT", "PL-8", "HPS")}
    swept |= {f"{loss.upper()}-uniform": row(loss, "uniform") for loss in ("dpo", "sppo", "nca")}
    swept |= {f"NCA-{view} N": row("nca", view, **N) for view in ("uniform", "HPS")}
    rows: dict[str, Row] = {}
    figures: dict[str, Any] = {}  # one a loss: all lines in one are past reading
    panels = ["rm10", "true_reward", "harm", "junk"]
    for name, options in swept.items():
        loss = str(options["method"]).split("-")[0]
        figure = figures.setdefault(f"frontier-{loss}", {"x": {"metric": "kl_exact"}, "panels": panels, "lines": {}})
        for b, lr in product(*GRIDS[loss]):
            title = f"{name} beta {b:g} lr {lr:g}"
            rows[title] = {**options, "beta": b, "lr": lr}
            figure["lines"].setdefault(name, []).append(title)
    return Suite(rows, [], split="valid", series=figures, worlds=2)


def confirm() -> Suite:
    """Methods at the beta and lr chosen for each on validation prompts (docs/RESULTS.md), on worlds not used before."""
    baselines = {
        "DPO-BT": row("dpo", "BT", beta=1.0, lr=8e-4),
        "DPO-PL-8": row("dpo", "PL-8", beta=0.5, lr=8e-4),
        "DPO-uniform": row("dpo", "uniform", beta=1.0, lr=1.6e-3),
        "DPO-HPS": row("dpo", "HPS", beta=0.5, lr=4e-4),
    }
    candidates = {
        **{f"NCA-{view} N": row("nca", view, lr=1.6e-3, **N) for view in ("uniform", "HPS")},
        **{f"SPPO-{view}": row("sppo", view, beta=0.02, lr=1.6e-3) for view in ("BT", "uniform", "HPS")},
    }
    pairs = [("DPO-HPS", other) for other in baselines if other != "DPO-HPS"]
    pairs += [(ours, other) for ours in candidates for other in baselines]
    pairs += [("NCA-HPS N", "NCA-uniform N"), ("SPPO-HPS", "SPPO-uniform"), ("SPPO-uniform", "SPPO-BT")]
    return Suite(baselines | candidates, pairs, repeats=3, later=100)


SUITES: dict[str, Callable[[], Suite]] = {
    "headline": headline,
    "methods": methods,
    "transfer": transfer,
    "responses": responses,
    "beta": beta,
    "schedule": schedule,
    "noise": noise,
    "cost": cost,
    "tune": tune,
    "confirm": confirm,
}
