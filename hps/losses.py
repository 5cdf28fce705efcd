"""Preference losses: pure functions of (B, K) log-ratios, two tables, nothing else.

One *stage* contrasts a winner (column 0) with opponents (columns 1..K-1) that carry normalised log-weights
`log_q`. Every method of the paper is made of stages:

    BT    one stage, the opponent is the lowest-reward response
    HPS   one stage, the opponents are all dispreferred responses weighted by q (Eq. 9), or one draw from q
    PL    the sum over j of the stage (winner j, opponents j+1..n, q uniform, kappa = their number)

Notation: h = `logratios` = log pi_theta(y|x) - log pi_ref(y|x), summed over the response's tokens;
r = beta * h the implicit reward (Eq. 3 without beta log Z, which cancels or is absorbed); kappa the factor N
of Eq. 8 (`n_minus_one`) or 1 (Eq. 10 read literally, one drawn response).

Losses that are not made of stages stand in `losses_listwise.py`.

To add a loss: write one function like those below, add one line to `LOSSES` (and one to `OPTIONS` for an option
of its own), add one test.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Stands for log 0. Finite, so that a row without opponents gives a zero loss and a zero gradient, never NaN.
LOG_ZERO = -1e30


class Option(NamedTuple):
    default: float
    allowed: Callable[[float], bool]
    range: str  # `allowed` in words


# What losses can be told beside beta.
OPTIONS: dict[str, Option] = {
    "label_smoothing": Option(0.0, lambda x: 0 <= x < 0.5, "[0, 0.5)"),
    "exo_eps": Option(1e-3, lambda x: 0 < x < 1, "(0, 1)"),
    "target_margin": Option(0.5, lambda x: 0 <= x < math.inf, "[0, inf)"),
    "slic_delta": Option(1.0, lambda x: 0 < x < math.inf, "(0, inf)"),
    "slic_lambda": Option(0.1, lambda x: 0 <= x < math.inf, "[0, inf)"),
    "rdpo_alpha": Option(0.01, lambda x: 0 <= x < math.inf, "[0, inf)"),
    "label_temperature": Option(1.0, lambda x: 0 < x < math.inf, "(0, inf)"),
    "desirable_weight": Option(1.0, lambda x: 0 <= x < math.inf, "[0, inf)"),
    "undesirable_weight": Option(1.0, lambda x: 0 <= x < math.inf, "[0, inf)"),
}

# ------------------------------------------------------------------------------------------- losses of a stage


def _margin(r: Tensor, log_q: Tensor, log_kappa: Tensor) -> Tensor:
    """D = r_w - x against the aggregated opponent x = logsumexp_k(r_k + log q_k) + log kappa, (B,)."""
    return r[:, 0] - torch.logsumexp(r[:, 1:] + log_q, dim=1) - log_kappa


def _dpo(h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """softplus(-D): Eq. 10 (and Eq. 2 for one opponent)."""
    margin = _margin(beta * h, log_q, log_kappa)
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


def _simpo(h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float, target_margin: float) -> Tensor:
    """softplus(target_margin - D) on r = (beta / L) log pi (Eq. 19); its authors name target_margin / beta."""
    return F.softplus(target_margin - _margin(beta * h, log_q, log_kappa))


def _slic(
    h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float, slic_delta: float, slic_lambda: float
) -> Tensor:
    """sum_k q_k max(0, delta - h_w + h_k) - lambda h_w on h = log pi; beta and kappa play no part."""
    # Differs: Eq. 16 draws the regulariser into the max; outside it, as in SLiC-HF, it still acts on won pairs.
    hinges = F.relu(slic_delta - h[:, :1] + h[:, 1:])
    return torch.where(valid, log_q.exp() * hinges, 0.0).sum(1) - slic_lambda * h[:, 0]


def _rdpo(
    h: Tensor, log_q: Tensor, log_kappa: Tensor, valid: Tensor, *, beta: float, rdpo_alpha: float, num_tokens: Tensor
) -> Tensor:
    """softplus(-D) on beta h_i + alpha L_i, which is the reward (hence plus) if h is best for reward - alpha L."""
    return F.softplus(-_margin(beta * h + rdpo_alpha * num_tokens.to(h.dtype), log_q, log_kappa))


def _dpo_at_reference(kappa: float, *, beta: float, label_smoothing: float) -> float:
    return math.log1p(kappa) - label_smoothing * math.log(kappa)


def _exo_at_reference(kappa: float, *, beta: float, exo_eps: float) -> float:
    winner, rest = 1 / (1 + kappa), kappa / (1 + kappa)
    return winner * (math.log(winner) - math.log1p(-exo_eps)) + rest * (math.log(rest) - math.log(exo_eps))


@dataclass(frozen=True)
class Loss:
    """What the rest of the program needs to know about a loss.

    `stage(h, log_q, log_kappa, valid, *, beta, <options>) -> (B,)`; `at_reference(kappa, *, beta, <options>)`
    is the stage's value where policy = reference (all h = 0), which every run checks at step 0, and None where
    that is unknown before training: without a reference h is log pi itself, and R-DPO's depends on lengths;
    `options` are the keys of `OPTIONS` that it takes beside beta; `length_norm` says whether h is divided by
    `num_tokens` unless told otherwise, `needs_length` whether the stage takes `num_tokens` (B, K) itself;
    without `needs_reference`, h is the policy's summed log-prob; without `needs_beta`, beta plays no part.
    """

    stage: Callable[..., Tensor]
    at_reference: Callable[..., float] | None
    options: tuple[str, ...] = ()
    length_norm: bool = False
    needs_length: bool = False
    needs_reference: bool = True
    needs_beta: bool = True


LOSSES: dict[str, Loss] = {
    "dpo": Loss(_dpo, _dpo_at_reference, options=("label_smoothing",)),
    "exo": Loss(_exo, _exo_at_reference, options=("exo_eps",)),
    "ipo": Loss(_ipo, lambda kappa, *, beta: 1 / (4 * beta**2), length_norm=True),
    "sppo": Loss(_sppo, lambda kappa, *, beta: 1 / (2 * beta**2)),
    "nca": Loss(_nca, lambda kappa, *, beta: 2 * math.log(2)),
    "rdpo": Loss(_rdpo, None, options=("rdpo_alpha",), needs_length=True),
    "simpo": Loss(_simpo, None, options=("target_margin",), length_norm=True, needs_reference=False),
    "slic": Loss(_slic, None, options=("slic_delta", "slic_lambda"), needs_reference=False, needs_beta=False),
}


def look_up(table: Mapping[str, Any], name: str, given: Mapping[str, float]) -> tuple[Any, dict[str, float]]:
    """The loss's facts and all the options it takes; ValueError for one that is unknown, ignored or out of range."""
    if name not in table:
        raise ValueError(f"unknown loss {name!r}; choose one of {', '.join(table)}")
    takes = table[name].options
    for option, value in given.items():
        if option not in OPTIONS:
            raise ValueError(f"unknown option {option!r}; there are {', '.join(OPTIONS)}")
        if not OPTIONS[option].allowed(value):
            raise ValueError(f"{option} must lie in {OPTIONS[option].range}, got {value}")
        if value != OPTIONS[option].default and option not in takes:
            raise ValueError(f"loss {name!r} does not use {option}; remove it (it takes {', '.join(takes) or 'none'})")
    return table[name], {option: given.get(option, OPTIONS[option].default) for option in takes}


def clean(
    name: str, h: Tensor, *, beta: float, valid: Tensor | None, num_tokens: Tensor | None, length_norm: bool
) -> tuple[Tensor, Tensor]:
    """h, divided by length where asked and 0 where invalid, and `valid` as a tensor."""
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if length_norm:
        if num_tokens is None:
            raise ValueError(f"loss {name!r} divides by length: pass num_tokens, or length_norm=False")
        h = h / num_tokens.clamp(min=1)
    valid = torch.ones_like(h, dtype=torch.bool) if valid is None else valid
    return torch.where(valid, h, 0.0), valid  # what stands in an invalid column must not matter, not even inf


def stage_loss(
    name: str,
    logratios: Tensor,
    log_q: Tensor,
    *,
    beta: float,
    kappa: float | Tensor = 1.0,
    valid: Tensor | None = None,
    num_tokens: Tensor | None = None,
    length_norm: bool | None = None,
    **options: float,
) -> Tensor:
    """Per-prompt loss of one stage: the winner in column 0 against weighted opponents (Eq. 10 for DPO).

    Args:
        name: a key of `LOSSES`.
        logratios: (B, K) float, h = policy_logps - ref_logps in nats, column 0 preferred; policy_logps
            themselves for a loss without `needs_reference`.
        log_q: (B, K-1) float, log-weights of the opponents, logsumexp 0 over the valid ones.
        beta: KL strength, > 0.
        kappa: the N factor, a float or (B,): 1, or the number of dispreferred responses (Eq. 8).
        valid: (B, K) bool, False where a ragged row has no response; None means all.
        num_tokens: (B, K) int, scored tokens; needed where h is divided by length, and by R-DPO.
        length_norm: divide h by `num_tokens` first; None takes the loss's convention (IPO yes, as in TRL).
        options: those of `OPTIONS` that the loss takes, with their defaults: label_smoothing (cDPO's epsilon), exo_eps
            (EXO's target mass on the opponents), target_margin (SimPO, units of reward), slic_delta and slic_lambda
            (nats), rdpo_alpha (reward per token).

    Returns:
        (B,) float, nats. A row without a valid opponent gives DPO's limit 0; leave such rows out.

    Raises:
        ValueError: unknown name, an option out of range or ignored, or `num_tokens` missing where the loss needs it.
    """
    B, K = logratios.shape
    assert log_q.shape == (B, K - 1), (log_q.shape, logratios.shape)
    loss, taken = look_up(LOSSES, name, options)
    divide = loss.length_norm if length_norm is None else length_norm
    h, valid = clean(name, logratios, beta=beta, valid=valid, num_tokens=num_tokens, length_norm=divide)
    if loss.needs_length and num_tokens is None:
        raise ValueError(f"loss {name!r} adds a term for length: pass num_tokens")
    more: dict[str, Any] = {"num_tokens": num_tokens} if loss.needs_length else {}
    log_q = torch.where(valid[:, 1:], log_q, LOG_ZERO)
    log_kappa = torch.as_tensor(kappa, dtype=h.dtype, device=h.device).log().expand(B)
    return loss.stage(h, log_q, log_kappa, valid[:, 1:], beta=beta, **taken, **more)


def plackett_luce_loss(
    name: str,
    logratios: Tensor,
    *,
    beta: float,
    valid: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Per-prompt Plackett-Luce loss: the sum over ranks j of the stage "j above all that follow" (Eqs. 4-5).

    For DPO this is sum_j (logsumexp_{k >= j} r_k - r_j). For the other losses the stage form is OURS: the
    paper names "EXO-PL" and so on without a formula.

    Args:
        logratios: (B, K) float, columns in ranked order, best first; ragged rows are padded on the right.
        valid: (B, K) bool, a prefix of every row; None means all.
        options: what else `stage_loss` takes.

    Returns:
        (B,) float, nats.
    """
    # Every rank a positive, opponents weighted alike (gamma = 0), kappa their number.
    alike, ones = torch.zeros_like(logratios[:, 1:]), [1.0] * logratios.shape[1]
    return multi_positive_loss(
        name, logratios, alike, beta=beta, weights=ones, n_factor="n_minus_one", valid=valid, **options
    )


def multi_positive_loss(
    name: str,
    logratios: Tensor,
    log_q: Tensor,
    *,
    beta: float,
    weights: Sequence[float],
    n_factor: str = "one",
    exclude_positives: bool = False,
    valid: Tensor | None = None,
    num_tokens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Per-prompt loss with m valid responses, L = sum_j lambda_j L_j (App. E); L_j has the winner j.

    Args:
        logratios: (B, K) float, columns in ranked order, the m = len(weights) positives first; rows padded right.
        log_q: (B, K-1) float, log-weights of columns 1..K-1 (Eq. 9). Those of a stage are these, normalised over its
            opponents: q_2 of the appendix is q_1 given that y_2 is not drawn.
        weights: lambda_1..lambda_m, not negative. A stage that a row is too short for adds 0 to it.
        n_factor: `one`, or `n_minus_one` (kappa is the number of the stage's opponents).
        exclude_positives: False contrasts j with j+1..n, as the appendix's formula does, so that y_2 is an
            opponent of y_1; True with m+1..n only, as its text says.
        valid: (B, K) bool, a prefix of every row; None means all.
        The others: as in `stage_loss`.

    Returns:
        (B,) float, nats.

    Raises:
        ValueError: as `stage_loss`; no weight or a negative one; unknown n_factor.
    """
    if not weights or min(weights) < 0:
        raise ValueError(f"weights must be one number >= 0 for each positive response, got {list(weights)}")
    if n_factor not in ("one", "n_minus_one"):
        raise ValueError(f"unknown n_factor {n_factor!r}; choose one of one, n_minus_one")
    B, K = logratios.shape
    valid = torch.ones_like(logratios, dtype=torch.bool) if valid is None else valid
    logits = F.pad(torch.where(valid[:, 1:], log_q, LOG_ZERO), (1, 0))  # (B, K); the winner's is never looked at
    total = logratios.new_zeros(B)
    for j, weight in enumerate(weights):
        columns = [j, *range(len(weights) if exclude_positives else j + 1, K)]
        if len(columns) == 1:
            break
        opponents = valid[:, columns[1:]].sum(1)  # (B,)
        u = opponents.clamp(min=1).to(logratios.dtype)
        stage = stage_loss(
            name,
            logratios[:, columns],
            F.log_softmax(logits[:, columns[1:]], dim=1),
            beta=beta,
            kappa=u if n_factor == "n_minus_one" else 1.0,
            valid=valid[:, columns],
            num_tokens=None if num_tokens is None else num_tokens[:, columns],
            **options,
        )
        total = total + torch.where(opponents > 0, weight * stage, 0.0)
    return total


def loss_at_reference(name: str, *, beta: float, kappa: float = 1.0, **options: float) -> float:
    """The stage loss where policy = reference, in closed form: log(1 + kappa) for DPO, 1/(4 beta^2) for IPO ...

    Raises:
        ValueError: a loss whose value is unknown before training (simpo, slic, rdpo), or as `stage_loss`.
    """
    loss, taken = look_up(LOSSES, name, options)
    if loss.at_reference is None:
        why = "has no reference, so it depends on the policy"
        if loss.needs_reference:
            why = "depends on the lengths"
        raise ValueError(f"loss {name!r} {why}: its value is unknown before training, make no check against it")
    return loss.at_reference(kappa, beta=beta, **taken)


def plackett_luce_at_reference(name: str, n: int, *, beta: float, **options: float) -> float:
    """The PL loss of n ranks where policy = reference: log n! for DPO. Raises as `loss_at_reference`."""
    return sum(loss_at_reference(name, beta=beta, kappa=u, **options) for u in range(1, n))


def implicit_rewards(logratios: Tensor, *, beta: float) -> Tensor:
    """beta * (policy_logps - ref_logps), (B, K), detached: what metrics call `rewards/...` (Eq. 3)."""
    return beta * logratios.detach()
