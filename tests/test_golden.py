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
