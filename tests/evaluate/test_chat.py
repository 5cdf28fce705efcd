"""The chat, fed by a standard input that stands in for a person."""

import io
import re
import shutil
from collections import Counter

import pytest
import torch
from helpers import encode_prompt, flags, save

from hps.data import tokenizers
from hps.evaluate import chat
from hps.prepare import generate
from hps.pretrained import load_causal_lm


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs the program on lines of input and returns what it prints."""

    def run(lines: list[str], **options) -> str:
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        chat.main(flags(**options))
        return capsys.readouterr().out

    return run


def expected(path, history: list[tuple[str, str]], turn: int, seed: int = 0, temperature: float = 0.9) -> str:
    """generate's own sample of a conversation given as (role, text), 12 tokens at most."""
    lm, tokenizer = load_causal_lm(str(path), dtype=torch.float32), tokenizers.load_tokenizer(str(path))
    ids = encode_prompt(tokenizer, tuple({"role": role, "content": text} for role, text in history))
    how = dict(n=1, counts=Counter(), eos_token_id=tokenizer.eos_token_id, max_new_tokens=12, seed=~seed)
    how |= dict(temperature=temperature, as_drawn=True, progress=False)
    [(_, [sample])] = generate.generate(lm, [(f"turn {turn}", ids)], **how)
    return tokenizer.decode(sample.token_ids, skip_special_tokens=True).strip()


def said_by(printed: str, name: str) -> list[str]:
    """The answers of one of them, in the order of the turns."""
    return [" ".join(text.split()) for text in re.findall(rf"{name}:\n(.*?)\n\n", printed, re.DOTALL)]


def test_both_answer_one_conversation_which_the_policy_continues(talk, tiny_world, tmp_path):
    """Two turns, a new beginning, and the first turn again: every answer is generate's own."""
    model, other = tiny_world / "model", save(tmp_path / "other", positions=99)
    out = talk(["one two", "three", "/reset", "one two"], model=model, reference=other, max_new_tokens=12, seed=3)
    first = [("user", "one two")]
    policy = expected(model, first, 1, seed=3)
    assert policy != expected(model, first, 1, seed=4) and policy != expected(other, first, 1, seed=3)
    second = [*first, ("assistant", policy), ("user", "three")]
    turns = [tuple(expected(path, said, turn, seed=3) for path in (model, other))
             for turn, said in ((1, first), (2, second), (1, first))]  # fmt: skip
    for name, answers in zip(("policy", "reference"), zip(*turns)):
        assert said_by(out, name) == [" ".join(text.split()) for text in answers]


def test_greedy_without_a_reference_until_quit(talk, tiny_world):
    model = tiny_world / "model"
    out = talk(["hello", "/quit", "never"], model=model, temperature=0, max_new_tokens=12)
    assert said_by(out, "policy") == [" ".join(expected(model, [("user", "hello")], 1, temperature=0).split())]
    assert "reference:" not in out


def test_a_turn_that_does_not_fit_is_told_and_forgotten(talk, tiny_world):
    """More words than the model has positions: an error, and the conversation goes on as if nothing was said."""
    options = dict(model=tiny_world / "model", max_new_tokens=12)
    out = talk(["yes " * 5000, "/what", "hello"], **options)
    assert "error: prompt 'turn 1' has" in out and "not added" in out and "/reset and /quit" in out
    assert out.split("policy:")[1] == talk(["hello"], **options).split("policy:")[1]


def test_no_chat_template_is_an_error_before_the_first_question(talk, tiny_world, tmp_path):
    shutil.copytree(tiny_world / "model", tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="model cannot be talked to: .*no chat template"):
        talk(["hello"], model=tmp_path / "model")


def test_lines_fit_the_terminal_and_cannot_steer_it():
    assert max(map(len, chat.wrapped("word " * 30, 40))) <= 40
    assert chat.wrapped("a\x1b[2Jb\n\nc\td", 40) == ["a [2Jb", "", "c d"]
