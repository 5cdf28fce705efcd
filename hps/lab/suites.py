"""The comparisons of the sweep as tables: row name -> options of train.py. Read and edit these; nothing else decides.

A suite is made by a function without arguments; `SUITES` holds them by name. Options of a row stand beside those of
configs/world.toml. Rows named HPS are the paper's method, with rewards as they are. Each suite has a row AGAIN: one of
its rows with another seed, so that what is "resolved" between the two shows how often chance alone is. What was chosen
here by looking at results was chosen on validation prompts (suite `tune`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from hps.evaluate.metrics import AGAIN

Row = dict[str, Any]  # options of train.py, `method` among them

LR = 2e-4  # of every row that names no other
LOSSES = ("dpo", "exo", "ipo", "sppo", "nca")
VIEWS: dict[str, tuple[str, Row]] = {  # as rows are named: view of train.py and its options
    "BT": ("bt", {}),
    "PL-8": ("pl", {"pl_responses": 8}),
    "uniform": ("uniform", {}),
    "HPS": ("hps", {}),
    # Standardised rewards times 0.5: on raw ones gamma = -5 to 5 is nearly an argmax (docs/RESULTS.md).
    "HPS scaled (ours)": ("hps", {"reward_norm": "zscore", "reward_scale": 0.5}),
}
HPS = ("HPS", "HPS scaled (ours)")
BASELINES = ("BT", "PL-8", "uniform")
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
    `later`: how far its worlds lie behind those of other suites. `worlds`: at most so many where all
    suites run.
    """

    rows: dict[str, Row]
    pairs: list[tuple[str, str]]
    domain: str = "safe"
    split: str = "test"
    prompts: dict[str, tuple[str, str]] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    later: int = 0
    worlds: int = 12


def compared(name: str) -> list[tuple[str, str]]:
    """Both forms of HPS against each baseline, in rows named by `name`, which has a {} in the place of the view."""
    return [(name.format(ours), name.format(other)) for ours, other in product(HPS, BASELINES)]


def with_again(suite: Suite, name: str) -> Suite:
    """The suite with the row `name` once more, trained with another seed, and the pair of the two."""
    again = name + AGAIN
    prompts = suite.prompts | ({again: suite.prompts[name]} if name in suite.prompts else {})
    rows = suite.rows | {again: {**suite.rows[name], "seed": 1000}}
    return replace(suite, rows=rows, pairs=[*suite.pairs, (again, name)], prompts=prompts)


def headline() -> Suite:
    """The question of the paper, with the control that it lacks: a uniformly drawn dispreferred response."""
    suite = Suite({f"DPO-{view}": row("dpo", view) for view in VIEWS}, compared("DPO-{}"))
    return with_again(replace(suite, worlds=500), "DPO-HPS")


def methods() -> Suite:
    """The paper's Table 2, five losses under three preference models, and our two beside these."""
    rows = {f"{loss.upper()}-{view}": row(loss, view) for loss in LOSSES for view in VIEWS}
    pairs = [pair for loss in LOSSES for pair in compared(f"{loss.upper()}-{{}}")]
    return with_again(Suite(rows, pairs, worlds=500), "NCA-HPS")


def transfer() -> Suite:
    """The paper's Table 5: trained on one domain, tested on the other; the SFT model knows both."""
    rows, pairs, prompts = {}, [], {}
    for source, target in (("help", "safe"), ("safe", "help")):
        name = f"DPO-{{}} {source} to {target}"
        names = {name.format(view): row("dpo", view) for view in VIEWS}
        rows |= names
        prompts |= dict.fromkeys(names, (f"train-{source}", f"test-{target}"))
        pairs += compared(name)
    return with_again(Suite(rows, pairs, domain="both", prompts=prompts), "DPO-HPS help to safe")


def swept(key: str, values: tuple[float, ...], *, option: str = "", own: float = 0.0, label: str = "") -> Suite:
    """Rows "DPO-view key value", HPS against the others at each value, and a figure of the lines through the rows.

    Args:
        option: of train.py, which takes the value and is left out at train.py's `own`; empty: a row trains as its view.
        label: of the figure's horizontal axis, which shows the values; empty: it shows the KL to the reference.
    """
    rows: dict[str, Row] = {}
    x: dict[str, Any] = {"label": label, "values": {}} if label else {"metric": "kl_exact"}
    for view, value in product(VIEWS, values):
        name = f"DPO-{view} {key} {value:g}"
        rows[name] = row("dpo", view, **({option: value} if option and value != own else {}))
        x.get("values", {})[name] = value
    lines = {f"DPO-{view}": [f"DPO-{view} {key} {value:g}" for value in values] for view in VIEWS}
    pairs = [pair for value in values for pair in compared(f"DPO-{{}} {key} {value:g}")]
    suite = Suite(rows, pairs, series={key: {"x": x, "panels": PANELS, "lines": lines}})
    return with_again(suite, f"DPO-HPS {key} {values[1]:g}")


def responses() -> Suite:
    """The paper's Tables 6 and 7: how many candidates a prompt has in training."""
    suite = swept("n", (5, 20, 50, 100), option="candidates", own=100, label="candidates of a prompt")
    suite.rows["DPO-PL-8 n 5"]["pl_responses"] = 5
    pairs = suite.pairs + [(f"DPO-{view} n 100", f"DPO-{view} n 5") for view in VIEWS]
    return replace(suite, pairs=pairs, series={"responses": suite.series["n"]})


def beta() -> Suite:
    """The paper's Table 8: reward margin against KL over beta."""
    return swept("beta", (0.1, 0.25, 0.5, 0.75, 1.0), option="beta", own=0.1)


def schedule() -> Suite:
    """What gamma's course over training does, and the forms of HPS; on scaled rewards, since raw ones hide it."""
    courses: dict[str, Row] = {
        "gamma -5": {"gamma_schedule": "constant", "gamma_start": -5},
        "gamma 0": {"gamma_schedule": "constant", "gamma_start": 0},
        "gamma 5": {"gamma_schedule": "constant", "gamma_start": 5},
        "gamma 5 to -5": {"gamma_start": 5, "gamma_end": -5},
        "gamma 0 to 5": {"gamma_start": 0},
        "gamma inclusive": {"gamma_schedule": "inclusive"},
        "gamma linear": {"gamma_schedule": "linear"},
        "gamma mixture": {"gamma_schedule": "mixture"},
        "N factor n - 1": N,
        "8 draws": {"hps_samples": 8},
    }
    scaled = HPS[1]
    rows = {name: row("dpo", scaled, **options) for name, options in courses.items()}
    rows["random pairs"] = {"method": "dpo-random"}
    views = {f"DPO-{view}": row("dpo", view) for view in VIEWS}
    pairs = compared("DPO-{}") + [(name, f"DPO-{scaled}") for name in rows]
    return with_again(Suite(views | rows, pairs), "8 draws")


def noise() -> Suite:
    """How much noise in the training reward the samplers bear (the world's own is 0.4, and a liking for length)."""
    label = "standard deviation of the training reward's noise"
    suite = swept("noise", (0.0, 0.4, 1.0, 2.0), label=label)
    levels = suite.series["noise"]["x"]["values"]
    return replace(suite, noise={name: level for name, level in levels.items() if level != 0.4})


def cost() -> Suite:
    """The paper's 62.8 : 64.4 : 168.4 hours: seconds and packed tokens of training by preference model."""
    rows = {f"DPO-{view}": row("dpo", view) for view in VIEWS}
    rows["DPO-HPS 8 draws"] = row("dpo", "HPS", hps_samples=8)
    rows["DPO-PL-5"] = {"method": "dpo-pl", "pl_responses": 5}
    pairs = compared("DPO-{}") + [(other, "DPO-BT") for other in ("DPO-HPS 8 draws", "DPO-PL-5")]
    return with_again(Suite(rows, pairs), "DPO-uniform")


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
    tuned = {f"{loss.upper()}-{view}": row(loss, view) for loss in LOSSES for view in VIEWS}
    tuned |= {f"NCA-{view} N": row("nca", view, **N) for view in ("uniform", *HPS)}
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
    return with_again(Suite(rows, [], split="valid", series=figures, worlds=4), "DPO-HPS beta 0.5 lr 0.0004")


def confirm() -> Suite:
    """Methods at the beta and lr chosen for each on validation prompts (docs/RESULTS.md), on worlds not used before."""
    # That of DPO-HPS was chosen for its scaled form: the paper's own has not been tuned.
    chosen = {"BT": (1.0, 8e-4), "PL-8": (0.5, 8e-4), "uniform": (1.0, 1.6e-3), **dict.fromkeys(HPS, (0.5, 4e-4))}
    rows = {f"DPO-{view}": row("dpo", view, beta=beta, lr=lr) for view, (beta, lr) in chosen.items()}
    baselines = [f"DPO-{view}" for view in BASELINES]
    candidates = {f"NCA-{view} N": row("nca", view, lr=1.6e-3, **N) for view in ("uniform", *HPS)}
    candidates |= {f"SPPO-{view}": row("sppo", view, beta=0.02, lr=1.6e-3) for view in ("BT", "uniform", *HPS)}
    pairs = compared("DPO-{}") + list(product(candidates, baselines))
    pairs += [(f"{loss}-{view}{n}", f"{loss}-uniform{n}") for loss, n in (("NCA", " N"), ("SPPO", "")) for view in HPS]
    return with_again(Suite(rows | candidates, [*pairs, ("SPPO-uniform", "SPPO-BT")], later=500), "SPPO-HPS")


SUITES: dict[str, Callable[[], Suite]] = {
    suite.__name__: suite
    for suite in (headline, methods, transfer, responses, beta, schedule, noise, cost, tune, confirm)
}
