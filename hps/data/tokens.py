"""From rows of text to token ids: prompt and response are tokenised apart and joined as ids.

Apart, because a tokenizer run over the joined text may merge across the boundary, and then the response's
first token depends on the prompt. A prompt has at most one BOS, a response exactly one EOS, its last token.
"""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from hps.options import CHOICES

if TYPE_CHECKING:
    from hps.data.rows import Prompt, Row

COUNTS = ("rows_read", "rows_kept", "rows_overlong_prompt", "rows_no_responses", "pairs_broken")
COUNTS += ("prompts_cut", "responses_read", "responses_kept", "responses_overlong", "responses_empty")


@dataclass(frozen=True)
class Example:
    """One row as token ids, over its kept responses only (k of the row's n)."""

    id: str
    prompt_ids: np.ndarray  # (prompt tokens,) int32
    response_ids: tuple[np.ndarray, ...]  # k times (response tokens,) int32, each ends in EOS
    rewards: np.ndarray | None  # (k,) float64
    identity: np.ndarray  # (k,) int64, equal numbers = equal token sequences
    kept: np.ndarray  # (k,) int64, index in the row
    chosen: int | None  # index into the kept responses, as is rejected
    rejected: int | None
    where: str


def longest(example: Example) -> int:
    """Tokens of the prompt with its longest response."""
    return len(example.prompt_ids) + max(map(len, example.response_ids))


class Encoder:
    """Prompts and responses to token ids; what is asked of the tokenizer again and again is looked up once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.bos, self.eos = tokenizer, cast(int | None, tokenizer.bos_token_id), tokenizer.eos_token_id
        self.adds_bos = self.bos is not None and tokenizer("").input_ids[:1] == [self.bos]  # by itself, to a plain text
        control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        control |= set(tokenizer.all_special_ids)
        self.control = control - {tokenizer.unk_token_id} | {self.eos}  # some tokenizers use one token as UNK and EOS
        # To render messages takes longer than all else of a row, and in many data sets prompts come again.
        self._of_messages = functools.lru_cache(8192)(lambda text: tuple(self.template.encode(json.loads(text))))

    @functools.cached_property
    def template(self) -> Any:
        """The chat template, as hps.data.templates has it."""
        from hps.data import templates

        return templates.Template(self)

    @functools.cached_property
    def inner(self) -> Tokenizer:
        """The tokenizer for what stands inside a text: nothing is put before it, and nothing taken off when it is
        decoded, as SentencePiece does with the blank at a text's beginning."""
        whole = self.tokenizer.backend_tokenizer
        parts = ("normalizer", "pre_tokenizer", "decoder")
        rules = {name: json.loads(part.__getstate__()) for name in parts if (part := getattr(whole, name)) is not None}
        inside = {name: _without_blank(rule) for name, rule in rules.items()}
        return whole if inside == rules else Tokenizer.from_str(json.dumps(json.loads(whole.to_str()) | inside))

    def prompt(self, prompt: "Prompt") -> list[int]:
        """Of a string verbatim; of messages through the chat template, up to the answer's start.

        A string gets a BOS in front if the tokenizer adds one by itself and the text does not have it yet; a template
        writes its own. Raises ValueError for messages without a template, or that it refuses or loses, a prompt of no
        tokens, a doubled BOS, and control tokens in messages that the tokenizer cannot read as characters.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
            if self.adds_bos and ids[:1] != [self.bos]:
                ids = [cast(int, self.bos), *ids]
        else:
            ids = list(self._of_messages(json.dumps(prompt)))
        if not ids:
            raise ValueError("the prompt has no tokens, so nothing predicts the first token of the response")
        if ids[:2] == [self.bos, self.bos]:
            raise ValueError(f"the prompt starts with two {self.tokenizer.bos_token!r}; take one out")
        return ids

    def responses(self, texts: Iterable[str], *, chat: bool | None = None) -> Iterator[list[int]]:
        """Of each text alone, then exactly one EOS: one that is written at the end of the text is not doubled.

        Any other control token is read as plain characters; ValueError where the tokenizer cannot do that. chat: the
        texts answer messages (default: whatever there is a template for), so that the white space that the template
        puts before an answer belongs to them.
        """
        before = self.before(chat)
        self.inner.no_truncation()
        self.inner.no_padding()
        self.inner.encode_special_tokens = True
        whole = [before + self.without_eos(text) for text in texts]
        for ids in [encoding.ids for encoding in self.inner.encode_batch_fast(whole, add_special_tokens=False)]:
            while ids and ids[-1] == self.eos:
                ids = ids[:-1]
            if not self.control.isdisjoint(ids):
                token = next(self.tokenizer.convert_ids_to_tokens(i) for i in ids if i in self.control)
                raise ValueError(
                    f"a response holds the control token {token!r} inside its text, and this tokenizer cannot read "
                    "it as plain characters; take it out of the text"
                )
            yield [*ids, self.eos]

    def before(self, chat: bool | None = None) -> str:
        """The white space that the template puts before an answer; none before what continues a string."""
        return self.template.answer[0] if (self.tokenizer.chat_template if chat is None else chat) else ""

    def text(self, ids: Sequence[int] | np.ndarray, *, chat: bool | None = None) -> str:
        """The text of sampled ids, of which `responses` makes the same ids again: without control tokens, and stripped
        only if the template strips an answer. chat: as there."""
        text = self.inner.decode([int(i) for i in ids], skip_special_tokens=True).removeprefix(self.before(chat))
        chat = bool(self.tokenizer.chat_template) if chat is None else chat
        return text.strip() if chat and self.template.answer[1] else text

    def without_eos(self, text: str) -> str:
        while text.endswith(self.tokenizer.eos_token):
            text = text.removesuffix(self.tokenizer.eos_token)
        return text


def _without_blank(rule: Any) -> Any:
    """A rule of a tokenizer (normalizer, pre-tokenizer, decoder) without what it does to a blank at a text's start."""
    key = next((key for key in ("normalizers", "pretokenizers", "decoders") if key in rule), None)
    if key:
        inside = [_without_blank(one) for one in rule[key]]
        return rule | {key: [one for one in inside if one is not None]}
    if rule["type"] == "Prepend" or (rule["type"] == "Strip" and "content" in rule):
        return None
    prefix = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return rule | prefix.get(rule["type"], {})


def tokenize(
    tokenizer: PreTrainedTokenizerFast,
    rows: Iterable["Row"],
    counts: dict[str, int],
    *,
    max_length: int,
    truncate: str = "drop",
    closing: bool = False,
) -> Iterator[Example]:
    """Tokenise rows as they come, under one budget: prompt + response have at most max_length tokens, EOS included.

    counts: filled as the examples are taken, under the names of COUNTS: responses_read = kept + overlong + empty;
    rows_read = kept + overlong_prompt (the prompt alone leaves no room for one token and EOS) + no_responses (none
    is left); pairs_broken = kept rows that lost a response of their human pair; and, where there are any, what
    `Template.notes` counts.
    truncate: "drop" leaves out a response that does not fit, "error" raises, "keep_end" cuts the prompt on the left
    (for all its responses alike, down to half the budget, behind its BOS) and leaves out what still does not fit.
    Responses are never cut, so none becomes empty or equal to another. Empty and whitespace-only ones are left out.
    closing: read messages with their answers as `Template.answered` does.
    Raises ValueError, with file and line, for what `Encoder` refuses; and if no row is left.
    """
    if truncate not in CHOICES["truncate"]:
        raise ValueError(f"truncate = {truncate!r} does not exist; choose one of {', '.join(CHOICES['truncate'])}")
    if max_length < 3:
        raise ValueError(f"max_length = {max_length}; it must hold a prompt token, a response token and EOS")
    counts.update(dict.fromkeys(COUNTS, 0))
    encoder = Encoder(tokenizer)
    for row in tqdm(rows, desc="tokenise", unit="row", delay=2):
        chat = not isinstance(row.prompt, str)
        try:
            if closing and chat and row.responses:
                prompt, responses = encoder.template.answered(row.prompt, row.responses)
            else:
                prompt, responses = encoder.prompt(row.prompt), list(encoder.responses(row.responses, chat=chat))
            example = _example(row, np.array(prompt, np.int32), responses, max_length, truncate, counts, encoder)
            for note in encoder.template.notes(row.prompt, row.responses if closing else ()):
                counts[note] = counts.get(note, 0) + 1
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        if example:
            yield example
    if not counts["rows_kept"]:
        lost = ", ".join(f"{key} = {counts[key]}" for key in COUNTS if counts[key])
        advice = "which may be raised" if lost else "no rows were given"
        raise ValueError(f"no row is left with max_length = {max_length}, {advice}: {lost}")


def _example(
    row: "Row",
    prompt: np.ndarray,
    responses: list[list[int]],
    max_length: int,
    truncate: str,
    counts: dict[str, int],
    encoder: Encoder,
) -> Example | None:
    texts = [encoder.without_eos(text).strip() for text in row.responses]
    empty = [not text or ids[0] == encoder.eos for text, ids in zip(texts, responses, strict=True)]
    least = min(len(prompt), max_length // 2) if truncate == "keep_end" else len(prompt)
    long = [not e and least + len(ids) > max_length for e, ids in zip(empty, responses, strict=True)]
    if truncate == "error" and any(long):
        i = long.index(True)
        raise ValueError(
            f"prompt of {len(prompt)} tokens + responses[{i}] of {len(responses[i])} tokens > max_length = "
            f"{max_length}; raise it, or use truncate = drop or keep_end"
        )
    kept = [i for i in range(len(responses)) if not empty[i] and not long[i]]
    no_room = "rows_overlong_prompt" if least + 2 > max_length else "rows_no_responses"
    counts["rows_read"] += 1
    counts["rows_kept" if kept else no_room] += 1
    for name, some in zip(("read", "kept", "empty", "overlong"), (len(responses), len(kept), sum(empty), sum(long))):
        counts[f"responses_{name}"] += some
    if not kept:
        return None
    room = max_length - max(len(responses[i]) for i in kept)
    if len(prompt) > room:
        begin = prompt[:1][prompt[:1] == encoder.bos]  # empty where there is no BOS
        prompt = np.concatenate([begin, prompt[len(prompt) - room + len(begin) :]])
        counts["prompts_cut"] += 1
    new_index: dict[int | None, int] = {old: new for new, old in enumerate(kept)}
    chosen, rejected = new_index.get(row.chosen), new_index.get(row.rejected)
    counts["pairs_broken"] += (chosen, rejected).count(None) > (row.chosen, row.rejected).count(None)
    first: dict[tuple[int, ...], int] = {}
    return Example(
        id=row.id,
        prompt_ids=prompt,
        response_ids=tuple(np.array(responses[i], np.int32) for i in kept),
        rewards=None if row.rewards is None else np.array(row.rewards, np.float64)[kept],
        identity=np.array([first.setdefault(tuple(responses[i]), new) for new, i in enumerate(kept)], np.int64),
        kept=np.array(kept, np.int64),
        chosen=chosen,
        rejected=rejected,
        where=row.where,
    )
