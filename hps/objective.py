"""The objective of a run: its loss as one function of log-probs and a batch, the check of its first value, and what the
log says of a step."""

from collections.abc import Callable

import torch
from torch import Tensor

from hps import dist, losses
from hps.batches import Batch
from hps.options import Config, parts, positive_stages

# Per-prompt values of the log, in the order of `Statistics.sums`; names are the field's.
METRICS = ("loss", *(f"rewards/{which}" for which in ("chosen", "rejected", "margins", "accuracies")))
METRICS += ("logps/chosen", "logps/rejected")
METRICS_OF = {"sft": METRICS[:1], "reward": METRICS[:5], "preference": METRICS}


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


def check_first_loss(c: Config, loss: float, expected: float, largest: list[float]) -> str:
    """A line on the first step's loss and largest |log-ratio| (as in `Statistics`); ValueError unless the loss is the
    `expected` one, where policy = reference, and the other 0. A wrong mask, shift, dropout or dtype shows there."""
    known = f"expected {expected:.6f}" if parts(c)[0].continuous else "not known beforehand"
    tolerance = 1e-3 if c.dtype == "fp32" else 5e-2
    if parts(c)[0].continuous and abs(loss - expected) > tolerance * max(1.0, abs(expected)):
        raise ValueError(
            f"step 0: the loss is {loss:.6f}, but with policy = reference {c.method} must give {expected:.6f}. Policy "
            "and reference are scored differently: delete the reference cache if the model's code changed"
        )
    # Differences that cancel in the mean. Rounding adds up like a random walk over the tokens of a response.
    if not largest[1] <= (1e-3 if c.dtype == "fp32" else 0.2):
        raise ValueError(
            f"step 0: a response's log-ratio is {largest[0]:.3g} nats where policy = reference must give 0, more than "
            f"{c.dtype} rounds: they are scored differently; delete the reference cache if the model's code changed"
        )
    return f"step 0: loss {loss:.6f}, {known}; largest |log-ratio| {largest[0]:.2g} (should be 0)"


class Statistics:
    """Sums over the prompts of one step, kept on the device until they are read once.

    sums: (len(METRICS) + 3,) float64: the columns of METRICS, the loss where policy = reference if it was asked for,
    and how many ranks want to stop and to save. expected: that loss as a mean over the step's prompts, once read.
    largest: (2,) largest |log-ratio| of this rank, nats, and largest divided by the root of the response's tokens.
    """

    def __init__(self, c: Config, device: torch.device) -> None:
        self._c = c
        self.sums = torch.zeros(len(METRICS) + 3, dtype=torch.float64, device=device)
        self.largest = torch.zeros(2, device=device)
        self.expected = 0.0

    def add(self, per_prompt: Tensor, policy_logps: Tensor, batch: Batch) -> None:
        """Add a micro-batch: its losses (B,) and the policy's log-probs (B, K), nats."""
        columns, logps = [per_prompt.detach()], policy_logps.detach()
        if self._c.loss != "sft":
            h = logratios_of(logps, batch)
            per_token = h / batch.packed.num_tokens.clamp(min=1).sqrt()
            self.largest = torch.maximum(self.largest, torch.stack([h.abs().max(), per_token.abs().max()]))
            rewards = self._c.beta * h  # the implicit reward (Eq. 3)
            # "chosen" is the best response, "rejected" a mean over those behind all positives, accuracy the share of
            # them that the best one beats.
            opponents = batch.packed.valid[:, self._c.positives :]
            count = opponents.sum(1).clamp(min=1)

            def mean(x: Tensor) -> Tensor:
                return torch.where(opponents, x[:, self._c.positives :], 0.0).sum(1) / count

            chosen, rejected = rewards[:, 0], mean(rewards)
            columns += [chosen, rejected, chosen - rejected, mean((rewards[:, :1] > rewards).float())]
            columns += [logps[:, 0], mean(logps)]
        self.sums[: len(columns)] += batch.weight * torch.stack(columns, dim=1).double().sum(0)

    def add_expected(self, at_reference: Tensor, batch: Batch) -> None:
        """Add the losses (B,) that the same micro-batch has where policy = reference."""
        self.sums[len(METRICS)] += batch.weight * at_reference.detach().double().sum()

    def read(
        self, count: int, grad_norm: Tensor, *, asked: bool, late: bool
    ) -> tuple[dict[str, float], float, bool, bool]:
        """Means over the step's `count` prompts of all ranks, by name; the gradient's norm; and whether a rank was
        asked to stop, or finds it time for a checkpoint. Collective."""
        self.sums[-2:] = torch.tensor([float(asked), float(late)], dtype=torch.float64)
        dist.all_sum(self.sums)
        *sums, expected, stops, saves, norm = torch.cat([self.sums, grad_norm.detach().double().reshape(1)]).tolist()
        self.expected = expected / count
        means = {key: value / count for key, value in zip(METRICS_OF[self._c.loss], sums, strict=False)}
        return means, norm, stops > 0, saves > 0
