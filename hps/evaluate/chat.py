"""Talk to a policy in the terminal, beside its reference.

    python -m hps.evaluate.chat --model runs/hps/policy --reference M

/reset begins a new conversation; /quit, or the end of the input, ends the program.
"""

import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from hps import config, model
from hps.data import tokens
from hps.prepare import generate

NARROW = 80  # columns of a terminal; below, answers stand one under the other
GAP = " | "


@dataclass
class Options:
    # -- who answers --
    model: str  # the policy, whose answers enter the conversation: a local folder (weights or adapter) or a hub name
    reference: str = ""  # answers the same conversation beside it, usually the SFT model; empty for none
    # -- how --
    temperature: float = 0.9  # 0 takes the most likely token
    max_new_tokens: int = 256  # an answer is cut there
    seed: int = 0  # the same seed and the same words get the same answers
    dtype: str = "fp32"  # fp32 or bf16


class Speaker(NamedTuple):
    name: str
    lm: Any
    tokenizer: Any


History = tuple[dict[str, str], ...]


def main(argv: list[str] | None = None) -> None:
    page = f"{__doc__}\nThe policy's answers enter the conversation; the reference answers that one as well."
    c, _ = config.parse(Options, argv, prog="python -m hps.evaluate.chat", description=page.strip())
    config.check_choices(c, dtype=model.DTYPES)
    speakers = [load("policy", c.model, c.dtype)]
    if c.reference:
        speakers.append(load("reference", c.reference, c.dtype))
    chat(c, speakers)


def load(name: str, path: str, dtype: str) -> Speaker:
    """A model with its own tokenizer; ValueError for one that has no chat template."""
    tokenizer = tokens.load_tokenizer(path)
    try:
        tokens.encode_prompt(tokenizer, ({"role": "user", "content": "a"},))
    except ValueError as error:
        raise ValueError(f"{path} cannot be talked to: {error}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Speaker(name, model.load_causal_lm(path, dtype=model.DTYPES[dtype]).to(device), tokenizer)


def chat(c: Options, speakers: list[Speaker]) -> None:
    """Read a line, show what each speaker answers, and go on from what the first one said, until the input ends."""
    history: History = ()
    while True:
        try:
            said = input("you> ").strip()
        except EOFError:
            print()
            return
        if said == "/quit":
            return
        if said == "/reset":
            history = ()
        elif said.startswith("/"):
            print("there are /reset and /quit")
        elif said:
            asked = (*history, {"role": "user", "content": said})
            try:
                answers = [answer(speaker, asked, c) for speaker in speakers]
            except ValueError as error:
                print(f"error: {error}\nThat was not added to the conversation; /reset begins a new one.")
                continue
            history = (*asked, {"role": "assistant", "content": answers[0]})
            width = shutil.get_terminal_size().columns
            print(show(list(zip((speaker.name for speaker in speakers), answers, strict=True)), width))


def answer(speaker: Speaker, history: History, c: Options) -> str:
    """What a speaker says next; its random stream is that of the prompt id "turn N" (generate.answer)."""
    turn = f"turn {len(history) // 2 + 1}"
    [(_, [text])] = generate.answer(
        speaker.lm,
        speaker.tokenizer,
        [(turn, tokens.encode_prompt(speaker.tokenizer, history))],
        n=1,
        counts=Counter(),
        max_new_tokens=c.max_new_tokens,
        temperature=c.temperature,
        seed=c.seed,
        progress=False,
    )
    return text


def show(answers: list[tuple[str, str]], width: int) -> str:
    """Named answers as two columns, or one under the other where there is one or the terminal is narrow."""
    if len(answers) == 1 or width < NARROW:
        return "\n".join(line for name, text in answers for line in (f"{name}:", *wrapped(text, width), ""))
    each = (width - len(GAP)) // 2
    columns = [[f"{name}:", *wrapped(text, each)] for name, text in answers]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(f"{left:<{each}}{GAP}{right}".rstrip() for left, right in rows) + "\n"


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, none longer than `width`; what could steer a terminal becomes blanks."""
    plain = ("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())
    return [part for line in plain for part in textwrap.wrap(line, max(width, 1)) or [""]]


if __name__ == "__main__":
    config.run_main(main)
