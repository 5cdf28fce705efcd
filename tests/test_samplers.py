"""The sampler: q, the schedule of its hardness, and the numbers it is drawn with."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy import stats

from hps.samplers import _unit, counter_uniform, gamma_at, log_q, normalise_rewards, window_log_q


def test_log_q_is_eq_9():
    """q_i = exp(gamma s_i) / sum over the dispreferred; the preferred column takes no part."""
    s = torch.tensor([[9.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
    by_hand = np.exp(2 * np.array([1.0, 0.0, -2.0]))
    np.testing.assert_allclose(log_q(s, 2.0).exp().numpy()[0], by_hand / by_hand.sum(), rtol=1e-12)


def test_log_q_never_overflows():
    """The authors' np.exp(gamma * r) is inf past 709; log space is exact at any scale."""
    s = torch.tensor([[2000.0, 1000.0, 999.0, -3000.0]], dtype=torch.float64)
    for gamma in (-5.0, 5.0):
        q = log_q(s, gamma)
        assert torch.isfinite(q).all()
        assert torch.logsumexp(q, 1).item() == pytest.approx(0.0, abs=1e-12)
    assert log_q(s, 5.0)[0, 1].item() == pytest.approx(-5.0 - math.log1p(math.exp(-5.0)))


def test_log_q_of_ragged_rows():
    s = torch.tensor([[5.0, 1.0, 7.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    q = log_q(s, torch.tensor([1.0, 2.0], dtype=torch.float64), valid=valid).exp()
    np.testing.assert_allclose(q.numpy(), [[1.0, 0.0], [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]], rtol=1e-12)


def test_gamma_schedules():
    """Fixed values of the four readings of "from -5 to 5, updated every 20 %"."""
    at = np.array([0.0, 0.19, 0.2, 0.59, 0.6, 0.99])
    assert gamma_at(at).tolist() == [-5, -5, -3, -1, 1, 3]
    assert gamma_at(at, schedule="inclusive").tolist() == [-5, -5, -2.5, 0, 2.5, 5]
    np.testing.assert_allclose(gamma_at(at, schedule="linear"), -5 + 10 * at)
    assert gamma_at(at, schedule="constant", start=2.0).tolist() == [2.0] * 6
    # 3/5 of 10 steps is step 6: floats must not push it back into the third phase.
    assert gamma_at(np.arange(10) / 10).tolist() == [-5, -5, -3, -3, -1, -1, 1, 1, 3, 3]
    with pytest.raises(ValueError, match="unknown gamma_schedule 'ramp'"):
        gamma_at(0.5, schedule="ramp")


def test_uniform_numbers_exclude_both_ends():
    """-log(-log u) of the Gumbel-max draw is infinite at either, and with a weight of log 0 no number at all."""
    assert _unit(np.array([0, 2**64 - 1], dtype=np.uint64)).tolist() == [2.0**-53, 1 - 2.0**-53]


def test_counter_uniform_is_uniform_and_independent_across_counters():
    u = counter_uniform(7, np.arange(20_000))
    v = counter_uniform(7, np.arange(20_000), 1)
    assert ((0 < u) & (u < 1)).all()
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(v, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u, v)[0, 1]) < 0.03
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    assert counter_uniform(7, 5, 9).item() == counter_uniform(7, 5, np.array([8, 9]))[1]


def test_reward_normalisation():
    r = np.array([1.0, 2.0, 6.0])
    z = normalise_rewards(r, norm="zscore", scale=0.5)
    np.testing.assert_allclose(z, 0.5 * stats.zscore(r))
    assert normalise_rewards(np.array([2.0, 2.0]), norm="zscore").tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="unknown reward_norm 'rank'"):
        normalise_rewards(r, norm="rank")


def test_percentile_is_the_average_rank_over_n():
    r = np.array([3.0, 8.0, 3.0, -1e6, 1e6, 0.0])
    np.testing.assert_allclose(normalise_rewards(r, norm="percentile", scale=2.0), 2 * stats.rankdata(r) / 6)
    assert normalise_rewards(np.array([2.0, 2.0]), norm="percentile").tolist() == [0.75, 0.75]


def test_percentile_of_ragged_rows_with_ties_takes_memory_by_the_candidate():
    g = np.random.default_rng(0)
    r = g.integers(0, 300, size=(64, 2000)).astype(float)
    valid = np.arange(2000) < g.integers(1, 2001, size=64)[:, None]
    tracemalloc.start()
    found = normalise_rewards(r, norm="percentile", valid=valid)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * r.nbytes  # all pairs of a row's candidates would be 250 times as many bytes
    for row, mine, there in zip(found, r, valid, strict=True):
        assert row[there].tolist() == (1 - (there.sum() - stats.rankdata(mine[there])) / there.sum()).tolist()
        assert not row[~there].any()


def test_window_by_hand():
    """Ten dispreferred take .1 each. At first the window is [.85, 1]: all of the worst's, half of the next one's; at
    the end [0, .3]: the three hardest; on the way, at .5^1.5 = .354 of it, c = 1 - .85 * .354 = .699, [.549, .849]."""
    rewards = np.array([3.0, 1.0, 12.0, 9.0, 2.0, 5.0, 4.0, 8.0, 7.0, 6.0, 10.0, 11.0])  # 12.0 is preferred
    eligible = ~np.isin(rewards, (12.0, 11.0))  # 11.0: a copy of it

    def window(t):
        (weights,) = np.exp(window_log_q(rewards[None], eligible[None], np.array([t])))
        return dict(zip(rewards.tolist(), weights.tolist(), strict=True))

    first, middle, last = window(0.0), window(0.5), window(1.0)
    assert {r: w for r, w in first.items() if w} == pytest.approx({1.0: 2 / 3, 2.0: 1 / 3})
    assert {r: w for r, w in last.items() if w} == pytest.approx({10.0: 1 / 3, 9.0: 1 / 3, 8.0: 1 / 3})
    c = 1 - 0.85 * 0.5**1.5
    edges = {5.0: 0.6 - (c - 0.15), 4.0: 0.1, 3.0: 0.1, 2.0: c + 0.15 - 0.8}
    assert {r: w for r, w in middle.items() if w} == pytest.approx({r: w / 0.3 for r, w in edges.items()})


@pytest.mark.parametrize("n", [2, 3, 7, 40])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.99])
def test_window_is_a_uniform_point_of_the_window(n, progress):
    """u uniform on [c - d, c + d] within [0, 1], the response of rank floor(u (n - 1)): how it was first defined."""
    g = np.random.default_rng(n)
    rewards = g.permutation(n).astype(float)
    options = dict(end=0.3, power=0.7, width=0.2)
    c = 1 - (1 - 0.3) * progress**0.7
    u = g.uniform(max(0, c - 0.2), min(1, c + 0.2), size=40_000)
    ranks = np.minimum(np.floor(u * (n - 1)).astype(int), n - 2)  # 0 is the hardest, whose reward is n - 2
    by_draw = np.bincount(n - 2 - ranks, minlength=n) / len(u)  # by reward
    (weights,) = np.exp(window_log_q(rewards[None], rewards[None] < n - 1, np.array([progress]), **options))
    assert weights.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(weights[np.argsort(rewards)], by_draw, atol=0.01)


def test_minmax():
    np.testing.assert_allclose(normalise_rewards(np.array([1.0, 2.0, 6.0]), norm="minmax", scale=2.0), [0, 0.4, 2])
    assert normalise_rewards(np.array([2.0, 2.0]), norm="minmax").tolist() == [0.0, 0.0]
