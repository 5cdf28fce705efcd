"""The preference formats that users have: for each a function from a decoded record to what a row needs.

A record that cannot be used raises Dropped, with its reason, one of another format ValueError. Texts are kept as they
are, whitespace included.
"""

import hashlib
import json
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import pairwise
from typing import Any, cast

from hps.data.rows import KEYS, MAX_REWARD, Row, check_keys, decode_json, parse_row

HH_MARK = re.compile(r"\n\n(Human|Assistant): ?")
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
DROPS = ("rows_malformed", "rows_unsupported", "rows_prompts_differ", "rows_empty_response", "rows_equal_responses")
DROPS += ("rows_too_few_responses", "rows_no_preference", "rows_duplicate")
PROMPT_CHARACTERS = 10  # of a prompt at least, for an answer that begins with it to be no chance
IMPLICIT_CHARACTERS = 20  # fewer of them are what two answers begin with by chance
# These may be the prompt where there is none, however short their text.
PROMPT_NAMES = ("question", "instruction", "query", "input", "user", "problem", "context")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
TEXT_OR_MESSAGES = (str, list, dict)
KINDS = {str: "a string", list: "a list", TEXT_OR_MESSAGES: "a string or a list of messages"}

Record = dict[str, Any]


class Dropped(Exception):
    """A record that is left out: the counter (one of DROPS) that it adds to, and what is wrong with it."""

    def __init__(self, counter: str, reason: str):
        super().__init__(reason)
        self.counter = counter


@dataclass(frozen=True)
class Format:
    """How records are read."""

    fields: Callable[[Record, str], Record]  # (record, column of the preference) -> the keys of a list-wise row
    columns: Record  # that a record must have, and of what type
    optional: tuple[str, ...] = ()  # columns that it may have
    # What --order may say, and the column that holds the preference then; a format with one order has it under "".
    orders: dict[str, str] = field(default_factory=lambda: {"": ""})

    def names(self, order: str) -> set[str]:
        """The columns that a row is made of."""
        return {*self.columns, *self.optional, self.orders[order]}


def read(source: str, record: Record, where: str, *, order: str = "") -> Row:
    """The row of one record of the format `source`, other columns beside its own; the id that it is given hashes prompt
    and responses.

    Raises:
        Dropped: it cannot be used, or no row may hold its texts (an empty turn, half of a surrogate pair, ...).
        ValueError: with `where`, "file:line", for a record of another format.
    """
    form = FORMATS[source]
    try:
        _check(record, form.columns)
        fields = form.fields(record, form.orders[order])
    except ValueError as error:
        hint = "; it is list-wise already: --source listwise" if {"prompt", "responses"} <= record.keys() else ""
        raise ValueError(f"{where}: {error}{hint}") from error
    fields, has_id = {"id": source, "source": source} | fields, "id" in fields
    own = {*KEYS, *form.names(order)}
    others = {key: value for key, value in record.items() if key not in own and _can_stay({key: value}, fields)}
    try:
        row = parse_row(fields | others, where)  # before the hash: it refuses what has no JSON
    except ValueError as error:
        raise Dropped("rows_malformed", str(error).removeprefix(f"{where}: ")) from error
    content = json.dumps([fields["prompt"], fields["responses"]]).encode()
    return row if has_id else replace(row, id=f"{source}-{hashlib.blake2b(content, digest_size=8).hexdigest()}")


def renamed(record: Record, columns: dict[str, str], where: str) -> Record:
    """The record with its columns under the names that the format knows, {name: column}: user and system make a prompt
    of chat turns, and a prompt without a column is what the answers begin with."""
    for column in filter(None, columns.values()):
        if column not in record:
            raise ValueError(f"{where}: there is no column {column!r}; there are {', '.join(map(repr, record))}")
    named = {key: value for key, value in record.items() if key not in columns.values()}
    named |= {name: record.get(column) for name, column in columns.items()}
    turns = [{"role": role, "content": named.pop(role)} for role in ("system", "user") if role in columns]
    return named | ({"prompt": [turn for turn in turns if turn["content"]]} if turns else {})


def notes(source: str, record: Record, row: Row) -> dict[str, int]:
    """What is worth counting in a record that was read, but for zeros."""
    found = {"responses_with_prompt": sum(prompt_repeated(row))}
    if source == "alpaca-eval":
        found["answers_unjudged"] = len(record["unjudged"])
    if source == "trl" and not record.get("prompt") and isinstance(row.prompt, str):
        found["prompts_implicit_short"] = int(len(row.prompt) < IMPLICIT_CHARACTERS)
    if source == "ultrafeedback" and "overall_score" in record["completions"][0]:
        tens = [_false_ten(completion) for completion in record["completions"]]
        found |= {"scores_ten_made_one": tens.count(True), "responses_of_doubtful_ten": tens.count(None)}
    return {key: n for key, n in found.items() if n}


def prompt_repeated(row: Row) -> list[bool]:
    """Which responses begin with the prompt, or with its last turn."""
    text = (row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]).strip()
    return [len(text) >= PROMPT_CHARACTERS and y.lstrip().startswith(text) for y in row.responses]


def to_trl(row: Row, chosen: int, rejected: int) -> Record:
    """The pair (indices of responses) in TRL's preference format: conversational, or standard for a string prompt.
    Dropped: an empty answer, or two equal ones."""
    texts = (row.responses[chosen], row.responses[rejected])
    _pair(row.prompt, *texts)
    sides = texts if isinstance(row.prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]
    prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
    return {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}


# -- from a record: one function per format; docs/DATA.md says what each becomes, and `Dropped` why one is left out --


def hh_rlhf(record: Record, _: str) -> Record:
    """Anthropic's HH-RLHF: whole dialogues "chosen" and "rejected" -> messages and the pair of last answers."""
    (*prompt, chosen), (*other, rejected) = (_dialogue(record, key) for key in ("chosen", "rejected"))
    if prompt != other:
        raise Dropped("rows_prompts_differ", "chosen and rejected differ before the last answer")
    return _pair(prompt, chosen["content"], rejected["content"])


def listwise(record: Record, _: str) -> Record:
    """Rows of our own format out of a table, where what a row lacks is null and CSV has lists as JSON; an id is made
    where there is none. And the format of the released HPS code: a prompt in its template already, responses, rewards
    if scored; its sets of prompts are messages with nothing else."""
    row = {key: x for key in KEYS if (x := record.get(key)) not in (None, "")}
    for key in {"responses", "rewards"} & row.keys():
        row[key] = decode_json(row[key].encode(), key) if isinstance(row[key], str) else row[key]
    for key in {"chosen", "rejected"} & row.keys():
        row[key] = int(k) if (k := number(row[key])) is not None and k.is_integer() else row[key]
    row |= {"rewards": _numbers(row["rewards"], "reward")} if isinstance(row.get("rewards"), list) else {}
    row |= {"id": str(row["id"])} if "id" in row else {}  # of an index, say
    return {"responses": []} | row | {"prompt": _messages(record["prompt"], "prompt")}


def simpo(record: Record, _: str) -> Record:
    """SimPO's lists: a question, all generated responses and their rewards."""
    prompt, texts, scores = record["prompt"], record["all_generated_responses"], record["all_rm_scores"]
    prompt = _question(prompt) if isinstance(prompt, str) else _messages(prompt, "prompt")
    return _ranked(prompt, texts, scores, "all_rm_scores")


def pku_saferlhf(record: Record, label: str) -> Record:
    """PKU-SafeRLHF: one question, two responses in their order, and as the pair one of its two human labels, the id of
    the better or of the safer response; the row's id does not depend on which."""
    _check(record, {label: object})
    if (chosen := number(record[label])) not in (0, 1):
        raise Dropped("rows_no_preference", f"{label} is {reprlib.repr(record[label])}, neither 0 nor 1")
    return _pair(_question(record["prompt"]), record["response_0"], record["response_1"], chosen=int(chosen))


def ultrafeedback(record: Record, score: str) -> Record:
    """openbmb's UltraFeedback: an instruction, its completions, and as the reward their overall score (1 to 10) or the
    mean of four aspects (1 to 5).

    Early versions say 10 of answers that were worth 1 (issue 8 of OpenBMB/UltraFeedback). The rule is that of the
    authors' src/data_annotation/fix_overall_score_issue.py: 10 stays where the mean of the aspects' ratings is above 4,
    and is 1 where it is at most 2. Differs: between, where they asked GPT-4 again, the completion is left out.
    """
    answers = record["completions"]
    if score == "overall_score":
        answers = [{**y, score: 1} if ten else y for y in answers if (ten := _false_ten(y)) is not None]
    return _ranked(_question(record["instruction"]), *_answers(answers, "completions", "response", score), score)


def nectar(record: Record, _: str) -> Record:
    """Berkeley's Nectar: a dialogue that ends with "Assistant: ", answers, and as the reward minus the rank."""
    *prompt, answer = _dialogue(record, "prompt")
    if answer["content"].strip():
        raise Dropped("rows_malformed", "prompt holds the beginning of the answer")
    return _ranked(prompt, *_answers(record["answers"], "answers", "answer", "rank"), "rank", sign=-1)


def alpaca_eval(record: Record, _: str) -> Record:
    """AlpacaEval, grouped by `importers.alpaca_lists`: an instruction, answers of several models, and as the reward of
    each the judge's preference for it over the baseline's answer, 0 to 1."""
    return _ranked(_question(record["instruction"]), record["answers"], record["preferences"], "preference")


def trl(record: Record, _: str) -> Record:
    """TRL's preference format: standard (strings) or conversational (messages), with or without a prompt.

    Without one, or with a string beside conversations (as in ultrafeedback_binarized), the prompt is what both
    begin with, as TRL's `extract_prompt` has it, but up to the end of a word. A standard prompt stays a string, in no
    chat template.
    """
    for key in ("tools", "images", "image", "chat_template_kwargs"):
        if record.get(key):
            raise Dropped("rows_unsupported", f"{key} changes the prompt and cannot be kept")
    prompt, chosen, rejected = (_messages(record.get(key), key) for key in ("prompt", "chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be strings or both be lists of messages")
    if isinstance(prompt, list) and isinstance(chosen, str):
        return _pair(prompt, chosen, rejected)  # a question apart from its answers
    if "prompt" not in record:
        _refuse_another_prompt(record, chosen)
    if prompt is None or isinstance(prompt, str) != isinstance(chosen, str):
        start = _common_start(chosen, rejected)
        if start == 0 and prompt:
            chosen, rejected = (_question(prompt) + side for side in (chosen, rejected))
            start = 1
        if start == 0:
            raise Dropped("rows_prompts_differ", "chosen and rejected begin with nothing in common")
        prompt, chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
    return _pair(prompt, *(side if isinstance(side, str) else _answer(side) for side in (chosen, rejected)))


# -- pieces --


def _check(record: Any, columns: Record, what: str = "") -> None:
    """Raise ValueError unless the record, named `what` where it is inside another one, has these columns."""
    for key, kind in columns.items():
        if key not in record:
            there = reprlib.repr(list(record))
            split = ": its columns are to be separated by commas" * any(";" in column for column in record)
            advice = split or "; data_prep.py import --columns NAME=COLUMN names others" * (not what)
            raise ValueError(f"{what}the key {key!r} is missing among {there}{advice}")
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
        wrong = r"does not start with '\n\nHuman: '" + " (other pairs: --source trl)" * ("rejected" in record)
    elif speakers[-1] != "Assistant":
        wrong = "does not end with a turn of Assistant"
    elif any(a == b for a, b in pairwise(speakers)):
        wrong = "has two turns of one speaker in a row"
    if wrong:
        raise Dropped("rows_malformed", f"{key} {wrong}")
    return [{"role": HH_ROLES[who], "content": text} for who, text in zip(speakers, texts, strict=True)]


def _messages(value: Any, name: str) -> Any:
    """A text or None as it is; messages (one alone, ShareGPT's) without the keys that parquet has filled with null or
    that are empty lists."""
    if value is None or isinstance(value, str):
        return value
    _check({name: value}, {name: TEXT_OR_MESSAGES})
    messages = []
    for i, turn in enumerate([value] if isinstance(value, dict) else value):
        if isinstance(turn, dict) and {"from", "value"} <= turn.keys():
            turn = {"role": SHAREGPT_ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"], **turn}
            del turn["from"], turn["value"]
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or "content" not in turn:
            raise ValueError(f"{name}[{i}] must be an object with role and content")
        messages.append({key: part for key, part in turn.items() if part not in (None, []) or key == "content"})
    return messages


def _answer(turns: list[Record]) -> str:
    """The text of messages that are one answer."""
    roles = [turn["role"] for turn in turns]
    if roles != ["assistant"] or turns[0].keys() != {"role", "content"} or type(turns[0]["content"]) is not str:
        raise Dropped("rows_unsupported", f"{roles}, not one message of the assistant's with a text alone")
    return turns[0]["content"]


def _refuse_another_prompt(record: Record, chosen: Any) -> None:
    """Raise ValueError where another column may hold the prompt: a text or messages that `chosen` does not have."""
    said = chosen if isinstance(chosen, str) else "\n".join(str(turn["content"]) for turn in chosen)
    others = sorted(record.keys() - {"chosen", "rejected"}, key=lambda key: (key.lower() not in PROMPT_NAMES, key))
    for key in others:
        value, turn, may_be = record[key], "", False
        if isinstance(value, str):
            turn = f"user={key} (a turn of the user's), "
            may_be = value.strip() not in said and (key.lower() in PROMPT_NAMES or len(value.split()) > 3)
        elif value and isinstance(value, list) and all(isinstance(x, dict) and {"role", "from"} & {*x} for x in value):
            may_be = _messages(value, key) != chosen[: len(value)]
        if may_be:
            known = f"{turn}prompt={key} (as it is), or prompt= (what both answers begin with)"
            raise ValueError(f"there is no prompt, but {key!r} may be it: data_prep.py import --columns {known}")


def _common_start(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Length of the prompt that both begin with, as in TRL: something is left of each, the space before it too.

    Differs: of texts it ends with a word, where TRL may end it inside of one.
    """
    shorter = min(len(chosen), len(rejected))
    start = next((i for i in range(shorter) if chosen[i] != rejected[i]), max(shorter - 1, 0))
    if isinstance(chosen, str) and isinstance(rejected, str):
        # As long as what stands before the cut goes on behind it, in one of the two at least.
        while 0 < start and chosen[start - 1].isalnum() and (chosen[start].isalnum() or rejected[start].isalnum()):
            start -= 1
    return start - 1 if start and chosen[start - 1] == " " else start


def number(value: object) -> float | None:
    """A finite number, also one that is written as a text or a decimal; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) <= MAX_REWARD else None  # NaN is not <= anything


def _false_ten(completion: Any) -> bool | None:
    """Whether UltraFeedback's overall score of 10 stands for 1; None where its aspects do not tell."""
    if not isinstance(completion, dict) or number(completion.get("overall_score")) != 10:
        return False
    mean = number(completion.get("fine-grained_score"))
    if mean is None and isinstance(aspects := completion.get("annotations"), dict):  # of the versions with false tens
        ratings = [number(aspect.get("Rating")) for aspect in aspects.values() if isinstance(aspect, dict)]
        ratings = [rating for rating in ratings if rating is not None]  # some are "N/A"
        mean = sum(ratings) / len(ratings) if ratings else None
    return None if mean is None or 2 < mean <= 4 else mean <= 2


def _pair(prompt: Any, *texts: str, chosen: int = 0) -> Record:
    """Two responses and the human choice between them."""
    if not all(text.strip() for text in texts):
        raise Dropped("rows_empty_response", "an answer is empty")
    if texts[0].strip() == texts[1].strip():
        raise Dropped("rows_equal_responses", "both answers are the same")
    return {"prompt": prompt, "responses": list(texts), "chosen": chosen, "rejected": 1 - chosen}


def _answers(answers: list[Any], name: str, text: str, score: str) -> tuple[list[Any], list[Any]]:
    """The texts and the scores of the answers, objects, in record[name]."""
    for i, answer in enumerate(answers):
        if not isinstance(answer, dict):
            raise ValueError(f"{name}[{i}] must be an object with {text} and {score}")
        _check(answer, {text: str, score: object}, f"{name}[{i}]: ")
    return [answer[text] for answer in answers], [answer[score] for answer in answers]


def _ranked(prompt: Any, texts: list[Any], scores: list[Any], score: str, *, sign: int = 1) -> Record:
    """Responses with sign * scores as rewards; an empty one stays: training drops and counts it."""
    if len(texts) < 2:
        raise Dropped("rows_too_few_responses", f"{len(texts)} responses; a preference needs two")
    return {"prompt": prompt, "responses": texts, "rewards": [sign * r for r in _numbers(scores, score)]}


def _numbers(scores: list[Any], score: str) -> list[float]:
    for i, value in enumerate(scores):
        if number(value) is None:
            raise Dropped("rows_no_preference", f"the {score} of response {i} is {reprlib.repr(value)}, not a number")
    return [cast(float, number(value)) for value in scores]


PKU_LABELS = {"helpful": "better_response_id", "safe": "safer_response_id"}
ULTRAFEEDBACK_SCORES = {"overall": "overall_score", "fine-grained": "fine-grained_score"}
FORMATS = {
    "hh-rlhf": Format(hh_rlhf, {"chosen": str, "rejected": str}),
    "listwise": Format(listwise, {"prompt": TEXT_OR_MESSAGES}, KEYS),
    "authors": Format(listwise, {"prompt": TEXT_OR_MESSAGES}, KEYS),
    "simpo": Format(simpo, {"prompt": TEXT_OR_MESSAGES, "all_generated_responses": list, "all_rm_scores": list}),
    "pku-saferlhf": Format(pku_saferlhf, {"prompt": str, "response_0": str, "response_1": str}, orders=PKU_LABELS),
    "ultrafeedback": Format(ultrafeedback, {"instruction": str, "completions": list}, orders=ULTRAFEEDBACK_SCORES),
    "nectar": Format(nectar, {"prompt": str, "answers": list}),
    "alpaca-eval": Format(alpaca_eval, dict(instruction=str, answers=list, preferences=list, unjudged=list)),
    "trl": Format(trl, {"chosen": TEXT_OR_MESSAGES, "rejected": TEXT_OR_MESSAGES}, ("prompt",)),
}
