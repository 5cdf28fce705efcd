"""The real-text pipeline's plan: its commands are what scripts accept, its stages fit together, its splits apart."""

import math
from itertools import pairwise
from pathlib import Path

import pytest

import data_prep
import eval as evaluation
from hps import config
from hps.data import listwise
from hps.lab import realtext
from hps.options import Config, check


@pytest.fixture(params=[False, True])
def plan(request):
    c = realtext.Options(hh="rows.jsonl", small=request.param, seeds=2)
    return c, *realtext.plan(c, Path("out"))


def test_every_command_is_accepted(plan):
    """Options exist, have the right type, and are used by the method that they are given to."""
    _, stages, _ = plan
    for stage in stages:
        script, *argv = stage.argv
        if script == "train.py":
            check(*config.parse(Config, argv, prog="", description=""))
        elif script == "eval.py":
            config.parse(evaluation.Config, argv, prog="", description="")
        elif script == "data_prep.py":
            config.parse(data_prep.COMMANDS[argv[0]][0], argv[1:], prog="", description="")
        else:
            assert stage.argv[:2] == ["-m", "hps.evaluate.export"]


def test_a_stage_needs_what_an_earlier_one_makes(plan):
    """And waits, directly or not, for every product of another stage that its command reads."""
    _, stages, cells = plan
    behind: dict[Path, set[Path]] = {}  # all that must be there once a product is
    for stage in stages:
        assert behind.keys() >= set(stage.needs) and stage.product not in behind
        behind[stage.product] = set(stage.needs).union(*(behind[need] for need in stage.needs))
        read = {Path(word.partition("=")[2]) for word in stage.argv if not word.startswith("--out")}
        assert read & {s.product for s in stages} <= behind[stage.product], stage.argv
    assert behind.keys() >= {folder / "eval.json" for worlds in cells.values() for runs in worlds for folder in runs}
    assert len(cells) == 5 and len({len(runs[0]) for name, runs in cells.items() if name != "SFT"}) == 1


def test_splits_are_disjoint(plan):
    c, stages, _ = plan
    spans = []
    for stage in stages:
        if stage.argv[1] == "import":
            o, _ = config.parse(data_prep.Import, stage.argv[2:], prog="", description="")
            spans.append((o.skip, o.skip + o.limit))
    spans.sort()
    assert len(spans) == 5 and all(a[1] <= b[0] for a, b in pairwise(spans))
    size = realtext.SIZES[c.small]
    more = [size[name] + -(-size[name] // 3) for name in ("train", "test")]  # a third more: some prompts are too long
    assert [b - a for a, b in spans] == [size["reward"], size["reward"], size["heldout"], *more]


def test_annotating_and_evaluating_reward_models_stay_apart(plan):
    """What trains sees model a only; what is reported comes from b only."""
    _, stages, _ = plan
    by = {}
    for stage in stages:
        for word in stage.argv:
            if word.startswith("--scorer="):
                by.setdefault(word[-len("a/policy") :][0], []).append(stage.product.name)
    assert sorted(by["a"]) == ["heldout-a.jsonl", "train-scored.jsonl"]
    assert "test-scored.jsonl" in by["b"] and "train-scored.jsonl" not in by["b"] and "eval.json" in by["b"]


def test_agreement_by_hand(tmp_path):
    """Right, wrong, tie, right: (1 + 0 + .5 + 1) / 4."""
    pairs = [((2.0, 1.0), 0, 1), ((1.0, 2.0), 0, 1), ((1.0, 1.0), 0, 1), ((0.0, 3.0), 1, 0)]
    rows = [listwise.Row(str(i), "p", ("a", "b"), *pair) for i, pair in enumerate(pairs)]
    listwise.write(tmp_path / "rows.jsonl", rows)
    found = realtext.accuracy(tmp_path / "rows.jsonl")
    assert math.isclose(found["mean"], 0.625) and found["low"] <= 0.625 <= found["high"]
