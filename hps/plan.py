"""The plan of a run: who is contrasted with whom at every visit, drawn before the first step.

q depends on the data's rewards and on training progress only, never on the policy. So the whole run is drawn before
step 0. From the plan follow which reference log-probs are needed, how long the run is, and what a resumed run does
next. The distributions that it draws from are in `sampling.py`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hps.sampling import counter_uniform, gamma_at, log_q, normalise_rewards, window_log_q

SHUFFLES = ("epochs", "together", "no")
VIEWS = ("bt", "pl", "hps", "uniform", "window", "top2", "random", "human")
FORMS = ("sample", "full")

# The first counter of each kind of draw, so that no two kinds share numbers; draw d > 0 of a visit is _DRAW + 16 d.
_ORDER, _DRAW, _GAMMA, _PAIR = 1, 2, 3, 4


@dataclass(frozen=True)
class Plan:
    """Every visit of a run in order; step s takes visits [s * prompts_per_step, (s + 1) * prompts_per_step).

    row (V,) int64: index of the prompt in the examples. epoch (V,) int64.
    responses (V, K) int64: candidate indices, column 0 preferred, -1 where ragged; for PL and several positives in
    ranked order.
    log_q (V, K-1) float32: log-weights of the opponents in the loss (0 for a single opponent).
    kappa (V,) float32: the N factor. gamma (V,), effective (V,) float32: hardness, and exp(entropy of q), the
    number of negatives that q spreads over; both NaN-free, 0 and 1 where there is no draw.
    dropped: rows that give no contrast, by reason. excluded: candidates kept out of q, by reason.
    """

    row: np.ndarray
    epoch: np.ndarray
    responses: np.ndarray
    log_q: np.ndarray
    kappa: np.ndarray
    gamma: np.ndarray
    effective: np.ndarray
    prompts_per_step: int
    dropped: dict[str, int]
    excluded: dict[str, int]

    @property
    def steps(self) -> int:
        return -(-len(self.row) // self.prompts_per_step)

    def step(self, s: int) -> range:
        """Indices of the visits of optimizer step `s`."""
        return range(s * self.prompts_per_step, min((s + 1) * self.prompts_per_step, len(self.row)))


def mismatched(plan: Plan) -> np.ndarray:
    """For every visit the visit (V,) int64 whose preferred response its prompt is put to, for KTO's z0.

    It is the next one in the step, cyclically, as in KTO's own code; one of the same prompt is passed over. A step
    without another prompt (a last step of one visit) takes the nearest visit of the steps before it, so that its z0
    rests on few pairs, but on real ones.

    Raises:
        ValueError: the first step has one prompt only.
    """
    partners = np.empty(len(plan.row), dtype=np.int64)
    for step in map(plan.step, range(plan.steps)):
        for i, v in enumerate(step):
            others = itertools.chain(step[i + 1 :], step[:i], reversed(range(step.start)))
            partner = next((w for w in others if plan.row[w] != plan.row[v]), None)
            if partner is None:
                raise ValueError("KTO puts prompts to each other's responses, and the first step has only one prompt")
            partners[v] = partner
    return partners


def dispreferred(rewards: np.ndarray, identity: np.ndarray) -> tuple[int, np.ndarray, dict[str, int]]:
    """The preferred response of one prompt and the mask (n,) of those that may be contrasted with it.

    Ties with the maximum are not dispreferred (the authors' code leaves them out too), nor is an exact copy of
    the preferred text with a lower score. Raw rewards are compared, not their exponentials, which overflow.
    """
    best = int(np.argmax(rewards))
    tie = rewards == rewards[best]
    copy = (identity == identity[best]) & ~tie
    counts = {"ties_with_best": int(tie.sum()) - 1, "copies_of_best": int(copy.sum())}
    return best, ~(tie | copy), counts


def preferred_and_below(
    rewards: np.ndarray, identity: np.ndarray, positives: int
) -> tuple[list[int], np.ndarray, dict[str, int]]:
    """The `positives` best responses in ranked order, the indices of those below them all, and what was left out.

    Every positive leaves out what `dispreferred` does: its ties, and copies of its text. If there are too few
    responses, none is below and some of the positives may be missing.
    """
    best: list[int] = []
    below = np.arange(len(rewards))
    left_out = {"ties_with_best": 0, "copies_of_best": 0}
    while len(below) and len(best) < positives:
        first, mask, counts = dispreferred(rewards[below], identity[below])
        best.append(int(below[first]))
        below = below[mask]
        left_out = {reason: left_out[reason] + counts[reason] for reason in left_out}
    return best, below, left_out


def ranked_subset(rewards: np.ndarray, eligible: np.ndarray, identity: np.ndarray, size: int) -> np.ndarray:
    """At most `size` - 1 distinct dispreferred candidates, ranked: hardest, worst, and evenly spaced between.

    Differs: the paper ranks all n = 100; its reported time (2.68 x BT) fits five or six responses per prompt.
    """
    order = np.flatnonzero(eligible)
    order = order[np.argsort(-rewards[order], kind="stable")]
    _, first = np.unique(identity[order], return_index=True)  # a text ranked against itself teaches nothing
    order = order[np.sort(first)]
    if len(order) > size - 1:
        order = order[np.linspace(0, len(order) - 1, size - 1).round().astype(int)] if size > 2 else order[-1:]
    return order


def _visits(keys: np.ndarray, *, epochs: int, seed: int, shuffle: str) -> tuple[np.ndarray, np.ndarray]:
    """Every prompt once an epoch: (positions, epochs), both (epochs * prompts,) int64. `shuffle` as in `plan`."""
    if shuffle not in SHUFFLES:
        raise ValueError(f"unknown shuffle {shuffle!r}; choose one of {', '.join(SHUFFLES)}")
    row, epoch = np.tile(np.arange(len(keys)), epochs), np.repeat(np.arange(epochs), len(keys))
    if shuffle == "no":
        return row, epoch
    rank = counter_uniform(seed, _ORDER, epoch, keys[row])
    order = np.lexsort((rank, epoch)) if shuffle == "epochs" else np.argsort(rank, kind="stable")
    return row[order], epoch[order]


def plan_demonstrations(
    preferred: Sequence[int], keys: np.ndarray, *, epochs: int, prompts_per_step: int, seed: int, shuffle: str
) -> Plan:
    """The plan of supervised fine-tuning: one response a prompt, `preferred[i]`, nothing to contrast it with."""
    row, epoch = _visits(np.asarray(keys, dtype=np.uint64), epochs=epochs, seed=seed, shuffle=shuffle)
    none = np.zeros(len(row), dtype=np.float32)
    return Plan(
        row=row,
        epoch=epoch,
        responses=np.asarray(preferred, dtype=np.int64)[row][:, None],
        log_q=np.zeros((len(row), 0), dtype=np.float32),
        kappa=none + 1,
        gamma=none,
        effective=none,
        prompts_per_step=prompts_per_step,
        dropped={},
        excluded={},
    )


def _static_opponents(
    view: str, rewards: np.ndarray, eligible: np.ndarray, identity: np.ndarray, pl_responses: int
) -> np.ndarray:
    """The opponents that a prompt has at every visit, hardest first: all that BT, PL and top2 need."""
    if view == "top2":
        return ranked_subset(rewards, eligible, identity, len(rewards) + 1)[:1]
    return ranked_subset(rewards, eligible, identity, 2 if view == "bt" else pl_responses or len(rewards) + 1)


def _hps_log_q(scaled: Sequence[np.ndarray], eligible: Sequence[np.ndarray], gamma: np.ndarray) -> np.ndarray:
    """log q (Eq. 9) of some visits, (C, n), -inf for what is not dispreferred; one (n,) array a visit, gamma (C,)."""
    C, n = len(scaled), max(map(len, scaled))
    r, ok = np.zeros((C, n + 1)), np.zeros((C, n + 1), dtype=bool)
    for i in range(C):  # log_q reads column 0 as the winner, so candidates start at column 1
        r[i, 1 : 1 + len(scaled[i])] = scaled[i]
        ok[i, 1 : 1 + len(scaled[i])] = eligible[i]
    return log_q(torch.from_numpy(r), torch.from_numpy(gamma), valid=torch.from_numpy(ok)).numpy()


def _draw(
    weights: np.ndarray, counters: list[np.ndarray], seed: int, *, form: str, samples: int
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Opponents of some visits drawn from q, their log-weights in the loss, and q's effective number (C,).

    weights: (C, n) log q. counters: (C,) arrays that name the visit. `sample` draws `samples` times with replacement
    and weighs a response by how often it came; `full` takes all with weights q.
    """
    C, n = weights.shape
    entropy = -(np.exp(weights) * np.where(weights > -np.inf, weights, 0.0)).sum(1)
    if form == "full":
        drawn = [np.flatnonzero(w > -np.inf) for w in weights]
        return drawn, [w[d] for w, d in zip(weights, drawn, strict=True)], np.exp(entropy)
    picks = np.empty((C, samples), dtype=np.int64)
    for d in range(samples):
        u = counter_uniform(seed, _DRAW + 16 * d, *(c[:, None] for c in counters), np.arange(n)[None, :])
        picks[:, d] = np.argmax(weights - np.log(-np.log(u)), axis=1)  # Gumbel-max: a draw from q
    drawn, logs = [], []
    for row in picks:
        distinct, count = np.unique(row, return_counts=True)
        drawn.append(distinct)
        logs.append(np.log(count / samples))
    return drawn, logs, np.exp(entropy)


def plan(
    rewards: Sequence[np.ndarray],
    identity: Sequence[np.ndarray],
    keys: np.ndarray,
    *,
    view: str,
    epochs: int,
    prompts_per_step: int,
    seed: int,
    gamma_schedule: str = "left_knots",
    gamma_start: float = -5.0,
    gamma_end: float = 5.0,
    gamma_phases: int = 5,
    n_factor: str = "one",
    hps_form: str = "sample",
    hps_samples: int = 1,
    positives: int = 1,
    reward_norm: str = "none",
    reward_scale: float = 1.0,
    window_end: float = 0.15,
    window_power: float = 1.5,
    window_width: float = 0.15,
    pl_responses: int = 8,
    shuffle: str = "epochs",
    human: Sequence[tuple[int, int] | None] = (),
) -> Plan:
    """Draw a whole run: for every visit its prompt, its responses and their weights.

    Args:
        rewards: one (n,) float array a prompt, ragged n; not looked at by `human`.
        identity: one (n,) int array a prompt; equal numbers mark equal texts.
        keys: (R,) uint64, stable identity of each prompt (a hash of its id), which the draws are keyed by.
        view: whom the preferred response is contrasted with.
            `bt` the worst; `top2` the runner-up; `pl` `pl_responses` ranks (0: all of them);
            `hps` draws from q (Eq. 9), made anew at every visit, or all responses weighted by q (`hps_form`);
            `uniform` the same with gamma = 0, the control that any claim for q must beat;
            `window` the same from a window of ranks that slides from the worst to the hard (`window_log_q`);
            `random` the better of two random responses against the other, drawn anew at every visit;
            `human` the pair in `human`, (chosen, rejected) a prompt or None.
        n_factor: `one` (kappa = 1) or `n_minus_one` (kappa = number of dispreferred responses, Eq. 8).
        hps_samples: draws a visit, with replacement (more than one is OURS).
        positives: how many responses count as valid (App. E). With m > 1, for `hps` and `uniform` in the form `full`,
            columns are in ranked order, the m best in front, and log_q is that of the first one's stage.
        shuffle: `epochs` orders prompts anew in each epoch; `together` orders the visits of all epochs as one, as the
            authors' code does with copies of its data; `no` keeps the file's order.

    Raises:
        ValueError: an unknown name, a number out of range, several positives in another view or form, or no prompt
            has a response that may be contrasted with the preferred ones.
    """
    if view not in VIEWS:
        raise ValueError(f"unknown preference view {view!r}; choose one of {', '.join(VIEWS)}")
    if n_factor not in ("one", "n_minus_one"):
        raise ValueError(f"unknown n_factor {n_factor!r}; choose one or n_minus_one")
    if hps_form not in FORMS:
        raise ValueError(f"unknown hps_form {hps_form!r}; choose one of {', '.join(FORMS)}")
    if min(epochs, prompts_per_step, hps_samples, positives) < 1 or pl_responses == 1 or pl_responses < 0:
        raise ValueError(
            "epochs, prompts_per_step, hps_samples and positives must be at least 1, pl_responses 0 or at least 2"
        )
    if positives > 1 and (view not in ("hps", "uniform") or hps_form != "full"):
        raise ValueError(
            f"positives = {positives} contrasts several winners with all that are below them: use view hps or uniform "
            "and hps_form full, or positives = 1"
        )

    dropped = {"rows_one_response": 0, "rows_no_dispreferred": 0}
    excluded = {"ties_with_best": 0, "copies_of_best": 0}
    kept, best, eligible, rejected = [], [], [], []
    if view == "human":
        dropped = {"rows_no_human_pair": sum(pair is None for pair in human), "pairs_of_equal_texts": 0}
        for i, pair in enumerate(human):
            if pair is not None and identity[i][pair[0]] == identity[i][pair[1]]:
                dropped["pairs_of_equal_texts"] += 1
            elif pair is not None:
                kept.append(i)
                best.append(pair[0])
                rejected.append(pair[1])
    else:
        for i, (r, same) in enumerate(zip(rewards, identity, strict=True)):
            first, below, counts = preferred_and_below(r, same, positives)
            if not len(below):
                dropped["rows_one_response" if len(r) == 1 else "rows_no_dispreferred"] += 1
                continue
            for reason in excluded:
                excluded[reason] += counts[reason]
            kept.append(i)
            best.append(first[0])
            mask = np.zeros(len(r), dtype=bool)
            mask[[*first[1:], *below]] = True
            eligible.append(mask)
    if not kept:
        raise ValueError(
            f"no prompt has a response below its best one ({dropped}): check the rewards with data_prep.py doctor"
            if view != "human"
            else f"no prompt has a human pair of different texts ({dropped}): give `chosen` and `rejected` in the data"
        )
    kept_rows, kept_keys = np.array(kept), np.asarray(keys, dtype=np.uint64)[kept]

    visits, epoch = _visits(kept_keys, epochs=epochs, seed=seed, shuffle=shuffle)  # positions in `kept`
    steps = -(-len(visits) // prompts_per_step)
    progress = np.arange(len(visits)) // prompts_per_step / steps
    preferred = np.array(best)[visits]
    gamma = np.zeros(len(visits))
    effective = np.ones(len(visits))
    opponents: list[np.ndarray] = []  # of each visit
    logs: list[np.ndarray] = []
    if view == "human":
        opponents = [np.array([rejected[p]]) for p in visits]
    elif view == "random":
        for v, (p, e) in enumerate(zip(visits, epoch, strict=True)):
            first, other = _random_pair(np.asarray(rewards[kept[p]]), seed, kept_keys[p], e)
            preferred[v] = first
            opponents.append(np.array([other]))
    elif view in ("bt", "top2", "pl"):
        fixed = [
            _static_opponents(view, np.asarray(rewards[i]), mask, np.asarray(identity[i]), pl_responses)
            for i, mask in zip(kept, eligible, strict=True)
        ]
        opponents = [fixed[p] for p in visits]
    else:
        if view == "hps":
            if gamma_schedule == "mixture":
                progress = counter_uniform(seed, _GAMMA, kept_keys[visits], epoch)
            gamma = gamma_at(progress, schedule=gamma_schedule, start=gamma_start, end=gamma_end, phases=gamma_phases)
        scaled = [normalise_rewards(rewards[i], norm=reward_norm, scale=reward_scale) for i in kept]
        window = dict(end=window_end, power=window_power, width=window_width)
        for chunk in np.array_split(np.arange(len(visits)), -(-len(visits) // 4096)):
            at = visits[chunk]
            masks = [eligible[p] for p in at]
            if view == "window":
                each = [
                    window_log_q(rewards[kept[p]], mask, t, **window)
                    for p, mask, t in zip(at, masks, progress[chunk], strict=True)
                ]
                weights = np.full((len(at), max(map(len, each))), -np.inf)
                for i, row in enumerate(each):
                    weights[i, : len(row)] = row
            else:
                weights = _hps_log_q([scaled[p] for p in at], masks, gamma[chunk])
            counters = [kept_keys[at], epoch[chunk]]
            drawn, of_drawn, effective[chunk] = _draw(weights, counters, seed, form=hps_form, samples=hps_samples)
            if positives > 1:
                ranks = [np.argsort(-rewards[kept[p]][d], kind="stable") for p, d in zip(at, drawn, strict=True)]
                drawn, of_drawn = ([x[r] for x, r in zip(xs, ranks, strict=True)] for xs in (drawn, of_drawn))
            opponents += drawn
            logs += of_drawn
    K = 1 + max(map(len, opponents))
    responses = np.full((len(visits), K), -1, dtype=np.int64)
    responses[:, 0] = preferred
    weights_of = np.zeros((len(visits), K - 1), dtype=np.float32)
    for v, others in enumerate(opponents):
        responses[v, 1 : 1 + len(others)] = others
        if logs:
            weights_of[v, : len(others)] = logs[v]
    kappa = np.ones(len(visits))
    if n_factor == "n_minus_one" and view in ("hps", "uniform", "window"):
        kappa = np.array([mask.sum() for mask in eligible], dtype=np.float64)[visits]
    return Plan(
        row=kept_rows[visits],
        epoch=epoch,
        responses=responses,
        log_q=weights_of,
        kappa=kappa.astype(np.float32),
        gamma=gamma.astype(np.float32),
        effective=effective.astype(np.float32),
        prompts_per_step=prompts_per_step,
        dropped=dropped,
        excluded=excluded,
    )


def _random_pair(rewards: np.ndarray, seed: int, key: np.uint64, epoch: int) -> tuple[int, int]:
    """Two responses of different reward, better first: the first pair of a random order that is not a tie."""
    order = np.argsort(counter_uniform(seed, _PAIR, key, epoch, np.arange(len(rewards))))
    other = next(i for i in order if rewards[i] != rewards[order[0]])
    pair = sorted((order[0], other), key=lambda i: -rewards[i])
    return int(pair[0]), int(pair[1])
