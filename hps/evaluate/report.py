"""From a results dict to results.json, RESULTS.md, report.html and figures. Reads numbers only: no model, no data.

{"suite": str, "commit": str, "machine": str, "seconds": float,
 "rows": [{"method": str, "seeds": int, "metrics": {name: {"mean", "low", "high"}}}],     methods differ
 optional "comparisons": [{"a": method, "b": method, "metric": name, "mean", "low", "high",    of a - b
                           optional "p": of a paired test}],
 optional "settings": {name: anything JSON},
 optional "curves": {method: {"step": [...], "loss": [...], "margin": [...]}},
 optional "schedule": {"step": [...], "gamma": [...], "effective_negatives": [...]},
 optional "series": {figure name: {"x": {"metric": name} or {"label": str, "values": {method: number}},
                                   "panels": [name], "lines": {line name: [method]}}},   lines through rows
 optional "claims": [{"claim": str, "paper": str, "verdict": one of VERDICTS, and if not measured "reason": str,
                      else "kind": "difference" or "value" or "ratio", "metric": name, "mean", "low", "high"}]}
"""

import json
import math
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hps.evaluate import figures, md, page
from hps.evaluate.metrics import METRICS, present
from hps.io import files

VERDICTS = ("holds", "does not hold", "unresolved", "not measured here")
LEGEND = (
    "[low, high]: 95 % bootstrap interval. (+): larger is better, (-): smaller is. Bold: best mean. "
    "`~`: the interval overlaps that of the best, so no claim that they differ."
)
COMPARISONS_NOTE = (
    "Same prompts and seeds on both sides; unresolved: the interval contains 0. "
    "p: Wilcoxon's test over the prompts of these models; the interval also draws worlds and runs."
)
CLAIMS_NOTE = (
    "Holds, does not hold: the whole interval lies on one side of the claim's bound, which is 0 where the claim names "
    "none; unresolved: it does not. Beside a ratio of cost stands its range over runs."
)


class Cell(NamedTuple):
    text: str
    interval: str = ""  # "[low, high]"
    mark: str = ""  # "best", "near": its interval overlaps that of the best, or ""
    value: float | None = None  # the number that its column is sorted by, NaN last; None: a column of text


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[Cell]]
    note: str = ""
    meanings: Sequence[tuple[str, str]] = ()  # (term, what it means)
    keys: int = 1  # first columns that say what a row is about


def markdown(table: Table) -> str:
    """The table in GitHub Markdown: `mean [low, high]` cells, the best in bold."""

    def show(cell: Cell) -> str:
        text = f"**{md.cell(cell.text)}**" if cell.mark == "best" else md.cell(cell.text)
        return " ".join(filter(None, (text, cell.interval, "~" if cell.mark == "near" else "")))

    return md.table(table.header, [[show(cell) for cell in row] for row in table.rows], keys=table.keys)


def _number(item: dict[str, float], digits: int, sign: str = "", mark: str = "") -> Cell:
    mean, interval = md.interval(item, digits, sign).split(" ", 1)
    # A number without an interval stands alone.
    return Cell(mean, "" if item["low"] == item["mean"] == item["high"] else interval, mark, item["mean"])


def methods_table(results: dict[str, Any], group: str = "") -> Table:
    """One row per method, one column per metric that any of them has; of one group of metrics, if it is named."""
    names = present(results["rows"], group)
    rows = [[Cell(row["method"]), Cell(str(row["seeds"]), value=row["seeds"])] for row in results["rows"]]
    for name in names:
        metric, found = METRICS[name], [row["metrics"].get(name) for row in results["rows"]]
        known = [item for item in found if item is not None]
        ranked = metric.better and any(item["mean"] != known[0]["mean"] for item in known)
        best = max(known, key=lambda item, sign=metric.better: sign * item["mean"])
        for cells, item in zip(rows, found, strict=True):
            if item is None:
                cells.append(Cell("-", value=math.nan))
                continue
            near = item["low"] <= best["high"] and best["low"] <= item["high"]
            mark = "best" if item["mean"] == best["mean"] else "near" if near else ""
            cells.append(_number(item, metric.digits, mark=mark if ranked else ""))
    arrow = {1: " (+)", -1: " (-)", 0: ""}
    header = ["method", "seeds", *(METRICS[name].title + arrow[METRICS[name].better] for name in names)]
    meanings = [(f"{METRICS[name].title} ({name})", METRICS[name].meaning) for name in names]
    return Table(group, header, rows, meanings=meanings)


def table(results: dict[str, Any]) -> str:
    """GitHub Markdown of all metrics of all methods, and LEGEND below."""
    return f"{markdown(methods_table(results))}\n\n{md.wrapped(LEGEND)}\n"


def comparisons_table(results: dict[str, Any]) -> str:
    """GitHub Markdown of the paired differences a - b with a verdict; "" when the results hold none."""
    return markdown(_comparisons(results)) + "\n" if results.get("comparisons") else ""


def _comparisons(results: dict[str, Any]) -> Table:
    rows = []
    for item in results["comparisons"]:
        verdict = "a larger" if item["low"] > 0 else "b larger" if item["high"] < 0 else "unresolved"
        names = [Cell(METRICS[item["metric"]].title), Cell(item["a"]), Cell(item["b"])]
        p = Cell(f"{item['p']:.1g}" if "p" in item else "-")
        rows.append([*names, _number(item, METRICS[item["metric"]].digits, "+"), Cell(verdict), p])
    header = ["metric", "a", "b", "a - b", "verdict", "p"]
    return Table("Paired comparisons", header, rows, COMPARISONS_NOTE, keys=3)


def _claims(results: dict[str, Any]) -> Table:
    rows = []
    for item in results["claims"]:
        here, interval = item.get("reason", ""), "-"
        if not here:
            metric, kind = METRICS[item["metric"]], item["kind"]
            number = _number(item, 2 if kind == "ratio" else metric.digits, "+" if kind == "difference" else "")
            here = f"{metric.title} {'x ' if kind == 'ratio' else ''}{number.text}"
            interval = number.interval or "-"
        rows.append([Cell(text) for text in (item["claim"], item["paper"], here, interval, item["verdict"])])
    count = Counter(item["verdict"] for item in results["claims"])
    note = f"{CLAIMS_NOTE} {', '.join(f'{count[word]} {word}' for word in VERDICTS if count[word])}."
    return Table("The paper's claims", ["claim", "paper", "here", "interval", "verdict"], rows, note)


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """Write results.json, RESULTS.md, report.html and figures/*.png under `out` (made if missing); returns their paths.

    Args:
        results: the keys at the top of this file.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    files.write_json(out / "results.json", results)
    groups = dict.fromkeys(METRICS[name].group for name in present(results["rows"]))
    tables = [methods_table(results, group) for group in groups]
    tables += [_comparisons(results)] if results.get("comparisons") else []
    tables += [_claims(results)] if results.get("claims") else []
    plans = figures.plans(results)
    drawn = [figures.save(plan, out / "figures") for plan in plans]

    title, minutes = f"Results: {results['suite']}", f"{results['seconds'] / 60:.1f} minutes"
    settings = [(key, json.dumps(value)) for key, value in results.get("settings", {}).items()]
    about = f"Commit {md.code(results['commit'])}, {md.plain(results['machine'])}, {minutes}."
    items = [md.wrapped(f"* {md.plain(key)}: {md.code(value)}") for key, value in settings]
    parts = [f"# {md.plain(title)}", md.wrapped(about), "\n".join(items), md.wrapped(LEGEND)]
    for each in tables:
        parts += [f"## {each.title}", markdown(each), md.wrapped(each.note)]
    for plan, path in zip(plans, drawn, strict=True):
        parts.append(md.wrapped(f"![{md.plain(plan.alt, also=r'[][]')}](figures/{path.name})"))
        parts.append(md.wrapped(md.plain(plan.caption)))
    meanings = (f"* **{METRICS[name].title}** (`{name}`): {METRICS[name].meaning}" for name in present(results["rows"]))
    parts += ["## What the columns mean", "\n".join(map(md.wrapped, meanings))]
    files.write_text(out / "RESULTS.md", "\n\n".join(filter(None, parts)) + "\n")

    images = [b64encode(path.read_bytes()).decode() for path in drawn]
    html = page.render(
        "report.html",
        title=title,
        subtitle=f"Commit {results['commit']}, {results['machine']}, {minutes}.",
        settings=settings,
        legend=LEGEND.replace("`", ""),
        tables=tables,
        figures=list(zip(plans, images, strict=True)),
    )
    files.write_text(out / "report.html", html)
    return [out / "results.json", out / "RESULTS.md", out / "report.html", *drawn]
