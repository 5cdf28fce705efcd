"""Preference losses of a whole list of responses, which are not made of stages: pure functions of (B, K) tensors.

`LISTWISE` holds the losses that set all responses against the rewards themselves, most of them the official list-wise
forms of the losses in `losses.py`; `kto_loss` looks at every response by itself. Notation as in `losses.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hps.losses import LOG_ZERO, Loss, clean, look_up

# Each gives (B, K) terms that are summed over the valid responses; s are the rewards, t = softmax(s / alpha).


def _log_labels(s: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """log t, (B, K); finite, whatever the temperature."""
    top = s.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return F.log_softmax(torch.where(valid, (s - top) / temperature, LOG_ZERO).clamp(min=LOG_ZERO), dim=1)


def _count(s: Tensor, valid: Tensor) -> Tensor:
    """n, (B, 1), in the dtype of s."""
    return valid.to(s.dtype).sum(1, keepdim=True).clamp(min=1)


def _winrate(s: Tensor, valid: Tensor) -> Tensor:
    """Phat_i = (1/n) sum_j sigmoid(s_i - s_j), j = i included, (B, K): how often i wins against the list."""
    wins = torch.where(valid[:, None, :], torch.sigmoid(s[:, :, None] - s[:, None, :]), 0.0)
    return wins.sum(2) / _count(s, valid)


def _exo_rw(h: Tensor, s: Tensor, valid: Tensor, *, beta: float, label_temperature: float) -> Tensor:
    """KL(softmax(r) || t): EXO's reverse KL to the rewards' own distribution."""
    log_p = F.log_softmax(torch.where(valid, beta * h, LOG_ZERO), dim=1)
    return log_p.exp() * (log_p - _log_labels(s, valid, label_temperature))


def _infonca(h: Tensor, s: Tensor, valid: Tensor, *, beta: float, label_temperature: float) -> Tensor:
    """-sum_i t_i log softmax(r)_i; Eq. 6 as alpha -> 0."""
    log_p = F.log_softmax(torch.where(valid, beta * h, LOG_ZERO), dim=1)
    return -_log_labels(s, valid, label_temperature).exp() * log_p


def _nca_soft(h: Tensor, s: Tensor, valid: Tensor, *, beta: float, label_temperature: float) -> Tensor:
    """sum_i t_i sp(-r_i) + (1/n) sum_i sp(r_i); the first stage of NCA-PL as alpha -> 0."""
    r, t = beta * h, _log_labels(s, valid, label_temperature).exp()
    return t * F.softplus(-r) + F.softplus(r) / _count(s, valid)


def _sppo_winrate(h: Tensor, s: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """sum_i (h_i - (Phat_i - 1/2) / beta)^2: the sum over responses, where the official code has the mean."""
    return (h - (_winrate(s, valid) - 0.5) / beta) ** 2


def _lipo(h: Tensor, s: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """LiPO-lambda (Eq. 17): sum over pairs psi_i > psi_j of Delta_ij sp(r_j - r_i), where

    Delta_ij = |2^psi_i - 2^psi_j| |1/log(1 + tau_i) - 1/log(1 + tau_j)|, tau the rank under r (1 = best), detached.
    OURS: psi is s put on a scale of 0 to 1 per prompt, since 2^s of raw rewards overflows; equal r rank by s, or
    the pairs would have no weight before the first update.
    """
    r, model = beta * h, h.detach()
    low = s.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = s.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    psi = torch.where(valid & (high > low), (s - low) / (high - low), 0.0)
    lower, upper = (slice(None), slice(None), None), (slice(None), None)  # x[lower] is x_i, x[upper] x_j of (B, i, j)
    ahead = (model[upper] > model[lower]) | ((model[upper] == model[lower]) & (s[upper] > s[lower]))
    discount = 1 / torch.log(2 + (ahead & valid[upper]).sum(2).to(r.dtype))  # tau_i = 1 + how many are ahead of i
    delta = (2 ** psi[lower] - 2 ** psi[upper]) * (discount[lower] - discount[upper]).abs()
    pairs = valid[lower] & valid[upper] & (psi[lower] > psi[upper])
    return torch.where(pairs, delta * F.softplus(r[upper] - r[lower]), 0.0).sum(2)


@dataclass(frozen=True)
class Listwise:
    """A list-wise loss: `terms(h, s, valid, *, beta, <options>) -> (B, K)`, and the same where all h = 0,
    `at_reference(s, valid, *, beta, <options>)`: None for LiPO, whose ranks are rounding noise there."""

    terms: Callable[..., Tensor]
    at_reference: Callable[..., Tensor] | None
    options: tuple[str, ...] = ()


LISTWISE: dict[str, Listwise] = {
    "exo_rw": Listwise(
        _exo_rw,
        lambda s, valid, *, beta, label_temperature: (
            -(_count(s, valid).log() + _log_labels(s, valid, label_temperature)) / _count(s, valid)
        ),
        options=("label_temperature",),
    ),
    "infonca": Listwise(
        _infonca,
        lambda s, valid, *, beta, label_temperature: _count(s, valid).log() / _count(s, valid),
        options=("label_temperature",),
    ),
    "nca_soft": Listwise(
        _nca_soft,
        lambda s, valid, *, beta, label_temperature: 2 * math.log(2) / _count(s, valid),
        options=("label_temperature",),
    ),
    "sppo_winrate": Listwise(_sppo_winrate, lambda s, valid, *, beta: (_winrate(s, valid) - 0.5) ** 2 / beta**2),
    "lipo": Listwise(_lipo, None),
}

# What the original papers do with a list, by row of the paper's tables. None: `plackett_luce_loss` stays (it is
# DPO's own form; IPO has pairs only).
OFFICIAL: dict[str, str | None] = {"dpo": None, "exo": "exo_rw", "ipo": None, "sppo": "sppo_winrate", "nca": "nca_soft"}


def listwise_loss(
    name: str,
    logratios: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    valid: Tensor | None = None,
    num_tokens: Tensor | None = None,
    length_norm: bool = False,
    **options: float,
) -> Tensor:
    """Per-prompt loss of a whole list of responses against their rewards; the order of the columns is free.

    Args:
        name: a key of `LISTWISE`.
        logratios: (B, K) float, h = policy_logps - ref_logps in nats.
        rewards: (B, K) float, external rewards.
        beta: KL strength, > 0.
        valid: (B, K) bool, at least one to a row; None means all.
        num_tokens: (B, K) int, scored tokens; needed with length_norm.
        length_norm: divide h by `num_tokens` first.
        options: label_temperature, the alpha of the labels softmax(rewards / alpha), where the loss has them.

    Returns:
        (B,) float.

    Raises:
        ValueError: unknown name, an option out of range or ignored, or `num_tokens` missing where it is needed.
    """
    assert logratios.shape == rewards.shape, (logratios.shape, rewards.shape)
    loss, taken = look_up(LISTWISE, name, options)
    h, valid = clean(name, logratios, beta=beta, valid=valid, num_tokens=num_tokens, length_norm=length_norm)
    s = torch.where(valid, rewards.to(h.dtype), 0.0)
    return torch.where(valid, loss.terms(h, s, valid, beta=beta, **taken), 0.0).sum(1)


def listwise_at_reference(
    name: str, rewards: Tensor, *, beta: float, valid: Tensor | None = None, **options: float
) -> Tensor:
    """The list-wise loss (B,) where policy = reference, in closed form from rewards (B, K): log n for InfoNCA.

    Raises:
        ValueError: lipo, whose value is unknown before training, or as `listwise_loss`.
    """
    loss, taken = look_up(LISTWISE, name, options)
    if loss.at_reference is None:
        raise ValueError(f"loss {name!r} ranks by rounding noise there: its value is unknown before training")
    s, valid = clean(name, rewards, beta=beta, valid=valid, num_tokens=None, length_norm=False)
    return torch.where(valid, loss.at_reference(s, valid, beta=beta, **taken), 0.0).sum(1)


# -------------------------------------------------------------------------------------- responses one by one


def kto_loss(
    logratios: Tensor,
    *,
    beta: float,
    kl: float | Tensor,
    valid: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Per-prompt KTO loss w_D s(beta (z0 - h_w)) + w_U sum_k s(beta (h_k - z0)), s the sigmoid (App., Eq. 18).

    OURS: the best response is the desirable one, the rest are undesirable.

    Args:
        logratios: (B, K) float, h = policy_logps - ref_logps in nats, column 0 preferred.
        beta: KL strength, > 0.
        kl: z0 in nats, a float or (B,): mean h of responses put to other prompts; detached, negative counts as 0.
        valid: (B, K) bool; None means all.
        desirable_weight, undesirable_weight: w_D and w_U, >= 0.

    Returns:
        (B,) float; (w_D + w_U (n - 1)) / 2 where policy = reference.

    Raises:
        ValueError: beta not positive, or a negative weight.
    """
    if min(desirable_weight, undesirable_weight) < 0:
        raise ValueError(f"KTO's weights must not be negative, got {desirable_weight} and {undesirable_weight}")
    h, valid = clean("kto", logratios, beta=beta, valid=valid, num_tokens=None, length_norm=False)
    z0 = torch.as_tensor(kl, dtype=h.dtype, device=h.device).detach().clamp(min=0).reshape(-1, 1)
    desirable = desirable_weight * torch.sigmoid(beta * (z0[:, 0] - h[:, 0]))
    undesirable = undesirable_weight * torch.sigmoid(beta * (h[:, 1:] - z0))
    return desirable + torch.where(valid[:, 1:], undesirable, 0.0).sum(1)


def _kto_at_reference(opponents: float, *, beta: float, desirable_weight: float, undesirable_weight: float) -> float:
    return (desirable_weight + undesirable_weight * opponents) / 2


# KTO's facts in the form of a stage loss's. It has no q and no kappa: `stage` is called with z0 in their place, and
# `at_reference` with the number of undesirable responses.
KTO = Loss(kto_loss, _kto_at_reference, options=("desirable_weight", "undesirable_weight"))
