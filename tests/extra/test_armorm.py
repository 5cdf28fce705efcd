"""ArmoRM: rewards of a checkpoint with its tensors' names against its formulas in NumPy, each conversation alone."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaModel

from hps.data import tokenizers
from hps.data.rows import Row
from hps.extra import armorm
from hps.lab import scorers
from recipes import tiny_models

TURNS = ({"role": "user", "content": "why tea?"}, {"role": "assistant", "content": "it is hot"})
PROMPTS = [(*TURNS, {"role": "user", "content": "and water?"}), ({"role": "user", "content": "do people ask?"},)]
ROWS = [Row(f"r{i}", prompt, ("it is cold", "ask", "some people drink tea")[i:]) for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint as the published one names its tensors and settings, written without our class."""
    path, draw = tmp_path_factory.mktemp("armorm"), torch.Generator().manual_seed(0)
    words = tiny_models.tokenizer()
    gate = dict(num_objectives=19, gating_temperature=2, gating_hidden_dim=12, gating_n_hidden=3)
    config = tiny_models.config(words, **gate)
    shapes = {"regression_layer.weight": (19, 32), "reward_transform_matrix": (19, 19), "gating.logit_scale": (1,)}
    for i, (rows, columns) in enumerate([(12, 32), (12, 12), (12, 12), (19, 12)]):
        shapes |= {f"gating.layers.{i}.weight": (rows, columns), f"gating.layers.{i}.bias": (rows,)}
    weights = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    torch.manual_seed(1)
    weights |= {f"model.{name}": tensor for name, tensor in LlamaModel(config).state_dict().items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    about = config.to_dict() | {"architectures": ["LlamaForRewardModelWithGating"]}
    about["auto_map"] = {"AutoModelForSequenceClassification": "modeling_custom.LlamaForRewardModelWithGating"}
    (path / "config.json").write_text(json.dumps(about))
    words.save_pretrained(path)
    return path


def by_formulas(folder, rows) -> dict[str, list[float]]:
    """Of every response the score, and the 19 objectives, in float64 but for the decoder's states."""
    lm, words = LlamaModel.from_pretrained(folder).eval(), tokenizers.load_tokenizer(str(folder))
    w = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    begins = words.convert_tokens_to_ids(["<|eot_id|>", "<|start_header_id|>"])
    found = {"score": [], "rewards": []}
    for row in rows:
        for y in row.responses:
            turns = [*row.prompt, {"role": "assistant", "content": y}]
            ids = words.apply_chat_template(turns, return_dict=False)
            with torch.no_grad():
                states = lm(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()
            x = states[max(i for i in range(len(ids)) if ids[i : i + 2] == begins)]
            rewards = w["regression_layer.weight"] @ states[-1]
            for i in range(4):
                x = w[f"gating.layers.{i}.weight"] @ x + w[f"gating.layers.{i}.bias"]
                x = np.maximum(x, 0) if i < 3 else x
            gating = w["gating.logit_scale"][0] * np.exp(x / 2) / np.exp(x / 2).sum()
            found["score"].append(float(gating @ (rewards @ w["reward_transform_matrix"])))
            found["rewards"].append(rewards)
    return found


def rewards_of(folder, rows=ROWS, **how) -> np.ndarray:
    return np.concatenate([given for _, given in scorers.load_reward_model(str(folder), **how)(rows)])


def test_scores_and_objectives_by_the_formulas(folder):
    expected = by_formulas(folder, ROWS)
    objectives = np.array(expected["rewards"])
    assert np.std(expected["score"]) > 0.04
    for budget in (4096, 24):  # several pieces of one prompt, too
        how = dict(tokens_per_micro_batch=budget)
        np.testing.assert_allclose(rewards_of(folder, objectives="score", **how), expected["score"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(rewards_of(folder, objectives="mean"), objectives.mean(1), rtol=0, atol=1e-5)
    for i, name in ((0, "helpsteer-helpfulness"), (10, "beavertails-is_safe"), (18, "code-readability")):
        np.testing.assert_allclose(rewards_of(folder, objectives=name), objectives[:, i], rtol=0, atol=1e-5)


def test_plain_rows_give_the_same(folder, monkeypatch):
    packed = rewards_of(folder, objectives="score")
    monkeypatch.setattr(scorers.limits, "check", lambda model: setattr(model, "padded", True))
    np.testing.assert_allclose(rewards_of(folder, objectives="score"), packed, rtol=0, atol=1e-5)


def test_its_heads_stay_in_fp32_beside_a_bf16_decoder(folder):
    lm = scorers.reward_model.load_reward_model(str(folder), dtype=torch.bfloat16, objectives="score")
    kept = load_file(folder / "model.safetensors")
    for name, parameter in lm.named_parameters():
        if name.startswith("model."):
            assert parameter.dtype == torch.bfloat16
        else:
            assert torch.equal(parameter, kept[name]), name


def test_what_it_does_not_read_is_refused(folder):
    with pytest.raises(ValueError, match="has 19 labels .* --objectives mean, score, helpsteer-helpfulness, "):
        rewards_of(folder)
    with pytest.raises(ValueError, match="--objectives safety is nothing of .*armorm.*: choose one of mean, score"):
        rewards_of(folder, objectives="safety")
    with pytest.raises(ValueError, match="a prompt without .*eot_id.*--objectives mean reads others"):
        rewards_of(folder, [Row("s", "why tea?", ("hot",))], objectives="score")
    rewards_of(folder, [Row("s", "why tea?", ("hot",))], objectives="mean")
    assert len(armorm.OBJECTIVES) == 19
