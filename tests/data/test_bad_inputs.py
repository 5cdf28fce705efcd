"""The wall of bad inputs: what a user may bring, the command that meets it, and what it says.

Every case goes through the script's own `main`. The message is a ValueError, which `config.run_main` prints as one line
(tested by tests/test_config.py); where there is a file and a line, it begins with them. Afterwards the folder of
outputs holds no file, half-written or whole.
"""

import json
from pathlib import Path

import pytest
from helpers import TURNS, save

import data_prep
import eval as evaluation
import train

REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TURNS
ROW = {"id": "a", "prompt": "why", "responses": ["tea is hot", "cold"], "rewards": [1, 0], "chosen": 0, "rejected": 1}
TALK = [{"role": "system", "content": "tea"}, {"role": "user", "content": "why"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Model folders by name, and one file."""
    root = tmp_path_factory.mktemp("models")
    save(root / "model")
    save(root / "no-template", template=None)
    save(root / "refuses", template=REFUSES)
    save(root / "no-tools", template="{% for m in messages if m.role != 'tool' %}<user> {{ m.content }} {% endfor %}")
    save(root / "two-labels", labels=2)
    save(root / "scorer-no-template", labels=1, template=None)
    (root / "empty").mkdir()
    (root / "file").write_text("tea")
    return root


def command(name: str, data: Path, out: Path, folders: Path, more: dict) -> tuple:
    """The main function of a script and its words, for a command that reads a list-wise file."""
    model, output = folders / "model", out / "out.jsonl"
    options = {
        "export": dict(input=data, output=output),
        "generate": dict(model=model, input=data, output=output, max_new_tokens=4),
        "annotate": dict(scorer=folders / "scorer-no-template", input=data, output=output),
        "doctor": dict(model=model, input=data),
        "train": dict(model=model, data=data, out=out, token_cache=out.parent / "tokens"),
        "eval": dict(model=more.get("model", model), reference=model, data=data, out=out, samples=0),
    }[name] | more
    if name in ("train", "eval"):
        options["reference_cache"] = out.parent / "references"
    if name == "eval":
        options["reference"] = options["model"]
    words = [f"--{key}={value}" for key, value in options.items()]
    main = {"train": train.main, "eval": evaluation.main}.get(name, data_prep.main)
    return main, words if name in ("train", "eval") else [name, *words]


def refused(name: str, data: Path, tmp_path: Path, folders: Path, **more) -> str:
    """What a command says to it, having left nothing behind."""
    out = tmp_path / "out"
    main, words = command(name, data, out, folders, more)
    before = sorted(path for path in tmp_path.rglob("*") if out not in path.parents)
    with pytest.raises(ValueError) as mistake:
        main(words)
    left = [path for path in out.rglob("*") if path.is_file()]
    assert not left, f"{name} left {left}"
    assert not [path for path in tmp_path.rglob("*.tmp*") if path not in before], f"{name} left a temporary file"
    return str(mistake.value)


def lines(*rows: dict | bytes) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def test_what_is_no_listwise_file(tmp_path, folders):
    """Every command that reads one says what the reader says; tests/data/test_listwise.py has what that refuses."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines(ROW, ROW))
    for name in ("export", "generate", "annotate", "doctor", "train", "eval"):
        said = refused(name, path, tmp_path, folders)
        assert said.startswith(f"{path}:2: id 'a' is already used at {path}:1; ids must be unique"), said


# -- data that does not go with its tokenizer, its model or its scorer --

READERS = ("doctor", "train", "eval")
ASKERS = ("generate", *READERS)
LONG = {"prompt": "why tea is " * 6}
TOOL = {"prompt": [*TALK, {"role": "tool", "content": "hot"}]}
TEMPLATE = "{path}:2: the tokenizer's chat template "
LOADED = "no tokenizer could be loaded from '{folders}/"
FITS = (  # beside docs/MISTAKES.md: what is in line 2; commands and options that meet it; how the message begins
    ({"prompt": TALK[1:]}, ASKERS, dict(model="no-template"),
     "{path}:2: the prompt is a list of messages but the tokenizer has no chat template"),
    ({"prompt": TALK}, ASKERS, dict(model="refuses"), TEMPLATE + "refuses these messages: no system turn"),
    (TOOL, ASKERS, dict(model="no-tools"), TEMPLATE + "leaves out what prompt[2], the turn of 'tool', says"),
    ({"prompt": "<bos> <bos> why"}, ASKERS, {}, "{path}:2: the prompt starts with two '<bos>'; take one out"),
    ({"responses": ["tea <eos> is", "hot"]}, READERS, {},
     "{path}:2: a response holds the control token '<eos>' inside its text, and this tokenizer cannot read it as "),
    (LONG, ("train", "eval"), {}, "a row has 22 tokens, the model 16 positions: set --max_length 16"),
    (LONG, ("generate",), dict(max_new_tokens=16),
     "prompt 'a' has 1 tokens; the model's 16 positions and max_new_tokens=16 allow 1 to 0: lower max_new_tokens, or"),
    ({}, ASKERS, dict(model="empty"), LOADED + "empty': this folder holds no tokenizer.json that can be read ("),
    ({}, ASKERS, dict(model="file"), LOADED + "file': this is a file; name the folder of a model"),
    ({}, ("annotate",), dict(scorer="two-labels"),
     "cannot load the reward model '{folders}/two-labels': {folders}/two-labels has 2 labels where a reward model has "
     "one: is it a classifier? If they are objectives, say which is the reward, --objectives mean, LABEL_0, LABEL_1"),
    ({"prompt": TALK}, ("annotate",), dict(scorer="scorer-no-template"),
     "{path}:2: the prompt is a list of messages but the tokenizer has no chat template"),
    ({}, ("annotate",), dict(scorer="world-est"), "{path}:1: this world cannot read the prompt 'why': score only its "),
)  # fmt: skip


def test_what_does_not_go_together(tmp_path, folders):
    path = tmp_path / "x.jsonl"
    for change, names, more, message in FITS:
        path.write_bytes(lines(ROW, ROW | {"id": "b"} | change))
        options = {key: folders / str(v) if (folders / str(v)).exists() else v for key, v in more.items()}
        for name in names:
            said = refused(name, path, tmp_path, folders, **options)
            assert said.startswith(message.format(path=path, folders=folders)), f"{name}: {said}"


# -- outputs that cannot be written: below a regular file, which root may not either, and over a folder --


def test_an_output_below_a_file_and_over_a_folder(tmp_path, folders):
    data, file = tmp_path / "x.jsonl", tmp_path / "file"
    file.write_text("tea")
    data.write_bytes(lines(ROW))
    for name in ("generate", "annotate", "eval", "train"):
        more = {"out": file / "run"} if name in ("eval", "train") else {"output": file / "r.safetensors"}
        said = refused(name, data, tmp_path, folders, **more)
        assert said.startswith(f"{file}") and "; choose another --" in said
    sizes = ["--train=2", "--valid=2", "--test=2", "--demonstrations=2"]
    with pytest.raises(ValueError, match=rf"cannot read or write {file}: File exists"):
        data_prep.main(["world", f"--out={file / 'world'}", *sizes])
    assert file.read_text() == "tea"
    (folder := tmp_path / "folder").mkdir()
    for name in ("export", "annotate"):
        said = refused(name, data, tmp_path, folders, output=folder)
        assert said == f"{folder}: cannot be written (Is a directory); what stood there before is untouched"
