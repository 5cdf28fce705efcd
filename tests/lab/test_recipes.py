"""Recipes: commands that the scripts accept, that read what an earlier one makes, and keep apart what must be."""

import importlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from scipy import stats
from transformers import LlamaConfig

import data_prep
import eval as evaluation
from hps import config, options
from hps.data import listwise
from hps.data.rows import Row
from hps.lab import estimate as estimates
from hps.methods import check
from recipes import best, equal, estimate

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
            config.parse(data_prep.OPTIONS[argv[0]], argv[1:], prog="", description="")
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
        assert asked == {"hps.evaluate.compare"}
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
    """With random models in each role and one of the losses, whose names are words of the same lines; every table is
    there with every column of the paper's."""
    call(monkeypatch, *printed(tmp_path / "out", recipe="paper.sh", TINY="1", LOSSES="dpo"))
    out = tmp_path / "out-tiny"
    table = ["rm_dpo", "rm_rdpo_chars", "rm_rdpo_tokens", "bleu_char", "best_of_k_reward", "win", "kl_exact", "rm10"]
    for name, rows in {"hh": 4, "pku": 4, "hh-to-pku": 4, "pku-to-hh": 4, "n": 4, "n-to-pku": 4, "beta": 2}.items():
        found = json.loads((out / name / "results.json").read_text())["rows"]
        assert len(found) == rows, name
        for row in found:
            lacking = [key for key in table if key not in row["metrics"]]
            assert lacking == (["win"] if row["method"] == "SFT" else []), (name, row["method"])
    samples = listwise.read(out / "hh/DPO-HPS/run-0/test/samples.jsonl")
    assert len({reward for row in samples for reward in row.rewards}) > 4


STAGES = """#!/usr/bin/env bash
"$PYTHON" data_prep.py import --source=trl --input=pairs.jsonl --output="$OUT/rows.jsonl" --limit=10
"$PYTHON" data_prep.py generate --model="$M" --input="$OUT/rows.jsonl" --output="$OUT/drawn.jsonl" --n=3 --max_rows=6 \\
  --max_new_tokens=20 --max_prompt_length=50
"$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=2 -- data_prep.py annotate --scorer="$M" \\
  --input="$OUT/drawn.jsonl" --output="$OUT/scored.jsonl" --tokens_per_micro_batch=65
"$PYTHON" train.py --loss=sft --model="$M" --data="$OUT/rows.jsonl" --out="$OUT/sft" --epochs=3 \\
  --prompts_per_step=2 --tokens_per_micro_batch=160
"$PYTHON" train.py --method=exo-pl --pl_responses=0 --model="$OUT/sft/policy" --data="$OUT/scored.jsonl" \\
  --out="$OUT/pl" --prompts_per_step=2 --tokens_per_micro_batch=160
for again in 1 2; do
  "$PYTHON" eval.py --model="$OUT/pl/policy" --reference="$M" --data="$OUT/scored.jsonl" --out="$OUT/eval-$again" \\
    --samples=2 --max_rows=20 --max_new_tokens=20 --scorer="$M" --limit=4 --tokens_per_micro_batch=160
done
"$PYTHON" data_prep.py generate --model="$M" --input="$OUT/rows.jsonl" --output="$OUT/more.jsonl" --n=3 --engine=vllm \\
  --tensor_parallel=2
"""


def test_the_estimate_of_a_recipe_by_hand(tmp_path, monkeypatch):
    """A Llama of two layers, prompts of 30 tokens and responses of 10. 10 rows of pairs get 3 candidates each."""
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4)
    LlamaConfig(**sizes, num_key_value_heads=2).save_pretrained(tmp_path / "llama")
    monkeypatch.setenv("M", str(tmp_path / "llama"))
    (tmp_path / "recipe.sh").write_text(STAGES)
    (tmp_path / "recipe.sh").chmod(0o755)
    how = dict(prompt_tokens=30, response_tokens=10, gpu_gib=1.0, tflops=4e-6, mfu=0.5, gb_per_s=1e-3, mbu=0.25)
    c = estimate.Options(str(tmp_path / "recipe.sh"), **how)
    drawn, scored, sft, pl, evaluated, vllm = estimate.stages(c)

    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 112  # of two; head and embeddings of 96 * 64; norms; 4 bytes each
    weights, head, kv = 4 * (2 * layer + 2 * 96 * 64 + 5 * 64), 4 * 96 * 64, 4 * 2 * 2 * 2 * 16
    weights += 4 * 2 * 8  # frequencies of the positions

    def flops(responses, head=True):
        """Layers' products, attention, and the head on the responses' tokens."""
        seen = 30 * 31 // 2 + responses * (10 * 30 + 10 * 11 // 2)
        return 2 * (2 * layer * (30 + 10 * responses) + 2 * 2 * 64 * seen + 64 * 96 * 10 * responses * head)

    def hours(count, parts=1):
        return pytest.approx(count / 2e6 / parts / 3600)

    # 4 draws per prompt (3 * 1.1): 6 rows are of 2 prompts. Each of 400 tokens reads weights / 6, 30 and 5 tokens.
    assert drawn.bytes == weights + kv * (6 * 20 + 2 * 50) + 3 * 4 * 6 * 96 and drawn.tokens == 10 * 4 * 10
    assert drawn.hours == pytest.approx(400 * (weights / 6 + kv * 35) / 0.25e6 / 3600) and drawn.gpus == 1
    [fast, *_] = estimate.stages(replace(c, gb_per_s=1e6, gpu_gib=drawn.bytes / 2**30 / 1.1))
    assert fast.hours == hours(10 * flops(4)) and "--max_rows 3 fits" in fast.assumes
    # vLLM takes its share of each GPU and has all 40 rows at once: weights read per token are few, FLOPs decide.
    assert vllm.gpus == 2 and vllm.bytes == 0.9 * 2**30 and vllm.hours == hours(10 * flops(4), parts=2)
    # 5 responses, of which 65 tokens hold 3 or 2 with their prompt; each of two GPUs has all weights but the head.
    assert scored.hours == hours(10 * (flops(3, head=False) + flops(2, head=False)), parts=2)
    assert scored.tokens == 10 * 80 and scored.gpus == 2
    beside = estimate.forward(str(tmp_path / "llama"), "fp32", 32, 33, 1, True)[1]  # a full micro-batch
    assert scored.bytes == weights - head + beside and 4 * 65 * (64 + 2 * 112) < beside < 4 * 65 * (64 + 6 * 112)
    assert sft.tokens == 3 * 10 * 40 and sft.times == 1 and pl.tokens == 2 * 10 * 80
    work = dict(shape=str(tmp_path / "llama"), world_size=1, epochs=2, prompts=10, responses=5, method="dpo-pl")
    work |= dict(prompts_per_step=2, tokens_per_micro_batch=160)
    theirs = estimates.estimate(estimates.Options(**work, **{k: v for k, v in how.items() if "b" not in k[:2]}))
    assert pl.hours == pytest.approx(theirs["work"]["hours"]) and pl.bytes == theirs["bytes_per_rank"]["total"]
    # Twice 4 prompts: all 5 by the policy, once by the reference; KL by both; 8 samples at once;
    # these by the reference; and their rewards.
    read = 4 * 2 * 10 * (weights / 8 + kv * 35) / 0.25e6 / 3600
    compute = 2 * (flops(5) + 2 * flops(1) + flops(2) + flops(2, head=False)) + flops(5)
    assert evaluated.times == 2 and evaluated.tokens == 2 * 4 * (30 + 5 * 10 + 2 * 10)
    assert evaluated.hours == pytest.approx(4 * compute / 2e6 / 3600 + 2 * read)
    sampled = kv * (20 * 20 + 10 * 50) + 3 * 4 * 20 * 96
    assert evaluated.bytes == 2 * weights + sampled
    page = estimate.table(replace(c, gpu_gib=1e-9), [drawn, scored, sft, pl, evaluated])
    assert page.count("too much") == 5 and "0.5 of 4e-06 TFLOP/s" in page.replace("\n", " ")


def test_the_papers_plan_names_its_stages(tmp_path):
    """Every command of the recipe that runs a model; PLAN=1 asks for it and for nothing else."""
    assert printed(tmp_path / "out", recipe="paper.sh", PLAN="1") == [
        ["-m", "recipes.estimate", "--recipe=recipes/paper.sh"]
    ]


def test_the_lists_recipe(tmp_path):
    """Settings are chosen on validation prompts by runs of another seed; what is reported chose nothing."""
    (tmp_path / "lists.jsonl").touch()
    commands = printed(tmp_path / "out", recipe="lists.sh", LISTS="lists.jsonl", SEEDS="2")
    asked = [words for words in commands if not words[0].startswith("recipes/")]
    assert accept(asked)[0][1] == "hps.evaluate.compare"
    trained = [options_of(words) for words in commands if words[0] == "train.py"]
    tuned, final = ([t for t in trained if ("/tune/" in t["out"]) is where] for where in (True, False))
    assert len(tuned) == 6 * 2 and {t["seed"] for t in tuned} == {"1000"}
    assert len(final) == 6 * 2 and {t["seed"] for t in final} == {"0", "1"}
    for found in (options_of(words) for words in commands if words[0] == "eval.py"):
        split = Path(found["out"]).name  # the choice reads `valid` alone
        assert Path(found["data"]).stem == split and (split == "test" or "/tune/" in found["out"])


def rated_lists(n=20):
    draw = np.random.default_rng(0)
    asked = [({"role": "user", "content": f"{i}?"},) for i in range(n)]
    return [
        Row(f"r{i}", prompt, ("a", "b c", "c", "d e f", "e f g h"), tuple(draw.random(5)))
        for i, prompt in enumerate(asked)
    ]


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
    levels, rows = json.loads((tmp_path / "out/equal.json").read_text()), {x["method"]: x["metrics"] for x in rows}
    least = min(rows.keys() - {"reference"}, key=lambda name: rows[name]["kl_exact"]["mean"])
    assert levels["kl"] == rows[least]["kl_exact"]["mean"]
    gained = levels["less"]["reference"][least]
    assert gained["rm10_at_equal_kl"]["mean"] == pytest.approx(rows[least]["rm10"]["mean"], abs=1e-6)
    assert gained["rm_dpo_over_seeds"]["mean"] == pytest.approx(rows[least]["rm_dpo"]["mean"], abs=1e-6)


def test_margins_at_equal_length():
    """A margin of 2 and 0.03 per token by which the better answer is longer, against one of 0.5 and 0.01."""
    longer = dict(a=10, b=-4, c=25, d=0)

    def row(margin, per_token):
        return {id: margin + per_token * tokens for id, tokens in longer.items()}

    one, other = {"rm_dpo": row(2, 0.03), "rm_rdpo_tokens": row(2, 0.02)}, {"rm_dpo": row(0.5, 0.01)}
    found = equal.at_equal_length(one, other)
    assert found == pytest.approx({"mean": 1.5, "low": 1.5, "high": 1.5})
    noise = dict(a=0.3, b=-0.2, c=0.1, d=-0.4)
    one["rm_dpo"] = {id: x + noise[id] for id, x in one["rm_dpo"].items()}
    one["rm_rdpo_tokens"] = {id: x + noise[id] for id, x in one["rm_rdpo_tokens"].items()}
    line = stats.linregress(list(longer.values()), [one["rm_dpo"][id] - other["rm_dpo"][id] for id in longer])
    half = stats.t.ppf(0.975, 2) * line.intercept_stderr
    found = equal.at_equal_length(one, other)
    assert found == pytest.approx({"mean": line.intercept, "low": line.intercept - half, "high": line.intercept + half})
    with pytest.raises(ValueError, match="take a larger TEST"):
        equal.at_equal_length(one | {"rm_rdpo_tokens": one["rm_dpo"]}, other)


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
