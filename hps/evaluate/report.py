"""From a results dict to results.json, RESULTS.md, report.html and figures. Reads numbers only: no model, no data.

    {"suite": str, "commit": str, "machine": str, "seconds": float,
     "rows": [{"method": str, "seeds": int, "metrics": {name: {"mean", "low", "high"}}}],
     optional "comparisons": [{"a": method, "b": method, "metric": name, "mean", "low", "high"}],   of a - b
     optional "settings": {name: anything JSON},
     optional "curves": {method: {"step": [...], "loss": [...], "margin": [...]}},
     optional "schedule": {"step": [...], "gamma": [...], "effective_negatives": [...]}}
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hps.evaluate import page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Metric(NamedTuple):
    group: str
    title: str
    digits: int
    better: int  # +1: larger is better, -1: smaller is, 0: neither
    meaning: str


_MARGINS, _KL, _TEXT, _WINS, _COST = (
    "Margins (nats)", "Distance to the reference (nats)", "Samples", "Samples against SFT", "Cost")

METRICS = {
    "rm2": Metric(_MARGINS, "RM2", 2, 1, "log-ratio of the best candidate minus the runner-up's, no beta"),
    "rm10": Metric(_MARGINS, "RM10", 2, 1, "the same against the mean of the ten hardest dispreferred"),
    "rmgap": Metric(_MARGINS, "RMgap", 2, 1, "the same against the hardest at least 0.5 reward below"),
    "rm_min": Metric(_MARGINS, "RM min", 2, 1, "the same against the candidate of lowest reward"),
    "rm_worst_case": Metric(_MARGINS, "RM worst", 2, 1, "the same against the largest dispreferred one"),
    "rm_dpo": Metric(_MARGINS, "RM_DPO", 2, 1, "log-ratio of the test set's chosen minus its rejected"),
    "rm_rdpo_chars": Metric(_MARGINS, "RM_R-DPO chars", 2, 1, "RM_DPO - 0.01 (chosen - rejected characters)"),
    "rm_rdpo_tokens": Metric(_MARGINS, "RM_R-DPO tokens", 2, 1, "RM_DPO - 0.01 (chosen - rejected tokens)"),
    "kl_seq": Metric(_KL, "KL (sequence)", 2, 0, "mean log-ratio of the winner; negative if it became rarer"),
    "kl_exact": Metric(_KL, "KL (exact)", 2, 0, "next-token KL(policy, reference) summed over the winner"),
    "true_reward": Metric(_TEXT, "reward", 2, 1, "mean evaluation reward of the samples"),
    "best_of_k_reward": Metric(_TEXT, "best of k", 2, 1, "mean over prompts of the best sample's reward"),
    "harm": Metric(_TEXT, "harm %", 1, -1, "samples that are harmful"),
    "junk": Metric(_TEXT, "junk %", 1, -1, "samples that are broken text"),
    "length": Metric(_TEXT, "words", 1, 0, "mean words of a sample"),
    "bleu_char": Metric(_TEXT, "BLEU char", 3, 1, "character 4-gram BLEU in [0, 1], as in the authors' code"),
    "bleu_word": Metric(_TEXT, "BLEU word", 1, 1, "mean word-level sentence BLEU in [0, 100] by sacrebleu"),
    "win": Metric(_WINS, "win %", 1, 1, "samples with a higher reward than the same-numbered SFT sample"),
    "tie": Metric(_WINS, "tie %", 1, 0, "samples with exactly the same reward"),
    "lose": Metric(_WINS, "lose %", 1, -1, "samples with a lower reward"),
    "train_seconds": Metric(_COST, "train s", 1, -1, "seconds of preference training; [lowest, highest] seed"),
    "train_tokens": Metric(_COST, "tokens (k)", 0, -1, "thousand packed tokens of preference training; the same range"),
}


# ---- the schema -----------------------------------------------------------------------------------

def _need(ok: bool, path: str, problem: str) -> None:
    if not ok:
        raise ValueError(f"{path}: {problem}")


def _check_keys(item: Any, path: str, required: set[str], optional: frozenset[str] = frozenset()) -> None:
    _need(isinstance(item, dict), path, f"need an object, got {type(item).__name__}")
    _need(required <= item.keys(), path, f"misses {', '.join(sorted(required - item.keys()))}")
    extra = sorted(item.keys() - required - optional)
    _need(not extra, path, f"unknown key {', '.join(extra)}; remove it or put it under settings")


def _check_text(value: Any, path: str) -> None:
    _need(isinstance(value, str) and value != "", path, f"need a non-empty string, got {value!r}")


def _check_number(value: Any, path: str) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _need(number and math.isfinite(value), path, f"need a finite number, got {value!r}")


def _check_interval(item: dict[str, Any], path: str) -> None:
    for key in ("low", "mean", "high"):
        _check_number(item[key], f"{path}.{key}")
    slack = 1e-9 * (1 + abs(item["mean"]))  # rounding of a constant column
    _need(item["low"] <= item["mean"] + slack and item["mean"] <= item["high"] + slack, path,
          f"need low <= mean <= high, got {item['low']}, {item['mean']}, {item['high']}")


def _check_metric(name: str, path: str) -> None:
    _need(name in METRICS, path, f"unknown metric {name!r}; add a line to METRICS in hps/evaluate/report.py")


def _check_series(item: Any, path: str, keys: set[str]) -> None:
    _check_keys(item, path, keys)
    for key in sorted(keys):
        _need(isinstance(item[key], list) and len(item[key]) > 0, f"{path}.{key}", "need a non-empty list")
        _need(len(item[key]) == len(item["step"]), f"{path}.{key}",
              f"has {len(item[key])} values for {len(item['step'])} steps")
        for i, value in enumerate(item[key]):
            _check_number(value, f"{path}.{key}[{i}]")


def validate(results: dict[str, Any]) -> None:
    """ValueError naming the path of the first thing in `results` that breaks the schema above.

    Numbers are finite, low <= mean <= high, methods unique and known where they are referred to.
    """
    _check_keys(results, "results", {"suite", "commit", "machine", "seconds", "rows"},
                frozenset({"comparisons", "settings", "curves", "schedule"}))
    for key, kind in (("rows", list), ("comparisons", list), ("settings", dict), ("curves", dict)):
        _need(isinstance(results.get(key, kind()), kind), key, f"need a {kind.__name__}")
    for key in ("suite", "commit", "machine"):
        _check_text(results[key], key)
    _check_number(results["seconds"], "seconds")
    _need(len(results["rows"]) > 0, "rows", "need at least one row")
    methods: set[str] = set()
    for i, row in enumerate(results["rows"]):
        path = f"rows[{i}]"
        _check_keys(row, path, {"method", "seeds", "metrics"})
        _check_text(row["method"], f"{path}.method")
        _need(row["method"] not in methods, f"{path}.method", f"{row['method']!r} appears twice")
        methods.add(row["method"])
        _need(type(row["seeds"]) is int and row["seeds"] >= 1, f"{path}.seeds", "need a whole number >= 1")
        _need(isinstance(row["metrics"], dict), f"{path}.metrics", "need an object")
        for name, interval in row["metrics"].items():
            _check_metric(name, f"{path}.metrics")
            _check_keys(interval, f"{path}.metrics.{name}", {"mean", "low", "high"})
            _check_interval(interval, f"{path}.metrics.{name}")
    for i, item in enumerate(results.get("comparisons", [])):
        path = f"comparisons[{i}]"
        _check_keys(item, path, {"a", "b", "metric", "mean", "low", "high"})
        for side in ("a", "b"):
            _need(item[side] in methods, f"{path}.{side}", f"no row for method {item[side]!r}")
        _check_metric(item["metric"], f"{path}.metric")
        _check_interval(item, path)
    for method, series in results.get("curves", {}).items():
        _need(method in methods, "curves", f"no row for method {method!r}")
        _check_series(series, f"curves.{method}", {"step", "loss", "margin"})
    if "schedule" in results:
        _check_series(results["schedule"], "schedule", {"step", "gamma", "effective_negatives"})


# ---- tables ---------------------------------------------------------------------------------------

def _markdown(header: list[str], rows: list[list[page.Cell]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    def show(cell: page.Cell) -> str:
        mean = f"**{cell.text}**" if cell.mark == "best" else cell.text
        return " ".join(filter(None, (mean, cell.interval, "~" if cell.mark == "near" else "")))
    return "\n".join([line(header), line(["---"] * len(header)), *(line(map(show, row)) for row in rows)])


def _number(item: dict[str, float], name: str, sign: str = "") -> page.Cell:
    """1.23 and [1.10, 1.31]; no interval for a number without one."""
    mean, low, high = (f"{item[key]:{sign}z.{METRICS[name].digits}f}" for key in ("mean", "low", "high"))
    interval = "" if item["low"] == item["mean"] == item["high"] else f"[{low}, {high}]"
    return page.Cell(mean, interval, value=item["mean"])


def _present(results: dict[str, Any]) -> list[str]:
    return [name for name in METRICS if any(name in row["metrics"] for row in results["rows"])]


def _in_group(results: dict[str, Any], group: str) -> list[str]:
    return [name for name in _present(results) if METRICS[name].group == group]


LEGEND = ("[low, high]: 95 % bootstrap interval. (+): larger is better, (-): smaller is. Bold: best mean. "
          "`~`: the interval overlaps that of the best, so no claim that they differ.")


def table(results: dict[str, Any], *, metrics: Sequence[str] | None = None) -> str:
    """GitHub Markdown: one row a method, `mean [low, high]` cells, and LEGEND below.

    metrics: names of METRICS in the order wanted; default: all that any row has. ValueError: unknown name.
    """
    validate(results)
    names = _present(results) if metrics is None else list(metrics)
    for name in names:
        _check_metric(name, "metrics")
    return f"{_markdown(*_methods(results, names))}\n\n{LEGEND}\n"


def _methods(results: dict[str, Any], names: list[str]) -> tuple[list[str], list[list[page.Cell]]]:
    rows = [[page.Cell(row["method"]), page.Cell(str(row["seeds"]), value=row["seeds"])] for row in results["rows"]]
    for name in names:
        found = [row["metrics"].get(name) for row in results["rows"]]
        ranked = [item for item in found if item is not None] if METRICS[name].better else []
        best = max(ranked, key=lambda item, name=name: METRICS[name].better * item["mean"], default=None)
        for cells, item in zip(rows, found, strict=True):
            if item is None:
                cells.append(page.Cell("-", value=math.nan))
                continue
            mark = ""
            if best is not None and any(other["mean"] != best["mean"] for other in ranked):
                overlaps = item["low"] <= best["high"] and best["low"] <= item["high"]
                mark = "best" if item["mean"] == best["mean"] else "near" if overlaps else ""
            cells.append(_number(item, name)._replace(mark=mark))
    arrow = {1: " (+)", -1: " (-)", 0: ""}
    return ["method", "seeds", *(METRICS[name].title + arrow[METRICS[name].better] for name in names)], rows


def comparisons_table(results: dict[str, Any]) -> str:
    """GitHub Markdown of the paired differences a - b with a verdict; "" when the results hold none.

    Verdict: "a larger" or "b larger" when the interval lies on one side of 0, else "unresolved".
    """
    validate(results)
    return _markdown(*_comparisons(results)) + "\n" if results.get("comparisons") else ""


def _comparisons(results: dict[str, Any]) -> tuple[list[str], list[list[page.Cell]]]:
    rows = []
    for item in results["comparisons"]:
        verdict = "a larger" if item["low"] > 0 else "b larger" if item["high"] < 0 else "unresolved"
        rows.append([page.Cell(METRICS[item["metric"]].title), page.Cell(item["a"]), page.Cell(item["b"]),
                     _number(item, item["metric"], "+"), page.Cell(verdict)])
    return ["metric", "a", "b", "a - b", "verdict"], rows


def _tables(results: dict[str, Any]) -> list[page.Table]:
    """One table a group of metrics, and the comparisons last."""
    tables = []
    for group in dict.fromkeys(METRICS[name].group for name in _present(results)):
        names = _in_group(results, group)
        meanings = [(f"{METRICS[name].title} ({name})", METRICS[name].meaning) for name in names]
        tables.append(page.Table(group, *_methods(results, names), meanings=meanings))
    if results.get("comparisons"):
        note = "Same prompts and seeds on both sides; unresolved: the interval contains 0."
        tables.append(page.Table("Paired comparisons", *_comparisons(results), note=note))
    return tables


# ---- figures --------------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by colour-blind readers; the marker tells them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.4,
    "axes.edgecolor": "0.3", "axes.labelcolor": "0.15", "xtick.color": "0.3", "xtick.labelcolor": "0.15",
    "xtick.major.width": 0.6, "ytick.color": "0.3", "ytick.labelcolor": "0.15", "ytick.major.width": 0.6,
}
DPI = 200


Drawing = Callable[["Figure", dict[str, Any]], None]


def _tradeoff_kl(results: dict[str, Any]) -> str:
    return "kl_exact" if "kl_exact" in _present(results) else "kl_seq"


def _look(i: int) -> tuple[str, str]:
    return COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]


def _whiskers(item: dict[str, float]) -> list[list[float]]:
    return [[max(0.0, item["mean"] - item["low"])], [max(0.0, item["high"] - item["mean"])]]


def _draw_margins(figure: "Figure", results: dict[str, Any]) -> None:
    rows, names = results["rows"], _in_group(results, _MARGINS)
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

    places = [(6, 4, "left", "bottom"), (6, -4, "left", "top"), (-6, 4, "right", "bottom"),
              (-6, -4, "right", "top"), (0, 14, "center", "bottom"), (0, -14, "center", "top")]
    for x, y, text, colour in points:
        tries = [axes.annotate(text, (x, y), xytext=(dx, dy), textcoords="offset points", ha=ha, va=va,
                               color=colour, fontsize=8.5) for dx, dy, ha, va in places]
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
        axes.errorbar(x["mean"], y["mean"], xerr=_whiskers(x), yerr=_whiskers(y), color=colour, marker=marker,
                      markersize=6, linewidth=1.0)
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
            i = order.index(method)
            colour, dashes = _look(i)[0], ("-", "--", ":")[i // len(COLOURS) % 3]
            values = np.asarray(series[key], dtype=np.float64)
            width = max(1, len(values) // 20)
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axes.plot(series["step"], values, color=colour, alpha=0.18, linewidth=0.8)
            axes.plot(series["step"][width - 1:], smooth, color=colour, linestyle=dashes, label=method)
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


def _figures(results: dict[str, Any]) -> list[tuple[str, str, str, tuple[float, float], Drawing]]:
    """(file name, caption, alt text, inches, drawing) of every figure that these results have the numbers for."""
    methods, panels, kl = len(results["rows"]), len(_in_group(results, _MARGINS)), _tradeoff_kl(results)
    figures: list[tuple[str, str, str, tuple[float, float], Drawing]] = []
    if panels:
        figures.append(("margins", "Margins of the best candidate, mean and interval.",
                        "One panel a margin, one row a method: the mean as a point, the interval as a bar.",
                        (max(3.6, 1.2 + 1.35 * panels), 0.9 + 0.27 * methods), _draw_margins))
    if any({"true_reward", kl} <= row["metrics"].keys() for row in results["rows"]):
        figures.append(("reward_kl", "Reward against distance from the reference, means and intervals.",
                        f"One point a method: mean reward over {METRICS[kl].title}.", (5.0, 3.6), _draw_tradeoff))
    if results.get("curves"):
        figures.append(("curves", "Training curves: every logged value, and its mean over 5 % of the run.",
                        "Loss and margin over the optimiser steps, one line a method.", (8.0, 2.9), _draw_curves))
    if "schedule" in results:
        gamma, effective = results["schedule"]["gamma"], results["schedule"]["effective_negatives"]
        figures.append(("schedule", "Hardness and the number of equally likely negatives it amounts to.",
                        f"Over the optimiser steps, gamma from {gamma[0]:g} to {gamma[-1]:g} and effective negatives "
                        f"from {effective[0]:.1f} to {effective[-1]:.1f}.", (5.0, 3.4), _draw_schedule))
    return figures


def _save(path: Path, size: tuple[float, float], draw: Drawing, results: dict[str, Any]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # never pyplot: no global figure, no display, Agg by default

    with rc_context(STYLE):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        draw(figure, results)
        temporary = path.with_name(path.name + ".tmp")
        figure.savefig(temporary, format="png")
    os.replace(temporary, path)


# ---- the report -----------------------------------------------------------------------------------

def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """Write results.json, RESULTS.md, report.html and figures/*.png under `out` (made if missing); returns their paths.

    results: the schema at the top of this file. ValueError when it is broken: then nothing is written.
    """
    validate(results)
    try:
        text = json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: not writable as JSON: {error}") from None
    (out / "figures").mkdir(parents=True, exist_ok=True)
    _write(out / "results.json", text)
    title, minutes = f"Results: {results['suite']}", f"{results['seconds'] / 60:.1f} minutes"
    settings = [(key, json.dumps(value)) for key, value in results.get("settings", {}).items()]
    parts = [f"# {title}", f"Commit `{results['commit']}`, {results['machine']}, {minutes}."]
    if settings:
        parts.append("\n".join(f"* {key}: `{value}`" for key, value in settings))
    parts.append(LEGEND)
    tables = _tables(results)
    for item in tables:
        parts += filter(None, [f"## {item.title}", _markdown(item.header, item.rows), item.note])
    written, figures = [out / "results.json", out / "RESULTS.md", out / "report.html"], []
    for name, caption, alt, size, draw in _figures(results):
        path = out / "figures" / f"{name}.png"
        _save(path, size, draw, results)
        written.append(path)
        parts.append(f"![{alt}](figures/{name}.png)\n\n{caption}")
        figures.append(page.Figure(caption, alt, round(96 * size[0]), path.read_bytes()))
    parts += ["## What the columns mean",
              "\n".join(f"* **{METRICS[name].title}** (`{name}`): {METRICS[name].meaning}"
                        for name in _present(results))]
    _write(out / "RESULTS.md", "\n\n".join(parts) + "\n")
    subtitle = f"Commit {results['commit']}, {results['machine']}, {minutes}."
    _write(out / "report.html", page.render(
        title, subtitle, settings=settings, legend=LEGEND.replace("`", ""), tables=tables, figures=figures))
    return written
