"""The losses of a whole list, and KTO: against hand algebra in float64, TRL's own code, limits, and rows alone."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_losses import draw, log_q
from test_losses_more import ALL, BETA, B, K, close, shuffle
from torch import Tensor
from torch.autograd import gradcheck

from hps.extra.losses import LISTWISE, OFFICIAL, kto_loss, listwise_at_reference, listwise_loss
from hps.losses import LOSSES, stage_loss

LISTS = {
    "exo_rw": {"label_temperature": 0.4},
    "infonca": {"label_temperature": 0.4},
    "nca_soft": {"label_temperature": 0.4},
    "sppo_winrate": {},
    "lipo": {},
}


def list_by_hand(name: str, h: Tensor, s: Tensor, *, beta: float, temperature: float = 1.0) -> Tensor:
    """Oracles: torch's own KL, soft cross-entropy and binary cross-entropy; loops over responses and pairs."""
    r, t = beta * h, torch.softmax(s / temperature, 1)
    if name == "exo_rw":
        return F.kl_div(t.log(), torch.softmax(r, 1), reduction="none").sum(1)
    if name == "infonca":
        return F.cross_entropy(r, t, reduction="none")
    if name == "nca_soft":
        bce = F.binary_cross_entropy_with_logits
        yes, no = (bce(r, torch.full_like(r, y), reduction="none") for y in (1.0, 0.0))
        return (t * yes).sum(1) + no.mean(1)
    losses = []
    for x, score in zip(h.tolist(), s.tolist()):
        n, loss = len(x), 0.0
        psi = [(v - min(score)) / (max(score) - min(score)) for v in score]
        tau = {i: rank for rank, i in enumerate(sorted(range(n), key=lambda i: -x[i]), 1)}
        for i in range(n):
            if name == "sppo_winrate":
                wins = sum(1 / (1 + math.exp(v - score[i])) for v in score) / n
                loss += (x[i] - (wins - 0.5) / beta) ** 2
            for j in range(n):
                if name == "lipo" and psi[i] > psi[j]:
                    delta = abs(2 ** psi[i] - 2 ** psi[j]) * abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
                    loss += delta * math.log(1 + math.exp(-beta * (x[i] - x[j])))
        losses.append(loss)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("name", LISTS)
def test_list_is_the_formula(name):
    h, s, _ = draw(B=8)
    by_hand = list_by_hand(name, h, s, beta=BETA, temperature=LISTS[name].get("label_temperature", 1.0))
    close(listwise_loss(name, h, s, beta=BETA, **LISTS[name]), by_hand)


@pytest.mark.parametrize("name", LISTS)
def test_list_gradcheck(name):
    h, s, _ = draw(B=2, K=4)
    h.requires_grad_()
    assert gradcheck(lambda x: listwise_loss(name, x, s, beta=BETA, **LISTS[name]), (h,))


@pytest.mark.parametrize("name", LISTS)
def test_list_ragged_rows_equal_rows_alone(name):
    h, s, L = draw()
    sizes = [1, 6, 2, 5]
    valid = torch.arange(K)[None] < torch.tensor(sizes)[:, None]
    padded = torch.where(valid, h, torch.nan).requires_grad_()
    rewards = torch.where(valid, s, torch.inf)
    given = dict(beta=BETA, length_norm=True, **LISTS[name])
    loss = listwise_loss(name, padded, rewards, valid=valid, num_tokens=L, **given)
    loss.sum().backward()
    for b, n in enumerate(sizes):
        alone = (h[b : b + 1, :n] / L[b : b + 1, :n]).requires_grad_()
        one = listwise_loss(name, alone, s[b : b + 1, :n], beta=BETA, **LISTS[name])
        close(loss[b], one[0])
        one.sum().backward()
        close(padded.grad[b, :n], alone.grad[0] / L[b, :n])
        assert (padded.grad[b, n:] == 0).all()


@pytest.mark.parametrize("name", LISTS)
def test_order_of_a_list_does_not_matter(name):
    """Neither in value nor in gradient, also where the model ties all (h = 0) or two rewards are equal."""
    h, s, _ = draw()
    s[:, 2] = s[:, 1]
    order = shuffle(fixed=0)
    for x in (h, torch.zeros_like(h)):
        a, b = x.clone().requires_grad_(), x[:, order].clone().requires_grad_()
        loss = listwise_loss(name, a, s, beta=BETA, **LISTS[name])
        shuffled = listwise_loss(name, b, s[:, order], beta=BETA, **LISTS[name])
        close(shuffled, loss)
        loss.sum().backward()
        shuffled.sum().backward()
        close(b.grad, a.grad[:, order])
        assert (a.grad.abs().sum(1) > 0).all()  # also before the first update


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("margin", [-1e4, -50.0, 50.0, 1e4])
def test_list_stays_finite_in_fp32(name, margin):
    h = torch.zeros(1, K)
    h[0, 0] = margin / BETA
    h.requires_grad_()
    labelled = LISTS[name].get("label_temperature")
    for temperature in (1e-40, 1e-4, 1.0, 1e4):
        for s in (torch.linspace(200, -200, K)[None], torch.full((1, K), -30.0)):
            given = {"label_temperature": temperature} if labelled else {}
            loss = listwise_loss(name, h, s, beta=BETA, **given)
            (grad,) = torch.autograd.grad(loss.sum(), h)
            assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


def test_limits_of_the_list_losses():
    h, s, _ = draw()
    hard = dict(beta=BETA, label_temperature=1e-6)
    # One-hot labels: InfoNCA is Eq. 6 (DPO for a pair), NCA is the first stage of NCA-PL.
    close(listwise_loss("infonca", h, s, **hard), torch.logsumexp(BETA * h, 1) - BETA * h[:, 0])
    pair = dict(beta=BETA)
    alone = torch.zeros(B, 1, dtype=h.dtype)
    close(listwise_loss("infonca", h[:, :2], s[:, :2], **hard), stage_loss("dpo", h[:, :2], alone, **pair))
    first = stage_loss("nca", h, log_q(s, 0.0), beta=BETA, kappa=K - 1)
    close(listwise_loss("nca_soft", h, s, **hard), first)
    # Rewards far apart make win rates of 1 and 0 against the other: SPPO's hard pair, at half its targets.
    far = torch.tensor([[100.0, -100.0]] * B, dtype=h.dtype)
    hard_pair = stage_loss("sppo", h[:, :2], alone, beta=2 * BETA)
    close(listwise_loss("sppo_winrate", h[:, :2], far, beta=BETA), hard_pair)
    # EXO's is zero just where the policy has the rewards' distribution: beta h = s / alpha.
    assert listwise_loss("exo_rw", s / (0.4 * BETA), s, beta=BETA, label_temperature=0.4).abs().max() < 1e-12
    # LiPO looks at rewards on a scale of 0 to 1, and at nothing where all are equal.
    close(listwise_loss("lipo", h, 50 * s - 7, beta=BETA), listwise_loss("lipo", h, s, beta=BETA), 1e-10)
    assert (listwise_loss("lipo", h, torch.ones_like(s), beta=BETA) == 0).all()


def test_list_values_at_reference():
    """-log n - mean log t, log n, 2 log 2 and sum ((Phat - 1/2)/beta)^2; each is the loss where all h = 0."""
    _, s, _ = draw()
    sizes = [1, 6, 2, 5]
    valid = torch.arange(K)[None] < torch.tensor(sizes)[:, None]
    for name in ("exo_rw", "infonca", "nca_soft", "sppo_winrate"):
        value = listwise_at_reference(name, torch.where(valid, s, torch.nan), beta=BETA, valid=valid, **LISTS[name])
        close(value, listwise_loss(name, torch.zeros_like(s), s, beta=BETA, valid=valid, **LISTS[name]))
        for b, n in enumerate(sizes):
            row = s[b, :n]
            by_hand = {
                "exo_rw": -math.log(n) - torch.log_softmax(row / 0.4, 0).mean().item(),
                "infonca": math.log(n),
                "nca_soft": 2 * math.log(2),
                "sppo_winrate": sum(((sum(1 / (1 + math.exp(b - a)) for b in row) / n - 0.5) / BETA) ** 2 for a in row),
            }[name]
            assert value[b].item() == pytest.approx(float(by_hand), rel=1e-12, abs=1e-12)


def test_official_forms_exist():
    """Every row of the paper's tables has an entry, and its options can be told apart from the stage's."""
    assert set(OFFICIAL) == {"dpo", "exo", "ipo", "sppo", "nca"} <= set(LOSSES)
    assert {form for form in OFFICIAL.values() if form} <= set(LISTWISE)
    assert not set(LISTWISE) & set(LOSSES)
    assert set(LOSSES) == set(ALL) and set(LISTWISE) == set(LISTS)


# ----------------------------------------------------------------------------------------------------------------- KTO


def trl_kto_loss(h: Tensor, kl: float, *, beta: float, desirable_weight: float, undesirable_weight: float) -> Tensor:
    """KTOTrainer._compute_loss of one prompt's responses, the first desirable, driven without a model.

    A fake model returns one log-prob per response, h against reference log-probs of zero; for the mismatched
    responses it returns kl, so that z0 is max(0, kl). TRL's mean over responses is put back to a sum.
    """
    KTOTrainer = pytest.importorskip("trl", reason="TRL is a development extra").KTOTrainer
    K, blank = len(h), torch.zeros(len(h), 1)
    batch = {
        "input_ids": torch.ones(K, 2, dtype=torch.long),
        "attention_mask": torch.ones(K, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[0, 1]] * K),
        "KL_input_ids": torch.zeros(K, 2, dtype=torch.long),
        "KL_attention_mask": torch.ones(K, 2, dtype=torch.long),
        "KL_completion_mask": torch.tensor([[0, 1]] * K),
        "label": torch.tensor([True] + [False] * (K - 1)),
        "ref_logps": torch.zeros(K, dtype=h.dtype),
        "ref_KL_logps": torch.zeros(K, dtype=h.dtype),
    }

    def model(input_ids, **kwargs):
        log_probs = h[:, None] if input_ids.any() else torch.full_like(h[:, None], kl)
        return SimpleNamespace(log_probs=log_probs, entropy=blank, mean_logits=blank)

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        beta=beta,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    return K * KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)


@pytest.mark.parametrize("kl", [-0.8, 0.0, 1.7])
def test_kto_equals_trl(kl):
    """Values and gradients; a negative estimate of z0 counts as 0."""
    h, _, _ = draw()
    weights = dict(desirable_weight=1.3, undesirable_weight=0.6)
    ours_in, theirs_in = h.clone().requires_grad_(), h.clone().requires_grad_()
    ours = kto_loss(ours_in, beta=BETA, kl=kl, **weights)
    theirs = torch.stack([trl_kto_loss(row, kl, beta=BETA, **weights) for row in theirs_in])
    close(ours, theirs, 1e-7)  # TRL's mean runs through a float32 mask
    ours.sum().backward()
    theirs.sum().backward()
    close(ours_in.grad, theirs_in.grad, 1e-7)


def test_kto_by_hand_and_ragged():
    """w_D (1 - s(beta (h - z0))) + w_U sum (1 - s(beta (z0 - h))), z0 of each prompt, without a gradient through it."""
    h, _, _ = draw()
    sizes = [1, 6, 2, 5]
    valid = torch.arange(K)[None] < torch.tensor(sizes)[:, None]
    padded = torch.where(valid, h, torch.nan).requires_grad_()
    z0 = torch.tensor([0.0, 0.4, 2.0, -1.0], dtype=h.dtype, requires_grad=True)
    loss = kto_loss(padded, beta=BETA, kl=z0, valid=valid, desirable_weight=1.5, undesirable_weight=0.5)
    loss.sum().backward()
    assert z0.grad is None
    for b, n in enumerate(sizes):
        z, x = max(0.0, z0[b].item()), h[b, :n].tolist()
        by_hand = 1.5 * (1 - 1 / (1 + math.exp(-BETA * (x[0] - z))))
        by_hand += sum(0.5 * (1 - 1 / (1 + math.exp(-BETA * (z - v)))) for v in x[1:])
        assert loss[b].item() == pytest.approx(by_hand, rel=1e-12)
        assert torch.isfinite(padded.grad[b]).all() and (padded.grad[b, n:] == 0).all()
    assert gradcheck(lambda x: kto_loss(x, beta=BETA, kl=0.7), (h.requires_grad_(),))
    reference = kto_loss(torch.zeros(1, K), beta=BETA, kl=0.0, desirable_weight=1.5, undesirable_weight=0.5)
    assert reference.item() == pytest.approx((1.5 + 0.5 * (K - 1)) / 2)
    extreme = kto_loss(torch.tensor([[1e6, -1e6, 1e6]], requires_grad=True), beta=BETA, kl=1e6)
    assert torch.isfinite(extreme).all()


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_a_user_mistake_with_lists_is_named():
    h, s, _ = draw()
    with pytest.raises(ValueError, match="unknown loss 'dpo'; choose one of exo_rw, infonca"):
        listwise_loss("dpo", h, s, beta=BETA)
    with pytest.raises(ValueError, match=r"label_temperature must lie in \(0, inf\)"):
        listwise_loss("infonca", h, s, beta=BETA, label_temperature=0.0)
    with pytest.raises(ValueError, match="'lipo' does not use label_temperature"):
        listwise_loss("lipo", h, s, beta=BETA, label_temperature=0.5)
    with pytest.raises(ValueError, match="beta must be positive"):
        listwise_loss("lipo", h, s, beta=-1.0)
    with pytest.raises(ValueError, match="divides by length: pass num_tokens"):
        listwise_loss("lipo", h, s, beta=BETA, length_norm=True)
    with pytest.raises(ValueError, match="'lipo'.*unknown before training"):
        listwise_at_reference("lipo", s, beta=BETA)
    with pytest.raises(ValueError, match="must not be negative"):
        kto_loss(h, beta=BETA, kl=0.0, undesirable_weight=-1.0)
