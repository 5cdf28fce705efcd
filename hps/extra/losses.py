"""Losses beside the paper's five: pure functions of (B, K) tensors, in three forms.

`LOSSES` holds more losses of a stage, as in `hps/losses.py`. Those of `LISTWISE` set all responses against the rewards
themselves; most of them are the official list-wise forms of the paper's losses. KTO looks at every response by itself.
Notation as in `hps/losses.py`; s are the external rewards, t = softmax(s / alpha) the labels made of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hps.losses import ABSENT_LOG_WEIGHT, Loss, Stage

# --------------------------------------------------------------------------------------------------- losses of a stage


def simpo(s: Stage, *, beta: float, target_margin: float = 0.5, length_norm: bool = True) -> Tensor:
    """softplus(target_margin - D) on r = (beta / L) log pi (Eq. 19); its authors name target_margin / beta."""
    h = s.h / s.lengths() if length_norm else s.h
    return F.softplus(target_margin - s.margin(beta * h))


def slic(s: Stage, *, slic_delta: float = 1.0, slic_lambda: float = 0.1) -> Tensor:
    """sum_k q_k max(0, delta - h_w + h_k) - lambda h_w on h = log pi; beta and kappa play no part."""
    # Differs: Eq. 16 draws the regulariser into the max; outside it, as in SLiC-HF, it still acts on won pairs.
    return s.mean(F.relu(slic_delta - s.h[:, :1] + s.h[:, 1:])) - slic_lambda * s.h[:, 0]


def rdpo(s: Stage, *, beta: float, rdpo_alpha: float = 0.01) -> Tensor:
    """softplus(-D) on beta h_i + alpha L_i, which is the reward (hence plus) if h is best for reward - alpha L."""
    return F.softplus(-s.margin(beta * s.h + rdpo_alpha * s.lengths().to(s.h.dtype)))


LOSSES: dict[str, Loss] = {
    "simpo": Loss(simpo, needs_reference=False),
    "slic": Loss(slic, needs_reference=False),
    "rdpo": Loss(rdpo),
}

# ---------------------------------------------------------------------------------------------- losses of a whole list
# Each gives (B, K) terms, which are summed over the valid responses, from h and s (B, K), 0 where invalid, and `valid`.


def exo_rw(h: Tensor, s: Tensor, valid: Tensor, *, beta: float, label_temperature: float = 1.0) -> Tensor:
    """KL(softmax(r) || t): EXO's reverse KL to the rewards' own distribution."""
    log_p = log_softmax_of_valid(beta * h, valid)
    return log_p.exp() * (log_p - log_labels(s, valid, label_temperature))


def infonca(h: Tensor, s: Tensor, valid: Tensor, *, beta: float, label_temperature: float = 1.0) -> Tensor:
    """-sum_i t_i log softmax(r)_i; Eq. 6 as alpha -> 0."""
    return -log_labels(s, valid, label_temperature).exp() * log_softmax_of_valid(beta * h, valid)


def nca_soft(h: Tensor, s: Tensor, valid: Tensor, *, beta: float, label_temperature: float = 1.0) -> Tensor:
    """sum_i t_i sp(-r_i) + (1/n) sum_i sp(r_i); the first stage of NCA-PL as alpha -> 0."""
    r, t = beta * h, log_labels(s, valid, label_temperature).exp()
    return t * F.softplus(-r) + F.softplus(r) / count(s, valid)


def sppo_winrate(h: Tensor, s: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """sum_i (h_i - (Phat_i - 1/2) / beta)^2: the sum over responses, where the official code has the mean."""
    return (h - (win_rates(s, valid) - 0.5) / beta) ** 2


def lipo(h: Tensor, s: Tensor, valid: Tensor, *, beta: float) -> Tensor:
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


# `function(h, s, valid, *, <options>) -> (B, K)`. LiPO's ranks are rounding noise where all h = 0.
LISTWISE: dict[str, Loss] = {
    "exo_rw": Loss(exo_rw, form="list"),
    "infonca": Loss(infonca, form="list"),
    "nca_soft": Loss(nca_soft, form="list"),
    "sppo_winrate": Loss(sppo_winrate, form="list"),
    "lipo": Loss(lipo, continuous=False, form="list"),
}

# What the original papers do with a list, by row of the paper's tables. DPO's and IPO's rows keep `plackett_luce_loss`:
# it is DPO's own form, and IPO has pairs only.
OFFICIAL: dict[str, str] = {"exo": "exo_rw", "sppo": "sppo_winrate", "nca": "nca_soft"}


def listwise_loss(
    loss: Loss, logratios: Tensor, rewards: Tensor, *, valid: Tensor | None = None, **options: Any
) -> Tensor:
    """Per-prompt loss (B,) of a whole list of responses against their rewards; the order of the columns is free.

    Args:
        loss: a value of `LISTWISE`.
        logratios: (B, K) float, h = policy_logps - ref_logps in nats.
        rewards: (B, K) float, external rewards.
        valid: (B, K) bool, at least one in each row; None means all.
        options: beta (KL strength, > 0), and label_temperature, the alpha of the labels, where the loss has it.
    """
    assert logratios.shape == rewards.shape, (logratios.shape, rewards.shape)
    valid = torch.ones_like(logratios, dtype=torch.bool) if valid is None else valid
    h = torch.where(valid, logratios, 0.0)  # what stands in an invalid column must not matter, not even inf
    s = torch.where(valid, rewards.to(h.dtype), 0.0)
    return torch.where(valid, loss.function(h, s, valid, **options), 0.0).sum(1)


def log_labels(s: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """log t, (B, K); finite, whatever the temperature."""
    top = s.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    scaled = ((s - top) / temperature).clamp(min=ABSENT_LOG_WEIGHT)
    return log_softmax_of_valid(scaled, valid)


def log_softmax_of_valid(x: Tensor, valid: Tensor) -> Tensor:
    """log softmax over the valid columns of x (B, K); a huge negative number in the others."""
    return F.log_softmax(torch.where(valid, x, ABSENT_LOG_WEIGHT), dim=1)


def count(s: Tensor, valid: Tensor) -> Tensor:
    """n, how many responses a row has, (B, 1) in the dtype of s."""
    return valid.to(s.dtype).sum(1, keepdim=True).clamp(min=1)


def win_rates(s: Tensor, valid: Tensor) -> Tensor:
    """Phat_i = (1/n) sum_j sigmoid(s_i - s_j), j = i included, (B, K): how often i wins against the list."""
    wins = torch.where(valid[:, None, :], torch.sigmoid(s[:, :, None] - s[:, None, :]), 0.0)
    return wins.sum(2) / count(s, valid)


# ------------------------------------------------------------------------------------------------- responses one by one


def kto_loss(
    logratios: Tensor,
    kl: float | Tensor,
    valid: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Per-prompt KTO loss w_D s(beta (z0 - h_w)) + w_U sum_k s(beta (h_k - z0)), s the sigmoid (App., Eq. 18).

    OURS: the best response is the desirable one, the rest are undesirable.

    Args:
        logratios: (B, K) float, h = policy_logps - ref_logps in nats, column 0 preferred.
        kl: z0 in nats, a float or (B,): mean h of responses put to other prompts; detached, negative counts as 0.
        valid: (B, K) bool, False where a ragged row has no response.
        beta: KL strength, > 0.
        desirable_weight, undesirable_weight: w_D and w_U, >= 0.

    Returns:
        (B,) float.
    """
    h = torch.where(valid, logratios, 0.0)
    z0 = torch.as_tensor(kl, dtype=h.dtype, device=h.device).detach().clamp(min=0).reshape(-1, 1)
    desirable = desirable_weight * torch.sigmoid(beta * (z0[:, 0] - h[:, 0]))
    undesirable = undesirable_weight * torch.sigmoid(beta * (h[:, 1:] - z0))
    return desirable + torch.where(valid[:, 1:], undesirable, 0.0).sum(1)


KTO = Loss(kto_loss, form="kto")
