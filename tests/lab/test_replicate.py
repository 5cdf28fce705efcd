"""Two records side by side: what a report's table says is read back, and counted as by hand."""

import json
import sys

import pytest

from hps.evaluate import report
from hps.lab import replicate


def write(folder, suite, comparisons):
    """A report as the sweep writes it, of differences (a, b, metric, mean, low, high)."""
    names = dict.fromkeys(name for a, b, *_ in comparisons for name in (a, b))
    metric = {"mean": 0.0, "low": 0.0, "high": 0.0}
    rows = [{"method": n, "seeds": 1, "metrics": {m: metric for _, _, m, *_ in comparisons}} for n in names]
    keys = ("a", "b", "metric", "mean", "low", "high")
    results = {"suite": suite, "commit": "x", "machine": "x", "seconds": 1.0, "rows": rows}
    results["comparisons"] = [dict(zip(keys, one, strict=True)) | {"p": 0.5} for one in comparisons]
    report.write_report(results, folder / "tmp")
    (folder / f"{suite}.md").write_text((folder / "tmp" / "RESULTS.md").read_text())


def test_counts_by_hand(tmp_path, monkeypatch, capsys):
    """Of four differences: one the same and inside, one resolved in the second alone and outside, one reversed, one
    in the first record alone; a fifth stands in two suites and counts once, with the first of them."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    write(first, "beta", [("HPS", "BT", "rm10", 1.0, 0.5, 1.5), ("HPS", "PL", "rm10", 0.1, -0.2, 0.4),
                          ("HPS", "BT", "harm", -3.0, -4.0, -2.0), ("HPS", "PL", "harm", 1.0, 0.5, 1.5)])  # fmt: skip
    write(second, "beta", [("HPS", "BT", "rm10", 1.2, 0.1, 2.0), ("HPS", "PL", "rm10", 0.5, 0.1, 0.9),
                           ("HPS", "BT", "harm", 3.0, 2.0, 4.0)])  # fmt: skip
    write(first, "noise", [("HPS", "BT", "rm10", 1.0, 0.5, 1.5), ("HPS", "BT", "rm2", 0.0, -0.1, 0.1)])
    write(second, "noise", [("HPS", "BT", "rm10", 9.0, 8.0, 10.0), ("HPS", "BT", "rm2", 0.0, -0.1, 0.1)])
    monkeypatch.setattr(sys, "argv", ["replicate", f"--first={first}", f"--second={second}"])
    replicate.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["beta"] == {"differences": 3, "inside": 1, "same": 1, "in_one": 1, "reversed": 1}
    assert found["noise"] == {"differences": 1, "inside": 1, "same": 1, "in_one": 0, "reversed": 0}
    assert found["all"] == {"differences": 4, "inside": 2, "same": 2, "in_one": 1, "reversed": 1}


def test_nothing_in_common_is_a_mistake(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["replicate", f"--first={tmp_path}", f"--second={tmp_path}"])
    with pytest.raises(ValueError, match="no difference in common"):
        replicate.main()
