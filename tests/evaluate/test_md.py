"""Texts in Markdown: shown as they are, on one line, in one cell. What a browser makes of them: test_security.py."""

import pytest

from hps.evaluate import md


def test_a_table():
    assert md.table(["a", "b"], [["1", md.cell("x|y")]]) == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"


@pytest.mark.parametrize(
    ("text", "plain", "code"),
    [
        ("a < b & c_d", "a < b & c_d", "`a < b & c_d`"),
        ("two\n\n  lines\t", "two lines", "`two lines`"),
        ("<b> &lt; [x](y)", r"\<b> \&lt; [x\](y)", "`<b> &lt; [x](y)`"),
        ("a `b`` \\", "a \\`b\\`\\` \\\\", "``` a `b`` \\ ```"),
    ],
)
def test_texts(text, plain, code):
    assert md.plain(text) == plain and md.code(text) == code
