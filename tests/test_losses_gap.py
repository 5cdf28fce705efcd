"""The gap regression: against hand algebra, REBEL's square, its own optimum, and rows alone."""

import pytest
import torch
from test_losses import draw
from torch.autograd import gradcheck

from hps.losses import loss_at_reference, plackett_luce_loss, stage_loss
from hps.samplers import log_q

BETA = 0.3


def huber(x: float, delta: float) -> float:
    return x * x / 2 if abs(x) < delta else delta * (abs(x) - delta / 2)


def gap(h, s, q, delta):
    """sum_k q_k Huber(h_w - h_k - (s_w - s_k) / beta) in plain floats."""
    rows = zip(h.tolist(), s.tolist(), q.tolist(), strict=True)
    values = [
        sum(w * huber(x[0] - a - (r[0] - b) / BETA, delta) for w, a, b in zip(weights, x[1:], r[1:], strict=True))
        for x, r, weights in rows
    ]
    return torch.tensor(values, dtype=torch.float64)


def test_stage_is_the_formula():
    h, s, _ = draw(B=12)
    q = log_q(s, 1.3)
    for kappa in (1.0, 5.0):  # the loss is linear in the opponents' distribution: kappa plays no part
        ours = stage_loss("gap", h, q, beta=BETA, kappa=kappa, rewards=s, gap_delta=4.0)
        torch.testing.assert_close(ours, gap(h, s, q.exp(), 4.0), rtol=1e-12, atol=0)
    errors = (h[:, :1] - h[:, 1:] - (s[:, :1] - s[:, 1:]) / BETA).abs()
    assert (errors < 4).any() and (errors > 4).any()  # both branches


def test_without_a_bend_a_pair_gives_rebel():
    """REBEL: ((h_w - h_l) / eta' - (s_w - s_l))^2 with 1 / eta' = beta; ours is that over 2 beta^2."""
    h, s, _ = draw(B=12, K=2)
    ours = stage_loss("gap", h, torch.zeros(12, 1, dtype=h.dtype), beta=BETA, rewards=s, gap_delta=1e9)
    rebel = (BETA * (h[:, 0] - h[:, 1]) - (s[:, 0] - s[:, 1])) ** 2
    torch.testing.assert_close(2 * BETA**2 * ours, rebel, rtol=1e-12, atol=0)


def test_the_optimum_is_the_reward_over_beta():
    """h = s / beta + a constant of the prompt gives loss 0 and gradient 0: Theorem 3's r_theta = r*."""
    _, s, _ = draw()
    h = (s / BETA + torch.arange(4, dtype=s.dtype)[:, None]).requires_grad_()
    loss = stage_loss("gap", h, log_q(s, -2.0), beta=BETA, rewards=s)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-24)
    torch.testing.assert_close(h.grad, torch.zeros_like(h), rtol=0, atol=1e-12)


def test_plackett_luce_is_the_sum_of_stages():
    h, s, _ = draw(B=12)
    by_hand = sum(gap(h[:, j:], s[:, j:], torch.full((12, 5 - j), 1 / (5 - j)), 4.0) for j in range(5))
    ours = plackett_luce_loss("gap", h, beta=BETA, rewards=s, gap_delta=4.0)
    torch.testing.assert_close(ours, by_hand, rtol=1e-6, atol=0)  # torch.full is fp32


def test_gradcheck():
    h, s, _ = draw(B=3, K=4)
    h.requires_grad_()
    assert gradcheck(lambda x: stage_loss("gap", x, log_q(s, 1.0), beta=BETA, rewards=s, gap_delta=4.0), (h,))


def test_ragged_rows_equal_rows_alone():
    """Padding changes nothing in value and gradient, whatever stands in log-ratios and rewards."""
    h, s, _ = draw()
    sizes = torch.tensor([2, 6, 3, 5])
    valid = torch.arange(6)[None] < sizes[:, None]
    padded = torch.where(valid, h, torch.nan).requires_grad_()
    rewards = torch.where(valid, s, torch.inf)
    q = log_q(s, 1.0, valid=valid)
    stage = stage_loss("gap", padded, q, beta=BETA, valid=valid, rewards=rewards)
    stage.sum().backward()
    for b, n in enumerate(sizes.tolist()):
        alone = h[b : b + 1, :n].clone().requires_grad_()
        one = stage_loss("gap", alone, log_q(s[b : b + 1, :n], 1.0), beta=BETA, rewards=s[b : b + 1, :n])
        one.sum().backward()
        torch.testing.assert_close(stage[b : b + 1], one, rtol=1e-12, atol=0)
        torch.testing.assert_close(padded.grad[b, :n], alone.grad[0], rtol=1e-12, atol=1e-12)
        assert (padded.grad[b, n:] == 0).all()


@pytest.mark.parametrize("margin", [-1e4, -50.0, 50.0, 1e4])
def test_extreme_margins_stay_finite_in_fp32(margin):
    """|gradient| of a Huber loss is at most delta."""
    h = torch.tensor([[margin / BETA, 0.0, 1.0]], requires_grad=True)
    s = torch.tensor([[2.0, 1.0, -3.0]])
    loss = stage_loss("gap", h, log_q(s, 5.0), beta=BETA, rewards=s)
    loss.sum().backward()
    assert loss.isfinite().all() and h.grad.isfinite().all() and h.grad.abs().max() <= 10 + 1e-5


def test_a_user_mistake_is_named():
    h, s, _ = draw()
    with pytest.raises(ValueError, match="loss 'gap' is a regression on rewards: pass them"):
        stage_loss("gap", h, log_q(s, 1.0), beta=BETA)
    with pytest.raises(ValueError, match=r"gap_delta must lie in \(0, inf\), got 0"):
        stage_loss("gap", h, log_q(s, 1.0), beta=BETA, rewards=s, gap_delta=0.0)
    with pytest.raises(ValueError, match="loss 'gap' depends on the rewards: its value is unknown"):
        loss_at_reference("gap", beta=BETA)
