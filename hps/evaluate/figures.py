"""The figures of a report: reward against KL, margins and paired differences with each world's value, lines of rows.

Drawn from a results dict (its keys: report.py); colours and markers follow the order of its rows or lines.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hps.evaluate.metrics import AGAIN, MARGINS, METRICS, extra, present
from hps.io import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The look of every figure: Okabe and Ito's colours, told apart by colour-blind readers, and in grey by the marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "lines.linewidth": 1.4,
    "text.parse_math": False,  # a name may hold two dollars
    **dict.fromkeys(["legend.frameon", "axes.spines.top", "axes.spines.right"], False),
    **dict.fromkeys(["axes.linewidth", "xtick.major.width", "ytick.major.width"], 0.6),
    **dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color"], "0.3"),
    **dict.fromkeys(["axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"], "0.15"),
}
DPI = 200
DIFFERENCES = ("rm_dpo", "rm_worst_case", "rm10", "true_reward", "lead", "harm")  # panels of the figure of pairs
Strips = dict[str, list[dict[str, Any] | None]]  # metric -> item of each row


class Plan(NamedTuple):
    name: str  # of the file, without .png
    caption: str
    alt: str
    size: tuple[float, float]  # inches
    draw: Callable[["Figure"], None]


def _look(i: int) -> dict[str, Any]:
    """Colour, marker and dashes of the i-th line: no two of the first 21 are alike."""
    dashes = ("-", "--", ":")[i // len(COLOURS) % 3]
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": dashes}


def _looks(labels: Iterable[str]) -> list[dict[str, Any]]:
    """One per label; what is another label and a word more ("DPO-BT tuned") looks like that one, hollow."""
    found: dict[str, dict[str, Any]] = {}
    for label in labels:
        same = found.get(label.rpartition(" ")[0])
        plain = sum("mfc" not in look for look in found.values())
        found[label] = same | {"mfc": "white"} if same else _look(plain)
    return list(found.values())


def _numbers(items: Iterable[dict[str, Any] | None]) -> tuple[np.ndarray, np.ndarray]:
    """(items,) means, NaN where there is none, so that a line is broken there; (2, items): how far the interval reaches
    below and above; rounding does not make it less than 0."""
    empty = dict.fromkeys(("mean", "low", "high"))
    mean, low, high = np.array([[(item or empty)[key] for key in empty] for item in items], dtype=np.float64).T
    return mean, np.maximum(0.0, [mean - low, high - mean])


def _room(names: Iterable[str]) -> float:
    """Inches that the longest of the names takes beyond the sixteen letters which every figure has room for."""
    return 0.085 * max(0, max(map(len, names), default=0) - 16)


def _strips(name: str, labels: list[str], panels: Strips, x: str) -> list[Plan]:
    """One panel per metric, one row per label: the mean with its interval, and below it each world's value. No plan
    without a panel."""

    def draw(figure: "Figure") -> None:
        for axes, (metric, items) in zip(
            figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()
        ):
            axes.axvline(0, color="0.75", linewidth=0.8, zorder=0)
            for y, (item, mean, whiskers) in enumerate(zip(items, *(part.T for part in _numbers(items)), strict=True)):
                axes.errorbar(mean, y, xerr=whiskers[:, None], markersize=5, **_look(y))
                worlds = [value for value in (item or {}).get("values", []) if value is not None]
                axes.plot(worlds, [y + 0.3] * len(worlds), "|", color=_look(y)["color"], markersize=4, alpha=0.7)
            axes.set_title(METRICS[metric].title)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
            axes.locator_params(axis="x", nbins=4)
            axes.margins(x=0.12)
        figure.axes[0].set_yticks(range(len(labels)), labels)
        figure.axes[0].set_ylim(len(labels) - 0.4, -0.6)
        figure.supxlabel(x, fontsize=9, color="0.15")

    size = (max(3.6, 1.2 + 1.35 * len(panels)) + _room(labels), 0.9 + 0.27 * len(labels))
    caption = f"{x[0].upper()}{x[1:]}: mean, interval, and below them one stroke per world."
    titles = ", ".join(METRICS[panel].title for panel in panels)
    alt = f"A panel each for {titles}; a row each from {labels[0]} on." if labels else ""
    return [Plan(name, caption, alt, size, draw)] if panels else []


def _lines(results: dict[str, Any], name: str, series: dict[str, Any]) -> list[Plan]:
    """One panel per metric, one line per name through its rows, over another metric or over numbers of the rows. No
    plan where no row of them has numbers for a panel."""
    over, of = series["x"], {row["method"]: row["metrics"] for row in results["rows"]}
    found = [of[method].keys() for methods in series["lines"].values() for method in methods if method in of]
    needs = {over["metric"]} if "metric" in over else set()
    panels = [panel for panel in series["panels"] if any(needs | {panel} <= keys for keys in found)]
    titles = ", ".join(METRICS[panel].title for panel in panels)
    label_of_x = METRICS[over["metric"]].title if needs else over["label"]
    single = len(panels) == 1

    def draw(figure: "Figure") -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            looks = _looks(series["lines"])
            for look, (label, methods) in zip(looks, series["lines"].items(), strict=True):
                y, up = _numbers(of[method].get(panel) for method in methods)
                if needs:
                    x, across = _numbers(of[method].get(over["metric"]) for method in methods)
                else:
                    x, across = np.array([over["values"][method] for method in methods], dtype=np.float64), None
                y[np.isnan(x)] = x[np.isnan(y)] = math.nan
                how = {"markersize": 4.5, "elinewidth": 0.8, "label": label}
                axes.errorbar(x, y, xerr=across, yerr=up, **how, **look)
            axes.set_title(METRICS[panel].title)
            axes.grid(color="0.93", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.margins(0.08)
            if not needs and len(ticks := sorted(set(over["values"].values()))) <= 8:
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
        # One legend for all panels; below a single one, so that a telephone shows both.
        where = (
            dict(loc="outside lower center", ncols=2, handlelength=1) if single else dict(loc="outside right center")
        )
        figure.legend(handles.values(), handles.keys(), **where)
        if single:
            figure.axes[0].set_xlabel(label_of_x)
        else:
            figure.supxlabel(label_of_x, fontsize=9, color="0.15")

    alt = f"{titles} over {label_of_x}, one line each for {', '.join(series['lines'])}."
    size = (1.8 + 2.6 * len(panels) + _room(series["lines"]), 2.9)
    if single:
        size = (4.8 + max(0, 2 * _room(series["lines"]) - 2), 3.0 + 0.18 * math.ceil(len(series["lines"]) / 2))
    caption = f"{titles} over {label_of_x}: means and intervals, each line through its rows in order."
    return [Plan(name, caption, alt, size, draw)] if panels else []


def plans(results: dict[str, Any]) -> list[Plan]:
    """Every figure that these results have the numbers for, in the order of the report."""
    rows, compared = results["rows"], results.get("comparisons", [])
    found = []
    kl = "kl_exact" if "kl_exact" in present(rows) else "kl_seq"
    shown = [row["method"] for row in rows if {"true_reward", kl} <= row["metrics"].keys()]
    if lines := {name: [name] for name in shown if not name.endswith(AGAIN)}:
        reward = {"x": {"metric": kl}, "panels": ["true_reward"], "lines": lines}  # one point per method
        caption = "Reward of the samples over KL to the reference: means and intervals."
        found += [plan._replace(caption=caption) for plan in _lines(results, "reward_kl", reward)]
    panels = {name: [row["metrics"].get(name) for row in rows] for name in present(rows, MARGINS)}
    x = "margin of the best candidate (nats, without beta)"
    found += _strips("margins", [row["method"] for row in rows], panels, x)
    of_pair: dict[str, dict[str, Any]] = {}
    for item in compared:
        of_pair.setdefault(f"{item['a']} - {item['b']}", {})[item["metric"]] = item
    known = {item["metric"] for item in compared}
    panels = {name: [items.get(name) for items in of_pair.values()] for name in DIFFERENCES if name in known}
    found += _strips("differences", list(of_pair), panels, "paired difference a - b")
    for name, series in results.get("series", {}).items():
        found += _lines(results, f"series_{name}", series)
    return found


def save(plan: Plan, folder: Path) -> Path:
    """Draw `plan` into folder/NAME.png at DPI; the path."""
    path = folder / f"{plan.name}.png"
    with extra("matplotlib").rc_context(STYLE):
        # Never pyplot: no global figure, no display.
        figure = extra("matplotlib.figure").Figure(figsize=plan.size, dpi=DPI, layout="constrained")
        plan.draw(figure)
        with files.replacing(path) as partial:
            figure.savefig(partial, format="png")
    return path
