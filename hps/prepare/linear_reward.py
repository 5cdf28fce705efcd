"""A linear Bradley-Terry reward model: a scorer (`hps/prepare/rewards.py`) that needs neither a download nor a GPU.

A weight for every hashed word and word pair of the response and two for its length, fitted to preference pairs in
seconds. It is a stand-in for a reward model, so that real text can go through the whole pipeline offline. It does not
see the prompt, and it knows words, not meaning: fitted to 1,300 pairs of HH-RLHF harmless it reverses 54 of 127
other ones (docs/RESULTS.md). Do not report results with it as those of a trained reward model.
"""

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from hps.io import files
from hps.prepare.rewards import Prompt

_WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_FORMAT = "hps-linear-reward-1"


@dataclass(frozen=True, slots=True)
class LinearRewardModel:
    """Weights of hashed words and word pairs, then of log(1 + words) and words / 100."""

    weights: np.ndarray  # (buckets + 2,) float32
    l2: float
    num_pairs: int  # it was fitted to


def features(response: str, *, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the non-zero features of a response: indices (F,) int64 and values (F,) float64.

    A word or word pair seen c times in a response of M different ones has the value log(1 + c) / sqrt(M), so
    that a long response does not weigh more than a short one; length has its own two features.
    """
    words = _WORD.findall(response.lower())
    grams = words + [f"{a} {b}" for a, b in pairwise(words)]
    # crc32 is the same in every process, unlike hash(); half an emoji cut off by a tokenizer must pass too.
    hits = Counter(zlib.crc32(gram.encode(errors="surrogatepass")) % buckets for gram in grams)
    values = np.log1p(list(hits.values())) / math.sqrt(len(hits) or 1)
    length = [math.log1p(len(words)), len(words) / 100]
    return np.array([*hits, buckets, buckets + 1]), np.array([*values, *length])


def fit(
    pairs: Sequence[tuple[str, str, str]], *, buckets: int = 2**15, l2: float = 1e-3, max_iter: int = 500
) -> LinearRewardModel:
    """Fits a linear Bradley-Terry reward model to (prompt, chosen, rejected) texts.

    Minimises mean softplus(-w . (f_chosen - f_rejected)) + l2 / 2 |w|^2, the negative log-likelihood of the
    paper's Eq. 15 with a Gaussian prior. It is strictly convex, so the result depends on no seed.

    Raises:
        ValueError: no pairs, buckets < 1, l2 <= 0, or no convergence.
    """
    if not pairs or buckets < 1 or not 0 < l2 < math.inf:
        raise ValueError("fit() needs at least one pair, buckets >= 1 and a positive, finite l2")
    rows, columns, values = [], [], []
    for row, (_, chosen, rejected) in enumerate(pairs):
        for text, sign in ((chosen, 1.0), (rejected, -1.0)):
            index, value = features(text, buckets=buckets)
            rows.append(np.full(len(index), row))
            columns.append(index)
            values.append(sign * value)
    where = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(columns)]))
    size = (len(pairs), buckets + 2)
    differences = torch.sparse_coo_tensor(
        where, torch.from_numpy(np.concatenate(values)), size, check_invariants=True
    ).coalesce()
    weights = torch.zeros(buckets + 2, 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=max_iter, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        margins = torch.sparse.mm(differences, weights)
        loss = torch.nn.functional.softplus(-margins).mean() + l2 / 2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    assert weights.grad is not None
    if not weights.grad.abs().max() < 1e-5:
        raise ValueError(f"fit() did not converge in {max_iter} iterations: raise l2 or max_iter")
    return LinearRewardModel(weights.detach()[:, 0].float().numpy(), l2, len(pairs))


def score(model: LinearRewardModel, prompt: Prompt, responses: Sequence[str]) -> list[float]:
    """Returns the reward of each response; `prompt` is not looked at, it makes this a scorer."""
    rewards = []
    for response in responses:
        index, value = features(response, buckets=len(model.weights) - 2)
        rewards.append(float(model.weights[index].astype(np.float64) @ value))
    return rewards


def save(model: LinearRewardModel, path: str | Path) -> None:
    """Writes the model as safetensors, settings in the metadata."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({"format": _FORMAT, "l2": model.l2, "num_pairs": model.num_pairs})
    with files.replacing(path) as partial:
        partial.write_bytes(safetensors.numpy.save({"weights": model.weights}, metadata={"linear_reward": settings}))


def load(path: str | Path) -> LinearRewardModel:
    """Reads a model that `save` wrote.

    Raises:
        ValueError: there is no such file, or it is something else.
    """
    try:
        with safetensors.safe_open(path, framework="np") as file:
            about = (file.metadata() or {}).get("linear_reward", "{}")
            weights = file.get_tensor("weights") if "weights" in file.keys() else np.zeros(0)
    except Exception as error:  # safetensors raises types of its own; whatever it says, the file is not usable
        raise ValueError(f"{path} is not a safetensors file ({error}); make one with data_prep.py fit") from error
    try:
        settings = json.loads(about)
        l2, num_pairs = settings["l2"], settings["num_pairs"]
        good = settings["format"] == _FORMAT and 0 < l2 < math.inf and type(num_pairs) is int
    except (ValueError, LookupError, TypeError, RecursionError):
        good, l2, num_pairs = False, 0.0, 0
    good &= (weights.dtype, weights.ndim) == (np.float32, 1) and len(weights) > 2  # a bucket, two features of length
    if not good or not np.isfinite(weights).all():
        raise ValueError(f"{path} is not a linear reward model; make one with data_prep.py fit")
    return LinearRewardModel(weights, l2, num_pairs)
