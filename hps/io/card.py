"""The README.md of an exported folder: what a run trained, from what, with which settings; front matter for the hub.

The values of run.json and summary.json stand as they are there; what Markdown or HTML would read in them is escaped,
and of local paths the last part alone is shown, which says nothing about a machine.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAPER = "https://arxiv.org/abs/2502.14400"
# How each kind of folder is loaded: package, class, and what else that is told.
USES = {
    "adapter": ("peft", "AutoPeftModelForCausalLM", ""),
    "model": ("transformers", "AutoModelForCausalLM", ""),
    "reward adapter": ("peft", "AutoPeftModelForSequenceClassification", ", num_labels=1"),
    "reward model": ("transformers", "AutoModelForSequenceClassification", ""),
}
LOAD = """
from {package} import {name}

model = {name}.from_pretrained(folder{more})
"""
NO_PAD = "model.config.pad_token_id = None  # the reward is read off the last token\n"
BEGIN = """\
from transformers import AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{"role": "user", "content": "Hi"}]
"""
ANSWER = """
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**ids, max_new_tokens=256, do_sample=True, temperature=0.9)
print(tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
"""
REWARD = """
messages += [{"role": "assistant", "content": "Hello."}]
ids = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
print(model(**ids).logits.item())
"""


def escape(value: Any) -> str:
    """A value as text of a table's cell, with nothing in it that Markdown or HTML would read."""
    text = value if isinstance(value, str) else json.dumps(value)
    text = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r"([\\`*_\[\]<>#|~&$!])", r"\\\1", text)


def name_of(path: str) -> str:
    """A hub name, `owner/name`, as it is; the last part of a local path."""
    return Path(path).name if _is_local(path) else path


def _is_local(path: str) -> bool:
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table of escaped cells."""
    cells = [header, ["---"] * len(header), *([escape(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def card(run: dict[str, Any], summary: dict[str, Any], *, kind: str, results: str = "") -> str:
    """The whole page.

    Args:
        run, summary: contents of run.json and summary.json. kind: one of USES. results: a section on how the model
            fared, in Markdown; empty for none.
    """
    settings, inputs = run["config"], run["inputs"]
    method = settings["method"] if settings["loss"] == "preference" else settings["loss"]
    start = name_of(settings["model"])

    package, name, more = USES[kind]
    use = BEGIN + LOAD.format(package=package, name=name, more=more) + (NO_PAD if more else "")
    front: dict[str, Any] = {"library_name": package}
    front["pipeline_tag"] = "text-classification" if "reward" in kind else "text-generation"
    front |= {} if _is_local(settings["model"]) else {"base_model": start.split("@")[0]}
    front["tags"] = ["hps", "preference-optimization", method]
    yaml = [f"{key}: {json.dumps(value)}" for key, value in front.items()]  # JSON is YAML too

    trained = [("method", method), ("start model", start), ("its weights, sha256", inputs["model"])]
    if "reference" in inputs:
        trained += [("reference", name_of(settings["reference"])), ("its weights, sha256", inputs["reference"])]
    trained += [("tokenizer, sha256", inputs["tokenizer"])]
    trained += [("data", name_of(settings["data"])), ("data, sha256", inputs["data"])]
    trained += [("processes", run["world_size"]), ("steps", summary["steps"])]
    trained += [("kept, of the lowest held-out loss: step", summary["kept_step"])] if "kept_step" in summary else []
    trained += [("seconds", round(summary["seconds"], 1)), ("packed tokens", summary["tokens"])]

    changed = [name for name in run["changed"] if name not in ("model", "data", "loss", "method")]
    values = [(name, name_of(settings[name]) if name == "reference" else settings[name]) for name in changed]
    parts = [
        "\n".join(["---", *yaml, "---"]),
        f"# {escape(method)} from {escape(start)}",
        f"Trained with hps, which implements [Hard Preference Sampling]({PAPER}) and its baselines.",
        f"## Use\n\n```python\n{use}{REWARD if 'reward' in kind else ANSWER}```",
        "## Training",
        table(("what", "value"), trained),
        "Settings that differ from the defaults:",
        table(("setting", "value"), values) if values else "none",
        "What was read of the data, and what was left out:",
        table(("count", "number"), [(name, n) for name, n in summary["counts"].items() if n]),
        results,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
