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
PERCENTILE = {"reward_norm": "percentile"}  # OURS
PL = {"pl_responses": 8}
LOSSES = ("dpo", "exo", "ipo", "sppo", "nca")


@dataclass(frozen=True)
class Suite:
    """`rows`: what is trained. `pairs`: rows that are compared, a - b. `domain`: of the worlds.

    `prompts`: row -> (training, test) prompts where these are not ("train", the suite's `split`); in a world of `both`
    domains "train-help" and the like are the prompts of one.
    `noise`: row -> standard deviation of the training reward's noise where it is not the world's own.
    `series`: figures of lines through rows, as `report` draws them.
    `repeats`: preference runs of a row in each world. `later`: how far its worlds lie behind those of other suites.
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


def against(row: str, rows: dict[str, Row]) -> list[tuple[str, str]]:
    """`row` compared with every other."""
    return [(row, other) for other in rows if other != row]


# The samplers of ours that stand beside the paper's, at BT's cost.
OURS: dict[str, Row] = {
    "DPO-HPS percentile": {"method": "dpo-hps", **PERCENTILE},
    "DPO-HPS mixture": {"method": "dpo-hps", **SCALED, "gamma_schedule": "mixture"},
    "DPO-window": {"method": "dpo-window"},
    "GAP-window": {"method": "gap-window", "beta": 1 / 3},
}


def headline() -> Suite:
    """The question of the paper, with the control that it lacks: a uniformly drawn dispreferred response."""
    rows = {
        "DPO-BT": {"method": "dpo-bt"},
        "DPO-PL-8": {"method": "dpo-pl", **PL},
        "DPO-uniform": {"method": "dpo-uniform"},
        "DPO-HPS": {"method": "dpo-hps", **SCALED},
        "DPO-HPS raw": {"method": "dpo-hps"},
        **OURS,
    }
    paper = ("DPO-BT", "DPO-PL-8", "DPO-uniform", "DPO-HPS raw")
    window = [("DPO-window", other) for other in ("DPO-BT", "DPO-PL-8", "DPO-uniform", "DPO-HPS")]
    return Suite(rows, [("DPO-HPS", other) for other in paper] + window)


def methods() -> Suite:
    """The paper's Table 2: five losses under three preference models, and our window beside them."""
    rows, pairs = {}, []
    for loss in LOSSES:
        name = loss.upper()
        rows[f"{name}-BT"] = {"method": f"{loss}-bt"}
        rows[f"{name}-PL-8"] = {"method": f"{loss}-pl", **PL}
        rows[f"{name}-HPS"] = {"method": f"{loss}-hps", **SCALED}
        rows[f"{name}-window"] = {"method": f"{loss}-window"}
        pairs += [(f"{name}-HPS", f"{name}-BT"), (f"{name}-HPS", f"{name}-PL-8"), (f"{name}-window", f"{name}-HPS")]
    return Suite(rows | OURS, pairs)


def transfer() -> Suite:
    """The paper's Table 5: trained on one domain, tested on the other; the SFT model knows both."""
    rows, pairs, prompts = {}, [], {}
    views = {"BT": ("bt", {}), "PL-8": ("pl", PL), "uniform": ("uniform", {}), "HPS": ("hps", SCALED)}
    views["window"] = ("window", {})
    for source, target in (("help", "safe"), ("safe", "help")):
        for title, (view, extra) in views.items():
            name = f"DPO-{title} {source} to {target}"
            rows[name] = {"method": f"dpo-{view}", **extra}
            prompts[name] = f"train-{source}", f"test-{target}"
            if view != "hps":
                pairs.append((f"DPO-HPS {source} to {target}", name))
    return Suite(rows, pairs, domain="both", prompts=prompts)


NUMBERS = (5, 20, 50, 100)


def responses() -> Suite:
    """The paper's Tables 6 and 7: how many candidates a prompt has in training."""
    rows: dict[str, Row] = {}
    lines: dict[str, list[str]] = {}
    views = {"BT": ("bt", {}), "PL-8": ("pl", PL), "HPS": ("hps", SCALED), "window": ("window", {})}
    for title, (view, extra) in views.items():
        for n in NUMBERS:
            name = f"DPO-{title} n {n}"
            extra = {"pl_responses": min(n, 8)} if view == "pl" else extra
            rows[name] = {"method": f"dpo-{view}", **extra} | ({"candidates": n} if n != NUMBERS[-1] else {})
            lines.setdefault(f"DPO-{title}", []).append(name)
    pairs = [(f"DPO-{a} n {n}", f"DPO-{b} n {n}") for n in NUMBERS for a, b in
             (("HPS", "BT"), ("HPS", "PL-8"), ("window", "HPS"))]
    pairs += [(f"DPO-{title} n 100", f"DPO-{title} n 5") for title in views]
    x = {"label": "candidates of a prompt", "values": {f"DPO-{title} n {n}": n for title in views for n in NUMBERS}}
    figure = {"x": x, "panels": ["rm_dpo", "rm10", "true_reward", "harm"], "lines": lines}
    return Suite(rows, pairs, series={"responses": figure})


BETAS = (0.1, 0.25, 0.5, 0.75, 1.0)


def beta() -> Suite:
    """The paper's Table 8: reward margin against KL over beta."""
    rows: dict[str, Row] = {}
    lines: dict[str, list[str]] = {}
    views = {"BT": ("bt", {}), "PL-8": ("pl", PL), "HPS": ("hps", SCALED)}
    for title, (view, extra) in views.items():
        for strength in BETAS:
            name = f"DPO-{title} beta {strength:g}"
            rows[name] = {"method": f"dpo-{view}", **extra} | ({"beta": strength} if strength != BETAS[0] else {})
            lines.setdefault(f"DPO-{title}", []).append(name)
    pairs = [(f"DPO-HPS beta {b:g}", f"DPO-{other} beta {b:g}") for b in BETAS for other in ("BT", "PL-8")]
    figure = {"x": {"metric": "kl_exact"}, "panels": ["rm_dpo", "rm10", "true_reward", "harm"], "lines": lines}
    return Suite(rows, pairs, series={"beta": figure})


def schedule() -> Suite:
    """What gamma's course over training does, and the forms of HPS."""
    hps = {"method": "dpo-hps", **SCALED}
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
        "runner-up": {"method": "dpo-top2"},
        "random pairs": {"method": "dpo-random"},
    }
    return Suite(rows, [(other, "DPO-HPS") for other in rows if other != "DPO-HPS"])


def noise() -> Suite:
    """How much noise in the training reward the samplers bear (the world's own is .4, and a liking for length)."""
    rows: dict[str, Row] = {}
    lines: dict[str, list[str]] = {}
    levels = {}
    views = {"BT": ("bt", {}), "uniform": ("uniform", {}), "HPS": ("hps", SCALED), "window": ("window", {})}
    for title, (view, extra) in views.items():
        for level in (0.0, 0.4, 1.0, 2.0):
            name = f"DPO-{title} noise {level:g}"
            rows[name] = {"method": f"dpo-{view}", **extra}
            levels[name] = level
            lines.setdefault(f"DPO-{title}", []).append(name)
    pairs = [(f"DPO-HPS noise {x:g}", f"DPO-{other} noise {x:g}") for x in (0.0, 0.4, 1.0, 2.0) for other in
             ("BT", "uniform", "window")]
    x = {"label": "standard deviation of the training reward's noise", "values": levels}
    figure = {"x": x, "panels": ["rm_dpo", "rm10", "true_reward", "harm"], "lines": lines}
    own = {name: level for name, level in levels.items() if level != 0.4}
    return Suite(rows, pairs, noise=own, series={"noise": figure})


def cost() -> Suite:
    """The paper's 62.8 : 64.4 : 168.4 hours: seconds and packed tokens of training by preference model."""
    rows: dict[str, Row] = {
        "DPO-BT": {"method": "dpo-bt"},
        "DPO-HPS": {"method": "dpo-hps", **SCALED},
        "DPO-HPS 8 draws": {"method": "dpo-hps", **SCALED, "hps_samples": 8},
        "DPO-PL-5": {"method": "dpo-pl", "pl_responses": 5},
        "DPO-PL-8": {"method": "dpo-pl", **PL},
        "DPO-window": {"method": "dpo-window"},
    }
    return Suite(rows, [(other, "DPO-BT") for other in rows if other != "DPO-BT"])


# What `tune` sweeps: each row at every beta and lr, on validation prompts.
TUNED_BETAS, TUNED_LRS = (0.1, 0.2, 0.5), (2e-4, 4e-4, 8e-4)
TUNED: dict[str, Row] = {
    "DPO-BT": {"method": "dpo-bt"},
    "DPO-PL-8": {"method": "dpo-pl", **PL},
    "DPO-uniform": {"method": "dpo-uniform"},
    "DPO-HPS": {"method": "dpo-hps", **SCALED},
    "DPO-HPS percentile": {"method": "dpo-hps", **PERCENTILE},
    **{f"{loss.upper()}-window": {"method": f"{loss}-window"} for loss in (*LOSSES, "gap")},
}


def tune() -> Suite:
    """Every method at every beta and lr of a grid, on validation prompts: where the settings of `confirm` are from."""
    rows: dict[str, Row] = {}
    lines: dict[str, list[str]] = {}
    for name, row in TUNED.items():
        for strength, lr in product(TUNED_BETAS, TUNED_LRS):
            title = f"{name} beta {strength:g} lr {lr:g}"
            rows[title] = {**row, "beta": strength, "lr": lr}
            lines.setdefault(name, []).append(title)
    panels = ["rm10", "true_reward", "harm", "junk"]
    figure = {"x": {"metric": "kl_exact"}, "panels": panels, "lines": lines}
    return Suite(rows, [], split="valid", series={"frontier": figure})


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
}
