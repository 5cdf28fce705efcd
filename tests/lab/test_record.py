"""The record: its numbers give back the results, and every page that is made of it is as it would be made now."""

import json
import re

import numpy as np
import pytest
from scipy import stats

from hps.lab import record, replication


def results(worlds=3):
    """Two rows and one of them again, with a metric that one world lacks, and samples of the same number beside it."""
    values = {
        "DPO-HPS": {"rm10": [1.0, 2.5, 4.0], "harm": [5.0, None, 7.0], "train_tokens": [60.0, 61.0, 62.0]},
        "DPO-BT": {"rm10": [0.5, 1.0, 1.123456789], "harm": [6.0, 6.0, 8.5]},
        "DPO-HPS again": {"rm10": [1.5, 2.0, 4.0]},
    }
    rows = [
        {"method": name, "runs": 3, "metrics": {metric: {"mean": 0, "values": x} for metric, x in row.items()}}
        for name, row in values.items()
    ]
    leads = {"a": "DPO-HPS", "b": "DPO-BT", "metric": "lead", "values": [10.0, 20.0, 40.0]}
    other = {"a": "DPO-HPS again", "b": "DPO-HPS", "metric": "rm10", "values": [0.5, -0.5, 0.0]}
    found = {"suite": "headline", "commit": "c", "machine": "m", "seconds": 60.0, "worlds": worlds, "series": {}}
    return found | {"settings": {"small": False}, "rows": rows, "comparisons": [leads, other]}


def test_a_record_gives_back_the_results(tmp_path, monkeypatch):
    """Through its file: differences, intervals and p by scipy; leads as they were; Holm without the row with itself."""
    monkeypatch.setattr(record, "KEPT", tmp_path)
    (tmp_path / "sweep/headline").mkdir(parents=True)
    (tmp_path / "sweep/headline/results.json").write_text(json.dumps(results()))
    assert record.keep(tmp_path / "sweep", "second") == [tmp_path / "headline-second.json"]
    found = record.restore(json.loads((tmp_path / "headline-second.json").read_text()))
    of = {(x["a"], x["b"], x["metric"]): x for x in found["comparisons"]}
    assert of["DPO-HPS", "DPO-BT", "rm10"]["values"] == pytest.approx([0.5, 1.5, 4 - 1.12346], abs=1e-12)
    assert of["DPO-HPS", "DPO-BT", "harm"]["values"] == [-1.0, None, -1.5]
    test = stats.ttest_1samp([0.5, 1.5, 2.87654], 0)
    interval = test.confidence_interval()
    rm10 = of["DPO-HPS", "DPO-BT", "rm10"]
    assert [rm10["low"], rm10["high"], rm10["p"]] == pytest.approx([interval.low, interval.high, test.pvalue])
    assert rm10["p_holm"] == rm10["p"] and "p_holm" not in of["DPO-HPS again", "DPO-HPS", "rm10"]
    assert of["DPO-HPS", "DPO-BT", "lead"]["values"] == [10, 20, 40] and ("DPO-HPS again", "DPO-HPS", "lead") not in of
    hps = next(row for row in found["rows"] if row["method"] == "DPO-HPS")
    assert hps["metrics"]["rm10"]["mean"] == pytest.approx(2.5) and hps["runs"] == 3
    assert any(claim["claim"] == "DPO-HPS has a larger RM10 than DPO-BT" for claim in found["claims"])
    assert record.compact(found) == record.compact(results())


def test_tables_say_what_the_verdicts_are(monkeypatch):
    """Each pair's differences as they are resolved, marked where a second record resolves them alike."""
    found = record.restore(record.compact(results()))
    for item in found["comparisons"]:
        item["p_holm"] = 0.01 if item["metric"] == "lead" else 0.2
    assert record.differences(found).splitlines()[2:] == [
        "| HPS less BT | +1.63 (2.96) | **+23.3 (37.9)** | -1.2 (3.2) |",
        "| HPS again less HPS | +0.00 (1.24) | - | - |",
    ]
    marked = record.differences(found, found, rows=".*(?<!again)").splitlines()[2:]
    assert marked == [r"| HPS less BT | +1.63 (2.96) | **+23.3 (37.9)**\* | -1.2 (3.2) |"]
    monkeypatch.setattr(record, "LOSSES", ("dpo",))
    monkeypatch.setattr(record, "HPS", ("HPS",))
    monkeypatch.setattr(record, "BASELINES", ("BT",))
    settings = [(found, found, ""), (found, None, "")]
    lead, rm10 = (record.by_loss(settings, metric).splitlines()[2] for metric in ("lead", "rm10"))
    assert lead == r"| DPO-HPS | **+23.3 (37.9)**\* | **+23.3 (37.9)** |"
    assert rm10.startswith("| DPO-HPS | +1.63 (") and "*" not in rm10
    found["comparisons"] += [{"a": "DPO-HPS", "b": "DPO-BT", "metric": "true_reward", "mean": -1.0, "p_holm": 0.0}]
    del found["comparisons"][-2]["p_holm"]  # of the row with itself
    assert record.overview({"x": found}).splitlines()[2] == "| [x](results/x.md) | 3 | 0 / 1 / 0 | 0 of 1 |"
    both = record.agreement({"x": {"pairs": {n: dict.fromkeys(replication.COUNTS, n) | {"again": 0} for n in (1, 2)}}})
    assert both.splitlines()[2] == "| [x](results/x.md) | 1, 2 | 1, 2 | 1, 2 | 1, 2 | 0 |"


def test_the_pages_are_those_of_the_record():
    """What `python -m hps.lab.record` would write is what is there, so no number of a page is written by hand."""
    pages = record.pages()
    for path, text in pages.items():
        assert path.read_text() == text, f"{path.name} is not of this record: python -m hps.lab.record"
    page = pages[record.ROOT / "docs/RESULTS.md"]
    assert len(page.splitlines()) < 200
    for figure in re.findall(r"\]\(figures/(.*?)\)", page):
        assert (record.ROOT / "docs/figures" / figure).exists()


def test_one_world_and_a_small_run_are_no_record(tmp_path):
    for wrong in (results(worlds=1), results() | {"settings": {"small": True}}):
        (tmp_path / "results.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="has one world or is a small one"):
            record.keep(tmp_path, "")
    with pytest.raises(ValueError, match="no results.json there"):
        record.keep(tmp_path / "nowhere", "")


def test_worlds_that_come_next_join_the_record(tmp_path, monkeypatch):
    """A sweep of six worlds is kept in two parts as it is whole; worlds of another size are refused, and what begins
    elsewhere takes the record's place."""
    monkeypatch.setattr(record, "KEPT", tmp_path)

    def keep(first_seed, times=1, train=240):
        found = results(worlds=3 * times)
        found["settings"] = dict(
            small=False, first_seed=first_seed, seeds=3 * times, train=train, stage_seconds=9 * times
        )
        found["seconds"] *= times
        for item in [x for row in found["rows"] for x in row["metrics"].values()] + found["comparisons"]:
            item["values"] = times * item["values"]
        for row in found["rows"]:
            row["runs"] *= times
        (tmp_path / "results.json").write_text(json.dumps(found))
        return record.files.read_json(record.keep(tmp_path, "")[0])

    whole = keep(7, times=2)
    assert keep(7)["worlds"] == 3
    assert keep(10) == whole
    with pytest.raises(ValueError, match="on record already"):
        keep(10)
    with pytest.raises(ValueError, match="other sizes"):
        keep(13, train=96)
    assert keep(99)["settings"]["first_seed"] == 99


# What the README says that eight worlds settle: rows, metric, and the sign of their difference.
SETTLED = [
    ("DPO-HPS", "DPO-uniform", "true_reward", -1),
    ("DPO-HPS tuned", "DPO-BT tuned", "true_reward", 1),
    ("DPO-HPS tuned", "DPO-BT tuned", "harm", -1),
    ("DPO-HPS tuned", "DPO-PL-8 tuned", "true_reward", -1),
]


def test_what_the_readme_says_of_transfer():
    found = record.restore(json.loads((record.KEPT / "transfer.json").read_text()))
    of = {(x["a"], x["b"], x["metric"]): record.verdict(x) for x in found["comparisons"] if "p_holm" in x}
    rows, way = {row["method"]: row["metrics"] for row in found["rows"]}, "help to safe"
    for loss in ("DPO", "EXO", "IPO", "SPPO", "NCA"):
        assert of[f"{loss}-HPS {way}", f"{loss}-uniform {way}", "true_reward"] == 1
    assert 1.8 < rows[f"DPO-uniform {way}"]["harm"]["mean"] / rows[f"DPO-HPS {way}"]["harm"]["mean"] < 2.2


@pytest.mark.parametrize("name", ["headline", "headline-second"])
def test_what_the_readme_says_of_eight_worlds(name):
    """Of eight worlds drawn from a record at least four times in five, by the judge as a user's own report has it."""
    kept = json.loads((record.KEPT / f"{name}.json").read_text())
    rows = {row: {k: v for k, v in of.items() if k != "runs"} for row, of in kept["rows"].items()}
    draw, counts = np.random.default_rng(0), np.zeros(len(SETTLED))
    for _ in range(10):
        worlds = sorted(draw.choice(kept["worlds"], 8, replace=False))
        few = {row: {k: [v[w] for w in worlds] for k, v in of.items()} | {"runs": 1} for row, of in rows.items()}
        pairs = [[a, b, lead and [lead[w] for w in worlds]] for a, b, lead in kept["pairs"]]
        found = record.restore(kept | {"rows": few, "pairs": pairs, "worlds": 8})
        of = {(x["a"], x["b"], x["metric"]): record.verdict(x) for x in found["comparisons"] if "p_holm" in x}
        counts += [of[a, b, metric] == sign for a, b, metric, sign in SETTLED]
    assert counts.min() >= 8, counts
