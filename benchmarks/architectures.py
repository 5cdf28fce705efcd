"""Architectures x entrances: which models train, score and sample here, each cell run and compared with transformers.

    python benchmarks/architectures.py                            all of them; writes docs/results/architectures.md
    python benchmarks/architectures.py --only gemma2 mamba --out /tmp/some.md

Every architecture of architectures.toml is made tiny and random, and goes through every entrance: training with LoRA
and of all weights, a reward model, a reference of its own, eval, annotate, generate, chat, export, samples during
training. Every log-prob and reward that an entrance computes is computed again by transformers, one response at a time
with eager attention. Status 1 if one is further off than 1e-3 (nats, reward units), or anything ends in a traceback.
"""

import builtins
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import harness  # the scripts are found behind this  # isort: split
import numpy as np
import torch
import transformers as T
from torch import nn
from tqdm import tqdm

import data_prep
import eval as evaluation
import train
from hps import adapters, attention, config, limits, model, pretrained
from hps.data import listwise
from hps.evaluate import chat, export, md
from hps.extra.reward_model import RewardModel
from hps.lab import world
from hps.packing import Packed
from hps.prepare import decode

TOLERANCE = 1e-3  # nats, or reward units
V = len(world.World(0).words) + 6  # the world's tokens
ATTENTION = {"q_proj", "v_proj", "o_proj", "query_key_value", "c_attn", "Wqkv", "query", "x_proj"}  # may get an adapter
TABLE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@dataclass
class Options:
    only: tuple[str, ...] = ()  # names of the table, or what they begin with; empty: all
    out: str = "docs/results/architectures.md"  # the page


class Watch(logging.Handler):
    """What the code says of slower ways, and how far its numbers are from transformers' own."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.padded, self.worst, self.compared, self.checking = False, 0.0, 0, False

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        self.padded |= "cannot take packed rows" in said or "is sampled by transformers' generate" in said

    def compare(self, ours: Any, own: Any) -> None:
        apart = float((torch.as_tensor(ours).double() - torch.as_tensor(own).double()).abs().max())
        self.worst, self.compared = max(self.worst, apart if apart == apart else torch.inf), self.compared + 1

    def aside(self, function: Callable) -> Callable:
        """What is tried on a few tokens is no result."""

        def run(*args: Any, **how: Any) -> Any:
            with mock.patch.object(self, "checking", True):
                return function(*args, **how)

        return run

    def scored(self, forward: Callable) -> Callable:
        def run(this: Any, packed: Packed) -> torch.Tensor:
            found = forward(this, packed)
            if not self.checking:
                with mock.patch.object(self, "checking", True), eager(this.lm) as lm:
                    own = [of_sequence(lm, ids, P) for ids, P in sequences(packed)]
                self.compare(found.detach()[packed.valid], torch.stack(own))
            return found

        return run

    def sampled(self, decoded: Callable) -> Callable:
        def run(lm: Any, requests: Any, **how: Any) -> Iterator[Any]:
            for request in decoded(lm, requests, **how):
                P = len(request.prompt_ids)
                rows = [torch.tensor([*request.prompt_ids, *one.token_ids.tolist()]) for one in request.samples]
                with eager(lm) as one:
                    own = [of_sequence(one, row, P) for row in rows]
                self.compare([sample.logp for sample in request.samples], torch.stack(own))
                yield request

        return run


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """All that scores or samples inside is compared with transformers."""
    watch, patch = Watch(), mock.patch.object
    with (
        patch(model.PolicyModel, "forward", watch.scored(model.PolicyModel.forward)),
        patch(RewardModel, "forward", watch.scored(RewardModel.forward)),
        patch(limits, "check", watch.aside(limits.check)),
        patch(decode, "_way", watch.aside(decode._way)),
        mock.patch("hps.prepare.generate.decode", watch.sampled(decode.decode)),
        patch(logging.getLogger("hps"), "handlers", [watch]),
    ):
        yield watch


@contextlib.contextmanager
def eager(lm: Any) -> Iterator[Any]:
    """The transformers model inside, with its eager attention."""
    with torch.no_grad(), attention.instead(model.unwrapped(lm), "eager"):
        yield model.unwrapped(lm)


def of_sequence(lm: Any, ids: torch.Tensor, P: int) -> torch.Tensor:
    """Log-prob of the tokens behind the first P, or the reward of all, by transformers."""
    logits = lm(input_ids=ids[None], use_cache=False).logits[0].double()
    if hasattr(lm, "score"):
        return logits.mean()
    return logits.log_softmax(-1)[P - 1 : -1].gather(1, ids[P:, None]).sum()


def sequences(packed: Packed) -> Iterator[tuple[torch.Tensor, int]]:
    """Each response behind its prompt, token ids, and how many of them are the prompt's."""
    for b, k in packed.valid.nonzero().tolist():
        prompt = (packed.block == b) & (packed.segment == 0)
        own = (packed.block == b) & (packed.segment == k + 1)
        if packed.causal:
            prompt &= own.any(1, keepdim=True)
        yield packed.input_ids[prompt | own], int(prompt.sum())


# ---- what goes in --------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Prompts and responses of random words, longer than the windows above."""
    draw, words, rows = np.random.default_rng(0), world.World(0).words, []
    for i in range(4):
        said, *responses = (" ".join(draw.choice(words, n).tolist()) for n in (20 + i, 9, 3, 6))
        row = {"id": f"r{i}", "prompt": [{"role": "user", "content": said}], "responses": responses}
        rows.append(row | {"rewards": [1.0, 0.5, 0.0], "chosen": 0, "rejected": 2})
    listwise.write_lines(folder / "data.jsonl", rows)


def configuration(name: str) -> Any:
    """An architecture of the table as transformers has it."""
    kind, groups, *own = TABLE["architectures"][name]
    sizes: dict[str, Any] = dict(vocab_size=V, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for some in (*(TABLE["sizes"][group] for group in groups.split()), *own):
        sizes |= {key: None if value == "none" else value for key, value in some.items()}
    if kind == "Gemma3":  # of images, too
        sizes = dict(text_config=sizes, vision_config=TABLE["vision"], mm_tokens_per_image=4)
        sizes |= dict(image_token_index=V - 1, boi_token_index=V - 2, eoi_token_index=V - 3)
    return getattr(T, f"{kind}Config")(**sizes)


def make_models(folder: Path, name: str) -> list[str]:
    """A policy, another one as its reference, and a reward model; the linear layers that may get an adapter."""
    tokenizer = world.build_tokenizer(world.World(0))
    targets: list[str] = []
    for what, seed in (("policy", 0), ("other", 1), ("rewards", 2)):
        torch.manual_seed(seed)
        about = configuration(name)
        if what == "rewards":
            about.get_text_config().num_labels = about.num_labels = 1
        cls = T.AutoModelForSequenceClassification if what == "rewards" else T.AutoModelForCausalLM
        try:
            lm = cls.from_config(about)
        except ValueError:  # no classifier of this architecture: training one says so
            lm = T.AutoModelForCausalLM.from_config(about)
        for p in lm.parameters():  # far from uniform predictions, so that a wrong mask shows
            p.data.add_(0.1 * torch.randn_like(p))
        lm.save_pretrained(folder / what)
        tokenizer.save_pretrained(folder / what)
        linear = [n for n, m in lm.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
        text = [n for n in linear if "vision" not in n and "projector" not in n]
        targets = targets or sorted({n.rsplit(".", 1)[-1] for n in text} - adapters.OUTPUT_HEADS - {"embed_out"})
    return sorted(ATTENTION & set(targets)) or targets[:1]


def entrances(folder: Path, targets: list[str]) -> dict[str, Callable[[], Any]]:
    """Name -> the command that a user gives there, in this process."""
    data, policy, other = (str(folder / name) for name in ("data.jsonl", "policy", "other"))

    def trained(name: str, **more: Any) -> Callable[[], Any]:
        options = dict(model=policy, data=data, out=folder / name, method="dpo-hps", lora_rank=0, epochs=1, lr=1e-3)
        options |= dict(prompts_per_step=2, max_length=128, token_cache=folder / "tokens")
        options |= dict(reference_cache=folder / f"cache-{name}") | more
        return lambda: train.main(harness.flags(**{key: value for key, value in options.items() if value is not None}))

    def prepared(command: str, **options: Any) -> Callable[[], Any]:
        options |= dict(input=data, output=folder / f"{command}.jsonl")
        return lambda: data_prep.main([command, *harness.flags(**options)])

    def talk() -> None:
        said = " ".join(world.World(0).words[:20])
        with mock.patch.object(builtins, "input", mock.Mock(side_effect=[said, "/quit"])):
            with contextlib.redirect_stdout(io.StringIO()) as answered:
                chat.main([f"--model={policy}", "--max_new_tokens=8"])
        if "error: " in (text := answered.getvalue()):
            raise ValueError(text.split("error: ")[1].split("\n")[0])

    def given_away() -> list[torch.Tensor]:
        export.main([f"--model={folder / 'LoRA' / 'policy'}", f"--out={folder / 'export'}"])
        merged = T.AutoModelForCausalLM.from_pretrained(folder / "export")
        beside, found = pretrained.load_causal_lm(str(folder / "LoRA" / "policy"), dtype=torch.float32), []
        for lm in (merged, beside):
            with eager(lm) as one:
                found.append(of_sequence(one, torch.arange(3, 27), 12))
        return found

    of_evaluation = dict(model=policy, reference=other, data=data, out=folder / "eval", samples=0, max_length=128)
    of_evaluation |= dict(reference_cache=folder / "cache-eval")
    sft = dict(loss="sft", method=None, reference_cache=None)
    return {
        "LoRA": trained("LoRA", lora_rank=2, lora_targets=",".join(targets)),
        "full": trained("full"),
        "reward": trained("reward", **sft | dict(loss="reward")),
        "reference": trained("reference", reference=other),
        "eval": lambda: evaluation.main(harness.flags(**of_evaluation)),
        "annotate": prepared("annotate", scorer=folder / "rewards"),
        "generate": prepared("generate", model=policy, n=2, max_new_tokens=8, limit=2),
        "chat": talk,
        "export": given_away,
        "samples": trained("samples", **sft, sample_every=1, sample_prompts=2),
    }


# ---- the table -----------------------------------------------------------------------------------


def cell(run: Callable[[], Any]) -> dict[str, Any]:
    """How an entrance ended: a word or a line, whether that is a fault, and the largest difference."""
    quiet = io.StringIO()
    with watching() as watch, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        try:
            if found := run():  # two numbers that should be one
                watch.compare(*found)
            word, fault = "padded" if watch.padded else "packed", watch.worst > TOLERANCE or not watch.compared
        except ValueError as error:
            word, fault = " ".join(str(error).split()), False
        except Exception as error:  # a traceback is what this table is to find
            word, fault = f"TRACEBACK {type(error).__name__}: {' '.join(str(error).split())[:300]}", True
    return {"word": word, "fault": fault, "apart": watch.worst, "compared": watch.compared}


def page(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table in Markdown, the refusals below it."""
    refusals: dict[str, int] = {}

    def shown(one: dict[str, Any]) -> str:
        word = one["word"]
        if word not in ("packed", "padded"):
            word = f"[{refusals.setdefault(word, len(refusals) + 1)}]"
        return word + (" **wrong**" if one["fault"] else "")

    names, rows = list(next(iter(found.values()))), []
    for name, cells in found.items():
        apart = max(one["apart"] for one in cells.values())
        rows.append([name, *(shown(cells[entrance]) for entrance in names), f"{apart:.0e}"])
    about = (
        f"Written by `python benchmarks/architectures.py`: tiny random models of transformers {T.__version__}, each "
        "through every entrance. *packed*: a prompt's responses in one row, or our own decoding; *padded*: the model's "
        "own forward of one response per row, or transformers' `generate`, slower; a number: it is refused, with the "
        "line below. The last column is the largest difference of a log-prob (nats) or a reward from transformers' "
        "eager attention (its own, where it takes no other), one response at a time, in fp32. Rows are longer than the "
        "windows."
    )
    header = ["architecture", *names, "largest difference"]
    parts = ["# Architectures x entrances", md.wrapped(about), md.table(header, rows)]
    if refusals:
        told = [textwrap.fill(f"{n}. `{text}`", 150, subsequent_indent="   ") for text, n in refusals.items()]
        parts += ["## Refused", "\n".join(told)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/architectures.py", description=str(__doc__).split("\n")[0])
    only = tuple(name.lower() for name in c.only) or ""
    names = [name for name in TABLE["architectures"] if name.lower().startswith(only)]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    T.logging.set_verbosity_error()
    T.utils.logging.disable_progress_bar()
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name in tqdm(names):
        with tempfile.TemporaryDirectory() as folder:
            make_data(Path(folder))
            works = entrances(Path(folder), make_models(Path(folder), name))
            found[name] = {entrance: cell(run) for entrance, run in works.items()}
        for one in found[name].values():
            one["word"] = one["word"].replace(folder, "M")
        Path(c.out).write_text(page(found), encoding="utf-8")  # a row each quarter of a minute
    print(json.dumps(found))
    sys.exit(int(any(one["fault"] for cells in found.values() for one in cells.values())))


if __name__ == "__main__":
    config.run_main(main)
