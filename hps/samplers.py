"""Whom a prompt's best response is contrasted with: one function and one line of `SAMPLERS` for each way.

A sampler looks at the candidates of C prompts. It gives each candidate a log-weight, from which `plan.py` draws the
opponents (`log_q`), or names the opponents itself (`pick`). It never sees the policy: that is why a whole run can be
drawn before its first step.

To add one: write a function like those below, add one line to `SAMPLERS`, add one test. Its keyword-only arguments are
options of train.py; a new one needs a field of `options.Config` with its help text.

Random numbers come from a counter: each (seed, kind, prompt, epoch, candidate) has its own uniform number. They do not
depend on the number of ranks, on the order of the file, or on what was drawn before.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# The first counter of each kind of random number, so that no two kinds share numbers; draw d of a visit has 2 + 16 d.
ORDER_STREAM, DRAW_STREAM, GAMMA_STREAM, PAIR_STREAM = 1, 2, 3, 4


@dataclass(frozen=True)
class Visits:
    """C visits of one epoch, each to another prompt; n is the largest number of candidates, -inf and -1 pad."""

    rewards: np.ndarray  # (C, n) float64, external rewards
    eligible: np.ndarray  # (C, n) bool, the dispreferred: below the best response and no copy of it
    identity: np.ndarray  # (C, n) int64, equal numbers mark equal texts
    best: np.ndarray  # (C,) int64, index of the preferred response
    progress: np.ndarray  # (C,) float64, share of the optimizer steps already taken, in [0, 1)
    key: np.ndarray  # (C,) uint64, the prompt's identity, which its random numbers hang on
    epoch: np.ndarray  # (C,) int64
    seed: int

    def uniform_numbers(self, stream: int) -> np.ndarray:
        """One counted uniform number for each candidate, (C, n)."""
        columns = np.arange(self.rewards.shape[1])[None, :]
        return counter_uniform(self.seed, stream, self.key[:, None], self.epoch[:, None], columns)


@dataclass(frozen=True)
class Sampler:
    """Either `log_q(visits, **options)` -> log-weights (C, n) of the candidates, logsumexp 0 and -inf for what is never
    drawn, and the hardness gamma (C,) for the log; or `pick(visits, **options)` -> preferred (C,) and opponents (C, k),
    -1 behind those of a prompt that has fewer. With `human_pairs` the rewards are 1 for the chosen response of the
    data's own pair, 0 for the rejected one, and absent for all others."""

    log_q: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None
    pick: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None
    human_pairs: bool = False


def hps(
    v: Visits,
    *,
    gamma_schedule: str = "left_knots",
    gamma_start: float = -5.0,
    gamma_end: float = 5.0,
    gamma_phases: int = 5,
    reward_norm: str = "none",
    reward_scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """q_i = exp(gamma r_i) / sum_j exp(gamma r_j) over the dispreferred (Eq. 9), gamma rising with training."""
    mixture = gamma_schedule == "mixture"
    share = counter_uniform(v.seed, GAMMA_STREAM, v.key, v.epoch) if mixture else v.progress
    gamma = gamma_at(share, schedule=gamma_schedule, start=gamma_start, end=gamma_end, phases=gamma_phases)
    r = normalise_rewards(v.rewards, norm=reward_norm, scale=reward_scale)
    return log_q(r, gamma, v.eligible).numpy(), gamma


def uniform(v: Visits) -> tuple[np.ndarray, np.ndarray]:
    """All dispreferred responses alike: the control that any claim for q must beat."""
    return log_q(np.zeros(v.rewards.shape), 0.0, v.eligible).numpy(), np.zeros(len(v.best))


def worst(v: Visits) -> tuple[np.ndarray, np.ndarray]:
    """BT: the response of the lowest reward."""
    return ranks(v, pl_responses=2)


def ranks(v: Visits, *, pl_responses: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Plackett-Luce's ranking, `pl_responses` with the best one (0: all): hardest, worst, and evenly spaced between.

    Differs: the paper ranks all n = 100; its reported time (2.68 x BT) fits five or six responses per prompt.
    """
    if pl_responses == 1 or pl_responses < 0:
        raise ValueError(f"pl_responses must be 0 (all) or at least 2, got {pl_responses}")
    order = np.argsort(np.where(v.eligible, -v.rewards, np.inf), axis=1, kind="stable")
    texts = np.take_along_axis(v.identity, order, axis=1)
    by_text = np.argsort(texts, axis=1, kind="stable")
    again = np.zeros(texts.shape, dtype=bool)  # a text ranked against itself teaches nothing
    sorted_texts = np.take_along_axis(texts, by_text, axis=1)
    np.put_along_axis(again, by_text[:, 1:], sorted_texts[:, 1:] == sorted_texts[:, :-1], axis=1)
    ranked = to_the_left(order, np.take_along_axis(v.eligible, order, axis=1) & ~again)
    count = (ranked >= 0).sum(1, keepdims=True)
    if not pl_responses:
        return v.best, ranked[:, : count.max()]
    opponents = pl_responses - 1
    places = np.arange(opponents)[None, :]
    spaced = (places * ((count - 1) / (opponents - 1))).round().astype(np.int64) if opponents > 1 else count - 1
    places = np.where(count > opponents, spaced, np.where(places < count, places, -1))
    return v.best, np.where(places >= 0, np.take_along_axis(ranked, places.clip(min=0), axis=1), -1)


def random_pair(v: Visits) -> tuple[np.ndarray, np.ndarray]:
    """The better of two random responses against the other: the first pair of a random order that is not a tie."""
    valid, rows = v.rewards > -np.inf, np.arange(len(v.rewards))
    u = v.uniform_numbers(PAIR_STREAM)
    first = np.where(valid, u, np.inf).argmin(1)
    other = np.where(valid & (v.rewards != v.rewards[rows, first][:, None]), u, np.inf).argmin(1)
    ahead = v.rewards[rows, first] > v.rewards[rows, other]
    return np.where(ahead, first, other), np.where(ahead, other, first)[:, None]


SAMPLERS: dict[str, Sampler] = {
    "hps": Sampler(log_q=hps),
    "uniform": Sampler(log_q=uniform),
    "bt": Sampler(pick=worst),
    "pl": Sampler(pick=ranks),
    "random": Sampler(pick=random_pair),
    "human": Sampler(pick=worst, human_pairs=True),
}


# What `plan.plan` can be told of the samplers that give log-weights.
DRAW_OPTIONS = frozenset({"hps_form", "hps_samples", "n_factor", "positives"})


def sampler_options(name: str) -> frozenset[str]:
    """What `plan.plan` can be told of a sampler: the keyword-only arguments of its function, and how q is used."""
    sampler = SAMPLERS[name]
    function = sampler.log_q or sampler.pick
    assert function is not None
    own = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    return frozenset(own | DRAW_OPTIONS if sampler.log_q else own)


# ------------------------------------------------------------------------------------------ what samplers are made of


def log_q(
    rewards: Tensor | np.ndarray, gamma: float | Tensor | np.ndarray, eligible: Tensor | np.ndarray | None = None
) -> Tensor:
    """Log-weights of the dispreferred responses, log softmax(gamma r) (Eq. 9), in log space throughout.

    Args:
        rewards: (C, n) float, external rewards r_est.
        gamma: hardness, a float or (C,); larger puts more weight on high-reward (hard) responses.
        eligible: (C, n) bool, the dispreferred; None means all.

    Returns:
        (C, n) in the dtype of `rewards`; logsumexp 0 over each row with an eligible response, -inf for all others.
    """
    rewards = torch.as_tensor(rewards)
    logits = torch.as_tensor(gamma, dtype=rewards.dtype).reshape(-1, 1) * rewards
    if eligible is not None:
        logits = logits.masked_fill(~torch.as_tensor(eligible), -torch.inf)
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
        progress: share of the optimizer steps already taken; for `mixture` a random number in its place.
        schedule: `left_knots` -5 -3 -1 1 3 (the ramp's value where each phase begins; the default, and what
            the authors' code computes), `inclusive` -5 -2.5 0 2.5 5, `linear` at every step, `constant` = start,
            `mixture` the left knots in random order (what the authors' code comes to after its shuffling).

    Raises:
        ValueError: fewer than one (for `inclusive` two) phases.
    """
    if phases < (2 if schedule == "inclusive" else 1):
        raise ValueError(f"gamma_schedule {schedule!r} needs more than {phases} gamma_phases")
    progress = np.asarray(progress, dtype=np.float64)
    # A step that begins exactly on a knot must not fall before it: 1 / 49 * 49 is below 1 in floats.
    phase = np.minimum(np.floor(progress * phases + 1e-9), phases - 1)
    share = {
        "left_knots": phase / phases,
        "mixture": phase / phases,
        "inclusive": phase / max(phases - 1, 1),
        "linear": progress,
        "constant": np.zeros_like(progress),
    }[schedule]
    return start + (end - start) * share


def normalise_rewards(rewards: np.ndarray, *, norm: str = "none", scale: float = 1.0) -> np.ndarray:
    """Rewards (C, n) as q sees them: as they are or standardised per prompt (`zscore`), times `scale`; float64, and 0
    where `rewards` is -inf, which pads.

    OURS: the paper uses raw rewards; gamma = 5 on raw rewards of a wide scale is nearly an argmax.
    """
    valid = rewards > -np.inf
    found = np.where(valid, rewards, 0.0)
    if norm == "zscore":
        n = valid.sum(-1, keepdims=True)
        centred = np.where(valid, found - found.sum(-1, keepdims=True) / n, 0.0)
        spread = np.sqrt((centred**2).sum(-1, keepdims=True) / n)
        found = centred / np.where(spread > 0, spread, 1.0)
    return scale * found


def to_the_left(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(C, n) with the kept values of each row moved to its left, in order, and -1 behind them."""
    place = np.argsort(~kept, axis=1, kind="stable")
    return np.where(np.take_along_axis(kept, place, axis=1), np.take_along_axis(values, place, axis=1), -1)


def counter_uniform(seed: int, *counters: int | np.ndarray) -> np.ndarray:
    """Uniform numbers in (0, 1), float64, one for every broadcast combination of the integer counters."""
    state = _mix(np.asarray(seed % 2**64, dtype=np.uint64).reshape(1))  # 1-D: numpy scalars warn on wrap-around
    for counter in counters:
        state = _mix(state ^ _mix(np.atleast_1d(np.asarray(counter, dtype=np.uint64))))
    return _unit(state)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64: every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _unit(state: np.ndarray) -> np.ndarray:
    """uint64 -> float64 in (0, 1), without its ends: of 53 bits and a half the largest would round up to 1."""
    return ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
