"""What the first step's loss must be, known before it: a wrong mask, shift, dropout or dtype shows there."""

import numpy as np
import torch

from hps import losses
from hps.extra.losses import KTO, LISTWISE, listwise_at_reference
from hps.options import Config, parts, positive_weights
from hps.plan import Plan


def expected_first_loss(c: Config, plan: Plan, rewards: np.ndarray) -> float | None:
    """What the first step's loss must be while policy = reference, in closed form (log 2 for DPO-BT), or None."""
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
