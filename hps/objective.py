"""The objective of a run: its loss as one function of log-probs and a batch, and the value that it must begin with."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hps import losses
from hps.batches import Batch
from hps.options import Config, parts, positive_stages
from hps.plan import Plan


def objective(c: Config) -> Callable[[Tensor, Batch], Tensor]:
    """The per-prompt loss of a run, `loss(policy_logps, batch) -> (B,)`, from summed log-probs (B, K) in nats.

    Of a reward model `policy_logps` are its rewards: -log sigmoid(r(chosen) - r(rejected)) (Eq. 15) is DPO on the human
    pair with rewards in the place of log-ratios (see `as_preference`).
    """
    if c.loss == "sft":
        return lambda policy_logps, batch: -policy_logps[:, 0]
    loss, sampler = parts(c)
    options = {key: getattr(c, key) for key in loss.options}

    def per_prompt(policy_logps: Tensor, batch: Batch) -> Tensor:
        h = logratios_of(policy_logps, batch)
        given = {"valid": batch.packed.valid, **options}
        if loss.form != "stage":  # beside the paper's five
            from hps.extra.losses import kto_loss, listwise_loss

            return (
                kto_loss(h, batch.kl, **given) if loss.form == "kto" else listwise_loss(loss, h, batch.rewards, **given)
            )
        given["num_tokens"] = batch.packed.num_tokens
        if sampler == "pl":
            return losses.plackett_luce_loss(loss, h, **given)
        if c.positives > 1:
            return losses.multi_positive_loss(loss, h, batch.log_q, **positive_stages(c), **given)
        return losses.stage_loss(loss, h, batch.log_q, kappa=batch.kappa, **given)

    return per_prompt


def logratios_of(policy_logps: Tensor, batch: Batch) -> Tensor:
    """h = log pi_theta(y|x) - log pi_ref(y|x), (B, K) float32 nats, 0 where a ragged row has no response."""
    return torch.where(batch.packed.valid, policy_logps - batch.ref_logps, 0.0)


def expected_first_loss(c: Config, plan: Plan, rewards: np.ndarray) -> float | None:
    """What the first step's loss must be while policy = reference, in closed form (log 2 for DPO-BT), or None.

    A wrong mask, shift, dropout or dtype shows there, before a step is taken.
    """
    loss, sampler = parts(c)
    if loss.at_reference is None:
        return None
    first, options = list(plan.step(0)), {key: getattr(c, key) for key in loss.options}
    valid = torch.from_numpy(plan.responses[first] >= 0)
    if loss.form == "list":
        from hps.extra.losses import listwise_at_reference

        values = listwise_at_reference(loss, torch.from_numpy(rewards[first]), valid=valid, **options)
    elif loss.form == "kto":
        values = loss.at_reference(valid, **options)
    elif sampler == "pl":
        values = losses.plackett_luce_at_reference(loss, valid, **options)
    elif c.positives > 1:
        values = losses.multi_positive_at_reference(loss, valid, **positive_stages(c), **options)
    else:
        values = loss.at_reference(torch.from_numpy(plan.kappa[first]).double(), **options)
    return float(values.mean())


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
