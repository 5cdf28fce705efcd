"""The sweep's plan: rows that train.py accepts, stages that fit together, suites that share what they can."""

from pathlib import Path

import pytest

from hps import config
from hps.evaluate.metrics import AGAIN
from hps.lab import reproduce, sweep
from hps.lab.suites import SUITES
from hps.options import Config, check


@pytest.mark.parametrize("suite", SUITES)
def test_train_accepts_every_row_of_a_suite(suite):
    """Options that a method would ignore are errors, so each row's options must belong to its method."""
    spec = SUITES[suite]()
    for row in spec.rows.values():
        argv = ["--config", "configs/world.toml", "--model", "m", "--data", "d", "--out", "o", *sweep.flags(row)]
        check(*config.parse(Config, argv, prog="train.py", description=""))
    assert {name for pair in spec.pairs for name in pair} <= spec.rows.keys()
    assert len(set(spec.pairs)) == len(spec.pairs)
    assert spec.prompts.keys() | spec.noise.keys() <= spec.rows.keys()
    drawn = [row for figure in spec.series.values() for line in figure["lines"].values() for row in line]
    assert set(drawn) <= spec.rows.keys()


@pytest.mark.parametrize("suite", SUITES)
def test_each_suite_judges_the_papers_method_and_itself(suite):
    """Rows named HPS have no reward option; both forms meet BT, PL and uniform; one row meets itself, other seeds."""
    spec = SUITES[suite]()
    for name, row in spec.rows.items():
        if "HPS" in name:
            assert ("reward_norm" in row) == ("scaled (ours)" in name), name
    for name in [name for name in spec.rows if "DPO-HPS" in name and not name.endswith(("again", "8 draws"))]:
        view = "HPS scaled (ours)" if "scaled" in name else "HPS"
        for other in ("BT", "PL-8", "uniform") if suite != "tune" else ():
            assert (name, name.replace(view, other)) in spec.pairs
    (again,) = [name for name in spec.rows if name.endswith(AGAIN)]
    once = again.removesuffix(AGAIN)
    assert (again, once) in spec.pairs and spec.rows[again] == {**spec.rows[once], "seed": 1000}


def test_what_is_confirmed_was_tuned_on_other_worlds():
    """Every row of `confirm` is a row of `tune`; their worlds are different ones, also for other first seeds."""
    swept = list(SUITES["tune"]().rows.values())
    suite = SUITES["confirm"]()
    assert all({"beta": 0.1} | options in swept for options in suite.rows.values() if "seed" not in options)
    assert SUITES["tune"]().split == "valid" and suite.split == "test"
    assert suite.later >= max(SUITES[name]().worlds for name in SUITES) and SUITES["tune"]().later == 0


def test_a_plan_has_every_cell_once_shared_by_suites(tmp_path):
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
    behind: dict[Path, set[Path]] = {}  # all that must be there once a product is
    for stage in stages:  # each after what it needs, which is all of the others' products that it reads
        assert behind.keys() >= set(stage.needs)
        behind[stage.product] = set(stage.needs).union(*(behind[need] for need in stage.needs))
        read = {Path(word.partition("=")[2]) for word in stage.argv if not word.startswith("--out")}
        read |= {path / "eval.json" for path in read}  # of a baseline
        assert read & set(products) <= behind[stage.product], stage.argv
    schedule, _ = reproduce.plan(options, SUITES["schedule"](), tmp_path)
    commands = {stage.product: stage.argv for stage in stages}
    common = [stage for stage in schedule if stage.product in commands]
    assert len(common) >= 2 * (6 + 2 * 2 * 3)  # the world's stages; two rows at least, trained and evaluated
    assert all(stage.argv == commands[stage.product] for stage in common)
