"""The sweep's plan: rows that train.py accepts, stages that fit together, suites that share what they can."""

import itertools
import math
import re
import tomllib
from pathlib import Path

import pytest

from hps import options
from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate.metrics import AGAIN
from hps.lab import reproduce
from hps.lab.suites import LOSSES, SETTINGS, SUITES, VIEWS, row
from hps.methods import check


@pytest.mark.parametrize("suite", SUITES)
def test_rows_of_a_suite(suite, tmp_path):
    """train.py accepts them: options that a method would ignore are errors. Rows named HPS have no reward option; both
    forms meet BT, PL and uniform; one row meets itself, other seeds."""
    spec = SUITES[suite]()
    stages, _ = reproduce.plan(reproduce.Options(seeds=1), spec, tmp_path)
    commands = [stage.argv[1:] for stage in stages if stage.argv[0] == "train.py"]
    assert len(commands) >= len(spec.rows)
    for argv in commands:
        check(*options.read(argv))
    drawn = [name for figure in spec.series.values() for line in figure["lines"].values() for name in line]
    assert {*drawn, *(name for _, line in spec.frontiers.values() for name in line)} <= spec.rows.keys()
    assert {name for pair in spec.pairs for name in pair} <= spec.rows.keys() | spec.frontiers.keys()
    assert len(set(spec.pairs)) == len(spec.pairs) and spec.prompts.keys() in (set(), spec.rows.keys())
    for name in (name for name in spec.rows if "HPS" in name):
        assert ("reward_norm" in spec.rows[name]) == ("scaled (ours)" in name), name
        if name.startswith("DPO-HPS") and not name.endswith(("again", "8 draws")) and suite != "tune":
            view = "HPS scaled (ours)" if "scaled" in name else "HPS"
            assert {(name, name.replace(view, other)) for other in ("BT", "PL-8", "uniform")} <= {*spec.pairs}
    (again,) = [name for name in spec.rows if name.endswith(AGAIN)]
    once = again.removesuffix(AGAIN)
    assert (again, once) in spec.pairs and spec.rows[again] == {**spec.rows[once], "seed": 1000}


def test_tune_climbs_until_the_best_lies_inside(tmp_path, monkeypatch):
    """On a hill whose top is far from the settings of the file it ends at the top, with lower rows around it, and
    writes what `confirm` reads; on worlds that nobody else uses."""
    top, published = {"beta": 0.1 * 2**4, "lr": 2e-4 * 2**-2}, []

    def height(name):
        words = re.findall("beta (.*) lr ([^ ]*)", name)
        return -sum(abs(math.log2(float(x) / y)) for x, y in zip(words[0], top.values())) if words else 9.0  # SFT

    def summarise(cells, pairs, frontiers):
        return [{"method": name, "metrics": {"true_reward": {"mean": height(name)}}} for name in cells], []

    monkeypatch.setattr(reproduce, "summarise", summarise)
    monkeypatch.setattr(reproduce, "run_in_workers", lambda *_: None)
    monkeypatch.setattr(reproduce, "stage_seconds", lambda *_: 0)
    monkeypatch.setattr(reproduce, "publish", lambda results, folder: published.append(results))
    reproduce.run_suite(reproduce.Options(suite="tune", seeds=1), "tune", tmp_path, tmp_path)
    written = tomllib.loads((tmp_path / "settings.toml").read_text())
    assert list(written) == [f"{loss.upper()}-{view}" for loss in LOSSES for view in VIEWS] == list(SETTINGS)
    assert all(settings == pytest.approx(top) for settings in written.values())
    tried = {row["method"] for row in published[0]["rows"]}
    for name, factor, key in itertools.product(written, (0.5, 2.0), top):
        near = top | {key: factor * top[key]}
        assert f"{name} beta {near['beta']:g} lr {near['lr']:g}" in tried
    assert len(tried) < 25 * 40
    for name, settings in SETTINGS.items():
        loss, view = name.lower().split("-")[0], name.partition("-")[2]
        assert SUITES["confirm"]().rows[f"{name} tuned"] == row(loss, view) | settings
    later = {name: SUITES[name]().later for name in SUITES}
    assert later.pop("tune") > 1000 + max(SUITES[name]().worlds for name in SUITES) and not any(later.values())


def test_a_plan_has_every_cell_once_shared_by_suites(tmp_path):
    """headline: a training of each row in each world; another suite's equal rows have equal products and commands."""
    options = reproduce.Options(seeds=2, first_seed=4)
    stages, cells = reproduce.plan(options, SUITES["headline"](), tmp_path)
    products = [stage.product for stage in stages]
    assert len(set(products)) == len(products)
    rows = SUITES["headline"]().rows
    assert sum(product.name == "policy" and "cells" in str(product) for product in products) == 2 * len(rows)
    assert list(cells) == ["SFT", *rows]
    assert [len(runs) for runs in cells["DPO-HPS"]] == [1, 1] and [len(runs) for runs in cells["SFT"]] == [1, 1]
    assert all(f"world-{4 + w}/" in str(runs[0]) for w, runs in enumerate(cells["DPO-BT"]))
    seeds = {str(s.product): word for s in stages for word in s.argv if word.startswith("--seed=")}
    for product, seed in seeds.items():  # nothing that is drawn is shared by two worlds
        world = int(product.split("world-")[1].split("/")[0])
        assert seed == f"--seed={world + 1000 * ('seed=1000' in product and product.endswith('policy'))}", product
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
    assert len(common) >= 2 * (6 + 2 * 2)  # the world's stages; two rows at least, trained and evaluated
    assert all(stage.argv == commands[stage.product] for stage in common)


def test_a_trial_shows_answers_side_by_side(tmp_path, capsys):
    """Prompt by prompt, each method's first answer under the same question."""
    for name, text in (("SFT", "no"), ("DPO-BT", "yes")):
        rows = [
            Row(f"{i}", [{"role": "user", "content": f"q{i}"}], (f"{text} {i}", "x"), (i / 2, 0.0)) for i in range(4)
        ]
        listwise.write(tmp_path / name / "samples.jsonl", rows)
    reproduce.show_samples({name: tmp_path / name for name in ("SFT", "DPO-BT")}, prompts=2)
    said = capsys.readouterr().out.strip().split("\n\n")
    assert said[1] == "> q1\n   SFT: no 1 (true reward 0.50)\nDPO-BT: yes 1 (true reward 0.50)" and len(said) == 2
