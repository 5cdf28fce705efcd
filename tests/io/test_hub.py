"""Revisions of what stands on the hub, against a copy of it on disk: two commits of a model and of a data set."""

import json
import logging

import pytest
import torch
from helpers import ALONE, ROOT, classifier
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM

import data_prep
from hps.adapters import add_lora
from hps.data.tokenizers import load_tokenizer
from hps.extra.reward_model import load_reward_model
from hps.io import hub
from hps.pretrained import fingerprint, load_causal_lm
from hps.sharding import export

FIRST, SECOND = "1" * 40, "2" * 40  # the branch stands at SECOND


def hashes(names, load=load_causal_lm, **how) -> list[str]:
    return [fingerprint(load(str(name), dtype=torch.float32, **how)) for name in names]


def refusal(call) -> str:
    with pytest.raises(ValueError) as refused:
        call()
    return str(refused.value)


def look(folder) -> dict:
    """What the commands make of names on the hub, by what they load or say."""
    at = ("owner/lm", f"owner/lm@{FIRST}", f"owner/lm@{SECOND}", "owner/lm@main")
    found = {"lm": hashes(at), "folders": hashes([folder / "lm1", folder / "lm2"])}
    found["rm"] = hashes((f"owner/rm@{FIRST}", f"owner/rm@{SECOND}"), load_reward_model)
    found["eos"] = [load_tokenizer(name).eos_token for name in at]
    how = dict(rank=2, alpha=2, targets=["q_proj"], seed=0, revision=hub.resolve(at[1])[1])
    lm = add_lora(load_causal_lm(at[1], dtype=torch.float32), **how)
    export(lm, load_tokenizer(at[1]), folder / "adapter", ranks=ALONE, card="")
    found["adapter"] = hashes([folder / "adapter"], merged=True)

    def read(name: str, output: str) -> None:
        data_prep.main(["import", "--source=hh-rlhf", f"--input={name}", f"--output={folder}/{output}.jsonl"])

    for name in ("", "@main", f"@{FIRST}"):
        read(f"hf://datasets/owner/pairs{name}/some/pairs.jsonl", f"rows{name}")
    for name in ("owner/lm@none", "owner/none"):
        found[name] = refusal(lambda name=name: load_causal_lm(name, dtype=torch.float32))
    for name in ("hf://datasets/owner/pairs@none/some/pairs.jsonl", "hf://datasets/owner/pairs/none",
                 "hf://owner/pairs"):  # fmt: skip
        found[name] = refusal(lambda name=name: read(name, "none"))
    return found


@pytest.fixture(scope="module")
def found(tiny_world, tmp_path_factory):
    """What `look` saw, what the log said, and the folder."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = load_tokenizer(str(tiny_world / "model"))
    rows = (ROOT / "tests/fixtures/hh-rlhf.jsonl").read_text().splitlines(keepends=True)
    for number, commit in enumerate((FIRST, SECOND), 1):
        for kind, name in (("models", "lm"), ("models", "rm"), ("datasets", "pairs")):
            cached = folder / "cache" / f"{kind}--owner--{name}"
            (cached / "refs").mkdir(parents=True, exist_ok=True)
            (cached / "refs" / "main").write_text(SECOND)
            snapshot = cached / "snapshots" / commit
            snapshot.mkdir(parents=True)
            if name == "lm":
                shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
                for place in (snapshot, folder / f"lm{number}"):
                    torch.manual_seed(number)
                    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(place)
                    if number == 2:
                        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)
                    tokenizer.save_pretrained(place)
            elif name == "rm":
                classifier(tokenizer, snapshot, positions=64 * number)
            else:
                (snapshot / "some").mkdir()
                (snapshot / "some/pairs.jsonl").write_text("".join(rows[:number]))
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log = logging.getLogger("hps.io.hub")
    log.addHandler(handler)
    hub._commit_of.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        yield look(folder), said, folder
    log.removeHandler(handler)
    hub._commit_of.cache_clear()


def test_what_is_read_is_that_of_its_revision(found):
    """An adapter trained on the first commit is put on that one, though the branch has moved on; so is a data set."""
    seen, _, folder = found
    first, second = seen["folders"]
    assert seen["lm"] == [second, first, second, second] != [first] * 4
    assert seen["eos"][0] == seen["eos"][2] == seen["eos"][3] != seen["eos"][1]
    assert seen["rm"][0] != seen["rm"][1]
    about = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert (about["base_model_name_or_path"], about["revision"]) == ("owner/lm", FIRST)
    assert seen["adapter"] == [first]  # B is zero, so that the merged weights are the base's
    for name, commit, kept in (("", SECOND, 2), ("@main", SECOND, 2), (f"@{FIRST}", FIRST, 1)):
        manifest = json.loads((folder / f"rows{name}.jsonl.manifest.json").read_text())
        assert manifest["input"]["path"] == f"hf://datasets/owner/pairs@{commit}/some/pairs.jsonl"
        assert manifest["counts"]["rows_read"] == kept


def test_a_branch_is_told_with_its_commit(found):
    _, said, _ = found
    told = [line for line in said if "may change on the hub" in line]
    assert [line.split()[0] for line in told] == ["owner/lm@main"]  # once, though named twice
    assert all(f"owner/lm@{SECOND}" in line for line in told)
    assert hub.resolve("owner/lm") == hub.resolve("owner/lm@main") == ("owner/lm", SECOND)


def test_what_is_not_there_is_named(found):
    seen, _, folder = found
    assert "cannot load the model 'owner/lm@none'" in seen["owner/lm@none"]
    assert "cannot load the model 'owner/none'" in seen["owner/none"]
    for path in ("hf://datasets/owner/pairs@none/some/pairs.jsonl", "hf://datasets/owner/pairs/none"):
        assert seen[path].startswith(f"{path} could not be fetched: ")
    assert "must be hf://datasets/OWNER/NAME/FILE" in seen["hf://owner/pairs"]
    assert not (folder / "none.jsonl").exists()


def test_names_and_revisions(tmp_path, monkeypatch):
    for name, revision in (("owner/name", "main"), ("owner/name@v1.0", "v1.0")):
        with pytest.raises(ValueError, match=f"'owner/name' is no folder here.*'{revision}', and the hub cannot"):
            hub.resolve(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs@home").mkdir()
    for path in ("runs@home", "./gone@home", "/gone@home"):
        assert hub.resolve(path) == (path, None)
    for wrong in ("owner/name@", "@main"):
        with pytest.raises(ValueError, match="OWNER/NAME@REVISION"):
            hub.resolve(wrong)
