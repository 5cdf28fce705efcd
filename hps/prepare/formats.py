"""The preference formats that users have: one function a format, from a decoded record to a Row, and two back.

A record of the right format that cannot be used becomes Dropped, with its reason; a record of another format is
a ValueError that starts with `where`, "file:line". Texts are kept as they are, whitespace included.
"""

import hashlib
import json
import re
import reprlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import cast

from hps.data.listwise import Row, check_keys, parse_row

HH_MARK = re.compile(r"\n\n(Human|Assistant): ?")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
DROPS = (
    "rows_malformed",
    "rows_unsupported",
    "rows_prompts_differ",
    "rows_empty_response",
    "rows_equal_responses",
    "rows_too_few_responses",
    "rows_no_preference",
    "rows_duplicate",
)

Turns = list[tuple[str, str]]
Message = dict[str, str]


@dataclass(frozen=True)
class Dropped:
    """A record that is left out: the counter (one of DROPS) that it adds to, and what is wrong with it."""

    counter: str
    reason: str


def hh_rlhf(record: dict[str, object], where: str) -> Row | Dropped:
    """Anthropic's HH-RLHF: whole dialogues "chosen" and "rejected" -> messages and the pair of last answers.

    Dropped: dialogues that do not go Human, Assistant, ..., Assistant; that differ before the last answer;
    whose last answers are empty or equal.
    """
    keys = ("chosen", "rejected")
    check_keys(record, keys, required=keys, where=where)
    dialogues = []
    for key in keys:
        turns = _turns(_text(record, key, where))
        if isinstance(turns, str):
            return Dropped("rows_malformed", f"{key} {turns}")
        dialogues.append(turns)
    (*prompt, (_, chosen)), (*other, (_, rejected)) = dialogues
    if prompt != other:
        return Dropped("rows_prompts_differ", "chosen and rejected differ before the last answer")
    return _pair("hh-rlhf", _messages_of(prompt), [chosen, rejected], 0, where)


def authors(record: dict[str, object], where: str) -> Row:
    """The format of the released HPS code: a prompt in its template already, responses, rewards if scored."""
    check_keys(record, ("prompt", "responses", "rewards"), required=("prompt", "responses"), where=where)
    if not isinstance(record["prompt"], str):
        raise ValueError(f"{where}: prompt must be a string (the authors' files hold it as one text)")
    return _row("authors", record, where)


def pku_saferlhf(record: dict[str, object], where: str, *, label: str) -> Row | Dropped:
    """PKU-SafeRLHF: one question, two responses in their order, and one of its two human labels as the pair.

    label: "better_response_id" (the more helpful of the two) or "safer_response_id", 0 or 1. The id of a row
    does not depend on it, so that the rows of both orders can be matched. Dropped: a label that is neither.
    """
    _required(record, ("prompt", "response_0", "response_1", label), where)
    chosen = record[label]
    if isinstance(chosen, bool) or chosen not in (0, 1):
        return Dropped("rows_no_preference", f"{label} is {reprlib.repr(chosen)}, neither 0 nor 1")
    responses = [_text(record, key, where) for key in ("response_0", "response_1")]
    return _pair("pku-saferlhf", _question(record, "prompt", where), responses, cast(int, chosen), where)


def ultrafeedback(record: dict[str, object], where: str, *, score: str) -> Row | Dropped:
    """openbmb's UltraFeedback: an instruction, its completions, and one of their scores as the reward.

    score: "overall_score" (1 to 10) or "fine-grained_score" (the mean of four aspects, 1 to 5). The principle
    that each completion was sampled under is its own system prompt, and is not part of the row's prompt.
    Dropped: fewer than two completions; one without that score.
    """
    _required(record, ("instruction", "completions"), where)
    texts, scores = _answers(record["completions"], "completions", ("response", score), where)
    return _ranked("ultrafeedback", _question(record, "instruction", where), texts, scores, score, where)


def nectar(record: dict[str, object], where: str) -> Row | Dropped:
    """Berkeley's Nectar: a dialogue that ends with "Assistant: ", and answers with ranks, 1 the best.

    The reward is minus the rank: it orders the answers, but its distances mean nothing.
    Dropped: a prompt that is no such dialogue; fewer than two answers; one without a rank.
    """
    _required(record, ("prompt", "answers"), where)
    turns = _turns(_text(record, "prompt", where))
    if isinstance(turns, str):
        return Dropped("rows_malformed", f"prompt {turns}")
    if turns[-1][1].strip():
        return Dropped("rows_malformed", "prompt holds the beginning of the answer")
    texts, ranks = _answers(record["answers"], "answers", ("answer", "rank"), where)
    return _ranked("nectar", _messages_of(turns[:-1]), texts, ranks, "rank", where, sign=-1)


def trl(record: dict[str, object], where: str) -> Row | Dropped:
    """TRL's preference format: standard (strings) or conversational (messages), with or without a prompt.

    Without one, or with a string beside conversations (as in ultrafeedback_binarized), the prompt is what both
    begin with, as TRL's `extract_prompt` has it. A standard prompt stays a string, in no chat template.
    Dropped: nothing in common; completions of several messages, or of other than the assistant's text; tools
    and images, which a row cannot hold.
    """
    _required(record, ("chosen", "rejected"), where)
    for key in ("tools", "images", "image", "chat_template_kwargs"):
        if record.get(key):
            return Dropped("rows_unsupported", f"{key} changes the prompt and cannot be kept")
    prompt = record.get("prompt")
    sides: list[Sequence[object]] = []
    for key in ("chosen", "rejected"):
        if isinstance(record[key], str):
            sides.append(cast(str, record[key]))
        else:
            messages = _messages(record[key], key, where)
            if isinstance(messages, Dropped):
                return messages
            sides.append(messages)
    chosen, rejected = sides
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"{where}: chosen and rejected must both be strings or both be lists of messages")
    if prompt is None or (isinstance(prompt, str) and not isinstance(chosen, str)):
        start = _common_start(chosen, rejected)
        if start == 0:
            return Dropped("rows_prompts_differ", "chosen and rejected begin with nothing in common")
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    elif not isinstance(prompt, str):
        if isinstance(chosen, str):
            raise ValueError(f"{where}: the prompt is a list of messages but chosen is a string; make both alike")
        prompt = _messages(prompt, "prompt", where)
        if isinstance(prompt, Dropped):
            return prompt
    texts = []
    for key, side in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(side, str):
            roles = [cast(Message, message)["role"] for message in side]
            if roles != ["assistant"]:
                return Dropped("rows_unsupported", f"{key} is {roles}, not one message of the assistant")
            side = cast(Message, side[0])["content"]
        texts.append(side)
    return _pair("trl", prompt, texts, 0, where)


def to_hh_rlhf(row: Row, chosen: int, rejected: int) -> dict[str, object] | Dropped:
    """The pair (indices of responses) as an HH-RLHF record; Dropped where that format cannot hold it.

    It holds turns of Human and Assistant in alternation, none with a speaker's mark inside.
    """
    if isinstance(row.prompt, str):
        return Dropped("rows_unsupported", "the prompt is a string; HH-RLHF needs messages")
    speakers = {role: speaker for speaker, role in HH_ROLES.items()}
    prompt = [(speakers.get(turn["role"], turn["role"]), turn["content"]) for turn in row.prompt]
    record: dict[str, object] = {}
    for key, index in (("chosen", chosen), ("rejected", rejected)):
        turns = [*prompt, ("Assistant", row.responses[index])]
        dialogue = "".join(f"\n\n{speaker}: {text}" for speaker, text in turns)
        if _turns(dialogue) != turns:
            said = ", ".join(speaker for speaker, _ in turns)
            reason = f"turns must go Human, Assistant, ... with no such mark inside a text; they are {said}"
            return Dropped("rows_unsupported", reason)
        record[key] = dialogue
    return record


def to_trl(row: Row, chosen: int, rejected: int) -> dict[str, object]:
    """The pair (indices of responses) with its prompt apart: conversational, or standard for a string prompt."""
    texts = {"chosen": row.responses[chosen], "rejected": row.responses[rejected]}
    if isinstance(row.prompt, str):
        return {"prompt": row.prompt, **texts}
    answers = {key: [{"role": "assistant", "content": text}] for key, text in texts.items()}
    return {"prompt": list(row.prompt), **answers}


@dataclass(frozen=True)
class Format:
    """A reader and the columns that it reads; other columns are left out, and reported."""

    read: Callable[[dict[str, object], str], Row | Dropped]
    columns: tuple[str, ...]


def _pku_format(label: str) -> Format:
    return Format(partial(pku_saferlhf, label=label), ("prompt", "response_0", "response_1", label))


def _ultrafeedback_format(score: str) -> Format:
    return Format(partial(ultrafeedback, score=score), ("instruction", "completions"))


# By source, then by the order that the user chooses where the source has several ("" where it has one).
FORMATS: dict[str, dict[str, Format]] = {
    "hh-rlhf": {"": Format(hh_rlhf, ("chosen", "rejected"))},
    "authors": {"": Format(authors, ("prompt", "responses", "rewards"))},
    "pku-saferlhf": {"helpful": _pku_format("better_response_id"), "safe": _pku_format("safer_response_id")},
    "ultrafeedback": {
        "overall": _ultrafeedback_format("overall_score"),
        "fine-grained": _ultrafeedback_format("fine-grained_score"),
    },
    "nectar": {"": Format(nectar, ("prompt", "answers"))},
    "trl": {"": Format(trl, ("prompt", "chosen", "rejected"))},
}
EXPORTS: dict[str, Callable[[Row, int, int], dict[str, object] | Dropped]] = {"trl": to_trl, "hh-rlhf": to_hh_rlhf}


def _turns(dialogue: str) -> Turns | str:
    head, *rest = HH_MARK.split(dialogue)
    speakers, texts = rest[::2], rest[1::2]
    if head or not speakers or speakers[0] != "Human":
        return r"does not start with '\n\nHuman: '"
    if speakers[-1] != "Assistant":
        return "does not end with a turn of Assistant"
    if any(a == b for a, b in pairwise(speakers)):
        return "has two turns of one speaker in a row"
    return list(zip(speakers, texts, strict=True))


def _messages_of(turns: Turns) -> list[Message]:
    return [{"role": HH_ROLES[speaker], "content": text} for speaker, text in turns]


def _question(record: dict[str, object], key: str, where: str) -> list[Message]:
    return [{"role": "user", "content": _text(record, key, where)}]


def _messages(value: object, name: str, where: str) -> list[Message] | Dropped:
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a string or a list of messages")
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ValueError(f"{where}: {name}[{i}] must be an object with role and content")
        turn = {key: field for key, field in turn.items() if field is not None}  # parquet fills what is absent
        if extra := turn.keys() - {"role", "content"}:
            return Dropped("rows_unsupported", f"{name}[{i}] holds {', '.join(sorted(extra))}")
        if not isinstance(turn.get("content"), str):
            return Dropped("rows_unsupported", f"the content of {name}[{i}] is not one text")
        messages.append(turn)
    return messages


def _common_start(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Length of the prompt that both begin with, as in TRL: something is left of each, the space before it too."""
    shorter = min(len(chosen), len(rejected))
    differ = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if differ is None:
        return max(shorter - 1, 0)
    return differ - 1 if differ and chosen[differ - 1] == " " else differ


def _answers(value: object, name: str, keys: tuple[str, str], where: str) -> tuple[list[str], list[object]]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: {name} must be a list of objects with {' and '.join(keys)}")
    for i, answer in enumerate(value):
        if not isinstance(answer, dict):
            raise ValueError(f"{where}: {name}[{i}] must be an object with {' and '.join(keys)}")
        _required(answer, keys, f"{where}: {name}[{i}]")
    texts = [_text(answer, keys[0], f"{where}: {name}[{i}]") for i, answer in enumerate(value)]
    return texts, [answer[keys[1]] for answer in value]


def _pair(source: str, prompt: object, responses: list[str], chosen: int, where: str) -> Row | Dropped:
    """A row of two responses and the human choice between them."""
    if not all(text.strip() for text in responses):
        return Dropped("rows_empty_response", "an answer is empty")
    if responses[0].strip() == responses[1].strip():
        return Dropped("rows_equal_responses", "both answers are the same")
    fields = {"prompt": prompt, "responses": responses, "chosen": chosen, "rejected": 1 - chosen}
    return _row_or_dropped(source, fields, where)


def _ranked(
    source: str, prompt: object, texts: list[str], scores: list[object], name: str, where: str, *, sign: int = 1
) -> Row | Dropped:
    """A row of responses with sign * score as their rewards; an empty response stays (training drops it)."""
    if len(texts) < 2:
        return Dropped("rows_too_few_responses", f"{len(texts)} responses; a preference needs two")
    for i, score in enumerate(scores):
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not abs(cast(float, score)) <= sys.float_info.max:  # NaN is not <= anything
            what = reprlib.repr(score)
            return Dropped("rows_no_preference", f"the {name} of response {i} is {what}, not a number")
    rewards = [sign * cast(float, score) for score in scores]
    return _row_or_dropped(source, {"prompt": prompt, "responses": texts, "rewards": rewards}, where)


def _row_or_dropped(source: str, fields: dict[str, object], where: str) -> Row | Dropped:
    """The row, or Dropped for texts that no row may hold: an empty turn, half of a surrogate pair, ..."""
    try:
        return _row(source, fields, where)
    except ValueError as error:
        return Dropped("rows_malformed", str(error).removeprefix(f"{where}: "))


def _row(source: str, fields: dict[str, object], where: str) -> Row:
    row = parse_row({"id": source, **fields, "source": source}, where)  # first: it refuses what has no JSON
    content = json.dumps([fields["prompt"], fields["responses"]]).encode()
    return replace(row, id=f"{source}-{hashlib.blake2b(content, digest_size=8).hexdigest()}")


def _required(record: dict[str, object], keys: tuple[str, ...], where: str) -> None:
    """Other columns may be there: releases of one data set differ in them."""
    check_keys(record, tuple(record), required=keys, where=where)


def _text(record: dict[str, object], key: str, where: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a string, not {type(value).__name__}")
    return value
