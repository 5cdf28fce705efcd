"""Talk to a policy in the terminal, beside its reference.

    python -m hps.evaluate.chat --model runs/hps/policy --reference M

/reset begins a new conversation; /quit, or the end of the input, ends the program. The policy's answers enter the
conversation; the reference answers that one as well.
"""

import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from hps import config, model, pretrained
from hps.data import tokenizers, tokens
from hps.data.rows import Prompt
from hps.prepare import generate


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
    template_options: str = ""  # NAME=VALUE,... of the chat template: enable_thinking=false, date=2026-01-31


def main(argv: list[str] | None = None) -> None:
    c, _ = config.parse(Options, argv, prog="python -m hps.evaluate.chat", description=str(__doc__).strip())
    config.check_choices(c, dtype=model.DTYPES)
    names = {"policy": c.model} | ({"reference": c.reference} if c.reference else {})
    speakers = {name: load(path, c.dtype, c.template_options) for name, path in names.items()}
    how: dict[str, Any] = dict(n=1, max_new_tokens=c.max_new_tokens, temperature=c.temperature, progress=False)
    history: Prompt = ()
    while True:
        try:
            line = input("you> ").strip()
        except EOFError:
            print()
            return
        if line == "/quit":
            return
        if line == "/reset":
            history = ()
        elif line.startswith("/"):
            print("there are /reset and /quit")
        elif line:
            asked = (*history, *said(line))
            turn = f"turn {len(asked) // 2 + 1}"  # which gives the random stream of its answers
            try:
                found = {}
                for name, (lm, tokenizer) in speakers.items():
                    prompts = [(turn, tokens.Encoder(tokenizer).prompt(asked))]
                    [(_, [found[name]], _)] = generate.answer(
                        lm, tokenizer, prompts, seed=c.seed, counts=Counter(), **how
                    )
            except ValueError as error:
                print(f"error: {error}\nThat was not added to the conversation; /reset begins a new one.")
                continue
            history = (*asked, {"role": "assistant", "content": found["policy"]})
            for name, text in found.items():
                print(f"{name}:", *wrapped(text, shutil.get_terminal_size().columns), "", sep="\n")


def load(path: str, dtype: str, options: str = "") -> tuple[Any, Any]:
    """A model and its tokenizer; ValueError for one that has no chat template."""
    tokenizer = tokenizers.load_tokenizer(path, options)
    try:
        tokens.Encoder(tokenizer).prompt(said("a"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be talked to: {error}; take a model that was trained to chat") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = pretrained.load_causal_lm(path, dtype=pretrained.compute_dtype(dtype), tokenizer=tokenizer)
    return lm.to(device), tokenizer


def said(text: str) -> tuple[dict[str, str]]:
    """One turn of the user's."""
    return ({"role": "user", "content": text},)


def wrapped(text: str, width: int) -> list[str]:
    """The lines of a text, none longer than `width`; what could steer a terminal becomes blanks."""
    plain = ("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())
    return [part for line in plain for part in textwrap.wrap(line, max(width, 1)) or [""]]


if __name__ == "__main__":
    config.run_main(main)
