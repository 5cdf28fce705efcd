"""Bits flipped, ends cut, stretches zeroed at random places of everything that a later run relies on: it is named, or
it makes no difference; it is never used silently.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ALONE, arguments, flags
from safetensors.numpy import load_file

import data_prep
import train
from hps import checkpoint, config, reference
from hps.data import listwise, store, tokenizers
from hps.data.rows import check_manifest
from hps.io import files
from hps.options import Config
from hps.pretrained import load_causal_lm
from hps.record import check_folder


def harm(path: Path, rng: random.Random, share: float | None = None) -> str:
    """Change a file in one of three ways; which. share: flip a bit there, between its beginning (0) and its end (1)."""
    data = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "flip", "cut", "zero"]) if share is None else "flip"
    at = rng.randrange(len(data)) if share is None else int(share * len(data))
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del data[at:]
    else:
        end = min(len(data), at + rng.choice([1, 16, 4096]))
        data[at:end] = bytes(end - at)
    if bytes(data) == path.read_bytes():
        data[at] ^= 255
        how = "flip"
    path.write_bytes(data)
    return how


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory) -> dict[str, tuple[list[Path], Callable[[], object]]]:
    """name -> (files, what reads them and gives their content)."""
    root = tmp_path_factory.mktemp("whole")
    data, rows = root / "data.jsonl", tiny_world / "train.jsonl"
    argv = arguments(tiny_world, root / "run", token_cache=root / "tokens", reference_cache=root / "cache")
    train.main([*argv, "--stop_after=3"])
    data_prep.main(["annotate", *flags(scorer="world-est", input=rows, output=data)])
    saved = checkpoint.latest(root / "run/checkpoints")
    assert saved is not None
    policy = torch.nn.Module()  # as train.py's names its weights: lm.model...
    policy.lm = load_causal_lm(str(tiny_world / "model"), dtype=torch.float32)
    weights = list(policy.parameters())

    def load() -> object:
        optimizer = torch.optim.AdamW(weights)
        about = checkpoint.load(saved, policy, optimizer, ranks=ALONE)
        moments = [optimizer.state[p]["exp_avg_sq"].clone() for p in weights]
        return about, [p.detach().clone() for p in weights], moments

    tokenizer = tokenizers.load_tokenizer(str(tiny_world / "model"))

    def open_tokens() -> object:
        examples = store.open_store(root / "tokens", rows, tokenizer, max_length=128, need_rewards=True)
        every = range(len(examples))
        blocks = [examples.block(i, range(len(examples.identity[i]))) for i in every]
        texts = [(examples.id(i), examples.where(i)) for i in every]
        arrays = [*examples.rewards, *examples.identity, examples.keys.tolist(), examples.human.tolist()]
        return blocks, texts, arrays, examples.counts, examples.longest

    c = config.parse(Config, argv, prog="", description="")[0]
    run_json = root / "run/run.json"
    (cache,), (tokens_at,) = (root / "cache").iterdir(), (root / "tokens").iterdir()
    shards = sorted(cache.glob("shard-*"))
    keys = np.concatenate([load_file(path)["keys"] for path in shards]).view("S16")[:, 0]
    return {
        "checkpoint": (sorted(saved.iterdir()), load),
        "cache shards": (shards, lambda: reference.find(cache, keys)),
        "token store and its offsets": (sorted(tokens_at.iterdir()), open_tokens),
        "data": ([data], lambda: [dataclasses.replace(row, where="") for row in listwise.read(data)]),
        "manifest": ([Path(f"{data}.manifest.json")], lambda: check_manifest(data)),
        "run.json": ([run_json], lambda: (check_folder(root / "run", c, True), files.read_record(run_json, ""))[1]),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor | np.ndarray):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return same(list(vars(a).values()), list(vars(b).values())) if dataclasses.is_dataclass(a) else a == b


def test_harm_is_found_or_makes_no_difference(whole, amount):
    rng, outcomes = random.Random(0), Counter()
    content = {name: read() for name, (_, read) in whole.items()}
    for name, (_, read) in whole.items():
        assert same(read(), content[name]), f"{name} is not read twice alike"
    harms: list[tuple[str, Path, float | None]] = []
    for _ in range(amount(120, 1000)):
        name = rng.choice(list(whole))
        harms.append((name, rng.choice(whole[name][0]), None))
    # Chance leaves out some of the many files, and parts that are small: a checksum that lacks them must not pass.
    harms += [(name, path, at) for name, (paths, _) in whole.items() for path in paths for at in (1 / 8, 1 / 2, 7 / 8)]
    for name, path, share in harms:
        read, before = whole[name][1], path.read_bytes()
        how = harm(path, rng, share)
        try:
            found = read()
            assert same(found, content[name]), f"{path} with a {how} is used as if it were whole"
            outcomes[name, "no difference"] += 1
        except ValueError as error:
            assert str(path.parent) in str(error), f"{path}: not named: {error}"
            assert any(word in str(error) for word in ("delete", "restore", "make it again")), f"no advice: {error}"
            outcomes[name, "found"] += 1
        finally:
            path.write_bytes(before)
    print(f"\n{sum(outcomes.values())} harms: " + ", ".join(f"{' '.join(k)} {n}" for k, n in sorted(outcomes.items())))
    for name in whole:
        assert outcomes[name, "found"] > outcomes[name, "no difference"], name
