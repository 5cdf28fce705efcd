"""docs/MISTAKES.md: what a command says of a mistake is what the page shows."""

import json
import re
import shlex
from importlib import import_module

import pytest
from helpers import ROOT, flags, save

import train

PAGE = (ROOT / "docs" / "MISTAKES.md").read_text(encoding="utf-8")
ROW = {"id": "a", "prompt": "why", "responses": ["tea is hot", "cold"], "rewards": [1, 0]}
FILES = {
    "broken.jsonl": '{"id": "a"\n',
    "twice.jsonl": f"{json.dumps(ROW)}\n" * 2,
    "lengths.jsonl": json.dumps(ROW | {"rewards": [1]}),
    "unscored.jsonl": json.dumps({key: value for key, value in ROW.items() if key != "rewards"}),
    "half.jsonl": '{"prompt": "why", "chosen": "tea is hot"}\n',
    "pairs.jsonl": '{"prompt": "why", "chosen": "tea is hot", "rejected": "cold"}\n',
    "ties.jsonl": json.dumps(ROW | {"rewards": [1, 1]}),
    "typo.toml": 'methd = "dpo-hps"\n',
    "below": "a file",
}


@pytest.fixture(scope="module")
def folder(tiny_world, tmp_path_factory):
    """Where the page's commands are typed: files that are wrong, a model, another one, and a finished run."""
    folder = tmp_path_factory.mktemp("mistakes")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name in ("model", "train.jsonl"):
        (folder / name).symlink_to(tiny_world / name)
    save(folder / "other")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*right("train", ["--out"]), "--out=done"])
    return folder


def right(command: str, given: list[str]) -> list[str]:
    """What stands for `...`: the options of a short run, but those that are given."""
    options = dict(model="model", data="train.jsonl", out="out", max_length=128)
    options |= dict(lora_rank=0) if command == "train" else dict(reference="model")
    return flags(**{key: value for key, value in options.items() if f"--{key}" not in given})


def test_the_page_shows_what_is_said(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = re.findall(r"^\$ python (\w+)\.py(.*)\nerror: (.*(?:\n {7}.*)*)$", PAGE, re.MULTILINE)
    assert len(found) >= 40 and len(found) == PAGE.count("$ python")
    for script, typed, shown in found:
        words = shlex.split(typed)
        if words[-1:] == ["..."]:
            words = [*words[:-1], *right(script, words)]
        with pytest.raises(ValueError) as mistake:
            import_module(script).main(words)
        assert str(mistake.value) == " ".join(shown.split()), typed
        assert not any((folder / left).exists() for left in ("out", "x.jsonl")), f"{typed} leaves something behind"
