"""A model card: what a run trained, from what, with which settings, and how it fared. Reads dicts, writes Markdown.

The values of run.json, summary.json and eval.json stand as they are there; what could be read as Markdown or HTML in
them is escaped, and of local paths the last part alone is shown.
"""

import json
import re
from pathlib import Path
from typing import Any

from hps.evaluate import md
from hps.evaluate.metrics import METRICS

PAPER = "https://arxiv.org/abs/2502.14400"
TOKENIZER = """\
from transformers import AutoTokenizer

folder = "."  # where this file lies
tokenizer = AutoTokenizer.from_pretrained(folder)
messages = [{"role": "user", "content": "Hi"}]
"""
USES = {  # of each kind of folder: how peft or transformers loads it
    "adapter": """
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained(folder)
""",
    "model": """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(folder)
""",
    "reward adapter": """
from peft import AutoPeftModelForSequenceClassification

model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
model.config.pad_token_id = None  # the reward is read off the last token
""",
    "reward model": """
from transformers import AutoModelForSequenceClassification

model = AutoModelForSequenceClassification.from_pretrained(folder)
""",
}
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


def is_local(path: str) -> bool:
    """Whether a model or a file is one of this machine's, not the hub's `owner/name`."""
    return Path(path).exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def name_of(path: str) -> str:
    """A hub name as it is; of a local path its last part, which says nothing about a machine."""
    return Path(path).name if is_local(path) else path


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    return md.table(header, (tuple(map(escape, row)) for row in rows))


def card(run: dict[str, Any], summary: dict[str, Any], *, kind: str, evaluation: dict[str, Any] | None = None) -> str:
    """The README.md of an exported folder, with the front matter that the Hugging Face hub reads.

    Args:
        run, summary: contents of run.json and summary.json. kind: one of USES. evaluation: content of eval.json.
    """
    settings, inputs = run["config"], run["inputs"]
    method = settings["method"] if settings["loss"] == "preference" else settings["loss"]
    start = name_of(settings["model"])

    front = {"library_name": "peft" if "adapter" in kind else "transformers"}
    front |= {"pipeline_tag": "text-classification" if "reward" in kind else "text-generation"}
    front |= {} if is_local(settings["model"]) else {"base_model": start.split("@")[0]}
    front |= {"tags": ["hps", "preference-optimization", method]}
    yaml = [f"{key}: {json.dumps(value)}" for key, value in front.items()]  # JSON is YAML too

    trained = [("method", method), ("start model", start), ("its weights, sha256", inputs["model"])]
    if "reference" in inputs:
        trained += [("reference", name_of(settings["reference"])), ("its weights, sha256", inputs["reference"])]
    trained += [("tokenizer, sha256", inputs["tokenizer"])]
    trained += [("data", name_of(settings["data"])), ("data, sha256", inputs["data"])]
    trained += [("processes", run["world_size"]), ("steps", summary["steps"])]
    # A run that was taken up again has measured its last part only.
    since = f", from step {first} on" if (first := summary.get("first_step", 0)) else ""
    trained += [(f"seconds{since}", round(summary["seconds"], 1)), (f"packed tokens{since}", summary["tokens"])]

    changed = [name for name in run.get("changed", settings) if name not in ("model", "data", "loss", "method")]
    values = [(name, name_of(settings[name]) if name == "reference" else settings[name]) for name in changed]
    counts = [(name, n) for name, n in summary["counts"].items() if n]
    parts = [
        "\n".join(["---", *yaml, "---"]),
        f"# {escape(method)} from {escape(start)}",
        f"Trained with hps, which implements [Hard Preference Sampling]({PAPER}) and its baselines.",
        f"## Use\n\n```python\n{TOKENIZER}{USES[kind]}{REWARD if 'reward' in kind else ANSWER}```",
        "## Training",
        _table(("what", "value"), trained),
        "Settings that differ from the defaults:" if "changed" in run else "Settings:",
        _table(("setting", "value"), values) if values else "none",
        "What was read of the data, and what was left out:",
        _table(("count", "number"), counts),
    ]
    if evaluation is not None:
        about = evaluation["config"]
        rows = []
        for name, m in evaluation["metrics"].items():
            mean, low, high = (f"{m[key]:z.{METRICS[name].digits}f}" for key in ("mean", "low", "high"))
            rows.append((METRICS[name].title, mean, f"{low} to {high}", m["prompts"], METRICS[name].meaning))
        parts += [
            "## Evaluation",
            f"On {escape(name_of(about['data']))}, against {escape(name_of(about['reference']))}; intervals are 95 % "
            "bootstrap intervals over prompts.",
            _table(("metric", "mean", "interval", "prompts", "what it is"), rows),
        ]
    return "\n\n".join(parts) + "\n"
