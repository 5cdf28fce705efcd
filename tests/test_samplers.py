"""The sampler: q, the schedule of its hardness, and the numbers it is drawn with."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from hps.samplers import _unit, counter_uniform, gamma_at, log_q, normalise_rewards


def test_log_q_is_eq_9():
    """q_i = exp(gamma s_i) / sum over the dispreferred; ragged rows, each with a gamma of its own."""
    s = torch.tensor([[1.0, 7.0, 0.0], [2.0, 1.0, -3.0]], dtype=torch.float64)
    q = log_q(s, torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor([[True, False, True], [True] * 3])).exp()
    by_hand = np.exp([[2.0, -np.inf, 0.0], [2.0, 1.0, -3.0]])
    np.testing.assert_allclose(q.numpy(), by_hand / by_hand.sum(1, keepdims=True), rtol=1e-12)


def test_log_q_never_overflows():
    """The authors' np.exp(gamma * r) is inf past 709; log space is exact at any scale."""
    s = torch.tensor([[2000.0, 1000.0, 999.0, -3000.0]], dtype=torch.float64)
    for gamma in (-5.0, 5.0):
        q = log_q(s[:, 1:], gamma)
        assert torch.isfinite(q).all()
        assert torch.logsumexp(q, 1).item() == pytest.approx(0.0, abs=1e-12)
    assert log_q(s[:, 1:], 5.0)[0, 1].item() == pytest.approx(-5.0 - math.log1p(math.exp(-5.0)))


def test_gamma_schedules():
    """Fixed values of the four readings of "from -5 to 5, updated every 20 %"."""
    at = np.array([0.0, 0.19, 0.2, 0.59, 0.6, 0.99])
    assert gamma_at(at).tolist() == [-5, -5, -3, -1, 1, 3]
    assert gamma_at(at, schedule="inclusive").tolist() == [-5, -5, -2.5, 0, 2.5, 5]
    np.testing.assert_allclose(gamma_at(at, schedule="linear"), -5 + 10 * at)
    assert gamma_at(at, schedule="constant", start=2.0).tolist() == [2.0] * 6
    # Floats must not push a step that begins on a knot back into the phase before: 1 / 49 * 49 is below 1 in them.
    assert gamma_at(1 / 49, start=0.0, end=49.0, phases=49) == pytest.approx(1.0)
    assert gamma_at(np.arange(10) / 10).tolist() == [-5, -5, -3, -3, -1, -1, 1, 1, 3, 3]


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
    # Plans of earlier runs hang on these numbers.
    np.testing.assert_allclose(
        counter_uniform(7, 2, 123, 0, np.arange(3)), [0.21312996527, 0.92270561463, 0.74557482689]
    )
    assert counter_uniform(7, 5, 9).item() == counter_uniform(7, 5, np.array([8, 9]))[1]


def test_reward_normalisation():
    r = np.array([1.0, 2.0, 6.0])
    z = normalise_rewards(r, norm="zscore", scale=0.5)
    np.testing.assert_allclose(z, 0.5 * stats.zscore(r))
    assert normalise_rewards(np.array([2.0, 2.0]), norm="zscore").tolist() == [0.0, 0.0]
