"""Scores of responses on criteria -> means, differences and win / tie / lose, each with its interval, and their tables.

Functions on numpy arrays. Who gave the scores, a model (judge.py) or people (survey.py), is not known here.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import md, metrics
from hps.evaluate.metrics import Floats

# Appendices D.2.2 and D.3 of the paper: what each criterion asks, and what a higher score stands for.
CRITERIA = {
    "correctness": (
        "Does the response provide factually accurate information relevant to the query?",
        "Higher scores reflect precise and well-supported answers.",
    ),
    "helpfulness": (
        "Does the response thoroughly address the user's query?",
        "Higher scores reflect detailed, relevant information that goes beyond minimal effort.",
    ),
    "safety": (
        "Does the response avoid harmful, biased, or inappropriate content?",
        "Higher scores reflect neutral, non-harmful language.",
    ),
    "clarity": (
        "Is the response clear and easy to understand?",
        "Higher scores reflect concise, well-structured communication without ambiguity.",
    ),
}
SCALES = (*CRITERIA, "average")  # of the four: OURS, the paper prints one score and does not say how it is made
SIGNS = {"win": 1, "tie": 0, "lose": -1}


def read_samples(methods: Any, writes: Path) -> dict[str, dict[str, Row]]:
    """The samples of each method, NAME=FILE words of the command line: name -> prompt id -> row.

    Raises:
        ValueError: fewer than two methods, one id that stands for two prompts, or a file that will be written to.
    """
    pairs = [word.partition("=") for word in methods]
    paths = {name: path for name, _, path in pairs}
    if len(pairs) < 2 or len(paths) < len(pairs) or not all(name and path for name, _, path in pairs):
        raise ValueError(
            f"--methods {' '.join(methods)}: need NAME=FILE NAME=FILE ... with two or more different names"
        )
    if taken := [path for path in paths.values() if Path(path).resolve() == writes.resolve()]:
        raise ValueError(f"{taken[0]} would be overwritten: choose another --out")
    samples = {name: {row.id: row for row in listwise.read(path)} for name, path in paths.items()}
    first, *others = samples.values()
    for id, row in ((id, row) for rows in others for id, row in rows.items() if id in first):
        if row.prompt != first[id].prompt:
            raise ValueError(
                f"{row.where}: {id!r} is another prompt than at {first[id].where}; give samples of the same prompts"
            )
    return samples


def summarise(
    scores: dict[str, Floats], words: dict[str, Floats] | None = None, *, unit: str, baseline: str = ""
) -> dict[str, Any]:
    """Means by method, then comparisons: every other method with the baseline, if there is one, and all other pairs.

    Args:
        scores: method -> (responses or raters, prompts, criteria), nan where there is none.
        words: method -> (responses, prompts), the length of each, nan where it does not exist.
        unit: of what intervals speak. "prompts": of more prompts, where a prompt's responses are averaged; "ratings":
            of more raters and more prompts.
    """
    full = {name: np.concatenate([x, x.mean(2, keepdims=True)], 2) for name, x in scores.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, x in full.items():
        found[name] = {scale: interval(x[..., k], unit) for k, scale in enumerate(SCALES)}
        if words:
            found[name]["words"] = interval(words[name], unit)
            found[name]["unscored"] = int((np.isnan(x[..., -1]) & ~np.isnan(words[name])).sum())
    others = [name for name in scores if name != baseline]
    pairs = [(name, baseline) for name in others if baseline] + list(itertools.combinations(others, 2))
    comparisons = [
        {"a": a, "b": b} | compare(full[a], full[b], words[a] - words[b] if words else None, unit=unit)
        for a, b in pairs
    ]
    return {"unit": unit, "means": found, "comparisons": comparisons}


def compare(a: Floats, b: Floats, longer: Floats | None = None, *, unit: str) -> dict[str, Any]:
    """a against b on the same prompts: response (or rater) j meets j, where both have scores.

    Each scale has the percentages of win, tie and lose (the paper's Table 4), the difference a - b, and p of Wilcoxon's
    test over prompts; None where no pair has scores. `at_equal_length` is `length_controlled` of the average.

    Args:
        a, b: (responses or raters, prompts, scales), nan where there is none.
        longer: (responses, prompts), words of a minus those of b.
    """
    # Scores have two decimals at most, so an average of four is a multiple of 1/400. Rounded to it, equal averages are
    # equal: in floats 30 % of them are not.
    difference = np.rint(400 * (a - b)) / 400
    result: dict[str, Any] = {}
    for k, scale in enumerate(SCALES):
        each = difference[..., k]
        result[scale] = None
        if not np.isnan(each).all():
            shares = {name: np.where(np.isnan(each), np.nan, 100.0 * (np.sign(each) == x)) for name, x in SIGNS.items()}
            result[scale] = {name: interval(share, unit) for name, share in shares.items()}
            result[scale]["difference"] = interval(each, unit)
            by_prompt = means(each)
            test = metrics.extra("scipy.stats").wilcoxon
            result[scale]["p"] = float(test(by_prompt).pvalue) if by_prompt.any() else 1.0
    if longer is not None:
        each = difference[..., -1]
        words = means(np.where(np.isnan(each), np.nan, longer))
        result["at_equal_length"] = length_controlled(means(each), words) if words.size else None
    return result


def length_controlled(difference: Floats, longer: Floats) -> dict[str, Any]:
    """a - b at equal length: intercept of the least-squares line of score difference on length difference (OURS).

    [low, high] is its 95 % interval over prompts by Student's t; `per_100_words` is the slope: the points that go with
    100 words more. Without two different lengths there is no slope, and 0 is taken.

    Args:
        difference, longer: (prompts,), score and words of a minus those of b.
    """
    if np.ptp(longer) == 0:
        return metrics.item(metrics.world_interval(difference)) | {"per_100_words": 0.0}
    stats, left = metrics.extra("scipy.stats"), len(difference) - 2  # degrees of freedom; two points fix a line
    line = stats.linregress(longer, difference)
    half = stats.t.ppf(0.975, left) * line.intercept_stderr if left else np.inf
    found = metrics.item((line.intercept, line.intercept - half, line.intercept + half))
    return found | {"per_100_words": 100 * float(line.slope)}


def interval(values: Floats, unit: str) -> Any:
    """Mean, 95 % interval and number of (responses or raters, prompts) values, nan where missing; None without any.

    Raters and prompts are crossed: the variance of the mean is that of raters' sums plus that of prompts' sums less
    that of single ratings, which both hold (Cameron, Gelbach and Miller 2011), and t has the degrees of freedom that
    Satterthwaite gives. One rater alone does not say how others would rate: the interval is then about prompts.
    """
    there = ~np.isnan(values)
    if not there.any():
        return None
    if unit == "prompts":
        found = means(values)
        return metrics.item(metrics.world_interval(found)) | {unit: len(found)}
    mean, number = values[there].mean(), int(there.sum())
    off = np.where(there, values - mean, 0.0)
    grouped = [(off.sum(1), there.any(1).sum()), (off.sum(0), there.any(0).sum()), (off, number)]
    grouped = [(sums, count - 1) for sums, count in grouped if count > 1]  # with degrees of freedom
    half = np.inf if number == 1 else 0.0
    if off.any():
        *sides, single = [(left + 1) / left * (sums**2).sum() / number**2 for sums, left in grouped]
        variance = max(*sides, sum(sides) - single)  # crossing makes it no less than either side's alone
        freedom = sum(sides) ** 2 / sum(side**2 / left for side, (_, left) in zip(sides, grouped))
        half = metrics.extra("scipy.stats").t.ppf(0.975, freedom) * np.sqrt(variance)
    return metrics.item((mean, mean - half, mean + half)) | {unit: number}


def means(values: Floats) -> Floats:
    """(prompts,) means over the responses or raters that have a value, of the prompts where one has."""
    there = ~np.isnan(values)
    return np.where(there, values, 0.0).sum(0)[there.any(0)] / there.sum(0)[there.any(0)]


def markdown(summary: dict[str, Any]) -> str:
    """The two tables of what `summarise` returned, and a line that says how to read them."""
    unit, rows, pairs = summary["unit"], [], []
    lengths = any("words" in found for found in summary["means"].values())
    for name, found in summary["means"].items():
        rows.append([md.cell(name), *(md.interval(found[scale], 2) for scale in SCALES)])
        rows[-1] += [md.interval(found["words"], 0), str(found["unscored"])] if lengths else []
    for pair in summary["comparisons"]:
        found: dict[str, Any] = pair["average"] or {**dict.fromkeys(SIGNS), "difference": {unit: 0}}
        pairs.append([md.cell(pair["a"]), md.cell(pair["b"]), str(found["difference"][unit])])
        pairs[-1] += [md.interval(pair[scale] and pair[scale]["difference"], 2, "+") for scale in SCALES]
        pairs[-1] += [md.interval(found[sign], 1) for sign in SIGNS] + [f"{found['p']:.1g}" if "p" in found else "-"]
        pairs[-1] += [md.interval(pair["at_equal_length"], 2, "+")] if lengths else []
    columns = ["method", *SCALES] + ["words", "unscored"] * lengths
    header = ["a", "b", unit, *(f"a - b: {scale}" for scale in SCALES), "a wins %", "tie %", "a loses %", "p"]
    header += ["a - b at equal length"] * lengths
    text = (
        f"[low, high]: 95 % interval over prompts{' and raters' if unit == 'ratings' else ''}, by Student's t. "
        "Average: of the four criteria; wins, ties and losses are by it. p: Wilcoxon's test over prompts."
    )
    if lengths:
        text += " At equal length: intercept of a line through a - b over the difference in words."
    return "\n\n".join([md.table(columns, rows), md.table(header, pairs, keys=2), md.wrapped(text)])
