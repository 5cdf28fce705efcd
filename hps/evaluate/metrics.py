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
SIGNS = {"win": 1, "tie": 0, "lose": -1}  # of a difference
AGAIN = " again"  # ends the name of a row that is another one with another seed: every difference of the two is chance
TUNED = " tuned"  # ends the name of a row at beta and lr of its own, where others share one setting


class Metric(NamedTuple):
    group: str
    title: str
    digits: int
    better: int  # +1: larger is better, -1: smaller is, 0: neither
    meaning: str


MARGINS, KL = "Margins (nats)", "Distance to the reference (nats)"
SAMPLES, WINS, COST = "Samples", "Samples against SFT", "Cost"

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
    "kl_samples": Metric(KL, "KL (samples)", 2, 0, "mean log-ratio of the policy's own samples"),
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
    "lead": Metric(WINS, "win - lose", 1, 1, "a's samples above b's of the same number minus those below, by reward"),
    "train_seconds": Metric(COST, "train s", 1, -1, "seconds of preference training"),
    "train_tokens": Metric(COST, "tokens (k)", 0, -1, "thousand packed tokens of preference training"),
}


def present(rows: Sequence[dict[str, Any]], group: str = "") -> list[str]:
    """The metrics that any of a results file's rows has, in the order of METRICS; of one group, if it is named."""
    known = {name for row in rows for name in row["metrics"]}
    return [name for name, metric in METRICS.items() if name in known and group in ("", metric.group)]


def extra(module: str) -> Any:
    """A module of a package that not everybody has installed; ValueError, which says how to get it, without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"this needs {module.partition('.')[0]}: pip install -e '.[eval]'") from None


def _finite(name: str, values: ArrayLike, ndim: int) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name}: need a non-empty array of {ndim} dimension(s), got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise ValueError(f"{name}: {bad} of {array.size} values are not finite; find the prompt that produced them")
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
    falling = np.argsort(-rewards, kind="stable")
    dispreferred = falling[rewards[falling] < rewards.max()]
    if not dispreferred.size:
        raise ValueError(f"no candidate is dispreferred: all {rewards.size} rewards are equal; leave this prompt out")
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


# ---- intervals -----------------------------------------------------------------------------------


def world_interval(values: ArrayLike) -> dict[str, Any]:
    """Mean of one number per world and Student's 95 % interval of what it is over all worlds (OURS).

    Runs, prompts and samples of a world have been averaged before: what differs between worlds holds their spread too,
    and worlds alone are independent of each other. The prompts of one evaluation can stand in for worlds, and the
    interval is then about more prompts for that model, nothing else.

    Args:
        values: (W,)

    Returns:
        {"mean", "low", "high"}, for JSON, which knows no infinity: of a single number low and high are None.
    """
    values = _finite("values", values, 1)
    mean, number = float(values.mean()), len(values)
    if number == 1:
        return {"mean": mean, "low": None, "high": None}
    half = float(extra("scipy.stats").t.ppf(0.975, number - 1) * values.std(ddof=1) / np.sqrt(number))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def world_p(values: ArrayLike, bound: float = 0.0) -> float:
    """Two-sided p of the t test that the mean over all worlds is `bound`, (W,); 1 where one number is all there is.

    Below 0.05 exactly where `bound` lies outside the 95 % interval; of equal numbers, whose interval is a point and may
    be an accident of two worlds, p is that of the sign test.
    """
    away = _finite("values", values, 1) - bound
    if np.ptp(away) == 0:
        return 1.0 if away[0] == 0 else 0.5 ** (len(away) - 1)
    return float(extra("scipy.stats").ttest_1samp(away, 0).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: of those below 0.05 any is false with a probability of 0.05 at most."""
    rising = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(np.asarray(p, dtype=np.float64)[rising] * np.arange(len(p), 0, -1))
    return np.minimum(1.0, adjusted)[np.argsort(rising)].tolist()


def adjust(items: Sequence[dict[str, Any]]) -> None:
    """Give each item with "metric" and "p" its "p_holm", adjusted for all of these items that are of its metric; a
    comparison of a row with itself, a = b AGAIN, has none and does not count."""
    for metric in {item["metric"] for item in items}:
        mine = [x for x in items if x["metric"] == metric and x.get("a") != f"{x.get('b')}{AGAIN}"]
        for item, adjusted in zip(mine, holm([item["p"] for item in mine]), strict=True):
            item["p_holm"] = adjusted


def ends(item: dict[str, Any]) -> tuple[float, float]:
    """low and high of an item, infinite where it has no interval."""
    return (-np.inf, np.inf) if item["low"] is None else (item["low"], item["high"])


# ---- win rate and BLEU ---------------------------------------------------------------------------


def win_tie_lose(a: ArrayLike, b: ArrayLike) -> dict[str, float]:
    """Percentages of a's values above, equal to and below b's in the same place, summing to 100 (the paper's Table 4).

    a, b: equal shapes, say (samples,) rewards of one prompt. ValueError: shapes differ.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"values of shapes {a.shape} and {b.shape}: need the same prompts and samples")
    return {name: float(100 * np.mean(np.sign(a - b) == sign)) for name, sign in SIGNS.items()}


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
