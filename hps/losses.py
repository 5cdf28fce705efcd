"""Preference losses: pure functions of (B, K) log-ratios and one table, nothing else.

One *stage* contrasts a winner (column 0) with opponents (columns 1..K-1) that carry normalised log-weights
`log_q`. Every method of the paper is made of stages:

    BT    one stage, the opponent is the lowest-reward response
    HPS   one stage, the opponents are all dispreferred responses weighted by q (Eq. 9), or one draw from q
    PL    the sum over j of the stage (winner j, opponents j+1..n, q uniform, kappa = their number)

Notation: h = log pi_theta(y|x) - log pi_ref(y|x), summed over the response's tokens; r = beta * h the implicit reward
(Eq. 3 without beta log Z, which cancels or is absorbed); kappa the factor N of Eq. 8 (`n_minus_one`) or 1 (Eq. 10 read
literally, one drawn response). The losses beside the paper's five are in `extra/losses.py`.

To add a loss: write one function like those below, add one line to `LOSSES`, add one test. Its keyword-only arguments
are options of train.py; a new one needs a field of `options.Config` with its help text, and may have a line in
`options.RANGES`.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The log-weight of a response that is absent. Finite, so that a row without opponents gives a zero loss and a zero
# gradient, never NaN.
ABSENT_LOG_WEIGHT = -1e30


@dataclass(frozen=True)
class Stage:
    """What a stage's loss is computed from: one winner and its opponents for each of B prompts."""

    h: Tensor  # (B, K) float, log-ratios in nats, column 0 the winner; 0 where a ragged row has no response
    log_q: Tensor  # (B, K-1) float, log-weights of the opponents, logsumexp 0; ABSENT_LOG_WEIGHT where there is none
    log_kappa: Tensor  # (B,) float
    valid: Tensor  # (B, K-1) bool, False where there is no opponent
    num_tokens: Tensor | None  # (B, K) int, scored tokens

    def lengths(self) -> Tensor:
        """Scored tokens of each response, at least 1, (B, K) int; ValueError if the caller gave none."""
        if self.num_tokens is None:
            raise ValueError("this loss looks at lengths: pass num_tokens")
        return self.num_tokens.clamp(min=1)

    def mean(self, x: Tensor) -> Tensor:
        """sum_k q_k x_k over the opponents, (B,), of x (B, K-1)."""
        return torch.where(self.valid, self.log_q.exp() * x, 0.0).sum(1)

    def margin(self, r: Tensor) -> Tensor:
        """D = r_w - x against the aggregated opponent x = logsumexp_k(r_k + log q_k) + log kappa, (B,)."""
        return r[:, 0] - torch.logsumexp(r[:, 1:] + self.log_q, dim=1) - self.log_kappa


# --------------------------------------------------------------------------------------------------- losses of a stage


def dpo(s: Stage, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """softplus(-D): Eq. 10 (and Eq. 2 for one opponent)."""
    margin = s.margin(beta * s.h)
    # cDPO: (1 - e) sp(-D) + e sp(D) = sp(-D) + e D. OURS: on the aggregated margin when there are many opponents.
    return F.softplus(-margin) + label_smoothing * margin


def exo(s: Stage, *, beta: float, exo_eps: float = 1e-3) -> Tensor:
    """KL(p || t): p = softmax(r_w, r_k + log q_k + log kappa), t = (1 - eps, eps q_k): reverse KL of the stage."""
    r, log_kappa = beta * s.h, s.log_kappa[:, None]
    logits = torch.cat([r[:, :1], r[:, 1:] + s.log_q + log_kappa], dim=1)
    log_p = F.log_softmax(logits, dim=1)
    # log q_k cancels in log p_k - log t_k; leaving it in would give inf - inf where q underflows.
    opponents = r[:, 1:] + log_kappa - torch.logsumexp(logits, dim=1, keepdim=True) - math.log(exo_eps)
    opponents = torch.where(s.valid, log_p[:, 1:].exp() * opponents, 0.0).sum(1)
    return log_p[:, 0].exp() * (log_p[:, 0] - math.log1p(-exo_eps)) + opponents


def ipo(s: Stage, *, beta: float, length_norm: bool = True) -> Tensor:
    """sum_k q_k (h_w - h_k - 1/(2 beta))^2; linear in the opponents' distribution, so kappa plays no part."""
    h = s.h / s.lengths() if length_norm else s.h  # nats per token, as in TRL
    return s.mean((h[:, :1] - h[:, 1:] - 1 / (2 * beta)) ** 2)


def sppo(s: Stage, *, beta: float) -> Tensor:
    """(h_w - 1/(2 beta))^2 + sum_k q_k (h_k + 1/(2 beta))^2: TRL's scale, twice the official code's."""
    target = 1 / (2 * beta)
    return (s.h[:, 0] - target) ** 2 + s.mean((s.h[:, 1:] + target) ** 2)


def nca(s: Stage, *, beta: float) -> Tensor:
    """sp(-r_w) + [sp(r_w) + kappa sum_k q_k sp(r_k)] / (1 + kappa)."""
    r, kappa = beta * s.h, s.log_kappa.exp()
    opponents = s.mean(F.softplus(r[:, 1:]))
    return F.softplus(-r[:, 0]) + (F.softplus(r[:, 0]) + kappa * opponents) / (1 + kappa)


@dataclass(frozen=True)
class Loss:
    """What the rest of the program needs to know about a loss.

    `function(stage, *, <options>) -> (B,)`. Without `needs_reference`, h is the policy's summed log-prob itself. Where
    it is not `continuous` at policy = reference, rounding decides its first value, which then goes unchecked. This is
    the form `stage`; the forms `list` and `kto` of `extra/losses.py` have other arguments.
    """

    function: Callable[..., Tensor]
    needs_reference: bool = True
    continuous: bool = True
    form: str = "stage"

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its options, beta among them: the keyword-only arguments of its function."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo),
    "exo": Loss(exo),
    "ipo": Loss(ipo),
    "sppo": Loss(sppo),
    "nca": Loss(nca),
}


# ---------------------------------------------------------------------------- one stage, several positives, all ranks


def stage_loss(
    loss: Loss,
    logratios: Tensor,
    log_q: Tensor,
    *,
    kappa: float | Tensor = 1.0,
    valid: Tensor | None = None,
    num_tokens: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Per-prompt loss of one stage: the winner in column 0 against weighted opponents (Eq. 10 for DPO).

    Args:
        loss: a value of `LOSSES`.
        logratios: (B, K) float, h = policy_logps - ref_logps in nats, column 0 preferred; policy_logps
            themselves for a loss without `needs_reference`.
        log_q: (B, K-1) float, log-weights of the opponents, logsumexp 0 over the valid ones.
        kappa: the N factor, a float or (B,): 1, or the number of dispreferred responses (Eq. 8).
        valid: (B, K) bool, False where a ragged row has no response; None means all.
        num_tokens: (B, K) int, scored tokens; needed by a loss that looks at lengths.
        options: the loss's own: beta (KL strength, > 0), label_smoothing (cDPO's epsilon), ...

    Returns:
        (B,) float, nats. A row without a valid opponent gives DPO's limit 0; leave such rows out.
    """
    B, K = logratios.shape
    assert log_q.shape == (B, K - 1), (log_q.shape, logratios.shape)
    valid = torch.ones_like(logratios, dtype=torch.bool) if valid is None else valid
    stage = Stage(
        h=torch.where(valid, logratios, 0.0),  # what stands in an invalid column must not matter, not even inf
        log_q=torch.where(valid[:, 1:], log_q, ABSENT_LOG_WEIGHT),
        log_kappa=torch.as_tensor(kappa, dtype=logratios.dtype, device=logratios.device).log().expand(B),
        valid=valid[:, 1:],
        num_tokens=num_tokens,
    )
    return loss.function(stage, **options)


def multi_positive_loss(
    loss: Loss,
    logratios: Tensor,
    log_q: Tensor,
    *,
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
    """
    valid = torch.ones_like(logratios, dtype=torch.bool) if valid is None else valid
    log_weights = F.pad(torch.where(valid[:, 1:], log_q, ABSENT_LOG_WEIGHT), (1, 0))  # (B, K); the winner's is not read
    total = logratios.new_zeros(len(logratios))
    for weight, columns, opponents, kappa in stages_of(valid, weights, n_factor, exclude_positives):
        value = stage_loss(
            loss,
            logratios[:, columns],
            F.log_softmax(log_weights[:, columns[1:]], dim=1),
            kappa=kappa.to(logratios.dtype),
            valid=valid[:, columns],
            num_tokens=None if num_tokens is None else num_tokens[:, columns],
            **options,
        )
        total = total + torch.where(opponents > 0, weight * value, 0.0)
    return total


def plackett_luce_loss(loss: Loss, logratios: Tensor, *, valid: Tensor | None = None, **options: Any) -> Tensor:
    """Per-prompt Plackett-Luce loss (B,): the sum over ranks j of the stage "j above all that follow" (Eqs. 4-5).

    For DPO this is sum_j (logsumexp_{k >= j} r_k - r_j). For the other losses the stage form is OURS: the
    paper names "EXO-PL" and so on without a formula. logratios, valid: as in `multi_positive_loss`, ranked.
    """
    # Every rank a positive, opponents weighted alike (gamma = 0), kappa their number.
    alike, ranks = torch.zeros_like(logratios[:, 1:]), dict(weights=[1.0] * logratios.shape[1], n_factor="n_minus_one")
    return multi_positive_loss(loss, logratios, alike, valid=valid, **ranks, **options)


def stages_of(
    valid: Tensor, weights: Sequence[float], n_factor: str, exclude_positives: bool
) -> Iterator[tuple[float, list[int], Tensor, Tensor]]:
    """The stages of several positives: weight, columns with the winner first, opponents per row (B,), kappa (B,)."""
    for j, weight in enumerate(weights):
        columns = [j, *range(len(weights) if exclude_positives else j + 1, valid.shape[1])]
        if len(columns) > 1:
            opponents = valid[:, columns[1:]].sum(1)
            at_least_one = opponents.clamp(min=1)
            yield weight, columns, opponents, at_least_one if n_factor == "n_minus_one" else torch.ones_like(opponents)
