"""Preference losses: pure functions of (B, K) log-ratios, one table, nothing else.

One *stage* contrasts a winner (column 0) with opponents (columns 1..K-1) that carry normalised log-weights
`log_q`. Every method of the paper is made of stages:

    BT    one stage, the opponent is the lowest-reward response
    HPS   one stage, the opponents are all dispreferred responses weighted by q (Eq. 9), or one draw from q
    PL    the sum over j of the stage (winner j, opponents j+1..n, q uniform, kappa = their number)

Notation: h = `logratios` = log pi_theta(y|x) - log pi_ref(y|x), summed over the response's tokens;
r = beta * h the implicit reward (Eq. 3 without beta log Z, which cancels or is absorbed); kappa the factor N
of Eq. 8 (`n_minus_one`) or 1 (Eq. 10 read literally, one drawn response).

To add a loss: write one function like those below, add one line to `LOSSES`, add one test.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands for log 0. Finite, so that a row without opponents gives a zero loss and a zero gradient, never NaN.
LOG_ZERO = -1e30


def _dpo(h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """softplus(x - r_w) with x = logsumexp_k(r_k + log q_k) + log kappa: Eq. 10 (and Eq. 2 for one opponent)."""
    r = beta * h
    margin = r[:, 0] - torch.logsumexp(r[:, 1:] + log_q, dim=1) - log_kappa  # (B,)
    # cDPO: (1 - e) sp(-D) + e sp(D) = sp(-D) + e D. OURS: on the aggregated margin when there are many opponents.
    return F.softplus(-margin) + label_smoothing * margin


def _exo(h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float, exo_eps: float) -> Tensor:
    """KL(p || t): p = softmax(r_w, r_k + log q_k + log kappa), t = (1 - eps, eps q_k): reverse KL of the stage."""
    r = beta * h
    logits = torch.cat([r[:, :1], r[:, 1:] + log_q + log_kappa[:, None]], dim=1)
    log_p = F.log_softmax(logits, dim=1)
    # log q_k cancels in log p_k - log t_k; leaving it in would give inf - inf where q underflows.
    opponents = r[:, 1:] + log_kappa[:, None] - torch.logsumexp(logits, dim=1, keepdim=True) - math.log(exo_eps)
    opponents = torch.where(valid, log_p[:, 1:].exp() * opponents, 0.0).sum(1)
    return log_p[:, 0].exp() * (log_p[:, 0] - math.log1p(-exo_eps)) + opponents


def _ipo(h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """sum_k q_k (h_w - h_k - 1/(2 beta))^2; linear in the opponents' distribution, so kappa plays no part."""
    squares = (h[:, :1] - h[:, 1:] - 1 / (2 * beta)) ** 2
    return torch.where(valid, log_q.exp() * squares, 0.0).sum(1)


def _sppo(h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """(h_w - 1/(2 beta))^2 + sum_k q_k (h_k + 1/(2 beta))^2: TRL's scale, twice the official code's."""
    target = 1 / (2 * beta)
    return (h[:, 0] - target) ** 2 + torch.where(valid, log_q.exp() * (h[:, 1:] + target) ** 2, 0.0).sum(1)


def _nca(h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float) -> Tensor:
    """sp(-r_w) + [sp(r_w) + kappa sum_k q_k sp(r_k)] / (1 + kappa)."""
    r, kappa = beta * h, log_kappa.exp()
    opponents = torch.where(valid, log_q.exp() * F.softplus(r[:, 1:]), 0.0).sum(1)
    return F.softplus(-r[:, 0]) + (F.softplus(r[:, 0]) + kappa * opponents) / (1 + kappa)


def _dpo_at_reference(kappa: float, *, beta: float, label_smoothing: float) -> float:
    return math.log1p(kappa) - label_smoothing * math.log(kappa)


def _exo_at_reference(kappa: float, *, beta: float, exo_eps: float) -> float:
    winner, rest = 1 / (1 + kappa), kappa / (1 + kappa)
    return winner * (math.log(winner) - math.log1p(-exo_eps)) + rest * (math.log(rest) - math.log(exo_eps))


@dataclass(frozen=True)
class Loss:
    """What the rest of the program needs to know about a loss.

    `stage(h, log_q, log_kappa, valid, *, beta, <options>) -> (B,)`; `at_reference(kappa, *, beta, <options>)`
    is the stage's value where policy = reference (all h = 0), which every run checks at step 0;
    `options` are the keyword options it takes beside beta; `length_norm` says whether h is divided by
    `num_tokens` unless told otherwise.
    """

    stage: Callable[..., Tensor]
    at_reference: Callable[..., float]
    options: tuple[str, ...] = ()
    length_norm: bool = False


LOSSES: dict[str, Loss] = {
    "dpo": Loss(_dpo, _dpo_at_reference, options=("label_smoothing",)),
    "exo": Loss(_exo, _exo_at_reference, options=("exo_eps",)),
    "ipo": Loss(_ipo, lambda kappa, *, beta: 1 / (4 * beta**2), length_norm=True),
    "sppo": Loss(_sppo, lambda kappa, *, beta: 1 / (2 * beta**2)),
    "nca": Loss(_nca, lambda kappa, *, beta: 2 * math.log(2)),
}


def _options(name: str, *, label_smoothing: float, exo_eps: float) -> dict[str, float]:
    """The options that loss `name` takes; ValueError for an unknown loss or an option that it would ignore."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(LOSSES)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if not 0 < exo_eps < 1:
        raise ValueError(f"exo_eps must lie in (0, 1), got {exo_eps}")
    given = {"label_smoothing": label_smoothing, "exo_eps": exo_eps}
    if label_smoothing != 0 and "label_smoothing" not in LOSSES[name].options:
        raise ValueError(f"loss {name!r} does not use label_smoothing; remove it (EXO's own is exo_eps)")
    return {option: given[option] for option in LOSSES[name].options}


def stage_loss(
    name: str,
    logratios: Tensor,
    log_q: Tensor,
    *,
    beta: float,
    kappa: float | Tensor = 1.0,
    valid: Tensor | None = None,
    num_tokens: Tensor | None = None,
    label_smoothing: float = 0.0,
    exo_eps: float = 1e-3,
    length_norm: bool | None = None,
) -> Tensor:
    """Per-prompt loss of one stage: the winner in column 0 against weighted opponents (Eq. 10 for DPO).

    Args:
        name: a key of `LOSSES`.
        logratios: (B, K) float, h = policy_logps - ref_logps in nats, column 0 preferred.
        log_q: (B, K-1) float, log-weights of the opponents, logsumexp 0 over the valid ones.
        beta: KL strength, > 0.
        kappa: the N factor, a float or (B,): 1, or the number of dispreferred responses (Eq. 8).
        valid: (B, K) bool, False where a ragged row has no response; None means all.
        num_tokens: (B, K) int, scored tokens; needed where h is divided by length.
        label_smoothing: cDPO's epsilon in [0, 0.5); DPO only.
        exo_eps: EXO's target mass on the opponents, in (0, 1).
        length_norm: divide h by `num_tokens` first; None takes the loss's convention (IPO yes, as in TRL).

    Returns:
        (B,) float, nats. A row without a valid opponent gives DPO's limit 0; leave such rows out.

    Raises:
        ValueError: unknown name, an option that the loss ignores, or `num_tokens` missing where it is needed.
    """
    options = _options(name, label_smoothing=label_smoothing, exo_eps=exo_eps)
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    B, K = logratios.shape
    assert log_q.shape == (B, K - 1), (log_q.shape, logratios.shape)
    h = logratios
    if LOSSES[name].length_norm if length_norm is None else length_norm:
        if num_tokens is None:
            raise ValueError(f"loss {name!r} divides by length: pass num_tokens, or length_norm=False")
        h = h / num_tokens.clamp(min=1)
    valid = torch.ones_like(h, dtype=torch.bool) if valid is None else valid
    h = torch.where(valid, h, 0.0)  # what stands in an invalid column must not matter, not even if it is inf
    log_q = torch.where(valid[:, 1:], log_q, LOG_ZERO)
    log_kappa = torch.as_tensor(kappa, dtype=h.dtype, device=h.device).log().expand(B)
    return LOSSES[name].stage(h, log_q, log_kappa, valid[:, 1:], beta=beta, **options)


def plackett_luce_loss(
    name: str,
    logratios: Tensor,
    *,
    beta: float,
    valid: Tensor | None = None,
    num_tokens: Tensor | None = None,
    label_smoothing: float = 0.0,
    exo_eps: float = 1e-3,
    length_norm: bool | None = None,
) -> Tensor:
    """Per-prompt Plackett-Luce loss: the sum over ranks j of the stage "j above all that follow" (Eqs. 4-5).

    For DPO this is sum_j (logsumexp_{k >= j} r_k - r_j). For the other losses the stage form is OURS: the
    paper names "EXO-PL" and so on without a formula.

    Args:
        logratios: (B, K) float, columns in ranked order, best first; ragged rows are padded on the right.
        valid: (B, K) bool, a prefix of every row; None means all.
        The others: as in `stage_loss`.

    Returns:
        (B,) float, nats.
    """
    B, K = logratios.shape
    valid = torch.ones_like(logratios, dtype=torch.bool) if valid is None else valid
    total = logratios.new_zeros(B)
    for j in range(K - 1):
        opponents = valid[:, j + 1 :].sum(1)  # (B,) how many follow rank j
        u = opponents.clamp(min=1).to(logratios.dtype)
        stage = stage_loss(
            name,
            logratios[:, j:],
            (-u.log())[:, None].expand(B, K - 1 - j),
            beta=beta,
            kappa=u,
            valid=valid[:, j:],
            num_tokens=None if num_tokens is None else num_tokens[:, j:],
            label_smoothing=label_smoothing,
            exo_eps=exo_eps,
            length_norm=length_norm,
        )
        total = total + torch.where(opponents > 0, stage, 0.0)
    return total


def loss_at_reference(
    name: str, *, beta: float, kappa: float = 1.0, label_smoothing: float = 0.0, exo_eps: float = 1e-3
) -> float:
    """The stage loss where policy = reference, in closed form: log(1 + kappa) for DPO, 1/(4 beta^2) for IPO ..."""
    options = _options(name, label_smoothing=label_smoothing, exo_eps=exo_eps)
    return LOSSES[name].at_reference(kappa, beta=beta, **options)


def plackett_luce_at_reference(
    name: str, n: int, *, beta: float, label_smoothing: float = 0.0, exo_eps: float = 1e-3
) -> float:
    """The PL loss of n ranks where policy = reference: log n! for DPO."""
    smoothing = {"label_smoothing": label_smoothing, "exo_eps": exo_eps}
    return sum(loss_at_reference(name, beta=beta, kappa=u, **smoothing) for u in range(1, n))


def implicit_rewards(logratios: Tensor, *, beta: float) -> Tensor:
    """beta * (policy_logps - ref_logps), (B, K), detached: what metrics call `rewards/...` (Eq. 3)."""
    return beta * logratios.detach()
