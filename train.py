"""Train a policy: preference optimisation (DPO-HPS and its baselines) or supervised fine-tuning; or a reward model.

    python train.py --config configs/world.toml --method dpo-hps --model M --data train.jsonl --out runs/hps
    torchrun --nproc_per_node 2 train.py ...          the same losses, sharded

The same command again goes on from the last checkpoint. Read from `main` down: launch to gradient in one page. What a
micro-batch holds, and which loss looks at it, is in `hps/batches.py`, the models in `hps/start.py`, log-probs in
`hps/model.py`, the losses in `hps/losses.py`, the options in `hps/options.py`.
"""

import gc
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from hps import config, options


def read_options(argv: Sequence[str] | None = None) -> tuple[options.Config, dict[str, str]]:
    """The options of a command line, and where each was set: flag or file."""
    c, given = options.read(argv, description=str(__doc__).split("\n")[0])
    for option, path in (("data", c.data), ("eval_data", c.eval_data)):
        if path and not Path(path).is_file():
            raise ValueError(f"--{option} {path}: there is no file of this name")
    return c, given


if __name__ == "__main__":  # --help is shown, and a typo told, before the seconds that torch takes to load
    config.run_main(read_options)

import torch
from tqdm import tqdm

from hps import batches, checkpoint, dist, model, reference
from hps.data import tokenizers
from hps.io import files, loggers
from hps.methods import as_preference, check, form, needs_reference
from hps.options import Config, settings
from hps.record import RECORD, check_folder, claim
from hps.statistics import Divergence, Statistics, check_first_loss

STOPPED = 75  # status of a run that left a checkpoint for its next start: EX_TEMPFAIL of sysexits.h


def main(argv: Sequence[str] | None = None) -> None:
    c, passed_over = check(*read_options(argv))
    if c.dry_run:
        from hps.extra import dry_run

        c = dry_run.apart(c)
    caches = ["token_cache"] + ["reference_cache"] * needs_reference(c)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with (
            dist.session(timeout=timedelta(minutes=c.timeout)) as ranks,
            checkpoint.held(c, ranks, what="train.py", caches=caches),
        ):
            if passed_over:
                say(ranks, f"this run has no use for {', '.join(passed_over)} of the --config file")
            train(as_preference(c), ranks)
    finally:
        if c.dry_run:
            shutil.rmtree(c.out, ignore_errors=True)
        for number, handler in before.items():  # for whoever goes on in this process
            signal.signal(number, handler)


def train(c: Config, ranks: dist.Ranks) -> None:
    """One run: data, plan, model, reference, steps, the policy in `out`."""
    alone = [key for key in ("sample_every", "load_in_4bit", "optim") if getattr(c, key) != getattr(Config, key)]
    if ranks.sharded and alone:
        raise ValueError(f"--{alone[0]} needs the whole model in one process: leave it out under torchrun")
    out = Path(c.out)
    started = checkpoint.latest(out / "checkpoints")
    check_folder(out, c, started is not None)  # a mistake is told before hours of reading
    if (out / "policy").exists():
        say(ranks, f"{out}: this run is finished; its policy is in {out / 'policy'}")
        return
    torch.manual_seed(c.seed)  # of what peft draws; our own draws are counted, not in sequence

    # Data -> the plan of the whole run. No draw is left to the loop, so a run that goes on cannot draw differently.
    tokenizer = tokenizers.load_common(c.model, c.reference, c.template_options)
    examples = batches.open_examples(c, tokenizer, ranks)
    plan = batches.make_plan(c, examples)
    if c.warmup_steps > plan.steps:
        raise ValueError(f"warmup_steps = {c.warmup_steps}, but the run has {plan.steps} steps: it never reaches lr")
    counts = examples.counts | plan.dropped | plan.excluded
    few = " (few: a lower --prompts_per_step makes more)" * (plan.steps < 10)
    chat = {"prompts_outside_template": " (data_prep.py import --chat makes turns of them)"}
    told = ", ".join(f"{key} {n}{chat.get(key, '')}" for key, n in counts.items() if n)
    say(ranks, f"{c.data}: {told}; {len(plan.row)} visits in steps of {c.prompts_per_step}: {plan.steps}{few}")
    whole, held_out = plan, None
    if c.dry_run:
        from hps.extra import dry_run

        plan = plan.first(dry_run.STEPS)
    if c.eval_data:
        from hps.extra.held_out import HeldOut

        held_out = HeldOut(c, tokenizer, ranks, going_on=started is not None)

    # The model, its optimizer, and the reference's log-probs of just what the plan touches: those of the policy itself
    # before its first update, unless another reference is named. Trained weights must never stand in for it, so a
    # checkpoint is loaded after this.
    longest = max(x.longest for x in (examples, held_out) if x)
    longest = c.max_length if form(c) == "kto" else longest  # KTO puts prompts to each other's responses
    from hps import start

    policy, weights, untrained = start.load_policy(c, ranks, tokenizer, longest=longest)
    parameters = list(checkpoint.trained(policy).values())
    optimizer = start.make_optimizer(c, parameters)
    inputs = {"model": weights, "tokenizer": tokenizers.fingerprint(tokenizer), "data": examples.data_hash}
    scorer = policy
    if needs_reference(c) and c.reference:
        scorer, inputs["reference"] = start.load_reference(c, ranks, tokenizer, longest=longest)
    if held_out and c.keep == "best":
        inputs["eval_data"] = held_out.examples.data_hash
    claim(out, c, inputs, started is not None, ranks)
    run = batches.Run(c, plan, examples, ranks, pad_id=tokenizer.pad_token_id, packs=not policy.padded)
    z0, computed, began = None, 0, time.perf_counter()  # z0 is KTO's alone
    if needs_reference(c):
        scored_by = dict(weights=inputs.get("reference", weights), tokenizer=inputs["tokenizer"], dtype=c.dtype)
        cache = reference.open_cache(c.reference_cache, **scored_by)
        computed = run.look_up_reference(cache, scorer)
        if form(c) == "kto":
            from hps.extra import kto

            z0 = kto.Mismatched(run, c.max_length)
            computed += z0.look_up_reference(cache, scorer)
        computed += held_out.begin(policy, [(cache, scorer)]) if held_out else 0
        say(ranks, f"reference log-probs: {computed} computed, the rest was in {cache}")
    elif held_out:
        held_out.begin(policy, [])
    scoring_seconds = time.perf_counter() - began
    del scorer  # another reference's memory is free from here on,
    gc.collect()  # and not when Python sees fit: its modules point at each other in circles

    # How far the run is, and where its numbers go.
    spent: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
    if started is not None:
        spent |= checkpoint.load(started, policy, optimizer, ranks=ranks)
        say(ranks, f"going on from {started} ({spent['step']} of {plan.steps} steps)")
    done, tokens_seen = spent["step"], spent["tokens"]
    log = loggers.open_log(out, c.log_to, done=done, settings=settings(c)) if ranks.first else None
    what = c.method if c.loss == "preference" else c.loss
    bar = tqdm(total=plan.steps, initial=done, desc=what, disable=not ranks.first)
    if c.sample_every:
        from hps.extra import samples

        loggers.cut(out / "samples.jsonl", done + 1 if done else 0)
        if done == 0:
            samples.sample(c, policy, tokenizer, examples, 0)
    terminated = threading.Event()  # until here, SIGTERM and Ctrl-C end the run at once: all that is done is on disk

    def interrupt(*_: object) -> None:
        terminated.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C ends the run at once
        say(ranks, "stopping after this step; Ctrl-C again ends at once, without a checkpoint")

    if not c.dry_run:
        signal.signal(signal.SIGTERM, lambda *_: terminated.set())
        signal.signal(signal.SIGINT, interrupt)

    # The loop: the gradient of each step is the same, whichever way its prompts are split over ranks and micro-batches.
    loss, divergence = batches.objective(c), Divergence(plan.steps, spent.get("first"))
    clock, saved, shown = time.perf_counter() - spent["seconds"], time.monotonic(), ""
    for step in range(done, plan.steps):
        lr = lr_at(c, step, plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # A step's loss is a mean over its prompts (SFT: its tokens), so the count is that of all ranks, known before.
        blocks = run.blocks(step)
        count = len(blocks) if c.loss != "sft" else sum(len(b.responses[0]) for b in blocks)
        kl = z0.kl(policy, step) if z0 else 0.0
        statistics = Statistics(c, ranks.device)
        for batch in run.micro_batches(step, blocks, kl=kl):
            policy_logps = policy(batch.packed)  # (B, K) nats, summed over tokens; of a reward model its rewards
            per_prompt = loss(policy_logps, batch)  # (B,)
            # FSDP averages gradients over ranks; the factor turns that mean into the sum that we want.
            (per_prompt.sum() * (batch.weight * ranks.world_size / count)).backward()
            statistics.add(per_prompt, policy_logps, batch)
            if step == 0 and untrained:  # then the loss is known: log 2 for DPO, log n! for DPO-PL
                statistics.add_expected(loss(batch.ref_logps, batch), batch)
        grad_norm = dist.clip_gradients(parameters, c.max_grad_norm)  # over the shards of all ranks
        # One exchange between ranks and one read from the device per step; what each rank wants to stop for goes along.
        late = ranks.first and c.save_minutes > 0 and time.monotonic() - saved > 60 * c.save_minutes
        metrics, grad_norm, asked, late = statistics.read(count, grad_norm, asked=terminated.is_set(), late=late)
        # One NaN would spread to every weight, and the next checkpoint would keep it.
        if not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm)):
            rows = ", ".join(examples.id(plan.row[v]) for v in plan.step(step))
            raise ValueError(
                f"step {step}: loss {metrics['loss']}, gradient norm {grad_norm}; no update was made. Rows: {rows}"
            )
        if step == 0 and untrained:
            say(ranks, check_first_loss(c, metrics["loss"], statistics.expected, statistics.largest.tolist()))
        optimizer.step()
        optimizer.zero_grad()

        if told := divergence.look(metrics["loss"], grad_norm):
            say(ranks, f"step {step}: {told}")
        tokens_seen += sum(map(len, blocks))
        rate = tokens_seen / (time.perf_counter() - clock)
        record = {"step": step, "epoch": int(plan.epoch[plan.step(step)[0]])} | metrics
        if c.loss == "preference":
            record |= {"gamma": float(plan.gamma[plan.step(step)].mean())}
            record |= {"effective_negatives": float(plan.effective[plan.step(step)].mean())}
            record |= {"kl": kl} if z0 else {}
        record |= {"grad_norm": grad_norm, "lr": lr}
        record |= {"perf/tokens_per_s": rate, "perf/peak_gib": peak_gib(ranks.device)}
        if held_out and held_out.due(step + 1, plan.steps):
            began = time.perf_counter()
            record |= held_out.look(policy, optimizer, step + 1)
            shown = f", held-out {record['eval/loss']:.4f}"
            clock += time.perf_counter() - began  # which is no time of training
        if log is not None:
            log(record)
        if c.dry_run and step == 0 < plan.steps - 1:  # which warms up
            say(ranks, f"loss {metrics['loss']:.6f}, gradient norm {grad_norm:.3g}")
            clock, tokens_seen = time.perf_counter(), 0
        bar.set_postfix_str(f"loss {metrics['loss']:.4f}{shown}, {rate:,.0f} tokens/s", refresh=False)
        bar.update()
        if c.sample_every and (step + 1) % c.sample_every == 0:
            clock += samples.sample(c, policy, tokenizer, examples, step + 1)
        last = step + 1 == plan.steps and not c.dry_run  # an export that fails or is killed shall cost no step
        stop = asked or step + 1 == c.stop_after
        if stop or last or late or (c.save_every and (step + 1) % c.save_every == 0):
            spent = {"step": step + 1, "tokens": tokens_seen, "seconds": time.perf_counter() - clock}
            spent |= {"first": divergence.first}
            checkpoint.save(out / "checkpoints", policy, optimizer, spent, ranks=ranks)
            saved = time.monotonic()
        if asked or (stop and not last):
            bar.close()
            how = "the same command" if asked else "without --stop_after it"
            say(ranks, f"stopped after {step + 1} of {plan.steps} steps; {how} goes on")
            if asked:
                raise SystemExit(STOPPED)
            return
    bar.close()
    if c.dry_run:
        how = dict(step_seconds=(time.perf_counter() - clock) / max(1, plan.steps - 1), scored=computed)
        how |= dict(scoring_seconds=scoring_seconds, mismatched=z0 is not None)
        say(ranks, dry_run.report(whole, parameters, **how))
        say(ranks, f"and {peak_gib(ranks.device):.2f} GiB of memory per rank")
        return

    def end(*_: object) -> None:  # as before the first step: all that is done is on disk
        say(ranks, "stopped before the policy was written; the same command goes on")
        raise SystemExit(STOPPED)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    if terminated.is_set():
        end()
    summary = {"steps": plan.steps, "seconds": spent["seconds"], "tokens": tokens_seen, "counts": counts}
    if held_out and c.keep == "best":
        summary["kept_step"], lowest = held_out.go_back(policy, optimizer)
        say(ranks, f"kept: the policy after {summary['kept_step']} steps, of the lowest held-out loss, {lowest:.4f}")
    readme = ""
    if ranks.first:
        from hps.io import card

        files.write_json(out / "summary.json", summary)
        kind = "reward " * (c.loss == "reward") + ("adapter" if c.lora_rank else "model")
        readme = card.card(files.read_record(out / "run.json", RECORD), summary, kind=kind)
    from hps import sharding

    # Rounded to what the model came in, as it is given away, unless told otherwise.
    dtype = model.DTYPES.get(c.export_dtype, model.unwrapped(policy.lm).stored_dtype)
    sharding.export(policy.lm, tokenizer, out / "policy", ranks=ranks, card=readme, dtype=dtype)
    say(ranks, f"{out / 'policy'}: trained by {plan.steps} steps in {spent['seconds']:.1f} s")


def lr_at(c: Config, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from lr to lr_end * lr."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    share = (step - c.warmup_steps) / max(1, steps - c.warmup_steps)
    return c.lr * (c.lr_end + (1 - c.lr_end) * 0.5 * (1 + math.cos(math.pi * share)))


def peak_gib(device: torch.device) -> float:
    """Highest memory so far: the device's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def say(ranks: dist.Ranks, message: str) -> None:
    """One line from rank 0, above the progress bar."""
    if ranks.first:
        tqdm.write(message, file=sys.stderr)


if __name__ == "__main__":
    config.run_main(main)
