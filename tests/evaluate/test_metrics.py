"""Margins, intervals, win rates and BLEU against hand values, brute force, scipy, nltk and sacrebleu."""

import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import scipy.stats
from nltk.translate.bleu_score import sentence_bleu

from hps.evaluate import figures
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
    assert M.margins(H, REWARDS, gap=0.6)["rmgap"] == pytest.approx(4.0)


def test_margins_leave_out_an_undefined_gap_and_use_only_ten():
    assert "rmgap" not in M.margins([1.0, 0.0], [1.0, 0.9])
    rewards = np.linspace(0, 1, 30)
    h = rewards**3
    assert M.margins(h, rewards)["rm10"] == pytest.approx(h[-1] - h[19:29].mean())


def test_margins_do_not_depend_on_the_candidates_order():
    rng = np.random.default_rng(0)
    h, s = rng.normal(size=40), rng.normal(size=40)
    shuffle = rng.permutation(40)
    assert M.margins(h[shuffle], s[shuffle]) == pytest.approx(M.margins(h, s))
    assert M.margins(h + 7.0, s) == pytest.approx(M.margins(h, s))


@pytest.mark.parametrize(
    "h, s, message",
    [
        ([1.0, 2.0], [1.0, 1.0], "no candidate is dispreferred"),
        ([1.0], [1.0], "no candidate is dispreferred"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], "same candidates"),
        ([1.0, math.nan], [1.0, 2.0], "not finite"),
        ([1.0, 2.0], [1.0, -math.inf], "not finite"),
        ([], [], "non-empty"),
    ],
)
def test_margins_refuse(h, s, message):
    with pytest.raises(ValueError, match=message):
        M.margins(h, s)


def test_rm_rdpo_takes_off_what_the_longer_winner_gains():
    assert M.rm_rdpo(1.0, 100, 40) == pytest.approx(0.4) and M.rm_rdpo(2.0, 20, 50) == pytest.approx(2.3)


# ---- intervals ------------------------------------------------------------------------------------


def test_one_level_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(2).exponential(size=200)
    mean, low, high = M.bootstrap_mean(values, draws=20_000, level=0.9)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert mean == pytest.approx(values.mean())
    tolerance = 0.02 * (theirs.high - theirs.low) + 1e-12
    assert low == pytest.approx(theirs.low, abs=tolerance)
    assert high == pytest.approx(theirs.high, abs=tolerance)
    assert M.bootstrap_mean(values[None], draws=20_000, level=0.9) == (mean, low, high)  # one seed, one level


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(4)
    inside = 0
    for trial in range(400):
        _, low, high = M.bootstrap_mean(rng.normal(size=60), draws=500, level=0.8, seed=trial)
        inside += low <= 0.0 <= high
    # Binomial(400, .8) has a standard deviation of 2 points, percentile intervals are 1 short at n = 60.
    assert 0.73 <= inside / 400 <= 0.86


def test_two_level_bootstrap_has_the_variance_of_both_levels():
    rng = np.random.default_rng(5)
    seeds, prompts = 8, 50
    table = rng.normal(size=(seeds, 1)) + 2.0 * rng.normal(size=(1, prompts))  # additive: variances add
    _, low, high = M.bootstrap_mean(table, draws=20_000, level=0.6827)
    expected = math.sqrt(table.mean(1).var() / seeds + table.mean(0).var() / prompts)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)
    # Prompts alone (the seeds averaged first) must be narrower: seeds are really resampled.
    _, low1, high1 = M.bootstrap_mean(table.mean(0), draws=20_000, level=0.6827)
    assert (high1 - low1) / 2 == pytest.approx(math.sqrt(table.mean(0).var() / prompts), rel=0.05)
    assert high - low > 1.1 * (high1 - low1)


def test_worlds_are_a_level_of_their_own():
    """(worlds, seeds, prompts): the variances of independent levels add, by the algebra of the plug-in mean."""
    rng = np.random.default_rng(12)
    worlds, seeds, prompts = 10, 4, 60
    w, s = rng.normal(size=(worlds, 1, 1)), rng.normal(size=(worlds, seeds, 1))
    p = rng.normal(size=(worlds, 1, prompts))
    table = 2 * w + s + 3 * p
    _, low, high = M.bootstrap_mean(table, draws=20_000, level=0.6827)
    within = (s.var(1).mean() / seeds + 9 * p.var(2).mean() / prompts) / worlds
    # A world drawn twice brings the same resample twice, so the inner variance counts 1 + 1 - 1/worlds times.
    expected = math.sqrt(table.mean((1, 2)).var() / worlds + within * (2 - 1 / worlds))
    assert (high - low) / 2 == pytest.approx(expected, rel=0.06)
    # One world is the two-level bootstrap; prompts of two worlds are not drawn together.
    assert M.bootstrap_mean(table[:1]) == M.bootstrap_mean(table[0])
    same = np.broadcast_to(p[0, 0], (worlds, seeds, prompts))
    apart = M.bootstrap_mean(same, level=0.6827)
    together = M.bootstrap_mean(same[0, 0], level=0.6827)
    assert apart[2] - apart[1] < 0.6 * (together[2] - together[1])


def test_constant_data_has_no_width_and_blocks_differ():
    assert M.bootstrap_mean(np.full((3, 20), 2.5)) == pytest.approx((2.5, 2.5, 2.5), abs=1e-12)
    values = np.random.default_rng(7).normal(size=30)
    assert M.bootstrap_mean(values, seed=1) == M.bootstrap_mean(values, seed=1) != M.bootstrap_mean(values, seed=2)
    resampled = M._resampled(values[None, None], np.ones((1, 1, 30)), draws=3 * M.DRAWS_PER_BLOCK + 5, seed=0)
    assert len(np.unique(resampled)) == len(resampled) == 3 * M.DRAWS_PER_BLOCK + 5  # no block repeats another


def test_mask_ignores_what_it_covers():
    rng = np.random.default_rng(8)
    values, valid = rng.normal(size=(3, 50)), rng.random(50) < 0.7
    holes = np.where(valid, values, np.nan)
    mean, low, high = M.bootstrap_mean(holes, valid=valid)
    assert mean == pytest.approx(values[:, valid].mean())
    _, low_kept, high_kept = M.bootstrap_mean(values[:, valid])
    assert high - low == pytest.approx(high_kept - low_kept, rel=0.1)
    # Almost every resample of one valid prompt in forty is empty or constant: still finite, still right.
    lonely = np.zeros(40, dtype=bool)
    lonely[3] = True
    assert M.bootstrap_mean(values[0, :40], valid=lonely) == pytest.approx((values[0, 3],) * 3)
    # A mask that differs between seeds weighs every valid value equally.
    ragged = rng.random((3, 50)) < 0.5
    assert M.bootstrap_mean(values, valid=ragged)[0] == pytest.approx(values[ragged].mean())


def test_paired_difference_is_narrower_on_correlated_data():
    rng = np.random.default_rng(9)
    prompts = 3.0 * rng.normal(size=200)
    a, b = prompts + 0.5 + 0.2 * rng.normal(size=200), prompts + 0.2 * rng.normal(size=200)
    mean, low, high = M.bootstrap_difference(a, b)
    assert mean == pytest.approx((a - b).mean())
    assert 0.4 < low < mean < high < 0.6
    unpaired = M.bootstrap_difference(a, b[rng.permutation(200)])
    assert high - low < 0.2 * (unpaired[2] - unpaired[1])
    # antisymmetric in its arguments
    assert M.bootstrap_difference(b, a) == pytest.approx((-mean, -high, -low))


def test_difference_pairs_equal_seeds_and_draws_unequal_ones_alone():
    rng = np.random.default_rng(10)
    prompts, seeds = rng.normal(size=100), 5.0 * rng.normal(size=(3, 1))
    a, b = prompts + seeds + 1.0, prompts + seeds
    assert M.bootstrap_difference(a, b) == pytest.approx((1.0, 1.0, 1.0))  # all that varies is shared
    mean, low, high = M.bootstrap_difference(a, b[0])  # a's seeds vary, the prompts still cancel
    assert mean == pytest.approx((a - b[0]).mean())
    assert low == pytest.approx((a - b[0]).mean(1).min()) and high == pytest.approx((a - b[0]).mean(1).max())
    # Four seeds against five: drawn apart, their variances add.
    a, b = prompts + np.arange(4.0)[:, None], prompts + np.arange(5.0)[:, None]
    _, low, high = M.bootstrap_difference(a, b, level=0.6827, draws=20_000)
    expected = math.sqrt(np.arange(4).var() / 4 + np.arange(5).var() / 5)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    holes = np.arange(100) % 3 == 0
    with_nan = np.where(holes, prompts, np.nan)
    assert M.bootstrap_difference(a, with_nan, valid=holes)[0] == pytest.approx(1.5)
    # Worlds stay paired when one side has one seed in each and the other three.
    by_world = 9.0 * rng.normal(size=(4, 1, 1)) + rng.normal(size=(4, 1, 100))
    thrice = by_world + np.zeros((4, 3, 1)) + 1.0
    assert M.bootstrap_difference(thrice, by_world) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: M.bootstrap_mean([1.0, math.nan]), "not finite"),
        (lambda: M.bootstrap_mean([1.0, 2.0], valid=[False, False]), "no valid value"),
        (lambda: M.bootstrap_mean([1.0, 2.0], valid=[True, False, True]), "does not fit"),
        (lambda: M.bootstrap_mean([]), "no valid value"),
        (lambda: M.bootstrap_mean([1.0, 2.0], draws=10), "100 draws"),
        (lambda: M.bootstrap_mean([1.0, 2.0], level=95), "level"),
        (lambda: M.bootstrap_difference([1.0, 2.0], [1.0]), "the same ones"),
    ],
)
def test_intervals_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- win rate and BLEU -----------------------------------------------------------------------------------------


def test_win_tie_lose_by_hand_and_by_brute_force():
    assert M.win_tie_lose([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 1.0]) == {"win": 25.0, "tie": 25.0, "lose": 50.0}
    a, b = np.random.default_rng(11).integers(0, 4, (2, 259))
    got, swapped = M.win_tie_lose(a, b), M.win_tie_lose(b, a)
    assert got["win"] == pytest.approx(100 * sum(x > y for x, y in zip(a, b, strict=True)) / 259)
    assert sum(got.values()) == pytest.approx(100.0) and (got["win"], got["tie"]) == (swapped["lose"], swapped["tie"])
    with pytest.raises(ValueError, match="same prompts and samples"):
        M.win_tie_lose(a, b[:6])


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
        "scipy": lambda: M.wilcoxon_p([1.0], [0.0]),
        "matplotlib": lambda: figures.save(figures.Plan("x", "", "", (1, 1), lambda figure: None), Path()),
    }.items():
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"this needs {package}: pip install hps\[eval\]"):
            call()


def test_wilcoxon_is_scipys_on_the_prompts_means():
    """Two worlds of three prompts, two runs of a against one of b; a prompt that one side never scored is left out."""
    a = np.array([[[1.0, 2.0, 9.0], [3.0, 5.0, 9.0]], [[4.0, 4.0, 1.0], [4.0, 6.0, 2.0]]])
    b = np.array([[[0.0, 5.0, 1.0]], [[2.5, 1.0, 8.0]]])
    valid = np.array([True, True, False])
    differences = [2 - 0, 3.5 - 5, 4 - 2.5, 5 - 1]
    assert M.wilcoxon_p(a, b, valid=valid) == pytest.approx(scipy.stats.wilcoxon(differences).pvalue)
    assert M.wilcoxon_p(a, a) == 1.0
    g = np.random.default_rng(0)
    x = g.normal(size=300)
    assert M.wilcoxon_p(x + 0.2 + 0.1 * g.normal(size=300), x) < 1e-6
    assert 0.01 < M.wilcoxon_p(x + g.normal(size=300), x)
