"""eval.py and data_prep.py as a user calls them: what they write against what they must mean."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, encode_prompt, encode_response, flags, run, torchrun

import data_prep
import eval as evaluation
from hps import config, dist
from hps.data import listwise
from hps.data.rows import Row
from hps.data.tokenizers import load_tokenizer
from hps.evaluate import per_prompt
from hps.io import files
from hps.lab.world import World
from hps.pretrained import load_causal_lm


@pytest.fixture(scope="module")
def policy(tiny_world, tmp_path_factory) -> Path:
    """A policy that has moved from its reference."""
    out = tmp_path_factory.mktemp("policy")
    run(tiny_world, out, method="dpo-bt")
    return out / "policy"


def options_of(world: Path, model: Path, out: Path, **changes) -> dict:
    options = dict(model=model, reference=world / "model", data=world / "test.jsonl", out=out, max_length=128)
    return options | dict(samples=3, max_new_tokens=12, scorer="world-true", reference_cache=world / "cache") | changes


def evaluate(world: Path, model: Path, out: Path, **changes) -> dict:
    evaluation.main(flags(**options_of(world, model, out, **changes)))
    return json.loads((out / "per_prompt.json").read_text())


def test_the_reference_against_itself_is_zero(tiny_world, tmp_path):
    """The SFT row: no margin, no KL; against its own samples nothing but ties."""
    found = evaluate(tiny_world, tiny_world / "model", tmp_path / "a")
    for name in ("rm2", "rm10", "rm_min", "rm_worst_case", "kl_seq", "kl_exact", "kl_samples"):
        np.testing.assert_allclose(list(found[name].values()), 0, atol=2e-4)
    again = evaluate(tiny_world, tiny_world / "model", tmp_path / "b", baseline=tmp_path / "a")
    assert set(again["tie"].values()) == {100.0}
    assert set(again["win"].values()) == set(again["lose"].values()) == {0.0}
    for changes in (dict(baseline=tmp_path / "a"), dict(data=tmp_path / "a/samples.jsonl")):
        with pytest.raises(ValueError, match="would overwrite --data or --baseline"):
            evaluate(tiny_world, tiny_world / "model", tmp_path / "a", **changes)
    with pytest.raises(ValueError, match="holds an evaluation with other settings .samples: 3 -> 2.: choose another"):
        evaluate(tiny_world, tiny_world / "model", tmp_path / "a", samples=2)


def test_margins_and_kl_against_separate_forwards(tiny_world, tmp_path, policy):
    """Log-ratios of each candidate alone through the whole models, ranked by hand; KL over the whole vocabulary."""
    found = evaluate(tiny_world, policy, tmp_path)
    tokenizer = load_tokenizer(str(tiny_world / "model"))
    models = [load_causal_lm(str(path), dtype=torch.float32) for path in (policy, tiny_world / "model")]
    for row in listwise.read(tiny_world / "test.jsonl"):
        prompt = encode_prompt(tokenizer, row.prompt)
        h, kls = [], []
        for text in row.responses:
            ids = torch.tensor([prompt + encode_response(tokenizer, text)])
            with torch.no_grad():
                p, q = (torch.log_softmax(lm(input_ids=ids).logits[0, :-1].double(), -1) for lm in models)
            scored = slice(len(prompt) - 1, None)
            taken = ids[0, 1:, None]
            h.append(float((p - q).gather(-1, taken)[scored].sum()))
            kls.append(float((p.exp() * (p - q)).sum(-1)[scored].sum()))
        order = sorted(range(len(h)), key=lambda k: -row.rewards[k])
        best, worst = order[0], order[-1]
        lower = [k for k in order if row.rewards[k] < row.rewards[best]]
        assert found["rm2"][row.id] == pytest.approx(h[best] - h[lower[0]], abs=1e-3)
        assert found["rm10"][row.id] == pytest.approx(h[best] - np.mean([h[k] for k in lower[:10]]), abs=1e-3)
        assert found["rm_min"][row.id] == pytest.approx(h[best] - h[worst], abs=1e-3)
        assert found["kl_seq"][row.id] == pytest.approx(h[best], abs=1e-3)
        assert found["kl_exact"][row.id] == pytest.approx(kls[best], abs=1e-3)
        assert found["kl_exact"][row.id] > 0
        length = len(row.responses[best]) - len(row.responses[lower[0]])
        # The same for every method on a test set (the paper's Tables 2 and 5 break that).
        assert found["rm_rdpo_chars"][row.id] == pytest.approx(found["rm2"][row.id] - 0.01 * length, abs=1e-6)


def test_kl_on_own_samples_by_enumeration(tiny_world, tmp_path, policy):
    """All pairs of first tokens that the policy can say, the first alone where it ends: 2,000 samples come near the sum
    over them of what is in nats at temperature 1, weighted as they are drawn at each temperature."""
    tokenizer = load_tokenizer(str(tiny_world / "model"))
    row = listwise.read(tiny_world / "test.jsonl")[0]
    prompt = encode_prompt(tokenizer, row.prompt)
    ended = torch.zeros(len(tokenizer), dtype=torch.bool)
    ended[tokenizer.eos_token_id] = True

    def said(path: Path, temperature: float = 1.0) -> torch.Tensor:
        """Log-probs of all that a model can say."""
        lm = load_causal_lm(str(path), dtype=torch.float32)
        with torch.no_grad():
            logits = lm(torch.tensor([[*prompt, v] for v in range(len(tokenizer))])).logits[:, -2:].double()
        first, second = (logits / temperature).log_softmax(-1).unbind(1)  # (V, V) each; first is the same in each row
        return torch.cat([(first[0, :, None] + second)[~ended].flatten(), first[0, ended]])

    h = said(policy) - said(tiny_world / "model")
    for temperature in (1.0, 0.6):
        weights = said(policy, temperature).exp()
        exact = float((weights * h).sum())
        error = float((weights * (h - exact) ** 2).sum() / 2000) ** 0.5
        assert float(weights.sum()) == pytest.approx(1, abs=1e-6) and exact > 8 * error
        how = dict(samples=2000, temperature=temperature, limit=1, max_new_tokens=2, scorer="none")
        found = evaluate(tiny_world, policy, tmp_path / f"{temperature}", **how)
        assert found["kl_samples"][row.id] == pytest.approx(exact, abs=4 * error)


def test_a_human_pair_is_the_pair_that_counts(tiny_world, tmp_path, policy):
    """Without rewards too. An empty rejected response breaks it; the runner-up would be another measure."""
    rows = listwise.read(tiny_world / "test.jsonl")
    listwise.write(tmp_path / "pairs.jsonl", [replace(r, rewards=None, chosen=2, rejected=1) for r in rows])
    found = evaluate(tiny_world, policy, tmp_path / "out", data=tmp_path / "pairs.jsonl")
    assert "rm2" not in found and len(found["rm_dpo"]) == len(rows)
    whole = evaluate(tiny_world, policy, tmp_path / "again")
    for r in rows:
        if max(r.rewards) == r.rewards[2] and sorted(r.rewards)[-2] == r.rewards[1]:
            assert found["rm_dpo"][r.id] == pytest.approx(whole["rm2"][r.id], abs=1e-4)
    first, *rest = (replace(row, chosen=1, rejected=0) for row in rows)
    listwise.write(tmp_path / "lost.jsonl", [replace(first, responses=("", *first.responses[1:])), *rest])
    found = evaluate(tiny_world, policy, tmp_path / "lost", data=tmp_path / "lost.jsonl")
    assert first.id in found["rm2"]  # its candidates still count
    for metric in ("rm_dpo", "rm_rdpo_chars", "rm_rdpo_tokens"):
        assert set(found[metric]) == {row.id for row in rest}


def test_rows_with_nothing_to_compare_are_counted(tiny_world, tmp_path):
    """Equal rewards, and a human pair of which one response is too long: left out of the evaluation, not fatal."""
    rows = listwise.read(tiny_world / "test.jsonl")
    equal = replace(rows[0], rewards=(1.0,) * len(rows[0].responses))
    cut = replace(rows[1], responses=("yes .", "the " * 200), rewards=None, chosen=0, rejected=1)
    listwise.write(tmp_path / "some.jsonl", [equal, cut, *rows[2:]])
    found = evaluate(tiny_world, tiny_world / "model", tmp_path / "a", data=tmp_path / "some.jsonl")
    assert set(found["kl_seq"]) == {row.id for row in rows[2:]}
    counts = json.loads((tmp_path / "a/eval.json").read_text())["counts"]
    assert counts["rows_nothing_to_compare"] == 2 and counts["pairs_broken"] == 1
    listwise.write(tmp_path / "none.jsonl", [equal])
    with pytest.raises(ValueError, match="no row has rewards that differ"):
        evaluate(tiny_world, tiny_world / "model", tmp_path / "b", data=tmp_path / "none.jsonl")


def test_samples_are_scored_by_the_world_and_intervals_hold_the_mean(tiny_world, tmp_path, policy):
    found = evaluate(tiny_world, policy, tmp_path)
    world = World(0)
    for row in listwise.read(tmp_path / "samples.jsonl"):
        rewards = [world.true_reward(list(row.prompt), y) for y in row.responses]
        assert len(rewards) == 3
        assert found["true_reward"][row.id] == pytest.approx(np.mean(rewards))
        assert found["best_of_k_reward"][row.id] == pytest.approx(max(rewards))
        assert found["junk"][row.id] == pytest.approx(100 * np.mean([world.junk_fraction(y) for y in row.responses]))
        assert (row.id in found["harm"]) == world.is_risky(list(row.prompt))
    assert (tmp_path / "per_prompt.json").read_text() == json.dumps(found, indent=1) + "\n"
    summary = json.loads((tmp_path / "eval.json").read_text())
    for name, column in found.items():
        m = summary["metrics"][name]
        assert m["mean"] == pytest.approx(np.mean(list(column.values())))
        assert m["low"] <= m["mean"] <= m["high"] and m["prompts"] == len(column)


def test_ranks_evaluate_what_one_process_does(tiny_world, tmp_path, policy):
    """Prompts are shared out without duplicates; samples come from the prompt's own stream of numbers. One prompt on
    two ranks: the second has nothing to do and, as it happens, is done first."""
    one, two = evaluate(tiny_world, policy, tmp_path / "one"), tmp_path / "two"
    torchrun(2, ["eval.py", *flags(**options_of(tiny_world, policy, two, reference_cache=tmp_path / "cache"))])
    found = json.loads((two / "per_prompt.json").read_text())
    assert one.keys() == found.keys()
    for name in one:
        assert found[name] == pytest.approx(one[name], abs=2e-4)
    assert (two / "samples.jsonl").read_bytes() == (tmp_path / "one/samples.jsonl").read_bytes()

    one, out = evaluate(tiny_world, policy, tmp_path / "single", limit=1), tmp_path / "idle"
    out.mkdir()
    argv = flags(**options_of(tiny_world, policy, out, limit=1))
    c = config.parse(evaluation.Config, argv, prog="", description="")[0]
    for rank in (1, 0):
        evaluation.evaluate(c, dist.Ranks(rank=rank, world_size=2, device=torch.device("cpu"), sharded=False))
    assert json.loads((out / "per_prompt.json").read_text()) == one
    assert (out / "samples.jsonl").read_bytes() == (tmp_path / "single/samples.jsonl").read_bytes()


def test_odd_samples_end_no_evaluation(tiny_world, tmp_path, monkeypatch):
    """A prompt without room for samples, one of whose samples one cannot be scored: their margins are kept, of the
    others everything is what it was."""
    whole = evaluate(tiny_world, tiny_world / "model", tmp_path / "a")
    full, unscored, *others = (row.id for row in listwise.read(tmp_path / "a/samples.jsonl"))
    answer, load = per_prompt.generate.answer, evaluation.scorers.load

    def without_room(*args, **how):
        for id, texts, samples in answer(*args, **how):
            yield id, [] if id == full else texts, samples

    def with_none(name, **how):
        asked = []

        def score(prompt, texts):
            asked.append(texts)
            return [None, *load(name)(prompt, texts[1:])] if len(asked) == 1 else load(name)(prompt, texts)

        return score

    monkeypatch.setattr(per_prompt.generate, "answer", without_room)
    monkeypatch.setattr(evaluation.scorers, "load", with_none)
    for out, more in (("b", {}), ("c", dict(baseline=tmp_path / "b"))):
        found = evaluate(tiny_world, tiny_world / "model", tmp_path / out, **more)
        assert found["kl_seq"].keys() == whole["kl_seq"].keys() and set(found["length"]) == {unscored, *others}
        assert found["true_reward"] == {id: whole["true_reward"][id] for id in others}
        assert json.loads((tmp_path / out / "eval.json").read_text())["counts"]["samples_prompts_unscored"] == 1
    assert found["tie"] == dict.fromkeys(others, 100.0)
    evaluate(tiny_world, tiny_world / "model", tmp_path / "d", scorer="none")
    with pytest.raises(ValueError, match="its samples have no rewards; evaluate it with the same --scorer"):
        evaluate(tiny_world, tiny_world / "model", tmp_path / "e", baseline=tmp_path / "d")


def test_one_evaluation_per_folder(tiny_world, tmp_path):
    """Two would put each other's shares together."""
    message = r"eval\.py by process \d+ on .* is at work here; wait until it ends, or choose another --out"
    with files.lock(tmp_path / "lock", what="eval.py", advice=""), pytest.raises(ValueError, match=message):
        evaluate(tiny_world, tiny_world / "model", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(baseline="nowhere"), "--baseline nowhere: no samples.jsonl there"),
        (dict(limit=-3), "limit must be at least 0, not -3"),
        (dict(tokens_per_micro_batch=0), "tokens_per_micro_batch must be at least 1, not 0"),
        (dict(max_length=-1), "max_length must be at least 1, not -1"),
        (dict(temperature=-0.5), "temperature must be 0 .greedy. or at least 0.01, not -0.5"),
        (dict(scorer="world-true:x"), "the world's seed must be a number"),
        (dict(scorer="nowhere.safetensors"), "nowhere.safetensors"),
        (dict(objectives="score", scorer_dtype="bf16"), "--scorer world-true does not use objectives, scorer_dtype"),
    ],
)
def test_a_wrong_option_of_eval_is_named(tiny_world, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny_world, tiny_world / "model", tmp_path, **options)


# ---------------------------------------------------------------------------------------------- data_prep.py


def test_annotate_scorers_and_pairs(tiny_world, tmp_path):
    """Each world's rewards by its scorer; made pairs are labelled by reward, human ones stay."""
    rows = listwise.read(tiny_world / "train.jsonl")
    for scorer, reward in {"world-est": World(0).train_reward, "world-true:0": World(0).true_reward}.items():
        output = tmp_path / f"{scorer}.jsonl"
        data_prep.main(["annotate", *flags(scorer=scorer, input=tiny_world / "train.jsonl", output=output)])
        found = [x for r in listwise.read(output) for x in r.rewards]
        assert found == [reward(list(r.prompt), y) for r in rows for y in r.responses]
    k = next(i for i, r in enumerate(rows) if len(r.responses) > 2)
    rows[k] = replace(rows[k], chosen=2, rejected=0)
    listwise.write(tmp_path / "in.jsonl", rows)
    argv = flags(scorer="world-true", input=tmp_path / "in.jsonl", output=tmp_path / "pairs.jsonl")
    data_prep.main(["annotate", *argv, "--pairs"])
    paired = listwise.read(tmp_path / "pairs.jsonl")
    assert (paired[k].chosen, paired[k].rejected) == (2, 0)
    assert all(r.rewards[r.chosen] > r.rewards[r.rejected] for i, r in enumerate(paired) if i != k)
    assert len({(r.chosen, r.rejected) for r in paired}) > len(rows) // 4  # not one place in the list


def test_import_and_export_leave_a_manifest(tmp_path, capsys):
    """Two of the three rows are usable in the safe order; the file that TRL would read holds their pairs."""
    source, rows, pairs = ROOT / "tests/fixtures/pku-saferlhf.jsonl", tmp_path / "r.jsonl", tmp_path / "p.jsonl"
    data_prep.main(["import", *flags(source="pku-saferlhf", order="safe", input=source, output=rows)])
    told = capsys.readouterr().err
    assert f"{source}:3: both answers are the same" in told and "rows_equal_responses 1" in told
    assert {"better_response_id", "is_response_0_safe"} <= set(listwise.read(rows)[0].others)
    data_prep.main(["export", *flags(input=rows, output=pairs)])
    assert [json.loads(line)["rejected"][0]["content"] for line in pairs.read_text().splitlines()] == [
        "Hide half of what you earn.", "No idea.",
    ]  # fmt: skip
    first, second = (json.loads(Path(f"{path}.manifest.json").read_text()) for path in (rows, pairs))
    assert first["input"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert second["input"] == first["output"] and second["counts"]["rows_written"] == 2
    chosen = dict(source="pku-saferlhf", order="safe", columns=[], subset="", split="", limit=0, skip=0, chat=False)
    assert first["options"] == chosen
    assert first["counts"]["rows_equal_responses"] == 1 and len(first["first_reasons"]) == 1


def test_a_finished_output_is_made_again_for_a_reason(tiny_world, tmp_path, capsys, policy):
    """Not by the same command, but of another input or content of the model; never over what was made otherwise."""
    source, out, lm = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "lm"
    shutil.copy(tiny_world / "test.jsonl", source)
    shutil.copytree(tiny_world / "model", lm)

    def made(**more) -> bool:
        before = out.stat().st_ino if out.exists() else 0
        how = dict(model=lm, input=source, output=out, n=1, max_new_tokens=4, limit=2)
        data_prep.main(["generate", *flags(**how | more)])
        assert ("out.jsonl: is finished; delete it" in capsys.readouterr().err) == (out.stat().st_ino == before)
        return out.stat().st_ino != before

    assert [made(), made(timeout=9)] == [True, False]
    advice = "delete it, or choose another name"
    with pytest.raises(ValueError, match=rf"out.jsonl was made otherwise .seed: 0 -> 1.: {advice}"):
        made(seed=1)
    with pytest.raises(ValueError, match=rf"made otherwise .command: 'generate' -> 'export'.: {advice}"):
        data_prep.main(["export", *flags(input=source, output=out)])
    source.write_text("".join(source.read_text().splitlines(keepends=True)[1:]))
    assert [made(), made()] == [True, False]
    shutil.copy(policy / "model.safetensors", lm / "model.safetensors")
    assert [made(), made()] == [True, False]
    out.write_text(out.read_text() + "\n")
    with pytest.raises(ValueError, match=r"out.jsonl is not what a finished data_prep.py left: delete it, or choose"):
        made()


def test_a_world_is_made_once(tmp_path, capsys):
    """Not over another one, a changed one, or a folder of other things, all of which stay as they were."""
    sizes = dict(train=2, valid=1, test=1, demonstrations=2)

    def refused(out: Path, **more) -> str:
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ValueError) as refusal:
            data_prep.main(["world", *flags(out=out, **sizes | more)])
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        return str(refusal.value)

    out = tmp_path / "world"
    for said in (f"{out}: seed 0, test 1", f"{out}: is finished; delete it to make it again"):
        data_prep.main(["world", *flags(out=out, **sizes)])
        assert said in capsys.readouterr().err
    (out / "mine.txt").write_text("tea")  # beside it is no change of it
    data_prep.main(["world", *flags(out=out, **sizes)])
    assert refused(out, seed=1, train=3).startswith(f"{out}: holds a world of another seed, train: delete the folder")
    (out / "train.jsonl").write_text((out / "test.jsonl").read_text())
    assert "holds a world that has been changed (train.jsonl is not what was written" in refused(out)
    (out / "world.json").unlink()
    assert refused(out) == f"{out}: holds other files: choose another folder, or delete it"


def test_generate_warns_of_samples_without_an_end(tiny_world, tmp_path, capsys):
    """Of more than a quarter: an untrained model's."""
    how = dict(model=tiny_world / "model", input=tiny_world / "test.jsonl", output=tmp_path / "a.jsonl")
    data_prep.main(["generate", *flags(**how, n=2, max_new_tokens=4, limit=3)])
    counts = json.loads((tmp_path / "a.jsonl.manifest.json").read_text())["counts"]
    assert counts["unfinished"] > counts["samples"] / 4
    told = f"{counts['unfinished']} of {counts['samples']} samples did not end within 4 tokens"
    assert told in capsys.readouterr().err


def test_an_output_that_is_the_input_is_refused(tmp_path, tiny_world):
    """By whichever name, of every command."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes((tiny_world / "test.jsonl").read_bytes())
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "x").mkdir()
    options = {"import": dict(source="trl"), "export": {}, "annotate": dict(scorer="world-true")}
    for command, more in (options | {"generate": dict(model=tiny_world / "model")}).items():
        for output in (tmp_path / "link.jsonl", tmp_path / "x" / ".." / "rows.jsonl"):
            with pytest.raises(ValueError, match="is the input, which would be lost: choose another name"):
                data_prep.main([command, *flags(**more, input=path, output=output)])
    assert path.read_bytes() == (tiny_world / "test.jsonl").read_bytes()


def test_bleu_is_against_the_datas_preferred_answer():
    """Where people chose, what they chose, whatever a reward model says; in a world the best candidate."""
    row = Row("a", "p", ("a b c d e", "k l m n o", "u v w x y"), (0.0, 2.0, 1.0), 2, 0)
    samples = [Row("a", "p", (text,), None, None, None) for text in row.responses]
    world = SimpleNamespace(junk_fraction=lambda y: 0, is_risky=lambda prompt: False)
    for place, found in ((None, [0, 0, 1]), (world, [0, 1, 0])):
        assert [round(per_prompt.sample_metrics(s, row, place)["bleu_char"], 3) for s in samples] == found
