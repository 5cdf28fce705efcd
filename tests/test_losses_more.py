"""The further losses: against hand algebra in float64, TRL's own loss code, limits, and rows alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_losses import draw, log_q
from torch import Tensor
from torch.autograd import gradcheck

from hps.extra.losses import KTO, LISTWISE
from hps.losses import (
    LOSSES,
    OPTIONS,
    loss_at_reference,
    multi_positive_loss,
    plackett_luce_at_reference,
    plackett_luce_loss,
    stage_loss,
)

B, K = 4, 6
BETA = 0.3
# No option at its default: a default would hide an option that does not arrive.
MORE = {
    "rdpo": {"rdpo_alpha": 0.03},
    "simpo": {"target_margin": 0.7},
    "slic": {"slic_delta": 2.0, "slic_lambda": 0.3},
}
ALL = {"dpo": {"label_smoothing": 0.2}, "exo": {}, "ipo": {}, "sppo": {}, "nca": {}} | MORE


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def sp(x: float) -> float:
    return math.log(1 + math.exp(x))


def shuffle(seed: int = 3, *, fixed: int) -> Tensor:
    """A permutation of the K columns that leaves the first `fixed` where they are."""
    g = torch.Generator().manual_seed(seed)
    return torch.cat([torch.arange(fixed), fixed + torch.randperm(K - fixed, generator=g)])


# ---------------------------------------------------------------------------------------------- stage losses


def row_by_hand(name: str, h: list, L: list, q: list, kappa: float, beta: float) -> float:
    """The formulas in plain floats, exp and log; rows of `others` are (q_k, h_k, h_k / L_k, r_k)."""
    o, target = ALL[name], 1 / (2 * beta)
    r = [beta / n * x if name == "simpo" else beta * x + o.get("rdpo_alpha", 0.0) * n for x, n in zip(h, L)]
    mean = [x / n for x, n in zip(h, L)]
    others = list(zip(q, h[1:], mean[1:], r[1:]))
    weights = [math.exp(r[0])] + [kappa * w * math.exp(s) for w, _, _, s in others]
    D = r[0] - math.log(sum(weights[1:]))
    e = o.get("label_smoothing", 1e-3)  # EXO's is 1e-3
    p, t = [w / sum(weights) for w in weights], [1 - e] + [e * w for w in q]
    hinges = sum(w * max(0.0, o.get("slic_delta", 0.0) - h[0] + x) for w, x, _, _ in others)
    return {
        "dpo": (1 - e) * sp(-D) + e * sp(D),
        "exo": sum(a * math.log(a / b) for a, b in zip(p, t)),
        "ipo": sum(w * (mean[0] - m - target) ** 2 for w, _, m, _ in others),
        "sppo": (h[0] - target) ** 2 + sum(w * (x + target) ** 2 for w, x, _, _ in others),
        "nca": sp(-r[0]) + (sp(r[0]) + kappa * sum(w * sp(s) for w, _, _, s in others)) / (1 + kappa),
        "rdpo": sp(-D),
        "simpo": sp(o.get("target_margin", 0.0) - D),
        "slic": hinges - o.get("slic_lambda", 0.0) * h[0],
    }[name]


def stage_by_hand(name: str, h: Tensor, L: Tensor, q: Tensor, kappa: float, *, beta: float) -> Tensor:
    rows = zip(h.tolist(), L.tolist(), q.tolist())
    return torch.tensor([row_by_hand(name, *row, kappa, beta) for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kappa", [1.0, 5.0])
def test_stage_is_the_formula(name, kappa):
    h, s, L = draw(B=12)
    q = log_q(s, 1.3)
    ours = stage_loss(name, h, q, beta=BETA, kappa=kappa, num_tokens=L, **ALL[name])
    close(ours, stage_by_hand(name, h, L, q.exp(), kappa, beta=BETA))


@pytest.mark.parametrize("name", ALL)
def test_plackett_luce_is_the_sum_of_stages(name):
    """The stage j has u = n - j opponents, q = 1/u and kappa = u."""
    h, _, L = draw(B=12)
    by_hand = 0
    for j in range(K - 1):
        u = K - 1 - j
        uniform = torch.full((12, u), 1 / u, dtype=h.dtype)
        by_hand += stage_by_hand(name, h[:, j:], L[:, j:], uniform, u, beta=BETA)
    close(plackett_luce_loss(name, h, beta=BETA, num_tokens=L, **ALL[name]), by_hand, 1e-11)


def test_simpo_equals_trl():
    """trl.experimental's CPOTrainer.cpo_loss on mean log-probs; its simpo_gamma is in units of the reward too."""
    pytest.importorskip("trl", reason="TRL is a development extra")
    from trl.experimental.cpo import CPOTrainer

    logps, _, L = draw(seed=2, B=12, K=2, scale=40.0)
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.5,
        simpo_gamma=0.7,
        label_smoothing=0.0,
        loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs, *_ = CPOTrainer.cpo_loss(trainer, *(logps / L).unbind(1))
    ours = stage_loss("simpo", logps, torch.zeros(12, 1, dtype=logps.dtype), beta=2.5, num_tokens=L, target_margin=0.7)
    close(ours, theirs)


def test_limits_of_the_stage_losses():
    h, s, L = draw()
    q, one = log_q(s, 1.0), torch.full((B, K), 7)
    dpo = stage_loss("dpo", h, q, beta=BETA, kappa=2.0)
    # No price of length, or equal lengths, leave DPO.
    close(stage_loss("rdpo", h, q, beta=BETA, kappa=2.0, num_tokens=L, rdpo_alpha=0.0), dpo)
    close(stage_loss("rdpo", h, q, beta=BETA, kappa=2.0, num_tokens=one, rdpo_alpha=0.5), dpo)
    # SimPO without a margin on equal lengths is DPO on log pi.
    close(stage_loss("simpo", h, q, beta=7 * BETA, kappa=2.0, num_tokens=one, target_margin=0.0), dpo)


def test_rdpo_lets_a_longer_winner_off():
    """The reward is beta h + alpha L: a winner that is longer has less to prove, one that is shorter more."""
    h, q = torch.zeros(1, 2, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    longer, shorter = torch.tensor([[20, 10]]), torch.tensor([[10, 20]])
    losses = [stage_loss("rdpo", h, q, beta=BETA, num_tokens=L, rdpo_alpha=0.1).item() for L in (longer, shorter)]
    assert losses == pytest.approx([math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))])


@pytest.mark.parametrize("name", MORE)
def test_stage_gradcheck(name):
    h, s, L = draw(B=2, K=4)
    h.requires_grad_()
    given = dict(beta=BETA, num_tokens=L, **MORE[name])
    q = log_q(s, 1.0)
    assert gradcheck(lambda x: stage_loss(name, x, q, kappa=3.0, **given), (h,))
    assert gradcheck(lambda x: plackett_luce_loss(name, x, **given), (h,))


@pytest.mark.parametrize("name", MORE)
def test_stage_ragged_rows_equal_rows_alone(name):
    """Padding changes nothing in value and gradient, whatever stands in it."""
    h, s, L = draw()
    sizes = [2, 6, 3, 5]
    valid = torch.arange(K)[None] < torch.tensor(sizes)[:, None]
    padded = torch.where(valid, h, torch.nan).requires_grad_()
    kappa = torch.tensor(sizes, dtype=h.dtype) - 1
    q = log_q(s, 1.0, valid=valid)
    given = dict(beta=BETA, **MORE[name])
    stage = stage_loss(name, padded, q, kappa=kappa, valid=valid, num_tokens=L, **given)
    ranked = plackett_luce_loss(name, padded, valid=valid, num_tokens=L, **given)
    (stage + ranked).sum().backward()
    for b, n in enumerate(sizes):
        alone, lengths = h[b : b + 1, :n].clone().requires_grad_(), L[b : b + 1, :n]
        q_alone = log_q(s[b : b + 1, :n], 1.0)
        one = stage_loss(name, alone, q_alone, kappa=n - 1.0, num_tokens=lengths, **given)
        two = plackett_luce_loss(name, alone, num_tokens=lengths, **given)
        close(torch.stack([stage[b], ranked[b]]), torch.cat([one, two]), 1e-10)
        (one + two).sum().backward()
        close(padded.grad[b, :n], alone.grad[0], 1e-10)
        assert (padded.grad[b, n:] == 0).all()


@pytest.mark.parametrize("name", MORE)
def test_order_of_opponents_does_not_matter(name):
    h, s, L = draw()
    order = shuffle(fixed=1)
    given = dict(beta=BETA, kappa=2.0, **MORE[name])
    a = stage_loss(name, h, log_q(s, 1.0), num_tokens=L, **given)
    close(stage_loss(name, h[:, order], log_q(s[:, order], 1.0), num_tokens=L[:, order], **given), a)


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("margin", [-1e4, -50.0, 50.0, 1e4])
def test_stage_stays_finite_in_fp32(name, margin):
    h = torch.zeros(1, K)
    h[0, 0] = margin / BETA
    h.requires_grad_()
    s, L = torch.linspace(200, -200, K)[None], torch.full((1, K), 9)
    for gamma in (-5.0, 5.0):  # gamma * s spans +-1000: q underflows, log q must not
        given = dict(beta=BETA, num_tokens=L, **MORE[name])
        loss = stage_loss(name, h, log_q(s, gamma), kappa=K - 1.0, **given) + plackett_luce_loss(name, h, **given)
        (grad,) = torch.autograd.grad(loss.sum(), h)
        assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


# ---------------------------------------------------------------------------------- several positives


@pytest.mark.parametrize("name", ALL)
def test_positives_without_hardness_are_the_first_stages(name):
    """gamma = 0, kappa = N, all weights 1: m positives are Plackett-Luce less that of the ranks from m on."""
    h, s, L = draw()
    given = dict(beta=BETA, **ALL[name])
    for m in (1, 2, 4):
        rest = plackett_luce_loss(name, h[:, m:], num_tokens=L[:, m:], **given)
        first = plackett_luce_loss(name, h, num_tokens=L, **given) - rest
        many = dict(weights=[1.0] * m, n_factor="n_minus_one", num_tokens=L)
        close(multi_positive_loss(name, h, log_q(s, 0.0), **many, **given), first, 1e-9)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("n_factor", ["one", "n_minus_one"])
def test_positives_are_weighted_stages(name, exclude, n_factor):
    """L = L_1 + lambda_2 L_2 + lambda_3 L_3, each with its own q over its own opponents and its own N."""
    h, s, L = draw()
    gamma, weights = torch.tensor([-2.0, 0.0, 1.0, 3.0], dtype=h.dtype), [1.0, 0.5, 0.25]
    given = dict(beta=BETA, **ALL[name])
    by_hand = 0
    for j, weight in enumerate(weights):
        columns = [j, 3, 4, 5] if exclude else list(range(j, K))
        q = torch.softmax(gamma[:, None] * s[:, columns[1:]], 1).log()
        kappa = len(columns) - 1 if n_factor == "n_minus_one" else 1.0
        stage = stage_loss(name, h[:, columns], q, kappa=kappa, num_tokens=L[:, columns], **given)
        by_hand = by_hand + weight * stage
    many = dict(weights=weights, exclude_positives=exclude, n_factor=n_factor, num_tokens=L)
    close(multi_positive_loss(name, h, log_q(s, gamma), **many, **given), by_hand, 1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("exclude", [False, True])
def test_positives_ragged_rows_equal_rows_alone(name, exclude):
    """Also rows with too few responses for a stage, or for any: those add 0 and no gradient."""
    h, s, L = draw()
    sizes = [2, 6, 3, 1]
    valid = torch.arange(K)[None] < torch.tensor(sizes)[:, None]
    padded = torch.where(valid, h, torch.nan).requires_grad_()
    given = dict(beta=BETA, weights=[1.0, 0.5], exclude_positives=exclude, **ALL[name])
    q = torch.where(valid[:, 1:], 2 * s[:, 1:], torch.nan)  # not normalised, which changes nothing
    loss = multi_positive_loss(name, padded, q, valid=valid, num_tokens=L, **given)
    loss.sum().backward()
    for b, n in enumerate(sizes):
        alone = h[b : b + 1, :n].clone().requires_grad_()
        one = multi_positive_loss(name, alone, log_q(s[b : b + 1, :n], 2.0), num_tokens=L[b : b + 1, :n], **given)
        close(loss[b], one[0], 1e-10)
        expected = torch.zeros_like(h[b])
        if one.requires_grad:
            (grad,) = torch.autograd.grad(one.sum(), alone)
            expected[:n] = grad[0]
        close(padded.grad[b], expected, 1e-10)
        assert (loss[b] == 0) == (n == 1 or (exclude and n == 2)) or name == "slic"


# ------------------------------------------------------------------------------------------------- mistakes


def test_options_are_declared_once():
    """Every loss's options are in the table, and their defaults are allowed."""
    taken = {option for loss in [*LOSSES.values(), *LISTWISE.values(), KTO] for option in loss.options}
    assert taken == set(OPTIONS)
    assert all(option.allowed(option.default) for option in OPTIONS.values())
    assert not any(option.allowed(x) for option in OPTIONS.values() for x in (math.nan, math.inf, -1e-9))


def test_a_user_mistake_is_named():
    h, s, L = draw()
    q = log_q(s, 1.0)
    for name in ("dpo", "ipo"):
        with pytest.raises(ValueError, match=f"'{name}' does not use target_margin; remove it"):
            stage_loss(name, h, q, beta=BETA, num_tokens=L, target_margin=0.1)
    with pytest.raises(ValueError, match="'nca' does not use label_smoothing"):
        plackett_luce_loss("nca", h, beta=BETA, label_smoothing=0.1)
    with pytest.raises(ValueError, match="'slic' does not use exo_eps.*slic_delta, slic_lambda"):
        stage_loss("slic", h, q, beta=BETA, exo_eps=0.1)
    with pytest.raises(ValueError, match="unknown option 'slic_delt'; there are .*slic_delta"):
        stage_loss("slic", h, q, beta=BETA, slic_delt=1.0)
    with pytest.raises(ValueError, match=r"slic_delta must lie in \(0, inf\), got 0"):
        stage_loss("slic", h, q, beta=BETA, slic_delta=0.0)
    with pytest.raises(ValueError, match="'simpo' divides by length: pass num_tokens"):
        stage_loss("simpo", h, q, beta=BETA)
    with pytest.raises(ValueError, match="'rdpo' adds a term for length: pass num_tokens"):
        plackett_luce_loss("rdpo", h, beta=BETA)
    for name in ("simpo", "slic"):
        with pytest.raises(ValueError, match="no reference.*unknown before training"):
            loss_at_reference(name, beta=BETA)
    with pytest.raises(ValueError, match="lengths.*unknown before training"):
        plackett_luce_at_reference("rdpo", 3, beta=BETA)


def test_a_user_mistake_with_positives_is_named():
    h, s, _ = draw()
    q = log_q(s, 0.0)
    with pytest.raises(ValueError, match="one number >= 0 for each positive"):
        multi_positive_loss("dpo", h, q, beta=BETA, weights=[])
    with pytest.raises(ValueError, match="one number >= 0 for each positive"):
        multi_positive_loss("dpo", h, q, beta=BETA, weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="unknown n_factor 'n'"):
        multi_positive_loss("dpo", h, q, beta=BETA, weights=[1.0], n_factor="n")
