"""The linear reward model against scipy and hand algebra."""

import math
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest
import scipy.optimize
from safetensors.numpy import save_file

from hps.prepare.linear_reward import LinearRewardModel, features, fit, load, save, score
from hps.prepare.rewards import annotate

PAIRS = [
    ("q", "I am sorry , I can't help", "sure , here is how"),
    ("q", "sorry , no", "here is how you do it"),
    ("q", "that is illegal", "sure thing , sorry"),
    ("q", "sure , here is a safe way", "no"),
    ("q", "sorry , that is not safe at all", "here is how"),
]


def dense(response, buckets):
    index, value = features(response, buckets=buckets)
    vector = np.zeros(buckets + 2)
    vector[index] = value
    return vector


def test_features_by_hand():
    buckets = 2**20  # no two of these collide
    vector = dense("No no, NO!", buckets)
    hits = {"no": 3, ",": 1, "!": 1, "no no": 1, "no ,": 1, ", no": 1, "no !": 1}
    expected = {zlib.crc32(gram.encode()) % buckets: math.log1p(c) / math.sqrt(7) for gram, c in hits.items()}
    assert len(expected) == 7
    expected |= {buckets: math.log(6), buckets + 1: 0.05}  # five words, punctuation included
    assert {int(i): vector[i] for i in np.flatnonzero(vector)} == pytest.approx(expected, abs=1e-12)


def test_colliding_words_are_added_up():
    index, value = features("a b", buckets=1)  # "a", "b" and "a b" share the only bucket
    assert index.tolist() == [0, 1, 2]
    assert value.tolist() == pytest.approx([math.log(4), math.log(3), 0.02])


@pytest.mark.parametrize(("buckets", "l2"), [(1, 1e-2), (64, 1e-3), (64, 0.3)])
def test_fit_minimises_the_bradley_terry_objective(buckets, l2):
    differences = np.stack([dense(c, buckets) - dense(r, buckets) for _, c, r in PAIRS])

    def objective(weights):
        margins = differences @ weights
        loss = np.mean([math.log1p(math.exp(-m)) if m > 0 else -m + math.log1p(math.exp(m)) for m in margins])
        return loss + l2 / 2 * weights @ weights

    expected = scipy.optimize.minimize(objective, np.zeros(buckets + 2), method="BFGS", options={"gtol": 1e-7}).x
    model = fit(PAIRS, buckets=buckets, l2=l2)
    assert model.weights.dtype == np.float32 and model.num_pairs == 5 and model.l2 == l2
    assert np.abs(expected).max() > 0.1
    assert model.weights == pytest.approx(expected, abs=1e-4)


def test_one_pair_solves_its_one_dimensional_equation():
    # One pair with difference d: w = a d, where a solves sigmoid(-a |d|^2) = l2 a.
    l2 = 0.05
    model = fit([("", "yes yes", "no")], buckets=128, l2=l2)
    d = dense("yes yes", 128) - dense("no", 128)
    a = scipy.optimize.brentq(lambda a: 1 / (1 + math.exp(a * (d @ d))) - l2 * a, 0, 1 / l2)
    assert model.weights == pytest.approx(a * d, abs=1e-5)


def test_scores_are_the_linear_form_whatever_the_prompt():
    model = fit(PAIRS, buckets=64)
    texts = ["sorry , no", "here is how", "unseen words", ""]
    expected = [model.weights.astype(np.float64) @ dense(text, 64) for text in texts]
    assert score(model, "q", texts) == pytest.approx(expected, abs=1e-9)
    assert score(model, [{"role": "user", "content": "other"}], texts) == score(model, "q", texts)


def test_fitted_model_ranks_its_own_pairs_and_swapping_them_flips_the_sign():
    model = fit(PAIRS, l2=1e-3)
    swapped = fit([(p, r, c) for p, c, r in PAIRS], l2=1e-3)
    assert model.weights == pytest.approx(-swapped.weights, abs=1e-5)
    for _, chosen, rejected in PAIRS:
        better, worse = score(model, "", [chosen, rejected])
        assert better > worse


ODD_TEXTS = ["", " \n\t", "!!!", "\x00", "\ud83d", "\u65e5\u672c \u043f\u0440\u0438", "a" * 100_000, "x " * 50_000]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_strings_get_finite_scores(text):
    model = fit([*PAIRS, ("", text, "b")])
    assert np.isfinite(model.weights).all()
    assert all(map(math.isfinite, score(model, text, [text])))


def test_save_and_load_give_the_same_model(tmp_path):
    model = fit(PAIRS, buckets=64, l2=0.02)
    save(model, tmp_path / "rm.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["rm.safetensors"]  # no temporary file stays
    loaded = load(tmp_path / "rm.safetensors")
    assert (loaded.l2, loaded.num_pairs) == (0.02, 5)
    assert np.array_equal(loaded.weights, model.weights) and loaded.weights.dtype == np.float32


def test_other_files_are_refused(tmp_path):
    save_file({"weights": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("hello, this is no tensor file")
    for name in ("other.safetensors", "text"):
        with pytest.raises(ValueError, match="data_prep.py fit"):
            load(tmp_path / name)


def test_weights_and_scores_are_the_same_in_another_process(tmp_path):
    code = (
        "import sys; from hps.prepare.linear_reward import *\n"
        "model = fit([('q', *sys.argv[2:])], buckets=512); save(model, sys.argv[1])\n"
        "print(score(model, 'q', sys.argv[2:]))"
    )
    pair = ["sorry , no way", "sure , here is how"]
    other_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "theirs"), *pair],
        env=os.environ | {"PYTHONHASHSEED": other_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    model = fit([("q", *pair)], buckets=512)
    save(model, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert done.stdout.strip() == str(score(model, "q", pair))


@pytest.mark.parametrize("settings", [{"l2": 0}, {"l2": math.nan}, {"buckets": 0}])
def test_fit_refuses_settings_without_an_optimum(settings):
    with pytest.raises(ValueError, match=r"fit\(\)"):
        fit(PAIRS, **settings)
    with pytest.raises(ValueError, match="at least one pair"):
        fit([])


def test_fit_says_when_it_did_not_converge():
    with pytest.raises(ValueError, match="did not converge in 2 iterations"):
        fit(PAIRS, l2=1e-3, max_iter=2)


def test_a_linear_model_annotates():
    model = LinearRewardModel(np.array([0.0, 1.0, 0.0], np.float32), l2=1.0, num_pairs=1)
    rows = annotate([("r", "hello", ["ccc"])], lambda *row: score(model, *row), progress=False)
    assert dict(rows)["r"] == pytest.approx([math.log(2)])
