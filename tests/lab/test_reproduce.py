"""The sweep's plan and arithmetic: its stages, and means and paired differences from the cells' files."""

import json
from pathlib import Path

import numpy as np
import pytest

from hps import config
from hps.evaluate import report
from hps.lab import reproduce, sweep
from hps.lab.suites import SUITES
from hps.options import Config, check


def run(folder: Path, values: dict[str, dict[str, float]]) -> Path:
    (folder / "test").mkdir(parents=True)
    (folder / "test/per_prompt.json").write_text(json.dumps(values))
    (folder / "summary.json").write_text(json.dumps({"seconds": 3.0 + len(folder.name), "tokens": 5000}))
    same = {"loss": 0.5, "effective_negatives": 2}
    log = [same | {"step": s, "rewards/margins": s, "gamma": -5 + s} for s in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return folder / "test"


@pytest.fixture
def cells(tmp_path) -> dict[str, list[list[Path]]]:
    """Two worlds with prompts of their own. SFT at zero; BT one below HPS on every prompt and repeat; harm undefined
    on some prompts, not the same ones in each world."""
    g = np.random.default_rng(0)
    out: dict[str, list[list[Path]]] = {"SFT": [], "DPO-BT": [], "DPO-HPS": []}
    for world in range(2):
        prompts = [f"p{world}{i}" for i in range(40)]
        base = {p: float(g.normal(3.0)) for p in prompts}
        out["SFT"].append([run(tmp_path / f"SFT-{world}", {"rm2": dict.fromkeys(prompts, 0.0)})])
        for name, shift in (("DPO-BT", 0.0), ("DPO-HPS", 1.0)):
            out[name].append([])
            for repeat in range(3):
                rm2 = {p: base[p] + shift + 0.1 * repeat + 2 * world for p in prompts}
                harm = dict.fromkeys(prompts[world::2], 50.0 * (1 - shift))
                out[name][-1].append(run(tmp_path / f"{name}-{world}-{repeat}", {"rm2": rm2, "harm": harm}))
    return out


def test_rows_and_paired_differences(cells):
    rows, comparisons = reproduce.summarise(cells, [("DPO-HPS", "DPO-BT"), ("DPO-HPS", "SFT")])
    by_name = {row["method"]: row for row in rows}
    bt, hps = by_name["DPO-BT"], by_name["DPO-HPS"]
    read = [json.loads((folders[0] / "per_prompt.json").read_text())["rm2"].values() for folders in cells["DPO-BT"]]
    assert bt["metrics"]["rm2"]["mean"] == pytest.approx(np.mean([list(v) for v in read]) + 0.1)
    assert by_name["SFT"]["metrics"]["rm2"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert bt["metrics"]["harm"]["mean"] == 50.0 and bt["seeds"] == 6
    assert bt["metrics"]["train_tokens"]["mean"] == 5.0
    assert "train_seconds" in hps["metrics"] and "train_seconds" not in by_name["SFT"]["metrics"]
    # The worlds differ by two and prompts by about one, yet the paired difference is sharp: one on every prompt.
    assert bt["metrics"]["rm2"]["high"] - bt["metrics"]["rm2"]["low"] > 1.5
    rm2, over_sft = (c for c in comparisons if c["metric"] == "rm2")
    assert (rm2["a"], rm2["b"]) == ("DPO-HPS", "DPO-BT")
    assert (rm2["mean"], rm2["low"], rm2["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert over_sft["mean"] == pytest.approx(hps["metrics"]["rm2"]["mean"])  # three repeats against one SFT model
    (harm,) = (c for c in comparisons if c["metric"] == "harm")
    assert harm["mean"] == pytest.approx(-50.0)


def test_the_length_term_depends_on_the_data_alone(tmp_path):
    """RM_DPO - RM_R-DPO: equal for all methods of a world, prompt by prompt; another world has another."""
    cells: dict[str, list[list[Path]]] = {"SFT": [], "DPO-BT": []}
    for world, term in enumerate((0.3, -0.2)):
        for name, rm in (("SFT", 0.0), ("DPO-BT", 2.5)):
            columns = {"rm2": {"p": 9.0, "q": 9.0}, "rm_dpo": {"p": rm, "q": rm + 1}}
            columns["rm_rdpo_chars"] = {"p": rm - term, "q": rm + 1 - 2 * term}
            cells[name].append([run(tmp_path / f"{name}-{world}", columns)])
    reproduce.check_length_terms(cells)
    path = cells["DPO-BT"][1][0] / "per_prompt.json"
    path.write_text(path.read_text().replace("3.9", "3.91"))
    with pytest.raises(ValueError, match="differ in RM_DPO - rm_rdpo_chars on prompt q, which depends on"):
        reproduce.check_length_terms(cells)


def test_the_report_accepts_what_the_sweep_makes(cells, tmp_path):
    rows, comparisons = reproduce.summarise(cells, [("DPO-HPS", "DPO-BT")])
    curves, schedule = reproduce.curves_of(cells)
    assert schedule["gamma"] == [-5, -4, -3]
    results = {"suite": "headline", "commit": "c", "machine": "m", "seconds": 1.0, "rows": rows}
    results |= {"comparisons": comparisons, "settings": {"seeds": 2}, "curves": curves, "schedule": schedule}
    written = report.write_report(results, tmp_path / "out")
    assert json.loads((tmp_path / "out/results.json").read_text())["rows"][1]["method"] == "DPO-BT"
    assert {"results.json", "RESULTS.md"} <= {path.name for path in written}


@pytest.mark.parametrize("suite", SUITES)
def test_every_row_of_a_suite_is_a_command_that_train_accepts(suite):
    """Options that a method would ignore are errors, so each row's options must belong to its method."""
    spec = SUITES[suite]()
    for row in spec.rows.values():
        argv = ["--config", "configs/world.toml", "--model", "m", "--data", "d", "--out", "o", *sweep.flags(row)]
        check(*config.parse(Config, argv, prog="train.py", description=""))
    assert {name for pair in spec.pairs for name in pair} <= spec.rows.keys()
    assert spec.prompts.keys() | spec.noise.keys() <= spec.rows.keys()
    drawn = [row for figure in spec.series.values() for line in figure["lines"].values() for row in line]
    assert set(drawn) <= spec.rows.keys()


def test_what_is_confirmed_was_tuned_and_stands_on_worlds_of_its_own():
    """Every row of `confirm` is a row of `tune`; their worlds are different ones, also for other first seeds."""
    swept = list(SUITES["tune"]().rows.values())
    suite = SUITES["confirm"]()
    assert all({"beta": 0.1} | options in swept for options in suite.rows.values())
    assert SUITES["tune"]().split == "valid" and suite.split == "test"
    assert suite.repeats == 3 and suite.later >= 10 and SUITES["tune"]().later == 0


def test_a_plan_has_every_cell_once_and_suites_share_them(tmp_path):
    """headline: worlds x rows x repeats trainings; another suite's equal rows have equal products and commands."""
    options = reproduce.Options(seeds=2, repeats=3, first_seed=4)
    stages, cells = reproduce.plan(options, SUITES["headline"](), tmp_path)
    products = [stage.product for stage in stages]
    assert len(set(products)) == len(products)
    rows = SUITES["headline"]().rows
    assert sum(product.name == "policy" and "cells" in str(product) for product in products) == 2 * 3 * len(rows)
    assert list(cells) == ["SFT", *rows]
    assert [len(repeats) for repeats in cells["DPO-HPS"]] == [3, 3] and [len(r) for r in cells["SFT"]] == [1, 1]
    assert all(f"world-{4 + w}/" in str(repeats[0]) for w, repeats in enumerate(cells["DPO-BT"]))
    placed: set[Path] = set()
    for stage in stages:  # each after what it needs, and naming it
        assert placed.issuperset(stage.needs)
        assert all(any(str(n.parent if n.suffix == ".json" else n) in w for w in stage.argv) for n in stage.needs)
        placed.add(stage.product)
    schedule, _ = reproduce.plan(options, SUITES["schedule"](), tmp_path)
    commands = {stage.product: stage.argv for stage in stages}
    common = [stage for stage in schedule if stage.product in commands]
    assert len(common) >= 2 * (6 + 2 * 2 * 3)  # the world's stages; DPO-HPS and its mixture, trained and evaluated
    assert all(stage.argv == commands[stage.product] for stage in common)
