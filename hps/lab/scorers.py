"""Scorers by name: what `--scorer` of data_prep.py and eval.py means."""

from hps.data import rewards
from hps.lab.world import NOISE_STD, World


def load(name: str) -> rewards.Scorer:
    """The function (prompt, responses) -> rewards called `name`.

    `world-true[:SEED]` is the self-made world's own reward, `world-est[:SEED[:NOISE]]` the noisy, length-biased one
    that training sees (NOISE its standard deviation); anything else is the file of a linear reward model.
    """
    kind, *words = name.split(":")
    if kind not in ("world-true", "world-est"):
        linear = rewards.load_linear(name)
        return lambda prompt, responses: rewards.score_linear(linear, prompt, responses)
    seed, noise = (*words, "", "")[:2]
    if len(words) > (1 if kind == "world-true" else 2) or not (seed or "0").isdigit():
        raise ValueError(f"scorer {name!r}: the world's seed must be a number, as in {kind}:3")
    if noise and not noise.replace(".", "", 1).isdigit():
        raise ValueError(f"scorer {name!r}: the noise must be a number not below 0, as in world-est:3:0.4")
    world = World(int(seed or 0))
    if kind == "world-true":
        return lambda prompt, responses: [world.true_reward(list(prompt), y) for y in responses]
    level = float(noise) if noise else NOISE_STD
    return lambda prompt, responses: [world.train_reward(list(prompt), y, noise_std=level) for y in responses]


def world_of(name: str) -> World | None:
    """The world behind a scorer's name, which can also tell harm and junk; None for other scorers."""
    kind, *words = name.split(":")
    return World(int(words[0] or 0) if words else 0) if kind in ("world-true", "world-est") else None
