"""Short trainings follow the committed trajectories; `python tests/golden.py --check` does all of them, to 1e-6."""

import golden
import pytest

OTHERS = ["dpo-hps draws", "dpo-hps positives", "kto-hps", "lipo-pl", "nca-pl official", "reward", "sft", "simpo-hps"]
ONE = [f"lora {loss}-{view}" for loss in golden.LOSSES for view in ("bt", "pl", "hps")]
ONE += [f"lora {method}" for method in OTHERS] + ["full dpo-hps", "full nca-pl"]
TWO = ["lora dpo-hps", "full nca-pl", "full kto-hps", "full sft"]


@pytest.mark.parametrize(("ranks", "runs"), [(1, ONE), (2, TWO)], ids=["one process", "two ranks"])
def test_the_committed_trajectories(tmp_path, ranks, runs):
    """Other machines and versions of torch round differently: 1e-4. A plan is the same to the bit."""
    expected = golden.load()
    found = golden.play_all(runs, ranks, tmp_path)
    apart = {run: golden.difference(values, expected[run]) for run, values in found.items()}
    assert len(apart) == len(runs) and {run: x for run, x in apart.items() if not x < 1e-4} == {}


def test_the_comparison_sees_a_small_change():
    run = {"loss": [0.7, 0.5], "plan.row": [2.0, 5.0]}
    assert golden.difference(run, run) == 0
    assert golden.difference(run, run | {"loss": [0.7, 0.50002]}) == pytest.approx(4e-5, rel=1e-3)
    for other in (run | {"loss": [0.7]}, {"loss": [0.7, 0.5]}, run | {"loss": [0.7, float("nan")]}):
        assert not golden.difference(run, other) < 1e9
