"""Recipes: commands that the scripts accept, that read what an earlier one makes, and keep apart what must be."""

import os
import shlex
import subprocess
from itertools import pairwise

import pytest
from helpers import ROOT

import data_prep
import eval as evaluation
from hps import config
from hps.options import Config, check

SMALL = {"SMALL": "1", "SEEDS": "2"}


def run(out, hh, **more):
    """Run the recipe with a PYTHON that prints its words."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": "echo", "OUT": str(out), "HH": str(hh), **more}
    return subprocess.run(
        [ROOT / "recipes/smollm2.sh"], env=environment, capture_output=True, text=True, cwd=out.parent
    )


@pytest.fixture(params=[SMALL, {}], ids=["small", "full"])
def commands(request, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    done = run(tmp_path / "out", "rows.jsonl", **request.param)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def options(command):
    return dict(word[2:].split("=", 1) for word in command if word.startswith("--"))


def test_every_command_is_accepted(commands):
    """Options exist, have the right type, and are used by the method that they are given to."""
    for script, *argv in commands:
        if script == "train.py":
            check(*config.parse(Config, argv, prog="", description=""))
        elif script == "eval.py":
            config.parse(evaluation.Config, argv, prog="", description="")
        elif script == "data_prep.py":
            config.parse(data_prep.COMMANDS[argv[0]][0], argv[1:], prog="", description="")
        else:
            assert argv[0] in ("hps.evaluate.export", "hps.evaluate.compare")


def test_a_command_reads_what_an_earlier_one_wrote(commands, tmp_path):
    made = {str(tmp_path / "rows.jsonl")}
    assert commands[-1][:2] == ["-m", "hps.evaluate.compare"]
    for command in commands[:-1]:
        found = options(command)
        for key in ("data", "input", "scorer", "reference", "baseline", "model"):
            path = found.get(key, "").removesuffix("/policy")
            assert path in made or not path.startswith(str(tmp_path)), command
        made.add(found.get("out") or found["output"])


def test_splits_and_reward_models_stay_apart(commands):
    """Model a scores what is trained on, b what is reported; neither has seen the pairs that both are tried on."""
    spans = sorted((int(o["skip"]), int(o["limit"])) for o in map(options, commands) if "skip" in o)
    assert len(spans) == 5 and all(a[0] + a[1] == b[0] for a, b in pairwise(spans))
    scored = {}
    for found in map(options, commands):
        if "scorer" in found:
            model = found["scorer"].split("/")[-2]
            scored.setdefault(model, []).append((found.get("output") or found["out"]).split("/out/")[1])
    assert scored.pop("reward-a") == ["heldout-a.jsonl", "train-scored.jsonl"]
    assert scored["reward-b"][:2] == ["heldout-b.jsonl", "test-scored.jsonl"] and len(scored) == 1
    assert all(name.endswith("/test") for name in scored["reward-b"][2:])
    trained_on = {options(c)["data"].split("/")[-1] for c in commands if "--loss=reward" in c}
    assert trained_on == {"reward-a.jsonl", "reward-b.jsonl"}


def test_a_folder_serves_one_choice_of_sizes(tmp_path):
    """The small form first and the full one into the same folder is refused; so is a file that is not there."""
    (tmp_path / "rows.jsonl").touch()
    assert run(tmp_path / "out", "rows.jsonl", **SMALL).returncode == 0
    (tmp_path / "out/train.jsonl").touch()  # a product
    again = run(tmp_path / "out", "rows.jsonl", **SMALL)
    assert again.returncode == 0 and "--skip=48" not in again.stdout and "--skip=59" in again.stdout
    full = run(tmp_path / "out", "rows.jsonl")
    assert full.returncode == 1 and "other data or sizes" in full.stderr and not full.stdout
    absent = run(tmp_path / "out", "absent.jsonl")
    assert absent.returncode == 1 and "absent.jsonl: no such file" in absent.stderr
