"""Two records side by side: counts by hand, what is to be expected of them, and refusals."""

import json

import numpy as np
import pytest

from hps.lab import replication

KEYS = (("a", "b", "rm10"), ("c", "b", "rm10"), ("a again", "a", "rm10"), ("a", "b", "harm"))


def record(values, **more):
    comparisons = [
        {"a": a, "b": b, "metric": metric, "values": list(column)}
        for (a, b, metric), column in zip(KEYS, np.transpose(values))
    ]
    return {"suite": "s", "worlds": len(values), "comparisons": comparisons} | more


def column(mean, spread):
    """Four worlds with this mean and this standard deviation."""
    return mean + spread * np.array([-1.0, -1.0, 1.0, 1.0]) * 0.75**0.5


def test_two_records_are_counted_by_hand():
    """Of four worlds t is 3.1824 at 97.5 %: resolved from 1.5912 standard deviations on, with Holm's 2p from 2.0885
    (t 4.1770) on; a second mean of four worlds is inside up to 3.1824 sqrt(1/4 + 1/4) = 2.2503 of them."""
    first = np.transpose([column(1.6, 1), column(2.05, 1), column(1.6, 1), column(-1.7, 1)])
    second = np.transpose([column(3.84, 9), column(4.31, 1), column(0.1, 1), column(1.7, 1)])
    found = replication.count(KEYS, first, second)
    # Inside: the first and the third; 4.31 - 2.05 = 2.26 is not. Holm leaves nothing of the first one's two in rm10 and
    # c - b of the second one's; harm, of which there is one, keeps both, with opposite signs.
    assert found == {"inside": 50, "reversed": pytest.approx(100 / 3), "resolved": 3, "alike": 0, "again": 50}
    raw, after = replication.verdicts(KEYS, first)
    assert list(raw) == [1, 1, 1, -1] and list(after) == [0, 0, 0, -1]
    assert replication.count(KEYS, second, second)["alike"] == 100
    assert list(replication.inside(first, second)) == [True, False, True, False]
    assert list(replication.inside(second, first)) == [True, False, True, False]


def test_what_is_expected_has_level_and_covariance():
    """Means of independent normal records are inside as often as said; columns that say the same are one look."""
    g = np.random.default_rng(0)
    once = g.standard_normal((24, 3)) + [0.0, 3.0, 0.0]
    keys = tuple((str(i), "b", "rm10") for i in range(12))
    values = np.repeat(once, 4, axis=1)
    assert replication.independent_looks(values) == pytest.approx(3, abs=0.4)
    assert replication.independent_looks(g.standard_normal((400, 12))) > 11
    pairs = list(replication.drawn(once, once.mean(0), 8, 2000, g))
    assert np.cov(np.concatenate([x for x, _ in pairs]).T) == pytest.approx(np.cov(once.T), abs=0.05)
    counts = [replication.count(keys[:3], x, y) for x, y in pairs]
    assert np.mean([x["inside"] for x in counts]) == pytest.approx(95, abs=1)
    assert np.mean([x["reversed"] for x in counts]) < 0.2
    found = replication.compare(record(g.standard_normal((30, 4))), record(g.standard_normal((20, 4))), draws=500)
    assert found["by chance"] == pytest.approx(5, abs=2) and 1 < found["as far apart"] <= 100
    inside = [x["inside"][0] for x in found["expected"].values()]
    assert inside == pytest.approx([95] * 5, abs=3)


def test_records_are_compared_from_files(tmp_path, monkeypatch, capsys):
    """A difference that a world lacks is left out of both."""
    g = np.random.default_rng(1)
    one, two = (g.standard_normal((8, 4)) + [1.0, 0.0, 0.0, 2.0] for _ in range(2))
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, values in zip(paths, (one, two)):
        path.write_text(json.dumps(record(values)))
    monkeypatch.setattr("sys.argv", ["compare", f"--first={paths[0]}", f"--second={paths[1]}", "--draws=20"])
    replication.main()
    counted = [f"{value:.3g}" for value in replication.count(KEYS, one, two).values()]
    shown = capsys.readouterr().out
    assert f"| second after first | {' | '.join(counted)} |" in shown and "| drawn, 24 worlds each |" in shown
    lacking = record(two)
    lacking["comparisons"][3]["values"][0] = None
    assert replication.compare(record(one), lacking, draws=2)["differences"] == 3
    with pytest.raises(ValueError, match="suite s: need four worlds"):
        replication.compare(record(one), record(two[:2]), draws=2)
    with pytest.raises(ValueError, match="is of suite s, .* of other"):
        replication.compare(record(one), record(two, suite="other"), draws=2)
