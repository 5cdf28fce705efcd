"""The objective of a run: its loss as one function of log-probs and a batch, and the value that it must begin with."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hps import losses
from hps.batches import Batch
from hps.extra.losses import KTO, LISTWISE, kto_loss, listwise_at_reference, listwise_loss
from hps.options import Config, parts, positive_weights
from hps.plan import Plan


def objective(c: Config) -> Callable[[Tensor, Batch], Tensor]:
    """The per-prompt loss of a run, `loss(policy_logps, batch) -> (B,)`, from summed log-probs (B, K) in nats.

    Of a reward model `policy_logps` are its rewards: -log sigmoid(r(chosen) - r(rejected)) (Eq. 15) is DPO on the human
    pair with rewards in the place of log-ratios (see `as_preference`).
    """
    if c.loss == "sft":
        return lambda policy_logps, batch: -policy_logps[:, 0]
    name, view, facts = parts(c)
    options = {"beta": c.beta} | {key: getattr(c, key) for key in facts.options}
    if facts is KTO:
        return lambda policy_logps, batch: kto_loss(
            logratios_of(policy_logps, batch), kl=batch.kl, valid=batch.packed.valid, **options
        )
    if name in LISTWISE:
        return lambda policy_logps, batch: listwise_loss(
            name, logratios_of(policy_logps, batch), batch.rewards, **shapes(batch), **options
        )
    options |= {"length_norm": c.length_norm} if facts.length_norm else {}
    if view == "pl":
        return lambda policy_logps, batch: losses.plackett_luce_loss(
            name, logratios_of(policy_logps, batch), **shapes(batch), **options
        )
    if c.positives > 1:
        options |= dict(weights=positive_weights(c), n_factor=c.n_factor, exclude_positives=c.exclude_positives)
        return lambda policy_logps, batch: losses.multi_positive_loss(
            name, logratios_of(policy_logps, batch), batch.log_q, **shapes(batch), **options
        )
    return lambda policy_logps, batch: losses.stage_loss(
        name, logratios_of(policy_logps, batch), batch.log_q, kappa=batch.kappa, **shapes(batch), **options
    )


def logratios_of(policy_logps: Tensor, batch: Batch) -> Tensor:
    """h = log pi_theta(y|x) - log pi_ref(y|x), (B, K) float32 nats, 0 where a ragged row has no response."""
    return torch.where(batch.packed.valid, policy_logps - batch.ref_logps, 0.0)


def shapes(batch: Batch) -> dict[str, Tensor]:
    """Which responses there are, and how many tokens each has, as the losses take them."""
    return {"valid": batch.packed.valid, "num_tokens": batch.packed.num_tokens}


def expected_first_loss(c: Config, plan: Plan, rewards: np.ndarray) -> float | None:
    """What the first step's loss must be while policy = reference, in closed form (log 2 for DPO-BT), or None.

    A wrong mask, shift, dropout or dtype shows there, before a step is taken.
    """
    name, view, facts = parts(c)
    if facts.at_reference is None:
        return None
    options = {"beta": c.beta} | {key: getattr(c, key) for key in facts.options}
    first = list(plan.step(0))
    if name in LISTWISE:
        scores, valid = torch.from_numpy(rewards[first]), torch.from_numpy(plan.responses[first] >= 0)
        return float(listwise_at_reference(name, scores, valid=valid, **options).mean())
    ranks = (plan.responses[first] >= 0).sum(1)
    if c.positives > 1:
        m, weights = c.positives, positive_weights(c)
        opponents = ranks[:, None] - (np.full(m, m) if c.exclude_positives else np.arange(1, m + 1))
        kappas = opponents if c.n_factor == "n_minus_one" else np.ones_like(opponents)
        stages = [[losses.loss_at_reference(name, kappa=float(k), **options) for k in row] for row in kappas]
        return float(np.mean(np.array(stages) @ weights))
    if facts is KTO:
        return float(np.mean([facts.at_reference(float(n) - 1, **options) for n in ranks]))
    if view == "pl":
        return float(np.mean([losses.plackett_luce_at_reference(name, int(n), **options) for n in ranks]))
    return float(np.mean([losses.loss_at_reference(name, kappa=float(k), **options) for k in plan.kappa[first]]))


def check_first_loss(c: Config, expected: float | None, loss: float, largest: float) -> str:
    """A line on the first step's loss and its largest |log-ratio|, nats; ValueError if the loss is not `expected`."""
    known = "not known beforehand" if expected is None else f"expected {expected:.6f}"
    line = f"step 0: loss {loss:.6f}, {known}; largest |log-ratio| {largest:.2g} (should be 0)"
    tolerance = 1e-3 if c.dtype == "fp32" else 5e-2
    if expected is not None and abs(loss - expected) > tolerance * max(1.0, abs(expected)):
        raise ValueError(
            f"step 0: the loss is {loss:.6f}, but with policy = reference {c.method} must give {expected:.6f}. Policy "
            "and reference are scored differently: delete the reference cache if the model's code changed"
        )
    return line
