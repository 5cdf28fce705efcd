"""`data_prep.py annotate` with reward models: the rewards that transformers itself gives to rendered conversations."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import classifier, encode_prompt, encode_response
from transformers import AutoModelForSequenceClassification

import data_prep
from hps.data import listwise, tokenizers
from hps.data.rows import Row
from hps.lab import scorers
from hps.prepare import journal, rewards


@pytest.fixture(scope="module")
def tokenizer(tiny_world):
    return tokenizers.load_tokenizer(str(tiny_world / "model"))


@pytest.fixture(scope="module")
def reward_model(tokenizer, tmp_path_factory):
    return classifier(tokenizer, tmp_path_factory.mktemp("rm"))


@pytest.fixture(scope="module")
def data(tiny_world, tmp_path_factory):
    """The tiny world's rows without rewards, one of them with a string prompt, one without responses."""
    path = tmp_path_factory.mktemp("data") / "in.jsonl"
    rows = [Row(r.id, r.prompt, r.responses) for r in listwise.read(tiny_world / "train.jsonl")]
    rows[3] = Row("string", " <user> may i eat this", rows[3].responses)
    rows[5] = Row("none", rows[5].prompt, ())
    listwise.write(path, rows)
    return path


def by_transformers(folder, rows, tokenizer, label=slice(None)) -> list[list[float]]:
    """Each conversation alone, rendered and read by transformers; the mean over its labels, or one of them."""
    lm = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for row in rows:
        found.append([])
        for y in row.responses:
            if isinstance(row.prompt, str):
                ids = [*encode_prompt(tokenizer, row.prompt), *encode_response(tokenizer, y)]
            else:
                answered = [*row.prompt, {"role": "assistant", "content": y}]
                ids = tokenizer.apply_chat_template(answered, return_dict=False)
            with torch.no_grad():
                found[-1].append(float(lm(input_ids=torch.tensor([ids])).logits[0, label].mean()))
    return found


def annotate(scorer, data, out, **more) -> list[Row]:
    options = dict(scorer=scorer, input=data, output=out) | more
    data_prep.main(["annotate", *(f"--{key}={value}" for key, value in options.items())])
    return listwise.read(out)


def assert_rewards(rows, expected):
    assert [len(row.rewards) for row in rows] == [len(e) for e in expected]
    np.testing.assert_allclose(np.concatenate([r.rewards for r in rows]), np.concatenate(expected), atol=1e-4)


def test_rewards_are_those_of_transformers(reward_model, data, tokenizer, tmp_path):
    expected = by_transformers(reward_model, listwise.read(data), tokenizer)
    assert np.std(np.concatenate(expected)) > 0.3
    for budget in (4096, 60):
        assert_rewards(annotate(reward_model, data, tmp_path / "out.jsonl", tokens_per_micro_batch=budget), expected)
    assert not journal.journals(tmp_path / "out.jsonl")
    score = scorers.load(reward_model)  # as eval.py asks: one prompt and its responses at a time
    for row, one in zip(listwise.read(data)[:4], expected, strict=False):
        prompt = row.prompt if isinstance(row.prompt, str) else list(row.prompt)
        np.testing.assert_allclose(score(prompt, list(row.responses)), one, atol=1e-4)


def test_the_mean_of_objectives(tokenizer, data, tmp_path):
    several = classifier(tokenizer, tmp_path / "rm", labels=5)
    rows = annotate(several, data, tmp_path / "out2.jsonl", objectives="mean")
    assert_rewards(rows, by_transformers(several, rows, tokenizer))
    [first, *_] = by_transformers(several, rows, tokenizer, label=3)
    [row, *_] = annotate(several, data, tmp_path / "out3.jsonl", objectives="LABEL_3")
    np.testing.assert_allclose(row.rewards, first, atol=1e-4)


def test_how_often_rewards_agree_with_people_is_said(reward_model, data, tmp_path, capsys):
    """Of the rows with a pair, which the scorer may never have seen: its held-out accuracy."""
    rows = [replace(row, chosen=k % 2, rejected=1 - k % 2) for k, row in enumerate(listwise.read(data)[:3])]
    listwise.write(tmp_path / "pairs.jsonl", rows)
    found = annotate(reward_model, tmp_path / "pairs.jsonl", tmp_path / "out.jsonl")
    right = sum(row.rewards[row.chosen] > row.rewards[row.rejected] for row in found)
    said = capsys.readouterr().err
    assert f"agree with people on {right / 3:.1%} of 3 pairs" in said and f"human_pairs_agree {right}" in said


def test_a_classifier_whose_pad_is_eos_reads_the_token_before(tokenizer, data, tmp_path, capsys):
    """transformers takes the last token that is no pad, so such a model was trained on the one before EOS; of an empty
    response nothing is left, and the last token of the prompt speaks. The others stay as they were, in their order."""
    rm, out = classifier(tokenizer, tmp_path / "rm", pad=tokenizer.eos_token_id), tmp_path / "out.jsonl"
    rows = [replace(row, responses=("", row.responses[0], "")) for row in listwise.read(data)[:3]]
    listwise.write(tmp_path / "empty.jsonl", [*rows, Row("a", "tea is", ("",))])
    rows = annotate(rm, tmp_path / "empty.jsonl", out)
    assert_rewards(rows, by_transformers(rm, rows, tokenizer))
    assert len({row.rewards for row in rows}) == 4 and rows[0].rewards[0] != rows[0].rewards[1]
    assert "responses_left_out 0" in (said := capsys.readouterr().err) and "responses_empty 7" in said
    [other, *_] = annotate(classifier(tokenizer, tmp_path / "rm2"), tmp_path / "empty.jsonl", tmp_path / "out2.jsonl")
    assert abs(other.rewards[1] - rows[0].rewards[1]) > 0.1


def test_what_cannot_be_scored_is_left_out_by_id(tokenizer, data, tmp_path, monkeypatch):
    """A reward that is not finite, an answer beyond the model's positions, a conversation that the template refuses:
    the others keep their rewards, pairs follow their responses, and the manifest names what went."""
    rm = classifier(tokenizer, tmp_path / "rm", positions=64)
    [good, *_] = listwise.read(data)
    texts = (*good.responses[:2], "the " * 80, good.responses[2])
    odd = [
        replace(good, id="long", responses=texts, chosen=3, rejected=0),
        replace(good, id="pair", responses=texts, chosen=2, rejected=0),
        replace(good, id="none", responses=texts[2:3]),
        replace(good, id="quotes", responses=(texts[0], f"so {tokenizer.eos_token} it is", texts[1])),
        replace(good, id="refused", prompt=({"role": "tool", "content": "x"},)),
    ]
    encode = rewards.encode_answered

    def refusing(tokenizer, prompt, texts):
        if prompt == odd[-1].prompt:
            raise ValueError("no tools here")
        return encode(tokenizer, prompt, texts)

    monkeypatch.setattr(rewards, "encode_answered", refusing)
    listwise.write(tmp_path / "in.jsonl", [good, *odd])
    whole, long, pair, quotes = rows = annotate(rm, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert_rewards(rows, by_transformers(rm, rows, tokenizer))
    assert whole.responses == good.responses and long.responses == pair.responses == texts[:2] + texts[3:]
    assert (long.chosen, long.rejected) == (2, 0) and (pair.chosen, pair.rejected) == (None, None)
    about = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    everywhere = list(range(len(good.responses)))
    assert quotes.responses == texts[:2]
    assert about["responses_left_out"] == {"long": [2], "pair": [2], "none": [0], "quotes": [1], "refused": everywhere}
    assert {key: about["counts"][key] for key in ("rows", "responses_overlong", "responses_refused")} == {
        "rows": 4, "responses_overlong": 3, "responses_refused": 1 + len(everywhere),
    }  # fmt: skip
    score = scorers.score

    def odd_score(model, blocks, **how):
        found = list(score(model, blocks, **how))
        found[0][1] = float("nan")
        return found

    monkeypatch.setattr(scorers, "score", odd_score)
    listwise.write(tmp_path / "one.jsonl", [good])
    [row] = annotate(rm, tmp_path / "one.jsonl", tmp_path / "out2.jsonl")
    assert row.responses == good.responses[:1] + good.responses[2:]
    assert row.rewards == pytest.approx(whole.rewards[:1] + whole.rewards[2:], abs=1e-5)
    monkeypatch.setattr(scorers, "score", lambda *_, **__: [np.full(len(good.responses), np.inf)])
    with pytest.raises(ValueError, match=r"one.jsonl:1: no response .* has a reward: the rewards are not finite"):
        annotate(rm, tmp_path / "one.jsonl", tmp_path / "out3.jsonl")


def test_a_reward_model_has_template_options(tokenizer, data, tmp_path):
    """Which are a part of what it reads: other rewards, those of a template with the option's text in it."""
    rm = Path(classifier(tokenizer, tmp_path / "rm"))
    written = tokenizer.chat_template
    fixed = copy.copy(tokenizer)
    fixed.chat_template = "what is " + written
    (rm / "chat_template.jinja").write_text("{% if style is defined %}{{ style }} is {% endif %}" + written)
    listwise.write(tmp_path / "in.jsonl", listwise.read(data)[:2])
    rows = annotate(rm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", template_options="style=what")
    assert_rewards(rows, by_transformers(rm, rows, fixed))
    plain = annotate(rm, tmp_path / "in.jsonl", tmp_path / "out2.jsonl")
    assert_rewards(plain, by_transformers(rm, rows, tokenizer))
    assert not np.allclose(rows[0].rewards, plain[0].rewards, atol=1e-3)


def test_what_does_not_fit_is_cut_and_counted(tokenizer, data, tmp_path, capsys):
    """16 positions: the prompt loses its beginning, but BOS, as if it were shorter; an answer of 17 cannot be read."""
    short = classifier(tokenizer, tmp_path / "rm", positions=16)
    words = [tokenizer.decode([i]) for i in range(20, 60)]
    prompt = " ".join(words[:20])
    ids = encode_prompt(tokenizer, prompt)
    listwise.write(tmp_path / "in.jsonl", [Row("a", prompt, (words[30], " ".join(words[30:34])))])
    [row] = annotate(short, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert "prompts_cut 1" in capsys.readouterr().err
    lm = AutoModelForSequenceClassification.from_pretrained(short).eval()
    for y, reward in zip(row.responses, row.rewards, strict=True):
        bos = [tokenizer.bos_token_id] if ids[0] == tokenizer.bos_token_id else []
        cut = bos + ids[len(ids) - 16 + 5 + len(bos) :]  # the longer answer has 4 words and EOS
        whole = [*cut, *encode_response(tokenizer, y)]
        with torch.no_grad():
            assert reward == pytest.approx(float(lm(input_ids=torch.tensor([whole])).logits), abs=1e-4)
    listwise.write(tmp_path / "long.jsonl", [Row("a", prompt, (" ".join(words[:16]),))])
    with pytest.raises(ValueError, match=r"long.jsonl:1: no response .*: all responses are longer than the 16 tokens"):
        annotate(short, tmp_path / "long.jsonl", tmp_path / "out2.jsonl")


def test_annotate_keeps_order_and_passes_prompts_through():
    talk = [{"role": "user", "content": "hello"}]
    rows = [Row("r1", "hi", ("a", "bb"), where="f:1"), Row("r2", tuple(talk), ("ccc",))]
    seen = []

    def score(prompt, responses):
        seen.append(prompt)
        return np.array([np.inf if y == "a" else len(y) for y in responses], np.float32)

    assert list(rewards.annotate(rows, score)) == [("r1", [None, 2.0]), ("r2", [3.0])] and seen == ["hi", talk]
    with pytest.raises(AssertionError, match="f:1: the scorer gave 1 rewards"):
        list(rewards.annotate(rows, lambda prompt, responses: [1.0]))


def test_options_that_a_scorer_ignores_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="scorer world-est does not use dtype, objectives, template_options"):
        annotate("world-est", data, tmp_path / "out.jsonl", dtype="bf16", objectives="mean", template_options="a=1")
