"""Scores of responses on criteria -> means, win / tie / lose, length, each with its interval over prompts.

Pure functions on numpy arrays. Who gave the scores, a model or people, is not known here.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps.evaluate import md, metrics

Floats = NDArray[np.float64]
VERDICTS = (("win", 1), ("tie", 0), ("lose", -1))


def summarise(
    scores: dict[str, Floats], words: dict[str, Floats], *, criteria: Sequence[str], baseline: str
) -> dict[str, Any]:
    """Means by method, then comparisons: every other method with the baseline, and all other pairs.

    scores: method -> (prompts, responses, criteria), nan where a response was not scored or does not exist.
    words: method -> (prompts, responses), its length, nan where it does not exist.
    The scale "mean", of a response's criteria, is added to `criteria` and is the one that the table decides by.
    """
    scales = (*criteria, "mean")
    full = {name: np.concatenate([x, x.mean(2, keepdims=True)], 2) for name, x in scores.items()}
    means = {}
    for name, x in full.items():
        value, valid = _by_prompt(x)
        means[name] = {scale: _interval(value[:, k], valid) for k, scale in enumerate(scales)}
        means[name]["words"] = _interval(*_by_prompt(words[name]))
        means[name]["unscored"] = int((np.isnan(x[..., -1]) & ~np.isnan(words[name])).sum())
    others = [name for name in scores if name != baseline]
    pairs = [(name, baseline) for name in others] + list(itertools.combinations(others, 2))
    return {
        "means": means,
        "comparisons": [
            {"a": a, "b": b} | compare(full[a], full[b], words[a], words[b], scales=scales) for a, b in pairs
        ],
    }


def compare(a: Floats, b: Floats, words_a: Floats, words_b: Floats, *, scales: Sequence[str]) -> dict[str, Any]:
    """a against b on the same prompts: response j meets response j, where both have scores.

    a, b: (prompts, responses, scales), nan where there is none; the last scale is the mean.
    words_a, words_b: (prompts, responses).
    Each scale has the percentages of win, tie and lose (the paper's Table 4), the difference a - b, and p of Wilcoxon's
    test over prompts; `at_equal_length` is `length_controlled` of the mean. None where no pair has scores.
    """
    difference = a - b
    value, valid = _by_prompt(difference)
    longer, _ = _by_prompt(np.where(np.isnan(difference[..., -1]), np.nan, words_a - words_b))
    result: dict[str, Any] = {"prompts": int(valid.sum()), **dict.fromkeys([*scales, "at_equal_length"])}
    if not valid.any():
        return result
    for k, scale in enumerate(scales):
        sign = np.sign(difference[..., k])
        shares = {name: np.where(np.isnan(sign), np.nan, 100.0 * (sign == way)) for name, way in VERDICTS}
        result[scale] = {name: _interval(*_by_prompt(share)) for name, share in shares.items()}
        result[scale]["difference"] = _interval(value[:, k], valid)
        result[scale]["p"] = metrics.wilcoxon_p(value[:, k], np.zeros(len(value)), valid=valid)
    result["at_equal_length"] = length_controlled(value[valid, -1], longer[valid])
    return result


def length_controlled(difference: Floats, longer: Floats, *, draws: int = 4000, seed: int = 0) -> dict[str, float]:
    """a - b at equal length: intercept of the least-squares line of score difference on length difference (OURS).

    difference, longer: (prompts,), score and words of a minus those of b. [low, high] is the 95 % percentile bootstrap
    over prompts; `per_100_words` is the slope: the points that go with 100 words more. Without two different lengths
    there is no slope, and 0 is taken.
    """

    def fit(weight: Floats) -> tuple[Floats, Floats]:  # (draws, prompts), rows of sum 1 -> intercepts, slopes
        x, y = weight @ longer, weight @ difference
        spread, together = weight @ longer**2 - x**2, weight @ (longer * difference) - x * y
        slope = np.divide(together, spread, out=np.zeros_like(x), where=spread > 1e-9)
        return y - slope * x, slope

    even = np.full(len(difference), 1 / len(difference))
    [mean], [slope] = fit(even[None])
    rng = np.random.default_rng(seed)
    resampled = [fit(rng.multinomial(len(even), even)[None] / len(even))[0][0] for _ in range(draws)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"mean": float(mean), "low": float(low), "high": float(high), "per_100_words": float(100 * slope)}


def _by_prompt(values: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Mean over the responses that are there, (prompts, ...), 0 where none is, and where one is, (prompts,)."""
    there = ~np.isnan(values)
    count = there.sum(1)
    mean = np.where(there, values, 0.0).sum(1) / np.maximum(count, 1)
    return mean, count.reshape(len(values), -1).all(1)


def _interval(values: Floats, valid: NDArray[np.bool_]) -> dict[str, float] | None:
    if not valid.any():
        return None
    return dict(zip(("mean", "low", "high"), metrics.bootstrap_mean(values, valid=valid), strict=True))


def markdown(summary: dict[str, Any], *, criteria: Sequence[str]) -> str:
    """The two tables of what `summarise` returned, and a line that says how to read them."""

    def cell(item: dict[str, float] | None, digits: int) -> str:
        if item is None:
            return "-"
        mean, low, high = (f"{item[key]:z.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    scales = (*criteria, "mean")
    scores = []
    for name, found in summary["means"].items():
        means = (cell(found[scale], 2) for scale in scales)
        scores.append([md.cell(name), *means, cell(found["words"], 0), str(found["unscored"])])
    pairs = []
    for pair in summary["comparisons"]:
        found: dict[str, Any] = pair["mean"] or dict.fromkeys(("win", "tie", "lose", "difference"))
        verdicts = [cell(found[name], 1) for name, _ in VERDICTS]
        names = [md.cell(pair[side]) for side in "ab"]
        pairs.append(
            [
                *names,
                str(pair["prompts"]),
                *verdicts,
                cell(found["difference"], 2),
                f"{found['p']:.1g}" if "p" in found else "-",
                cell(pair["at_equal_length"], 2),
            ]
        )
    return "\n\n".join(
        [
            md.table(["method", *scales, "words", "unscored"], scores),
            md.table(
                ["a", "b", "prompts", "a wins %", "tie %", "a loses %", "a - b", "p", "a - b at equal length"], pairs
            ),
            "[low, high]: 95 % bootstrap interval over prompts. Win, tie, lose and a - b: by the mean of the criteria, "
            "response j against response j. p: Wilcoxon's test over prompts. At equal length: intercept of a line "
            "through a - b over the difference in words.",
        ]
    )
