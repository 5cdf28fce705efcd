"""What the log says of a step: sums over its prompts that stay on the device and are read once."""

import torch
from torch import Tensor

from hps import dist
from hps.batches import Batch
from hps.losses import implicit_rewards
from hps.objective import logratios_of
from hps.options import Config

# Per-prompt values of the log, in the order of `Statistics.sums`; names are the field's.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


class Statistics:
    """Sums over the prompts of one step, kept on the device until they are read once.

    sums: (len(METRICS) + 2,) float64: the columns of METRICS, then how many ranks want to stop and to save.
    largest: largest |log-ratio| of this rank, nats.
    """

    def __init__(self, c: Config, device: torch.device) -> None:
        self._c = c
        self.sums = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=device)
        self.largest = torch.zeros((), device=device)

    def add(self, per_prompt: Tensor, policy_logps: Tensor, batch: Batch) -> None:
        """Add a micro-batch: its losses (B,) and the policy's log-probs (B, K), nats."""
        columns = per_prompt.detach()[:, None]
        if self._c.loss != "sft":
            logratios = logratios_of(policy_logps.detach(), batch)
            self.largest = torch.maximum(self.largest, logratios.abs().max())
            columns = prompt_metrics(
                per_prompt.detach(),
                policy_logps.detach(),
                logratios,
                batch.packed.valid,
                self._c.beta,
                self._c.positives,
            )
        self.sums[: columns.shape[1]] += batch.weight * columns.double().sum(0)

    def read(
        self, count: int, grad_norm: Tensor, *, asked: bool, late: bool
    ) -> tuple[dict[str, float], float, bool, bool]:
        """Means over the step's `count` prompts of all ranks, by name; the gradient's norm; and whether a rank was
        asked to stop, or finds it time for a checkpoint. Collective."""
        self.sums[-2:] = torch.tensor([float(asked), float(late)], dtype=torch.float64)
        dist.all_sum(self.sums)
        *sums, stops, saves, norm = torch.cat([self.sums, grad_norm.detach().double().reshape(1)]).tolist()
        keys = {"sft": METRICS[:1], "reward": [key for key in METRICS if "logps" not in key]}.get(self._c.loss, METRICS)
        means = {key: value / count for key, value in zip(METRICS, sums, strict=True) if key in keys}
        return means, norm, stops > 0, saves > 0


def prompt_metrics(
    per_prompt: Tensor, policy_logps: Tensor, logratios: Tensor, valid: Tensor, beta: float, positives: int = 1
) -> Tensor:
    """The columns of METRICS (B, len(METRICS)) from losses (B,), log-probs (B, K), log-ratios (B, K), valid (B, K).

    "chosen" is the best response, "rejected" a mean over those from column `positives` on, accuracy the share of them
    that the best one beats.
    """
    rewards = implicit_rewards(logratios, beta=beta)
    opponents = valid[:, positives:]
    count = opponents.sum(1).clamp(min=1)

    def mean(x):
        return torch.where(opponents, x, 0.0).sum(1) / count

    chosen, rejected = rewards[:, 0], mean(rewards[:, positives:])
    accuracy = mean((rewards[:, :1] > rewards[:, positives:]).float())
    logps = policy_logps.detach()
    columns = [per_prompt.detach(), chosen, rejected, chosen - rejected, accuracy, logps[:, 0]]
    columns.append(mean(logps[:, positives:]))
    return torch.stack(columns, dim=1)
