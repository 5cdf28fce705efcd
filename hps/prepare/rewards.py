"""Rewards for candidate responses.

A scorer is any callable (prompt, responses) -> one float per response; the prompt is a string or a list of
chat messages. `annotate` applies one to a data set and checks what comes back. `annotate_packed` does so with a
reward model, many prompts in a micro-batch.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hps.data import tokens
from hps.data.listwise import Row
from hps.packing import Block

Prompt = str | list[dict[str, str]]
Scorer = Callable[[Prompt, list[str]], Sequence[float]]

ROWS_AT_ONCE = 256  # whose responses are put into micro-batches together


def annotate(
    rows: Iterable[tuple[str, Prompt, list[str]]], score: Scorer, *, progress: bool = True
) -> Iterator[tuple[str, list[float]]]:
    """Yields (id, rewards) for every (id, prompt, responses), in order.

    Raises:
        ValueError: the scorer returned another number of rewards than responses, or one that is not finite.
    """
    for row_id, prompt, responses in tqdm(rows, unit="prompt", desc="annotate", disable=not progress):
        rewards = [float(reward) for reward in score(prompt, responses)]
        if len(rewards) != len(responses):
            raise ValueError(f"row {row_id!r}: the scorer gave {len(rewards)} rewards for {len(responses)} responses")
        for index, reward in enumerate(rewards):
            if not math.isfinite(reward):
                raise ValueError(
                    f"row {row_id!r}: the reward of response {index} is {reward}; mend the scorer or drop the row"
                )
        yield row_id, rewards


def check_prompts(rows: Iterable[Row], read: Callable[[Any], object]) -> None:
    """Raises ValueError, with file and line, for the first prompt that a scorer cannot read.

    read: refuses such a prompt with a ValueError.
    """
    for row in rows:
        try:
            read(row.prompt)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error


def annotate_packed(
    rows: Sequence[Row],
    score: Callable[[list[Block]], list[np.ndarray]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    positions: int,
    pad_id: int | None,
    counts: Counter[str],
) -> Iterator[tuple[str, list[float]]]:
    """Yields (id, rewards) for every row, in order, read as the reward model's own chat template writes them.

    score: rewards of all responses of some blocks, an array each. positions: tokens that the model can read; longer
    conversations lose the beginning of their prompts (but BOS), counted as `prompts_cut`. pad_id: the pad token of a
    transformers classifier, which takes the last token before the pads: pads at the end are taken off.

    Raises:
        ValueError: with file and line, a response longer than the model can read, what `tokens.encode_answered`
            refuses, and a reward that is not finite.
    """
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[begin : begin + ROWS_AT_ONCE]
        blocks: list[list[Block]] = []
        for row in some:
            try:
                made = tokens.encode_answered(tokenizer, row.prompt, row.responses) if row.responses else []
                blocks.append([_fitted(block, positions, pad_id, tokenizer.bos_token_id, counts) for block in made])
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
        found = iter(score([block for made in blocks for block in made]))
        for row, made in zip(some, blocks, strict=True):
            rewards = np.array([reward for _ in made for reward in next(found)])
            if not np.isfinite(rewards).all():
                raise ValueError(f"{row.where}: the reward model gives {rewards.tolist()}: check its weights and dtype")
            yield row.id, rewards.tolist()


def _fitted(block: Block, positions: int, pad_id: int | None, bos_id: Any, counts: Counter[str]) -> Block:
    answers = []
    for ids in block.responses:
        end = len(ids) if pad_id is None else int(np.flatnonzero(np.append([-1], ids) != pad_id)[-1])
        if not end:
            raise ValueError("an empty response, of which this reward model sees nothing: its pad token is EOS")
        answers.append(ids[:end])
    room = positions - max(map(len, answers))
    if room < 1:
        raise ValueError(f"a response of {positions - room} tokens, where the reward model reads {positions} in all")
    prompt = block.prompt
    if len(prompt) > room:
        first = prompt[:1][prompt[:1] == bos_id] if room > 1 else prompt[:0]
        prompt = np.concatenate([first, prompt[len(prompt) - room + len(first) :]])
        counts["prompts_cut"] += 1
    return Block(prompt, tuple(answers))
