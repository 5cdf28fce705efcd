"""What the tables report: the metrics by name, reward margins, win rates, BLEU, and the interval around each of them.

Functions on numpy arrays, float64 inside. No model: log-ratios, rewards and texts come from eval.py.
"""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
DRAWS_PER_BLOCK = 256  # bootstrap draws in memory at once; all 4,000 of a test set of 8,000 prompts would be 256 MB


class Metric(NamedTuple):
    group: str
    title: str
    digits: int
    better: int  # +1: larger is better, -1: smaller is, 0: neither
    meaning: str


MARGINS, KL, SAMPLES, WINS, COST = (
    "Margins (nats)",
    "Distance to the reference (nats)",
    "Samples",
    "Samples against SFT",
    "Cost",
)

METRICS = {
    "rm2": Metric(MARGINS, "RM2", 2, 1, "log-ratio of the best candidate minus the runner-up's, no beta"),
    "rm10": Metric(MARGINS, "RM10", 2, 1, "the same against the mean of the ten hardest dispreferred"),
    "rmgap": Metric(MARGINS, "RMgap", 2, 1, "the same against the hardest at least 0.5 reward below"),
    "rm_min": Metric(MARGINS, "RM min", 2, 1, "the same against the candidate of lowest reward"),
    "rm_worst_case": Metric(MARGINS, "RM worst", 2, 1, "the same against the largest dispreferred one"),
    "rm_dpo": Metric(MARGINS, "RM_DPO", 2, 1, "log-ratio of the test set's chosen minus its rejected"),
    "rm_rdpo_chars": Metric(MARGINS, "RM_R-DPO chars", 2, 1, "RM_DPO - 0.01 (chosen - rejected characters)"),
    "rm_rdpo_tokens": Metric(MARGINS, "RM_R-DPO tokens", 2, 1, "RM_DPO - 0.01 (chosen - rejected tokens)"),
    "kl_seq": Metric(KL, "KL (sequence)", 2, 0, "mean log-ratio of the winner; negative if it became rarer"),
    "kl_exact": Metric(KL, "KL (exact)", 2, 0, "next-token KL(policy, reference) summed over the winner"),
    "true_reward": Metric(SAMPLES, "reward", 2, 1, "mean evaluation reward of the samples"),
    "best_of_k_reward": Metric(SAMPLES, "best of k", 2, 1, "mean over prompts of the best sample's reward"),
    "harm": Metric(SAMPLES, "harm %", 1, -1, "samples that are harmful"),
    "junk": Metric(SAMPLES, "junk %", 1, -1, "samples that are broken text"),
    "length": Metric(SAMPLES, "words", 1, 0, "mean words of a sample"),
    "bleu_char": Metric(SAMPLES, "BLEU char", 3, 1, "character 4-gram BLEU in [0, 1], as in the authors' code"),
    "bleu_word": Metric(SAMPLES, "BLEU word", 1, 1, "mean word-level sentence BLEU in [0, 100] by sacrebleu"),
    "win": Metric(WINS, "win %", 1, 1, "samples with a higher reward than the same-numbered SFT sample"),
    "tie": Metric(WINS, "tie %", 1, 0, "samples with exactly the same reward"),
    "lose": Metric(WINS, "lose %", 1, -1, "samples with a lower reward"),
    "train_seconds": Metric(COST, "train s", 1, -1, "seconds of preference training; [lowest, highest] seed"),
    "train_tokens": Metric(COST, "tokens (k)", 0, -1, "thousand packed tokens of preference training; the same range"),
}


def present(rows: Sequence[dict[str, Any]], group: str = "") -> list[str]:
    """The metrics that any of a results file's rows has, in the order of METRICS; of one group, if it is named."""
    return [
        name
        for name, metric in METRICS.items()
        if group in ("", metric.group) and any(name in row["metrics"] for row in rows)
    ]


def extra(module: str) -> Any:
    """A module of a package that not everybody has installed; ValueError, which says how to get it, without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"this needs {module.partition('.')[0]}: pip install hps[eval]") from None


def _finite(name: str, values: ArrayLike, ndim: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name}: need a non-empty array of {ndim} dimension(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name}: {int((~np.isfinite(array)).sum())} of {array.size} values are not finite; "
            "find the prompt that produced them before averaging"
        )
    return array


# ---- margins of one prompt's candidates ----------------------------------------------------------


def order(rewards: ArrayLike) -> NDArray[np.int64]:
    """Indices of the best candidate y_w, then of the dispreferred ones, hardest (highest reward) first.

    Exact ties with the maximum are not dispreferred (authors' code): the first of them is the best, the others are
    left out. Other ties keep their place in the list. ValueError when nothing is dispreferred.

    Args:
        rewards: (n,) external rewards.
    """
    rewards = _finite("rewards", rewards, 1)
    best = rewards.max()
    falling = np.argsort(-rewards, kind="stable")
    dispreferred = falling[rewards[falling] < best]
    if dispreferred.size == 0:
        raise ValueError(
            f"no candidate is dispreferred: all {rewards.size} rewards equal {best:g}; "
            "leave this prompt out of the margins and count it"
        )
    return np.concatenate([falling[:1], dispreferred])


def margins(logratios: ArrayLike, rewards: ArrayLike, *, gap: float = 0.5, hardest: int = 10) -> dict[str, float]:
    """Reward margins of one prompt: how far the best candidate's log-ratio stands above the others'.

    With w the best and D the dispreferred (`order`):
      rm2            h_w - h of the runner-up                                                     (OURS)
      rm10           h_w - mean h over the `hardest` of D with the highest reward, all if fewer   (OURS)
      rmgap          h_w - h of the hardest of D with reward <= best - gap; no key without one    (OURS)
      rm_worst_case  h_w - max h over D                                              (paper, Theorem 3)
      rm_min         h_w - h of the lowest-reward candidate, the pair BT trains on                (OURS)
    The paper's own RM_DPO (Tables 2 and 5) is h_chosen - h_rejected of a test set's human pair instead.

    Args:
        logratios: (n,) h_i = log pi_theta(y_i|x) - log pi_ref(y_i|x), summed over tokens, in nats, WITHOUT beta.
        rewards: (n,) external rewards that rank the candidates.
    """
    h, s = _finite("logratios", logratios, 1), _finite("rewards", rewards, 1)
    if h.shape != s.shape:
        raise ValueError(f"logratios {h.shape} and rewards {s.shape} must describe the same candidates")
    ranked = order(s)
    away = h[ranked[0]] - h[ranked[1:]]
    result = {"rm2": away[0], "rm10": away[:hardest].mean(), "rm_worst_case": away.min(), "rm_min": away[-1]}
    clear = s[ranked[1:]] <= s[ranked[0]] - gap
    if clear.any():
        result["rmgap"] = away[clear.argmax()]
    return {name: float(value) for name, value in result.items()}


def rm_rdpo(rm: float, len_chosen: int, len_rejected: int, *, alpha: float = 0.01) -> float:
    """RM_R-DPO = RM - alpha (|y_w| - |y_l|), the length-corrected margin (paper, Tables 2 and 5).

    Lengths in characters (the paper's figures fit only these) or in tokens. RM - RM_R-DPO depends on the data alone,
    so it is the same for every method.
    """
    return rm - alpha * (len_chosen - len_rejected)


# ---- intervals -----------------------------------------------------------------------------------


def _table(name: str, values: ArrayLike, valid: ArrayLike | None) -> tuple[Floats, Floats]:
    """Values as (worlds, seeds, prompts) with 0 where invalid, and their 0/1 mask."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim > 3:
        raise ValueError(f"{name}: need (prompts,), (seeds, prompts) or (worlds, seeds, prompts), got {values.shape}")
    values = values.reshape((1,) * (3 - values.ndim) + values.shape)
    try:
        mask = np.broadcast_to(np.asarray(True if valid is None else valid, dtype=bool), values.shape)
    except ValueError:
        raise ValueError(f"{name}: valid does not fit values of shape {values.shape}") from None
    if not mask.any():
        raise ValueError(f"{name}: no valid value; leave this metric out of the table")
    return _finite(name, np.where(mask, values, 0.0), 3), mask.astype(np.float64)


def _counts(rng: np.random.Generator, draws: int, items: int) -> Floats:
    """(draws, items): how often a resample of `items` with replacement holds each of them."""
    picks = rng.integers(items, size=(draws, items)) + items * np.arange(draws)[:, None]
    return np.bincount(picks.ravel(), minlength=draws * items).reshape(draws, items).astype(np.float64)


def _resampled(values: Floats, mask: Floats, *, draws: int, seed: int) -> Floats:
    """(draws,) means of resamples of worlds, of seeds and prompts in each world; nan where one holds no valid value.

    The worlds and prompts drawn depend on `seed` and their number alone: that pairs two calls.
    """
    worlds, seeds, prompts = values.shape
    world_rng = np.random.default_rng([seed, 2])
    prompt_rngs = [np.random.default_rng([seed, 0, w]) for w in range(worlds)]
    seed_rngs = [np.random.default_rng([seed, 1, seeds, w]) for w in range(worlds)]
    means = []
    for start in range(0, draws, DRAWS_PER_BLOCK):
        block = min(DRAWS_PER_BLOCK, draws - start)
        by_world = _counts(world_rng, block, worlds)  # one world: all ones
        total, count = np.zeros(block), np.zeros(block)
        for w in range(worlds):
            by_prompt = _counts(prompt_rngs[w], block, prompts)
            by_seed = _counts(seed_rngs[w], block, seeds)
            total += by_world[:, w] * ((by_prompt @ values[w].T) * by_seed).sum(1)
            count += by_world[:, w] * ((by_prompt @ mask[w].T) * by_seed).sum(1)
        means.append(np.divide(total, count, out=np.full(block, np.nan), where=count > 0))
    return np.concatenate(means)


def _interval(mean: float, resampled: Floats, level: float) -> tuple[float, float, float]:
    if not 0 < level < 1 or resampled.size < 100:
        raise ValueError(f"need 0 < level < 1 and at least 100 draws, got {level} and {resampled.size}")
    low, high = np.nanquantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(mean), float(low), float(high)


def bootstrap_mean(
    values: ArrayLike, *, valid: ArrayLike | None = None, draws: int = 4000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over all valid values and its percentile bootstrap interval: (mean, low, high) (OURS).

    Worlds are resampled, and in each of them seeds, and prompts jointly for all its seeds. A resample without any
    valid value has no mean: the interval is that of the other resamples.
    Three worlds say little about the spread between worlds: the interval is then somewhat too narrow.

    Args:
        values: (prompts,), (seeds, prompts) with the same prompts in every seed, or (worlds, seeds, prompts) with
            prompts of its own in every world.
        valid: bool, of a shape that broadcasts to that of values, which are ignored where it is False.
    """
    table, mask = _table("values", values, valid)
    return _interval(table.sum() / mask.sum(), _resampled(table, mask, draws=draws, seed=seed), level)


def bootstrap_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    valid: ArrayLike | None = None,
    draws: int = 4000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of a - b and its paired percentile bootstrap interval: (mean, low, high) (OURS).

    Worlds and prompts are always drawn together for a and b. Seeds: with the same number in both, seed i of a is paired
    with seed i of b (same start, same data) and they are drawn together; with different numbers (three runs against
    one SFT) each side's are drawn alone.

    Args:
        a, b: as in bootstrap_mean, over the same worlds and prompts.
        valid: as in bootstrap_mean, for both; (prompts,) when the numbers of seeds differ.
    """
    table_a, mask_a = _table("a", a, valid)
    table_b, mask_b = _table("b", b, valid)
    if (table_a.shape[0], table_a.shape[2]) != (table_b.shape[0], table_b.shape[2]):
        raise ValueError(
            f"a has {table_a.shape[0]} world(s) of {table_a.shape[2]} prompts, b {table_b.shape[0]} of "
            f"{table_b.shape[2]}: give both the same ones"
        )
    if table_a.shape == table_b.shape:
        return bootstrap_mean(table_a - table_b, valid=mask_a, draws=draws, level=level, seed=seed)
    mean = table_a.sum() / mask_a.sum() - table_b.sum() / mask_b.sum()
    resampled_a = _resampled(table_a, mask_a, draws=draws, seed=seed)
    resampled_b = _resampled(table_b, mask_b, draws=draws, seed=seed)
    return _interval(mean, resampled_a - resampled_b, level)


def wilcoxon_p(a: ArrayLike, b: ArrayLike, *, valid: ArrayLike | None = None) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that a - b is symmetric about 0, prompt by prompt (OURS).

    a, b, valid: as in `bootstrap_difference`; a prompt's value is its mean over the seeds, the prompts of all worlds
    stand together. So it asks about more prompts for *these* models; the bootstrap asks about more worlds and runs too.
    Returns 1 where no prompt differs.
    """
    table_a, mask_a = _table("a", a, valid)
    table_b, mask_b = _table("b", b, valid)
    counted = mask_a.any(1) & mask_b.any(1)  # (worlds, prompts)
    means = [t.sum(1)[counted] / m.sum(1)[counted] for t, m in ((table_a, mask_a), (table_b, mask_b))]
    difference = means[0] - means[1]
    return float(extra("scipy.stats").wilcoxon(difference).pvalue) if np.any(difference) else 1.0


# ---- win rate and BLEU ---------------------------------------------------------------------------


def win_tie_lose(a: ArrayLike, b: ArrayLike) -> dict[str, float]:
    """Percentages of a's values above, equal to and below b's in the same place, summing to 100 (the paper's Table 4).

    a, b: equal shapes, say (samples,) rewards of one prompt. ValueError: shapes differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"values of shapes {a.shape} and {b.shape}: need the same prompts and samples")
    return {
        name: float(100.0 * np.mean(np.sign(a - b) == sign)) for name, sign in (("win", 1), ("tie", 0), ("lose", -1))
    }


def bleu_char(hypothesis: str, reference: str) -> float:
    """Character 4-gram BLEU in [0, 1]: the authors' nltk sentence_bleu([reference], hypothesis).

    They pass plain strings, which iterate by character: nltk never sees words, and the paper's 0.22 to 0.31 are
    such values. BP * exp(mean_n log p_n), n = 1..4, both sides stripped, case kept, no smoothing: without one
    common 4-gram it is (numerically) 0, and for an empty text exactly 0.
    """
    bleu = extra("nltk.translate.bleu_score")
    with warnings.catch_warnings():
        # nltk warns of every text without a common n-gram; its 0 is what we want to count.
        warnings.filterwarnings("ignore", message=r"\s*The hypothesis contains 0 counts")
        return float(bleu.sentence_bleu([list(reference.strip())], list(hypothesis.strip())))


def bleu_word(hypothesis: str, reference: str) -> float:
    """Word-level sentence BLEU in [0, 100] by sacrebleu (13a tokens, exp smoothing); 0 for an empty hypothesis.

    OURS, beside the authors' character BLEU. Sentence by sentence, so that intervals over prompts can be drawn;
    corpus BLEU is another number.
    """
    return float(extra("sacrebleu").sentence_bleu(hypothesis, [reference]).score)
