"""Exported folders through plain peft and transformers, and their cards against the run's own JSON files."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from helpers import arguments, flags
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import eval as evaluation
import train
from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import export
from hps.evaluate.metrics import METRICS


@pytest.fixture(scope="module")
def trained(tiny_world, tmp_path_factory) -> Path:
    """The folder of a LoRA run that has moved, evaluated."""
    out = tmp_path_factory.mktemp("run")
    train.main(arguments(tiny_world, out, lora_rank=4, lora_alpha=8, lr=3e-2, epochs=1))
    options = dict(model=out / "policy", reference=tiny_world / "model", data=tiny_world / "test.jsonl", samples=0)
    evaluation.main(flags(**options, out=out / "eval", max_length=128, reference_cache=tiny_world / "cache"))
    return out


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "v1.0"
    make(trained, out, eval_json=trained / "eval/eval.json")
    return out


def make(run: Path, out: Path, **options) -> None:
    export.main(flags(model=run / "policy", out=out, **options))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def table(text: str, title: str) -> dict[str, list[str]]:
    """First cell -> the other cells, of the table whose header begins with `title`, escapes undone."""
    lines = text.split(f"\n| {title} |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {first: others for first, *others in rows}


def run_snippet(folder: Path, capsys) -> str:
    """What the card's lines of Python print, run as they stand."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    capsys.readouterr()
    exec(code.replace('"."', repr(str(folder))).replace("max_new_tokens=256", "max_new_tokens=4"), {})
    return capsys.readouterr().out


def test_merged_weights_give_the_adapters_log_probs(trained, exported, tiny_world):
    from peft import AutoPeftModelForCausalLM

    ids = torch.randint(0, 50, (2, 17), generator=torch.Generator().manual_seed(0))
    loaded = [AutoPeftModelForCausalLM.from_pretrained(trained / "policy")]
    loaded += [AutoModelForCausalLM.from_pretrained(path) for path in (exported, tiny_world / "model")]
    with torch.no_grad():
        adapter, merged, start = (lm(input_ids=ids).logits.log_softmax(-1) for lm in loaded)
    torch.testing.assert_close(merged, adapter, rtol=0, atol=1e-4)
    assert (adapter - start).abs().max() > 0.1  # the adapter does something
    assert not (exported / "adapter_config.json").exists() and not list(exported.parent.glob("*.tmp"))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (trained / "policy", exported)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


def test_bf16_weights_are_the_merged_ones_rounded(trained, exported, tmp_path):
    make(trained, tmp_path / "low", dtype="bf16")
    whole, low = (safetensors.torch.load_file(path / "model.safetensors") for path in (exported, tmp_path / "low"))
    assert whole.keys() == low.keys() and all(torch.equal(low[name], w.bfloat16()) for name, w in whole.items())
    assert read(tmp_path / "low/config.json")["dtype"] == "bfloat16"


def test_what_rounding_to_bf16_loses_is_said(trained, tiny_world, tmp_path, capsys):
    """By numpy: B A from the adapter's file, in float64."""
    shutil.copytree(trained, tmp_path / "run")
    weights = tmp_path / "run/policy/adapter_model.safetensors"
    adapter = {name: w * (1e-2 if "lora_B" in name else 1) for name, w in load_file(weights).items()}
    save_file(adapter, weights, metadata={"format": "pt"})  # a smaller change, of which a part is lost
    make(tmp_path / "run", tmp_path / "low", dtype="bf16")
    said, base = " ".join(capsys.readouterr().err.split()), load_file(tiny_world / "model/model.safetensors")
    scale = 8 / 4  # alpha / rank

    def rounded(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).float().bfloat16().double().numpy()

    unchanged = adapted = change = lost = 0.0
    for name in (name for name in adapter if ".lora_A." in name):
        w = base[name.removeprefix("base_model.model.").replace("lora_A.", "")].astype(np.float64)
        delta = scale * adapter[name.replace("lora_A", "lora_B")].astype(np.float64) @ adapter[name].astype(np.float64)
        merged = rounded(w + delta)
        unchanged, adapted = unchanged + (merged == rounded(w)).sum(), adapted + w.size
        change, lost = change + (delta**2).sum(), lost + ((merged - w - delta) ** 2).sum()
    assert 0.1 < unchanged / adapted < 0.9
    assert f"{unchanged / adapted:.0%} of the {int(adapted):,} adapted weights are the base's again" in said
    assert float(re.search(r"the rounding is (\S+) times as large", said)[1]) == pytest.approx(
        (lost / change) ** 0.5, rel=0.06
    )


def test_a_tokenizer_beyond_the_embeddings_is_not_exported(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(trained / "policy")
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(tmp_path / "run/policy")
    with pytest.raises(ValueError, match="the tokenizer gives 'one more' ids up to"):
        make(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("which", ["adapter", "merged"])
def test_the_card_says_what_the_files_say(trained, exported, tiny_world, capsys, which):
    folder = trained / "policy" if which == "adapter" else exported
    text = (folder / "README.md").read_text()
    run_snippet(folder, capsys)  # its lines of Python run
    run, summary = read(trained / "run.json"), read(trained / "summary.json")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == ("peft" if which == "adapter" else "transformers")
    assert front["tags"][-1] == "dpo-hps" and front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front  # a folder of this machine is nothing that the hub knows
    assert str(tiny_world) not in text

    training = {key: cells[0] for key, cells in table(text, "what").items()}
    assert training["method"] == "dpo-hps" and training["data"] == "train.jsonl"
    assert training["its weights, sha256"] == run["inputs"]["model"]
    assert training["data, sha256"] == run["inputs"]["data"]
    assert training["tokenizer, sha256"] == run["inputs"]["tokenizer"]
    assert (training["steps"], training["packed tokens"]) == (str(summary["steps"]), str(summary["tokens"]))
    assert float(training["seconds"]) == pytest.approx(summary["seconds"], abs=0.051)
    counts = {key: int(cells[0]) for key, cells in table(text, "count").items()}
    assert counts == {key: n for key, n in summary["counts"].items() if n}
    # Given, and not the default's: whatever else `arguments` gives is where files lie, or what a run is called.
    given = dict(beta=0.5, lr=3e-2, epochs=1, prompts_per_step=8, max_length=128, lora_rank=4, lora_alpha=8)
    assert {key: json.loads(cells[0]) for key, cells in table(text, "setting").items()} == given

    if which == "adapter":
        assert "## Evaluation" not in text
        return
    found, metrics = table(text, "metric"), read(trained / "eval/eval.json")["metrics"]
    assert len(found) == len(metrics) > 3
    for name, m in metrics.items():
        interval, prompts, _ = found[METRICS[name].title]
        shown = [float(x) for x in re.findall(r"[-.\d]+", interval)]
        assert shown == pytest.approx([m["mean"], m["low"], m["high"]], abs=0.51 * 10 ** -METRICS[name].digits)
        assert int(prompts) == m["prompts"]


def test_a_reward_model(tiny_world, tmp_path, capsys):
    """Its merged head and decoder give the rewards that peft gives, and the card's lines print one of them."""
    from peft import AutoPeftModelForSequenceClassification

    rows = listwise.read(tiny_world / "train.jsonl")
    pairs = [Row(r.id, r.prompt, r.responses, None, 2, 1, None, "") for r in rows]
    listwise.write(tmp_path / "pairs.jsonl", pairs)
    options = dict(loss="reward", method=None, beta=None, reference_cache=None, data=tmp_path / "pairs.jsonl")
    train.main(arguments(tiny_world, tmp_path / "run", lora_rank=4, epochs=1, **options | dict(lr=3e-2)))
    make(tmp_path / "run", tmp_path / "out")
    ids = torch.randint(5, 50, (1, 17), generator=torch.Generator().manual_seed(0))
    plain = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "run/policy", num_labels=1)
    plain.config.pad_token_id = None
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        assert abs(float(plain(ids).logits)) > 1e-3
    values = [float(run_snippet(folder, capsys)) for folder in (tmp_path / "run/policy", tmp_path / "out")]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    text = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(text.split("---\n")[1])["pipeline_tag"] == "text-classification"
    assert "| method | reward |" in text and "dpo" not in text.split("## Training")[1]


def test_mistakes_are_named_and_leave_nothing(trained, tmp_path, tiny_world):
    (tmp_path / "there").mkdir()
    other = dict(read(trained / "eval/eval.json"), config={"model": "elsewhere"})
    (tmp_path / "eval.json").write_text(json.dumps(other))
    for out, options, message in [
        ("there", {}, "there exists already"),
        ("a", dict(dtype="fp16"), "dtype = 'fp16' does not exist"),
        ("b", dict(eval_json=tmp_path / "none.json"), "none.json: cannot be read"),
        ("c", dict(eval_json=tmp_path / "eval.json"), "is about elsewhere: run eval.py on"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(trained, tmp_path / out, **options)
    with pytest.raises(ValueError, match="is no policy of a finished run: .*run.json"):
        export.main([f"--model={tiny_world / 'model'}", f"--out={tmp_path / 'd'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "there"]
