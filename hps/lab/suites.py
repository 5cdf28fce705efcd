"""The comparisons of the sweep as tables: row name -> options of train.py. Read and edit these; nothing else decides.

A suite is made by a function without arguments; `SUITES` holds them by name. Options of a row stand beside those of
configs/world.toml. Rows named HPS are the paper's method, with rewards as they are. Each suite has a row AGAIN: one of
its rows with another seed, so that what is "resolved" between the two shows how often chance alone is. Rows that end
in "tuned" have each method's own beta and lr, which `tune` found on worlds that no other suite uses.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from hps.evaluate.metrics import AGAIN, TUNED

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
SETTINGS: dict[str, dict[str, float]] = tomllib.loads(Path(__file__).with_name("settings.toml").read_text("utf-8"))


def row(loss: str, view: str, **more: Any) -> Row:
    """Options of the method with this loss and a view of `VIEWS`."""
    name, options = VIEWS[view]
    return {"method": f"{loss}-{name}", **options, **more}


def views(*losses: str, behind: str = "", **more: Any) -> dict[str, Row]:
    """Rows of these losses under every view, named LOSS-view and what stands behind."""
    return {f"{loss.upper()}-{view}{behind}": row(loss, view, **more) for loss, view in product(losses, VIEWS)}


@dataclass(frozen=True)
class Suite:
    """`rows`: what is trained. `pairs`: rows that are compared, a - b. `domain`: of the worlds.

    `prompts`: row -> (training, test) prompts where these are not ("train", "test"); in a world of `both` domains
    "train-help" and the like are the prompts of one.
    `frontiers`: row that nobody trains -> KL to the reference, and rows in order of their KL between which it lies.
    `series`: figures of lines through rows, as `report` draws them.
    `later`: how far its worlds lie behind those of other suites. `worlds`: at most so many where all
    suites run.
    """

    rows: dict[str, Row]
    pairs: list[tuple[str, str]]
    domain: str = "safe"
    prompts: dict[str, tuple[str, str]] = field(default_factory=dict)
    frontiers: dict[str, tuple[float, list[str]]] = field(default_factory=dict)
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


def tuned(*losses: str) -> Suite:
    """These losses under every view, each at the settings that were found for it."""
    rows = {name + TUNED: options | SETTINGS[name] for name, options in views(*losses).items()}
    return Suite(rows, [pair for loss in losses for pair in compared(f"{loss.upper()}-{{}}{TUNED}")], worlds=500)


def headline() -> Suite:
    """The question of the paper, with the control that it lacks (a uniformly drawn dispreferred response): at one
    setting for all, as there, and each at its own."""
    own = tuned("dpo")
    return with_again(replace(own, rows=views("dpo") | own.rows, pairs=compared("DPO-{}") + own.pairs), "DPO-HPS")


def methods() -> Suite:
    """The paper's Table 2, five losses under three preference models, and our two beside these."""
    pairs = [pair for loss in LOSSES for pair in compared(f"{loss.upper()}-{{}}")]
    return with_again(Suite(views(*LOSSES), pairs, worlds=500), "NCA-HPS")


def transfer() -> Suite:
    """The paper's Table 5: trained on one domain, tested on the other; the SFT model knows both."""
    rows, pairs, prompts = {}, [], {}
    for source, target in (("help", "safe"), ("safe", "help")):
        behind = f" {source} to {target}"
        rows |= (these := views(*LOSSES, behind=behind))
        prompts |= dict.fromkeys(these, (f"train-{source}", f"test-{target}"))
        pairs += [pair for loss in LOSSES for pair in compared(f"{loss.upper()}-{{}}{behind}")]
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
    """The paper's Table 6: how many candidates a prompt has in training."""
    suite = swept("n", (5, 20, 50, 100), option="candidates", own=100, label="candidates of a prompt")
    suite.rows["DPO-PL-8 n 5"]["pl_responses"] = 5
    pairs = suite.pairs + [(f"DPO-{view} n 100", f"DPO-{view} n 5") for view in VIEWS]
    return replace(suite, pairs=pairs, series={"responses": suite.series["n"]})


def transfer_responses() -> Suite:
    """The paper's Table 7: the number of candidates where the training is on helpfulness and the test on safety."""
    suite = responses()
    return replace(suite, domain="both", prompts=dict.fromkeys(suite.rows, ("train-help", "test-safe")))


def beta() -> Suite:
    """The paper's Table 8: reward margin against KL over beta; and margins at equal KL, which compare across beta."""
    values = (0.1, 0.25, 0.5, 0.75, 1.0)
    suite = swept("beta", values, option="beta", own=0.1)
    levels = (2.0, 3.0)  # nats that the courses of all views reach in most worlds
    lines = {view: [f"DPO-{view} beta {value:g}" for value in reversed(values)] for view in VIEWS}
    found = {f"DPO-{view} at KL {kl:g}": (kl, line) for kl, (view, line) in product(levels, lines.items())}
    pairs = [pair for kl in levels for pair in compared(f"DPO-{{}} at KL {kl:g}")]
    return replace(suite, frontiers=found, pairs=suite.pairs + pairs)


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
    pairs = compared("DPO-{}") + [(name, f"DPO-{scaled}") for name in rows]
    return with_again(Suite(views("dpo") | rows, pairs), "8 draws")


def forms() -> Suite:
    """What the paper writes and does not run: all dispreferred responses at once, on 20 candidates."""
    few: Row = {"candidates": 20}
    full: Row = row("dpo", "HPS", hps_form="full", **few)
    others: dict[str, Row] = {
        "Eq. 10": full,
        "Eq. 8": full | N,
        "PL, all ranks": {"method": "dpo-pl", "pl_responses": 0, **few},
        "two positives": full | {"positives": 2},
        "two positives, apart": full | {"positives": 2, "exclude_positives": "true"},
    }
    pairs = compared("DPO-{} n 20") + [(name, f"DPO-{view} n 20") for name in others for view in ("HPS", "PL-8")]
    pairs += [("two positives", "Eq. 10"), ("two positives, apart", "Eq. 10")]
    return with_again(Suite(views("dpo", behind=" n 20", **few) | others, pairs), "DPO-HPS n 20")


def appendix() -> Suite:
    """The losses that the paper's Appendix A names, under three views, beside DPO's."""
    rows, pairs = views("dpo"), compared("DPO-{}")
    for loss, options in {"slic": {}, "simpo": {"beta": 2.0}, "rdpo": {}, "kto": {}}.items():
        name = loss.upper() + "-"
        rows |= {name + view: row(loss, view, **options) for view in ("BT", "uniform", "HPS")}
        pairs += [(f"{name}HPS", f"{name}BT"), (f"{name}HPS", f"{name}uniform"), (f"{name}BT", "DPO-BT")]
    rows["LIPO-PL-8"] = row("lipo", "PL-8")
    return with_again(Suite(rows, [*pairs, ("LIPO-PL-8", "DPO-PL-8")]), "SLIC-HPS")


def cost() -> Suite:
    """The paper's 62.8 : 64.4 : 168.4 hours: seconds and packed tokens of training by preference model."""
    rows = views("dpo")
    rows["DPO-HPS 8 draws"] = row("dpo", "HPS", hps_samples=8)
    rows["DPO-PL-5"] = {"method": "dpo-pl", "pl_responses": 5}
    pairs = compared("DPO-{}") + [(other, "DPO-BT") for other in ("DPO-HPS 8 draws", "DPO-PL-5")]
    return with_again(Suite(rows, pairs), "DPO-uniform")


def trial() -> Suite:
    """The whole path in a minute: two methods beside SFT, to be looked at and not to be measured by."""
    return Suite({f"DPO-{view}": row("dpo", view) for view in ("BT", "HPS scaled (ours)")}, [])


def tune() -> Suite:
    """Every method at its settings and at half and twice each of them, on worlds of its own; `widened` goes on."""
    rows: dict[str, Row] = {}
    for name, options in views(*LOSSES).items():
        rows |= around(name, options | SETTINGS[name])
    first = next(title for title in rows if title.startswith("DPO-HPS beta"))
    return with_again(Suite(rows, [], later=5000, worlds=4), first)


def around(name: str, options: Row) -> dict[str, Row]:
    """Rows of a method at these settings and at half and twice its beta and its lr."""
    near = [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (1.0, 2.0)]
    settings = [{"beta": b * options["beta"], "lr": lr * options["lr"]} for b, lr in near]
    return {f"{name} beta {s['beta']:g} lr {s['lr']:g}": options | s for s in settings}


def best_settings(suite: Suite, reward: dict[str, float]) -> dict[str, Row]:
    """Method -> the options of its row in `tune` with the highest true reward."""
    best: dict[str, str] = {}
    for title in suite.rows:
        name = title.partition(" beta ")[0]
        if not title.endswith(AGAIN) and reward[title] > reward.get(best.get(name, ""), -float("inf")):
            best[name] = title
    return {name: suite.rows[title] for name, title in best.items()}


def widened(suite: Suite, reward: dict[str, float]) -> Suite:
    """`tune` with the neighbours of each method's best row, which are there already where the best lies inside."""
    rows = dict(suite.rows)
    for name, options in best_settings(suite, reward).items():
        rows |= around(name, options)
    return replace(suite, rows=rows)


def confirm() -> Suite:
    """The paper's Table 2 with each method at its own settings (docs/RESULTS.md)."""
    suite = tuned(*LOSSES)
    pairs = [(f"{loss.upper()}-{view}{TUNED}", f"DPO-{view}{TUNED}") for loss, view in product(LOSSES[1:], VIEWS)]
    return with_again(replace(suite, pairs=suite.pairs + pairs), f"SPPO-HPS{TUNED}")


ALL = (tune, headline, methods, confirm, transfer, responses, transfer_responses, beta, schedule, forms, appendix, cost)
SUITES: dict[str, Callable[[], Suite]] = {suite.__name__: suite for suite in ALL}
