"""The figures of a report: margins, reward against KL, training curves, gamma, and lines through rows.

Drawn from a results dict that report.py has validated; colours and markers follow the order of its rows or lines.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hps.evaluate.report import COLOURS, DPI, MARGINS, MARKERS, METRICS, STYLE, in_group, present
from hps.io import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Plan(NamedTuple):
    name: str  # of the file, without .png
    caption: str
    alt: str
    size: tuple[float, float]  # inches
    draw: Callable[["Figure", dict[str, Any]], None]


def _tradeoff_kl(results: dict[str, Any]) -> str:
    return "kl_exact" if "kl_exact" in present(results) else "kl_seq"


def _look(i: int) -> tuple[str, str]:
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def _dashes(i: int) -> str:
    return ("-", "--", ":")[i // len(COLOURS) % 3]


def _whiskers(item: dict[str, float]) -> list[list[float]]:
    return [[max(0.0, item["mean"] - item["low"])], [max(0.0, item["high"] - item["mean"])]]


def _draw_margins(figure: "Figure", results: dict[str, Any]) -> None:
    rows, names = results["rows"], in_group(results, MARGINS)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        axes.axvline(0, color="0.75", linewidth=0.8, zorder=0)
        for y, row in enumerate(rows):
            item, (colour, marker) = row["metrics"].get(name), _look(y)
            if item is not None:
                axes.errorbar(item["mean"], y, xerr=_whiskers(item), color=colour, marker=marker, ms=5)
        axes.set_title(METRICS[name].title)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.locator_params(axis="x", nbins=4)
        axes.margins(x=0.12)
    panels[0].set_yticks(range(len(rows)), [row["method"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.supxlabel("margin of the best candidate (nats, without beta)", fontsize=9, color="0.15")


def _label_points(figure: "Figure", axes: "Axes", points: list[tuple[float, float, str, str]]) -> None:
    """Write the text of each (x, y, text, colour) beside its point, where it covers least of the rest."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # settles the layout: window coordinates are final from here
    figure.set_layout_engine("none")
    pixel = figure.dpi / 72
    dots = axes.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(x, y, 0, 0).padded(4 * pixel) for x, y in dots]
    taken += [bar.get_window_extent().padded(1.5 * pixel) for bar in axes.collections]

    def cost(label: Any) -> float:
        box = label.get_window_extent()
        hits = [hit for other in taken if (hit := Bbox.intersection(box, other)) is not None]
        inside = Bbox.intersection(box, axes.bbox)
        outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
        return sum(hit.width * hit.height for hit in hits) + 10 * outside

    places = [
        (6, 4, "left", "bottom"),
        (6, -4, "left", "top"),
        (-6, 4, "right", "bottom"),
        (-6, -4, "right", "top"),
        (0, 14, "center", "bottom"),
        (0, -14, "center", "top"),
    ]
    for x, y, text, colour in points:
        tries = [
            axes.annotate(
                text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va, color=colour, fontsize=8.5
            )
            for dx, dy, ha, va in places
        ]
        best = min(tries, key=cost)
        taken.append(best.get_window_extent())
        for label in tries:
            if label is not best:
                label.remove()


def _draw_tradeoff(figure: "Figure", results: dict[str, Any]) -> None:
    axes, kl, points = figure.subplots(), _tradeoff_kl(results), []
    for i, row in enumerate(results["rows"]):
        x, y, (colour, marker) = row["metrics"].get(kl), row["metrics"].get("true_reward"), _look(i)
        if x is None or y is None:
            continue
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=_whiskers(x),
            yerr=_whiskers(y),
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.0,
        )
        points.append((x["mean"], y["mean"], row["method"], colour))
    axes.set_xlabel(f"{METRICS[kl].title} to the reference on the winner (nats)")
    axes.set_ylabel("mean evaluation reward of the samples")
    axes.grid(color="0.93", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(0.12)
    _label_points(figure, axes, points)


def _log_scale_if_wide(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axes.dataLim.intervaly
    if low <= 0 or high < 3 * low:  # a narrower range can miss every tick below
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_curves(figure: "Figure", results: dict[str, Any]) -> None:
    order = [row["method"] for row in results["rows"]]
    for axes, key in zip(figure.subplots(1, 2), ("loss", "margin"), strict=True):
        for method, series in results["curves"].items():
            colour, dashes = _look(order.index(method))[0], _dashes(order.index(method))
            values = np.asarray(series[key], dtype=np.float64)
            width = max(1, len(values) // 20)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axes.plot(series["step"], values, color=colour, alpha=0.18, linewidth=0.8)
            axes.plot(series["step"][width - 1 :], smooth, color=colour, linestyle=dashes, label=method)
        axes.set_title(key)
        axes.set_xlabel("optimiser step")
    _log_scale_if_wide(figure.axes[0])  # losses of different methods have different scales
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center")


def _draw_schedule(figure: "Figure", results: dict[str, Any]) -> None:
    schedule, drawstyle = results["schedule"], "steps-post"
    gamma, effective = figure.subplots(2, 1, sharex=True)
    gamma.axhline(0, color="0.75", linewidth=0.8)
    gamma.plot(schedule["step"], schedule["gamma"], color=COLOURS[0], drawstyle=drawstyle)
    gamma.set_ylabel("gamma")
    effective.plot(schedule["step"], schedule["effective_negatives"], color=COLOURS[1], drawstyle=drawstyle)
    _log_scale_if_wide(effective)
    effective.set_ylabel("effective negatives")
    effective.set_xlabel("optimiser step")
    figure.align_ylabels()


def _line_panels(results: dict[str, Any], series: dict[str, Any]) -> list[str]:
    """The panels for which some row of the lines has numbers."""
    drawn = {row for rows in series["lines"].values() for row in rows}
    found = [row["metrics"].keys() for row in results["rows"] if row["method"] in drawn]
    needs = {series["x"]["metric"]} if "metric" in series["x"] else set()
    return [name for name in series["panels"] if any(needs | {name} <= keys for keys in found)]


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns: up to three panels stand beside each other, more in two rows."""
    return (1, panels) if panels <= 3 else (2, math.ceil(panels / 2))


_GAP = dict.fromkeys(("mean", "low", "high"), math.nan)  # where a row lacks a number: the line is broken there


def _draw_lines(figure: "Figure", results: dict[str, Any], series: dict[str, Any]) -> None:
    metrics, x_axis = {row["method"]: row["metrics"] for row in results["rows"]}, series["x"]
    names, by_metric = _line_panels(results, series), "metric" in x_axis
    panels = list(figure.subplots(*_grid(len(names)), squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        for i, (label, rows) in enumerate(series["lines"].items()):
            (colour, marker), points = _look(i), []
            for row in rows:
                value = None if by_metric else x_axis["values"][row]
                x = metrics[row].get(x_axis["metric"]) if by_metric else dict.fromkeys(("mean", "low", "high"), value)
                y = metrics[row].get(name)
                points.append((_GAP, _GAP) if x is None or y is None else (x, y))
            xs, ys = zip(*points, strict=True)
            mean_x, mean_y = [x["mean"] for x in xs], [y["mean"] for y in ys]
            axes.errorbar(
                mean_x,
                mean_y,
                xerr=np.hstack([_whiskers(x) for x in xs]) if by_metric else None,
                yerr=np.hstack([_whiskers(y) for y in ys]),
                color=colour,
                linestyle=_dashes(i),
                marker=marker,
                markersize=4.5,
                elinewidth=0.8,
                label=label,
            )
            if by_metric and len(rows) > 1:  # which end of the line is the first row
                axes.plot(
                    mean_x[:1],
                    mean_y[:1],
                    color=colour,
                    marker=marker,
                    markersize=4.5,
                    markerfacecolor="white",
                    zorder=3,
                )
        axes.set_title(METRICS[name].title)
        axes.grid(color="0.93", linewidth=0.6)
        axes.set_axisbelow(True)
        if not by_metric and len(ticks := sorted(set(x_axis["values"].values()))) <= 8:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    for axes in panels[len(names) :]:
        axes.remove()
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    figure.supxlabel(METRICS[x_axis["metric"]].title if by_metric else x_axis["label"], fontsize=9, color="0.15")


def _plan_lines(results: dict[str, Any], name: str, series: dict[str, Any]) -> Plan:
    names, lines, x = _line_panels(results, series), series["lines"], series["x"]
    titles = ", ".join(METRICS[panel].title for panel in names)
    over = METRICS[x["metric"]].title if "metric" in x else x["label"]
    first = next(iter(lines.values()))
    caption = f"{name}: {titles} over {over}, means and intervals."
    if "metric" in x and len(first) > 1:
        caption += f" A line goes through its rows in order, from the hollow point ({first[0]}) on ({first[-1]} last)."
    rows, columns = _grid(len(names))
    return Plan(
        f"series_{name}",
        caption,
        f"{titles} over {over}, one line each for {', '.join(lines)}.",
        (1.8 + 2.6 * columns, 0.5 + 2.4 * rows),
        functools.partial(_draw_lines, series=series),
    )


def plans(results: dict[str, Any]) -> list[Plan]:
    """Every figure that these results have the numbers for, in the order of the report."""
    methods, panels, kl = len(results["rows"]), len(in_group(results, MARGINS)), _tradeoff_kl(results)
    found: list[Plan] = []
    if panels:
        found.append(
            Plan(
                "margins",
                "Margins of the best candidate, mean and interval.",
                "One panel a margin, one row a method: the mean as a point, the interval as a bar.",
                (max(3.6, 1.2 + 1.35 * panels), 0.9 + 0.27 * methods),
                _draw_margins,
            )
        )
    if any({"true_reward", kl} <= row["metrics"].keys() for row in results["rows"]):
        found.append(
            Plan(
                "reward_kl",
                "Reward against distance from the reference, means and intervals.",
                f"One point a method: mean reward over {METRICS[kl].title}.",
                (5.0, 3.6),
                _draw_tradeoff,
            )
        )
    for name, series in results.get("series", {}).items():
        if _line_panels(results, series):
            found.append(_plan_lines(results, name, series))
    if results.get("curves"):
        found.append(
            Plan(
                "curves",
                "Training curves: every logged value, and its mean over 5 % of the run.",
                "Loss and margin over the optimiser steps, one line a method.",
                (8.0, 2.9),
                _draw_curves,
            )
        )
    if "schedule" in results:
        gamma, effective = results["schedule"]["gamma"], results["schedule"]["effective_negatives"]
        found.append(
            Plan(
                "schedule",
                "Hardness and the number of equally likely negatives it amounts to.",
                f"Over the optimiser steps, gamma from {gamma[0]:g} to {gamma[-1]:g} and effective negatives "
                f"from {effective[0]:.1f} to {effective[-1]:.1f}.",
                (5.0, 3.4),
                _draw_schedule,
            )
        )
    return found


def save(plan: Plan, results: dict[str, Any], folder: Path) -> Path:
    """Draw `plan` into folder/NAME.png at DPI; the path."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # never pyplot: no global figure, no display, Agg by default

    path = folder / f"{plan.name}.png"
    with rc_context(STYLE):
        figure = Figure(figsize=plan.size, dpi=DPI, layout="constrained")
        plan.draw(figure, results)
        with files.replacing(path) as partial:
            figure.savefig(partial, format="png")
    return path
