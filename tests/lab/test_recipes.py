"""Recipes: commands that the scripts accept, that read what an earlier one makes, and keep apart what must be."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

import data_prep
import eval as evaluation
from hps import config, options
from hps.data import listwise
from hps.data.rows import Row
from hps.methods import check
from recipes import best

SMALL = {"SMALL": "1", "SEEDS": "2"}


def run(out, hh="", recipe="smollm2.sh", **more):
    """Run a recipe with a PYTHON that prints its words."""
    environment = {"PATH": os.environ["PATH"], "PYTHON": "echo", "OUT": str(out), "HH": str(hh), **more}
    return subprocess.run([ROOT / "recipes" / recipe], env=environment, capture_output=True, text=True, cwd=out.parent)


def printed(*args, **more):
    done = run(*args, **more)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def options_of(command):
    return dict(word[2:].split("=", 1) for word in command if word.startswith("--"))


def accept(commands):
    """Options exist, have the right type, and are used by the method that they are given to; the other commands."""
    others = []
    for script, *argv in commands:
        if script == "train.py":
            check(*options.read(argv))
        elif script == "eval.py":
            config.parse(evaluation.Config, argv, prog="", description="")
        elif script == "data_prep.py":
            config.parse(data_prep.COMMANDS[argv[0]][0], argv[1:], prog="", description="")
        else:
            others.append([script, *argv])
    return others


@pytest.fixture(params=[SMALL, {}], ids=["small", "full"])
def commands(request, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    return printed(tmp_path / "out", "rows.jsonl", **request.param)


def test_a_command_is_accepted_and_reads_what_an_earlier_one_wrote(commands, tmp_path):
    assert {words[1] for words in accept(commands)} == {"hps.evaluate.export", "hps.evaluate.compare"}
    made = {str(tmp_path / "rows.jsonl")}
    assert commands[-1][:2] == ["-m", "hps.evaluate.compare"]
    for command in commands[:-1]:
        found = options_of(command)
        for key in ("data", "input", "scorer", "reference", "baseline", "model"):
            path = found.get(key, "").removesuffix("/policy")
            assert path in made or not path.startswith(str(tmp_path)), command
        made.add(found.get("out") or found["output"])


def test_splits_and_reward_models_stay_apart(commands):
    """Model a scores what is trained on, b what is reported; neither has seen the pairs that both are tried on."""
    spans = sorted((int(o["skip"]), int(o["limit"])) for o in map(options_of, commands) if "skip" in o)
    assert len(spans) == 5 and all(a[0] + a[1] == b[0] for a, b in pairwise(spans))
    scored = {}
    for found in map(options_of, commands):
        if "scorer" in found:
            model = found["scorer"].split("/")[-2]
            scored.setdefault(model, []).append((found.get("output") or found["out"]).split("/out/")[1])
    assert scored.pop("reward-a") == ["heldout-a.jsonl", "train-scored.jsonl"]
    assert scored["reward-b"][:2] == ["heldout-b.jsonl", "test-scored.jsonl"] and len(scored) == 1
    assert all(name.endswith("/test") for name in scored["reward-b"][2:])
    trained_on = {options_of(c)["data"].split("/")[-1] for c in commands if "--loss=reward" in c}
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


def test_the_paper_on_several_gpus_and_its_smaller_form(tmp_path):
    """As it stands, nothing run: accepted, spread over the GPUs, each policy tested on what its table says."""
    for recipe, rows in (("paper.sh", 15), ("one_gpu.sh", 3)):
        commands = printed(tmp_path / recipe, recipe=recipe, HH="Anthropic/hh-rlhf")
        spread = [words for words in commands if "torch.distributed.run" in words]
        plain = [words[words.index("--") + 1 :] if words in spread else words for words in commands]
        asked = {words[1] for words in accept(plain)}
        assert asked == {"hps.lab.estimate", "hps.evaluate.compare"}
        assert bool(spread) == (recipe == "paper.sh") and all("--nproc_per_node=4" in words for words in spread)
        evaluated = [options_of(words) for words in plain if words[0] == "eval.py"]
        tables = [found["out"].split("/")[-4] for found in evaluated]
        assert tables.count("hh") == tables.count("pku") == rows + 1 and tables.count("hh-to-pku") == rows
        for found, table in zip(evaluated, tables, strict=True):
            target = table.split("-to-")[-1].replace("beta", "hh").replace("n", "hh")
            assert Path(found["data"]).name == f"{target}-test-scored.jsonl", found
        trained = [options_of(words) for words in plain if words[0] == "train.py"]
        tested_twice = tables.count("hh-to-pku") * 2 + tables.count("n-to-pku")
        assert len({found["out"] for found in trained}) == len(trained) == len(tables) - tested_twice - 2


def call(monkeypatch, *commands):
    """The main functions of scripts and modules, in this process."""
    for words in commands:
        name, *argv = words[1:] if words[0] == "-m" else words
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        importlib.import_module(name.removesuffix(".py").replace("/", ".")).main()


def test_every_line_of_the_paper_runs(tmp_path, monkeypatch):
    """With random models in each role; every table is there with every column of the paper's."""
    call(monkeypatch, *printed(tmp_path / "out", recipe="paper.sh", TINY="1"))
    out = tmp_path / "out-tiny"
    table = ["rm_dpo", "rm_rdpo_chars", "rm_rdpo_tokens", "bleu_char", "best_of_k_reward", "win", "kl_exact", "rm10"]
    for name, rows in {"hh": 16, "pku": 16, "hh-to-pku": 16, "pku-to-hh": 16, "n": 4, "n-to-pku": 4, "beta": 2}.items():
        found = json.loads((out / name / "results.json").read_text())["rows"]
        assert len(found) == rows, name
        for row in found:
            lacking = [key for key in table if key not in row["metrics"]]
            assert lacking == (["win"] if row["method"] == "SFT" else []), (name, row["method"])
    samples = listwise.read(out / "hh/DPO-HPS/run-0/test/samples.jsonl")
    assert len({reward for row in samples for reward in row.rewards}) > 4


def test_the_lists_recipe(tmp_path):
    """Settings are chosen on validation prompts by runs of another seed; what is reported chose nothing."""
    (tmp_path / "lists.jsonl").touch()
    commands = printed(tmp_path / "out", recipe="lists.sh", LISTS="lists.jsonl", SEEDS="2")
    asked = [words for words in commands if words[0] not in ("recipes/split_lists.py", "recipes/best.py")]
    assert accept(asked)[0][1] == "hps.evaluate.compare"
    trained = [options_of(words) for words in commands if words[0] == "train.py"]
    tuned, final = ([t for t in trained if ("/tune/" in t["out"]) is where] for where in (True, False))
    assert len(tuned) == 6 * 4 and {t["seed"] for t in tuned} == {"1000"}
    assert len(final) == 6 * 2 and {t["seed"] for t in final} == {"0", "1"}
    for found in (options_of(words) for words in commands if words[0] == "eval.py"):
        assert Path(found["data"]).stem == ("valid" if "/tune/" in found["out"] else "test")


def rated_lists(n=20):
    draw = np.random.default_rng(0)
    asked = [({"role": "user", "content": f"{i}?"},) for i in range(n)]
    return [Row(f"r{i}", prompt, tuple("abcde"), tuple(draw.random(5))) for i, prompt in enumerate(asked)]


def test_every_line_of_the_lists_recipe_runs(tmp_path, monkeypatch):
    """On a random model; the table has a row of each method, with the margins of its best answer and of a pair."""
    listwise.write(tmp_path / "lists.jsonl", rated_lists())
    call(monkeypatch, ("recipes/tiny_models.py", tmp_path))
    how = dict(LISTS="lists.jsonl", MODEL=str(tmp_path / "policy"), SMALL="1")
    call(monkeypatch, *printed(tmp_path / "out", recipe="lists.sh", **how))
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert len(rows) == 7
    for row in rows:
        assert {"rm_dpo", "rm_rdpo_tokens", "rm2", "rm10", "rm_worst_case", "kl_exact"} <= row["metrics"].keys()


def test_lists_are_split_by_prompts(tmp_path, monkeypatch):
    rows = rated_lists()
    flat = Row("flat", "p", ("a", "b"), (0.5, 0.5))
    listwise.write(tmp_path / "lists.jsonl", [*rows, flat])
    split = ("recipes/split_lists.py", tmp_path / "lists.jsonl", tmp_path)
    call(monkeypatch, (*split, 10, 4, 6, 4))
    found = {name: listwise.read(tmp_path / f"{name}.jsonl") for name in ("train", "valid", "test")}
    ids = [row.id for some in found.values() for row in some]
    assert sorted(ids) == sorted(row.id for row in rows) and ids != [row.id for row in rows]
    assert [len(some) for some in found.values()] == [10, 4, 6] and all(row.chosen is None for row in found["train"])
    held_out = found["valid"] + found["test"]
    for row in held_out:
        assert row.rewards == rows[int(row.id[1:])].rewards[:4]
        assert row.rewards[row.chosen] == max(row.rewards) > row.rewards[row.rejected]
    assert len({np.argsort(row.rewards)[::-1].tolist().index(row.rejected) for row in held_out}) > 1  # not the worst
    with pytest.raises(ValueError, match="20 prompts whose answers can be ranked, and 21 are asked for"):
        call(monkeypatch, (*split, 10, 5, 6))
    spreads = sorted(max(row.rewards) - min(row.rewards) for row in rows)
    call(monkeypatch, (*split, 2, 1, 1, 0, spreads[15]))
    with pytest.raises(ValueError, match="has 4 prompts"):
        call(monkeypatch, (*split, 2, 2, 1, 0, spreads[15]))


def test_the_best_setting_is_one_within_the_budget(tmp_path):
    for name, kl, margin in (("a", 3, 1.0), ("b", 9, 4.0), ("c", 30, 9.0)):
        (tmp_path / name / "valid").mkdir(parents=True)
        means = {"kl_exact": {"mean": kl}, "rm10": {"mean": margin}}
        (tmp_path / name / "valid/eval.json").write_text(json.dumps({"metrics": means}))
    folders = [str(tmp_path / name) for name in "abc"]
    chosen = {kl: Path(best.best("rm10", kl, folders)).name for kl in (1, 5, 10, 100)}
    assert chosen == {1: "a", 5: "a", 10: "b", 100: "c"}
