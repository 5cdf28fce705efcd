"""The plan of a run: who is contrasted with whom at every visit, drawn before the first step.

q depends on the data's rewards and on training progress only, never on the policy. So the whole run is drawn before
step 0. From the plan follow which reference log-probs are needed, how long the run is, and what a resumed run does
next. The distributions that it draws from are in `samplers.py`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hps.samplers import counter_uniform, gamma_at, hps_log_q, normalise_rewards

SHUFFLES = ("epochs", "together", "no")
VIEWS = ("bt", "pl", "hps", "uniform", "random", "human")
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


def padded(rows: Sequence[np.ndarray], fill: float, dtype: type) -> np.ndarray:
    """Ragged rows as one (C, n) array, `fill` behind the short ones."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    out = np.full((len(rows), lengths.max()), fill, dtype=dtype)
    out[np.arange(out.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return out


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


def ranked_subset(rewards: np.ndarray, eligible: np.ndarray, identity: np.ndarray, size: int) -> np.ndarray:
    """At most `size` - 1 distinct dispreferred candidates, ranked: hardest, worst, and evenly spaced between.

    Differs: the paper ranks all n = 100; its reported time (2.68 x BT) fits five or six responses per prompt.

    Args:
        rewards, identity: (C, n) as in `dispreferred`. eligible: (C, n) bool, its mask. size: 0 means all.

    Returns:
        (C, k) candidate indices, -1 behind those of a row that has fewer.
    """
    order = np.argsort(np.where(eligible, -rewards, np.inf), axis=1, kind="stable")
    texts = np.take_along_axis(identity, order, axis=1)
    by_text = np.argsort(texts, axis=1, kind="stable")
    again = np.zeros(texts.shape, dtype=bool)  # a text ranked against itself teaches nothing
    sorted_texts = np.take_along_axis(texts, by_text, axis=1)
    np.put_along_axis(again, by_text[:, 1:], sorted_texts[:, 1:] == sorted_texts[:, :-1], axis=1)
    ranked = _left(order, np.take_along_axis(eligible, order, axis=1) & ~again)
    count = (ranked >= 0).sum(1, keepdims=True)
    if not size:
        return ranked[:, : count.max()]
    places = np.arange(size - 1)[None, :]
    spaced = (places * ((count - 1) / (size - 2))).round().astype(np.int64) if size > 2 else count - 1
    places = np.where(count > size - 1, spaced, np.where(places < count, places, -1))
    chosen = np.take_along_axis(ranked, places.clip(min=0), axis=1)
    return np.where(places >= 0, chosen, -1)


def _left(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """(C, n) with the kept values of each row moved to its left, in order, and -1 behind them."""
    place = np.argsort(~kept, axis=1, kind="stable")
    return np.where(np.take_along_axis(kept, place, axis=1), np.take_along_axis(values, place, axis=1), -1)


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


def _draw(
    weights: np.ndarray, counters: list[np.ndarray], seed: int, *, form: str, samples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Opponents of some visits drawn from q, (C, k), -1 behind those of a visit that has fewer, and their log-weights
    in the loss, (C, k).

    weights: (C, n) log q. counters: (C,) arrays that name the visit. `sample` draws `samples` times with replacement
    and weighs a response by how often it came; `full` takes all with weights q.
    """
    C, n = weights.shape
    if form == "full":
        drawn = _left(np.broadcast_to(np.arange(n), weights.shape), weights > -np.inf)
        drawn = drawn[:, : (drawn >= 0).sum(1).max()]
        return drawn, np.where(drawn >= 0, np.take_along_axis(weights, drawn.clip(min=0), axis=1), 0.0)
    picks = np.empty((C, samples), dtype=np.int64)
    for d in range(samples):
        u = counter_uniform(seed, _DRAW + 16 * d, *(c[:, None] for c in counters), np.arange(n)[None, :])
        picks[:, d] = np.argmax(weights - np.log(-np.log(u)), axis=1)  # Gumbel-max: a draw from q
    picks.sort(axis=1)
    new = np.hstack([np.ones((C, 1), dtype=bool), picks[:, 1:] != picks[:, :-1]])
    drawn = _left(picks, new)
    counts = (drawn[:, :, None] == picks[:, None, :]).sum(2)
    return drawn, np.log(np.maximum(counts, 1) / samples) * (drawn >= 0)


def _random_pair(rewards: np.ndarray, counters: list[np.ndarray], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two responses of different reward of each prompt (C, n), better first: the first pair of a random order that is
    not a tie. (C,) each."""
    valid, rows = rewards > -np.inf, np.arange(len(rewards))
    u = counter_uniform(seed, _PAIR, *(c[:, None] for c in counters), np.arange(rewards.shape[1])[None, :])
    first = np.where(valid, u, np.inf).argmin(1)
    other = np.where(valid & (rewards != rewards[rows, first][:, None]), u, np.inf).argmin(1)
    ahead = rewards[rows, first] > rewards[rows, other]
    return np.where(ahead, first, other), np.where(ahead, other, first)


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
    pl_responses: int = 8,
    shuffle: str = "epochs",
    human: np.ndarray | None = None,
) -> Plan:
    """Draw a whole run: for every visit its prompt, its responses and their weights.

    Args:
        rewards: one (n,) float array a prompt, ragged n; not looked at by `human`. It is read in slices, each twice,
            in order: data on disk need not fit into memory.
        identity: one (n,) int array a prompt, read in the same way; equal numbers mark equal texts.
        keys: (R,) uint64, stable identity of each prompt (a hash of its id), which the draws are keyed by.
        view: whom the preferred response is contrasted with.
            `bt` the worst; `pl` `pl_responses` ranks (0: all of them);
            `hps` draws from q (Eq. 9), made anew at every visit, or all responses weighted by q (`hps_form`);
            `uniform` the same with gamma = 0, the control that any claim for q must beat;
            `random` the better of two random responses against the other, drawn anew at every visit;
            `human` the pair in `human`.
        n_factor: `one` (kappa = 1) or `n_minus_one` (kappa = number of dispreferred responses, Eq. 8).
        hps_samples: draws a visit, with replacement (more than one is OURS).
        positives: how many responses count as valid (App. E). With m > 1, for `hps` and `uniform` in the form `full`,
            columns are in ranked order, the m best in front, and log_q is that of the first one's stage.
        human: (R, 2) int, (chosen, rejected) of each prompt, -1 where it has none; looked at by `human` alone.
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

    excluded = {"ties_with_best": 0, "copies_of_best": 0}
    kept_of: list[np.ndarray] = []
    if view == "human":
        assert human is not None and human.shape == (len(identity), 2)
        dropped = {"rows_no_human_pair": int((human < 0).any(1).sum()), "pairs_of_equal_texts": 0}
        for rows in chunks(len(identity)):
            pair = human[rows]
            texts = np.take_along_axis(_rows(identity, rows, -1, np.int64), pair.clip(min=0), axis=1)
            some, equal = (pair >= 0).all(1), texts[:, 0] == texts[:, 1]
            dropped["pairs_of_equal_texts"] += int((some & equal).sum())
            kept_of.append(rows[some & ~equal])
    else:
        dropped = {"rows_one_response": 0, "rows_no_dispreferred": 0}
        for rows in chunks(len(rewards)):
            r = _rows(rewards, rows, -np.inf, np.float64)
            _, below, left_out = dispreferred(r, _rows(identity, rows, -1, np.int64), positives)
            some, single = below.any(1), (r > -np.inf).sum(1) == 1
            dropped["rows_one_response"] += int((~some & single).sum())
            dropped["rows_no_dispreferred"] += int((~some & ~single).sum())
            for reason in excluded:
                excluded[reason] += int(left_out[reason][some].sum())
            kept_of.append(rows[some])
    kept = np.concatenate(kept_of)
    if not len(kept):
        raise ValueError(
            f"no prompt has a response below its best one ({dropped}): check the rewards with data_prep.py doctor"
            if view != "human"
            else f"no prompt has a human pair of different texts ({dropped}): give `chosen` and `rejected` in the data"
        )

    visits, epoch = _visits(np.asarray(keys, dtype=np.uint64)[kept], epochs=epochs, seed=seed, shuffle=shuffle)
    row = kept[visits]
    key = np.asarray(keys, dtype=np.uint64)[row]
    steps = -(-len(visits) // prompts_per_step)
    progress = np.arange(len(visits)) // prompts_per_step / steps
    gamma, effective, kappa = np.zeros(len(visits)), np.ones(len(visits)), np.ones(len(visits))
    if view == "hps":
        share = counter_uniform(seed, _GAMMA, key, epoch) if gamma_schedule == "mixture" else progress
        gamma = gamma_at(share, schedule=gamma_schedule, start=gamma_start, end=gamma_end, phases=gamma_phases)
    # Draws depend on the prompt and the epoch, not on the order of the visits: the data is read in its own order. Each
    # block has the visits of some prompts in one epoch (C,), their responses (C, k), and log_q (C, k - 1).
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    visits_of = np.argsort(visits, kind="stable").reshape(len(kept), epochs)
    if human is not None and view == "human":
        blocks.append((np.arange(len(row)), human[row].astype(np.int64), np.zeros((len(row), 1))))
    for rows in chunks(len(rewards)) if view != "human" else ():
        here = slice(*np.searchsorted(kept, [rows[0], rows[-1] + 1]))
        some = kept[here] - rows[0]
        if not len(some):
            continue
        r = _rows(rewards, rows, -np.inf, np.float64)[some]
        same = _rows(identity, rows, -1, np.int64)[some]
        best, eligible, _ = dispreferred(r, same, positives)
        np.put_along_axis(eligible, best[:, 1:], True, axis=1)  # y_2 is an opponent of y_1
        for at in visits_of[here].T:
            counters, first = [key[at], epoch[at]], best[:, 0]
            if view == "random":
                first, other = _random_pair(r, counters, seed)
                others = other[:, None]
            elif view in ("bt", "pl"):
                others = ranked_subset(r, eligible, same, {"bt": 2, "pl": pl_responses}[view])
            if view in ("random", "bt", "pl"):
                log_weights = np.zeros(others.shape)
            else:
                scaled = normalise_rewards(r, norm=reward_norm, scale=reward_scale, valid=r > -np.inf)
                weights = hps_log_q(scaled, eligible, gamma[at])
                effective[at] = np.exp(-(np.exp(weights) * np.where(weights > -np.inf, weights, 0.0)).sum(1))
                others, log_weights = _draw(weights, counters, seed, form=hps_form, samples=hps_samples)
                if n_factor == "n_minus_one":
                    kappa[at] = eligible.sum(1)
                if positives > 1:
                    heights = np.where(others >= 0, np.take_along_axis(r, others.clip(min=0), axis=1), -np.inf)
                    rank = np.argsort(-heights, axis=1, kind="stable")
                    others, log_weights = (np.take_along_axis(x, rank, axis=1) for x in (others, log_weights))
            blocks.append((at, np.hstack([first[:, None], others]), log_weights))
    K = max(int((some >= 0).sum(1).max()) for _, some, _ in blocks)
    responses, log_q = np.full((len(row), K), -1), np.zeros((len(row), K - 1), dtype=np.float32)
    for at, some, log_weights in blocks:
        responses[at, : some.shape[1]] = some[:, :K]
        log_q[at, : log_weights.shape[1]] = log_weights[:, : K - 1]
    return Plan(
        row=row,
        epoch=epoch,
        responses=responses,
        log_q=log_q,
        kappa=kappa.astype(np.float32),
        gamma=gamma.astype(np.float32),
        effective=effective.astype(np.float32),
        prompts_per_step=prompts_per_step,
        dropped=dropped,
        excluded=excluded,
    )


def chunks(count: int) -> list[np.ndarray]:
    """0 .. count - 1 in pieces of at most 4,096: what is as wide as the candidates is held of one piece at a time."""
    return np.array_split(np.arange(count), max(1, -(-count // 4096)))


def _rows(column: Sequence[np.ndarray], rows: np.ndarray, fill: float, dtype: type) -> np.ndarray:
    """A chunk of `chunks` of a ragged column, padded, (C, n)."""
    return padded(column[rows[0] : rows[-1] + 1], fill, dtype)
