"""The record, docs/results/SUITE.json: without options it writes docs/RESULTS.md, docs/results/*.md and README's table.

    python -m hps.lab.record --keep runs/record  # each suite's results.json there becomes part of the record
    python -m hps.lab.record --keep runs/other --name second  # or of one of other worlds, which the first is held to
    python -m hps.lab.record --keep runs/more  # worlds that come next after those on record join them
    python -m hps.lab.record  # writes the pages of the record anew, with their figures

The record has what each world says of each row and metric. Means, intervals, p values, verdicts and claims are not in
it: they follow from its numbers by the judge as it is now. docs/results/RESULTS.md.jinja is the text around them.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from hps import config
from hps.evaluate import figures, md, metrics, report
from hps.evaluate.compare import COMPARED, ROOT, measured
from hps.evaluate.metrics import METRICS, adjust
from hps.io import files
from hps.lab import claims, replication
from hps.lab.suites import BASELINES, HPS, LOSSES, TUNED

KEPT = ROOT / "docs" / "results"
LABELS = {
    "SFT": "no preferences (SFT alone)",
    "DPO-BT": "BT: best against worst",
    "DPO-PL-8": "PL-8: a ranking of eight",
    "DPO-uniform": "uniform: best against any",
    "DPO-HPS": "HPS as the paper writes it",
    "DPO-HPS scaled (ours)": "HPS, rewards standardised and halved (ours)",
}
COLUMNS = {"true_reward": 2, "harm": 1, "rm_dpo": 2, "rm10": 2, "train_tokens": 0}  # of the first table, and digits
Results = dict[str, Any]


@dataclass
class Options:
    keep: str = ""  # a sweep's folder, whose results become part of the record; empty: write the pages
    name: str = ""  # of the record of other worlds that this is, second say; empty for the first one


def compact(results: Results) -> Results:
    """What of a suite's results the rest follows from: of every row and metric each world's value, in six digits, and
    the head-to-head leads, which no row has."""
    rows = {
        row["method"]: {"runs": row["runs"]} | {name: _short(item["values"]) for name, item in row["metrics"].items()}
        for row in results["rows"]
    }
    pairs = list(dict.fromkeys((x["a"], x["b"]) for x in results["comparisons"]))
    leads = {(x["a"], x["b"]): _short(x["values"]) for x in results["comparisons"] if x["metric"] == "lead"}
    about = {key: results[key] for key in ("suite", "commit", "machine", "seconds", "worlds", "settings", "series")}
    return about | {"rows": rows, "pairs": [[a, b, leads.get((a, b))] for a, b in pairs]}


def _short(values: list[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.6g}") for value in values]


def restore(record: Results) -> Results:
    """The results that `compact` was given, by the judge as it is now."""
    rows, comparisons = [], []
    for name, row in record["rows"].items():
        each = {metric: item(values)[0] for metric, values in row.items() if metric != "runs"}
        rows.append({"method": name, "runs": row["runs"], "metrics": each})
    for a, b, lead in record["pairs"]:
        of_a, of_b = record["rows"][a], record["rows"][b]
        for metric in COMPARED:
            both = zip(of_a.get(metric, []), of_b.get(metric, []))
            values = lead if metric == "lead" else [None if None in pair else pair[0] - pair[1] for pair in both]
            if values and any(value is not None for value in values):
                difference, numbers = item(values)
                comparisons.append({"a": a, "b": b, "metric": metric, **difference, "p": metrics.world_p(numbers)})
    adjust(comparisons)
    results = {key: value for key, value in record.items() if key != "pairs"} | {"rows": rows}
    results["comparisons"] = comparisons
    return results | {"claims": claims.judge(results)}


def item(values: list[float | None]) -> tuple[dict[str, Any], list[float]]:
    """The worlds' values with their mean and its interval, and those that there are."""
    return measured([{} if value is None else {"": value} for value in values])


def joined(known: Results, new: Results) -> Results:
    """A record with the worlds of another behind its own; ValueError where these were not made as its own were."""
    free = dict.fromkeys(("seeds", "first_seed", "out", "jobs", "stage_seconds"))
    made = [
        (
            x["settings"] | free,
            {name: [*row] for name, row in x["rows"].items()},
            [(a, b, not c) for a, b, c in x["pairs"]],
        )
        for x in (known, new)
    ]
    if made[0] != made[1]:
        raise ValueError(
            f"suite {new['suite']}: its next worlds have other sizes, rows or metrics than those on record"
        )
    both: Results = {key: known[key] + new[key] for key in ("seconds", "worlds")}
    both |= {key: "; ".join(dict.fromkeys([*known[key].split("; "), new[key]])) for key in ("commit", "machine")}
    settings, more = known["settings"], new["settings"]
    both["settings"] = settings | {key: settings[key] + more[key] for key in ("seeds", "stage_seconds")}
    both["rows"] = {name: {x: row[x] + new["rows"][name][x] for x in row} for name, row in known["rows"].items()}
    both["pairs"] = [[a, b, x and x + y] for (a, b, x), (*_, y) in zip(known["pairs"], new["pairs"], strict=True)]
    return known | both


def keep(out: Path, name: str) -> list[Path]:
    """Put the results of each suite under a sweep's folder into the record, behind what it has where their worlds come
    next; the paths written."""
    found = [files.read_json(path) for path in [*out.glob("results.json"), *out.glob("*/results.json")]]
    if not found:
        raise ValueError(f"{out}: no results.json there, nor in the folders in it")
    texts: dict[Path, str] = {}
    for results in found:
        if results["worlds"] < 2 or results["settings"].get("small"):
            raise ValueError(f"suite {results['suite']} of {out} has one world or is a small one: no record")
        path, new = KEPT / f"{results['suite']}{'-' * bool(name)}{name}.json", compact(results)
        known = files.read_json(path) if path.exists() else None
        behind = new["settings"]["first_seed"] - known["settings"]["first_seed"] if known else 0
        if known and 0 < behind < known["worlds"]:
            raise ValueError(f"suite {results['suite']}: worlds of {out} are on record already, in {path}")
        text = json.dumps(joined(known, new) if known and behind == known["worlds"] else new, indent=1)
        # Of a row's metric on one line, so that a change is seen as such.
        texts[path] = re.sub(r"\[[^][{}]*\]", lambda values: " ".join(values[0].split()), text) + "\n"
    for path, text in texts.items():
        files.write_text(path, text)
    return list(texts)


# ---- pages ----------------------------------------------------------------------------------------


def first_table(results: Results, tuned: str = "") -> str:
    """The rows of the question, with what they wrote and their margins, and the reward of each at its own setting;
    `tuned`: the end of their names, of those at their own."""
    of = {row["method"]: row["metrics"] for row in results["rows"]}
    header = ["after SFT and DPO with", "true reward", "harm %", "RM_DPO", "RM10", "thousand tokens"]
    both, rows = not tuned and any(name.endswith(TUNED) for name in of), []
    for name, label in LABELS.items():
        found = of.get(name if name == "SFT" else name + tuned, {})
        cells = [md.interval(found.get(metric), digits) for metric, digits in COLUMNS.items()]
        if both:
            cells.insert(1, md.interval(of.get(name + TUNED, {}).get("true_reward"), 2))
        rows += [[label, *cells]] if found else []
    if both:
        header.insert(2, "at its own setting")
    return md.table(header, rows)


def verdict(found: dict[str, Any]) -> int:
    """1 where a - b is resolved above 0 after Holm's adjustment, -1 below, 0 unresolved."""
    return 0 if found["p_holm"] >= 0.05 else int(np.sign(found["mean"]))


def difference(found: dict[str, Any], also: dict[str, Any] | None) -> str:
    """Mean and half of the interval: bold where it is resolved, with a star where a second record, `also`, agrees."""
    side, digits = verdict(found), METRICS[found["metric"]].digits
    text = f"{found['mean']:+.{digits}f} ({found['high'] - found['mean']:.{digits}f})"
    return f"**{text}**" + "\\*" * bool(also and verdict(also) == side) if side else text


def differences(results: Results, second: Results | None = None, rows: str = ".*") -> str:
    """A table of the pairs of rows whose first matches the pattern `rows`, and of the metrics that the figure of
    differences has; "-" where one world alone has both."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    also = {(x["a"], x["b"], x["metric"]): x for x in (second or {}).get("comparisons", [])}
    for x in results["comparisons"]:
        shown = "p_holm" in x and x["high"] is not None and x["metric"] in figures.DIFFERENCES
        if shown and re.fullmatch(rows, x["a"]):
            of_pair = pairs.setdefault((x["a"], x["b"]), {})
            of_pair[x["metric"]] = difference(x, also.get((x["a"], x["b"], x["metric"])))
    shown = [name for name in figures.DIFFERENCES if any(name in cells for cells in pairs.values())]
    names = {pair: " less ".join(name.removeprefix("DPO-").removesuffix(TUNED) for name in pair) for pair in pairs}
    table = [[md.plain(names[pair]), *(cells.get(name, "-") for name in shown)] for pair, cells in pairs.items()]
    return md.table(["difference", *(METRICS[name].title for name in shown)], table)


def by_loss(settings: list[tuple[Results, Results | None, str]], metric: str) -> str:
    """A table of one metric: both forms of HPS less each baseline, under every loss; settings: of each a record, maybe
    a second one, and the end of the rows' names."""
    rows = [[f"{loss.upper()}-{form}"] for loss, form in itertools.product(LOSSES, HPS)]
    for results, second, end in settings:
        of, also = (
            {(x["a"], x["b"]): x for x in (one or {}).get("comparisons", []) if x["metric"] == metric}
            for one in (results, second)
        )
        for row, base in itertools.product(rows, BASELINES):
            pair = (row[0] + end, f"{row[0].partition('-')[0]}-{base}{end}")
            row.append(difference(of[pair], also.get(pair)))
    header = [f"less {base}'s{end and ','}{end}" for *_, end in settings for base in BASELINES]
    return md.table([f"{METRICS[metric].title} of", *header], [[md.plain(name), *cells] for name, *cells in rows])


def overview(first: dict[str, Results]) -> str:
    """In how many settings of a suite HPS's reward is above a baseline's, below, or neither; rows with themselves."""
    table = []
    for name, results in first.items():
        rewards = {(x["a"], x["b"]): x for x in results["comparisons"] if x["metric"] == "true_reward"}
        cells = []
        for form, base in itertools.product(HPS, BASELINES):
            sides = [verdict(x) for (a, b), x in rewards.items() if a != b == a.replace(form, base)]
            cells.append(" / ".join(str(sides.count(side)) for side in (1, -1, 0)) if sides else "-")
        again = [x["p"] < 0.05 for x in results["comparisons"] if "p_holm" not in x]
        table.append([f"[{name}](results/{name}.md)", str(results["worlds"]), *cells, f"{sum(again)} of {len(again)}"])
    versus = [f"{form}, {base}" for form, base in itertools.product(("HPS", "ours"), BASELINES)]
    return md.table(["suite", "worlds", *versus, "with itself"], table)


def agreement(pairs: dict[str, Results]) -> str:
    """What `replication.compare` counts between the two records of each suite, seen from either."""
    rows = []
    for name, found in pairs.items():
        both = ([f"{x[key]:.3g}" for x in found["pairs"].values()] for key in replication.COUNTS)
        rows.append([f"[{name}](results/{name}.md)", *(", ".join(dict.fromkeys(cells)) for cells in both)])
    return md.table(["suite", *replication.COUNTS.values()], rows)


def pages() -> dict[Path, str]:
    """Every text that follows from the record, by its path, README's as a whole."""
    found = {path.stem: restore(files.read_json(path)) for path in sorted(KEPT.glob("*.json"))}
    first = {name: results for name, results in found.items() if name == results["suite"]}
    second = {results["suite"]: results for name, results in found.items() if name != results["suite"]}
    judged = claims.decide([claim for results in first.values() for claim in results["claims"]])
    pairs = {name: replication.compare(first[name], second[name], draws=400) for name in first if name in second}
    how = dict(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, **how)
    environment.filters["wrapped"] = md.wrapped
    context = dict(first=first, second=second, pairs=pairs, tables=report.claims_tables(judged))
    context |= dict(others={name: first[name] for name in first if name not in pairs}, difference=difference)
    context |= {made.__name__: made for made in (first_table, differences, by_loss, overview, agreement, report.answer)}
    template = environment.from_string((KEPT / "RESULTS.md.jinja").read_text(encoding="utf-8"))
    texts = {ROOT / "docs" / "RESULTS.md": template.render(context)}
    for name, results in found.items():
        drawn = plans(results) if name in first else []
        texts[KEPT / f"{name}.md"] = report.page(results, [(x, f"../figures/{name}-{x.name}.png") for x in drawn])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, _, rest = readme.partition("| after SFT and DPO with |")
    texts[ROOT / "README.md"] = before + first_table(first["headline"]) + "\n\n" + rest.partition("\n\n")[2]
    return texts


def plans(results: Results) -> list[figures.Plan]:
    """The figures that pages show: of the headline its differences and reward over KL, of others lines of rows."""
    shown = {"differences", "reward_kl"} if results["suite"] == "headline" else set()
    return [plan for plan in figures.plans(results) if plan.name in shown or plan.name.startswith("series_")]


def main() -> None:
    c, _ = config.parse(Options, prog="python -m hps.lab.record", description=str(__doc__).split("\n")[0])
    if c.keep:
        print("\n".join(map(str, keep(Path(c.keep), c.name))))
        return
    for path, text in pages().items():
        files.write_text(path, text)
        print(path)
    for path in KEPT.glob("*.json"):
        results = restore(files.read_json(path))
        for plan in plans(results) if path.stem == results["suite"] else []:
            figures.save(plan._replace(name=f"{path.stem}-{plan.name}"), ROOT / "docs" / "figures")


if __name__ == "__main__":
    config.run_main(main)
