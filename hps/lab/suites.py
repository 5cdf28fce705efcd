"""The comparisons of the sweep as tables: row name -> options of train.py. Read and edit these; nothing else decides.

A suite is made by a function without arguments; `SUITES` holds them by name. Options of a row stand beside those of
configs/world.toml. What was chosen here by looking at results was chosen on validation prompts (suite `tune`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

Row = dict[str, Any]  # options of train.py, `method` among them

LR = 2e-4  # of every row that names no other
# Standardised rewards times 0.5: on raw ones gamma = -5 to 5 is nearly an argmax (docs/RESULTS.md). Our choice.
SCALED = {"reward_norm": "zscore", "reward_scale": 0.5}
LOSSES = ("dpo", "exo", "ipo", "sppo", "nca")
VIEWS: dict[str, tuple[str, Row]] = {  # as rows are named: view of train.py and its options
    "BT": ("bt", {}),
    "PL-8": ("pl", {"pl_responses": 8}),
    "uniform": ("uniform", {}),
    "HPS": ("hps", SCALED),
}
PAPER = ("BT", "PL-8", "HPS")
N = {"n_factor": "n_minus_one"}
PANELS = ["rm_dpo", "rm10", "true_reward", "harm"]


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


def against(first: str, others: list[str]) -> list[tuple[str, str]]:
    return [(first, other) for other in others if other != first]


# Ours beside the paper's, at BT's cost: another course of gamma, and the row that the search settled on.
OURS: dict[str, Row] = {
    "DPO-HPS mixture": row("dpo", "HPS", gamma_schedule="mixture"),
    "NCA-uniform N tuned": row("nca", "uniform", lr=1.6e-3, **N),
}


def headline() -> Suite:
    """The question of the paper, with the control that it lacks: a uniformly drawn dispreferred response."""
    rows = {f"DPO-{view}": row("dpo", view) for view in VIEWS} | {"DPO-HPS raw": {"method": "dpo-hps"}}
    pairs = against("DPO-HPS", list(rows))
    return Suite(rows | OURS, pairs + against("NCA-uniform N tuned", [f"DPO-{view}" for view in VIEWS]))


def methods() -> Suite:
    """The paper's Table 2: five losses under three preference models."""
    rows = {f"{loss.upper()}-{view}": row(loss, view) for loss in LOSSES for view in PAPER}
    pairs = [(f"{loss.upper()}-HPS", f"{loss.upper()}-{other}") for loss in LOSSES for other in ("BT", "PL-8")]
    return Suite(rows | OURS, pairs)


def transfer() -> Suite:
    """The paper's Table 5: trained on one domain, tested on the other; the SFT model knows both."""
    rows, pairs, prompts = {}, [], {}
    for source, target in (("help", "safe"), ("safe", "help")):
        names = {f"DPO-{view} {source} to {target}": row("dpo", view) for view in VIEWS}
        rows |= names
        prompts |= dict.fromkeys(names, (f"train-{source}", f"test-{target}"))
        pairs += against(f"DPO-HPS {source} to {target}", list(names))
    return Suite(rows, pairs, domain="both", prompts=prompts)


def swept(
    views: tuple[str, ...], key: str, values: tuple[float, ...], *, option: str = "", own: float = 0.0, label: str = ""
) -> Suite:
    """Rows "DPO-view key value", HPS against the others at each value, and a figure of the lines through the rows.

    Args:
        option: of train.py, which takes the value and is left out at train.py's `own`; empty: a row trains as its view.
        label: of the figure's horizontal axis, which shows the values; empty: it shows the KL to the reference.
    """
    rows: dict[str, Row] = {}
    x: dict[str, Any] = {"label": label, "values": {}} if label else {"metric": "kl_exact"}
    for view, value in product(views, values):
        name = f"DPO-{view} {key} {value:g}"
        rows[name] = row("dpo", view, **({option: value} if option and value != own else {}))
        x.get("values", {})[name] = value
    lines = {f"DPO-{view}": [f"DPO-{view} {key} {value:g}" for value in values] for view in views}
    others = [view for view in views if view != "HPS"]
    pairs = [(f"DPO-HPS {key} {v:g}", f"DPO-{other} {key} {v:g}") for v, other in product(values, others)]
    return Suite(rows, pairs, series={key: {"x": x, "panels": PANELS, "lines": lines}})


def responses() -> Suite:
    """The paper's Tables 6 and 7: how many candidates a prompt has in training."""
    suite = swept(PAPER, "n", (5, 20, 50, 100), option="candidates", own=100, label="candidates of a prompt")
    suite.rows["DPO-PL-8 n 5"]["pl_responses"] = 5
    pairs = suite.pairs + [(f"DPO-{view} n 100", f"DPO-{view} n 5") for view in PAPER]
    return replace(suite, pairs=pairs, series={"responses": suite.series["n"]})


def beta() -> Suite:
    """The paper's Table 8: reward margin against KL over beta."""
    return swept(PAPER, "beta", (0.1, 0.25, 0.5, 0.75, 1.0), option="beta", own=0.1)


def schedule() -> Suite:
    """What gamma's course over training does, and the forms of HPS."""
    courses: dict[str, Row] = {
        "DPO-HPS": {},
        "gamma -5": {"gamma_schedule": "constant", "gamma_start": -5},
        "gamma 0": {"gamma_schedule": "constant", "gamma_start": 0},
        "gamma 5": {"gamma_schedule": "constant", "gamma_start": 5},
        "gamma 5 to -5": {"gamma_start": 5, "gamma_end": -5},
        "gamma 0 to 5": {"gamma_start": 0},
        "gamma inclusive": {"gamma_schedule": "inclusive"},
        "gamma linear": {"gamma_schedule": "linear"},
        "DPO-HPS mixture": {"gamma_schedule": "mixture"},
        "N factor n - 1": N,
        "DPO-HPS 8 draws": {"hps_samples": 8},
    }
    rows = {name: row("dpo", "HPS", **options) for name, options in courses.items()}
    rows["random pairs"] = {"method": "dpo-random"}
    return Suite(rows, [(other, "DPO-HPS") for other in rows if other != "DPO-HPS"])


def noise() -> Suite:
    """How much noise in the training reward the samplers bear (the world's own is 0.4, and a liking for length)."""
    label = "standard deviation of the training reward's noise"
    suite = swept(("BT", "uniform", "HPS"), "noise", (0.0, 0.4, 1.0, 2.0), label=label)
    levels = suite.series["noise"]["x"]["values"]
    return replace(suite, noise={name: level for name, level in levels.items() if level != 0.4})


def cost() -> Suite:
    """The paper's 62.8 : 64.4 : 168.4 hours: seconds and packed tokens of training by preference model."""
    rows = {f"DPO-{view}": row("dpo", view) for view in PAPER}
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
    tuned = {f"{loss.upper()}-{view}": row(loss, view) for loss in LOSSES for view in PAPER}
    tuned |= {f"{loss.upper()}-uniform": row(loss, "uniform") for loss in ("dpo", "sppo", "nca")}
    tuned |= {f"NCA-{view} N": row("nca", view, **N) for view in ("uniform", "HPS")}
    rows: dict[str, Row] = {}
    figures: dict[str, Any] = {}  # one per loss: all lines in one are past reading
    panels = ["rm10", "true_reward", "harm", "junk"]
    for name, options in tuned.items():
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
    candidates = {f"NCA-{view} N": row("nca", view, lr=1.6e-3, **N) for view in ("uniform", "HPS")}
    for view in ("BT", "uniform", "HPS"):
        candidates[f"SPPO-{view}"] = row("sppo", view, beta=0.02, lr=1.6e-3)
    pairs = against("DPO-HPS", list(baselines)) + [(ours, other) for ours in candidates for other in baselines]
    pairs += [("NCA-HPS N", "NCA-uniform N"), ("SPPO-HPS", "SPPO-uniform"), ("SPPO-uniform", "SPPO-BT")]
    return Suite(baselines | candidates, pairs, repeats=3, later=100)


SUITES: dict[str, Callable[[], Suite]] = {
    suite.__name__: suite
    for suite in (headline, methods, transfer, responses, beta, schedule, noise, cost, tune, confirm)
}
