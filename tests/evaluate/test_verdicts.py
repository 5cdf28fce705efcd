"""Means, verdicts and length control by hand, by scipy and by brute force."""

import numpy as np
import pytest
from scipy import stats

from hps.evaluate.verdicts import SCALES, length_controlled, markdown, read_samples, summarise

NAN = np.nan
# Four prompts, two responses; the criteria are all alike but for clarity, so that an average is (3 good + safe) / 4.
# First criterion of a: 5 3 | 2 - | 0 5 | - -, of b: 1 3 | 4 1 | 1 0 | 2, and no fourth pair; clarity likewise.
A = np.array([[[5, 3], [3, 3]], [[2, 2], [NAN, NAN]], [[0, 2], [5, 5]], [[NAN, NAN], [NAN, NAN]]])
B = np.array([[[1, 5], [3, 3]], [[4, 2], [1, 1]], [[1, 1], [0, 0]], [[2, 2], [NAN, NAN]]])
WORDS_A = np.array([[10, 20], [5, 7], [4, 8], [3, 5]], dtype=float).T
WORDS_B = np.array([[10, 10], [10, 10], [10, 10], [10, NAN]]).T


def four(table):
    """(prompts, responses, 2) -> (responses, prompts, 4)."""
    return table[..., [0, 0, 1, 1]].transpose(1, 0, 2)


def summary_of(a=A, b=B):
    return summarise({"a": four(a), "b": four(b)}, {"a": WORDS_A, "b": WORDS_B}, baseline="b")


def mean_of(item):
    assert item["low"] <= item["mean"] <= item["high"]
    return item["mean"]


def test_means_are_over_prompts_of_what_was_scored():
    a, b = summary_of()["means"]["a"], summary_of()["means"]["b"]
    assert mean_of(a["correctness"]) == pytest.approx((4 + 2 + 2.5) / 3)
    assert mean_of(a["clarity"]) == pytest.approx((3 + 2 + 3.5) / 3)
    assert mean_of(a["average"]) == pytest.approx((3.5 + 2 + 3) / 3)
    assert mean_of(b["average"]) == pytest.approx((3 + 2 + 0.5 + 2) / 4) and b["average"]["prompts"] == 4
    assert mean_of(a["words"]) == pytest.approx((15 + 6 + 6 + 4) / 4) and mean_of(b["words"]) == 10
    assert (a["unscored"], b["unscored"]) == (3, 0)


def test_win_tie_lose_by_hand():
    """Response j meets response j where both have scores: win tie | lose | tie win. A prompt counts once.

    On the first criterion it is win tie | lose | lose win, on the last lose tie | tie | win win.
    """
    [pair] = summary_of()["comparisons"]
    for scale, expected in {
        "average": (100 / 3, 100 / 3, 100 / 3, (0.5 - 1 + 2.5) / 3),
        "correctness": (100 / 3, 50 / 3, 50, (2 - 2 + 2) / 3),
        "clarity": (100 / 3, 50, 50 / 3, (-1 + 0 + 3) / 3),
    }.items():
        found = [mean_of(pair[scale][name]) for name in ("win", "tie", "lose", "difference")]
        assert found == pytest.approx(expected) and pair[scale]["difference"]["prompts"] == 3
    [other] = summary_of(B, A)["comparisons"]  # the other way round wins are losses
    for scale in SCALES:
        assert pair[scale]["win"] == other[scale]["lose"] and pair[scale]["tie"] == other[scale]["tie"]
        assert pair[scale]["difference"]["mean"] == -other[scale]["difference"]["mean"]
        assert pair[scale]["p"] == other[scale]["p"]


def test_p_is_wilcoxons_over_prompts():
    a, b = np.random.default_rng(0).integers(0, 11, (2, 3, 40, 4)) / 2
    words = dict.fromkeys("ab", np.ones((3, 40)))
    [found] = summarise({"a": a + 0.5, "b": b}, words, baseline="b")["comparisons"]
    for k, scale in enumerate(SCALES[:4]):
        assert found[scale]["p"] == pytest.approx(stats.wilcoxon((a + 0.5 - b).mean(0)[:, k]).pvalue)
    [found] = summarise({"a": a, "b": a}, words, baseline="b")["comparisons"]
    assert mean_of(found["average"]["tie"]) == 100 and found["average"]["p"] == 1


def test_without_scores_there_is_nothing_to_say():
    found = summary_of(a=np.full(A.shape, NAN))
    assert found["means"]["a"]["average"] is None and found["means"]["a"]["unscored"] == 8
    [pair] = found["comparisons"]
    assert pair["average"] is None and pair["at_equal_length"] is None
    assert "| a | - | - | - | - | - | 8 [" in markdown(found)
    assert comparisons_of(markdown(found))[1] == ["0", *10 * "-"]


def test_length_control_is_the_line_of_polyfit():
    rng = np.random.default_rng(1)
    longer = rng.normal(30, 50, 200)
    difference = 0.25 + 0.01 * longer + rng.normal(0, 0.5, 200)
    found = length_controlled(difference, longer)
    slope, intercept = np.polyfit(longer, difference, 1)
    assert found["mean"] == pytest.approx(intercept) and found["per_100_words"] == pytest.approx(100 * slope)
    left = difference - intercept - slope * longer  # by the textbook: s^2 (1/n + mean^2 / S_xx)
    variance = (left**2).sum() / 198 * (1 / 200 + longer.mean() ** 2 / ((longer - longer.mean()) ** 2).sum())
    half = stats.t.ppf(0.975, 198) * variance**0.5
    assert (found["low"], found["high"]) == pytest.approx((intercept - half, intercept + half))
    assert found["low"] < 0.25 < found["high"] < difference.mean()  # all of the rest was length
    same = length_controlled(np.array([1.0, 0.0, 0.5]), np.array([7.0, 7.0, 7.0]))  # no different lengths, no slope
    assert same["mean"] == pytest.approx(0.5) and same["per_100_words"] == 0
    one = length_controlled(np.array([0.5]), np.array([3.0]))
    assert one == {"mean": 0.5, "low": None, "high": None, "per_100_words": 0}  # one prompt, no spread
    two = length_controlled(np.array([1.0, 0.0]), np.array([1.0, 2.0]))  # lie on every line through them
    assert two["mean"] == pytest.approx(2) and two["low"] is None
    flat = length_controlled(np.zeros(3), np.array([1.0, 2.0, 4.0]))
    assert not any(isinstance(x, float) and np.isnan(x) for x in flat.values()) and flat["mean"] == 0
    # Of pairs: prompt 2's second response and prompt 4 have no score, so their lengths do not count either.
    expected = np.polyfit([(0 + 10) / 2, -5, (-6 - 2) / 2], [0.5, -1, 2.5], 1)[1]
    assert summary_of()["comparisons"][0]["at_equal_length"]["mean"] == pytest.approx(expected)


def comparisons_of(text):
    """The cells of the header and of the pair after a and b, put together from the tables that they were split into."""
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| a | b |")]
    return [[cell for block in blocks for cell in block[i].strip("| ").split(" | ")[2:]] for i in (0, 2)]


def test_the_tables_of_verdicts():
    lines = markdown(summary_of()).splitlines()
    assert lines[0] == "| method | correctness | helpfulness | safety | clarity | average | words | unscored |"
    assert lines[2].startswith("| a | 2.83 [") and lines[2].endswith(" | 3 |")
    assert lines[3].startswith("| b | ") and lines[3].endswith(" | 10 | 0 |")
    header, pair = comparisons_of(markdown(summary_of()))
    assert header[:2] == ["prompts", "a - b: correctness"] and header[-1] == "a - b at equal length"
    assert pair[:2] == ["3", pair[1]] and pair[1].startswith("+0.67 [") and pair[6].startswith("33.3 [")
    assert max(map(len, lines)) <= 160 and len(header) == len(pair) == 11
    named = summarise({"x|y": four(A), "b": four(B)}, {"x|y": WORDS_A, "b": WORDS_B}, baseline="b")
    assert markdown(named).count("| x\\|y | ") == 3  # in each table


def test_methods_are_two_named_files_or_more(tmp_path):
    for words in ((), ("a=x",), ("a=x", "a=y"), ("a=x", "y"), ("a=x", "b="), ("a=x", "=y"), ("a=x,b=y",)):
        with pytest.raises(ValueError, match="NAME=FILE NAME=FILE ..., two or more different names"):
            read_samples(words, tmp_path / "out")
