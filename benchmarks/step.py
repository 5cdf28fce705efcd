"""Training steps: ours and TRL's DPOTrainer on the same pairs, tokens and LoRA, and the matrix products below both.

    make model && python benchmarks/step.py --data harmless-base.jsonl.gz --dtype fp32

Rounds alternate the contestants, each in a process of its own on its share of the pairs: a reference pass, then
--epochs epochs of DPO on the human pairs, both counted. TRL runs with precomputed reference log-probs, without gradient
checkpointing, at the fastest of batch 1, 2 and 4 (tried first on 8 pairs). Peak memory is what a process holds above
its loaded weights. The floor is the bare products x W^T and g W of our own micro-batches: a frozen weight has no other.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import torch

from hps import config, model, pretrained, reference
from hps.data import listwise, tokenizers, tokens
from hps.prepare import importers

RANK, ALPHA, TARGETS, STEP = 8, 16, ("q_proj", "v_proj"), 8  # LoRA, and pairs of an optimizer step


@dataclass
class Options:
    data: str  # HH-RLHF rows (.jsonl, .gz)
    model: str = "runs/models/smollm2-135m-instruct"  # a Llama-like model folder, the one of `make model`
    dtype: str = "fp32"  # fp32 or bf16
    threads: int = 2  # OpenMP threads of a contestant
    pairs: int = 128  # all rounds together
    rounds: int = 4  # in which both contestants take their turn
    epochs: int = 2  # after the reference pass
    tokens_per_micro_batch: int = 1024  # ours
    lora_rank: int = RANK  # 0 trains all weights


def clocked(owner: Any, name: str) -> list[float]:
    """Seconds of each call of a function of this module or class, from now on."""
    function, taken = getattr(owner, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = function(*args, **kwargs)
        taken.append(time.perf_counter() - began)
        return found

    setattr(owner, name, timed)
    return taken


def before_training(lm: torch.nn.Module) -> float:
    """MiB held with the weights in memory; they are mapped from the file until somebody reads them."""
    sum(p.sum().item() for p in lm.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is held now
    return harness.memory("VmRSS")


def ours(c: Options, rows: list, _batch: int, folder: Path) -> dict[str, Any]:
    """train.py as a user runs it, with its clocks read and the shapes of its micro-batches written down."""
    listwise.write(folder / "pairs.jsonl", rows)
    before, shapes = [], []
    load, forward = pretrained.load_causal_lm, model.PolicyModel.forward

    def loaded(*args: Any, **kwargs: Any) -> Any:
        lm = load(*args, **kwargs)
        before.append(before_training(lm))
        return lm

    def watched(self: model.PolicyModel, packed: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            shapes.append((packed.input_ids.numel(), len(packed.targets)))
        return forward(self, packed)

    pretrained.load_causal_lm, model.PolicyModel.forward = loaded, watched
    filled = clocked(reference, "fill")
    options = dict(
        model=c.model, data=folder / "pairs.jsonl", out=folder / "run", reference_cache=folder / "cache", dtype=c.dtype,
        method="dpo-human", lora_rank=c.lora_rank, epochs=c.epochs, prompts_per_step=STEP, lr_end=1.0,
        tokens_per_micro_batch=c.tokens_per_micro_batch, token_cache=folder / "tokens",
    )  # fmt: skip
    if c.lora_rank:
        options |= dict(lora_alpha=ALPHA, lora_targets=",".join(TARGETS))
    loop, peak = harness.train(**options)["seconds"], harness.memory("VmHWM") - before[-1]
    log = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {"reference": sum(filled), "loop": loop, "peak": peak, "shapes": shapes, "log": log}


def floor(c: Options, shapes: list[tuple[int, int]]) -> float:
    """Seconds of the matrix products of training micro-batches with N packed and T scored tokens, x W^T and g W of
    every weight. Weights take turns as in a step, so that none is still in a cache."""
    torch.set_num_threads(c.threads)
    lm, taken = pretrained.load_causal_lm(c.model, dtype=model.DTYPES[c.dtype]), 0.0
    layers = [m.weight for name, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    head = lm.get_output_embeddings().weight
    with torch.inference_mode():
        for N, T in shapes:
            inputs = {width: torch.randn(N, width, dtype=head.dtype) for w in layers for width in w.shape}
            states = torch.randn(T, head.shape[1], dtype=head.dtype)
            began = time.perf_counter()
            for w in layers:
                inputs[w.shape[1]] @ w.T
                inputs[w.shape[0]] @ w
            for part in states.split(256):  # whole logits would not fit beside the rest
                (part @ head.T) @ head
            taken += time.perf_counter() - began
    return taken


def trl(c: Options, rows: list, batch: int, folder: Path) -> dict[str, Any]:
    """DPOTrainer with the settings of the docstring, on the very token ids of ours."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = tokenizers.load_tokenizer(c.model)
    examples = list(tokens.tokenize(tokenizer, rows, {}, max_length=2048))
    records = [{
        "prompt": tokenizer.decode(tokens.Encoder(tokenizer).prompt(row.prompt)),
        "chosen": row.responses[row.chosen],
        "rejected": row.responses[row.rejected],
    } for row in rows]  # fmt: skip
    lm = AutoModelForCausalLM.from_pretrained(c.model, dtype=model.DTYPES[c.dtype])
    before, computed = before_training(lm), clocked(DPOTrainer, "_precompute_ref_logps")
    arguments = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=STEP // batch,
        num_train_epochs=c.epochs, precompute_ref_log_probs=True, gradient_checkpointing=False, max_length=2048,
        learning_rate=1e-5, lr_scheduler_type="constant", use_cpu=not torch.cuda.is_available(), bf16=False,
        report_to="none", save_strategy="no", logging_strategy="steps", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    adapter = None
    if c.lora_rank:
        adapter = LoraConfig(r=c.lora_rank, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    about = dict(args=arguments, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    trainer = DPOTrainer(lm, peft_config=adapter, **about)
    for example, theirs in zip(examples, trainer.train_dataset, strict=True):
        mine = example.prompt_ids, example.response_ids[example.chosen], example.response_ids[example.rejected]
        both = zip(mine, (theirs[f"{key}_ids"] for key in ("prompt", "chosen", "rejected")), strict=True)
        if any(list(a) != list(b) for a, b in both):
            raise RuntimeError(f"{example.id}: TRL tokenises this row otherwise, so the two cannot be compared")
    loop, log = harness.seconds(trainer.train), [one for one in trainer.state.log_history if "grad_norm" in one]
    return {"reference": sum(computed), "loop": loop, "peak": harness.memory("VmHWM") - before, "log": log}


def in_folder(contestant: Callable[..., dict], c: Options, rows: list, batch: int) -> dict[str, Any]:
    torch.set_num_threads(c.threads)
    with tempfile.TemporaryDirectory() as folder:
        return contestant(c, rows, batch, Path(folder))


def measure(contestant: Callable[..., dict], c: Options, rows: list, batch: int = 0) -> dict[str, float]:
    """What a contestant found, ours with the floor; `rate` is pairs per second, the reference's pass counted."""
    found = harness.alone(in_folder, contestant, c, rows, batch)
    del found["log"]
    if shapes := found.pop("shapes", []):
        found["floor"] = harness.alone(floor, c, shapes)
        found["over"] = found["loop"] / found["floor"]
    return found | {"rate": len(rows) * c.epochs / (found["reference"] + found["loop"])}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/step.py", description=str(__doc__).split("\n")[0])
    rows = list(importers.import_file("hh-rlhf", c.data, limit=c.pairs).rows)
    trials = {batch: measure(trl, c, rows[:8], batch)["rate"] for batch in (1, 2, 4)}
    best = max(trials, key=trials.__getitem__)
    print("TRL, pairs/s on 8 pairs: " + ", ".join(f"batch {b} {rate:.3f}" for b, rate in trials.items()))
    by_name = {"ours": (ours, 0), "trl": (trl, best)}

    def one(name: str, r: int) -> dict[str, float]:
        contestant, batch = by_name[name]
        return measure(contestant, c, rows[r :: c.rounds], batch)

    found = harness.take_turns(by_name, c.rounds, one)
    median = harness.medians(found)
    table = [[name, *(m[key] for key in ("rate", "reference", "loop", "peak"))] for name, m in median.items()]
    table.append(["floor", "", "", median["ours"]["floor"], ""])
    title = f"{len(rows)} pairs, {c.dtype}, {c.threads} threads, medians of {c.rounds} rounds"
    harness.print_table(["", "pairs/s", "reference s", "loop s", "peak MiB"], table, title)
    ratios = {
        "pairs_per_s_over_trl": harness.ratio(found, "ours", "trl", "rate"),
        "peak_memory_over_trl": median["ours"]["peak"] / median["trl"]["peak"],
        "step_over_floor": median["ours"]["over"],
    }
    settings = {"pairs": len(rows), "dtype": c.dtype, "threads": c.threads, "trl_batch": best}
    harness.finish(settings | {key: round(value, 3) for key, value in ratios.items()} | {"medians": median})


if __name__ == "__main__":
    config.run_main(main)
