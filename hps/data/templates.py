"""Chat templates, which decide what of a conversation a model reads: rendered with a check that they lose nothing.

A template is a program. It may leave out a turn, write today's date, or take options; here each turn's content is
looked for in what it wrote, the date is fixed, and options become a part of the template, so that they go wherever
the tokenizer goes: into fingerprints, exported policies, other programs.
"""

import datetime
import functools
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

DATE = "2025-01-01"  # of templates that write the day's, unless the option `date` names another
TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
Turns = Sequence[dict[str, Any]]


class Template:
    """A tokenizer's chat template; what it does to turns is asked once per sequence of roles."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._shapes: dict[str, list[str]] = {}

    def write(self, turns: Turns, **how: Any) -> Any:
        """Text (or with tokenize=True ids) of turns, behind a user's up to where the answer begins."""
        if not self.tokenizer.chat_template:
            raise ValueError("the prompt is a list of messages but the tokenizer has no chat template")
        how = dict(tokenize=False, add_generation_prompt=turns[-1]["role"] != "assistant", return_dict=False) | how
        try:
            return self.tokenizer.apply_chat_template(list(turns), **how)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the tokenizer's chat template refuses these messages: {error}") from error

    def render(self, turns: Turns) -> str:
        """The text of turns, each of which is found in it; ValueError that names the turn which is not."""
        text, shape = self.write(turns), self.shape(turns)
        if _fits(text, shape, turns):
            return text
        at = 0  # a template may write other things around other contents
        for i, turn in enumerate(turns):
            begin = 0 if turn["role"] == "system" else at
            found = [(text.find(form, begin), len(form)) for form in _forms(turn["content"])]
            first, size = next((pair for pair in found if pair[0] >= 0), (-1, 0))
            if first < 0:
                raise _lost(turns, i, "leaves out or changes a part of")
            at = max(at, first + size)
        return text

    def encode(self, turns: Turns, control: set[int]) -> list[int]:
        """Ids of turns. A token of `control` is the template's, never a content's, which are read as characters."""

        def controls(ids: list[int]) -> int:
            return sum(i in control for i in ids)

        ids: list[int] = self.tokenizer(self.render(turns), add_special_tokens=False, verbose=False).input_ids
        names = [str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(control))]
        quoted = [(i, name) for i, turn in enumerate(turns) for name in names if name in turn["content"]]
        if not quoted:
            return ids
        own = self.tokenizer("".join(self.shape(turns)), add_special_tokens=False, verbose=False).input_ids
        try:
            ids = self.write(turns, tokenize=True, sanitize_control_tokens=True)
        except ValueError as error:
            if "sanitize" not in str(error):
                raise
        if controls(ids) != controls(own):
            raise ValueError(
                f"prompt[{quoted[0][0]}] holds the control token {quoted[0][1]!r} inside its text, and this tokenizer "
                "cannot read it as plain characters; take it out of the text"
            )
        return ids

    def shape(self, turns: Turns) -> list[str]:
        """What the template writes around the contents, with a mark in the place of each."""
        key = json.dumps([{**turn, "content": ""} for turn in turns])
        if key not in self._shapes:
            marked = self.write([{**turn, "content": f"qzqt{i}qzq"} for i, turn in enumerate(turns)])
            parts = [part for part in re.split(r"(qzqt\d+qzq)", marked) if part]
            seen = [int(turn[1]) for part in parts if (turn := _MARK.fullmatch(part))]
            for i in range(len(turns)):
                if i not in seen:
                    raise _lost(turns, i, "leaves out")
            order = [i for i in seen if turns[i]["role"] != "system"]  # some write that before the last question
            for i, j in zip(order, sorted(order), strict=True):
                if i != j:
                    raise _lost(turns, j, "moves to another place")
            self._shapes[key] = parts
        return self._shapes[key]

    @functools.cached_property
    def answer(self) -> tuple[str, bool, str]:
        """What the template does to an answer: the white space that it puts before one, whether it strips one, and in
        words how a finished answer differs from prompt, text and eos_token (empty: not at all)."""
        asked, eos = {"role": "user", "content": "a"}, self.tokenizer.eos_token
        try:
            head = self.write([asked])
            whole, padded = (self.write([asked, {"role": "assistant", "content": x}]) for x in ("qzq", "\n qzq \n"))
        except ValueError as error:
            return "", False, str(error)
        strips = "\n qzq \n" not in padded
        if not whole.startswith(head):
            same = next(i for i, c in enumerate(head) if whole[i : i + 1] != c)
            return "", strips, f"begins an answer with {head[same:]!r}, which a finished one does not have"
        before, _, after = whole[len(head) :].partition("qzq")
        if before.strip():
            return "", strips, f"writes {before!r} before a finished answer, which the prompt does not end in"
        ends = after.lstrip().startswith(eos)
        return before, strips, "" if ends else f"ends an answer with {after!r} and not with eos_token, {eos!r}"


_MARK = re.compile(r"qzqt(\d+)qzq")


def _fits(text: str, shape: list[str], turns: Turns) -> bool:
    """Whether a text is the marked one with the contents in the place of the marks."""
    at = 0
    for part in shape:
        turn = _MARK.fullmatch(part)
        forms = _forms(turns[int(turn[1])]["content"]) if turn else [part]
        form = next((form for form in forms if text.startswith(form, at)), None)
        if form is None:
            return False
        at += len(form)
    return at == len(text)


def _forms(content: str) -> list[str]:
    """How a template may write a content without a loss: as it is, stripped, or as JSON."""
    quoted = json.dumps(content, ensure_ascii=False)[1:-1]
    return [content, content.strip(), content.lstrip(), content.rstrip(), quoted, json.dumps(content)[1:-1]]


def _lost(turns: Turns, i: int, what: str) -> ValueError:
    return ValueError(
        f"the tokenizer's chat template {what} what prompt[{i}], the turn of {turns[i]['role']!r}, says: change the "
        "turn, leave out the row, or take another template"
    )


def fix(template: str, options: str, *, path: str) -> str:
    """The template with options of its own set, and with a fixed date where it writes the day's.

    options: NAME=VALUE,... of what the template asks for (enable_thinking=false), and date=YYYY-MM-DD.
    Raises ValueError for an option that the template does not know, and for a date that cannot be fixed.
    """
    given = dict(item.partition("=")[::2] for item in options.split(",") if item)
    date = given.pop("date", "")
    try:
        day = datetime.date.fromisoformat(date or DATE)
    except ValueError as error:
        raise ValueError(f"template option date={date}: write it as in date={DATE}") from error
    fixed, count = TODAY.subn(lambda found: json.dumps(day.strftime(found[2])), template)
    if re.search(r"strftime_now\s*\(", fixed):
        raise ValueError(f"the chat template of {path!r} writes the time in a way that cannot be fixed: edit it")
    note = f"{{# date {day} #}}"  # by which a template that was fixed before, in a policy's folder, is known
    if count:
        fixed = note + fixed
        if not date:
            _say(f"{path}: the chat template writes the day's date, fixed here to {DATE}; --template_options date=...")
    elif date and note not in template:
        raise ValueError(f"template option date={date}: the chat template of {path!r} writes no date, or another")
    for name, value in given.items():
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            raise ValueError(f"the chat template of {path!r} knows no option {name!r}")
        value = value if value in ("true", "false", "none") or value.isdecimal() else json.dumps(value)
        fixed = re.sub(rf"{{# option #}}{{% set {name} = .*? %}}", "", fixed)
        fixed = f"{{# option #}}{{% set {name} = {value} %}}{fixed}"
    return fixed


@functools.cache  # so that the log says it once
def _say(line: str) -> None:
    logging.getLogger(__name__).warning(line)
