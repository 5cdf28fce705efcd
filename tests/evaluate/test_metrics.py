"""Margins, intervals, win rates and BLEU against hand values, simulation, scipy, nltk and sacrebleu."""

import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from nltk.translate.bleu_score import sentence_bleu

from hps.evaluate import figures, md
from hps.evaluate import metrics as M

# Six candidates: 1 and 4 tie for best, 3 and 5 tie below the gap.
REWARDS = [0.0, 2.0, 1.7, 1.5, 2.0, 1.5]
H = [-1.0, 3.0, 2.5, 4.0, 100.0, 0.5]


def test_order_and_margins_by_hand():
    assert M.order(REWARDS).tolist() == [1, 2, 3, 5, 0]  # candidate 4 ties with the best: left out
    assert M.order([0.0] * 30 + [1.0]).tolist() == [30, *range(30)]  # other ties keep their place
    got = M.margins(H, REWARDS)
    assert got == pytest.approx(
        {
            "rm2": 3.0 - 2.5,
            "rm10": 3.0 - (2.5 + 4.0 + 0.5 - 1.0) / 4,
            "rmgap": 3.0 - 4.0,
            "rm_worst_case": 3.0 - 4.0,
            "rm_min": 3.0 - -1.0,
        }
    )
    assert M.margins(H, REWARDS, hardest=2)["rm10"] == pytest.approx(3.0 - (2.5 + 4.0) / 2)
    assert M.margins(H, REWARDS, gap=0.2)["rmgap"] == pytest.approx(0.5)
    assert M.margins(H, REWARDS, gap=0.6)["rmgap"] == pytest.approx(4.0) and "rmgap" not in M.margins([1, 0], [1, 0.9])
    h = np.linspace(0, 1, 30) ** 3  # of which the ten hardest count
    assert M.margins(h, h)["rm10"] == pytest.approx(h[-1] - h[19:29].mean())


def test_margins_refuse():
    for h, s, message in (
        ([1.0, 2.0], [1.0, 1.0], "no candidate is dispreferred"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "same candidates"),
        ([1.0, math.nan], [1.0, 2.0], "not finite"),
        ([1.0, 2.0], [1.0, -math.inf], "not finite"),
        ([], [], "non-empty"),
    ):
        with pytest.raises(ValueError, match=message):
            M.margins(h, s)


# ---- intervals ------------------------------------------------------------------------------------


def test_world_interval_and_p_are_scipys():
    values = np.random.default_rng(1).normal(0.5, size=7)
    theirs = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = M.world_interval(values)
    assert found == pytest.approx({"mean": values.mean(), "low": theirs.low, "high": theirs.high})
    for bound in (found["low"], found["high"]):  # where the interval ends, p is 1 less its level
        assert M.world_p(values, bound) == pytest.approx(0.05)
    assert M.world_p(values, 0.3) == pytest.approx(scipy.stats.ttest_1samp(values, 0.3).pvalue)
    assert (M.world_p([2.0, 2.0], 2), M.world_p([2.0], 0)) == (1, 1)
    # Two equal worlds are an accident, and six are told apart from 0: the sign test's p.
    assert [M.world_p([2.0] * W, 0) for W in (2, 5, 6)] == [1 / 2, 1 / 16, 1 / 32]
    assert M.world_interval([2.5, 2.5, 2.5]) == dict.fromkeys(("mean", "low", "high"), 2.5)


def test_one_world_has_no_interval():
    unknown = M.world_interval([0.5])
    assert unknown == {"mean": 0.5, "low": None, "high": None} and M.ends(unknown) == (-math.inf, math.inf)
    shown = [md.interval(one, 1) for one in (unknown, unknown | {"low": -1.0, "high": 2.0})]
    assert shown == ["0.5", "0.5 [-1.0, 2.0]"]
    for values, message in (([1.0, math.nan], "not finite"), ([], "non-empty")):
        with pytest.raises(ValueError, match=message):
            M.world_interval(values)


def test_holm_by_hand():
    """Sorted, times how many are left, never falling: .01 x 3, .02 x 2, and .03 takes the .04 before it."""
    assert M.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert M.holm([0.6, 0.5]) == [1.0, 1.0] and M.holm([]) == []


# ---- win rate and BLEU -----------------------------------------------------------------------------------------


def test_win_tie_lose_by_hand():
    assert M.win_tie_lose([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 1.0]) == {"win": 25.0, "tie": 25.0, "lose": 50.0}
    with pytest.raises(ValueError, match="same prompts and samples"):
        M.win_tie_lose([1.0, 2.0], [1.0])


PAIRS = [
    ("the cat sat on the mat .", "the cat is on the mat ."),
    ("  a dog barks at the tall tree\n", "a dog barks at a tall tree"),
    ("", "something"),
    ("no overlap here", "qqqq zzzz"),
]


def test_bleu_char_is_the_authors_call():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        direct = [sentence_bleu([r.strip()], h.strip()) for h, r in PAIRS]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # ours is silent
        scores = [M.bleu_char(h, r) for h, r in PAIRS]
    assert scores == pytest.approx(direct) and scores[2] == 0.0
    words = sentence_bleu([PAIRS[1][1].split()], PAIRS[1][0].split())
    assert abs(scores[1] - words) > 0.1  # characters, not words
    # By hand: matches 4/5, 3/4, 2/3, 1/2, equal lengths.
    assert M.bleu_char("abcde", "abcdf") == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert M.bleu_char("Abcdef", "abcdef") < 1.0 == M.bleu_char("abcdef ", "abcdef")


def test_bleu_word_is_sacrebleus():
    expected = [sacrebleu.BLEU(effective_order=True).sentence_score(h, [r]).score for h, r in PAIRS]
    assert [M.bleu_word(h, r) for h, r in PAIRS] == pytest.approx(expected)
    assert M.bleu_word("a b c d e", "a b c d e") == pytest.approx(100.0) and M.bleu_word("", "a b") == 0.0


def test_a_missing_package_is_one_sentence(monkeypatch):
    for package, call in {
        "nltk": lambda: M.bleu_char("a", "a"),
        "sacrebleu": lambda: M.bleu_word("a", "a"),
        "scipy": lambda: M.world_p([1.0, 2.0]),
        "matplotlib": lambda: figures.save(figures.Plan("x", "", "", (1, 1), lambda figure: None), Path()),
    }.items():
        for module in [package, *(name for name in sys.modules if name.partition(".")[0] == package)]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"this needs {package}: pip install -e '.\[eval\]'"):
            call()
