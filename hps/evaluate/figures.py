"""The figures of a report: margins, paired differences, reward against KL, lines through rows, training curves, gamma.

Drawn from a results dict (its keys: report.py); colours and markers follow the order of its rows or lines.
"""

import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hps.evaluate.metrics import MARGINS, METRICS, extra, present
from hps.io import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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


def _numbers(rows: list[dict[str, Any]], name: str) -> np.ndarray:
    """(rows, 3) mean, low and high of a metric, NaN where a row lacks it: a line is broken there."""
    found = [row["metrics"].get(name) for row in rows]
    keys = ("mean", "low", "high")
    return np.array([[item[key] for key in keys] if item else [None] * 3 for item in found], dtype=np.float64)


def _whiskers(numbers: np.ndarray) -> np.ndarray:
    """(2, rows): how far the interval reaches below and above the mean; rounding does not make it less than 0."""
    mean, low, high = numbers.T
    return np.maximum(0.0, [mean - low, high - mean])


def _room(names: Iterable[str]) -> float:
    """Inches that the longest of the names takes beyond the sixteen letters which every figure has room for."""
    return 0.085 * max(0, max(map(len, names)) - 16)


def _legend(figure: "Figure") -> None:
    """One legend for all panels, beside them."""
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")


def _draw_strips(figure: "Figure", labels: list[str], panels: Strips, x: str) -> None:
    """One panel per metric, one row per label: the mean with its interval, and below it each world's value."""
    for axes, (name, items) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        axes.axvline(0, color="0.75", linewidth=0.8, zorder=0)
        for y, item in enumerate(items):
            (numbers,) = _numbers([{"metrics": {name: item} if item else {}}], name)
            axes.errorbar(numbers[0], y, xerr=_whiskers(numbers[None]), markersize=5, **_look(y))
            worlds = [value for value in (item or {}).get("values", []) if value is not None]
            axes.plot(worlds, [y + 0.3] * len(worlds), "|", color=_look(y)["color"], markersize=4, alpha=0.7)
        axes.set_title(METRICS[name].title)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        axes.margins(x=0.12)
    figure.axes[0].set_yticks(range(len(labels)), labels)
    figure.axes[0].set_ylim(len(labels) - 0.4, -0.6)
    figure.supxlabel(x, fontsize=9, color="0.15")


def _strips(name: str, labels: list[str], panels: Strips, x: str) -> list[Plan]:
    """The plan of a figure of strips, or none without a panel."""
    if not panels:
        return []
    size = (max(3.6, 1.2 + 1.35 * len(panels)) + _room(labels), 0.9 + 0.27 * len(labels))
    caption = f"{x[0].upper()}{x[1:]}: mean, interval, and below them one stroke per world."
    alt = f"A panel each for {', '.join(METRICS[panel].title for panel in panels)}; a row each from {labels[0]} on."
    draw = functools.partial(_draw_strips, labels=labels, panels=panels, x=x)
    return [Plan(name, caption, alt, size, draw)]


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns: up to three panels stand beside each other, more in two rows."""
    return (1, panels) if panels <= 3 else (2, math.ceil(panels / 2))


def _draw_lines(figure: "Figure", rows: list[dict[str, Any]], names: list[str], series: dict[str, Any]) -> None:
    """One panel per metric, one line per name through its rows, over another metric or over numbers of the rows."""
    of, over = {row["method"]: row for row in rows}, series["x"]
    panels = list(figure.subplots(*_grid(len(names)), squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        for i, (label, methods) in enumerate(series["lines"].items()):
            drawn = [of[method] for method in methods]
            y = _numbers(drawn, name)
            if "metric" in over:
                x = _numbers(drawn, over["metric"])
            else:
                x = np.array([[over["values"][method]] * 3 for method in methods], dtype=np.float64)
            x = np.where(np.isnan(y), math.nan, x)
            y = np.where(np.isnan(x), math.nan, y)
            across = _whiskers(x) if "metric" in over else None
            how = {"markersize": 4.5, "elinewidth": 0.8, "label": label}
            axes.errorbar(x[:, 0], y[:, 0], xerr=across, yerr=_whiskers(y), **how, **_look(i))
            if "metric" in over and len(methods) > 1:  # which end of the line is the first row
                hollow = {"markersize": 4.5, "markerfacecolor": "white", "zorder": 3}
                axes.plot(x[:1, 0], y[:1, 0], **hollow, **_look(i))
        axes.set_title(METRICS[name].title)
        axes.grid(color="0.93", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(0.08)
        if "values" in over and len(ticks := sorted(set(over["values"].values()))) <= 8:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    for axes in panels[len(names) :]:
        axes.remove()
    _legend(figure)
    figure.supxlabel(_title_of_x(series), fontsize=9, color="0.15")


def _title_of_x(series: dict[str, Any]) -> str:
    return METRICS[series["x"]["metric"]].title if "metric" in series["x"] else series["x"]["label"]


def _lines(results: dict[str, Any], name: str, series: dict[str, Any], caption: str = "") -> list[Plan]:
    """The plan of a figure of lines, or none where no row of them has numbers for a panel."""
    drawn = {method for methods in series["lines"].values() for method in methods}
    found = [row["metrics"].keys() for row in results["rows"] if row["method"] in drawn]
    needs = {series["x"]["metric"]} if "metric" in series["x"] else set()
    names = [panel for panel in series["panels"] if any(needs | {panel} <= keys for keys in found)]
    if not names:
        return []
    titles, over = ", ".join(METRICS[panel].title for panel in names), _title_of_x(series)
    text = caption or f"{name.removeprefix('series_')}: {titles} over {over}, means and intervals."
    methods = next(iter(series["lines"].values()))
    if "metric" in series["x"] and len(methods) > 1:
        text += f" A line goes through its rows in order, from the hollow point ({methods[0]}) on ({methods[-1]} last)."
    rows, columns = _grid(len(names))
    alt = f"{titles} over {over}, one line each for {', '.join(series['lines'])}."
    draw = functools.partial(_draw_lines, rows=results["rows"], names=names, series=series)
    return [Plan(name, text, alt, (1.8 + 2.6 * columns + _room(series["lines"]), 0.5 + 2.4 * rows), draw)]


def _log_scale_if_wide(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.dataLim.intervaly
    if low > 0 and high >= 3 * low:  # a narrower range can miss every tick below
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_curves(figure: "Figure", results: dict[str, Any]) -> None:
    order = [row["method"] for row in results["rows"]]
    for axes, key in zip(figure.subplots(1, 2), ("loss", "margin"), strict=True):
        for method, series in results["curves"].items():
            look = _look(order.index(method)) | {"marker": None}
            values = np.asarray(series[key], dtype=np.float64)
            width = max(1, len(values) // 20)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axes.plot(series["step"], values, color=look["color"], alpha=0.18, linewidth=0.8)
            axes.plot(series["step"][width - 1 :], smooth, label=method, **look)
        axes.set_title(key)
        axes.set_xlabel("optimiser step")
    _log_scale_if_wide(figure.axes[0])  # losses of different methods have different scales
    _legend(figure)


def _draw_schedule(figure: "Figure", schedule: dict[str, list[float]]) -> None:
    panels = figure.subplots(2, 1, sharex=True)
    panels[0].axhline(0, color="0.75", linewidth=0.8)
    for axes, key, colour in zip(panels, ("gamma", "effective_negatives"), COLOURS, strict=False):
        axes.plot(schedule["step"], schedule[key], color=colour, drawstyle="steps-post")
        axes.set_ylabel(key.replace("_", " "))
    _log_scale_if_wide(panels[1])
    panels[1].set_xlabel("optimiser step")
    figure.align_ylabels()


def plans(results: dict[str, Any]) -> list[Plan]:
    """Every figure that these results have the numbers for, in the order of the report."""
    rows, compared = results["rows"], results.get("comparisons", [])
    panels = {name: [row["metrics"].get(name) for row in rows] for name in present(rows, MARGINS)}
    x = "margin of the best candidate (nats, without beta)"
    found = _strips("margins", [row["method"] for row in rows], panels, x)
    of_pair = {f"{item['a']} - {item['b']}": {} for item in compared}
    for item in compared:
        of_pair[f"{item['a']} - {item['b']}"][item["metric"]] = item
    known = {item["metric"] for item in compared}
    panels = {name: [items.get(name) for items in of_pair.values()] for name in DIFFERENCES if name in known}
    found += _strips("differences", list(of_pair), panels, "paired difference a - b")
    # Reward against KL: one point per method.
    kl = "kl_exact" if "kl_exact" in present(rows) else "kl_seq"
    lines = {row["method"]: [row["method"]] for row in rows if {"true_reward", kl} <= row["metrics"].keys()}
    if lines:
        series = {"x": {"metric": kl}, "panels": ["true_reward"], "lines": lines}
        caption = "Reward against distance from the reference on the winner (nats), means and intervals."
        size = (5.6 + _room(lines), 3.6)
        found += [plan._replace(size=size) for plan in _lines(results, "reward_kl", series, caption)]
    for name, series in results.get("series", {}).items():
        found += _lines(results, f"series_{name}", series)
    if results.get("curves"):
        caption = "Training curves: every logged value, and its mean over 5 % of the run."
        alt = "Loss and margin over the optimiser steps, one line per method."
        size = (8.0 + _room(results["curves"]), 2.9)
        found.append(Plan("curves", caption, alt, size, functools.partial(_draw_curves, results=results)))
    if schedule := results.get("schedule"):
        gamma, effective = schedule["gamma"], schedule["effective_negatives"]
        caption = "Hardness and the number of equally likely negatives it amounts to."
        alt = (
            f"Over the optimiser steps, gamma from {gamma[0]:g} to {gamma[-1]:g} and effective negatives "
            f"from {effective[0]:.1f} to {effective[-1]:.1f}."
        )
        draw = functools.partial(_draw_schedule, schedule=schedule)
        found.append(Plan("schedule", caption, alt, (5.0, 3.4), draw))
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
