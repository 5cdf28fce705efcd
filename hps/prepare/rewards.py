"""Rewards for candidate responses: by a function of texts, by people, or by a reward model in packed micro-batches.

A scorer is any callable (prompt, responses) -> one float per response; the prompt is a string or a list of
chat messages. An annotator is any callable rows -> (id, rewards) of each row, in order.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hps import samplers
from hps.data import tokens
from hps.data.listwise import Row
from hps.packing import Block

Prompt = str | list[dict[str, str]]
Scorer = Callable[[Prompt, list[str]], Sequence[float]]

ROWS_AT_ONCE = 256  # whose responses are put into micro-batches together


def annotate(rows: Iterable[Row], score: Scorer) -> Iterator[tuple[str, list[float]]]:
    """Yields (id, rewards) for every row, in order; ValueError, with file and line, for what the scorer gets wrong."""
    for row in rows:
        prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
        found = [float(reward) for reward in score(prompt, list(row.responses))]
        if len(found) != len(row.responses):
            raise ValueError(f"{row.where}: the scorer gave {len(found)} rewards for {len(row.responses)} responses")
        yield row.id, _finite(found, row, "mend the scorer or drop the row")


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

    score: rewards of all responses of some blocks, one array per block. positions: tokens that the model can read;
    longer conversations lose the beginning of their prompts (but BOS), counted as `prompts_cut`. pad_id: the pad token
    of a transformers classifier, which takes the last token before the pads: pads at the end are taken off.

    Raises:
        ValueError: with file and line, a response longer than the model can read, what `encode_answered`
            refuses, and a reward that is not finite.
    """
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[begin : begin + ROWS_AT_ONCE]
        blocks: list[list[Block]] = []
        for row in some:
            try:
                made = encode_answered(tokenizer, row.prompt, row.responses) if row.responses else []
                blocks.append([_fitted(block, positions, pad_id, tokenizer.bos_token_id, counts) for block in made])
            except ValueError as error:
                raise ValueError(f"{row.where}: {error}") from error
        found = iter(score([block for made in blocks for block in made]))
        for row, made in zip(some, blocks, strict=True):
            rewards = [float(reward) for _ in made for reward in next(found)]
            yield row.id, _finite(rewards, row, "check the reward model's weights and dtype")


def encode_answered(tokenizer: PreTrainedTokenizerFast, prompt: tokens.Prompt, texts: Sequence[str]) -> list[Block]:
    """A prompt with its answers as a reward model reads them: one block, or one per answer where the template writes
    the conversation so that the prompt alone is no part of it.

    A string prompt is read as in training. Raises ValueError as encode_prompt and encode_response do.
    """
    encoder = tokens.Encoder(tokenizer)
    head = encoder.prompt(prompt)
    closing = [] if isinstance(prompt, str) else encoder.closing
    if closing is not None:
        answers = (np.array([*ids, *closing], np.int32) for ids in encoder.responses(texts))
        return [Block(np.array(head, np.int32), tuple(answers))]
    wholes = [np.array(encoder.prompt(prompt, answer=text), np.int32) for text in texts]
    return [Block(whole[:1], (whole[1:],)) for whole in wholes]


def _finite(rewards: list[float], row: Row, advice: str) -> list[float]:
    if not np.isfinite(rewards).all():
        raise ValueError(f"{row.where}: the rewards are {rewards}, not all of them finite: {advice}")
    return rewards


def _fitted(block: Block, positions: int, pad_id: int | None, bos_id: Any, counts: Counter[str]) -> Block:
    """The block as a reward model can read it: no pads at the end, and no more than `positions` tokens."""
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


def check_prompts(rows: Iterable[Row], read: Callable[[Any], Any]) -> list[Any]:
    """What `read` makes of each prompt; ValueError, with file and line, for the first that it refuses."""
    found = []
    for row in rows:
        try:
            found.append(read(row.prompt))
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
    return found


def by_people(rows: Iterable[Row]) -> list[tuple[str, list[float]]]:
    """(id, rewards) of every row: 1 for the human choice, 0 for its partner; ValueError for other rows than pairs."""
    for row in rows:
        if row.chosen is None or len(row.responses) != 2:
            raise ValueError(f"{row.where}: scorer human needs a row of two responses with `chosen`")
    return [(row.id, [float(k == row.chosen) for k in range(2)]) for row in rows]


def random_pair(row: Row) -> Row:
    """The row with a pair as a data set would have it: two random responses, the one of higher reward chosen.

    A row whose rewards are all equal stays without one, for none of its responses is preferred.
    """
    rewards = np.array(row.rewards)
    order = np.argsort(samplers.counter_uniform(0, tokens.row_key(row.id), np.arange(len(rewards))))
    apart = order[rewards[order] != rewards[order[:1]]]
    if not len(apart):
        return row
    worse, better = sorted((int(order[0]), int(apart[0])), key=lambda k: rewards[k])
    return replace(row, chosen=better, rejected=worse)
