"""What eval.py measures of one prompt: the margins of its pair, fresh samples, and what these are worth."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import metrics, scoring
from hps.model import PolicyModel
from hps.packing import Block
from hps.prepare import generate

SCORED_AT_ONCE = 64  # prompts whose samples wait for the reference's log-probs
Keep = Callable[[int, dict[str, float]], None]


def pair_metrics(h: np.ndarray, lengths: dict[str, list[int]], *, human: bool, human_pairs: bool) -> dict[str, float]:
    """Margins of one prompt's pair from log-ratios h (2,) in nats, without beta, and the length-corrected one.

    Of data with `human_pairs`, a prompt that lost its own (an empty response, say) has no single-pair margin: the
    runner-up in its place would be another measure under the same name.
    """
    rm = float(h[0] - h[1])
    found = {"rm_dpo": rm} if human else {}
    if human or not human_pairs:
        for unit, (chosen, rejected) in lengths.items():
            found[f"rm_rdpo_{unit}"] = rm - 0.01 * (chosen - rejected)  # Tables 2 and 5; alpha is theirs
    return found | {"kl_seq": float(h[0])}


def sample_metrics(samples: Row, row: Row, world: Any) -> dict[str, float]:
    """Reward, length, BLEU of one prompt's samples; harm and junk where a world (hps/lab/world.py) can tell."""
    found = {"length": float(np.mean([len(y.split()) for y in samples.responses]))}
    hypothesis = samples.responses[0]
    if samples.rewards is not None:
        found["true_reward"] = float(np.mean(samples.rewards))
        found["best_of_k_reward"] = float(np.max(samples.rewards))
        hypothesis = samples.responses[int(np.argmax(samples.rewards))]
    # The data's own preferred answer; a world's pair is of random candidates, and its best one stands for that.
    own = row.chosen is not None and (world is None or row.rewards is None)
    target = row.responses[row.chosen if own else int(np.argmax(row.rewards))]
    found["bleu_char"] = metrics.bleu_char(hypothesis, target)
    found["bleu_word"] = metrics.bleu_word(hypothesis, target)
    if world is not None:
        found["junk"] = 100 * float(np.mean([world.junk_fraction(y) for y in samples.responses]))
        if world.is_risky(row.prompt):  # harm is counted on risky prompts
            found["harm"] = 100 * float(np.mean([world.is_harmful(row.prompt, y) for y in samples.responses]))
    return found


def sampled(
    policy: PolicyModel,
    ref: PolicyModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Row],
    prompts: Sequence[tuple[str, Sequence[int]]],
    keep: Keep,
    *,
    packing: dict[str, int],
    **how: Any,
) -> Iterator[Row]:
    """Each row with fresh samples of the policy in the place of its responses, unfinished ones among them; the KL that
    they show goes to `keep(place of the row, {"kl_samples": nats})`, later than the row does.

    Args:
        prompts: id and token ids of each row's prompt.
        packing: of the reference's forward, as `scoring.score` takes it.
        how: as `generate.answer` takes it.
    """
    how["strings"] = listwise.Places()
    for row in rows:
        if isinstance(row.prompt, str):
            how["strings"].add(row.id, 0)
    waiting: dict[int, tuple[Block, list[float]]] = {}
    answers = generate.answer(policy.lm, tokenizer, prompts, **how)
    for n, (row, (id, texts, samples)) in enumerate(zip(rows, answers, strict=True)):
        if texts:
            block = Block(np.array(prompts[n][1]), tuple(one.token_ids for one in samples))
            waiting[n] = block, [one.logp for one in samples]
        if len(waiting) == SCORED_AT_ONCE or n == len(rows) - 1:
            device = next(ref.parameters()).device
            found = scoring.score(ref, [block for block, _ in waiting.values()], device=device, **packing)
            for place, ref_logps in zip(waiting, found, strict=True):
                keep(place, {"kl_samples": float(np.mean(waiting[place][1] - ref_logps))})
            waiting.clear()
        yield Row(id, row.prompt, tuple(texts))
