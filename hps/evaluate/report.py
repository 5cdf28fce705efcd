"""From a results dict to results.json, RESULTS.md, report.html and figures. Reads numbers only: no model, no data.

{"suite": str, "commit": str, "machine": str, "seconds": float,
 "worlds": int,                     of several each is one number behind an interval, of one its prompts are
 "rows": [{"method": str, "runs": int, "metrics": {name: ITEM}}],     methods differ
 optional "comparisons": [{"a": method, "b": method, "metric": name, ITEM of a - b, "p": of the t test,
                           "p_holm": the same after Holm; not of a row AGAIN}],
 optional "settings": {name: anything JSON},
 optional "options": {method: the options of train.py that its row has},
 optional "series": {figure name: {"x": {"metric": name} or {"label": str, "values": {method: number}},
                                   "panels": [name], "lines": {line name: [method]}}},   lines through rows
 optional "claims": [{"claim": str, "paper": str, "table": str, "verdict": one of VERDICTS, and if not measured
                      "reason": str, else "after_holm": one of VERDICTS, "metric": name, "p", "p_holm", ITEM,
                      "kind": "difference" or "value" or "ratio"}]}
ITEM: "mean", "low", "high" (both None where there is no interval), optional "values": of each world, or None
"""

import json
from base64 import b64encode
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hps.evaluate import figures, md
from hps.evaluate import page as pages
from hps.evaluate.metrics import AGAIN, METRICS, TUNED, ends, present
from hps.io import files

ENOUGH = 8  # worlds, those that `make reproduce` takes by itself
VERDICTS = ("holds", "does not hold", "unresolved", "not measured here")
SIGNS = "(+): larger is better, (-): smaller is."
MARKS = "Bold: best mean. `~`: the interval overlaps that of the best; paired comparisons in the report look closer."
NAMES = {  # what ends a row's name, and what it says
    AGAIN: "`... again`: the row once more with another seed, so that its differences are chance.",
    TUNED: "`... tuned`: at beta and lr that were found for the method; the other rows share one setting.",
}
COMPARISONS_NOTE = (
    "The same prompts on both sides, averaged by world; W: worlds; better, worse, larger, smaller: a than b; "
    "unresolved: the interval contains 0, so p of the t test is above 0.05. After Holm: p adjusted for this table's "
    "comparisons of the metric."
)
AGAIN_NOTE = "Of {0} differences of a row with itself, trained with another seed, {1} are resolved; 5 % are expected."
CLAIMS_NOTE = (
    "Holds, does not hold: the whole interval lies on one side of the claim's bound, which is 0 where the claim names "
    "none; unresolved: it does not. After Holm: p adjusted for this table's claims on the metric."
)


def legend(results: dict[str, Any]) -> str:
    """What the intervals of these results speak of, and what the marks of their tables mean."""
    worlds = results["worlds"]
    many = f"Student's t over {worlds} worlds, one number each: it speaks of other worlds."
    one = "Student's t over the prompts: it says nothing of other data or runs."
    names = [row["method"] for row in results["rows"]]
    told = [text for end, text in NAMES.items() if any(name.endswith(end) for name in names)]
    marks = [SIGNS, *([MARKS] if len(names) > 1 else [])]
    return " ".join([f"[low, high]: 95 % interval by {many if worlds > 1 else one}", *marks, *told])


class Cell(NamedTuple):
    text: str
    interval: str = ""  # "[low, high]"
    mark: str = ""  # "best", "near": its interval overlaps that of the best, or ""


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
    mean, _, interval = md.interval(item, digits, sign).partition(" ")
    return Cell(mean, interval, mark)


def methods_table(results: dict[str, Any], names: Sequence[str], title: str = "") -> Table:
    """One row per method, one column per named metric, of which each has a value in some row."""
    rows = [[Cell(row["method"]), Cell(str(row["runs"]))] for row in results["rows"]]
    for name in names:
        metric, found = METRICS[name], [row["metrics"].get(name) for row in results["rows"]]
        known = [item for item in found if item is not None]
        ranked = metric.better and any(item["mean"] != known[0]["mean"] for item in known)
        best = max(known, key=lambda item, sign=metric.better: sign * item["mean"])
        best_low, best_high = ends(best)
        for cells, item in zip(rows, found, strict=True):
            if item is None:
                cells.append(Cell("-"))
                continue
            low, high = ends(item)
            near = "near" if low <= best_high and best_low <= high else ""
            mark = "best" if item["mean"] == best["mean"] else near
            cells.append(_number(item, metric.digits, mark=mark if ranked else ""))
    arrow = {1: " (+)", -1: " (-)", 0: ""}
    header = ["method", "runs", *(METRICS[name].title + arrow[METRICS[name].better] for name in names)]
    meanings = [(f"{METRICS[name].title} ({name})", METRICS[name].meaning) for name in names]
    return Table(title, header, rows, meanings=meanings)


def table(results: dict[str, Any], names: Sequence[str] = ()) -> str:
    """GitHub Markdown of all methods and of all their metrics, or the named ones, and the legend below."""
    names = [name for name in present(results["rows"]) if name in names or not names]
    return f"{markdown(methods_table(results, names))}\n\n{md.wrapped(legend(results))}\n"


def verdict(item: dict[str, Any], p: float) -> str:
    """What a comparison says of a beside b, in a word, by this p."""
    words = {1: ("worse", "better"), -1: ("better", "worse"), 0: ("smaller", "larger")}[METRICS[item["metric"]].better]
    return "unresolved" if p >= 0.05 else words[item["mean"] > 0]


def answer(results: dict[str, Any]) -> list[str]:
    """What came out, in some sentences: the claims, the best text, the first rows that are compared with others."""
    counts = Counter(item["after_holm"] for item in results.get("claims", []) if "after_holm" in item)
    words = (("holds", "hold"), ("does not hold", "do not hold"), ("is unresolved", "are unresolved"))
    told = zip(VERDICTS, words, strict=False)
    told = ", ".join(f"{counts[word]} {some[counts[word] > 1]}" for word, some in told if counts[word])
    found = (
        [f"Of {counts.total()} claims that were measured {told} (adjusted for their number, by Holm)."]
        if counts
        else []
    )
    if counts and results["worlds"] == 1:
        found = ["One world judges no claim (take more --seeds): what follows speaks of its prompts alone."]
    if 1 < results["worlds"] < ENOUGH:
        found.append(f"{results['worlds']} worlds settle little: take more --seeds.")
    rows = {row["method"]: row["metrics"]["true_reward"] for row in results["rows"] if "true_reward" in row["metrics"]}
    if rows:
        best = max(rows, key=lambda name: rows[name]["mean"])
        near = [name for name in rows if name != best and ends(rows[name])[1] >= ends(rows[best])[0]]
        apart = ", apart from all others" if len(rows) > 1 else ""
        named = ", ".join(near) if len(near) <= 3 else f"{len(near)} of the {len(rows) - 1} others"
        apart = f"; the intervals of {named} overlap its own" if near else apart
        found.append(f"The samples of the highest reward are those of {best}: {md.interval(rows[best], 2)}{apart}.")
    compared = [item for item in results.get("comparisons", []) if "p_holm" in item]
    for a in list(dict.fromkeys(item["a"] for item in compared))[:2]:
        for metric in ("true_reward", "rm10"):
            mine = [item for item in compared if (item["a"], item["metric"]) == (a, metric)]
            words = [verdict(x, x["p_holm"]) for x in mine]
            words = ["not told apart from" if word == "unresolved" else f"{word} than" for word in words]
            numbers = [md.interval(x, METRICS[metric].digits, "+") for x in mine]
            differences = (f"{word} {x['b']}, {number}" for word, x, number in zip(words, mine, numbers, strict=True))
            if mine:
                title = METRICS[metric].title
                found.append(f"{title[0].upper()}{title[1:]} of {a}: {'; '.join(differences)}.")
    if any(item["p"] < 0.05 <= item["p_holm"] for item in compared):
        found.append("Of so many intervals some miss 0 by chance: what is told apart is so after Holm's adjustment.")
    return found


def comparisons_table(results: dict[str, Any]) -> Table:
    """The paired differences a - b with verdicts before and after Holm's adjustment."""

    rows, again = [], []
    for item in results["comparisons"]:
        raw, worlds = verdict(item, item["p"]), len([x for x in item["values"] if x is not None])
        after = verdict(item, item["p_holm"]) if "p_holm" in item else "-"
        again += [raw] if after == "-" else []
        metric = METRICS[item["metric"]]
        names, cells = (metric.title, item["a"], item["b"]), (str(worlds), raw, after, f"{item['p']:.1g}")
        rows.append([*map(Cell, names), _number(item, metric.digits, "+"), *map(Cell, cells)])
    resolved = len(again) - again.count("unresolved")
    note = COMPARISONS_NOTE + (" " + AGAIN_NOTE.format(len(again), resolved) if again else "")
    header = ["metric", "a", "b", "a - b", "W", "verdict", "after Holm", "p"]
    return Table("Paired comparisons", header, rows, note, keys=3)


def claims_tables(claims: list[dict[str, Any]]) -> list[Table]:
    """A table for each value of the claims' `table`, with the count of its verdicts."""
    tables = []
    for title in dict.fromkeys(item["table"] for item in claims):
        rows, mine = [], [item for item in claims if item["table"] == title]
        for item in mine:
            here, interval, worlds = item.get("reason", ""), "-", "-"
            if not here:
                metric, kind = METRICS[item["metric"]], item["kind"]
                number = _number(item, 2 if kind == "ratio" else metric.digits, "+" if kind == "difference" else "")
                here = f"{metric.title} {'x ' if kind == 'ratio' else ''}{number.text}"
                interval, worlds = number.interval or "-", str(len(item["values"]))
            after = item.get("after_holm", item["verdict"])
            rows.append([*map(Cell, (item["claim"], item["paper"], here, interval, worlds, item["verdict"], after))])
        raw, holm = (Counter(item.get(key, item["verdict"]) for item in mine) for key in ("verdict", "after_holm"))
        counts = (", ".join(f"{n[word]} {word}" for word in VERDICTS if n[word]) for n in (raw, holm))
        note = "{} {}; after Holm {}.".format(CLAIMS_NOTE, *counts)
        tables.append(Table(title, ["claim", "paper", "here", "interval", "W", "verdict", "after Holm"], rows, note))
    return tables


def sections(tables: list[Table]) -> list[str]:
    """Heading, table and note of each in Markdown."""
    return [part for each in tables for part in (f"## {each.title}", markdown(each), md.wrapped(each.note))]


def _parts(results: dict[str, Any]) -> tuple[str, list[tuple[str, str]], list[Table]]:
    """Title, settings and tables, for both pages."""
    groups = dict.fromkeys(METRICS[name].group for name in present(results["rows"]))
    tables = [methods_table(results, present(results["rows"], group), group) for group in groups]
    tables += [comparisons_table(results)] if results.get("comparisons") else []
    options = [[Cell(name), Cell(words)] for name, words in results.get("options", {}).items()]
    tables += [Table("What each row was trained with", ["row", "options of train.py"], options)] if options else []
    settings = [(key, json.dumps(value)) for key, value in results.get("settings", {}).items()]
    return f"Results: {results['suite']}", settings, claims_tables(results.get("claims", [])) + tables


def page(results: dict[str, Any], drawn: list[tuple[figures.Plan, str]]) -> str:
    """The report in GitHub Markdown, with these figures, of which each has the address of its file."""
    title, settings, tables = _parts(results)
    minutes = f"{results['seconds'] / 60:.1f} minutes"
    about = f"Commit {md.code(results['commit'])}, {md.plain(results['machine'])}, {minutes}."
    items = [md.wrapped(f"* {md.plain(key)}: {md.code(value)}") for key, value in settings]
    images = [
        [md.wrapped(f"![{md.plain(plan.alt, also=r'[][]')}]({address})"), md.wrapped(md.plain(plan.caption))]
        for plan, address in drawn
    ]
    told = [md.wrapped(f"* {md.plain(sentence)}") for sentence in answer(results)]
    parts = [f"# {md.plain(title)}", md.wrapped(about), "\n".join(told), *(images[0] if images else [])]
    parts += [md.wrapped(legend(results)), *sections(tables), *(part for image in images[1:] for part in image)]
    compared = {item["metric"] for item in results.get("comparisons", [])}
    shown = [name for name in METRICS if name in compared or name in present(results["rows"])]
    meanings = (f"* **{METRICS[name].title}** (`{name}`): {METRICS[name].meaning}" for name in shown)
    parts += ["## What the columns mean", "\n".join(map(md.wrapped, meanings))]
    parts += ["## Settings", "\n".join(items)] if items else []
    return "\n\n".join(filter(None, parts)) + "\n"


def write_report(results: dict[str, Any], out: Path) -> None:
    """Write results.json, RESULTS.md, report.html and figures/*.png under `out` (made if missing).

    Args:
        results: the keys at the top of this file.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    files.write_json(out / "results.json", results)
    plans = figures.plans(results)
    drawn = [figures.save(plan, out / "figures") for plan in plans]
    addresses = [f"figures/{path.name}" for path in drawn]
    files.write_text(out / "RESULTS.md", page(results, list(zip(plans, addresses, strict=True))))
    title, settings, tables = _parts(results)
    about = f"Commit {results['commit']}, {results['machine']}, {results['seconds'] / 60:.1f} minutes."
    images = [b64encode(path.read_bytes()).decode() for path in drawn]
    values = dict(title=title, subtitle=about, settings=settings, tables=tables, figures=list(zip(plans, images)))
    html = pages.render("report.html", answer=answer(results), legend=legend(results).replace("`", ""), **values)
    files.write_text(out / "report.html", html)
