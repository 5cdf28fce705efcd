"""Rewards for candidate responses: by a function of texts, or by a reward model in packed micro-batches.

A scorer is any callable (prompt, responses) -> one float per response; the prompt is a string or a list of
chat messages. An annotator is any callable rows -> (id, rewards) of each row, in order. A response that cannot be
scored has the reward None: it is left out and counted, and ends nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hps import samplers
from hps.data import tokens
from hps.data.rows import Prompt as RowPrompt
from hps.data.rows import Row, only, row_key
from hps.packing import Block

Prompt = str | list[dict[str, str]]
Scorer = Callable[[Prompt, list[str]], Sequence[float]]
Rewards = list[float | None]  # of a row's responses; None where one could not be scored

ROWS_AT_ONCE = 256  # whose responses are put into micro-batches together


def annotate(rows: Iterable[Row], score: Scorer) -> Iterator[tuple[str, Rewards]]:
    """Yields (id, rewards) for every row, in order."""
    for row in rows:
        found = _finite(score(row.prompt if isinstance(row.prompt, str) else list(row.prompt), list(row.responses)))
        assert len(found) == len(row.responses), f"{row.where}: the scorer gave {len(found)} rewards"
        yield row.id, found


def annotate_packed(
    rows: Sequence[Row],
    score: Callable[[list[Block]], Iterable[np.ndarray]],
    tokenizer: PreTrainedTokenizerFast,
    *,
    positions: int,
    pad_id: int | None,
    counts: Counter[str],
) -> Iterator[tuple[str, Rewards]]:
    """Yields (id, rewards) for every row, in order, read as the reward model's own chat template writes them.

    Without a reward, and counted: a response longer than the model can read (`responses_overlong`), one whose reward is
    not finite (`responses_not_finite`), and those that `encode_answered` refuses (`responses_refused`).

    score: rewards of all responses of some blocks, one array per block. positions: tokens that the model can read;
    longer conversations lose the beginning of their prompts (but BOS), counted as `prompts_cut`. pad_id: the pad token
    of a transformers classifier, which takes the last token before the pads: pads at the end are taken off. Of an empty
    response nothing may be left: that of the prompt is taken (`responses_empty`).
    Raises ValueError, with file and line, if no response of the first 256 rows has a reward.
    """
    encoder = tokens.Encoder(tokenizer)
    for begin in range(0, len(rows), ROWS_AT_ONCE):
        some = list(rows[begin : begin + ROWS_AT_ONCE])
        found: list[Rewards] = [[None] * len(row.responses) for row in some]
        pieces: list[tuple[int, Block, Sequence[int]]] = []  # row, block, which responses of the row are in it
        why = "the rewards are not finite: check the reward model's weights and dtype"
        for i, row in enumerate(some):
            made, refused = _encoded(encoder, row)
            if refused and tokenizer.chat_template is None:  # no fault of a row
                raise ValueError(f"{row.where}: {refused}") from refused
            why = str(refused or why)
            counts.update(encoder.template.notes(row.prompt, () if refused else row.responses) if made else ())
            counts["responses_refused"] += len(row.responses) - sum(len(ks) for _, ks in made)
            fitted = [part for block, ks in made for part in _fitted(block, ks, positions, pad_id, counts)]
            pieces += [(i, _cut(block, positions, tokenizer.bos_token_id, counts), ks) for block, ks in fitted]
            if made and not fitted:
                why = f"all responses are longer than the {positions} tokens that the reward model reads"
        for (i, _, ks), rewards in zip(pieces, score([block for _, block, _ in pieces]), strict=True):
            for k, reward in zip(ks, _finite(rewards), strict=True):
                found[i][k] = reward
                counts["responses_not_finite"] += reward is None
        if begin == 0 and any(row.responses for row in some) and not any(r is not None for x in found for r in x):
            raise ValueError(f"{some[0].where}: no response of the first {len(some)} rows has a reward: {why}")
        yield from zip((row.id for row in some), found, strict=True)


def _encoded(encoder: tokens.Encoder, row: Row) -> tuple[list[tuple[Block, Sequence[int]]], ValueError | None]:
    """A row as blocks, each with which responses are in it: of all, or, where one cannot be read, of those that can be,
    each by itself; and why one cannot be read."""
    whole, found, refused = range(len(row.responses)), [], None
    for groups in ([whole], [[k] for k in whole]):
        for ks in groups if not found and whole else ():
            try:
                found.append((encode_answered(encoder, row.prompt, [row.responses[k] for k in ks]), ks))
            except ValueError as error:
                refused = error
    return found, refused


def encode_answered(encoder: tokens.Encoder, prompt: RowPrompt, texts: Sequence[str]) -> Block:
    """A prompt with its answers as a reward model reads them; errors as `Template.answered`."""
    if isinstance(prompt, str):
        head, answers = encoder.prompt(prompt), encoder.responses(texts, chat=False)
    else:
        head, answers = encoder.template.answered(prompt, texts)
    return Block(np.array(head, np.int32), tuple(np.array(ids, np.int32) for ids in answers))


def scored_rows(
    found: Iterable[tuple[Row, Rewards]], counts: Counter[str], lost: dict[str, list[int]], *, pairs: bool
) -> Iterator[Row]:
    """Yields the rows with their rewards, without the responses that have none, and without rows of nothing else.

    Adds to `counts` how many these are, and of rows with a human pair whether the rewards agree with it or tie; to
    `lost`, by id, which responses are left out. pairs: a row without a human pair gets a `random_pair`. ValueError if
    no response has a reward.
    """
    told = ("rows", "responses", "responses_left_out", *(("pairs_equal_rewards", "pairs_made") if pairs else ()))
    counts.update(dict.fromkeys(told, 0))  # zeros are told too
    where = ""
    for row, given in found:
        where = where or row.where
        scored = replace(row, rewards=tuple(reward or 0.0 for reward in given))
        scored = only(scored, [k for k, reward in enumerate(given) if reward is not None])
        if places := [k for k, reward in enumerate(given) if reward is None]:
            lost[row.id] = places
            counts["responses_left_out"] += len(places)
        if row.responses and not scored.responses:
            continue
        counts.update(rows=1, responses=len(scored.responses))
        if scored.rewards and scored.chosen is not None and scored.rejected is not None:
            apart = scored.rewards[scored.chosen] - scored.rewards[scored.rejected]
            counts.update(human_pairs=1, human_pairs_agree=int(apart > 0), human_pairs_tied=int(apart == 0))
        if pairs and scored.chosen is None:
            scored = random_pair(scored)
            counts["pairs_equal_rewards" if scored.chosen is None else "pairs_made"] += 1
        yield scored
    if not counts["rows"]:
        raise ValueError(f"{where}: no response of this row or of one behind it has a reward ({dict(counts)})")


def _finite(rewards: Iterable[float]) -> Rewards:
    return [float(reward) if np.isfinite(reward) else None for reward in rewards]


def _fitted(
    block: Block, ks: Sequence[int], positions: int, pad_id: int | None, counts: Counter[str]
) -> list[tuple[Block, list[int]]]:
    """The block's responses that a reward model can read, without pads at the end, and which they are; those that are
    nothing but pads are in a block of their own, as the prompt's last token."""
    answers = {k: _without_pads(ids, pad_id) for k, ids in zip(ks, block.responses, strict=True)}
    read = [k for k, ids in answers.items() if 0 < len(ids) < positions]
    prompt = _without_pads(block.prompt, pad_id)
    empty = [k for k, ids in answers.items() if not len(ids) and len(prompt) > 1]
    counts["responses_overlong"] += len(answers) - len(read) - len(empty)
    counts["responses_empty"] += len(empty)
    whole = (Block(block.prompt, tuple(answers[k] for k in read)), read)
    return [(part, of) for part, of in (whole, (Block(prompt[:-1], (prompt[-1:],) * len(empty)), empty)) if of]


def _without_pads(ids: np.ndarray, pad_id: int | None) -> np.ndarray:
    return ids if pad_id is None else ids[: np.flatnonzero(np.append([-1], ids) != pad_id)[-1]]


def _cut(block: Block, positions: int, bos_id: Any, counts: Counter[str]) -> Block:
    """The block with as much of its prompt's end as `positions` leave room for, BOS included."""
    prompt, room = block.prompt, positions - max(map(len, block.responses))
    if len(prompt) > room:
        first = prompt[:1][prompt[:1] == bos_id] if room > 1 else prompt[:0]
        prompt = np.concatenate([first, prompt[len(prompt) - room + len(first) :]])
        counts["prompts_cut"] += 1
    return Block(prompt, block.responses)


def read_prompts(rows: Iterable[Row], read: Callable[[Any], Any]) -> Iterator[Any]:
    """What `read` makes of each prompt; ValueError, with file and line, for one that it refuses."""
    for row in rows:
        try:
            yield read(row.prompt)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error


def random_pair(row: Row) -> Row:
    """The row with a pair as a data set would have it: two random responses, the one of higher reward chosen.

    A row whose rewards are all equal stays without one, for none of its responses is preferred.
    """
    rewards = np.array(row.rewards)
    order = np.argsort(samplers.counter_uniform(0, row_key(row.id), np.arange(len(rewards))))
    apart = order[rewards[order] != rewards[order[:1]]]
    if not len(apart):
        return row
    worse, better = sorted((int(order[0]), int(apart[0])), key=lambda k: rewards[k])
    return replace(row, chosen=better, rejected=worse)
