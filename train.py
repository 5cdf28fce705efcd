"""Train a policy: preference optimisation (DPO-HPS and its baselines) or supervised fine-tuning; or a reward model.

    python train.py --config configs/world.toml --method dpo-hps --model M --data train.jsonl --out runs/hps
    torchrun --nproc_per_node 2 train.py ...          the same losses, sharded

The same command again goes on from the last checkpoint. Read from `main` down: launch to gradient in one page.
The options are in `hps/options.py`, the losses in `hps/losses.py` and `hps/extra/losses.py`.
"""

import math
import resource
import signal
import sys
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hps import checkpoint, config, dist, losses, model, reference
from hps.data import store, tokens
from hps.extra import reward_model
from hps.extra.kto import mismatched_blocks, mismatched_kl
from hps.extra.losses import KTO, LISTWISE, kto_loss, listwise_loss
from hps.extra.samples import sample
from hps.first_loss import expected_first_loss
from hps.io import files, hub, loggers
from hps.options import (
    Config,
    as_preference,
    check,
    is_kto,
    needs_reference,
    needs_rewards,
    parts,
    positive_weights,
    settings,
)
from hps.packing import micro_batches, pack
from hps.record import RECORD, check_folder, claim
from hps.visits import make_plan, touched_blocks, visit_block, visit_rewards

TERMINATED = 75  # status of a run that SIGTERM has stopped, with a checkpoint: EX_TEMPFAIL of sysexits.h

# Per-prompt values of the log, in the order of the columns of `prompt_metrics`; names are the field's.
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def main(argv: list[str] | None = None) -> None:
    c, set_keys = config.parse(Config, argv, prog="train.py", description=str(__doc__).split("\n")[0])
    check(c, set_keys)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with dist.session(timeout=timedelta(minutes=c.timeout)) as ranks:
            checkpoint.make_folder(Path(c.out))
            advice = "wait until it ends, or choose another --out"
            holds = files.lock(Path(c.out) / "lock", what="train.py", advice=advice) if ranks.first else nullcontext()
            with holds:
                if ranks.first:
                    files.remove_stale_temporaries(Path(c.out))
                train(as_preference(c), ranks)
    finally:
        signal.signal(signal.SIGTERM, before)


def train(c: Config, ranks: dist.Ranks) -> None:
    """One run: data, plan, model, reference, steps, the policy in `out`."""
    if c.sample_every and ranks.sharded:
        raise ValueError("--sample_every needs the whole model in one process: leave it out under torchrun")
    out = Path(c.out)
    started = checkpoint.latest(out / "checkpoints")
    check_folder(out, c, started is not None)
    if (out / "policy").exists():
        say(ranks, f"{out}: this run is finished; its policy is in {out / 'policy'}")
        return
    torch.manual_seed(c.seed)

    # Data -> the plan of the whole run.
    tokenizer = tokens.load_tokenizer(c.model)
    examples = store.open_store(
        c.token_cache,
        c.data,
        tokenizer,
        max_length=c.max_length,
        truncate=c.truncate,
        closing=c.loss == "reward",
        candidates=c.candidates,
        need_rewards=c.loss != "sft" and (parts(c)[1] != "human" or needs_rewards(c)),
        length_penalty=c.length_penalty,
        makes=ranks.first,
    )
    plan = make_plan(c, examples)
    counts = examples.counts | plan.dropped | plan.excluded
    say(ranks, f"{c.data}: " + ", ".join(f"{key} {n}" for key, n in counts.items() if n))

    # The model, and the reference's log-probs of just what the plan touches: those of the policy itself before its
    # first update, unless another reference is named. Trained weights must never stand in for it, so a checkpoint is
    # loaded after this.
    policy, weights, untrained = load_policy(c, ranks, vocab_size=len(tokenizer), longest=examples.longest)
    inputs = {"model": weights, "tokenizer": tokens.fingerprint(tokenizer), "data": examples.data_hash}
    packing = dict(pad_id=tokenizer.pad_token_id, share_prompt=c.share_prompt)
    kto = is_kto(c)
    mismatched = mismatched_blocks(c, plan, examples) if kto else []
    scorer = policy
    if needs_reference(c) and c.reference:
        scorer, inputs["reference"] = load_reference(c, ranks, tokenizer=inputs["tokenizer"])
    claim(out, c, inputs, started is not None, ranks)
    ref_logps = np.zeros(plan.responses.shape, dtype=np.float32)
    ref_mismatched = np.zeros(len(mismatched), dtype=np.float32)
    if needs_reference(c):
        weights = inputs.get("reference", weights)
        cache = reference.open_cache(c.reference_cache, weights=weights, tokenizer=inputs["tokenizer"], dtype=c.dtype)
        touched, place = touched_blocks(plan, examples)
        how = dict(ranks=ranks, budget=c.tokens_per_micro_batch, **packing)
        found, computed = reference.fill(cache, scorer, touched, **how)
        ref_mismatched, more = reference.fill(cache, scorer, mismatched, **how)
        say(ranks, f"reference log-probs: {computed + more} computed, the rest was in {cache}")
        ref_logps[plan.responses >= 0] = found[place]
    del scorer  # another reference's memory is free from here on
    rewards = visit_rewards(c, plan, examples)

    # The optimiser, how far the run is, and where its numbers go.
    parameters = list(checkpoint.trained(policy).values())
    optimizer = torch.optim.AdamW(parameters, lr=c.lr, betas=(c.adam_beta1, c.adam_beta2), weight_decay=c.weight_decay)
    done = 0
    if started is not None:
        done = checkpoint.load(started, policy, optimizer, ranks=ranks)["step"]
        say(ranks, f"going on from {started} ({done} of {plan.steps} steps)")
    log = loggers.open_log(out, c.log_to, done=done, settings=settings(c)) if ranks.first else None
    name = c.method if c.loss == "preference" else c.loss
    bar = tqdm(total=plan.steps, initial=done, desc=name, disable=not ranks.first)
    if c.sample_every:
        loggers.cut(out / "samples.jsonl", done + 1 if done else 0)
        if done == 0:
            sample(c, policy, tokenizer, examples, 0)
    terminated = threading.Event()  # until here, SIGTERM ends the run at once: all that is done is on disk
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())

    # The loop: the gradient of each step, whichever way its prompts are split.
    clock, tokens_seen = time.perf_counter(), 0
    for step in range(done, plan.steps):
        visits = plan.step(step)
        blocks = [visit_block(plan, examples, v) for v in visits]
        lengths = [len(b) for b in blocks]
        lr = lr_at(c, step, plan.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # The step's loss is a mean over its prompts (SFT: its tokens), whichever rank and micro-batch they are in.
        denominator = len(blocks) if c.loss != "sft" else sum(len(b.responses[0]) for b in blocks)
        kl = mismatched_kl(policy, mismatched, ref_mismatched, visits, c, ranks, packing) if kto else 0.0
        metrics = torch.zeros(len(METRICS), dtype=torch.float64)
        largest = torch.zeros(1)
        budget = c.tokens_per_micro_batch
        for members in micro_batches(lengths, budget=budget, world_size=ranks.world_size)[ranks.rank]:
            # A rank with nothing to do repeats the first block with weight 0: collectives must stay in step.
            chosen = members or [0]
            packed = pack([blocks[i] for i in chosen], **packing).to(ranks.device)
            policy_logps = policy(packed)  # (B, K); of a reward model its rewards, with a reference of zeros
            if c.loss == "sft":
                per_prompt = -policy_logps[:, 0]
                columns = torch.stack([per_prompt.detach()], dim=1)
            else:
                at = [visits[i] for i in chosen]
                K = policy_logps.shape[1]
                ref = torch.from_numpy(ref_logps[at][:, :K]).to(ranks.device)
                log_q = torch.from_numpy(plan.log_q[at][:, : K - 1]).to(ranks.device)
                kappa = torch.from_numpy(plan.kappa[at]).to(ranks.device)
                logratios = torch.where(packed.valid, policy_logps - ref, 0.0)
                scores = torch.from_numpy(rewards[at][:, :K]).to(ranks.device)
                per_prompt = preference_loss(c, logratios, scores, log_q, kappa, packed.valid, packed.num_tokens, kl)
                columns = prompt_metrics(per_prompt, policy_logps, logratios, packed.valid, c.beta, c.positives)
                largest = torch.maximum(largest, logratios.detach().abs().max().cpu())
            weight = 1.0 if members else 0.0
            # FSDP averages gradients over ranks; the factor turns that mean into the sum that we want.
            (per_prompt.sum() * (weight * ranks.world_size / denominator)).backward()
            metrics[: columns.shape[1]] += weight * columns.double().sum(0).cpu()
        metrics = dist.all_sum(metrics.to(ranks.device)).cpu() / denominator
        grad_norm = float(dist.clip_gradients(parameters, c.max_grad_norm))
        loss = float(metrics[0])
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            rows = ", ".join(examples.id(plan.row[v]) for v in visits)
            raise ValueError(f"step {step}: loss {loss}, gradient norm {grad_norm}; no update was made. Rows: {rows}")
        if step == 0 and untrained:
            self_check(c, expected_first_loss(c, plan, rewards), loss, float(largest), ranks)
        optimizer.step()
        optimizer.zero_grad()

        tokens_seen += sum(lengths)
        rate = tokens_seen / (time.perf_counter() - clock)
        record = {"step": step, "epoch": int(plan.epoch[visits[0]]), "loss": loss}
        if c.loss == "reward":
            record |= {key: x for key, x in zip(METRICS, metrics.tolist(), strict=True) if "logps" not in key}
        elif c.loss == "preference":
            record |= dict(zip(METRICS, metrics.tolist(), strict=True))
            record |= {"gamma": float(plan.gamma[visits].mean())}
            record |= {"effective_negatives": float(plan.effective[visits].mean())}
            record |= {"kl": kl} if kto else {}
        record |= {"grad_norm": grad_norm, "lr": lr}
        record |= {"perf/tokens_per_s": rate, "perf/peak_gib": peak_gib(ranks.device)}
        if log is not None:
            log(record)
        bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
        bar.update()
        if c.sample_every and (step + 1) % c.sample_every == 0:
            clock += sample(c, policy, tokenizer, examples, step + 1)  # which is no time of training
        asked = dist.any_rank(terminated.is_set(), ranks)
        stop = asked or step + 1 == c.stop_after
        if stop or (c.save_every and (step + 1) % c.save_every == 0 and step + 1 < plan.steps):
            checkpoint.save(out / "checkpoints", policy, optimizer, {"step": step + 1}, ranks=ranks)
        if stop and step + 1 < plan.steps:
            bar.close()
            how = "the same command" if asked else "without --stop_after it"
            say(ranks, f"stopped after {step + 1} of {plan.steps} steps; {how} goes on")
            if asked:
                raise SystemExit(TERMINATED)
            return
    bar.close()
    seconds = time.perf_counter() - clock
    summary = {"steps": plan.steps, "first_step": done, "seconds": seconds, "tokens": tokens_seen, "counts": counts}
    readme = ""
    if ranks.first:
        from hps.evaluate import card

        files.write_json(out / "summary.json", summary)
        kind = "reward " * (c.loss == "reward") + ("adapter" if c.lora_rank else "model")
        readme = card.card(files.read_record(out / "run.json", RECORD), summary, kind=kind)
    checkpoint.export(policy.lm, tokenizer, out / "policy", ranks=ranks, card=readme)
    say(ranks, f"{out / 'policy'}: trained in {seconds:.1f} s")


def load_policy(
    c: Config, ranks: dist.Ranks, *, vocab_size: int, longest: int
) -> tuple[model.PolicyModel | reward_model.RewardModel, str, bool]:
    """The model that is trained, with its adapter, sharded; the fingerprint of the weights that it starts from; and
    whether its first loss is known: policy = reference, or a reward model's head of zeros.

    vocab_size, longest: what it must have embeddings and positions for, tokens.
    """
    dtype = model.DTYPES[c.dtype]
    loaded = dtype if c.lora_rank else torch.float32
    if c.loss == "reward":
        lm = reward_model.load_reward_model(c.model, dtype=loaded, begin=True)
    else:
        lm = model.load_causal_lm(c.model, dtype=loaded)
    model.check_limits(lm, vocab_size=vocab_size, longest=longest)
    weights = model.fingerprint(lm)  # while they are whole and untouched
    if c.lora_rank:
        adapter = dict(rank=c.lora_rank, alpha=c.lora_alpha, targets=c.lora_targets.split(","), seed=c.seed)
        more = dict(task="SEQ_CLS" if c.loss == "reward" else "CAUSAL_LM", revision=hub.resolve(c.model)[1])
        lm = model.add_lora(lm, **adapter, **more)
    if c.gradient_checkpointing:
        model.checkpoint_layers(lm)
    autocast = dtype if not c.lora_rank and not ranks.sharded and dtype != torch.float32 else None
    if c.loss == "reward":
        policy = reward_model.RewardModel(lm, autocast=autocast).to(ranks.device)
        reward_model.check_paths_agree(policy, vocab_size=vocab_size)
        untrained = not policy.classifier.score.weight.any()
    else:
        policy = model.PolicyModel(lm, autocast=autocast).to(ranks.device)
        model.check_paths_agree(policy, vocab_size=vocab_size, share_prompt=c.share_prompt)
        untrained = needs_reference(c) and not c.reference
    dist.shard(policy, policy.layers, ranks=ranks, dtype=dtype)
    return policy, weights, untrained


def load_reference(c: Config, ranks: dist.Ranks, *, tokenizer: str) -> tuple[model.PolicyModel, str]:
    """The model that `--reference` names, sharded, and the fingerprint of its weights; ValueError if its tokenizer is
    not the policy's, of which `tokenizer` is the fingerprint."""
    if tokens.fingerprint(tokens.load_tokenizer(c.reference)) != tokenizer:
        raise ValueError(
            f"the reference {c.reference} has another tokenizer or chat template than {c.model}: their "
            "log-probs cannot be compared; give the policy and its reference the same one"
        )
    lm = model.load_causal_lm(c.reference, dtype=model.DTYPES[c.dtype])
    weights = model.fingerprint(lm)
    scorer = model.PolicyModel(lm).to(ranks.device)
    dist.shard(scorer, scorer.layers, ranks=ranks, dtype=model.DTYPES[c.dtype])
    return scorer, weights


def preference_loss(c: Config, logratios, rewards, log_q, kappa, valid, num_tokens, kl: float) -> torch.Tensor:
    """Per-prompt loss (B,) of the chosen method from log-ratios (B, K); rewards (B, K) and KTO's z0 `kl` (nats) for
    those that need them."""
    name, view, facts = parts(c)
    taken = {key: getattr(c, key) for key in facts.options}
    if facts is KTO:
        return kto_loss(logratios, beta=c.beta, kl=kl, valid=valid, **taken)
    options = dict(beta=c.beta, valid=valid, num_tokens=num_tokens) | taken
    if name in LISTWISE:
        return listwise_loss(name, logratios, rewards, **options)
    options |= {"length_norm": c.length_norm} if facts.length_norm else {}
    if view == "pl":
        return losses.plackett_luce_loss(name, logratios, **options)
    if c.positives > 1:
        options |= dict(n_factor=c.n_factor, exclude_positives=c.exclude_positives)
        return losses.multi_positive_loss(name, logratios, log_q, weights=positive_weights(c), **options)
    return losses.stage_loss(name, logratios, log_q, kappa=kappa, **options)


def prompt_metrics(per_prompt, policy_logps, logratios, valid, beta: float, positives: int = 1) -> torch.Tensor:
    """(B, len(METRICS)) detached; "chosen" is the best response, "rejected" a mean over those from column `positives`
    on, accuracy the share of them that the best one beats."""
    rewards = losses.implicit_rewards(logratios, beta=beta)
    opponents = valid[:, positives:]
    count = opponents.sum(1).clamp(min=1)

    def mean(x):
        return torch.where(opponents, x, 0.0).sum(1) / count

    chosen, rejected = rewards[:, 0], mean(rewards[:, positives:])
    accuracy = mean((rewards[:, :1] > rewards[:, positives:]).float())
    logps = policy_logps.detach()
    columns = [per_prompt.detach(), chosen, rejected, chosen - rejected, accuracy, logps[:, 0]]
    columns.append(mean(logps[:, positives:]))
    return torch.stack(columns, dim=1)


def lr_at(c: Config, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from lr to lr_end * lr."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    share = (step - c.warmup_steps) / max(1, steps - c.warmup_steps)
    return c.lr * (c.lr_end + (1 - c.lr_end) * 0.5 * (1 + math.cos(math.pi * share)))


def self_check(c: Config, expected: float | None, loss: float, largest: float, ranks: dist.Ranks) -> None:
    """While policy = reference (or a reward model's head is zero) the loss is known; another value means a wrong mask,
    shift, dropout or dtype."""
    if expected is None:
        say(ranks, f"step 0: loss {loss:.6f} (not known beforehand); largest |log-ratio| {largest:.2g} (should be 0)")
        return
    say(ranks, f"step 0: loss {loss:.6f}, expected {expected:.6f}; largest |log-ratio| {largest:.2g} (should be 0)")
    tolerance = (1e-3 if c.dtype == "fp32" else 5e-2) * max(1.0, abs(expected))
    if abs(loss - expected) > tolerance:
        raise ValueError(
            f"step 0: the loss is {loss:.6f}, but with policy = reference {c.method} must give {expected:.6f}. Policy "
            "and reference are scored differently: delete the reference cache if the model's code changed"
        )


def peak_gib(device: torch.device) -> float:
    """Highest memory so far: the device's, or this process's on a CPU (ru_maxrss is in KiB on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def say(ranks: dist.Ranks, message: str) -> None:
    """One line from rank 0, above the progress bar."""
    if ranks.first:
        tqdm.write(message, file=sys.stderr)


if __name__ == "__main__":
    config.run_main(main)
