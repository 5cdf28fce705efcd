"""Training steps: ours and TRL's DPOTrainer on the same pairs, tokens and LoRA, and the matrix products below both.

    make model && python benchmarks/step.py --data harmless-base.jsonl.gz --dtype fp32

Rounds alternate the contestants, each in a process of its own on its share of the pairs: a reference pass, then
--epochs epochs of DPO on the human pairs, both counted. TRL runs with precomputed reference log-probs, without gradient
checkpointing, at the fastest of batch 1, 2 and 4 (tried first on 8 pairs). Peak memory is what a process holds above
its loaded weights. The floor is the bare products x W^T and g W of our own micro-batches: a frozen weight has no other.
The last line is JSON.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from hps import config, model, reference
from hps.data import tokens
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


class Memory:
    """MiB above what the process held at `begin` (Linux: the high-water mark can be reset)."""

    def begin(self, lm: torch.nn.Module) -> None:
        sum(p.sum().item() for p in lm.parameters())  # weights are mapped from the file until somebody reads them
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._status("VmRSS")

    def peak(self) -> float:
        return self._status("VmHWM") - self.before

    def _status(self, key: str) -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) / 1024
        raise RuntimeError(f"no {key}: this benchmark needs Linux")


class Clock:
    """Seconds spent inside wrapped functions."""

    seconds = 0.0

    def wrap(self, function):
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def ours(c: Options, rows: list, _batch: int, folder: Path) -> dict[str, Any]:
    """train.py as a user runs it, with its clocks read and the shapes of its micro-batches written down."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # train.py is a script, no package
    import train
    from hps.data import listwise

    listwise.write(folder / "pairs.jsonl", rows)
    clock, memory, shapes = Clock(), Memory(), []
    load, forward = model.load_causal_lm, model.PolicyModel.forward

    def loaded(*args: Any, **kwargs: Any) -> Any:
        lm = load(*args, **kwargs)
        memory.begin(lm)
        return lm

    def watched(self: model.PolicyModel, packed: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            shapes.append((packed.input_ids.numel(), len(packed.targets)))
        return forward(self, packed)

    model.load_causal_lm, model.PolicyModel.forward = loaded, watched
    reference.fill = clock.wrap(reference.fill)
    options = dict(
        model=c.model, data=folder / "pairs.jsonl", out=folder / "run", reference_cache=folder / "cache", dtype=c.dtype,
        method="dpo-human", lora_rank=RANK, lora_alpha=ALPHA, lora_targets=",".join(TARGETS), epochs=c.epochs,
        prompts_per_step=STEP, tokens_per_micro_batch=c.tokens_per_micro_batch, token_cache=folder / "tokens",
    )  # fmt: skip
    train.main([f"--{key}={value}" for key, value in options.items()])
    loop = json.loads((folder / "run/summary.json").read_text())["seconds"]
    peak = memory.peak()
    first_epoch = shapes[: len(shapes) // c.epochs]
    floor = c.epochs * products(c, first_epoch)
    return {"reference": clock.seconds, "loop": loop, "peak": peak, "floor": floor}


def products(c: Options, shapes: list[tuple[int, int]]) -> float:
    """Seconds of the matrix products of training micro-batches with N packed and T scored tokens: x W^T and g W."""
    lm = model.load_causal_lm(c.model, dtype=model.DTYPES[c.dtype])
    layers = [m.weight for name, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    head = lm.get_output_embeddings().weight
    seconds = 0.0
    with torch.inference_mode():
        for N, T in shapes:
            inputs = {width: torch.randn(N, width, dtype=head.dtype) for w in layers for width in w.shape}
            states = torch.randn(T, head.shape[1], dtype=head.dtype)
            began = time.perf_counter()
            for w in layers:
                inputs[w.shape[1]] @ w.T
                inputs[w.shape[0]] @ w
            for i in range(0, T, 256):  # whole logits would not fit beside the rest
                logits = states[i : i + 256] @ head.T
                logits @ head
            seconds += time.perf_counter() - began
    return seconds


def trl(c: Options, rows: list, batch: int, folder: Path) -> dict[str, Any]:
    """DPOTrainer with the settings of the docstring, on the very token ids of ours."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = tokens.load_tokenizer(c.model)
    examples, _ = tokens.tokenize_rows(tokenizer, rows, max_length=2048, progress=False)
    records = [{
        "prompt": tokenizer.decode(tokens.encode_prompt(tokenizer, row.prompt)),
        "chosen": row.responses[row.chosen],
        "rejected": row.responses[row.rejected],
    } for row in rows]  # fmt: skip
    lm = AutoModelForCausalLM.from_pretrained(c.model, dtype=model.DTYPES[c.dtype])
    memory, clock = Memory(), Clock()
    memory.begin(lm)
    DPOTrainer._precompute_ref_logps = clock.wrap(DPOTrainer._precompute_ref_logps)
    arguments = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=batch, gradient_accumulation_steps=STEP // batch,
        num_train_epochs=c.epochs, precompute_ref_log_probs=True, gradient_checkpointing=False, max_length=2048,
        learning_rate=1e-5, use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        lm, args=arguments, train_dataset=Dataset.from_list(records), processing_class=tokenizer, peft_config=adapter
    )
    for example, theirs in zip(examples, trainer.train_dataset, strict=True):
        ours = example.response_ids[example.chosen], example.response_ids[example.rejected]
        both = zip((example.prompt_ids, *ours), (theirs[f"{key}_ids"] for key in ("prompt", "chosen", "rejected")))
        if any(list(a) != list(b) for a, b in both):
            raise RuntimeError(f"{example.id}: TRL tokenises this row otherwise, so the two cannot be compared")
    began = time.perf_counter()
    trainer.train()
    return {"reference": clock.seconds, "loop": time.perf_counter() - began, "peak": memory.peak()}


def child(contestant, c: Options, rows: list, batch: int, out: Connection) -> None:
    torch.set_num_threads(c.threads)
    with tempfile.TemporaryDirectory() as folder:
        out.send(contestant(c, rows, batch, Path(folder)))


def in_fresh_process(function, *arguments: Any) -> Any:
    """What `function(*arguments, connection)` sends, from a process of its own; ends the benchmark if it fails."""
    spawn = multiprocessing.get_context("spawn")
    receive, send = spawn.Pipe(duplex=False)
    process = spawn.Process(target=function, args=(*arguments, send))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        sys.exit("a contestant failed; its output stands above")
    finally:
        process.join()


def measure(contestant, c: Options, rows: list, batch: int = 0) -> dict[str, Any]:
    """What a contestant found; `rate` is pairs a second over all passes, the reference's counted."""
    found = in_fresh_process(child, contestant, c, rows, batch)
    return found | {"rate": len(rows) * c.epochs / (found["reference"] + found["loop"])}


def main() -> None:
    c, _ = config.parse(Options, prog="benchmarks/step.py", description=str(__doc__).split("\n")[0])
    rows = importers.import_file("hh-rlhf", c.data, limit=c.pairs)[0]
    trials = {batch: measure(trl, c, rows[:8], batch)["rate"] for batch in (1, 2, 4)}
    best = max(trials, key=trials.__getitem__)
    print("TRL, pairs/s on 8 pairs: " + ", ".join(f"batch {b} {rate:.3f}" for b, rate in trials.items()))
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    for r in range(c.rounds):
        share = rows[r :: c.rounds]
        found["ours"].append(measure(ours, c, share))
        found["trl"].append(measure(trl, c, share, best))
        print(f"round {r + 1}: ours {found['ours'][-1]['rate']:.3f}, TRL {found['trl'][-1]['rate']:.3f} pairs/s")
    median = {
        name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()
    }
    print(f"\n{len(rows)} pairs, {c.dtype}, {c.threads} threads, medians of {c.rounds} rounds")
    print(f"{'':12}{'pairs/s':>10}{'reference s':>13}{'loop s':>10}{'peak MiB':>10}")
    for name, m in median.items():
        print(f"{name:12}{m['rate']:>10.3f}{m['reference']:>13.1f}{m['loop']:>10.1f}{m['peak']:>10.0f}")
    print(f"{'floor':12}{'':>23}{median['ours']['floor']:>10.1f}")
    ratios = {
        "pairs_per_s_over_trl": statistics.median(
            a["rate"] / b["rate"] for a, b in zip(found["ours"], found["trl"], strict=True)
        ),
        "peak_memory_over_trl": median["ours"]["peak"] / median["trl"]["peak"],
        "step_over_floor": statistics.median(one["loop"] / one["floor"] for one in found["ours"]),
    }
    settings = {"pairs": len(rows), "dtype": c.dtype, "threads": c.threads, "trl_batch": best}
    print(json.dumps(settings | {key: round(value, 3) for key, value in ratios.items()} | {"medians": median}))


if __name__ == "__main__":
    config.run_main(main)
