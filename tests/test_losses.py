"""One battery over one table of all losses, then what the paper and TRL say of single ones."""

import dataclasses
import inspect
import itertools
import math
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from hps import samplers
from hps.extra import losses as extra
from hps.losses import LOSSES, multi_positive_loss, plackett_luce_loss, stage_loss
from hps.options import Config

B, K, BETA, ALPHA = 4, 6, 0.3, 0.4
PAPER = ("dpo", "exo", "ipo", "sppo", "nca")
# No option at its default: a default would hide an option that does not arrive.
OPTIONS = {
    "dpo": {"label_smoothing": 0.2},
    "exo": {"exo_eps": 0.05},
    "simpo": {"target_margin": 0.7},
    "slic": {"slic_delta": 2.0, "slic_lambda": 0.3},
    "rdpo": {"rdpo_alpha": 0.03},
    **{key: {"label_temperature": ALPHA} for key in ("exo_rw", "infonca", "nca_soft")},
    **{key: {} for key in ("ipo", "sppo", "nca", "sppo_winrate", "lipo")},
    "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
}
EVERY = LOSSES | extra.LOSSES | extra.LISTWISE | {"kto": extra.KTO}
ALL = {name: EVERY[name] for name in OPTIONS}  # a loss of a fork brings its own test
GIVEN = {name: more | ({} if name == "slic" else {"beta": BETA}) for name, more in OPTIONS.items()}
STAGES = [name for name, loss in ALL.items() if loss.form == "stage"]
LISTS = [name for name, loss in ALL.items() if loss.form == "list"]
GAMMA, WEIGHTS, KL = 1.3, (1.0, 0.5, 0.25), 0.7


def draw(seed: int = 0, *, B: int = B, K: int = K, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random log-ratios, rewards (falling in each row) and token counts, float64."""
    g = torch.Generator().manual_seed(seed)
    h = scale * torch.randn(B, K, generator=g, dtype=torch.float64)
    rewards = torch.randn(B, K, generator=g, dtype=torch.float64).sort(1, descending=True).values
    return h, rewards, torch.randint(3, 40, (B, K), generator=g)


def log_q(rewards: Tensor, gamma=GAMMA, valid: Tensor | None = None) -> Tensor:
    """Eq. 9 for the columns behind the preferred one."""
    return samplers.log_q(rewards[:, 1:], gamma, None if valid is None else valid[:, 1:])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def stage(h, s, L, valid, name, *, kappa=5.0, gamma=GAMMA, **more):
    weights = torch.where(valid[:, 1:], log_q(s, gamma, valid), 0.0)  # padded as the plan does
    return stage_loss(ALL[name], h, weights, kappa=kappa, valid=valid, num_tokens=L, **GIVEN[name] | more)


def pl(h, s, L, valid, name):
    return plackett_luce_loss(ALL[name], h, valid=valid, num_tokens=L, **GIVEN[name])


def positives(h, s, L, valid, name, **more):
    how = dict(weights=WEIGHTS, n_factor="n_minus_one", exclude_positives=False) | more
    log_weights = torch.where(valid[:, 1:], GAMMA * s[:, 1:], torch.nan)  # not normalised, which changes nothing
    return multi_positive_loss(ALL[name], h, log_weights, valid=valid, num_tokens=L, **how, **GIVEN[name])


def without_positives(h, s, L, valid, name):
    return positives(h, s, L, valid, name, n_factor="one", exclude_positives=True)


def whole_list(h, s, L, valid, name):
    return extra.listwise_loss(ALL[name], h, torch.where(valid, s, torch.inf), valid=valid, **GIVEN[name])


def one_by_one(h, s, L, valid, name):
    return extra.kto_loss(h, KL, valid, **GIVEN[name])


# ---------------------------------------------------------------------- every loss and form by hand, in plain floats


def sp(x: float) -> float:
    return math.log(1 + math.exp(x))


def stage_by_hand(name: str, h: list, L: list, q: list, kappa: float) -> float:
    """The formulas of the papers for one prompt; rows of `others` are (q_k, h_k, h_k / L_k, r_k)."""
    o, target = OPTIONS[name], 1 / (2 * BETA)
    r = [BETA / n * x if name == "simpo" else BETA * x + o.get("rdpo_alpha", 0.0) * n for x, n in zip(h, L)]
    mean = [x / n for x, n in zip(h, L)]
    others = list(zip(q, h[1:], mean[1:], r[1:]))
    weights = [math.exp(r[0])] + [kappa * w * math.exp(s) for w, _, _, s in others]
    D = r[0] - math.log(sum(weights[1:]))
    e = o.get("label_smoothing", o.get("exo_eps", 0.0))
    p, t = [w / sum(weights) for w in weights], [1 - e] + [e * w for w in q]
    hinges = sum(w * max(0.0, o.get("slic_delta", 0.0) - h[0] + x) for w, x, _, _ in others)
    return {
        "dpo": lambda: (1 - e) * sp(-D) + e * sp(D),
        "exo": lambda: sum(a * math.log(a / b) for a, b in zip(p, t)),
        "ipo": lambda: sum(w * (mean[0] - m - target) ** 2 for w, _, m, _ in others),
        "sppo": lambda: (h[0] - target) ** 2 + sum(w * (x + target) ** 2 for w, x, _, _ in others),
        "nca": lambda: sp(-r[0]) + (sp(r[0]) + kappa * sum(w * sp(s) for w, _, _, s in others)) / (1 + kappa),
        "rdpo": lambda: sp(-D),
        "simpo": lambda: sp(o["target_margin"] - D),
        "slic": lambda: hinges - o["slic_lambda"] * h[0],
    }[name]()


def stages_by_hand(name: str, h: list, s: list, L: list, weights, gamma: float, n_factor: bool, skip: int) -> float:
    """sum_j weight_j (stage of the winner j); its opponents begin at column `skip`, or behind j."""
    total = 0.0
    for j, weight in enumerate(weights):
        others = range(max(j + 1, skip), len(h))
        if others:
            drawn = [math.exp(gamma * s[k]) for k in others]
            q = [x / sum(drawn) for x in drawn]
            at = [j, *others]
            kappa = len(others) if n_factor else 1.0
            total += weight * stage_by_hand(name, [h[k] for k in at], [L[k] for k in at], q, kappa)
    return total


def list_by_hand(name: str, h: Tensor, s: Tensor) -> float:
    """Oracles: torch's own KL, soft cross-entropy and binary cross-entropy; loops over responses and pairs."""
    r, t, n = BETA * h, torch.softmax(s / ALPHA, 0), len(h)
    bce = F.binary_cross_entropy_with_logits
    if name in ("exo_rw", "infonca", "nca_soft"):
        return {
            "exo_rw": F.kl_div(t.log(), torch.softmax(r, 0), reduction="sum"),
            "infonca": F.cross_entropy(r[None], t[None]),
            "nca_soft": (t * bce(r, torch.ones_like(r), reduction="none")).sum() + bce(r, torch.zeros_like(r)),
        }[name].item()
    x, score = h.tolist(), s.tolist()
    if name == "sppo_winrate":
        wins = [sum(1 / (1 + math.exp(b - a)) for b in score) / n for a in score]
        return sum((a - (w - 0.5) / BETA) ** 2 for a, w in zip(x, wins))
    psi = [(v - min(score)) / (max(score) - min(score) or 1.0) for v in score]
    tau = {i: rank for rank, i in enumerate(sorted(range(n), key=lambda i: -x[i]), 1)}
    total = 0.0
    for i, j in itertools.product(range(n), repeat=2):
        if psi[i] > psi[j]:
            delta = abs(2 ** psi[i] - 2 ** psi[j]) * abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
            total += delta * sp(-BETA * (x[i] - x[j]))
    return total


def kto_by_hand(h: list) -> float:
    sigmoid = [1 / (1 + math.exp(-BETA * (x - KL))) for x in h]
    return 1.5 * (1 - sigmoid[0]) + sum(0.5 * (1 - (1 - p)) for p in sigmoid[1:])


def by_hand(form, name: str, h: Tensor, s: Tensor, L: Tensor) -> float:
    """What `form` must give for one row without padding."""
    row = h.tolist(), s.tolist(), L.tolist()
    if form is whole_list:
        return list_by_hand(name, h, s)
    if form is one_by_one:
        return kto_by_hand(row[0])
    if form is stage:
        q = torch.softmax(GAMMA * s[1:], 0).tolist()
        return stage_by_hand(name, row[0], row[2], q, 5.0)
    if form is pl:
        return stages_by_hand(name, *row, [1.0] * len(h), 0.0, True, 0)
    return stages_by_hand(name, *row, WEIGHTS, GAMMA, form is positives, 0 if form is positives else len(WEIGHTS))


BATTERY = [(form, name) for name in STAGES for form in (stage, pl, positives, without_positives)]
BATTERY += [(whole_list, name) for name in LISTS] + [(one_by_one, "kto")]
battery = pytest.mark.parametrize(("form", "name"), BATTERY, ids=[f"{f.__name__}-{n}" for f, n in BATTERY])


@battery
def test_values_by_hand_whatever_pads_the_rows(form, name):
    """Ragged rows, with NaN and inf in the padding, in value and gradient; rows too short for a stage add 0."""
    h, s, L = draw(B=5)
    sizes = [6, 2, 5, 3, 1]
    if form is stage:
        sizes[-1] = 4  # a stage has an opponent
    valid = torch.arange(K)[None] < torch.tensor(sizes)[:, None]
    padded = torch.where(valid, h, torch.nan).requires_grad_()
    loss = form(padded, torch.where(valid, s, torch.nan), torch.where(valid, L, 0), valid, name)
    (gradient,) = torch.autograd.grad(loss.sum(), padded)
    for b, n in enumerate(sizes):
        assert loss[b].item() == pytest.approx(by_hand(form, name, h[b, :n], s[b, :n], L[b, :n]), rel=1e-10, abs=1e-10)
        alone = h[b : b + 1, :n].clone().requires_grad_()
        one = form(alone, s[b : b + 1, :n], L[b : b + 1, :n], torch.ones(1, n, dtype=torch.bool), name)
        (grad,) = torch.autograd.grad(one.sum(), alone) if one.requires_grad else (torch.zeros_like(alone),)
        close(gradient[b, :n], grad[0], 1e-10)
        assert (gradient[b, n:] == 0).all()


@battery
def test_gradients_are_those_of_finite_differences(form, name):
    h, s, L = draw(B=2, K=4)
    assert gradcheck(lambda x: form(x, s, L, torch.ones_like(x, dtype=torch.bool), name), (h.requires_grad_(),))


@pytest.mark.parametrize("name", LISTS)
def test_the_order_of_a_list_does_not_matter(name):
    """Also where all h = 0 and where two rewards are equal."""
    h, s, L = draw()
    s[:, 2] = s[:, 1]
    order, valid = [4, 2, 5, 3, 1, 0], torch.ones(B, K, dtype=torch.bool)
    for x in (h, torch.zeros_like(h)):
        a, b = x.clone().requires_grad_(), x[:, order].clone().requires_grad_()
        loss, shuffled = whole_list(a, s, L, valid, name), whole_list(b, s[:, order], L, valid, name)
        close(shuffled, loss)
        one, other = torch.autograd.grad(loss.sum() + shuffled.sum(), (a, b))
        close(other, one[:, order])
        assert (one.abs().sum(1) > 0).all()  # also before the first update


@battery
def test_extremes_stay_finite_in_fp32(form, name, monkeypatch):
    """Margins of 1e4; gamma * r spans +-1000, so that q underflows where log q must not; labels of any temperature."""
    L, valid = torch.full((1, K), 9), torch.ones(1, K, dtype=torch.bool)
    for margin, s in itertools.product(
        (-1e4, -50.0, 50.0, 1e4), (torch.linspace(770, -770, K), torch.full((K,), -30.0))
    ):
        for temperature in (1e-40, 1e-4, 1e4) if "label_temperature" in OPTIONS[name] else (None,):
            if temperature:
                monkeypatch.setitem(GIVEN[name], "label_temperature", temperature)
            h = torch.tensor([[margin / BETA, *[0.0] * (K - 1)]], requires_grad=True)
            loss = form(h, s[None], L, valid, name)
            (grad,) = torch.autograd.grad(loss.sum(), h)
            assert torch.isfinite(loss).all() and torch.isfinite(grad).all()


# ------------------------------------------------------------------------------- identities of the family, of the paper


def full(name: str, h: Tensor, s: Tensor, L: Tensor, gamma: float, kappa: float = 1.0) -> Tensor:
    return stage(h, s, L, torch.ones_like(h, dtype=torch.bool), name, kappa=kappa, gamma=gamma)


@pytest.mark.parametrize("name", STAGES)
def test_the_family_meets_in_its_limits(name):
    """Two responses: BT, PL and HPS are one. gamma -> +-inf: the pair loss on the hardest and on the worst opponent.
    gamma = 0, kappa = N: the first stage of PL. E_{y~q}[pair] is the weighted form where the loss is linear in q."""
    h, s, L = draw()
    everywhere = torch.ones(B, K, dtype=torch.bool)

    def pair(k):
        at = [0, k]
        return full(name, h[:, at], s[:, at], L[:, at], 0.0)

    for gamma in (-5.0, 0.0, 5.0):
        close(full(name, h[:, :2], s[:, :2], L[:, :2], gamma), pair(1))
    close(pl(h[:, :2], s[:, :2], L[:, :2], everywhere[:, :2], name), pair(1))
    close(full(name, h, s, L, 1e6), pair(1), 1e-9)
    close(full(name, h, s, L, -1e6), pair(K - 1), 1e-9)
    rest = pl(h[:, 1:], s[:, 1:], L[:, 1:], everywhere[:, 1:], name)
    close(full(name, h, s, L, 0.0, kappa=K - 1), pl(h, s, L, everywhere, name) - rest, 1e-9)
    expected = (log_q(s).exp() * torch.stack([pair(k) for k in range(1, K)], 1)).sum(1)
    if name in ("ipo", "sppo", "nca", "slic"):
        close(expected, full(name, h, s, L, GAMMA))
    elif name in ("simpo", "rdpo"):  # DPO and EXO of the table are smoothed
        assert (expected < full(name, h, s, L, GAMMA)).all()  # softplus(log u) is concave
    shifted = full(name, h + 1.7, s, torch.full_like(L, 7), GAMMA)  # who looks at differences alone
    same = torch.allclose(shifted, full(name, h, s, torch.full_like(L, 7), GAMMA), rtol=1e-9)
    assert same == (name not in ("sppo", "nca", "slic"))


def test_dpo_pl_is_plackett_luce():
    """sum_j (logsumexp_{k >= j} r_k - r_j) (Eqs. 4-5); the probabilities of all orders of three sum to one."""
    h, s, _ = draw()
    r, dpo = BETA * h, LOSSES["dpo"]
    close(plackett_luce_loss(dpo, h, beta=BETA), sum(torch.logsumexp(r[:, j:], 1) - r[:, j] for j in range(K)))
    orders = [list(order) for order in itertools.permutations(range(3))]
    total = sum(plackett_luce_loss(dpo, h[:1, order], beta=BETA).neg().exp() for order in orders)
    close(total, torch.ones_like(total))
    # Eq. 6: all opponents alike and N = n - 1.
    close(stage_loss(dpo, h, log_q(s, 0.0), kappa=K - 1, beta=BETA), torch.logsumexp(r, 1) - r[:, 0])


def test_options_of_losses_are_those_of_train():
    """The options of each loss have fields, and train.py's defaults are those of the functions."""
    (told,) = re.findall(r"method: str = .* # LOSS-SAMPLER: (.*)", inspect.getsource(Config))
    assert set(re.findall(r"\w+", told)) == {*PAPER, "and", *samplers.SAMPLERS}
    assert set(PAPER) >= set(extra.OFFICIAL)
    assert set(extra.OFFICIAL.values()) <= set(extra.LISTWISE)
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    for loss in EVERY.values():
        for name, parameter in inspect.signature(loss.function).parameters.items():
            if name in loss.options and name != "beta":
                assert fields[name] == parameter.default, name


def test_lengths_are_asked_for_where_a_loss_needs_them():
    h, s, L = draw()
    for name in ("ipo", "simpo", "rdpo"):
        with pytest.raises(ValueError, match="looks at lengths: pass num_tokens"):
            stage_loss(ALL[name], h, log_q(s), **GIVEN[name])
    for name in ("ipo", "simpo"):  # without length_norm the same as at one token each
        one_token = stage_loss(ALL[name], h, log_q(s), **GIVEN[name], num_tokens=torch.ones_like(L))
        close(one_token, stage_loss(ALL[name], h, log_q(s), **GIVEN[name], length_norm=False))


# ----------------------------------------------------------------------------------------------------------- TRL's code


def trl_pair_loss(loss_type: str, h: Tensor, L: Tensor, label_smoothing: float) -> Tensor:
    """Per-pair losses of TRL's own DPOTrainer._compute_loss, driven without a model. TRL is pinned: its internals move
    with every release.

    A fake model returns per-token log-probs whose sums are h, against reference log-probs of zero; one pair at
    a time, since TRL returns the mean.
    """
    DPOTrainer = pytest.importorskip("trl", reason="TRL is a development extra: pip install hps[dev]").DPOTrainer
    alone = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    stub = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=alone, aux_loss_enabled=False, _tp_size=1,
        _metrics={"train": defaultdict(list)}, precompute_ref_logps=True, _total_train_tokens=0, beta=BETA,
        loss_types=[loss_type], loss_weights=[1.0], label_smoothing=label_smoothing, use_weighting=False,
        ld_alpha=None, f_divergence_type="reverse_kl",
    )  # fmt: skip
    pairs = []
    for pair, lengths in zip(h, L, strict=True):
        T = int(lengths.max())  # completion tokens, right-padded, after one prompt token
        completion = torch.arange(T + 1)[None] <= lengths[:, None]
        completion[:, 0] = False
        blank = dict(entropy=torch.zeros(2, T), is_top1=torch.zeros(2, T).bool(), mean_logits=torch.zeros(2, T))
        log_probs = torch.where(completion[:, 1:], (pair / lengths)[:, None], 0.0)
        outputs = SimpleNamespace(log_probs=log_probs, **blank)
        inputs = dict.fromkeys(("input_ids", "attention_mask"), torch.ones(2, T + 1, dtype=torch.long))
        inputs |= dict.fromkeys(("ref_chosen_logps", "ref_rejected_logps"), torch.zeros(1, dtype=h.dtype))
        inputs["completion_mask"] = completion.long()
        model = lambda outputs=outputs, **kwargs: outputs  # noqa: E731
        pairs.append(DPOTrainer._compute_loss(stub, model, inputs, return_outputs=False))
    return torch.stack(pairs)


TRL_TYPES = {"dpo": "sigmoid", "exo": "exo_pair", "ipo": "ipo", "sppo": "sppo_hard", "nca": "nca_pair"}


@pytest.mark.parametrize("scale", [3.0, 170.0, 3e4])
@pytest.mark.parametrize("name", PAPER)
def test_one_opponent_equals_trl(name, scale):
    """Values and gradients, of small margins, |D| around 50, and around 1e4."""
    h, _, L = draw(seed=1, K=2, scale=scale)
    ours, theirs = h.clone().requires_grad_(), h.clone().requires_grad_()
    given = {**GIVEN[name], "num_tokens": L} | ({"label_smoothing": 0.0} if name == "dpo" else {})  # TRL's ignores it
    one = stage_loss(ALL[name], ours, torch.zeros(B, 1, dtype=h.dtype), **given)
    two = trl_pair_loss(TRL_TYPES[name], theirs, L, given.get("exo_eps", 0.0))
    close(one, two, 1e-6)
    gradients = (torch.autograd.grad(loss.sum(), x)[0] for loss, x in ((one, ours), (two, theirs)))
    close(*gradients, 1e-6)
