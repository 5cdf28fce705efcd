"""Texts and tables in GitHub Markdown, for every page that is written: what a text holds is shown and not read."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

# What would begin code, an HTML tag, an entity or a link's address, and what would escape the escape.
MARKUP = r"[\\`]|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=\()"


WIDEST_TABLE = 160  # characters of a line
# A word that would begin a list, a heading or a quotation if it stood first on a line.
BEGINS_A_BLOCK = r" (?=>|(?:[-+*]|#+|\d+[.)])(?: |$))"


def wrapped(text: str) -> str:
    """A paragraph, or an item of a list, of Markdown in lines of 120 characters; a longer word keeps one of its own."""
    text = re.sub(BEGINS_A_BLOCK, "\0", text)
    indent = "  " if text.startswith("* ") else ""
    lines = textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, keys: int = 1) -> str:
    """A table of cells that are Markdown already; see `cell` for texts.

    Where its lines would be too long it becomes several, one below the other, with the first `keys` columns in each.
    """
    columns = list(zip(header, *rows))
    blocks = [columns[:keys]]
    for column in columns[keys:]:
        if len(blocks[-1]) > keys and max(map(len, _lines([*blocks[-1], column]))) > WIDEST_TABLE:
            blocks.append(columns[:keys])
        blocks[-1].append(column)
    tables = ([first, f"|{' --- |' * len(block)}", *rest] for block in blocks for first, *rest in [_lines(block)])
    return "\n\n".join("\n".join(lines) for lines in tables)


def _lines(columns: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in zip(*columns)]


def interval(item: dict[str, Any] | None, digits: int, sign: str = "") -> str:
    """1.23 [1.10, 1.31] of {"mean", "low", "high"}, 1.23 without an interval or of one without a width, and - for no
    item; sign: "+" for that of a difference. What is told apart from 0 gets the digits that show it."""
    if item is None:
        return "-"
    ends = [item["mean"]] if item["low"] == item["high"] else [item[key] for key in ("mean", "low", "high")]
    while len(ends) > 1 and min(ends) * max(ends) > 0 and not round(item["mean"], digits):
        digits += 1
    mean, *ends = (f"{end:{sign}z.{digits}f}" for end in ends)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def plain(text: str, also: str = "") -> str:
    """A text on one line and shown as it is; also: a pattern of more to escape."""
    return re.sub(MARKUP + (f"|{also}" if also else ""), r"\\\g<0>", _line(text))


def cell(text: str) -> str:
    """A text for a cell of a table."""
    return plain(text, also=r"\|")


def code(text: str) -> str:
    """A text as code within a line; its fence is longer than any that it holds."""
    text = _line(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"


def _line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
