"""Scorers by name: what `--scorer` of data_prep.py and eval.py means."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hps import limits, pretrained
from hps.data import tokenizers
from hps.data.rows import Row
from hps.evaluate.scoring import score
from hps.extra import reward_model
from hps.lab.world import World
from hps.prepare import rewards

Annotator = Callable[[Sequence[Row]], Iterator[tuple[str, rewards.Rewards]]]


def load(
    name: str, *, device: torch.device | None = None, counts: Counter[str] | None = None, **how: Any
) -> rewards.Scorer:
    """The function (prompt, responses) -> rewards called `name`.

    `world-true[:SEED]` is the self-made world's own reward, `world-est[:SEED]` the noisy, length-biased one that
    training sees; anything else is a reward model by its folder or hub name, which runs on `device`, the CPU by
    default; how: its options, as of `load_reward_model`. Its rewards may be None (`rewards.annotate_packed`), as
    `counts` says.
    """
    if world := world_of(name):
        reward = world.true_reward if name.startswith("world-true") else world.train_reward
        return lambda prompt, responses: [reward(list(prompt), y) for y in responses]
    annotate = load_reward_model(name, device=device, counts=counts, **how)

    def score(prompt: rewards.Prompt, responses: list[str]) -> rewards.Rewards:
        row = Row("", prompt if isinstance(prompt, str) else tuple(prompt), tuple(responses), where="a sample")
        [(_, found)] = annotate([row])
        return found

    return score


def load_reward_model(
    path: str,
    *,
    dtype: str = "fp32",
    objectives: str = "one",
    template_options: str = "",
    tokens_per_micro_batch: int = 4096,
    device: torch.device | None = None,
    counts: Counter[str] | None = None,
) -> Annotator:
    """The function rows -> (id, rewards) of a reward model; see `reward_model.load_reward_model` for what is refused.

    It goes to its device with the first rows, when eval.py has let go of another model. template_options: of its chat
    template. counts: what was cut and what could not be scored.
    """
    tokenizer = tokenizers.load_tokenizer(path, template_options)
    device, counts = device or torch.device("cpu"), Counter() if counts is None else counts
    how = dict(dtype=pretrained.compute_dtype(dtype), tokenizer=tokenizer, objectives=objectives)
    lm = reward_model.load_reward_model(path, **how)
    begins = None
    if objectives == "score":
        from hps.extra import armorm

        begins = tokenizer(armorm.ANSWER_BEGINS, add_special_tokens=False).input_ids

    @functools.cache
    def scoring() -> reward_model.RewardModel:
        found = reward_model.RewardModel(lm, objectives=objectives, answer_begins=begins).to(device)
        limits.check(found)
        return found

    packing = dict(device=device, budget=tokens_per_micro_batch, pad_id=tokenizer.pad_token_id or 0)
    return lambda rows: rewards.annotate_packed(
        rows,
        lambda blocks: score(scoring(), blocks, **packing),
        tokenizer,
        positions=int(min(limits.positions(lm.config), 2**31)),
        pad_id=reward_model.pad_token_id(lm),
        counts=counts,
    )


def world_of(name: str) -> World | None:
    """The world behind a scorer's name, which can also tell harm and junk; None for other scorers."""
    kind, _, seed = name.partition(":")
    if is_world(name) and not (seed or "0").isdecimal():
        raise ValueError(f"scorer {name!r}: the world's seed must be a number, as in {kind}:3")
    return World(int(seed or 0)) if is_world(name) else None


def is_world(name: str) -> bool:
    """Whether a scorer's name is a world's; ValueError where it looks like one and is neither that nor a folder."""
    of_world = name.partition(":")[0] in ("world-true", "world-est")
    if name.startswith("world-") and not of_world and not Path(name).exists():
        raise ValueError(f"scorer {name!r} does not exist: a world's are world-true[:SEED] and world-est[:SEED]")
    return of_world
