"""From a results dict to results.json, RESULTS.md, report.html and figures. Reads numbers only: no model, no data.

{"suite": str, "commit": str, "machine": str, "seconds": float,
 "rows": [{"method": str, "seeds": int, "metrics": {name: {"mean", "low", "high"}}}],
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
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from hps.evaluate import md, page
from hps.io import files


class Metric(NamedTuple):
    group: str
    title: str
    digits: int
    better: int  # +1: larger is better, -1: smaller is, 0: neither
    meaning: str


MARGINS, _KL, _TEXT, _WINS, _COST = (
    "Margins (nats)",
    "Distance to the reference (nats)",
    "Samples",
    "Samples against SFT",
    "Cost",
)

METRICS = {
    "rm2": Metric(MARGINS, "RM2", 2, 1, "log-ratio of the best candidate minus the runner-up's, no beta"),
    "rm10": Metric(MARGINS, "RM10", 2, 1, "the same against the mean of the ten hardest dispreferred"),
    "rmgap": Metric(MARGINS, "RMgap", 2, 1, "the same against the hardest at least 0.5 reward below"),
    "rm_min": Metric(MARGINS, "RM min", 2, 1, "the same against the candidate of lowest reward"),
    "rm_worst_case": Metric(MARGINS, "RM worst", 2, 1, "the same against the largest dispreferred one"),
    "rm_dpo": Metric(MARGINS, "RM_DPO", 2, 1, "log-ratio of the test set's chosen minus its rejected"),
    "rm_rdpo_chars": Metric(MARGINS, "RM_R-DPO chars", 2, 1, "RM_DPO - 0.01 (chosen - rejected characters)"),
    "rm_rdpo_tokens": Metric(MARGINS, "RM_R-DPO tokens", 2, 1, "RM_DPO - 0.01 (chosen - rejected tokens)"),
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

VERDICTS = ("holds", "does not hold", "unresolved", "not measured here")

# The look of every figure: Okabe and Ito's colours, told apart by colour-blind readers, and in grey by the marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "text.parse_math": False,  # a name may hold two dollars
    "axes.edgecolor": "0.3",
    "axes.labelcolor": "0.15",
    "xtick.color": "0.3",
    "xtick.labelcolor": "0.15",
    "xtick.major.width": 0.6,
    "ytick.color": "0.3",
    "ytick.labelcolor": "0.15",
    "ytick.major.width": 0.6,
}
DPI = 200


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
    _need(
        item["low"] <= item["mean"] + slack and item["mean"] <= item["high"] + slack,
        path,
        f"need low <= mean <= high, got {item['low']}, {item['mean']}, {item['high']}",
    )


def _check_metric(name: str, path: str) -> None:
    _need(name in METRICS, path, f"unknown metric {name!r}; add a line to METRICS in hps/evaluate/report.py")


def _check_series(item: Any, path: str, keys: set[str]) -> None:
    _check_keys(item, path, keys)
    for key in sorted(keys):
        _need(isinstance(item[key], list) and len(item[key]) > 0, f"{path}.{key}", "need a non-empty list")
        _need(
            len(item[key]) == len(item["step"]),
            f"{path}.{key}",
            f"has {len(item[key])} values for {len(item['step'])} steps",
        )
        for i, value in enumerate(item[key]):
            _check_number(value, f"{path}.{key}[{i}]")


def _check_lines(item: Any, path: str, methods: set[str]) -> None:
    _check_keys(item, path, {"x", "panels", "lines"})
    _need(isinstance(item["panels"], list) and len(item["panels"]) > 0, f"{path}.panels", "need a non-empty list")
    for name in item["panels"]:
        _check_metric(name, f"{path}.panels")
    _need(isinstance(item["lines"], dict) and len(item["lines"]) > 0, f"{path}.lines", "need a non-empty object")
    rows = []
    for line, of_line in item["lines"].items():
        _need(isinstance(of_line, list) and len(of_line) > 0, f"{path}.lines.{line}", "need a non-empty list")
        for row in of_line:
            _need(row in methods, f"{path}.lines.{line}", f"no row for method {row!r}")
        rows += of_line
    if isinstance(item["x"], dict) and "metric" in item["x"]:
        _check_keys(item["x"], f"{path}.x", {"metric"})
        _check_metric(item["x"]["metric"], f"{path}.x.metric")
        return
    _check_keys(item["x"], f"{path}.x", {"label", "values"})
    _check_text(item["x"]["label"], f"{path}.x.label")
    _check_keys(item["x"]["values"], f"{path}.x.values", set(rows))
    for row, value in item["x"]["values"].items():
        _check_number(value, f"{path}.x.values.{row}")


def _check_claim(item: Any, path: str) -> None:
    unmeasured = isinstance(item, dict) and item.get("verdict") == VERDICTS[-1]
    numbers = {"kind", "metric", "mean", "low", "high"}
    _check_keys(item, path, {"claim", "paper", "verdict"} | ({"reason"} if unmeasured else numbers))
    for key in ("claim", "paper", *(["reason"] if unmeasured else [])):
        _check_text(item[key], f"{path}.{key}")
    _need(item["verdict"] in VERDICTS, f"{path}.verdict", f"need one of {', '.join(VERDICTS)}; got {item['verdict']!r}")
    if not unmeasured:
        kinds = ("difference", "value", "ratio")
        _need(item["kind"] in kinds, f"{path}.kind", f"need one of {', '.join(kinds)}; got {item['kind']!r}")
        _check_metric(item["metric"], f"{path}.metric")
        _check_interval(item, path)


def validate(results: dict[str, Any]) -> None:
    """ValueError naming the path of the first thing in `results` that breaks the schema above.

    Numbers are finite, low <= mean <= high, methods unique and known where they are referred to.
    """
    _check_keys(
        results,
        "results",
        {"suite", "commit", "machine", "seconds", "rows"},
        frozenset({"comparisons", "settings", "curves", "schedule", "series", "claims"}),
    )
    for key, kind in (
        ("rows", list),
        ("comparisons", list),
        ("settings", dict),
        ("curves", dict),
        ("series", dict),
        ("claims", list),
    ):
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
        _check_keys(item, path, {"a", "b", "metric", "mean", "low", "high"}, frozenset({"p"}))
        _need(0 <= item.get("p", 0) <= 1, f"{path}.p", "need a probability")
        for side in ("a", "b"):
            _need(item[side] in methods, f"{path}.{side}", f"no row for method {item[side]!r}")
        _check_metric(item["metric"], f"{path}.metric")
        _check_interval(item, path)
    for method, series in results.get("curves", {}).items():
        _need(method in methods, "curves", f"no row for method {method!r}")
        _check_series(series, f"curves.{method}", {"step", "loss", "margin"})
    if "schedule" in results:
        _check_series(results["schedule"], "schedule", {"step", "gamma", "effective_negatives"})
    for name, item in results.get("series", {}).items():
        _need(
            re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None,
            "series",
            f"{name!r} cannot name a file; use letters, digits, _ and -",
        )
        _check_lines(item, f"series.{name}", methods)
    for i, item in enumerate(results.get("claims", [])):
        _check_claim(item, f"claims[{i}]")


# ---- tables ---------------------------------------------------------------------------------------


def _markdown(header: list[str], rows: list[list[page.Cell]]) -> str:
    def show(cell: page.Cell) -> str:
        text = md.cell(cell.text)
        mean = f"**{text}**" if cell.mark == "best" else text
        return " ".join(filter(None, (mean, cell.interval, "~" if cell.mark == "near" else "")))

    return md.table(header, (list(map(show, row)) for row in rows))


def _number(item: dict[str, float], digits: int, sign: str = "") -> page.Cell:
    """1.23 and [1.10, 1.31]; no interval for a number without one."""
    mean, low, high = (f"{item[key]:{sign}z.{digits}f}" for key in ("mean", "low", "high"))
    interval = "" if item["low"] == item["mean"] == item["high"] else f"[{low}, {high}]"
    return page.Cell(mean, interval, value=item["mean"])


def present(results: dict[str, Any]) -> list[str]:
    return [name for name in METRICS if any(name in row["metrics"] for row in results["rows"])]


def in_group(results: dict[str, Any], group: str) -> list[str]:
    return [name for name in present(results) if METRICS[name].group == group]


LEGEND = (
    "[low, high]: 95 % bootstrap interval. (+): larger is better, (-): smaller is. Bold: best mean. "
    "`~`: the interval overlaps that of the best, so no claim that they differ."
)


def table(results: dict[str, Any]) -> str:
    """GitHub Markdown: one row a method, `mean [low, high]` cells of all metrics that any row has, and LEGEND below."""
    validate(results)
    return f"{_markdown(*_methods(results, present(results)))}\n\n{LEGEND}\n"


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
            cells.append(_number(item, METRICS[name].digits)._replace(mark=mark))
    arrow = {1: " (+)", -1: " (-)", 0: ""}
    return ["method", "seeds", *(METRICS[name].title + arrow[METRICS[name].better] for name in names)], rows


def comparisons_table(results: dict[str, Any]) -> str:
    """GitHub Markdown of the paired differences a - b with a verdict; "" when the results hold none.

    Verdict: "a larger" or "b larger" when the interval lies on one side of 0, else "unresolved". p: of the paired test.
    """
    validate(results)
    return _markdown(*_comparisons(results)) + "\n" if results.get("comparisons") else ""


def _comparisons(results: dict[str, Any]) -> tuple[list[str], list[list[page.Cell]]]:
    rows = []
    for item in results["comparisons"]:
        verdict = "a larger" if item["low"] > 0 else "b larger" if item["high"] < 0 else "unresolved"
        p = f"{item['p']:.1g}" if "p" in item else "-"
        rows.append(
            [
                page.Cell(METRICS[item["metric"]].title),
                page.Cell(item["a"]),
                page.Cell(item["b"]),
                _number(item, METRICS[item["metric"]].digits, "+"),
                page.Cell(verdict),
                page.Cell(p),
            ]
        )
    return ["metric", "a", "b", "a - b", "verdict", "p"], rows


CLAIMS_NOTE = (
    "Holds, does not hold: the whole interval lies on one side of the claim's bound, which is 0 where the claim names "
    "none; unresolved: it does not. Beside a ratio of cost stands its range over runs."
)


def _claims(results: dict[str, Any]) -> tuple[list[str], list[list[page.Cell]]]:
    rows = []
    for item in results["claims"]:
        if "reason" in item:
            here, interval = item["reason"], "-"
        else:
            metric, kind = METRICS[item["metric"]], item["kind"]
            digits, sign = (2, "") if kind == "ratio" else (metric.digits, "+" if kind == "difference" else "")
            number = _number(item, digits, sign)
            here = f"{metric.title} {'x ' if kind == 'ratio' else ''}{number.text}"
            interval = number.interval or "-"
        rows.append([page.Cell(text) for text in (item["claim"], item["paper"], here, interval, item["verdict"])])
    return ["claim", "paper", "here", "interval", "verdict"], rows


def _tables(results: dict[str, Any]) -> list[page.Table]:
    """One table a group of metrics, then the comparisons and the claims."""
    tables = []
    for group in dict.fromkeys(METRICS[name].group for name in present(results)):
        names = in_group(results, group)
        meanings = [(f"{METRICS[name].title} ({name})", METRICS[name].meaning) for name in names]
        tables.append(page.Table(group, *_methods(results, names), meanings=meanings))
    if results.get("comparisons"):
        note = "Same prompts and seeds on both sides; unresolved: the interval contains 0. "
        note += "p: Wilcoxon's test over the prompts of these models; the interval also draws worlds and runs."
        tables.append(page.Table("Paired comparisons", *_comparisons(results), note=note))
    if results.get("claims"):
        count = Counter(item["verdict"] for item in results["claims"])
        note = f"{CLAIMS_NOTE} {', '.join(f'{count[word]} {word}' for word in VERDICTS if count[word])}."
        tables.append(page.Table("The paper's claims", *_claims(results), note=note))
    return tables


# ---- the report -----------------------------------------------------------------------------------


def write_report(results: dict[str, Any], out: Path) -> list[Path]:
    """Write results.json, RESULTS.md, report.html and figures/*.png under `out` (made if missing); returns their paths.

    results: the schema at the top of this file. ValueError when it is broken: then nothing is written.
    """
    from hps.evaluate import figures  # which imports this file for METRICS

    validate(results)
    try:
        text = json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: not writable as JSON: {error}") from None
    (out / "figures").mkdir(parents=True, exist_ok=True)
    files.write_text(out / "results.json", text)
    title, minutes = f"Results: {results['suite']}", f"{results['seconds'] / 60:.1f} minutes"
    settings = [(key, json.dumps(value)) for key, value in results.get("settings", {}).items()]
    parts = [f"# {md.plain(title)}", f"Commit {md.code(results['commit'])}, {md.plain(results['machine'])}, {minutes}."]
    if settings:
        parts.append("\n".join(f"* {md.plain(key)}: {md.code(value)}" for key, value in settings))
    parts.append(LEGEND)
    tables = _tables(results)
    for item in tables:
        parts += filter(None, [f"## {item.title}", _markdown(item.header, item.rows), item.note])
    written, shown = [out / "results.json", out / "RESULTS.md", out / "report.html"], []
    for plan in figures.plans(results):
        path = figures.save(plan, results, out / "figures")
        written.append(path)
        alt = md.plain(plan.alt, also=r"\[\]")
        parts.append(f"![{alt}](figures/{path.name})\n\n{md.plain(plan.caption)}")
        shown.append(page.Figure(plan.caption, plan.alt, round(96 * plan.size[0]), path.read_bytes()))
    parts += [
        "## What the columns mean",
        "\n".join(f"* **{METRICS[name].title}** (`{name}`): {METRICS[name].meaning}" for name in present(results)),
    ]
    files.write_text(out / "RESULTS.md", "\n\n".join(parts) + "\n")
    subtitle = f"Commit {results['commit']}, {results['machine']}, {minutes}."
    files.write_text(
        out / "report.html",
        page.render(title, subtitle, settings=settings, legend=LEGEND.replace("`", ""), tables=tables, figures=shown),
    )
    return written
