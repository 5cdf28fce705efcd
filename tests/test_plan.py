"""The plan of a run: against a slow one, visit by visit; the distribution of draws; what a draw may not depend on."""

import math

import numpy as np
import pytest
from scipy import stats

from hps import plan as planning
from hps.extra.kto import mismatched
from hps.plan import plan
from hps.samplers import counter_uniform, gamma_at

RUN = dict(epochs=2, prompts_per_step=4, seed=0)
CONSTANT = dict(sampler="hps", gamma_schedule="constant")


def world(rows: int = 40, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Ragged rewards, all texts distinct, and keys."""
    g = np.random.default_rng(seed)
    rewards = [g.normal(size=g.integers(3, 12)) for _ in range(rows)]
    return rewards, [np.arange(len(r)) for r in rewards], g.integers(0, 2**63, size=rows, dtype=np.uint64)


def same_prompt(r: np.ndarray, times: int, **how) -> planning.Plan:
    """The plan of one prompt of distinct texts, copied under other keys."""
    return plan([r] * times, [np.arange(len(r))] * times, np.arange(times), **how)


# ------------------------------------------------------------------------------------------------------- a slow plan


def contrast(r, texts, positives: int) -> tuple[list[int], list[int], int, int]:
    """The preferred, those that q runs over, and how many ties and copies are left out."""
    left, best, ties, copies = [k for k in range(len(r)) if r[k] > -np.inf], [], 0, 0
    for _ in range(positives):
        if left:
            best.append(max(left, key=lambda k: r[k]))
            tie = [k for k in left if r[k] == r[best[-1]] and k != best[-1]]
            copy = [k for k in left if r[k] != r[best[-1]] and texts[k] == texts[best[-1]]]
            ties, copies = ties + len(tie), copies + len(copy)
            left = [k for k in left if k not in (*tie, *copy, best[-1])]
    return best, sorted(best[1:] + left) if left else [], ties, copies


def ranks_by_hand(r, texts, pool: list[int], size: int) -> list[int]:
    distinct: list[int] = []
    for k in sorted(pool, key=lambda k: -r[k]):
        if all(texts[k] != texts[j] for j in distinct):
            distinct.append(k)
    if size and len(distinct) > size - 1:
        places = np.linspace(0, len(distinct) - 1, size - 1) if size > 2 else [len(distinct) - 1]
        distinct = [distinct[round(x)] for x in places]
    return distinct


def visit_by_hand(r, texts, key, epoch, progress, sampler, o) -> tuple[list[int], list[float], float, float, float]:
    """Responses, log_q, kappa, gamma and effective negatives of one visit."""
    best, pool, _, _ = contrast(r, texts, o.get("positives", 1))
    if sampler in ("bt", "human"):
        return [best[0], ranks_by_hand(r, texts, pool, 2)[0]], [0.0], 1, 0, 1
    if sampler == "pl":
        ranked = ranks_by_hand(r, texts, pool, o["pl_responses"])
        return [best[0], *ranked], [0.0] * len(ranked), 1, 0, 1
    if sampler == "random":
        u = counter_uniform(o["seed"], 4, key, epoch, np.arange(len(r)))
        first, *others = np.argsort(u)
        other = next(k for k in others if r[k] != r[first])
        return sorted([first, other], key=lambda k: -r[k]), [0.0], 1, 0, 1
    at = counter_uniform(o["seed"], 3, key, epoch)[0] if o.get("gamma_schedule") == "mixture" else progress
    how = dict(schedule=o.get("gamma_schedule", "left_knots"), start=o.get("gamma_start", -5.0))
    gamma = float(gamma_at(at, **how)) if sampler == "hps" else 0.0
    s = o.get("reward_scale", 1.0) * (stats.zscore(r) if o.get("reward_norm") == "zscore" else r)
    log_q = gamma * s[pool] - np.logaddexp.reduce(gamma * s[pool])
    kappa = len(pool) if o.get("n_factor") == "n_minus_one" else 1
    if o.get("hps_form") == "full":
        order = np.argsort(-r[pool], kind="stable") if o.get("positives", 1) > 1 else range(len(pool))
        others, weights = [pool[i] for i in order], [log_q[i] for i in order]
    else:
        K, drawn = o.get("hps_samples", 1), []
        for d in range(K):
            u = counter_uniform(o["seed"], 2 + 16 * d, key, epoch, np.arange(len(r)))[pool]
            drawn.append(pool[int(np.argmax(log_q - np.log(-np.log(u))))])
        others = sorted(set(drawn))
        weights = [math.log(drawn.count(k) / K) for k in others]
    return [best[0], *others], weights, kappa, gamma, math.exp(stats.entropy(np.exp(log_q)))


CASES = [
    ("bt", {}),
    ("bt", dict(shuffle="together")),
    ("pl", dict(pl_responses=0)),
    ("pl", dict(pl_responses=5)),
    ("random", dict(epochs=3)),
    ("human", dict(shuffle="no")),
    ("uniform", dict(hps_samples=4, n_factor="n_minus_one")),
    ("hps", dict(reward_norm="zscore", reward_scale=0.5)),
    ("hps", dict(gamma_schedule="mixture", hps_form="full", n_factor="n_minus_one")),
    ("hps", dict(gamma_schedule="linear", gamma_start=-1.0, hps_samples=3)),
    ("hps", dict(hps_form="full", positives=3, shuffle="together")),
]


@pytest.mark.parametrize(("sampler", "options"), CASES)
def test_rows_of_any_length_give_what_each_gives_alone(monkeypatch, sampler, options):
    """The plan works on chunks of prompts, padded; here with ties, copies, single responses and rows of no contrast."""
    monkeypatch.setattr(planning, "PROMPTS_PER_CHUNK", 50)
    g = np.random.default_rng(1)
    sizes = g.integers(1, 12, size=170)
    rewards = [g.normal(size=n).round(1) for n in sizes]
    identity = [g.integers(0, n + 1, size=n) for n in sizes]
    keys = g.integers(0, 2**63, size=170, dtype=np.uint64)
    human = np.stack([g.integers(-1, sizes), g.integers(-1, sizes)], 1)
    human[human[:, 0] == human[:, 1]] = -1
    o = dict(epochs=2, prompts_per_step=7, seed=5, shuffle="epochs") | options
    p = plan([None] * 170 if sampler == "human" else rewards, identity, keys, sampler=sampler, human=human, **o)
    reasons = "rows_one_response", "rows_no_dispreferred"
    if sampler == "human":  # is best against worst of the pair alone
        reasons, rewards = ("rows_no_human_pair", "pairs_of_equal_texts"), [np.full(n, -np.inf) for n in sizes]
        for r, pair in zip(rewards, human):
            r[pair] = (1.0, 0.0) if min(pair) >= 0 else -np.inf
    found = [contrast(r, t, o.get("positives", 1)) for r, t in zip(rewards, identity)]
    pools = [pool for _, pool, _, _ in found]
    single = sum(sum(r > -np.inf) < 2 for r in rewards)
    dropped = dict(zip(reasons, (single, sum(not pool for pool in pools) - single)))
    excluded = [sum(x[i] for x in found if x[1]) for i in (2, 3)]
    assert p.dropped == dropped and p.excluded == dict(zip(("ties_with_best", "copies_of_best"), excluded))

    visits = [(row, epoch) for epoch in range(o["epochs"]) for row in range(170) if pools[row]]
    number = {v: counter_uniform(o["seed"], 1, v[1], keys[v[0]])[0] for v in visits}
    by = {"no": lambda v: v[::-1], "together": lambda v: number[v], "epochs": lambda v: (v[1], number[v])}
    visits.sort(key=by[o["shuffle"]])
    assert list(zip(p.row, p.epoch)) == visits
    assert (p.step(0), p.step(p.steps - 1)) == (range(7), range((p.steps - 1) * 7, len(visits)))
    widest = 0
    for v, (row, epoch) in enumerate(visits):
        how = keys[row], epoch, v // 7 / p.steps, sampler, o
        responses, log_q, *rest = visit_by_hand(rewards[row], identity[row], *how)
        widest = max(widest, len(responses))
        assert p.responses[v][: len(responses)].tolist() == responses and (p.responses[v][len(responses) :] == -1).all()
        np.testing.assert_allclose(p.log_q[v][: len(log_q)], log_q, rtol=1e-5, atol=1e-6)
        assert (p.log_q[v][len(log_q) :] == 0).all()
        np.testing.assert_allclose([p.kappa[v], p.gamma[v], p.effective[v]], rest, rtol=1e-5)
    assert p.responses.shape[1] == widest


# -------------------------------------------------------------------------------------------------- what draws are like


def test_draws_follow_q():
    """One prompt visited 20,000 times at a constant gamma against Eq. 9; 4,000 draws of a visit; uniform draws."""
    r = np.array([0.3, 2.0, 1.2, -0.5, 0.9])
    q = np.exp(1.5 * np.delete(r, 1))
    many = dict(epochs=1, prompts_per_step=64, seed=3)
    p = same_prompt(r, 20_000, gamma_start=1.5, **CONSTANT, **many)
    assert (p.responses[:, 0] == 1).all()
    counts = np.bincount(p.responses[:, 1], minlength=5)
    assert counts[1] == 0 and stats.chisquare(np.delete(counts, 1), 20_000 * q / q.sum()).pvalue > 1e-3
    p = same_prompt(r, 1, gamma_start=1.5, hps_samples=4_000, **CONSTANT, **many)
    np.testing.assert_allclose(np.exp(p.log_q[0]), q / q.sum(), atol=0.03)
    p = same_prompt(np.arange(6.0), 5_000, sampler="uniform", **RUN)
    assert stats.chisquare(np.bincount(p.responses[:, 1], minlength=6)[:-1]).pvalue > 1e-3
    first, second = (dict(zip(p.row[p.epoch == e], p.responses[p.epoch == e, 1], strict=True)) for e in (0, 1))
    assert abs(np.mean([first[row] == second[row] for row in first]) - 1 / 5) < 0.03  # alike by chance only
    # Gammas in random order: each visit has one of the five, whatever the step (the authors' accident).
    p = same_prompt(r, 2_000, sampler="hps", gamma_schedule="mixture", **RUN)
    for half in (p.gamma[:2000], p.gamma[2000:]):
        values, counts = np.unique(half, return_counts=True)
        assert values.tolist() == [-5, -3, -1, 1, 3] and stats.chisquare(counts).pvalue > 1e-3


def test_draws_depend_on_the_prompt_and_not_on_its_place():
    """Another file order, other prompts left out, wider neighbours (padding), another chunk: the same draws."""
    rewards, identity, keys = world(rows=10_000)  # three chunks
    for i in range(0, 10_000, 7):
        rewards[i], identity[i] = np.zeros(3), np.arange(3)  # no contrast: not in the plan
    whole = plan(rewards, identity, keys, gamma_start=1.0, **CONSTANT, **RUN)
    at = {(keys[r], e): y for r, e, y in zip(whole.row, whole.epoch, whole.responses, strict=True)}
    some = np.random.default_rng(1).permutation(10_000)[:300]
    part = plan([rewards[i] for i in some], [identity[i] for i in some], keys[some], gamma_start=1.0, **CONSTANT, **RUN)
    for r, e, y in zip(part.row, part.epoch, part.responses, strict=True):
        assert y.tolist() == at[keys[some][r], e].tolist()
        assert y[0] == np.argmax(rewards[some[r]])
    assert len(part.row) == 2 * sum(i % 7 > 0 for i in some)


def test_curriculum_follows_optimizer_steps():
    """20 steps, four of each gamma; -5 draws low-reward responses, 3 high ones."""
    rewards, identity, keys = world()
    p = plan(rewards, identity, keys, sampler="hps", **RUN)
    assert [p.gamma[p.step(s)[0]] for s in range(20)] == [g for g in (-5, -3, -1, 1, 3) for _ in range(4)]
    place = [stats.rankdata(rewards[r])[y] / len(rewards[r]) for r, y in zip(p.row, p.responses[:, 1], strict=True)]
    low, high = (np.mean(np.array(place)[p.gamma == g]) for g in (-5, 3))
    assert low < 0.35 < 0.55 < high
    # A last step that is not full is a step as well: five visits by two are three of them.
    how = dict(sampler="hps", gamma_schedule="linear", epochs=1, prompts_per_step=2, seed=0)
    p = plan(rewards[:5], identity[:5], keys[:5], **how)
    np.testing.assert_allclose([p.gamma[p.step(s)[0]] for s in range(3)], [-5, -5 / 3, 5 / 3], rtol=1e-6)


# ------------------------------------------------------------------------------------------------ by hand, and mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sampler="pl", pl_responses=1), r"pl_responses must be 0 \(all\) or at least 2, got 1"),
        (dict(gamma_schedule="inclusive", gamma_phases=1), "'inclusive' needs more than 1 gamma_phases"),
    ],
)
def test_a_mistake_is_named(options, message):
    how = dict(rewards=[np.array([1.0, 0.0])], sampler="hps", **RUN) | options
    with pytest.raises(ValueError, match=message):
        plan(identity=[np.arange(2)], keys=np.arange(1), **how)


def test_mismatched_pairs_by_hand():
    """The next visit of the step, cyclically; never the same prompt; a lone visit looks back."""
    rewards, identity, keys = world(rows=5)
    how = dict(sampler="bt", shuffle="no", seed=0)
    p = plan(rewards, identity, keys, epochs=1, prompts_per_step=2, **how)
    assert mismatched(p).tolist() == [1, 0, 3, 2, 3]
    # Prompts 0 1 2 0 | 1 2: the fourth visit's next one is the first, which is of its own prompt.
    p = plan(rewards[:3], identity[:3], keys[:3], epochs=2, prompts_per_step=4, **how)
    assert mismatched(p).tolist() == [1, 2, 3, 1, 5, 4]
    with pytest.raises(ValueError, match="the first step has only one prompt"):
        mismatched(plan(rewards, identity, keys, epochs=1, prompts_per_step=1, **how))
