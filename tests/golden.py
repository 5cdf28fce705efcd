"""Golden trajectories: what short trainings of every method gave, to the ninth digit, and whether they still do.

    python tests/golden.py --check           every run again; the largest difference of each (a minute on two cores)
    python tests/golden.py --write           the file anew, after a change that is meant to change numbers

A run is six steps of `train.main` in fp32 on a world of its own, made from fixed seeds without the rest of the project:
the loss, the gradient's norm, the margin and gamma of every step, and the plan array by array. Every method is trained
as an adapter and with all its weights, by one process and by two. `test_golden.py` does a part of it in `make test`.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
from helpers import on_ranks

HERE = Path(__file__).resolve().parent
FILE = HERE / "golden.json"
COLUMNS = ("loss", "grad_norm", "rewards/margins", "gamma")
PLAN = ("row", "epoch", "responses", "log_q", "kappa", "gamma", "effective")

FULL_FORM = dict(hps_form="full", n_factor="n_minus_one")
LOSSES: dict[str, dict] = {"dpo": {}, "exo": {}, "ipo": {}, "sppo": dict(beta=0.05), "nca": {}}  # sppo overshoots 1 nat
METHODS: dict[str, dict] = {
    **{f"{loss}-{view}": more for loss, more in LOSSES.items() for view in ("bt", "pl", "hps")},
    "dpo-human": {},
    "dpo-uniform": {},
    "dpo-random": {},
    "kto-hps": {},
    "simpo-hps": dict(beta=2.0),
    "lipo-pl": dict(reference="other"),  # its ranks are rounding noise while policy = reference
    "sft": dict(loss="sft"),
    "reward": dict(loss="reward"),
    "exo-pl official": dict(pl_form="official"),
    "sppo-pl official": LOSSES["sppo"] | dict(pl_form="official"),
    "nca-pl official": dict(pl_form="official"),
    "dpo-pl five": dict(pl_responses=5),
    "dpo-hps draws": dict(hps_samples=3, reward_norm="zscore", gamma_schedule="mixture"),
    "dpo-hps penalty": dict(length_penalty=0.1, gamma_schedule="inclusive", shuffle="together"),
    "nca-hps full": FULL_FORM,
    "dpo-hps positives": FULL_FORM | dict(positives=2, positive_lambda="1,0.5"),
    "exo-hps positives": FULL_FORM | dict(positives=3, exclude_positives="true"),
}
WEIGHTS = {
    "lora": dict(lora_rank=4, lora_alpha=8, lr=2e-2),
    "full": dict(lora_rank=0, lr=1e-3),
}
RUNS = [f"{weights} {method}" for weights in WEIGHTS for method in METHODS]

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' <' + m['role'] + '> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def write_world(folder: Path) -> None:
    """Two random Llamas of two layers, model and other, and data.jsonl: 22 prompts of 1 to 7 rewarded responses."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [consonant + vowel for consonant in "bdfgklmn" for vowel in "aeiou"]
    specials = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(specials + words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    names = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    more = dict(chat_template=TEMPLATE, clean_up_tokenization_spaces=False, model_max_length=64)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names, **more)
    config = LlamaConfig(
        vocab_size=len(specials + words), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    for which in ("model", "other"):
        tokenizer.save_pretrained(folder / which)
        lm = LlamaForCausalLM(config)
        for name, p in lm.named_parameters():  # by name: the same whatever order a version of the model draws them in
            noise = np.random.default_rng(zlib.crc32(f"{which} {name}".encode())).standard_normal(tuple(p.shape))
            p.data = torch.from_numpy((1.0 if p.dim() == 1 else 0.0) + 0.15 * noise).float()
        lm.save_pretrained(folder / which)

    rng = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(least, most)))

    with (folder / "data.jsonl").open("w") as file:
        for i in range(22):
            n = 1 + i % 7 if i else 7
            responses = [text(1, 9) for _ in range(n)]
            rewards = [round(rng.uniform(-1.5, 1.5), 3) for _ in range(n)]
            if i in (6, 13):  # a copy of the best response with a lower reward, and a tie with it
                best = rewards.index(max(rewards))
                responses[best - 1] = responses[best]
                rewards[best - 2] = rewards[best]
            turns = [text(2, 6) for _ in range(3 if i % 5 == 0 else 1)]
            prompt = [{"role": ("user", "assistant")[t % 2], "content": turn} for t, turn in enumerate(turns)]
            row = {"id": f"row {i}", "prompt": prompt, "responses": responses, "rewards": rewards}
            if n > 1:
                row |= {"chosen": rng.randrange(n - 1), "rejected": n - 1}
            file.write(json.dumps(row) + "\n")


def arguments(run: str, world: Path, out: Path) -> list[str]:
    """The command line of a run."""
    weights, method, *_ = run.split(" ")
    kind = METHODS[run.removeprefix(f"{weights} ")]
    options = dict(
        model=world / "model", data=world / "data.jsonl", out=out, token_cache=world / "tokens", epochs=2,
        prompts_per_step=8, max_length=60, tokens_per_micro_batch=150,
    )  # fmt: skip
    if "loss" not in kind:
        options |= dict(method=method, beta=0.5)
        options |= dict(reference_cache=world / "reference") if method != "simpo-hps" else {}
    options |= WEIGHTS[weights] | kind | ({"reference": world / kind["reference"]} if "reference" in kind else {})
    return [f"--{key}={value}" for key, value in options.items()]


def play(run: str, world: Path) -> dict[str, list]:
    """Train it. The columns of its log, and for every array of its plan what tells it from another one."""
    import train
    from hps import plan as planning

    plans: list = []
    made = planning.Plan.__init__

    def record(self, *args, **fields) -> None:
        made(self, *args, **fields)
        plans.append(self)

    out = world / f"{run.replace(' ', '-')}-{os.environ.get('WORLD_SIZE', 1)}"
    planning.Plan.__init__ = record
    try:
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            train.main(arguments(run, world, out))
    finally:
        planning.Plan.__init__ = made
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, list] = {key: [line[key] for line in lines] for key in COLUMNS if key in lines[0]}
    for key in PLAN if "loss" not in METHODS[run.split(" ", 1)[1]] else PLAN[:3]:
        array = np.asarray(getattr(plans[-1], key))
        found[f"plan.{key}"] = [float(x) for x in array.shape]
        if array.dtype.kind == "i":
            digest = hashlib.sha256(np.ascontiguousarray(array, dtype="<i8").tobytes()).digest()
            found[f"plan.{key}"].append(float(int.from_bytes(digest[:3], "little")))
        else:  # a sum that changes with every entry and its place, and is the same to its last digits elsewhere
            found[f"plan.{key}"].append(float((array.ravel() * np.sin(1 + np.arange(array.size))).sum()))
    return found


def play_rank(runs: list[str], folder: Path) -> None:
    """In each of several ranks: the runs one after the other; the first rank writes down what they give."""
    import torch.distributed

    torch.distributed.destroy_process_group = lambda: None  # one group for all runs: joining a second one hangs
    found = {f"{os.environ['WORLD_SIZE']} {run}": play(run, folder) for run in runs}
    if os.environ["RANK"] == "0":
        (folder / "ranks.json").write_text(json.dumps(found))


def play_all(runs: list[str], ranks: int, folder: Path) -> dict[str, dict[str, list]]:
    """What each of the runs gives, in this process or on several ranks: {"1 lora dpo-bt": ...}."""
    if not (folder / "data.jsonl").exists():
        write_world(folder)
    if ranks == 1:
        return {f"1 {run}": play(run, folder) for run in runs}
    on_ranks(ranks, play_rank, (runs, folder), seconds=900)
    return json.loads((folder / "ranks.json").read_text())


def difference(found: dict[str, list], expected: dict[str, list]) -> float:
    """The largest relative difference between two runs; infinite where one has what the other has not."""
    if found.keys() != expected.keys() or any(len(found[key]) != len(expected[key]) for key in found):
        return float("inf")
    pairs = [pair for key in found for pair in zip(found[key], expected[key], strict=True)]
    apart = [abs(a - b) / max(abs(b), 0.1) for a, b in pairs]
    return max(apart) if np.isfinite(apart).all() else float("inf")


def load(file: Path = FILE) -> dict[str, dict[str, list]]:
    """The committed runs. A plan stands there once for each method: neither weights nor ranks may change it."""
    runs = json.loads(file.read_text())
    plans = {run[len("1 lora ") :]: values for run, values in runs.items() if run.startswith("1 lora ")}
    plans = {method: {k: v for k, v in values.items() if "plan." in k} for method, values in plans.items()}
    return {run: values | plans[run.split(" ", 2)[2]] for run, values in runs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    parser.add_argument("--check", action="store_true", help="compare with it, to --tolerance")
    parser.add_argument("--file", type=Path, default=FILE, help="another file")
    parser.add_argument("--tolerance", type=float, default=1e-6, help="relative, of the largest difference")
    parser.add_argument("--only", nargs="*", default=RUNS, help="some of the runs")
    given = parser.parse_args()
    sys.path.insert(0, os.getcwd())
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = play_all(given.only, 1, Path(folder)) | play_all(given.only, 2, Path(folder))
    if given.write:
        lines = (json.dumps(run) + ": " + short(run, values) for run, values in found.items())
        given.file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    if given.check:
        expected = load(given.file)
        differences = {run: difference(found[run], expected[run]) for run in found}
        for run, largest in differences.items():
            print(f"{largest:.1e}  {run}")
        wrong = [run for run, largest in differences.items() if largest > given.tolerance]
        print(f"{len(found)} runs, largest difference {max(differences.values()):.1e}")
        sys.exit(f"more than {given.tolerance:.0e}: {', '.join(wrong)}" if wrong else 0)


def short(run: str, values: dict[str, list]) -> str:
    """As JSON, with nine digits; the plan with the first run of a method only."""
    kept = {key: column for key, column in values.items() if "plan." not in key or run.startswith("1 lora ")}
    digits = {key: [float(f"{x:.9g}") for x in column] for key, column in kept.items()}
    whole = {key: [int(x) if x == int(x) else x for x in column] for key, column in digits.items()}
    return json.dumps(whole, separators=(",", ":"))


if __name__ == "__main__":
    main()
