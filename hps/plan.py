"""The plan of a run: who is contrasted with whom at every visit, drawn before the first step.

q depends on the data's rewards and on training progress only, never on the policy. So the whole run is drawn before
step 0. From the plan follow which reference log-probs are needed, how long the run is, and what a resumed run does
next. Whom a sampler contrasts is in `samplers.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hps.samplers import DRAW_STREAM, ORDER_STREAM, SAMPLERS, Visits, counter_uniform, to_the_left

PROMPTS_PER_CHUNK = 4096  # what is as wide as the candidates is held of so many prompts at a time


@dataclass(frozen=True)
class Plan:
    """Every visit of a run in order; step s takes visits [s * prompts_per_step, (s + 1) * prompts_per_step)."""

    row: np.ndarray  # (V,) int64, index of the prompt in the examples
    epoch: np.ndarray  # (V,) int64
    responses: np.ndarray  # (V, K) int64, column 0 preferred, -1 where ragged; of pl and several positives ranked
    log_q: np.ndarray  # (V, K-1) float32, log-weights of the opponents in the loss; 0 for a single opponent
    kappa: np.ndarray  # (V,) float32, the N factor
    gamma: np.ndarray  # (V,) float32, hardness; 0 where nothing is drawn
    effective: np.ndarray  # (V,) float32, exp(entropy of q): how many negatives q spreads over; 1 without q
    prompts_per_step: int
    dropped: dict[str, int]  # rows that give no contrast, by reason
    excluded: dict[str, int]  # candidates kept out of q, by reason

    @property
    def steps(self) -> int:
        return -(-len(self.row) // self.prompts_per_step)

    def first(self, steps: int) -> "Plan":
        """The plan of the first so many steps."""
        visits = slice(0, steps * self.prompts_per_step)
        return replace(self, **{key: x[visits] for key, x in vars(self).items() if isinstance(x, np.ndarray)})

    def step(self, s: int) -> range:
        """Indices of the visits of optimizer step `s`."""
        return range(s * self.prompts_per_step, min((s + 1) * self.prompts_per_step, len(self.row)))


def plan(
    rewards: Sequence[np.ndarray],
    identity: Sequence[np.ndarray],
    keys: np.ndarray,
    *,
    sampler: str,
    epochs: int,
    prompts_per_step: int,
    seed: int,
    shuffle: str = "epochs",
    n_factor: str = "one",
    hps_form: str = "sample",
    hps_samples: int = 1,
    positives: int = 1,
    human: np.ndarray | None = None,
    **options: Any,
) -> Plan:
    """Draw a whole run: for every visit its prompt, its responses and their weights.

    Args:
        rewards: one (n,) float array per prompt, ragged n; not looked at by `human`. It is read in slices, each twice,
            in order: data on disk need not fit into memory.
        identity: one (n,) int array per prompt, read in the same way; equal numbers mark equal texts.
        keys: (R,) uint64, stable identity of each prompt (a hash of its id), which its random numbers hang on.
        sampler: a key of `SAMPLERS`; `options` are its own.
        shuffle: `epochs` orders prompts anew in each epoch; `together` orders the visits of all epochs as one, as the
            authors' code does with copies of its data; `no` keeps the file's order.
        n_factor: `one` (kappa = 1) or `n_minus_one` (kappa = number of dispreferred responses, Eq. 8).
        hps_form: `sample` draws opponents anew at every visit, `full` takes all responses weighted by q.
        hps_samples: draws per visit, with replacement (more than one is OURS).
        positives: how many responses count as valid (App. E). With m > 1, which needs the form `full`, columns are in
            ranked order, the m best in front, and log_q is that of the first one's stage.
        human: (R, 2) int, (chosen, rejected) of each prompt, -1 where it has none; looked at by `human` alone.

    Raises:
        ValueError: no prompt has a response that may be contrasted with the preferred ones.
    """
    assert min(epochs, prompts_per_step, hps_samples, positives) >= 1
    way = SAMPLERS[sampler]
    assert positives == 1 or (way.log_q and hps_form == "full"), "several winners are contrasted with all below them"
    keys = np.asarray(keys, dtype=np.uint64)

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rewards and identities of a chunk, (C, n) each, padded."""
        here = slice(rows[0], rows[-1] + 1)
        same = padded(identity[here], -1, np.int64)
        if not way.human_pairs:
            return padded(rewards[here], -np.inf, np.float64), same
        assert human is not None and len(human) == len(identity)
        return pair_rewards(human[here], same.shape), same

    kept, dropped, excluded = contrasted(read, len(keys), positives, human=way.human_pairs)
    visits, epoch = shuffled_visits(keys[kept], epochs=epochs, seed=seed, shuffle=shuffle)
    row = kept[visits]
    key = keys[row]
    # The curriculum follows optimizer steps: all visits of a step have the same progress.
    progress = np.arange(len(visits)) // prompts_per_step / -(-len(visits) // prompts_per_step)
    gamma, effective, kappa = np.zeros(len(visits)), np.ones(len(visits)), np.ones(len(visits))
    # Draws hang on the prompt and the epoch, not on the order of the visits, so the data is read in its own order. Each
    # part has the visits of some prompts in one epoch (C,), their responses (C, k), and log_q (C, k - 1).
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    visits_of = np.argsort(visits, kind="stable").reshape(len(kept), epochs)
    for rows in chunks(len(keys)):
        here = slice(*np.searchsorted(kept, [rows[0], rows[-1] + 1]))
        if here.start == here.stop:
            continue
        r, same = (x[kept[here] - rows[0]] for x in read(rows))
        best, eligible, _ = dispreferred(r, same, positives)
        np.put_along_axis(eligible, best[:, 1:], True, axis=1)  # y_2 is an opponent of y_1
        for at in visits_of[here].T:
            v = Visits(r, eligible, same, best[:, 0], progress[at], key[at], epoch[at], seed)
            if way.pick:
                preferred, opponents = way.pick(v, **options)
                log_weights = np.zeros(opponents.shape)
            else:
                assert way.log_q is not None
                preferred, (log_q, gamma[at]) = v.best, way.log_q(v, **options)
                effective[at] = np.exp(-(np.exp(log_q) * np.where(log_q > -np.inf, log_q, 0.0)).sum(1))
                if hps_form == "full":
                    opponents, log_weights = all_weighted(log_q, r if positives > 1 else np.zeros(r.shape))
                else:
                    opponents, log_weights = draw(log_q, v, hps_samples)
                if n_factor == "n_minus_one":
                    kappa[at] = eligible.sum(1)
            parts.append((at, np.hstack([preferred[:, None], opponents]), log_weights))
    responses, log_q = assembled(parts, len(row))
    kappa, gamma, effective = (x.astype(np.float32) for x in (kappa, gamma, effective))
    return Plan(row, epoch, responses, log_q, kappa, gamma, effective, prompts_per_step, dropped, excluded)


def plan_demonstrations(
    preferred: Sequence[int], keys: np.ndarray, *, epochs: int, prompts_per_step: int, seed: int, shuffle: str
) -> Plan:
    """The plan of supervised fine-tuning: one response per prompt, `preferred[i]`, nothing to contrast it with."""
    row, epoch = shuffled_visits(np.asarray(keys, dtype=np.uint64), epochs=epochs, seed=seed, shuffle=shuffle)
    responses = np.asarray(preferred, dtype=np.int64)[row][:, None]
    none, no_opponents = np.zeros(len(row), dtype=np.float32), np.zeros((len(row), 0), dtype=np.float32)
    return Plan(row, epoch, responses, no_opponents, none + 1, none, none, prompts_per_step, {}, {})


# ----------------------------------------------------------------------------------------- which rows, which visits


def contrasted(
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], count: int, positives: int, *, human: bool
) -> tuple[np.ndarray, dict[str, int], dict[str, int]]:
    """The rows with a response below their preferred ones, (R',) int64; how many have none, by reason; and how many
    candidates of the others are kept out of q, by reason. ValueError if all rows have none."""
    reasons = ("rows_no_human_pair", "pairs_of_equal_texts") if human else ("rows_one_response", "rows_no_dispreferred")
    dropped: dict[str, int] = dict.fromkeys(reasons, 0)
    excluded, kept = {"ties_with_best": 0, "copies_of_best": 0}, []
    for rows in chunks(count):
        r, same = read(rows)
        _, below, left_out = dispreferred(r, same, positives)
        some, single = below.any(1), (r > -np.inf).sum(1) < 2
        dropped[reasons[0]] += int((~some & single).sum())
        dropped[reasons[1]] += int((~some & ~single).sum())
        for reason in excluded:
            excluded[reason] += int(left_out[reason][some].sum())
        kept.append(rows[some])
    if not sum(map(len, kept)):
        told = ", ".join(f"{reason} {number}" for reason, number in dropped.items())
        if human:
            raise ValueError(f"no prompt has a human pair of different texts ({told}): give them, or draw by rewards")
        raise ValueError(f"no prompt has a response below its best one ({told}): see data_prep.py doctor on rewards")
    return np.concatenate(kept), dropped, excluded


def shuffled_visits(keys: np.ndarray, *, epochs: int, seed: int, shuffle: str) -> tuple[np.ndarray, np.ndarray]:
    """Every prompt once per epoch, in order: positions, epochs, (epochs * prompts,) int64. `shuffle` as in `plan`."""
    row, epoch = np.tile(np.arange(len(keys)), epochs), np.repeat(np.arange(epochs), len(keys))
    if shuffle == "no":
        return row, epoch
    rank = counter_uniform(seed, ORDER_STREAM, epoch, keys[row])
    order = np.lexsort((rank, epoch)) if shuffle == "epochs" else np.argsort(rank, kind="stable")
    return row[order], epoch[order]


def dispreferred(
    rewards: np.ndarray, identity: np.ndarray, positives: int = 1
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """The preferred responses of prompts, and the mask of those below them, which they may be contrasted with.

    Ties with the maximum are not dispreferred (the authors' code leaves them out too), nor is an exact copy of
    the preferred text with a lower score. Raw rewards are compared, not their exponentials, which overflow. Of
    several positives each one leaves out its ties and copies.

    Args:
        rewards: (C, n) float, -inf where a ragged row has no response.
        identity: (C, n) int; equal numbers mark equal texts.
        positives: m, how many responses count as preferred (App. E).

    Returns:
        (C, m) indices of the preferred, best first, -1 where there are too few responses; (C, n) bool, none of a row
        that gives no contrast; and how many were left out by reason, (C,) each.
    """
    below, rows = rewards > -np.inf, np.arange(len(rewards))
    best = np.full((len(rewards), positives), -1)
    left_out = {reason: np.zeros(len(rewards), dtype=np.int64) for reason in ("ties_with_best", "copies_of_best")}
    for j in range(positives):
        some = below.any(1)
        first = np.where(below, rewards, -np.inf).argmax(1)
        tie = below & (rewards == rewards[rows, first][:, None])
        copy = below & ~tie & (identity == identity[rows, first][:, None])
        best[some, j] = first[some]
        left_out["ties_with_best"] += tie.sum(1) - some
        left_out["copies_of_best"] += copy.sum(1)
        below &= ~(tie | copy)
    return best, below, left_out


def padded(rows: Sequence[np.ndarray], fill: float, dtype: type) -> np.ndarray:
    """Ragged rows as one (C, n) array, `fill` behind the short ones."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    out = np.full((len(rows), lengths.max()), fill, dtype=dtype)
    out[np.arange(out.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return out


def pair_rewards(pairs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Rewards (C, n) that say what the pairs (C, 2) do: 1 for the chosen response, 0 for the rejected one, -inf for all
    others, and for a row without a pair."""
    rewards, (rows,) = np.full(shape, -np.inf), np.nonzero((pairs >= 0).all(1))
    for column, reward in ((1, 0.0), (0, 1.0)):
        rewards[rows, pairs[rows, column]] = reward
    return rewards


def chunks(count: int) -> list[np.ndarray]:
    """0 .. count - 1 in pieces of at most `PROMPTS_PER_CHUNK`."""
    return np.array_split(np.arange(count), max(1, -(-count // PROMPTS_PER_CHUNK)))


# -------------------------------------------------------------------------------------------------- opponents from q


def draw(log_q: np.ndarray, v: Visits, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Opponents drawn from q with replacement, (C, k), -1 behind those of a visit that has fewer, and their log-weights
    in the loss, (C, k): a response counts as often as it came. log_q: (C, n)."""
    picks = np.empty((len(log_q), samples), dtype=np.int64)
    for d in range(samples):
        u = v.uniform_numbers(DRAW_STREAM + 16 * d)
        picks[:, d] = np.argmax(log_q - np.log(-np.log(u)), axis=1)  # Gumbel-max: a draw from q
    picks.sort(axis=1)
    new = np.hstack([np.ones((len(picks), 1), dtype=bool), picks[:, 1:] != picks[:, :-1]])
    drawn = to_the_left(picks, new)
    counts = (drawn[:, :, None] == picks[:, None, :]).sum(2)
    return drawn, np.log(np.maximum(counts, 1) / samples) * (drawn >= 0)


def all_weighted(log_q: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All responses that q may draw, (C, k), the highest first, -1 behind those of a visit that has fewer, and their
    log q, (C, k). log_q, heights: (C, n)."""
    rank = np.argsort(-heights, axis=1, kind="stable")
    found = to_the_left(rank, np.take_along_axis(log_q, rank, axis=1) > -np.inf)
    found = found[:, : (found >= 0).sum(1).max()]
    return found, np.where(found >= 0, np.take_along_axis(log_q, found.clip(min=0), axis=1), 0.0)


def assembled(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], visits: int) -> tuple[np.ndarray, np.ndarray]:
    """`Plan.responses` and `Plan.log_q` out of parts (visits (C,), responses (C, k), log-weights (C, k - 1))."""
    K = max(int((responses >= 0).sum(1).max()) for _, responses, _ in parts)
    all_responses, log_q = np.full((visits, K), -1), np.zeros((visits, K - 1), dtype=np.float32)
    for at, responses, log_weights in parts:
        all_responses[at, : responses.shape[1]] = responses[:, :K]
        log_q[at, : log_weights.shape[1]] = log_weights[:, : K - 1]
    return all_responses, log_q
