"""Scorers by name: what `--scorer` of data_prep.py and eval.py means."""

from hps.data import rewards
from hps.lab.world import World


def load(name: str) -> rewards.Scorer:
    """The function (prompt, responses) -> rewards called `name`.

    `world-true[:SEED]` is the self-made world's own reward, `world-est[:SEED]` the noisy, length-biased one that
    training sees; anything else is the file of a linear reward model.
    """
    kind, _, seed = name.partition(":")
    if kind not in ("world-true", "world-est"):
        linear = rewards.load_linear(name)
        return lambda prompt, responses: rewards.score_linear(linear, prompt, responses)
    if seed and not seed.isdigit():
        raise ValueError(f"scorer {name!r}: the world's seed must be a number, as in {kind}:3")
    world = World(int(seed or 0))
    reward = world.true_reward if kind == "world-true" else world.train_reward
    return lambda prompt, responses: [reward(list(prompt), y) for y in responses]


def world_of(name: str) -> World | None:
    """The world behind a scorer's name, which can also tell harm and junk; None for other scorers."""
    kind, _, seed = name.partition(":")
    return World(int(seed or 0)) if kind in ("world-true", "world-est") else None
