"""How far one record tells what another one will find: `python -m hps.lab.replication --first A --second B`.

A and B are results.json of one suite on different worlds. Three things are counted over the paired differences: how
many of B's means lie in A's prediction interval, how many verdicts are reversed, and how many of those that Holm's
adjustment leaves are the same in both. Beside them stands what to expect of these counts: from the same worlds dealt at
random into two records, which keeps the tails as they are, and from records of other sizes with the mean and the
covariance of these worlds, drawn as normal. Differences of the same runs hang together, so the counts spread far more
than those of as many independent ones; `independent looks` says how many of these they are worth.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hps import config
from hps.evaluate import md
from hps.evaluate.metrics import AGAIN, Floats, extra, holm
from hps.io import files

WORLDS = (8, 12, 24, 48)  # of the records that are drawn
COUNTS = {"inside": "inside %", "reversed": "reversed %", "resolved": "resolved after Holm",
          "alike": "of these alike %", "again": "of a row with itself %"}  # fmt: skip
Keys = tuple[tuple[str, str, str], ...]  # (a, b, metric) of each difference


@dataclass
class Options:
    first: str  # results.json of a suite
    second: str  # of the same suite on other worlds
    draws: int = 1000  # pairs of records that are dealt or drawn


@functools.cache  # thousands of pairs are counted
def parts(keys: Keys) -> tuple[NDArray[np.bool_], list[NDArray[np.intp]]]:
    """(C,) which differences are those of a row with itself, and the indices of the others by metric."""
    own = np.array([a == b + AGAIN for a, b, _ in keys])
    metrics = np.where(own, "", [metric for _, _, metric in keys])
    return own, [np.flatnonzero(metrics == metric) for metric in {*metrics} - {""}]


def verdicts(keys: Keys, values: Floats) -> tuple[NDArray, NDArray]:
    """(C,) the sign of every difference that is resolved, 0 of the others, before Holm's adjustment and after it."""
    mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))
    p = 2 * extra("scipy.special").stdtr(len(values) - 1, -np.abs(mean) / error)  # Student's t, both tails
    adjusted = np.ones(len(p))
    for mine in parts(keys)[1]:
        adjusted[mine] = holm(p[mine])
    return np.sign(mean) * (p < 0.05), np.sign(mean) * (adjusted < 0.05)


def inside(first: Floats, second: Floats) -> NDArray[np.bool_]:
    """(C,) whether the mean of `second` lies in the 95 % prediction interval that `first` gives for it."""
    spread = first.std(0, ddof=1) * np.sqrt(1 / len(first) + 1 / len(second))
    return np.abs(first.mean(0) - second.mean(0)) <= extra("scipy.stats").t.ppf(0.975, len(first) - 1) * spread


def count(keys: Keys, first: Floats, second: Floats) -> dict[str, float]:
    """Of two records, (W, C) each, in per cent: means inside, verdicts reversed, of those resolved after Holm in either
    (`resolved`) alike, and of a row with itself resolved (`again`)."""
    (own, _), (raw, after), (raw_2, after_2) = parts(keys), verdicts(keys, first), verdicts(keys, second)
    resolved = int(np.count_nonzero(after) + np.count_nonzero(after_2))
    alike = 2 * int(np.count_nonzero((after == after_2) & (after != 0)))
    return {
        "inside": 100 * float(inside(first, second).mean()),
        "reversed": 100 * float((raw * raw_2 < 0)[~own].mean()),
        "resolved": resolved,
        "alike": 100 * alike / resolved if resolved else 100.0,
        "again": 100 * float((np.concatenate([raw[own], raw_2[own]]) != 0).mean()) if own.any() else 0.0,
    }


def drawn(values: Floats, mean: Floats, size: int, draws: int, rng: np.random.Generator) -> list[Floats]:
    """Pairs of records of `size` worlds, (2, size, C) each, normal with this mean and the covariance of (W, C)."""
    root = (values - values.mean(0)) / np.sqrt(len(values) - 1)
    return [rng.standard_normal((2, size, len(values))) @ root + mean for _ in range(draws)]


def independent_looks(values: Floats) -> float:
    """How many independent columns vary together as little as those of (W, C): C^2 over the sum of the squared
    correlations, less what chance makes of W worlds (a correlation of nothing squares to 1 / (W - 1))."""
    worlds, size = values.shape
    squares = (np.corrcoef(values.T) ** 2).sum() - (size**2 - size) / (worlds - 1)
    return float(np.clip(size**2 / max(squares, size), 1, size))


def compare(first: dict[str, Any], second: dict[str, Any], *, draws: int) -> dict[str, Any]:
    """What is counted between two results and, by the same judge, what is to be expected.

    Returns:
        "pairs": {title: `count`}, "expected": {title: {count: [mean, 5 %, 95 %]}}, "differences": how many,
        "independent looks", "as far apart": per cent of the dealt pairs that have as few means inside in one order or
        the other, "by chance": per cent of a row's differences with itself that are resolved where the sign of
        each world's is drawn, which is the judge's level at the tails that there are.

    ValueError: other suites, fewer than four worlds, or no difference that all worlds have.
    """
    if not first.keys() & second.keys() >= {"comparisons"}:
        raise ValueError("no comparisons there: give the results.json of a sweep, not a record of docs/results")
    if first["suite"] != second["suite"]:
        raise ValueError(f"the first is of suite {first['suite']}, the second of {second['suite']}")
    found = [{(x["a"], x["b"], x["metric"]): x["values"] for x in of["comparisons"]} for of in (first, second)]
    keys = tuple(key for key in found[0] if all(key in of and None not in of[key] for of in found))
    if min(first["worlds"], second["worlds"]) < 4 or not keys:
        raise ValueError(f"suite {first['suite']}: need four worlds and one comparison that all of them have")
    one, two = (np.array([of[key] for key in keys]).T for of in found)
    pooled, rng, own = np.concatenate([one, two]), np.random.default_rng(0), parts(keys)[0]
    dealt = [np.split(rng.permutation(pooled), [len(one)]) for _ in range(draws)]
    pairs: dict[str, list[Any]] = {f"dealt, {len(one)} and {len(two)} worlds": dealt}
    mean = np.where(own, 0.0, pooled.mean(0))  # of a row with itself nothing else is true
    pairs |= {f"drawn, {size} worlds each": drawn(pooled, mean, size, draws, rng) for size in WORLDS}
    expected = {}
    for title, some in pairs.items():
        counts = [count(keys, *pair) for pair in some]
        each = {key: [x[key] for x in counts] for key in COUNTS}
        expected[title] = {key: [np.mean(x), *np.quantile(x, [0.05, 0.95])] for key, x in each.items()}
    fewest = [min(inside(x, y).mean(), inside(y, x).mean()) for x, y in [(one, two), *dealt]]
    signs = rng.choice([-1.0, 1.0], (draws, len(pooled), 1))
    by_chance = [verdicts(keys, pooled * sign)[0][own] != 0 for sign in signs] if own.any() else [0.0]
    return {
        "pairs": {"second after first": count(keys, one, two), "first after second": count(keys, two, one)},
        "expected": expected,
        "differences": len(keys),
        "independent looks": independent_looks(pooled),
        "as far apart": 100 * float(np.mean(np.array(fewest[1:]) <= fewest[0])),
        "by chance": 100 * float(np.mean(by_chance)),
    }


def table(found: dict[str, Any]) -> str:
    """What `compare` found, in Markdown."""
    rows = [[title, *(f"{x[key]:.3g}" for key in COUNTS)] for title, x in found["pairs"].items()]
    for title, x in found["expected"].items():
        rows.append([title, *("{:.3g} ({:.3g} to {:.3g})".format(*x[key]) for key in COUNTS)])
    note = (
        "{differences} differences, worth {independent looks:.1f} independent looks. Of the same worlds dealt at "
        "random {as far apart:.1f} % have as few means inside, in one order or the other. With signs by chance "
        "{by chance:.1f} % of a row's differences with itself are resolved."
    )
    return f"{md.table(['records', *COUNTS.values()], rows)}\n\n{md.wrapped(note.format(**found))}"


def main() -> None:
    c, _ = config.parse(Options, prog="python -m hps.lab.replication", description=str(__doc__).split("\n")[0])
    print(table(compare(files.read_json(Path(c.first)), files.read_json(Path(c.second)), draws=c.draws)))


if __name__ == "__main__":
    config.run_main(main)
