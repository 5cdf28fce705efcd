"""The plan of a run: the distribution of draws, what is excluded, and what a draw may not depend on."""

import numpy as np
import pytest
from scipy import stats

from hps.extra.kto import mismatched
from hps.plan import dispreferred, padded, plan
from hps.samplers import Visits, ranks

RUN = dict(epochs=2, prompts_per_step=4, seed=0)


def world(rows: int = 40, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Ragged rewards, all texts distinct, and keys."""
    g = np.random.default_rng(seed)
    rewards = [g.normal(size=g.integers(3, 12)) for _ in range(rows)]
    return rewards, [np.arange(len(r)) for r in rewards], g.integers(0, 2**63, size=rows, dtype=np.uint64)


def test_draws_follow_q():
    """One prompt visited 20,000 times at a constant gamma: the counts of the draws against Eq. 9."""
    rewards = np.array([0.3, 2.0, 1.2, -0.5, 0.9])
    p = plan(
        [rewards] * 20_000,
        [np.arange(5)] * 20_000,
        np.arange(20_000, dtype=np.uint64),
        sampler="hps",
        gamma_schedule="constant",
        gamma_start=1.5,
        epochs=1,
        prompts_per_step=64,
        seed=3,
    )
    assert (p.responses[:, 0] == 1).all()
    weights = np.exp(1.5 * np.delete(rewards, 1))
    counts = np.bincount(p.responses[:, 1], minlength=5)
    assert counts[1] == 0
    assert stats.chisquare(np.delete(counts, 1), 20_000 * weights / weights.sum()).pvalue > 1e-3


def test_uniform_view_draws_evenly_and_redraws_each_epoch():
    n = 6
    p = plan(
        [np.arange(n, dtype=float)] * 5000,
        [np.arange(n)] * 5000,
        np.arange(5000, dtype=np.uint64),
        sampler="uniform",
        **RUN,
    )
    assert stats.chisquare(np.bincount(p.responses[:, 1], minlength=n)[:-1]).pvalue > 1e-3
    first, second = (dict(zip(p.row[p.epoch == e], p.responses[p.epoch == e, 1], strict=True)) for e in (0, 1))
    same = np.mean([first[row] == second[row] for row in first])
    assert abs(same - 1 / (n - 1)) < 0.03  # independent draws agree by chance only


def test_draws_depend_on_the_prompt_and_not_on_its_place():
    """Another file order, other prompts left out, wider neighbours (padding), another chunk: the same draws."""
    rewards, identity, keys = world(rows=10_000)  # three chunks
    for i in range(0, 10_000, 7):
        rewards[i] = np.zeros(3)  # no contrast: not in the plan
        identity[i] = np.arange(3)
    whole = plan(rewards, identity, keys, sampler="hps", gamma_schedule="constant", gamma_start=1.0, **RUN)
    at = {(keys[r], e): y for r, e, y in zip(whole.row, whole.epoch, whole.responses, strict=True)}
    some = np.random.default_rng(1).permutation(10_000)[:300]
    part = plan(
        [rewards[i] for i in some],
        [identity[i] for i in some],
        keys[some],
        sampler="hps",
        gamma_schedule="constant",
        gamma_start=1.0,
        **RUN,
    )
    for r, e, y in zip(part.row, part.epoch, part.responses, strict=True):
        assert y.tolist() == at[keys[some][r], e].tolist()
        assert y[0] == np.argmax(rewards[some[r]])
    assert len(part.row) == 2 * sum(i % 7 > 0 for i in some)


def test_every_prompt_once_an_epoch_in_a_new_order():
    rewards, identity, keys = world()
    p = plan(rewards, identity, keys, sampler="bt", **RUN)
    one, two = p.row[:40], p.row[40:]
    assert sorted(one) == sorted(two) == list(range(40))
    assert list(one) != list(two)
    assert p.steps == 20
    assert [v for s in range(p.steps) for v in p.step(s)] == list(range(80))
    unshuffled = plan(rewards, identity, keys, sampler="bt", shuffle="no", **RUN)
    assert list(unshuffled.row) == list(range(40)) * 2
    together = plan(rewards, identity, keys, sampler="uniform", shuffle="together", **RUN)
    apart = plan(rewards, identity, keys, sampler="uniform", **RUN)
    assert sorted(apart.row[:40]) == list(range(40)) != sorted(together.row[:40])  # a prompt may come twice at once
    visits = [sorted(zip(p.row, p.epoch, p.responses[:, 1], strict=True)) for p in (apart, together)]
    assert visits[0] == visits[1]  # the same draws: each copy has its own
    with pytest.raises(ValueError, match="unknown shuffle 'yes'; choose one of epochs, together, no"):
        plan(rewards, identity, keys, sampler="bt", shuffle="yes", **RUN)


def test_curriculum_follows_optimizer_steps():
    rewards, identity, keys = world()
    p = plan(rewards, identity, keys, sampler="hps", **RUN)  # 20 steps, four of each gamma
    assert [p.gamma[p.step(s)[0]] for s in range(20)] == [g for g in (-5, -3, -1, 1, 3) for _ in range(4)]
    # gamma = -5 draws low-reward responses, gamma = 3 high ones.
    mean = {
        g: np.mean(
            [
                stats.rankdata(rewards[r])[y] / len(rewards[r])
                for r, y in zip(p.row[p.gamma == g], p.responses[p.gamma == g, 1], strict=True)
            ]
        )
        for g in (-5, 3)
    }
    assert mean[-5] < 0.35 < 0.55 < mean[3]


def test_ties_and_copies_of_the_best_are_excluded_and_counted():
    """Candidates: best, tie with it, copy of its text with a lower score, two true opponents."""
    rewards = np.array([3.0, 3.0, 1.0, 2.0, 0.0])
    identity = np.array([0, 1, 0, 2, 3])
    best, mask, counts = dispreferred(rewards[None], identity[None])
    assert best.tolist() == [[0]]
    assert mask.tolist() == [[False, False, False, True, True]]
    assert counts == {"ties_with_best": [1], "copies_of_best": [1]}
    p = plan([rewards] * 50, [identity] * 50, np.arange(50), sampler="uniform", n_factor="n_minus_one", **RUN)
    assert set(p.responses[:, 1]) == {3, 4}
    assert p.excluded == {"ties_with_best": 50, "copies_of_best": 50}
    assert set(p.kappa) == {2.0}  # N counts what q runs over


def test_rows_without_contrast_are_dropped_and_counted():
    rewards = [np.array([1.0]), np.array([2.0, 2.0]), np.array([1.0, 0.0])]
    identity = [np.array([0]), np.array([0, 1]), np.array([0, 1])]
    p = plan(rewards, identity, np.arange(3), sampler="bt", **RUN)
    assert p.dropped == {"rows_one_response": 1, "rows_no_dispreferred": 1}
    assert set(p.row) == {2}
    with pytest.raises(ValueError, match="no prompt has a response below its best one"):
        plan(rewards[:2], identity[:2], np.arange(2), sampler="bt", **RUN)


def test_bt_takes_best_and_worst_and_pl_ranks_evenly():
    rewards = np.array([5.0, 0.0, 9.0, 3.0, 1.0, 7.0, 2.0, 4.0, 6.0, 8.0])
    same = np.arange(10)
    bt = plan([rewards], [same], np.arange(1), sampler="bt", **RUN)
    assert bt.responses[0].tolist() == [2, 1]
    pl = plan([rewards], [same], np.arange(1), sampler="pl", pl_responses=4, **RUN)
    # Ranks of the nine dispreferred: 0 (reward 8), 4 (reward 4), 8 (reward 0).
    assert rewards[pl.responses[0]].tolist() == [9.0, 8.0, 4.0, 0.0]
    two = plan([rewards[:3], rewards], [same[:3], same], np.arange(2), sampler="pl", pl_responses=4, **RUN)
    assert two.responses[two.row == 0][0].tolist() == [2, 0, 1, -1]
    whole = plan([rewards], [same], np.arange(1), sampler="pl", pl_responses=0, **RUN)
    assert rewards[whole.responses[0]].tolist() == sorted(rewards, reverse=True)
    # A text that stands twice is ranked once.
    copies = same.copy()
    copies[7] = copies[0]
    assert set(plan([rewards], [copies], np.arange(1), sampler="pl", pl_responses=0, **RUN).responses[0]) == set(
        range(10)
    ) - {7}
    for wrong in (1, -1):
        with pytest.raises(ValueError, match=r"pl_responses must be 0 \(all\) or at least 2"):
            plan([rewards], [same], np.arange(1), sampler="pl", pl_responses=wrong, **RUN)


def test_effective_negatives():
    """exp(entropy): n - 1 at gamma = 0, 1 where q is an argmax."""
    rewards = np.array([9.0, 3.0, 2.0, 1.0, 0.0])
    for gamma, expected in ((0.0, 4.0), (100.0, 1.0)):
        p = plan(
            [rewards], [np.arange(5)], np.arange(1), sampler="hps", gamma_schedule="constant", gamma_start=gamma, **RUN
        )
        assert p.effective[0] == pytest.approx(expected, rel=1e-5)


def test_several_draws_are_merged_with_their_counts_as_weights():
    """K draws with replacement: a response drawn c times stands once with weight c / K; the first draw is K = 1's."""
    rewards, identity, keys = world()
    how = dict(sampler="hps", gamma_schedule="constant", gamma_start=1.0, **RUN)
    one = plan(rewards, identity, keys, **how)
    many = plan(rewards, identity, keys, hps_samples=4, **how)
    assert many.responses.shape[1] <= 5
    for v in range(len(many.row)):
        others = many.responses[v, 1:][many.responses[v, 1:] >= 0]
        assert len(set(others)) == len(others) and one.responses[v, 1] in others
        weights = np.exp(many.log_q[v, : len(others)])
        assert weights.sum() == pytest.approx(1.0, abs=1e-6)
        assert np.allclose(weights * 4, np.round(weights * 4), atol=1e-5)
    # Over many draws the weights follow q.
    r = np.array([0.3, 2.0, 1.2, -0.5, 0.9])
    p = plan([r], [np.arange(5)], np.arange(1), hps_samples=20_000, **how)
    q = np.exp(1.0 * r[p.responses[0, 1:]])
    np.testing.assert_allclose(np.exp(p.log_q[0]), q / q.sum(), atol=0.015)


def test_the_full_form_carries_eq_9():
    r = np.array([0.3, 2.0, 1.2, -0.5, 0.9])
    p = plan(
        [r, r[:3]], [np.arange(5), np.arange(3)], np.arange(2), sampler="hps", hps_form="full",
        gamma_schedule="constant", gamma_start=2.0, **RUN,
    )  # fmt: skip
    for n in (5, 3):
        v = int(np.flatnonzero(p.row == (0 if n == 5 else 1))[0])
        others = [i for i in range(n) if i != 1]
        assert p.responses[v, : 1 + len(others)].tolist() == [1, *others]
        assert (p.responses[v, 1 + len(others) :] == -1).all()
        q = np.exp(2.0 * r[others])
        np.testing.assert_allclose(np.exp(p.log_q[v, : len(others)]), q / q.sum(), rtol=1e-5)


def test_mixture_shuffles_the_knots_over_all_of_training():
    """The authors' accident: each visit has one of the five gammas, whatever the step."""
    rewards, identity, keys = world(rows=2000)
    p = plan(rewards, identity, keys, sampler="hps", gamma_schedule="mixture", **RUN)
    for half in (p.gamma[:2000], p.gamma[2000:]):
        values, counts = np.unique(half, return_counts=True)
        assert values.tolist() == [-5, -3, -1, 1, 3]
        assert stats.chisquare(counts).pvalue > 1e-3


def test_random_pairs_are_ordered_by_reward_and_even():
    r = np.array([1.0, 3.0, 3.0, 2.0])
    p = plan([r] * 6000, [np.arange(4)] * 6000, np.arange(6000), sampler="random", epochs=1, prompts_per_step=8, seed=0)
    pairs, counts = np.unique(p.responses, axis=0, return_counts=True)
    assert {tuple(pair) for pair in pairs} == {(1, 0), (2, 0), (3, 0), (1, 3), (2, 3)}
    assert (r[p.responses[:, 0]] > r[p.responses[:, 1]]).all()
    assert counts.min() > 800


def test_human_pairs_need_no_rewards():
    pairs = np.array([(1, 0), (-1, -1), (0, 2), (0, 1), (1, -1)])
    identity = [np.arange(2), np.arange(2), np.arange(3), np.array([5, 5]), np.arange(2)]
    p = plan([None] * 5, identity, np.arange(5), sampler="human", human=pairs, **RUN)
    assert {(row, *y) for row, y in zip(p.row.tolist(), p.responses.tolist(), strict=True)} == {(0, 1, 0), (2, 0, 2)}
    assert p.dropped == {"rows_no_human_pair": 2, "pairs_of_equal_texts": 1}
    with pytest.raises(ValueError, match="no prompt has a human pair"):
        plan([None], [np.arange(2)], np.arange(1), sampler="human", human=pairs[1:2], **RUN)


def test_several_positives_stand_in_front_and_leave_their_ties_and_copies_out():
    """Rewards 7 7' 6 5 5' 3 2 2, the 3 a copy of 6's text: positives 7, 6, 5; 7', 5' (ties) and 3 (copy) are out."""
    rewards = np.array([2.0, 5.0, 7.0, 6.0, 3.0, 7.0, 5.0, 2.0])
    identity = np.array([0, 1, 2, 3, 3, 5, 6, 7])
    best, below, left_out = dispreferred(rewards[None], identity[None], 3)
    assert best.tolist() == [[2, 3, 1]] and np.flatnonzero(below).tolist() == [0, 7]
    assert left_out == {"ties_with_best": [2], "copies_of_best": [1]}
    how = dict(
        sampler="hps", hps_form="full", gamma_schedule="constant", gamma_start=0.5, n_factor="n_minus_one", **RUN
    )
    short = np.array([1.0, 3.0, 2.0])  # nothing is below three positives
    p = plan([rewards, short], [identity, np.arange(3)], np.arange(2), positives=3, **how)
    assert p.dropped == {"rows_one_response": 0, "rows_no_dispreferred": 1}
    assert p.responses.tolist() == [[2, 3, 1, 0, 7]] * 2
    q = np.exp(0.5 * np.array([6.0, 5.0, 2.0, 2.0]))
    np.testing.assert_allclose(np.exp(p.log_q), [q / q.sum()] * 2, rtol=1e-6)
    assert p.kappa.tolist() == [4.0, 4.0]
    with pytest.raises(ValueError, match="use sampler hps or uniform and hps_form full, or positives = 1"):
        plan([rewards], [identity], np.arange(1), sampler="bt", positives=2, **RUN)


def test_mismatched_pairs_by_hand():
    """The next visit of the step, cyclically; never the same prompt; a lone visit looks back."""
    rewards, identity, keys = world(rows=5)
    how = dict(sampler="bt", shuffle="no", seed=0)
    p = plan(rewards, identity, keys, epochs=1, prompts_per_step=2, **how)
    assert mismatched(p).tolist() == [1, 0, 3, 2, 3]
    # Prompts 0 1 2 0 | 1 2: the fourth visit's next one is the first, which is of its own prompt.
    p = plan(rewards[:3], identity[:3], keys[:3], epochs=2, prompts_per_step=4, **how)
    assert mismatched(p).tolist() == [1, 2, 3, 1, 5, 4]
    with pytest.raises(ValueError, match="the first step has only one prompt"):
        mismatched(plan(rewards, identity, keys, epochs=1, prompts_per_step=1, **how))


def test_rows_of_any_length_give_what_each_gives_alone():
    """The plan works on many prompts at once, padded: best, opponents, ranks and q of each must be those of its row."""
    g = np.random.default_rng(1)
    rewards = [g.normal(size=n).round(1) for n in g.integers(1, 12, size=300)]  # rounded: ties
    identity = [g.integers(0, len(r) + 1, size=len(r)) for r in rewards]  # copies
    r, same = padded(rewards, -np.inf, np.float64), padded(identity, -1, np.int64)
    best, below, _ = dispreferred(r, same)
    none = np.zeros(len(r), dtype=np.int64)
    _, ranked = ranks(Visits(r, below, same, best[:, 0], none, none, none, 0), pl_responses=5)
    for i, (row, texts) in enumerate(zip(rewards, identity, strict=True)):
        best = int(np.argmax(row))
        mask = (row < row[best]) & (texts != texts[best])
        assert below[i, : len(row)].tolist() == mask.tolist() and not below[i, len(row) :].any()
        distinct: list[int] = []
        for k in np.argsort(-row, kind="stable"):
            if mask[k] and texts[k] not in texts[distinct]:
                distinct.append(int(k))
        if len(distinct) > 4:
            distinct = [distinct[j] for j in np.linspace(0, len(distinct) - 1, 4).round().astype(int)]
        assert [k for k in ranked[i] if k >= 0] == distinct
