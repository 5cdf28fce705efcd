"""Chat templates, which decide what of a conversation a model reads: rendered with a check that they lose nothing.

A template is a program. It may leave out a turn, write today's date, or take options; here each turn's content is
looked for in what it wrote, the date is fixed, and options become a part of the template, so that they go wherever
the tokenizer goes: into fingerprints, exported policies, other programs.
"""

import datetime
import functools
import json
import logging
import os.path
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import mark_control_tokens

DATE = "2025-01-01"  # of templates that write the day's, unless the option `date` names another
DIRECTIVES = ("-d", "-m", *"aAbBcdeFHIjmMpSTUwWxXyY", "%")  # of strftime
FIXED = re.compile(r"\{# fixed (\w+) #\}(.*)\n")  # a line that `fix` has put before a template
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # keys of a turn, as transformers knows them
MARK = re.compile(r"qzqt(\d+)qzq")  # in the place of a turn's content
Turns = Sequence[dict[str, Any]]


class Template:
    """A tokenizer's chat template; what it does to turns is asked once per sequence of roles."""

    def __init__(self, encoder: Any) -> None:
        self.encoder, self.tokenizer = encoder, encoder.tokenizer
        self._shapes: dict[str, list[str]] = {}

    def write(self, turns: Turns) -> str:
        """The text of turns, behind a user's up to where the answer begins."""
        if not self.tokenizer.chat_template:
            raise ValueError("the prompt is a list of messages but the tokenizer has no chat template")
        ask = turns[-1]["role"] != "assistant"
        try:
            return self.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"the tokenizer's chat template refuses these messages: {error}") from error

    def render(self, turns: Turns) -> str:
        """The text of turns, each of which is found in it; ValueError that names the turn which is not.

        White space around a content may change, and what an earlier answer thought may be left out (`notes`).
        """
        text, at = self.write(turns), 0
        self.shape(turns)  # which misses a turn that is left out whole
        for i, turn in enumerate(turns):
            system = turn["role"] == "system"  # which may be written later
            found = [(text.find(form, 0 if system else at), len(form)) for form in _forms(turn)]
            ends = [begin + size for begin, size in found if begin >= 0]
            if not ends:
                raise _lost(turns, i, "leaves out or changes a part of")
            at = at if system else min(ends)
        return text

    def notes(self, prompt: str | Turns, texts: Sequence[str] = ()) -> list[str]:
        """Counters that a row adds to. `rows_thoughts_dropped`: it leaves out what an earlier answer thought, as the
        templates of models that think do, so that the policy will not see it when it is asked either; or what one of
        `texts` thought, as `answered` reads them. `prompts_outside_template`: a string with nothing of the template
        in it, of which a chat model may make little."""
        if isinstance(prompt, str):
            outside = bool(self._around) and not any(part in prompt for part in self._around)
            if outside:
                advice = "data_prep.py import --chat makes turns of them"
                _say(f"prompts are strings, without the chat template that this model has: {advice}")
            return ["prompts_outside_template"] * outside
        read = [[*prompt, said(text)] for text in texts] if texts and self.closing is None else [prompt]
        thoughts = [(turns, thought) for turns in read for turn in turns if (thought := _thought_said(turn)[0])]
        return ["rows_thoughts_dropped"] * any(thought not in self.write(turns) for turns, thought in thoughts)

    @functools.cached_property
    def _around(self) -> list[str]:
        """What it writes before and behind a question; nothing where there is no template."""
        with suppress(ValueError):  # it wants a system's turn before a question
            shape = self.shape([{"role": "user", "content": ""}])
            return [part.strip() for part in shape if part.strip() and not MARK.fullmatch(part)]
        return []

    def answered(self, prompt: Turns, texts: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """A prompt, and each answer with all that is written behind it, as a reward model reads a conversation.

        Where the template writes another beginning around a finished answer than the prompt's, each conversation is
        the template's own rendering, and the prompt what all of them begin with.
        """
        head, closing = self.encoder.prompt(prompt), self.closing
        if closing is not None:
            return head, [[*ids, *closing] for ids in self.encoder.responses(texts, chat=True)]
        wholes = [self.encode([*prompt, said(text)]) for text in texts]
        some: Any = [head, *(whole[:-1] for whole in wholes)]  # something is left of each
        begin = os.path.commonprefix(some)  # noqa: RUF071 - of ids, not of paths
        return list(begin), [whole[len(begin) :] for whole in wholes]

    @functools.cached_property
    def closing(self) -> list[int] | None:
        """What the template writes behind an answer's EOS (a line break, or nothing); None where it does not write
        prompt, text, EOS."""
        asked, text = {"role": "user", "content": "a"}, "b\n\nB"
        try:
            begin = [*self.encoder.prompt((asked,)), *next(self.encoder.responses([text]))]
            whole = self.encode([asked, said(text)])
        except ValueError:  # it loses the question, or wants a system's turn before it
            return None
        return whole[len(begin) :] if whole[: len(begin)] == begin else None

    def encode(self, turns: Turns) -> list[int]:
        """Ids of turns. Control tokens, and others that the template writes around these turns, are its own, never a
        content's, which is read as characters; but <think> may be what the model itself has written."""
        ids, shape = self._ids(self.render(turns)), "".join(self.shape(turns))
        names = {str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(self.encoder.control))}
        names |= {name for name in self._added if name in shape} - {"<think>", "</think>"}
        quoted = [(i, name) for i, turn in enumerate(turns) for name in names if name in turn["content"]]
        if not quoted:
            return ids
        pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
        marked = [{**turn, "content": mark_control_tokens(turn["content"], pattern)} for turn in turns]
        own = set(self.tokenizer.convert_tokens_to_ids(list(names)))
        try:
            ids = self._ids(self.write(marked), sanitize_control_tokens=True)
        except ValueError as error:
            if "sanitize" not in str(error):
                raise
        if sum(i in own for i in ids) != sum(i in own for i in self._ids(shape)):
            raise ValueError(
                f"prompt[{quoted[0][0]}] holds the control token {quoted[0][1]!r} inside its text, and this tokenizer "
                "cannot read it as plain characters; take it out of the text"
            )
        return ids

    def _ids(self, text: str, **how: Any) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **how).input_ids

    @functools.cached_property
    def _added(self) -> list[str]:
        """Tokens that stand beside the vocabulary, without blanks and line breaks."""
        return [token for token in self.tokenizer.get_added_vocab() if not token.isspace()]

    def shape(self, turns: Turns) -> list[str]:
        """What the template writes around the contents, with a mark in the place of each."""
        key = json.dumps([{**turn, "content": ""} for turn in turns])
        if key not in self._shapes:
            marked = self.write([{**turn, "content": f"qzqt{i}qzq"} for i, turn in enumerate(turns)])
            parts = [part for part in re.split(r"(qzqt\d+qzq)", marked) if part]
            seen = [int(turn[1]) for part in parts if (turn := MARK.fullmatch(part))]
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
            whole, padded = (self.write([asked, said(text)]) for text in ("qzq", "\n qZ\n\nq \n"))
        except ValueError as error:
            return "", False, str(error)
        strips = "\n qZ\n\nq \n" not in padded
        if not whole.startswith(head):
            same = next(i for i, c in enumerate(head) if whole[i : i + 1] != c)
            return "", strips, f"begins an answer with {head[same:]!r}, which a finished one does not have"
        before, _, after = whole[len(head) :].partition("qzq")
        if before.strip():
            return "", strips, f"writes {before!r} before a finished answer, which the prompt does not end in"
        if "qZ\n\nq" not in padded:
            return before, strips, "changes what an answer says"
        ends = after.lstrip().startswith(eos)
        return before, strips, "" if ends else f"ends an answer with {after!r} and not with eos_token, {eos!r}"


def said(answer: str) -> dict[str, Any]:
    """The turn of an answer."""
    return {"role": "assistant", "content": answer}


def _thought_said(turn: dict[str, Any]) -> tuple[str, str]:
    """What an answer thought, and what it then said."""
    thought, end, said = turn["content"].rpartition("</think>")
    if turn["role"] != "assistant" or not end:
        thought, said = "", turn["content"]
    more = [str(turn[key]) for key in THOUGHTS if turn.get(key)]
    return (more or [thought.rpartition("<think>")[2]])[0].strip(), said.strip()


def _forms(turn: dict[str, Any]) -> list[str]:
    """How a template may write a turn without a loss: as it is, as JSON, or without its thoughts."""
    content = turn["content"].strip()
    as_json = [json.dumps(content, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
    return [content, *as_json, _thought_said(turn)[1]]


def _lost(turns: Turns, i: int, what: str) -> ValueError:
    return ValueError(
        f"the tokenizer's chat template {what} what prompt[{i}], the turn of {turns[i]['role']!r}, says: change the "
        "turn, leave out the row, or take another template"
    )


def fix(template: Any, options: str, *, path: str) -> Any:
    """The template, or each by its name, with options of its own set, and with a fixed date where it asks for the
    day's; in lines before it, which replace those of an earlier call.

    options: NAME=VALUE,... of what the template asks for (enable_thinking=false), and date=YYYY-MM-DD.
    Raises ValueError for an option that the template does not know, and for what is no date.
    """
    if not template:
        raise ValueError(f"the tokenizer of {path!r} has no chat template that could take options")
    if isinstance(template, dict):
        return {name: fix(one, options, path=path) for name, one in template.items()}
    lines = {}
    while line := FIXED.match(template):
        lines[line[1]], template = line[2], template[line.end() :]
    given = {name: value for item in options.split(",") if item for name, _, value in [item.partition("=")]}
    # transformers gives a template no other way to the clock.
    if "date" in given and "strftime_now" not in template:
        raise ValueError(f"template option date={given['date']}: the chat template of {path!r} writes no date")
    if "strftime_now" in template and not {"date"} & (given.keys() | lines.keys()):
        _say(f"{path}: the chat template writes the day's date, fixed here to {DATE}; --template_options date=...")
        given["date"] = DATE
    for name, value in given.items():
        if name == "date":
            lines[name] = _clock(value)
            continue
        if not name.isidentifier() or not re.search(rf"\b{name}\b", template):
            raise ValueError(f"the chat template of {path!r} knows no option {name!r}")
        value = value if value in ("true", "false", "none") or value.isdecimal() else json.dumps(value)
        lines[name] = f"{{% set {name} = {value} %}}"
    return "".join(f"{{# fixed {name} #}}{line}\n" for name, line in lines.items()) + template


def _clock(date: str) -> str:
    """A template's own strftime_now, in which it is always the same day."""
    try:
        day = datetime.datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError(f"template option date={date}: write it as in date={DATE}") from error
    named = "".join(f".replace({json.dumps(f'%{d}')}, {json.dumps(day.strftime(f'%{d}'))})" for d in DIRECTIVES)
    return f"{{% macro strftime_now(format) %}}{{{{ format{named} }}}}{{% endmacro %}}"


@functools.cache  # so that the log says it once
def _say(line: str) -> None:
    logging.getLogger(__name__).warning(line)
