"""The hard-preference sampler: distributions over the dispreferred responses, and counted random numbers.

q_i = exp(gamma r_est,i) / sum_j exp(gamma r_est,j) over the dispreferred responses (Eq. 9), the schedule of gamma, and
what rewards look like to q. What is drawn from them, and when, is in `plan.py`.

Draws come from a counter: every (seed, prompt, epoch, draw, response) has its own uniform number. They do not
depend on the number of ranks, on the order of the file, or on what was drawn before.
"""

import numpy as np
import torch
from torch import Tensor

SCHEDULES = ("left_knots", "inclusive", "linear", "constant", "mixture")
REWARD_NORMS = ("none", "zscore")


def log_q(rewards: Tensor, gamma: float | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Log-weights of the dispreferred responses, log softmax(gamma * r_est) (Eq. 9), in log space throughout.

    Args:
        rewards: (B, K) float, external rewards r_est, column 0 preferred.
        gamma: hardness, a float or (B,); larger puts more weight on high-reward (hard) responses.
        valid: (B, K) bool, False where a response is absent or excluded; its weight is log 0 = -inf.

    Returns:
        (B, K-1) in the dtype of `rewards`; logsumexp 0 over each row with at least one valid opponent.
    """
    gamma = torch.as_tensor(gamma, dtype=rewards.dtype).reshape(-1, 1)
    logits = gamma * rewards[:, 1:]
    if valid is not None:
        logits = logits.masked_fill(~valid[:, 1:], -torch.inf)
    return torch.log_softmax(logits, dim=1)


def gamma_at(
    progress: float | np.ndarray,
    *,
    schedule: str = "left_knots",
    start: float = -5.0,
    end: float = 5.0,
    phases: int = 5,
) -> np.ndarray:
    """gamma at a share of training in [0, 1), "from -5 to 5 linearly, updated every 20% of training" (Sec. 6).

    Args:
        progress: share of the optimizer steps already taken.
        schedule: `left_knots` -5 -3 -1 1 3 (the ramp's value where each phase begins; the default, and what
            the authors' code computes), `inclusive` -5 -2.5 0 2.5 5, `linear` at every step, `constant` = start.
            `mixture`, the left knots in random order, is drawn by `plan.plan`; here `progress` is the random number.

    Raises:
        ValueError: unknown schedule, or fewer than one (for `inclusive` two) phases.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown gamma_schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if phases < (2 if schedule == "inclusive" else 1):
        raise ValueError(f"gamma_schedule {schedule!r} needs more than {phases} gamma_phases")
    progress = np.asarray(progress, dtype=np.float64)
    # A step that begins exactly on a knot must not fall before it: 0.6 * 5 is 2.9999999999999996 in floats.
    phase = np.minimum(np.floor(progress * phases + 1e-9), phases - 1)
    share = {
        "left_knots": phase / phases,
        "mixture": phase / phases,
        "inclusive": phase / max(phases - 1, 1),
        "linear": progress,
        "constant": np.zeros_like(progress),
    }[schedule]
    return start + (end - start) * share


def normalise_rewards(
    rewards: np.ndarray, *, norm: str = "none", scale: float = 1.0, valid: np.ndarray | None = None
) -> np.ndarray:
    """Rewards of prompts as q sees them: as they are or put on a common scale, times `scale`.

    `zscore` is over the prompt, so that no unit of the reward model decides how hard gamma = 5 is.
    OURS: the paper uses raw rewards; gamma = 5 on raw rewards of a wide scale is nearly an argmax.

    Args:
        rewards: (..., n) float, a prompt each row. valid: the same shape, False where a ragged row has no response.

    Returns:
        (..., n) float64, 0 where invalid.
    """
    if norm not in REWARD_NORMS:
        raise ValueError(f"unknown reward_norm {norm!r}; choose one of {', '.join(REWARD_NORMS)}")
    valid = np.ones(rewards.shape, dtype=bool) if valid is None else valid
    n = valid.sum(-1, keepdims=True)
    found = np.where(valid, rewards, 0.0)
    if norm == "zscore":
        centred = np.where(valid, found - found.sum(-1, keepdims=True) / n, 0.0)
        spread = np.sqrt((centred**2).sum(-1, keepdims=True) / n)
        found = centred / np.where(spread > 0, spread, 1.0)
    return scale * found


def hps_log_q(rewards: np.ndarray, eligible: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """log q (Eq. 9) of prompts over their candidates as they stand in the data, the preferred one not in front.

    Args:
        rewards: (C, n) float64, normalised. eligible: (C, n) bool, the dispreferred. gamma: (C,).

    Returns:
        (C, n) float64, -inf for what is not dispreferred.
    """
    none = np.zeros((len(rewards), 1))  # what `log_q` takes for the preferred column
    r, valid = np.hstack([none, rewards]), np.hstack([none > 0, eligible])
    return log_q(torch.from_numpy(r), torch.from_numpy(gamma), valid=torch.from_numpy(valid)).numpy()


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64: every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_uniform(seed: int, *counters: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1), float64, one for every broadcast combination of the integer counters."""
    state = _mix(np.asarray(seed % 2**64, dtype=np.uint64).reshape(1))  # 1-D: numpy scalars warn on wrap-around
    for counter in counters:
        state = _mix(state ^ _mix(np.atleast_1d(np.asarray(counter, dtype=np.uint64))))
    return _unit(state)


def _unit(state: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in (0, 1), without its ends: of 53 bits and a half the largest would round up to 1."""
    return ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
