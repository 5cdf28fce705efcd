"""What the log says of a step, summed on the device over its micro-batches and read once; the first loss checked."""

from collections import deque

import torch
from torch import Tensor

from hps import dist
from hps.batches import Batch, logratios_of
from hps.methods import parts
from hps.options import Config

# Per-prompt values of the log, in the order of `Statistics.sums`; names are the field's.
METRICS = ("loss", *(f"rewards/{which}" for which in ("chosen", "rejected", "margins", "accuracies")))
METRICS += ("logps/chosen", "logps/rejected")
METRICS_OF = {"sft": METRICS[:1], "reward": METRICS[:5], "preference": METRICS}


def check_first_loss(c: Config, loss: float, expected: float, largest: list[float]) -> str:
    """A line on the first step's loss and largest |log-ratio| (as in `Statistics`); ValueError unless, but for
    rounding, that is 0 and in fp32 the loss is `expected`, as where policy = reference: a wrong mask or shift shows."""
    known = f"expected {expected:.6f}" if parts(c)[0].continuous else "not known beforehand"
    # In bf16 squares multiply what rounding does to a log-ratio (50 of SPPO became 52.8): the next check has to do.
    if c.dtype == "fp32" and parts(c)[0].continuous and abs(loss - expected) > 1e-3 * max(1.0, abs(expected)):
        raise ValueError(
            f"step 0: the loss is {loss:.6f}, but with policy = reference {c.method} must give {expected:.6f}. Policy "
            "and reference are scored differently: delete the reference cache if the model's code changed"
        )
    # Differences that cancel in the mean. Rounding adds up like a random walk; bf16's was up to 0.2 per root token.
    if not largest[1] <= (1e-3 if c.dtype == "fp32" else 0.5):
        raise ValueError(
            f"step 0: a response's log-ratio is {largest[0]:.3g} nats where policy = reference must give 0, more than "
            f"{c.dtype} rounds: they are scored differently; delete the reference cache if the model's code changed"
        )
    return f"step 0: loss {loss:.6f}, {known}; largest |log-ratio| {largest[0]:.2g}, rounding of {c.dtype}"


class Divergence:
    """Tells once of a run that goes wrong: most losses of the last tenth of its steps are 5 % above the first one, or
    more, or a gradient is a thousand times as long as the first."""

    def __init__(self, steps: int, first: list[float] | None = None) -> None:
        """first: loss and norm of the first step, of a run that goes on."""
        self.first = first
        self._above: deque[bool] = deque(maxlen=max(10, steps // 10))
        self._told = False

    def look(self, loss: float, grad_norm: float) -> str:
        """What is to be said after a step of this loss and norm of its gradient, mostly nothing."""
        self.first = self.first or [loss, grad_norm]
        self._above.append(loss - self.first[0] > 0.05 * abs(self.first[0]))
        lost = len(self._above) == self._above.maxlen and 2 * sum(self._above) > len(self._above)
        torn = grad_norm > 1000 * self.first[1] > 0
        if self._told or not (lost or torn):
            return ""
        self._told = True
        what = f"most losses of the last {len(self._above)} steps are 5 % above the first one or more" if lost else ""
        what = what or f"the gradient's norm is {grad_norm / self.first[1]:,.0f} times that of the first step"
        return f"{what}: the run may diverge; a lower --lr is the first thing to try"


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
