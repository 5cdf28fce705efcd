"""The preference formats that users have: for each a function from a decoded record to what a row needs, and two back.

A record of the right format that cannot be used raises Dropped, with its reason; a record of another format a
ValueError. Texts are kept as they are, whitespace included.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from hps.data.rows import KEYS, MAX_REWARD, Row, check_keys, parse_row

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
KINDS = {str: "a string", list: "a list", dict: "an object", (str, list): "a string or a list of messages"}

Record = dict[str, Any]
Columns = dict[str, type | tuple[type, ...]]


class Dropped(Exception):
    """A record that is left out: the counter (one of DROPS) that it adds to, and what is wrong with it."""

    def __init__(self, counter: str, reason: str):
        super().__init__(reason)
        self.counter = counter


@dataclass(frozen=True)
class Format:
    """How records are read: `fields(record, column)` gives prompt, responses and the preference of a list-wise row.

    columns: those that a record must have, and of what type. optional: those that it may have. orders: what --order
    may say, and the column that holds the preference then; a format with one order has it under "".
    """

    fields: Callable[[Record, str], Record]
    columns: Columns
    optional: tuple[str, ...] = ()
    orders: dict[str, str] = field(default_factory=lambda: {"": ""})


def read(source: str, record: Record, where: str, *, order: str = "") -> Row:
    """The row of one record of the format `source`; its id is a hash of prompt and responses.

    Columns that the format does not need stay beside them, but for those that a row would take for its own.

    Raises:
        Dropped: it cannot be used, or no row may hold its texts (an empty turn, half of a surrogate pair, ...).
        ValueError: with `where`, "file:line", for a record of another format.
    """
    form = FORMATS[source]
    try:
        _check(record, form.columns)
        fields = form.fields(record, form.orders[order])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    fields |= {"id": source, "source": source}
    own = {*KEYS, *columns_of(source, order)}
    others = {key: value for key, value in record.items() if key not in own and _can_stay({key: value}, fields)}
    try:
        row = parse_row(fields | others, where)  # before the hash: it refuses what has no JSON
    except ValueError as error:
        raise Dropped("rows_malformed", str(error).removeprefix(f"{where}: ")) from error
    content = json.dumps([fields["prompt"], fields["responses"]]).encode()
    return replace(row, id=f"{source}-{hashlib.blake2b(content, digest_size=8).hexdigest()}")


def columns_of(source: str, order: str) -> set[str]:
    """The columns that a row is made of."""
    form = FORMATS[source]
    return {*form.columns, *form.optional, form.orders[order]}


def write(format: str, row: Row, chosen: int, rejected: int) -> Record:
    """The pair (indices of responses) as a record of a format; Dropped where it would not give the same texts back."""
    prompt, texts = row.prompt, (row.responses[chosen], row.responses[rejected])
    record = EXPORTS[format](prompt, texts)
    try:
        back = read(format, record, row.where)
        same = (back.prompt, back.responses) == (prompt, texts)
    except Dropped as dropped:
        if dropped.counter in ("rows_empty_response", "rows_equal_responses"):
            raise
        same = False
    if not same:
        reason = "turns must go Human, Assistant, ..., Assistant with no such mark inside a text"
        raise Dropped("rows_unsupported", reason)
    return record


# -- from a record: one function per format --


def hh_rlhf(record: Record, _: str) -> Record:
    """Anthropic's HH-RLHF: whole dialogues "chosen" and "rejected" -> messages and the pair of last answers.

    Dropped: dialogues that do not go Human, Assistant, ..., Assistant; that differ before the last answer;
    whose last answers are empty or equal.
    """
    (*prompt, chosen), (*other, rejected) = (_dialogue(record, key) for key in ("chosen", "rejected"))
    if prompt != other:
        raise Dropped("rows_prompts_differ", "chosen and rejected differ before the last answer")
    return _pair(prompt, chosen["content"], rejected["content"])


def authors(record: Record, _: str) -> Record:
    """The format of the released HPS code: a prompt in its template already, responses, rewards if scored."""
    return {key: record[key] for key in ("prompt", "responses", "rewards") if key in record}


def pku_saferlhf(record: Record, label: str) -> Record:
    """PKU-SafeRLHF: one question, two responses in their order, and one of its two human labels as the pair.

    label: "better_response_id" (the more helpful of the two) or "safer_response_id", 0 or 1. The id of a row
    does not depend on it, so that the rows of both orders can be matched. Dropped: a label that is neither.
    """
    _check(record, {label: object})
    if isinstance(record[label], bool) or record[label] not in (0, 1):
        raise Dropped("rows_no_preference", f"{label} is {reprlib.repr(record[label])}, neither 0 nor 1")
    return _pair(_question(record["prompt"]), record["response_0"], record["response_1"], chosen=int(record[label]))


def ultrafeedback(record: Record, score: str) -> Record:
    """openbmb's UltraFeedback: an instruction, its completions, and one of their scores as the reward.

    score: "overall_score" (1 to 10) or "fine-grained_score" (the mean of four aspects, 1 to 5). The principle
    that each completion was sampled under is its own system prompt, and is not part of the row's prompt.
    Dropped: fewer than two completions; one without that score.
    """
    return _ranked(_question(record["instruction"]), record, "completions", text="response", score=score)


def nectar(record: Record, _: str) -> Record:
    """Berkeley's Nectar: a dialogue that ends with "Assistant: ", and answers with ranks, 1 the best.

    The reward is minus the rank: it orders the answers, but its distances mean nothing.
    Dropped: a prompt that is no such dialogue; fewer than two answers; one without a rank.
    """
    *prompt, answer = _dialogue(record, "prompt")
    if answer["content"].strip():
        raise Dropped("rows_malformed", "prompt holds the beginning of the answer")
    return _ranked(prompt, record, "answers", text="answer", score="rank", sign=-1)


def trl(record: Record, _: str) -> Record:
    """TRL's preference format: standard (strings) or conversational (messages), with or without a prompt.

    Without one, or with a string beside conversations (as in ultrafeedback_binarized), the prompt is what both
    begin with, as TRL's `extract_prompt` has it. A standard prompt stays a string, in no chat template.
    Dropped: nothing in common; completions of several messages, or of other than the assistant's text; tools
    and images, which change the prompt beyond its messages.
    """
    for key in ("tools", "images", "image", "chat_template_kwargs"):
        if record.get(key):
            raise Dropped("rows_unsupported", f"{key} changes the prompt and cannot be kept")
    prompt, chosen, rejected = (_messages(record.get(key), key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be strings or both be lists of messages")
    if isinstance(prompt, list) and isinstance(chosen, str):
        raise ValueError("the prompt is a list of messages but chosen is a string; make both alike")
    if prompt is None or isinstance(prompt, str) != isinstance(chosen, str):
        start = _common_start(chosen, rejected)
        if start == 0:
            raise Dropped("rows_prompts_differ", "chosen and rejected begin with nothing in common")
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    if not isinstance(chosen, str):
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            roles = [message["role"] for message in side]
            if roles != ["assistant"] or side[0].keys() != {"role", "content"} or type(side[0]["content"]) is not str:
                what = f"{name} is {roles}, not one message of the assistant's with a text and no more"
                raise Dropped("rows_unsupported", what)
        chosen, rejected = chosen[0]["content"], rejected[0]["content"]
    return _pair(prompt, chosen, rejected)


# -- back to a record --


def to_hh_rlhf(prompt: Any, texts: tuple[str, str]) -> Record:
    """Two whole dialogues."""
    if isinstance(prompt, str):
        raise Dropped("rows_unsupported", "the prompt is a string; HH-RLHF needs messages")
    speakers = {role: speaker for speaker, role in HH_ROLES.items()}
    said = "".join(f"\n\n{speakers.get(turn['role'], turn['role'])}: {turn['content']}" for turn in prompt)
    return {key: f"{said}\n\nAssistant: {text}" for key, text in zip(("chosen", "rejected"), texts, strict=True)}


def to_trl(prompt: Any, texts: tuple[str, str]) -> Record:
    """The prompt apart: conversational, or standard for a string prompt."""
    chosen, rejected = texts if isinstance(prompt, str) else ([{"role": "assistant", "content": y}] for y in texts)
    return {"prompt": prompt if isinstance(prompt, str) else list(prompt), "chosen": chosen, "rejected": rejected}


# -- pieces --


def _check(record: Any, columns: Columns, what: str = "") -> None:
    """Raise ValueError unless the record, named `what` where it is inside another one, has these columns."""
    for key, kind in columns.items():
        if key not in record:
            raise ValueError(f"{what}the key {key!r} is missing")
        if not isinstance(record[key], kind):
            raise ValueError(f"{what}{key} must be {KINDS[kind]}, not {type(record[key]).__name__}")


def _can_stay(other: Record, fields: Record) -> bool:
    """Whether a row can hold another column: it can be written as JSON, and looks like no misspelled key."""
    try:
        check_keys(fields | other, KEYS, required=(), where="", others=True)
    except (ValueError, TypeError):  # a date of parquet, say
        return False
    return True


def _question(text: str) -> list[Record]:
    return [{"role": "user", "content": text}]


def _dialogue(record: Record, key: str) -> list[Record]:
    r"""HH-RLHF's and Nectar's "\n\nHuman: ...\n\nAssistant: ..." as messages, of which the last is an answer."""
    head, *rest = HH_MARK.split(record[key])
    speakers, texts = rest[::2], rest[1::2]
    wrong = ""
    if head or speakers[:1] != ["Human"]:
        wrong = r"does not start with '\n\nHuman: '"
    elif speakers[-1] != "Assistant":
        wrong = "does not end with a turn of Assistant"
    elif any(a == b for a, b in pairwise(speakers)):
        wrong = "has two turns of one speaker in a row"
    if wrong:
        raise Dropped("rows_malformed", f"{key} {wrong}")
    return [{"role": HH_ROLES[who], "content": text} for who, text in zip(speakers, texts, strict=True)]


def _messages(value: Any, name: str) -> Any:
    """A text or None as it is; messages without the keys that parquet has filled with null."""
    if value is None or isinstance(value, str):
        return value
    _check({name: value}, {name: (str, list)})
    messages = []
    for i, turn in enumerate(value):
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ValueError(f"{name}[{i}] must be an object with role and content")
        messages.append({key: part for key, part in turn.items() if part not in (None, []) or key == "content"})
    return messages


def _common_start(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Length of the prompt that both begin with, as in TRL: something is left of each, the space before it too."""
    shorter = min(len(chosen), len(rejected))
    differ = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if differ is None:
        return max(shorter - 1, 0)
    return differ - 1 if differ and chosen[differ - 1] == " " else differ


def _pair(prompt: Any, *texts: str, chosen: int = 0) -> Record:
    """Two responses and the human choice between them."""
    if not all(text.strip() for text in texts):
        raise Dropped("rows_empty_response", "an answer is empty")
    if texts[0].strip() == texts[1].strip():
        raise Dropped("rows_equal_responses", "both answers are the same")
    return {"prompt": prompt, "responses": list(texts), "chosen": chosen, "rejected": 1 - chosen}


def _ranked(prompt: Any, record: Record, name: str, *, text: str, score: str, sign: int = 1) -> Record:
    """The answers in record[name] with sign * score as rewards; an empty one stays: training drops and counts it."""
    answers = record[name]
    for i, answer in enumerate(answers):
        if not isinstance(answer, dict):
            raise ValueError(f"{name}[{i}] must be an object with {text} and {score}")
        _check(answer, {text: str, score: object}, f"{name}[{i}]: ")
    if len(answers) < 2:
        raise Dropped("rows_too_few_responses", f"{len(answers)} responses; a preference needs two")
    for i, value in enumerate(answer[score] for answer in answers):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= MAX_REWARD:  # NaN is not <= anything
            raise Dropped("rows_no_preference", f"the {score} of response {i} is {reprlib.repr(value)}, not a number")
    texts, rewards = ([answer[key] for answer in answers] for key in (text, score))
    return {"prompt": prompt, "responses": texts, "rewards": [sign * reward for reward in rewards]}


FORMATS = {
    "hh-rlhf": Format(hh_rlhf, {"chosen": str, "rejected": str}),
    "authors": Format(authors, {"prompt": str, "responses": list}, ("rewards",)),
    "pku-saferlhf": Format(
        pku_saferlhf,
        {"prompt": str, "response_0": str, "response_1": str},
        orders={"helpful": "better_response_id", "safe": "safer_response_id"},
    ),
    "ultrafeedback": Format(
        ultrafeedback,
        {"instruction": str, "completions": list},
        orders={"overall": "overall_score", "fine-grained": "fine-grained_score"},
    ),
    "nectar": Format(nectar, {"prompt": str, "answers": list}),
    "trl": Format(trl, {"chosen": (str, list), "rejected": (str, list)}, ("prompt",)),
}
EXPORTS = {"trl": to_trl, "hh-rlhf": to_hh_rlhf}
