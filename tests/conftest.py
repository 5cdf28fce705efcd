"""Shared test set-up: one thread, repeatable draws, the root importable, the real data where it exists."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test reaches the network, or waits for one

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="tests/faults with all of their faults: make soak, hours")
    parser.addoption("--hh", default=os.environ.get("HH", ""), help="file of HH-RLHF rows; by default what HH names")


# Of twenty seconds and more each. Two processes take a file at a time: with these first they end together, and not one
# alone with the last file.
LONGEST = ("test_recipes.py", "test_hosts.py", "test_ranks.py", "test_kill.py", "test_train.py", "test_golden.py")
LONGEST += ("test_fuzz.py", "test_estimate.py", "test_dist.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def amount(request: pytest.FixtureRequest) -> Callable[[int, int], int]:
    """amount(small, full): how many faults a test injects, in `make test` and in `make soak`."""
    soak = request.config.getoption("--soak")
    return lambda small, full: full if soak else small


@pytest.fixture(scope="session")
def hh_rlhf_path(request: pytest.FixtureRequest) -> Path:
    """Rows of Anthropic's HH-RLHF harmless-base, which are not in the repository."""
    name = request.config.getoption("--hh")
    if not name:
        pytest.skip("needs HH-RLHF rows, which are not in the repository: --hh FILE, or HH=FILE make test")
    return Path(name)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-made world with an untrained model, and 24 train and 8 test prompts with ragged rewarded answers."""
    import random

    from hps.data import listwise
    from hps.data.rows import Row
    from hps.lab.world import World, write

    folder = tmp_path_factory.mktemp("world")
    write(folder, seed=0, domain="safe", train=24, valid=2, test=8, demonstrations=32)
    world, rng = World(0), random.Random(0)
    for name in ("train", "test"):
        rows = []
        for row in listwise.read(folder / f"{name}.jsonl"):
            prompt = list(row.prompt)
            qualities = rng.choices(["good", "mediocre", "bad"], k=rng.randint(4, 9))
            answers = tuple(world.demonstration(prompt, rng, quality=q) for q in qualities)
            rewards = tuple(world.train_reward(prompt, y) for y in answers)
            rows.append(Row(row.id, row.prompt, answers, rewards, None, None, row.source, ""))
        listwise.write(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium, for what a page does rather than says; the tests of a file share one."""
    from chromium import Browser

    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs a browser, which no Python package brings: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.quit()
