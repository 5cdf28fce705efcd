"""What is loaded is what was named, whole: base models, classifiers and adapters, or an error with the names."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ALONE, VOCABULARY, blocks_of, byte_tokenizer, separate_logps, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Gemma3Config, Gemma3ForSequenceClassification

from hps import loading, sharding
from hps.adapters import add_lora
from hps.extra.reward_model import RewardModel, load_reward_model
from hps.model import PolicyModel
from hps.packing import pack
from hps.pretrained import fingerprint, load_causal_lm

FP32 = dict(dtype=torch.float32)


def edit(folder: Path, change, *, file: str = "model.safetensors") -> str:
    """The weights in a folder through `change`, in place."""
    weights = load_file(folder / file)
    save_file(change(weights), folder / file, metadata={"format": "pt"})
    return str(folder)


def trained(root: Path, *, dtype: torch.dtype = torch.float32, size: float = 0.5, alpha: int = 8) -> nn.Module:
    """An adapter with weights in its B, exported to root/adapter, on the base root/base; the model in memory."""
    if not (root / "base").exists():
        tiny("llama").to(dtype).save_pretrained(root / "base")
    how = dict(rank=4, alpha=alpha, targets=["q_proj", "v_proj"], seed=0)
    lm = add_lora(load_causal_lm(str(root / "base"), dtype=dtype), **how)
    for name, p in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=size, generator=torch.Generator().manual_seed(1))
    sharding.export(lm, byte_tokenizer(), root / "adapter", ranks=ALONE, card="")
    return lm


def test_in_bf16_an_adapter_scores_as_it_was_trained(tmp_path):
    """Beside its base. Merged into bf16 weights so small a change would be gone in all but a few of them."""
    low = torch.bfloat16
    lm = trained(tmp_path, dtype=low, size=1e-4)
    packed = pack(blocks_of(3), pad_id=0)
    with torch.no_grad():
        expected = PolicyModel(lm)(packed)
        loaded = load_causal_lm(str(tmp_path / "adapter"), dtype=low)
        assert torch.equal(PolicyModel(loaded)(packed), expected)
        base = load_causal_lm(str(tmp_path / "base"), dtype=low)
        merged = load_causal_lm(str(tmp_path / "adapter"), dtype=low, merged=True)
        same = [(p == dict(base.named_parameters())[n]).float().mean() for n, p in merged.named_parameters()
                if "q_proj" in n]  # fmt: skip
    assert {p.dtype for n, p in loaded.named_parameters() if "lora_" in n} == {torch.float32}
    assert np.mean(same) > 0.8
    assert not torch.equal(expected, PolicyModel(base)(packed).detach())


def test_weights_as_they_are_stored_are_pages_of_their_files(tmp_path):
    """Which ranks of a host share; what is no weight is that of an fp32 model."""
    tiny("llama").bfloat16().save_pretrained(tmp_path)
    lm, cast = (load_causal_lm(str(tmp_path), dtype=dtype) for dtype in (None, torch.float32))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    pages = [range(*(int(end, 16) for end in line[0].split("-"))) for line in maps]
    for p in lm.parameters():
        assert p.dtype == torch.bfloat16 and any(p.data_ptr() in page for page in pages)
    assert all(torch.equal(*both) for both in zip(lm.buffers(), cast.buffers(), strict=True))
    assert lm.config.to_dict() == cast.config.to_dict()
    assert fingerprint(lm, dtype=torch.float32) == fingerprint(cast) != fingerprint(lm)


def test_the_fingerprint_knows_an_adapters_scale(tmp_path):
    found = []
    for alpha in (8, 8, 16):
        trained(tmp_path, alpha=alpha)
        found.append(fingerprint(load_causal_lm(str(tmp_path / "adapter"), **FP32)))
    assert found[0] == found[1] != found[2]


def test_an_adapters_base_is_found_from_anywhere(tmp_path, monkeypatch, caplog):
    """A folder of the same relative name elsewhere is another model; weights that changed are told."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    expected = separate_logps(trained(Path()), blocks_of(2))
    shutil.copytree("base", tmp_path / "elsewhere" / "base")
    monkeypatch.chdir(tmp_path / "elsewhere")
    edit(Path("base"), lambda weights: {name: w + 1 for name, w in weights.items()})
    adapter = tmp_path / "here" / "adapter"
    torch.testing.assert_close(separate_logps(load_causal_lm(str(adapter), **FP32), blocks_of(2)), expected)

    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "here" / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "base"}))
    with pytest.raises(ValueError, match="trained on another base than base is now: model.safetensors.*delete"):
        load_causal_lm(str(adapter), **FP32)
    (adapter / "base.json").unlink()
    with caplog.at_level(logging.WARNING):
        load_causal_lm(str(adapter), **FP32)
    assert f"names its base as 'base', which is taken for the folder {tmp_path / 'elsewhere' / 'base'}" in caplog.text


def test_weights_that_do_not_fit_are_named(tmp_path):
    """Missing, left over, of another size: of a policy, of a classifier, of an adapter."""
    trained(tmp_path)
    policy, reward = load_causal_lm, load_reward_model
    norm, q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
    lora = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    file = "adapter_model.safetensors"
    cases = [
        (policy, "base", lambda w: {k: v for k, v in w.items() if k != norm}, f"files lack {norm}"),
        (policy, "base", lambda w: w | {"score.weight": w[norm].clone()}, "hold score.weight, for which there is no"),
        (policy, "base", lambda w: w | {q: w[q][:4].clone()}, rf"{q} is \[4, 32\] in its files and \[32, 32"),
        (reward, "base", lambda w: {k: v for k, v in w.items() if k != q}, f"lack {q}"),
        (policy, "adapter", lambda w: {k: v for k, v in w.items() if k != lora}, "lack .*q_proj.lora_B"),
        (policy, "adapter", lambda w: w | {"base_model.model.other.weight": w[lora].clone()}, "hold .*other.weight"),
        (policy, "adapter", lambda w: {k.replace("model.l", "lm.l"): v for k, v in w.items()}, "lack .*5 m"),
        (policy, "adapter", lambda w: w | {lora: w[lora][:4].clone()}, r"is \[4, 4\] in the ad.*\[32, 4\] on"),
    ]  # fmt: skip
    for i, (load, kind, change, message) in enumerate(cases):
        shutil.copytree(tmp_path / kind, tmp_path / str(i))
        at = edit(tmp_path / str(i), change, file=file if kind == "adapter" else "model.safetensors")
        with pytest.raises(ValueError, match=f"cannot load the .*{message}") as refused:
            load(at, **FP32, **(dict(begin=True) if load is load_reward_model else {}))
        assert "\n" not in str(refused.value)
    load_reward_model(str(tmp_path / "base"), **FP32, begin=True)  # its head of zeros is new


def test_a_classifier_without_its_head_is_refused(tmp_path):
    load_reward_model(str(save_classifier(tmp_path / "whole")), **FP32)
    at = edit(save_classifier(tmp_path / "head"), lambda w: {k: v for k, v in w.items() if k != "score.weight"})
    with pytest.raises(ValueError, match="Gemma3ForSequenceClassification: its files lack score.weight"):
        load_reward_model(at, **FP32)


def save_classifier(folder: Path) -> Path:
    """A Gemma 3 reward model of text and images: its decoder and limits stand in its text part."""
    text = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=64, layer_types=["sliding_attention", "full_attention"],
        pad_token_id=None,
    )  # fmt: skip
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, num_labels=1,
                          image_token_index=58, boi_token_index=59, eoi_token_index=60)  # fmt: skip
    lm = Gemma3ForSequenceClassification(config)
    for p in lm.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.2)
    lm.save_pretrained(folder)
    return folder


def test_a_composite_reward_model_gives_its_own_rewards(tmp_path):
    lm = load_reward_model(str(save_classifier(tmp_path / "rm")), **FP32)
    own = Gemma3ForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    blocks = blocks_of(2)
    rows = [np.concatenate([block.prompt, y]) % 50 for block in blocks for y in block.responses]
    blocks = [type(b)(b.prompt % 50, tuple(y % 50 for y in b.responses)) for b in blocks]
    with torch.no_grad():
        expected = [float(own(input_ids=torch.from_numpy(ids)[None]).logits) for ids in rows]
        ours = RewardModel(lm)(pack(blocks, pad_id=0)).flatten().tolist()
    assert ours == pytest.approx(expected, abs=1e-4) and np.std(expected) > 0.01


def test_a_quantised_model_is_refused_in_a_sentence(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    for method in ("bitsandbytes", "gptq", "awq", "fp8"):
        (tmp_path / "config.json").write_text(json.dumps(about | {"quantization_config": {"quant_method": method}}))
        for load in (load_causal_lm, load_reward_model):
            with pytest.raises(ValueError, match=rf"weights are quantised \({method}\)|is no reward model"):
                load(str(tmp_path), **FP32)


def test_tokens_without_an_embedding_are_named(tmp_path):
    lm, tokenizer = tiny("llama"), byte_tokenizer()
    lm.resize_token_embeddings(len(tokenizer))
    loading.check_vocabulary(lm, tokenizer)
    lm.save_pretrained(tmp_path)
    n = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=rf"'\[PAD\]' ids up to {n}, and .* for {n} tokens.*embeddings\({n + 1}\)"):
        load_causal_lm(str(tmp_path), tokenizer=tokenizer, **FP32)


def test_an_adapter_with_more_tokens_than_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    tiny("qwen2").save_pretrained(tmp_path / "base")
    lm = load_causal_lm(str(tmp_path / "base"), **FP32)
    lm.resize_token_embeddings(VOCABULARY + 2)
    saved = dict(modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    lm = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj"], **saved)).eval()
    lm.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="trained with 63 tokens and its base has 61: save the base with"):
        load_causal_lm(str(tmp_path / "adapter"), **FP32)
    larger = load_causal_lm(str(tmp_path / "base"), **FP32)
    larger.resize_token_embeddings(VOCABULARY + 2)
    larger.save_pretrained(tmp_path / "base")
    blocks = blocks_of(2)
    ours = PolicyModel(load_causal_lm(str(tmp_path / "adapter"), **FP32))(pack(blocks, pad_id=0))
    torch.testing.assert_close(ours, separate_logps(lm, blocks), rtol=1e-5, atol=1e-4)


def test_an_adapter_of_the_output_head_counts(tmp_path):
    """Log-probs are taken by the head's weight, which holds the adapter's share in fp32; in bf16 it is refused."""
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    tiny("qwen2").save_pretrained(tmp_path / "base")
    how = dict(init_lora_weights=False, task_type="CAUSAL_LM")
    lm = load_causal_lm(str(tmp_path / "base"), **FP32)
    lm = get_peft_model(lm, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], **how)).eval()
    lm.save_pretrained(tmp_path / "head")
    blocks = blocks_of(2)
    ours = PolicyModel(load_causal_lm(str(tmp_path / "head"), **FP32))(pack(blocks, pad_id=0))
    torch.testing.assert_close(ours, separate_logps(lm, blocks), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="changes the output head.*use --dtype fp32"):
        load_causal_lm(str(tmp_path / "head"), dtype=torch.bfloat16)
    prefix = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(load_causal_lm(str(tmp_path / "base"), **FP32), prefix).save_pretrained(tmp_path / "prefix")
    with pytest.raises(ValueError, match="kind PREFIX_TUNING, which changes more"):
        load_causal_lm(str(tmp_path / "prefix"), **FP32)
