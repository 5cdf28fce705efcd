"""The losses against hand algebra, limits of the paper, float64 gradients and TRL's own loss code."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from hps import samplers
from hps.losses import (
    loss_at_reference,
    plackett_luce_at_reference,
    plackett_luce_loss,
    stage_loss,
)

NAMES = ["dpo", "exo", "ipo", "sppo", "nca"]  # the rest: test_losses_more.py
B, K = 4, 6


def log_q(rewards: Tensor, gamma, *, valid: Tensor | None = None) -> Tensor:
    """Eq. 9 for the columns behind the preferred one."""
    return samplers.log_q(rewards[:, 1:], gamma, None if valid is None else valid[:, 1:])


BETA = 0.3


def draw(seed: int = 0, *, B: int = B, K: int = K, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random log-ratios, rewards (both sorted best first by reward) and token counts, float64."""
    g = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(B, K, generator=g, dtype=torch.float64)
    rewards = torch.randn(B, K, generator=g, dtype=torch.float64).sort(1, descending=True).values
    return h, rewards, torch.randint(3, 40, (B, K), generator=g)


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


# ------------------------------------------------------------------- one opponent: the papers' pair losses


def pair_by_hand(name: str, h: Tensor, L: Tensor, beta: float) -> Tensor:
    """The pair losses as their papers print them, D = beta (h_w - h_l):

    DPO -log s(D). EXO with s = s(D): s log(s/(1-e)) + (1-s) log((1-s)/e). IPO (h_w/L_w - h_l/L_l - 1/(2 beta))^2.
    SPPO (h_w - 1/(2 beta))^2 + (h_l + 1/(2 beta))^2. NCA -log s(r_w) - log s(-r_w)/2 - log s(-r_l)/2.
    """
    w, o, e = h[:, 0], h[:, 1], 1e-3
    s = torch.sigmoid(beta * (w - o))
    hb = h / L
    return {
        "dpo": -s.log(),
        "exo": s * (s / (1 - e)).log() + (1 - s) * ((1 - s) / e).log(),
        "ipo": (hb[:, 0] - hb[:, 1] - 1 / (2 * beta)) ** 2,
        "sppo": (w - 1 / (2 * beta)) ** 2 + (o + 1 / (2 * beta)) ** 2,
        "nca": softplus(-beta * w) + softplus(beta * w) / 2 + softplus(beta * o) / 2,
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_one_opponent_is_the_pair_loss(name):
    h, _, L = draw(K=2)
    ours = stage_loss(name, h, torch.zeros(B, 1, dtype=h.dtype), beta=BETA, num_tokens=L)
    torch.testing.assert_close(ours, pair_by_hand(name, h, L, BETA), rtol=1e-12, atol=1e-12)


TRL_NAMES = {"dpo": "sigmoid", "exo": "exo_pair", "ipo": "ipo", "sppo": "sppo_hard", "nca": "nca_pair"}


def trl_pair_loss(name: str, h: Tensor, L: Tensor, beta: float) -> Tensor:
    """Per-pair losses of TRL's own DPOTrainer._compute_loss, driven without a model.

    A fake model returns per-token log-probs whose sums are h, against reference log-probs of zero; one pair at
    a time, since TRL returns the mean. It is pinned in the lock file: its internals move with every release.
    """
    DPOTrainer = pytest.importorskip("trl", reason="TRL is a development extra: pip install hps[dev]").DPOTrainer
    losses = []
    for pair, lengths in zip(h, L, strict=True):
        T = int(lengths.max())  # completion tokens, right-padded, after one prompt token
        completion = torch.arange(T + 1)[None] <= lengths[:, None]
        completion[:, 0] = False
        outputs = SimpleNamespace(
            log_probs=torch.where(completion[:, 1:], (pair / lengths)[:, None], 0.0),
            entropy=torch.zeros(2, T),
            is_top1=torch.zeros(2, T, dtype=torch.bool),
            mean_logits=torch.zeros(2, T),
        )
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=True),
            accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
            beta=beta,
            loss_types=[TRL_NAMES[name]],
            loss_weights=[1.0],
            label_smoothing=1e-3 if name == "exo" else 0.0,
            f_divergence_type="reverse_kl",
            ld_alpha=None,
            use_weighting=False,
            aux_loss_enabled=False,
            precompute_ref_logps=True,
            _total_train_tokens=0,
            _tp_size=1,
            _metrics={"train": defaultdict(list)},
        )
        inputs = {
            "input_ids": torch.ones(2, T + 1, dtype=torch.long),
            "attention_mask": torch.ones(2, T + 1, dtype=torch.long),
            "completion_mask": completion.long(),
            "ref_chosen_logps": torch.zeros(1, dtype=h.dtype),
            "ref_rejected_logps": torch.zeros(1, dtype=h.dtype),
        }
        model = lambda **kwargs: outputs  # noqa: B023, E731 - called before the next pair
        losses.append(DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False))
    return torch.stack(losses)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [3.0, 170.0, 3e4])
def test_one_opponent_equals_trl(name, scale):
    """Values and gradients: small margins, |D| around 50, and around 1e4."""
    h, _, L = draw(seed=1, K=2, scale=scale)
    ours_in, theirs_in = h.clone().requires_grad_(), h.clone().requires_grad_()
    ours = stage_loss(name, ours_in, torch.zeros(B, 1, dtype=h.dtype), beta=BETA, num_tokens=L)
    theirs = trl_pair_loss(name, theirs_in, L, BETA)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(ours_in.grad, theirs_in.grad, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------- identities of the family


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gamma", [-5.0, 0.0, 5.0])
def test_two_responses_make_bt_pl_and_hps_equal(name, gamma):
    """n = 2: one opponent has q = 1 whatever gamma is, N = 1, and PL has one stage."""
    h, s, L = draw(K=2)
    bt = stage_loss(name, h, torch.zeros(B, 1, dtype=h.dtype), beta=BETA, num_tokens=L)
    hps = stage_loss(name, h, log_q(s, gamma), beta=BETA, kappa=1.0, num_tokens=L)
    pl = plackett_luce_loss(name, h, beta=BETA, num_tokens=L)
    torch.testing.assert_close(hps, bt, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pl, bt, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("gamma", "opponent"), [(1e6, 1), (-1e6, K - 1)])
def test_gamma_limits_are_pair_losses(name, gamma, opponent):
    """gamma -> inf: the pair loss on the highest-reward opponent; gamma -> -inf: BT (best against worst)."""
    h, s, L = draw()
    full = stage_loss(name, h, log_q(s, gamma), beta=BETA, num_tokens=L)
    pair = stage_loss(
        name, h[:, [0, opponent]], torch.zeros(B, 1, dtype=h.dtype), beta=BETA, num_tokens=L[:, [0, opponent]]
    )
    torch.testing.assert_close(full, pair, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gamma_zero_with_all_of_n_is_the_first_pl_stage(name):
    """gamma = 0, kappa = N. For DPO that is Eq. 6: logsumexp_i r_i - r_1."""
    h, s, L = draw()
    full = stage_loss(name, h, log_q(s, 0.0), beta=BETA, kappa=K - 1, num_tokens=L)
    rest = plackett_luce_loss(name, h[:, 1:], beta=BETA, num_tokens=L[:, 1:])
    first = plackett_luce_loss(name, h, beta=BETA, num_tokens=L) - rest
    torch.testing.assert_close(full, first, rtol=1e-9, atol=1e-9)
    if name == "dpo":
        torch.testing.assert_close(full, torch.logsumexp(BETA * h, 1) - BETA * h[:, 0], rtol=1e-12, atol=1e-12)


def test_dpo_pl_is_plackett_luce():
    """sum_j (logsumexp_{k >= j} r_k - r_j) is -log of the PL probability of the order, Eqs. 4-5."""
    h, _, _ = draw()
    r = BETA * h
    by_hand = sum(torch.logsumexp(r[:, j:], 1) - r[:, j] for j in range(K))
    torch.testing.assert_close(plackett_luce_loss("dpo", h, beta=BETA), by_hand, rtol=1e-12, atol=1e-12)
    # The probabilities of all orders of three sum to one.
    three = h[:1, :3]
    total = sum(
        plackett_luce_loss("dpo", three[:, list(order)], beta=BETA).neg().exp()
        for order in itertools.permutations(range(3))
    )
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_one_drawn_opponent_against_all_weighted(name):
    """E_{y~q}[pair loss] is the weighted form for IPO, SPPO, NCA, and below it for DPO: softplus(log u) is concave."""
    h, s, L = draw()
    weights = log_q(s, 1.5)
    full = stage_loss(name, h, weights, beta=BETA, num_tokens=L)
    pairs = torch.stack(
        [
            stage_loss(name, h[:, [0, k]], torch.zeros(B, 1, dtype=h.dtype), beta=BETA, num_tokens=L[:, [0, k]])
            for k in range(1, K)
        ],
        dim=1,
    )
    expected = (weights.exp() * pairs).sum(1)
    if name == "dpo":
        assert (expected < full).all()
    elif name != "exo":
        torch.testing.assert_close(expected, full, rtol=1e-12, atol=1e-12)


def test_dpo_gradient_closed_form():
    """P = s(x - r_w): dL/dr_w = -P, dL/dr_k = P softmax_k(r_k + gamma s_k); they sum to zero."""
    h, s, _ = draw()
    h.requires_grad_()
    stage_loss("dpo", h, log_q(s, 2.0), beta=1.0, kappa=K - 1).sum().backward()
    x = torch.logsumexp(h[:, 1:] + log_q(s, 2.0), 1) + math.log(K - 1)
    P = torch.sigmoid(x - h[:, 0])[:, None]
    by_hand = torch.cat([-P, P * torch.softmax(h[:, 1:] + 2.0 * s[:, 1:], 1)], 1)
    torch.testing.assert_close(h.grad, by_hand, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(h.grad.sum(1), torch.zeros(B, dtype=h.dtype), rtol=0, atol=1e-12)


def test_exo_gradient_closed_form():
    """dL/dD = s (1 - s) (D - log((1 - e)/e)), s = s(D): stationary where the odds are (1 - e)/e."""
    D = torch.linspace(-8, 8, 9, dtype=torch.float64)
    h = torch.stack([D, torch.zeros_like(D)], 1).requires_grad_()
    stage_loss("exo", h, torch.zeros(9, 1, dtype=h.dtype), beta=1.0).sum().backward()
    s = torch.sigmoid(D)
    torch.testing.assert_close(h.grad[:, 0], s * (1 - s) * (D - math.log(0.999 / 0.001)), rtol=1e-9, atol=1e-12)


def test_label_smoothing_is_cdpo():
    """(1 - e) sp(-D) + e sp(D), with its minimum at D = log((1 - e)/e)."""
    h, s, _ = draw()
    D = BETA * h[:, 0] - torch.logsumexp(BETA * h[:, 1:] + log_q(s, 1.0), 1)
    smoothed = stage_loss("dpo", h, log_q(s, 1.0), beta=BETA, label_smoothing=0.1)
    torch.testing.assert_close(smoothed, 0.9 * softplus(-D) + 0.1 * softplus(D), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_value_at_reference(name):
    """Where all h = 0 the loss has a closed form, for every kappa, and for PL."""
    L = torch.full((B, K), 7)
    zero = torch.zeros(B, K, dtype=torch.float64)
    for kappa in (1.0, 5.0):
        value = stage_loss(name, zero, log_q(draw()[1], 2.0), beta=BETA, kappa=kappa, num_tokens=L)
        assert value.tolist() == pytest.approx([loss_at_reference(name, beta=BETA, kappa=kappa)] * B, rel=1e-9)
    pl = plackett_luce_loss(name, zero, beta=BETA, num_tokens=L)
    assert pl.tolist() == pytest.approx([plackett_luce_at_reference(name, K, beta=BETA)] * B, rel=1e-9)


def test_known_numbers_at_reference():
    """log 2, log(1 + kappa), log n!, 1/(4 beta^2), 1/(2 beta^2), 2 log 2; cDPO loses e log kappa."""
    assert loss_at_reference("dpo", beta=0.1) == pytest.approx(math.log(2))
    assert loss_at_reference("dpo", beta=0.1, kappa=99, label_smoothing=0.1) == pytest.approx(
        math.log(100) - 0.1 * math.log(99)
    )
    assert plackett_luce_at_reference("dpo", 5, beta=0.1) == pytest.approx(math.log(math.factorial(5)))
    assert loss_at_reference("ipo", beta=0.1) == pytest.approx(25.0)
    assert loss_at_reference("sppo", beta=0.1) == pytest.approx(50.0)
    assert loss_at_reference("nca", beta=0.1) == pytest.approx(2 * math.log(2))
    assert loss_at_reference("exo", beta=0.1) == pytest.approx(-math.log(2) - (math.log(0.999) + math.log(0.001)) / 2)


# --------------------------------------------------------------------------------------- numerics, shapes


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    h, s, L = draw(B=2, K=4)
    h.requires_grad_()
    q = log_q(s, 1.0)
    assert gradcheck(lambda x: stage_loss(name, x, q, beta=BETA, kappa=3.0, num_tokens=L), (h,))
    assert gradcheck(lambda x: plackett_luce_loss(name, x, beta=BETA, num_tokens=L), (h,))


@pytest.mark.parametrize("name", NAMES)
def test_ragged_rows_equal_rows_alone(name):
    """Padding columns change nothing, in value and gradient, whatever stands in them (also inf and nan)."""
    h, s, L = draw()
    sizes = [2, 6, 3, 5]
    valid = torch.arange(K)[None] < torch.tensor(sizes)[:, None]
    padded = torch.where(valid, h, torch.nan).requires_grad_()
    q = log_q(s, 1.0, valid=valid)
    kappa = torch.tensor(sizes, dtype=h.dtype) - 1
    stage = stage_loss(name, padded, q, beta=BETA, kappa=kappa, valid=valid, num_tokens=L)
    ranked = plackett_luce_loss(name, padded, beta=BETA, valid=valid, num_tokens=L)
    (stage + ranked).sum().backward()
    for b, n in enumerate(sizes):
        alone = h[b : b + 1, :n].clone().requires_grad_()
        q_alone = log_q(s[b : b + 1, :n], 1.0)
        one = stage_loss(name, alone, q_alone, beta=BETA, kappa=n - 1.0, num_tokens=L[b : b + 1, :n])
        two = plackett_luce_loss(name, alone, beta=BETA, num_tokens=L[b : b + 1, :n])
        torch.testing.assert_close(stage[b], one[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ranked[b], two[0], rtol=1e-10, atol=1e-10)
        (one + two).sum().backward()
        torch.testing.assert_close(padded.grad[b, :n], alone.grad[0], rtol=1e-10, atol=1e-10)
        assert (padded.grad[b, n:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("margin", [-1e4, -50.0, 50.0, 1e4])
def test_extreme_margins_stay_finite_in_fp32(name, margin):
    h = torch.zeros(1, K)
    h[0, 0] = margin / BETA
    h.requires_grad_()
    s = torch.linspace(200, -200, K)[None]  # gamma * r spans +-1000: q underflows, log q must not
    for gamma in (-5.0, 5.0):
        loss = stage_loss(name, h, log_q(s, gamma), beta=BETA, kappa=K - 1.0, num_tokens=torch.full((1, K), 9))
        loss = loss + plackett_luce_loss(name, h, beta=BETA, num_tokens=torch.full((1, K), 9))
        (grad,) = torch.autograd.grad(loss.sum(), h)
        assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_order_of_opponents_does_not_matter(name):
    h, s, L = draw()
    shuffled = torch.cat([torch.tensor([0]), 1 + torch.randperm(K - 1, generator=torch.Generator().manual_seed(3))])
    a = stage_loss(name, h, log_q(s, 1.0), beta=BETA, num_tokens=L)
    b = stage_loss(name, h[:, shuffled], log_q(s[:, shuffled], 1.0), beta=BETA, num_tokens=L[:, shuffled])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_adding_a_constant_to_all_log_ratios():
    """DPO, EXO and IPO(sum) see differences only; SPPO and NCA pin each response."""
    h, s, _ = draw()
    for name in NAMES:
        a, b = (stage_loss(name, x, log_q(s, 1.0), beta=BETA, length_norm=False) for x in (h, h + 1.7))
        assert torch.allclose(a, b, rtol=1e-9) == (name in ("dpo", "exo", "ipo"))


def test_a_user_mistake_is_named():
    h, s, _ = draw()
    q = log_q(s, 1.0)
    with pytest.raises(ValueError, match="unknown loss 'dpoo'.*dpo, exo"):
        stage_loss("dpoo", h, q, beta=BETA)
    with pytest.raises(ValueError, match="'nca' does not use label_smoothing"):
        stage_loss("nca", h, q, beta=BETA, label_smoothing=0.1)
    with pytest.raises(ValueError, match="divides by length: pass num_tokens"):
        stage_loss("ipo", h, q, beta=BETA)
    with pytest.raises(ValueError, match="beta must be positive"):
        stage_loss("dpo", h, q, beta=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
        stage_loss("dpo", h, q, beta=BETA, label_smoothing=0.5)
