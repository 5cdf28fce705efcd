"""Means, verdicts and length control by hand, by scipy and by brute force."""

import numpy as np
import pytest
from scipy import stats

from hps.evaluate.verdicts import compare, length_controlled, markdown, summarise

NAN = np.nan
CRITERIA = ("good", "safe")
# Four prompts, two responses, two criteria.
# Means of a: 4 3 | 2 - | 1 5 | - -, of b: 3 3 | 3 1 | 1 0 | 2, and no fourth pair.
A = np.array([[[5, 3], [3, 3]], [[2, 2], [NAN, NAN]], [[0, 2], [5, 5]], [[NAN, NAN], [NAN, NAN]]])
B = np.array([[[1, 5], [3, 3]], [[4, 2], [1, 1]], [[1, 1], [0, 0]], [[2, 2], [NAN, NAN]]])
WORDS_A = np.array([[10, 20], [5, 7], [4, 8], [3, 5]], dtype=float)
WORDS_B = np.array([[10, 10], [10, 10], [10, 10], [10, NAN]])


@pytest.fixture(scope="module")
def summary():
    return summarise({"a": A, "b": B}, {"a": WORDS_A, "b": WORDS_B}, criteria=CRITERIA, baseline="b")


def mean_of(item):
    assert item["low"] <= item["mean"] <= item["high"]
    return item["mean"]


def test_means_are_over_prompts_of_what_was_scored(summary):
    a, b = summary["means"]["a"], summary["means"]["b"]
    assert mean_of(a["good"]) == pytest.approx((4 + 2 + 2.5) / 3)
    assert mean_of(a["safe"]) == pytest.approx((3 + 2 + 3.5) / 3)
    assert mean_of(a["mean"]) == pytest.approx((3.5 + 2 + 3) / 3)
    assert mean_of(b["mean"]) == pytest.approx((3 + 2 + 0.5 + 2) / 4)
    assert mean_of(a["words"]) == pytest.approx((15 + 6 + 6 + 4) / 4)
    assert mean_of(b["words"]) == 10
    assert (a["unscored"], b["unscored"]) == (3, 0)


def test_win_tie_lose_by_hand(summary):
    """Response j meets response j where both have scores: win tie | lose | tie win. A prompt counts once.

    On the first criterion it is win tie | lose | lose win, on the second lose tie | tie | win win.
    """
    [pair] = summary["comparisons"]
    assert (pair["a"], pair["b"], pair["prompts"]) == ("a", "b", 3)
    found = {name: mean_of(pair["mean"][name]) for name in ("win", "tie", "lose", "difference")}
    assert found == pytest.approx({"win": 100 / 3, "tie": 100 / 3, "lose": 100 / 3, "difference": (0.5 - 1 + 2.5) / 3})
    good = {name: mean_of(pair["good"][name]) for name in ("win", "tie", "lose", "difference")}
    assert good == pytest.approx({"win": 100 / 3, "tie": 50 / 3, "lose": 50, "difference": (2 - 2 + 2) / 3})
    safe = {name: mean_of(pair["safe"][name]) for name in ("win", "tie", "lose", "difference")}
    assert safe == pytest.approx({"win": 100 / 3, "tie": 50, "lose": 50 / 3, "difference": (-1 + 0 + 3) / 3})


def test_the_other_way_round_wins_are_losses():
    one = compare(A, B, WORDS_A, WORDS_B, scales=CRITERIA)
    other = compare(B, A, WORDS_B, WORDS_A, scales=CRITERIA)
    for scale in CRITERIA:
        assert one[scale]["win"] == other[scale]["lose"] and one[scale]["tie"] == other[scale]["tie"]
        assert one[scale]["difference"]["mean"] == -other[scale]["difference"]["mean"]
        assert one[scale]["p"] == other[scale]["p"]


def test_every_pair_is_compared_the_baseline_second():
    tables, words = dict.fromkeys("xyzb", A), dict.fromkeys("xyzb", WORDS_A)
    found = summarise(tables, words, criteria=CRITERIA, baseline="z")["comparisons"]
    assert [pair["a"] + pair["b"] for pair in found] == ["xz", "yz", "bz", "xy", "xb", "yb"]
    assert all(mean_of(pair["mean"]["tie"]) == 100 and pair["mean"]["p"] == 1 for pair in found)


def test_p_is_wilcoxons_over_prompts():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 11, (2, 40, 3, 2)) / 2
    words = np.ones((40, 3))
    found = compare(a + 0.5, b, words, words, scales=CRITERIA)
    difference = (a + 0.5 - b).mean(1)
    for k, scale in enumerate(CRITERIA):
        assert found[scale]["p"] == pytest.approx(stats.wilcoxon(difference[:, k]).pvalue)


def test_without_scores_there_is_nothing_to_say():
    none = np.full(A.shape, NAN)
    found = summarise({"a": none, "b": B}, {"a": WORDS_A, "b": WORDS_B}, criteria=CRITERIA, baseline="b")
    assert found["means"]["a"]["mean"] is None and found["means"]["a"]["unscored"] == 8
    [pair] = found["comparisons"]
    assert pair["prompts"] == 0 and pair["mean"] is None and pair["at_equal_length"] is None
    assert "| a | - | - | - | 8 [" in markdown(found, criteria=CRITERIA)
    assert "| a | b | 0 | - | - | - | - | - | - |" in markdown(found, criteria=CRITERIA)


def test_length_control_is_the_line_of_polyfit():
    rng = np.random.default_rng(1)
    longer = rng.normal(30, 50, 200)
    difference = 0.25 + 0.01 * longer + rng.normal(0, 0.5, 200)
    found = length_controlled(difference, longer)
    slope, intercept = np.polyfit(longer, difference, 1)
    assert found["mean"] == pytest.approx(intercept) and found["per_100_words"] == pytest.approx(100 * slope)
    picks = rng.integers(200, size=(2000, 200))
    brute = [np.polyfit(longer[pick], difference[pick], 1)[1] for pick in picks]
    low, high = np.quantile(brute, [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.02)
    assert found["low"] < 0.25 < found["high"] < difference.mean()  # all of the rest was length


def test_length_control_without_different_lengths():
    found = length_controlled(np.array([1.0, 0.0, 0.5]), np.array([7.0, 7.0, 7.0]))
    assert found["mean"] == pytest.approx(0.5) and found["per_100_words"] == 0
    one = length_controlled(np.array([0.5]), np.array([3.0]))
    assert one == {"mean": 0.5, "low": 0.5, "high": 0.5, "per_100_words": 0}


def test_length_control_of_pairs_leaves_out_the_unscored():
    """Prompt 2's second response and prompt 4 have no score: their lengths must not count either."""
    longer = np.array([(0 + 10) / 2, -5, (-6 - 2) / 2])
    scores = summarise({"a": A, "b": B}, {"a": WORDS_A, "b": WORDS_B}, criteria=CRITERIA, baseline="b")
    expected = np.polyfit(longer, [0.5, -1, 2.5], 1)[1]
    assert scores["comparisons"][0]["at_equal_length"]["mean"] == pytest.approx(expected)


def test_the_table(summary):
    lines = markdown(summary, criteria=CRITERIA).splitlines()
    assert lines[0] == "| method | good | safe | mean | words | unscored |"
    assert lines[2].startswith("| a | 2.83 [") and lines[2].endswith(" | 3 |")
    assert lines[3].startswith("| b | ") and lines[3].endswith(" | 10 [10, 10] | 0 |")
    pair = [line for line in lines if line.startswith("| a | b | 3 | 33.3 [")]
    assert len(pair) == 1 and pair[0].count("|") == 10
    assert "| x\\|y | " in markdown({"means": {"x|y": summary["means"]["a"]}, "comparisons": []}, criteria=CRITERIA)
