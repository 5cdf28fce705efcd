"""What comes from outside is data: no pickle, no code of a model's, no path, no key and no markup gets its way."""

import json
import logging
import pickle
import re
import shutil
import traceback
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
import yaml
from harness import EVALUATION, RUN, SUMMARY
from helpers import arguments, chat_server, classifier, completion, flags, jsonl, results, run, save
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM, AutoTokenizer

import data_prep
import eval as evaluation
import train
from hps import adapters, checkpoint, pretrained
from hps.data import listwise
from hps.data.rows import Row
from hps.evaluate import endpoint, export, judge, report, survey
from hps.extra import reward_model
from hps.io import card

FP32 = dict(dtype=torch.float32)


# ---- pickles, and code that a model brings

PICKLES = (".metadata", "__0_0.distcp", "pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin")


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def bombs(tmp_path, monkeypatch):
    """plant(folder) puts pickles there; afterwards nothing has read one, and none has gone off."""
    mark, read = tmp_path / "went off", []
    bomb = pickle.dumps(Bomb(mark))
    pickle.loads(bomb)
    assert mark.exists(), "a bomb that is none shows nothing"
    mark.unlink()

    def plant(folder: Path) -> None:
        for name in PICKLES:
            (folder / name).write_bytes(bomb)

    def watched(name, real):
        def called(*args, **kwargs):
            read.append((name, traceback.extract_stack(limit=4)[0].filename))
            return real(*args, **kwargs)

        return called

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, watched(f"{module.__name__}.{name}", getattr(module, name)))
    yield plant
    assert not mark.exists() and not read, read


@pytest.mark.parametrize("lora", [{}, dict(lora_rank=2, lora_alpha=4)], ids=["full", "lora"])
def test_a_checkpoint_is_resumed_without_a_pickle(tiny_world, tmp_path, bombs, lora):
    out, options = tmp_path / "run", dict(epochs=1, **lora)
    run(tiny_world, out, stop_after=2, **options)
    folder = checkpoint.latest(out / "checkpoints")
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jsonl", ".safetensors"}
    bombs(folder)
    assert len(run(tiny_world, out, **options)) == 3 and (out / "policy").exists()


@pytest.fixture(scope="module")
def models(tiny_world, tmp_path_factory) -> dict[str, Path]:
    """A folder of each kind that is loaded, by kind."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_world / "model", root / "policy")
    classifier(AutoTokenizer.from_pretrained(tiny_world / "model"), root / "reward")
    made = dict(rank=2, alpha=4, targets=["q_proj"], seed=0)
    for kind, load, task in (("policy", pretrained.load_causal_lm, "CAUSAL_LM"),
                             ("reward", reward_model.load_reward_model, "SEQ_CLS")):  # fmt: skip
        lm = adapters.add_lora(load(str(root / kind), **FP32), task=task, **made)
        lm.peft_config["default"].base_model_name_or_path = str(root / kind)
        lm.save_pretrained(root / f"{kind} adapter")
    return {kind: root / kind for kind in ("policy", "reward", "policy adapter", "reward adapter")}


def loader(kind: str):
    return reward_model.load_reward_model if kind.startswith("reward") else pretrained.load_causal_lm


@pytest.mark.parametrize("kind", ["policy", "reward", "policy adapter", "reward adapter"])
def test_a_model_beside_pickles_is_loaded_and_of_pickles_alone_refused(models, kind, tmp_path, bombs):
    folder = tmp_path / "model"
    shutil.copytree(models[kind], folder)
    bombs(folder)
    loader(kind)(str(folder), **FP32)
    [weights] = folder.glob("*.safetensors")
    weights.unlink()
    with pytest.raises(ValueError) as refused:
        loader(kind)(str(folder), **FP32)
    said = str(refused.value)
    assert str(folder) in said and ".bin is a pickle, which can run code" in said and "\n" not in said


def test_an_adapter_of_an_adapter_and_one_without_a_base_are_refused(models, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models["policy adapter"], folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    for base in (str(folder), None, 3, str(tmp_path / "gone")):  # its own base: loading would never end
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match="adapter_config.json: base_model_name_or_path, .* is no model"):
            pretrained.load_causal_lm(str(folder), **FP32)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json: cannot be read"):
        pretrained.load_causal_lm(str(folder), **FP32)


def test_code_of_a_model_does_not_run(models, tiny_world, tmp_path, monkeypatch):
    """A folder of an unknown architecture, whose own code makes a file; a user who is asked would say yes."""
    mark, asked, folder = tmp_path / "ran", [], tmp_path / "odd"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    shutil.copytree(models["policy"], folder)
    names = ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification")
    brings = {"AutoConfig": "odd.Config"} | dict.fromkeys(names, "odd.Odd")
    for name, more in (("config", {"model_type": "odd", "auto_map": brings}),
                       ("tokenizer_config", {"auto_map": {"AutoTokenizer": ["odd.Tokenizer", None]}})):  # fmt: skip
        about = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(about | more))
    (folder / "custom_generate").mkdir()
    for path in ("odd.py", "custom_generate/generate.py"):
        (folder / path).write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    named, data = str(folder), tiny_world / "train.jsonl"
    shared = dict(model=named, reference=named, data=data, samples=0, reference_cache=tmp_path / "cache")
    calls = [
        lambda: pretrained.load_causal_lm(named, **FP32),
        lambda: reward_model.load_reward_model(named, **FP32),
        lambda: reward_model.load_reward_model(named, begin=True, **FP32),
        lambda: train.main(arguments(tiny_world, tmp_path / "run", model=named)),
        lambda: evaluation.main(flags(out=tmp_path / "eval", **shared)),
        lambda: data_prep.main(["generate", *flags(model=named, input=data, output=tmp_path / "g.jsonl")]),
        lambda: data_prep.main(["annotate", *flags(scorer=named, input=data, output=tmp_path / "a.jsonl")]),
    ]
    for call in calls:
        with pytest.raises(ValueError) as refused:
            call()
        assert "\n" not in str(refused.value) and named in str(refused.value)
        assert not mark.exists()
    assert not asked, "nobody is asked whether to run it"
    with pytest.raises(Exception, match="odd"):  # asked to, transformers runs it: so there is something to stop
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert mark.exists()


# ---- paths

IDS = ["../../x", "../../../../../../../../etc/hps-x", "/etc/hps-x", "a\x00b", "x" * 5000, "..", ".", "a/b", "a\nb",
       "~root", "$(touch x)", "`touch x`", "-rf", "%2e%2e%2fx", "shard-x.safetensors", "caf\u00e9"]  # fmt: skip
KEY = "sk-test/0123456789+secret\"'&end"


def snapshot(root: Path, without: Path) -> dict[Path, bytes]:
    paths = [path for path in root.rglob("*") if without != path and without not in path.parents]
    return {path: path.read_bytes() if path.is_file() else b"a folder" for path in paths}


def test_no_id_leads_out_of_the_folder_of_the_output(tmp_path, monkeypatch, request):
    # Or one failure makes all later ones.
    request.addfinalizer(lambda: [path.unlink() for path in Path("/etc").glob("hps-x*")])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.01)
    out = tmp_path / "a/b/c/out"
    for folder in (out, tmp_path / "cwd", tmp_path / "in"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    lm, scorer = save(tmp_path / "in/lm"), save(tmp_path / "in/scorer", labels=1)
    data = tmp_path / "in/x.jsonl"
    row = {"prompt": "why", "responses": ["tea is hot", "cold"], "rewards": [1, 0], "chosen": 0, "rejected": 1}
    data.write_text("".join(json.dumps(row | {"id": id, "source": id}) + "\n" for id in IDS))
    hostile = results(*(f"../{n}/../../x" for n in range(3)))
    caches = dict(token_cache=out / "tokens", reference_cache=out / "references")
    sampled = dict(data=data, reference=lm, samples=2, max_new_tokens=4, scorer=scorer)
    samples = f"a={out}/eval/samples.jsonl", f"b={out}/eval2/samples.jsonl"
    made = out / "candidates.jsonl"

    def ask(number, text):
        return completion(json.dumps(dict.fromkeys(judge.CRITERIA, 3)))

    with chat_server(ask) as server:
        work = {
            "generate": lambda: data_prep.main(
                ["generate", *flags(model=lm, input=data, output=made, n=2, max_new_tokens=4)]),
            "annotate": lambda: data_prep.main(["annotate", *flags(scorer=scorer, input=data, output=out / "a.jsonl")]),
            "export": lambda: data_prep.main(["export", *flags(input=data, output=out / "t.jsonl")]),
            "train": lambda: train.main(flags(
                model=lm, data=data, out=out / "run", method="dpo-bt", lora_rank=0, lr=1e-3, epochs=1, max_length=16,
                sample_every=1, sample_prompts=16, save_every=1, prompts_per_step=8, **caches)),
            "eval": lambda: evaluation.main(flags(
                model=lm, out=out / "eval", reference_cache=caches["reference_cache"], **sampled)),
            "eval again": lambda: evaluation.main(flags(
                model=out / "run/policy", out=out / "eval2", reference_cache=caches["reference_cache"], **sampled)),
            "judge": lambda: judge.main(flags(
                methods=samples, baseline="a", out=out / "judge", endpoint=server.url, judge_model="j")),
            "survey": lambda: survey.main(["export", *flags(methods=samples, out=out / "study", items=len(IDS))]),
            "report": lambda: report.write_report(hostile, out / "report"),
        }  # fmt: skip
        before = snapshot(tmp_path, out)
        for name, command in work.items():
            command()
            assert snapshot(tmp_path, out) == before, name
            assert not list(Path("/etc").glob("hps-x*")), name
    assert {row.id for row in listwise.read(made)} == set(IDS)  # they came through as they are
    key = json.loads((out / "study/key.json").read_text())
    assert {pair["prompt"] for pair in key["pairs"]} == set(IDS)


# ---- keys

FORMS = {KEY, json.dumps(KEY)[1:-1], json.dumps(KEY)[1:-1].replace("/", r"\/"), quote(KEY, safe=""),
         KEY.replace("&", "&amp;").replace('"', "&quot;").replace("'", "&#x27;")}  # fmt: skip


def says(form: str, echo: dict[str, str]) -> str:
    """What a server makes of the headers that it was sent, in one of the ways in which texts are written."""
    sent = "; ".join(f"{name}: {value}" for name, value in echo.items())
    return {
        "text": sent, "json": json.dumps({"error": sent}), "php": json.dumps({"error": sent}).replace("/", r"\/"),
        "url": quote(sent, safe=""),
        "html": sent.replace("&", "&amp;").replace('"', "&quot;").replace("'", "&#x27;"),
        # A message is shown up to a length; here that ends within the key, whose beginning would be left.
        "cut": "-" * (endpoint.MESSAGE_CHARS - len("HTTP 400: Bearer ") - 20) + echo["Authorization"],
    }[form]  # fmt: skip


@pytest.fixture
def words(tmp_path, monkeypatch, caplog):
    """What a judge of two small files is told, and its key where it may be."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)
    caplog.set_level(logging.DEBUG)
    for name, text in (("a", "one"), ("b", "two")):
        listwise.write(tmp_path / f"{name}.jsonl", [Row("p", "why", (text,))])
    methods = (f"a={tmp_path}/a.jsonl", f"b={tmp_path}/b.jsonl")
    return dict(methods=methods, baseline="a", out=tmp_path / "out", judge_model="j", attempts=2)


ECHOES = [(400, form) for form in ("text", "json", "php", "url", "html", "cut")] + [(200, "json")]


@pytest.mark.parametrize(("status", "form"), ECHOES)
def test_a_key_is_in_no_file_and_no_message(status, form, words, capfd, caplog):
    """A judge whose server repeats every header that it gets: in an answer, in its name, in an error."""

    def echo(number, text):
        said = says(form, dict(server.requests[number]["headers"].items()))
        return completion(said, model=said) if status == 200 else (status, {}, said)

    said = ""
    with chat_server(echo) as server:
        try:
            judge.main(flags(**words, endpoint=server.url, key_variable="JUDGE_KEY"))
        except ValueError as error:
            said = "".join(traceback.format_exception(error))
    assert bool(said) == (status != 200)
    assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    written = "".join(path.read_text() for path in words["out"].rglob("*") if path.is_file())
    shown = {"files": written, "message": said, "output": "".join(capfd.readouterr()), "log": caplog.text}
    # The files are JSON, which would write a quote of the key with one more backslash.
    shown |= {"decoded": json.dumps(jsonl(words["out"] / "answers.jsonl"), ensure_ascii=False)}
    for where, text in shown.items():
        assert not [key for key in (*FORMS, "0123456789") if key in text], where
    assert "[key]" in written + said


def test_a_key_in_the_place_of_its_variable_is_not_shown(words, capfd):
    with pytest.raises(ValueError, match="--key_variable") as refused:
        judge.main(flags(**words, endpoint="http://127.0.0.1:9", key_variable=KEY))
    assert "0123456789" not in "".join([*traceback.format_exception(refused.value), *capfd.readouterr()])


# ---- markup

HOSTILE = [
    "<script>window.ran = 1</script> a|b\\|c `x`",
    "\"><img src=x onerror='window.ran = 1'> $\\frac{$ &lt;b&gt;",
    "</script><script>window.ran = 1</script><svg onload=ran=1>\n\n# head\n\n| a | b |",
]
LINK = "![y](http://127.0.0.1:9/y.png) [x](javascript:window.ran=1) `` ` `` ![z](http://127.0.0.1:9/z.png)"
MARKED = f"{HOSTILE[2]} *e* _f_ ~~g~~ \x1b[2J"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """report.html, RESULTS.md and a model card, all of hostile texts; both Markdown files as HTML."""
    out = tmp_path_factory.mktemp("hostile")
    found = results(*HOSTILE) | {"suite": HOSTILE[0], "commit": f"{HOSTILE[1]} {LINK}", "machine": LINK}
    found["settings"] = {HOSTILE[2]: LINK, LINK: {HOSTILE[1]: HOSTILE[0]}}
    found["claims"] = [
        {"table": "Claims", "claim": LINK, "paper": HOSTILE[2], "verdict": "not measured here", "reason": HOSTILE[0]}
    ]
    x = {"label": HOSTILE[1], "values": {HOSTILE[0]: 1, HOSTILE[1]: 2}}
    found["series"] = {"n": {"x": x, "panels": ["rm2"], "lines": {f"{HOSTILE[2]} {LINK}": [HOSTILE[0], HOSTILE[1]]}}}
    report.write_report(found, out)
    about = dict(RUN["config"], model=HOSTILE[0], data=f"{HOSTILE[1]} {LINK}", method=MARKED, lora_targets=LINK)
    run, summary = RUN | {"config": about, "changed": ["model", "lora_targets"]}, SUMMARY | {"counts": {LINK: 1}}
    evaluated = EVALUATION | {"config": {"model": "policy", "data": LINK, "reference": HOSTILE[2]}}
    (out / "card.md").write_text(card.card(run, summary, kind="model", results=export.results(evaluated)))
    # As permissive as a viewer may be.
    render = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render
    for name in ("RESULTS", "card"):
        body = re.sub(r"\A---\n.*?\n---\n", "", (out / f"{name}.md").read_text(), flags=re.DOTALL)  # front matter
        (out / f"{name}.html").write_text(f"<!DOCTYPE html><meta charset=utf-8><title>{name}</title>\n{render(body)}")
    return out


@pytest.mark.parametrize("name", ["RESULTS", "card"])
def test_markdown_of_hostile_texts_holds_no_tag_and_no_link(written, name):
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: tags.append((tag, dict(attrs)))
    parser.feed((written / f"{name}.html").read_text())
    if name == "card":  # its front matter is quoted, not escaped
        assert "\x1b" not in (written / "card.md").read_text()
        assert yaml.safe_load((written / "card.md").read_text().split("---\n")[1])["tags"][-1] == MARKED
    allowed = {"meta", "title", "h1", "h2", "p", "ul", "li", "code", "pre", "table", "thead", "tbody", "tr", "th", "td",
               "img", "a"} | ({"strong", "em"} if name == "RESULTS" else set())  # fmt: skip
    assert {tag for tag, _ in tags} <= allowed and [tag for tag, _ in tags].count("h1") == 1
    assert all(re.fullmatch(r"figures/\w+\.png", attrs["src"]) for tag, attrs in tags if tag == "img")
    assert {attrs["href"] for tag, attrs in tags if tag == "a"} <= {card.PAPER}


def test_a_browser_shows_hostile_texts_and_runs_none(written, browser, tmp_path):
    """Of the report; what a browser would run of the two others is a tag or a link, and they hold none."""
    bad = tmp_path / "bad.html"  # the same texts as they are: there something runs, or this test shows nothing
    bad.write_text(f"<!DOCTYPE html><title>x</title>{HOSTILE[0]}{HOSTILE[1]}")
    browser.open(bad)
    assert browser.js("window.ran") == 1
    path = written / "report.html"
    browser.open_fresh(path)
    shown = browser.js("[...document.querySelectorAll('td, th')].map(cell => cell.textContent)")
    for text in [*HOSTILE, LINK]:
        assert any(" ".join(text.split()) in " ".join(each.split()) for each in shown), text
    assert browser.js("window.ran ?? null") is None
    assert browser.js("document.querySelectorAll('[onerror], [onload], svg, iframe').length") == 0
    asked = {url for url in browser.requests() if not url.startswith("data:")}
    assert asked - {path.as_uri()} <= {p.as_uri() for p in (written / "figures").iterdir()}
    assert browser.log("browser") == []
