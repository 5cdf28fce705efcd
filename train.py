"""Train a policy: preference optimisation (DPO-HPS and its baselines) or supervised fine-tuning; or a reward model.

    python train.py --config configs/world.toml --method dpo-hps --model M --data train.jsonl --out runs/hps
    torchrun --nproc_per_node 2 train.py ...          the same losses, sharded

The same command again goes on from the last checkpoint. Read from `main` down: launch to gradient in one page.
"""

import dataclasses
import json
import math
import resource
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from hps import checkpoint, config, dist, files, hub, loggers, losses, model, reference, reward_model, sampling
from hps import plan as planning
from hps.data import generate, store, tokens
from hps.evaluate import card
from hps.losses_listwise import KTO, LISTWISE, OFFICIAL, Listwise, kto_loss, listwise_at_reference, listwise_loss
from hps.packing import Block, micro_batches, pack


@dataclass
class Config:
    # -- what is trained --
    model: str  # start of the policy: a local folder (weights or adapter) or a hub name
    data: str  # list-wise JSON Lines with rewards (.gz accepted)
    out: str  # folder of the run: metrics.jsonl, checkpoints, the final policy; an unfinished run there goes on
    loss: str = "preference"  # preference (see method), sft (likelihood of the best response), reward (a reward model)
    method: str = "dpo-hps"  # a loss of losses.py and whom it contrasts (plan.plan): dpo-bt, nca-pl, ...
    reference: str = ""  # reference model; empty means the policy itself before its first update
    # -- the loss --
    beta: float = 0.1  # KL strength
    label_smoothing: float = 0.0  # dpo: cDPO's epsilon; robust: the share of labels that are wrong
    exo_eps: float = 1e-3  # exo: target mass on the opponents
    length_norm: bool = True  # ipo, simpo: divide by scored tokens, as TRL does
    target_margin: float = 0.5  # simpo: margin that is asked for, in reward units
    slic_delta: float = 1.0  # slic: margin that is asked for, in nats
    slic_lambda: float = 0.1  # slic: weight of the preferred response's likelihood
    rdpo_alpha: float = 0.01  # rdpo: reward units that a token of length is worth
    gap_delta: float = 10.0  # gap: nats from the rewards' gap at which the square turns into a line
    label_temperature: float = 1.0  # exo_rw, infonca, nca_soft: labels are softmax(rewards / it)
    desirable_weight: float = 1.0  # kto: weight of the preferred response
    undesirable_weight: float = 1.0  # kto: weight of each response that it is contrasted with
    n_factor: str = "one"  # N of Eq. 8: one, or n_minus_one (number of dispreferred responses)
    # -- whom it contrasts --
    length_penalty: float = 0.0  # reward units taken off for every scored token before anything looks at the rewards
    hps_form: str = "sample"  # sample: draws from q; full: all dispreferred responses weighted by q
    hps_samples: int = 1  # draws from q at each visit
    positives: int = 1  # hps_form full: this many best responses count as valid, a stage of the loss each (App. E)
    positive_lambda: str = ""  # weights of their stages, comma-separated, say 1,0.5; empty: 1 / positives each
    exclude_positives: bool = False  # contrast them with the responses below them all only, not with each other
    gamma_schedule: str = "left_knots"  # left_knots, inclusive, linear, constant, or mixture (knots in random order)
    gamma_start: float = -5.0  # hardness at the start; negative draws the worst responses
    gamma_end: float = 5.0  # hardness that the ramp runs to; positive draws the hardest
    gamma_phases: int = 5  # constant pieces of the ramp
    reward_norm: str = "none"  # rewards as the sampler sees them: none, or zscore, minmax, percentile of each prompt
    reward_scale: float = 1.0  # factor on the (normalised) rewards
    window_end: float = 0.15  # window: share of the dispreferred that lies above its centre in the end (at first all)
    window_power: float = 1.5  # window: 1 slides evenly, more stays longer with the worst
    window_width: float = 0.15  # window: half its width, as a share of the dispreferred
    pl_form: str = "stagewise"  # pl: stagewise, or official (the list-wise form of exo's, nca's and sppo's authors)
    pl_responses: int = 8  # ranks that Plackett-Luce sees: best, worst and evenly spaced ones; 0 means all
    # -- optimiser --
    lr: float = 1e-5  # peak learning rate of AdamW (the paper's 5e-7 moves a LoRA adapter by almost nothing)
    epochs: int = 2  # passes over the prompts
    prompts_per_step: int = 64  # prompts of one optimizer step over all ranks
    warmup_steps: int = 0  # linear warm-up
    lr_end: float = 0.0  # where the cosine ends, as a share of lr
    weight_decay: float = 0.0  # AdamW's decay
    adam_beta1: float = 0.9  # AdamW's first moment
    adam_beta2: float = 0.999  # AdamW's second moment
    max_grad_norm: float = 1.0  # gradients are clipped to this norm; 0 means never
    shuffle: str = "epochs"  # epochs: a new order in each; together: all epochs as one list; no: the file's order
    seed: int = 0  # of the order, the draws and the adapter's start
    # -- model --
    lora_rank: int = 8  # 0 trains all weights
    lora_alpha: int = 16  # scale of the adapter is alpha / rank
    lora_targets: str = "q_proj,v_proj"  # linear layers that get an adapter, comma-separated
    dtype: str = "fp32"  # compute dtype, fp32 or bf16; trained weights are fp32 either way
    gradient_checkpointing: bool = False  # recompute activations in the backward: less memory, more time
    share_prompt: bool = True  # compute a prompt once for all its responses; false pads plain rows
    # -- batches --
    candidates: int = 0  # use the first so many responses of each prompt; 0 means all
    max_length: int = 2048  # tokens of prompt and response together
    truncate: str = "drop"  # beyond max_length: drop (and count) the response, error, or keep_end of the prompt
    tokens_per_micro_batch: int = 4096  # packed tokens of one forward; the step's gradient does not depend on it
    # -- run --
    token_cache: str = "runs/token_cache"  # folder of the data as token ids, shared by all runs
    reference_cache: str = "runs/reference_cache"  # folder of reference log-probs, shared by all runs
    save_every: int = 0  # steps between checkpoints; 0 keeps none
    sample_every: int = 0  # steps between greedy answers to the same prompts, in samples.jsonl; 0 draws none
    sample_prompts: int = 4  # the first so many prompts of the data are answered then
    log_to: str = ""  # beside metrics.jsonl: tensorboard, wandb, or both, comma-separated
    timeout: float = 10.0  # minutes that ranks wait for each other before the run ends
    stop_after: int = 0  # stop (with a checkpoint) after this many steps in all; 0 runs to the end


GAMMA = {"gamma_schedule", "gamma_start", "gamma_end", "gamma_phases"}
DRAWS = {"hps_form", "hps_samples", "n_factor"}
POSITIVES = {"positives", "positive_lambda", "exclude_positives"}
WINDOW = {"window_end", "window_power", "window_width"}
HPS = GAMMA | DRAWS | POSITIVES | {"reward_norm", "reward_scale"}
BY_VIEW = {"pl": {"pl_responses", "pl_form"}, "hps": HPS, "uniform": DRAWS | POSITIVES, "window": DRAWS | WINDOW}
SAMPLER = {*BY_VIEW["pl"], *HPS, *WINDOW}
OF_THE_LOSS = {"pl_form", "positive_lambda", "exclude_positives"}  # those of SAMPLER that the plan does not depend on
BY_LOSS = {"beta", "length_norm", *losses.OPTIONS}


def parts(c: Config) -> tuple[str, str, losses.Loss | Listwise]:
    """Name of the loss, view, and the loss's facts, of the method; the official form of a PL method is list-wise."""
    name, view = c.method.split("-")
    if view == "pl" and c.pl_form == "official" and OFFICIAL.get(name):
        name = str(OFFICIAL[name])
    if name == "kto":
        return name, view, KTO
    return name, view, LISTWISE[name] if name in LISTWISE else losses.LOSSES[name]


def as_preference(c: Config) -> Config:
    """A reward model's loss in the terms of the others: -log sigmoid(r(chosen) - r(rejected)) (paper Eq. 15) is DPO on
    the human pair with rewards in the place of log-ratios and beta 1."""
    return dataclasses.replace(c, method="dpo-human", beta=1.0) if c.loss == "reward" else c


def needs_reference(c: Config) -> bool:
    """Whether log-probs of a reference are looked up: not by SFT and reward models, nor by SimPO and SLiC."""
    return c.loss == "preference" and getattr(parts(c)[2], "needs_reference", True)


def needs_rewards(c: Config) -> bool:
    """Whether the loss itself looks at the rewards, not the sampler alone."""
    return c.loss != "sft" and getattr(parts(c)[2], "needs_rewards", True)


def used_options(c: Config) -> set[str]:
    """Names of the options that the run will use; whatever else the user set is an error."""
    used = {field.name for field in dataclasses.fields(Config)} - SAMPLER - BY_LOSS
    if c.loss == "sft":
        used -= {"method", "reference", "reference_cache", "share_prompt", "length_penalty"}
    elif c.loss == "reward":
        used -= {"method", "reference", "reference_cache", "length_penalty", "sample_every"}
        used |= {"label_smoothing"}
    else:
        _, view, facts = parts(c)
        used |= set(facts.options)
        used |= {"beta"} if getattr(facts, "needs_beta", True) else set()
        used |= {"length_norm"} if getattr(facts, "length_norm", False) else set()
        used -= set() if needs_reference(c) else {"reference", "reference_cache"}
        used |= BY_VIEW.get(view, set())
        used -= {"length_penalty"} if view == "human" else set()
        used -= {"pl_form"} if c.method.split("-")[0] in {*LISTWISE, "kto"} else set()
        used -= DRAWS | POSITIVES if facts is KTO else set()  # it has no weights: one draw, or all ranks of pl
        used -= {"hps_samples"} if c.hps_form == "full" else set()
        used -= {"positive_lambda", "exclude_positives"} if c.positives == 1 else set()
        used -= {"constant": {"gamma_end", "gamma_phases"}, "linear": {"gamma_phases"}}.get(c.gamma_schedule, set())
    used -= {"sample_prompts"} if c.sample_every == 0 else set()
    return used if c.lora_rank else used - {"lora_alpha", "lora_targets"}


def positive_weights(c: Config) -> list[float]:
    """lambda_1..lambda_m of Appendix E; ValueError unless they are m numbers >= 0, not all of them 0."""
    if not c.positive_lambda:
        return [1 / c.positives] * c.positives
    try:
        weights = [float(word) for word in c.positive_lambda.split(",")]
    except ValueError:
        weights = []
    if len(weights) != c.positives or not all(0 <= w < math.inf for w in weights) or not any(weights):
        raise ValueError(
            f"positive_lambda = {c.positive_lambda!r}: give {c.positives} comma-separated weights >= 0, one for each "
            "of the positives, not all 0"
        )
    return weights


def check(c: Config, set_keys: frozenset[str]) -> None:
    """ValueError for a choice that does not exist or that the run would ignore."""
    methods = [f"{name}-{view}" for name in losses.LOSSES for view in planning.VIEWS]
    methods += [f"{name}-pl" for name in LISTWISE] + [f"kto-{view}" for view in planning.VIEWS]
    choices = {
        "loss": ["preference", "sft", "reward"],
        "method": methods,
        "dtype": list(model.DTYPES),
        "truncate": list(tokens.TRUNCATE),
        "gamma_schedule": list(sampling.SCHEDULES),
        "hps_form": list(planning.FORMS),
        "pl_form": ["stagewise", "official"],
        "reward_norm": list(sampling.REWARD_NORMS),
        "n_factor": ["one", "n_minus_one"],
        "shuffle": list(planning.SHUFFLES),
    }
    for key, allowed in choices.items():
        if getattr(c, key) not in allowed:
            raise ValueError(f"{key} = {getattr(c, key)!r} does not exist; choose one of {', '.join(allowed)}")
    positive = ("epochs", "prompts_per_step", "positives", "tokens_per_micro_batch", "beta", "lr", "reward_scale")
    for key in (*positive, "sample_prompts", "timeout"):
        if not getattr(c, key) > 0:
            raise ValueError(f"{key} must be positive, got {getattr(c, key)}")
    if c.loss != "sft":
        _, _, facts = parts(as_preference(c))
        for key in facts.options:
            if not losses.OPTIONS[key].allowed(getattr(c, key)):
                raise ValueError(f"{key} must lie in {losses.OPTIONS[key].range}, got {getattr(c, key)}")
        for key, most in (("window_end", 1), ("window_power", math.inf), ("window_width", 1)):
            if not 0 < getattr(c, key) <= most:
                raise ValueError(f"{key} must lie in (0, {most}], got {getattr(c, key)}")
        if c.method.startswith("robust-") and c.label_smoothing == 0:
            raise ValueError("robust DPO without wrong labels is DPO: set --label_smoothing, or use method dpo-*")
    not_negative = ("length_penalty", "candidates", "warmup_steps", "lora_rank", "max_grad_norm", "weight_decay")
    for key in (*not_negative, "save_every", "stop_after", "sample_every"):
        if getattr(c, key) < 0:
            raise ValueError(f"{key} must not be negative, got {getattr(c, key)}")
    what = f"method {c.method}" if c.loss == "preference" else f"loss {c.loss}"
    config.check_used(set_keys, used_options(c), what=what)
    if c.positives > 1 and c.hps_form != "full":
        raise ValueError(f"positives = {c.positives} are set against all responses below them: add --hps_form full")
    if c.positive_lambda:
        positive_weights(c)
    loggers.chosen(c.log_to)
    if c.loss == "preference" and parts(c)[2] is KTO and c.prompts_per_step < 2:
        raise ValueError("KTO puts the prompts of a step to each other's responses: prompts_per_step must be >= 2")
    if c.lora_rank and (Path(c.model) / "adapter_config.json").exists():
        raise ValueError(
            f"{c.model} is itself an adapter: another one on top of it would be loaded without it. Fold it into its "
            f"base first: python -m hps.evaluate.export --model {c.model} --out MERGED, and start from there"
        )
    if c.lora_rank and c.lr < 1e-6:
        warnings.warn(f"lr {c.lr} moves a LoRA adapter by almost nothing; 1e-5 to 2e-4 is usual", stacklevel=2)


def make_plan(c: Config, examples: store.Store) -> planning.Plan:
    """All visits of the run, before its first step."""
    order = dict(epochs=c.epochs, prompts_per_step=c.prompts_per_step, seed=c.seed, shuffle=c.shuffle)
    if c.loss == "sft":
        return planning.plan_demonstrations(preferred(examples), examples.keys, **order)
    sampler = {key: getattr(c, key) for key in SAMPLER - OF_THE_LOSS}
    view = c.method.split("-")[1]
    columns = (examples.rewards, examples.identity, examples.keys)
    return planning.plan(*columns, view=view, human=examples.human, **order, **sampler)


def preferred(examples: store.Store) -> np.ndarray:
    """The response of each prompt that SFT learns: the human choice, else the highest reward, else the only one."""
    best = examples.human[:, 0].astype(np.int64)
    for rows in planning.chunks(len(best)):
        for i, rewards in zip(rows, examples.rewards[rows[0] : rows[-1] + 1], strict=True):
            if best[i] < 0 and len(rewards) > 1 and np.isnan(rewards[0]):
                where = examples.where(i)
                raise ValueError(f"{where}: several responses, and neither chosen nor rewards say which one to learn")
            best[i] = best[i] if best[i] >= 0 else np.argmax(rewards)
    return best


def visit_block(plan: planning.Plan, examples: store.Store, v: int) -> Block:
    """The prompt and the responses of visit `v`, preferred first."""
    ks = plan.responses[v]
    return examples.block(plan.row[v], ks[ks >= 0])


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
    options |= {"rewards": rewards} if facts.needs_rewards else {}
    if view == "pl":
        return losses.plackett_luce_loss(name, logratios, **options)
    if c.positives > 1:
        options |= dict(n_factor=c.n_factor, exclude_positives=c.exclude_positives)
        return losses.multi_positive_loss(name, logratios, log_q, weights=positive_weights(c), **options)
    return losses.stage_loss(name, logratios, log_q, kappa=kappa, **options)


def expected_first_loss(c: Config, plan: planning.Plan, rewards: np.ndarray) -> float | None:
    """What the first step's loss must be while policy = reference, in closed form (log 2 for DPO-BT), or None."""
    name, view, facts = parts(c)
    if facts.at_reference is None:
        return None
    options = {"beta": c.beta} | {key: getattr(c, key) for key in facts.options}
    first = list(plan.step(0))
    if name in LISTWISE:
        scores, valid = torch.from_numpy(rewards[first]), torch.from_numpy(plan.responses[first] >= 0)
        return float(listwise_at_reference(name, scores, valid=valid, **options).mean())
    ranks = (plan.responses[first] >= 0).sum(1)
    if c.positives > 1:
        m, weights = c.positives, positive_weights(c)
        opponents = ranks[:, None] - (np.full(m, m) if c.exclude_positives else np.arange(1, m + 1))
        kappas = opponents if c.n_factor == "n_minus_one" else np.ones_like(opponents)
        stages = [[losses.loss_at_reference(name, kappa=float(k), **options) for k in row] for row in kappas]
        return float(np.mean(np.array(stages) @ weights))
    if facts is KTO:
        return float(np.mean([facts.at_reference(float(n) - 1, **options) for n in ranks]))
    if view == "pl":
        return float(np.mean([losses.plackett_luce_at_reference(name, int(n), **options) for n in ranks]))
    return float(np.mean([losses.loss_at_reference(name, kappa=float(k), **options) for k in plan.kappa[first]]))


def lr_at(c: Config, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from lr to lr_end * lr."""
    if step < c.warmup_steps:
        return c.lr * (step + 1) / c.warmup_steps
    share = (step - c.warmup_steps) / max(1, steps - c.warmup_steps)
    return c.lr * (c.lr_end + (1 - c.lr_end) * 0.5 * (1 + math.cos(math.pi * share)))


def peak_gib(device: torch.device) -> float:
    """Highest memory so far: the device's, or this process's on a CPU (ru_maxrss is in KiB on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


TERMINATED = 75  # status of a run that SIGTERM has stopped, with a checkpoint: EX_TEMPFAIL of sysexits.h
SAMPLE_TOKENS = 128  # of an answer in samples.jsonl, at most

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
                    files.sweep(Path(c.out))
                train(as_preference(c), ranks)
    finally:
        signal.signal(signal.SIGTERM, before)


def train(c: Config, ranks: dist.Ranks) -> None:
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

    # Model, its adapter, and the reference's name while the weights are still whole and untouched.
    dtype = model.DTYPES[c.dtype]
    loaded = dtype if c.lora_rank else torch.float32
    if c.loss == "reward":
        lm = reward_model.load_reward_model(c.model, dtype=loaded, begin=True)
    else:
        lm = model.load_causal_lm(c.model, dtype=loaded)
    model.check_limits(lm, vocab_size=len(tokenizer), longest=examples.longest)
    weights = model.fingerprint(lm)
    inputs = {"model": weights, "tokenizer": tokens.fingerprint(tokenizer), "data": examples.data_hash}
    if c.lora_rank:
        adapter = dict(rank=c.lora_rank, alpha=c.lora_alpha, targets=c.lora_targets.split(","), seed=c.seed)
        more = dict(task="SEQ_CLS" if c.loss == "reward" else "CAUSAL_LM", revision=hub.resolve(c.model)[1])
        lm = model.add_lora(lm, **adapter, **more)
    if c.gradient_checkpointing:
        model.checkpoint_layers(lm)
    autocast = dtype if not c.lora_rank and not ranks.sharded and dtype != torch.float32 else None
    if c.loss == "reward":
        policy = reward_model.RewardModel(lm, autocast=autocast).to(ranks.device)
        reward_model.check_paths_agree(policy, vocab_size=len(tokenizer))
        untrained = not policy.classifier.score.weight.any()
    else:
        policy = model.PolicyModel(lm, autocast=autocast).to(ranks.device)
        model.check_paths_agree(policy, vocab_size=len(tokenizer), share_prompt=c.share_prompt)
        untrained = needs_reference(c) and not c.reference
    dist.shard(policy, policy.layers, ranks=ranks, dtype=dtype)

    # Reference log-probs of just what the plan touches: the policy itself before its first update, unless another
    # reference is named. Trained weights must never stand in for it, so a checkpoint is loaded after this.
    packing = dict(pad_id=tokenizer.pad_token_id, share_prompt=c.share_prompt)
    ref_logps = np.zeros(plan.responses.shape, dtype=np.float32)
    kto = c.loss == "preference" and parts(c)[2] is KTO
    mismatched = mismatched_blocks(c, plan, examples) if kto else []
    ref_mismatched = np.zeros(len(mismatched), dtype=np.float32)
    if needs_reference(c):
        touched, place = touched_blocks(plan, examples)
        scorer = policy
        if c.reference:
            theirs = tokens.fingerprint(tokens.load_tokenizer(c.reference))
            if theirs != inputs["tokenizer"]:
                raise ValueError(
                    f"the reference {c.reference} has another tokenizer or chat template than {c.model}: their "
                    "log-probs cannot be compared; give the policy and its reference the same one"
                )
            other = model.load_causal_lm(c.reference, dtype=dtype)
            weights = inputs["reference"] = model.fingerprint(other)
            scorer = model.PolicyModel(other).to(ranks.device)
            dist.shard(scorer, scorer.layers, ranks=ranks, dtype=dtype)
        claim(out, c, inputs, started is not None, ranks)
        cache = reference.open_cache(
            c.reference_cache, weights=weights, tokenizer=inputs["tokenizer"], dtype=c.dtype
        )
        how = dict(ranks=ranks, budget=c.tokens_per_micro_batch, **packing)
        found, computed = reference.fill(cache, scorer, touched, **how)
        ref_mismatched, more = reference.fill(cache, scorer, mismatched, **how)
        say(ranks, f"reference log-probs: {computed + more} computed, the rest was in {cache}")
        del scorer
        ref_logps[plan.responses >= 0] = found[place]
    else:
        claim(out, c, inputs, started is not None, ranks)

    rewards = np.zeros(plan.responses.shape, dtype=np.float32)
    if needs_rewards(c):
        v, k = np.nonzero(plan.responses >= 0)
        rewards[v, k] = examples.rewards_of(plan.row[v], plan.responses[v, k])

    parameters = list(checkpoint.trained(policy).values())
    optimizer = torch.optim.AdamW(
        parameters, lr=c.lr, betas=(c.adam_beta1, c.adam_beta2), weight_decay=c.weight_decay
    )
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
                total = per_prompt.sum()
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
                total = per_prompt.sum()
                columns = prompt_metrics(
                    per_prompt, policy_logps, logratios, packed.valid, c.beta, c.positives
                )
                largest = torch.maximum(largest, logratios.detach().abs().max().cpu())
            weight = 1.0 if members else 0.0
            # FSDP averages gradients over ranks; the factor turns that mean into the sum that we want.
            (total * (weight * ranks.world_size / denominator)).backward()
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
        files.write_json(out / "summary.json", summary)
        kind = "reward " * (c.loss == "reward") + ("adapter" if c.lora_rank else "model")
        readme = card.card(files.read_record(out / "run.json", RECORD), summary, kind=kind)
    checkpoint.export(policy.lm, tokenizer, out / "policy", ranks=ranks, card=readme)
    say(ranks, f"{out / 'policy'}: trained in {seconds:.1f} s")


def sample(c: Config, policy: model.PolicyModel, tokenizer, examples: store.Store, step: int) -> float:
    """Append to samples.jsonl what the policy answers after `step` updates; the seconds that it took.

    The most likely answers to the first prompts, so that all that changes between two steps is the policy. No random
    number is drawn, and dropout is off throughout, so that the run is the same as without.
    """
    began = time.perf_counter()
    count = min(c.sample_prompts, len(examples))
    prompts = [(examples.id(i), examples.block(i, []).prompt.tolist()) for i in range(count)]
    room = generate.positions(policy.causal_lm.config) - max(len(ids) for _, ids in prompts)
    how = dict(n=1, max_new_tokens=int(min(SAMPLE_TOKENS, room)), temperature=0.0, keep_unfinished=True)
    how |= dict(counts=Counter(), eos_token_id=tokenizer.eos_token_id, progress=False)
    mode = policy.lm.training  # on where layers are checkpointed
    policy.lm.eval()
    answers = list(generate.generate(policy.causal_lm, prompts, **how))
    policy.lm.train(mode)
    records = []
    for (id, ids), (_, [answer]) in zip(prompts, answers, strict=True):
        response = tokenizer.decode(answer.token_ids, skip_special_tokens=True).strip()
        records.append({"step": step, "id": id, "prompt": tokenizer.decode(ids), "response": response})
    with (Path(c.out) / "samples.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    shown = " ".join(records[0]["response"].split())[:200]
    tqdm.write(f"after {step} steps, {records[0]['id']}: {shown}", file=sys.stderr)
    return time.perf_counter() - began


def touched_blocks(plan: planning.Plan, examples: store.Store) -> tuple[store.Blocks, np.ndarray]:
    """Every response that the plan visits, once, gathered by prompt; and which of them each entry of
    `plan.responses[plan.responses >= 0]` is, (T,) int64."""
    v, k = np.nonzero(plan.responses >= 0)
    width = plan.responses.max() + 1
    responses, at = np.unique(plan.row[v] * width + plan.responses[v, k], return_inverse=True)
    rows, ks = np.divmod(responses, width)
    first = np.flatnonzero(np.diff(rows, prepend=-1, append=-1))  # where a prompt's begin, and the end
    return store.Blocks(len(first) - 1, lambda i: examples.block(rows[first[i]], ks[first[i] : first[i + 1]])), at


def mismatched_blocks(c: Config, plan: planning.Plan, examples: store.Store) -> store.Blocks:
    """Of every visit its prompt with the preferred response of another (KTO's z0), cut at max_length."""
    partners = planning.mismatched(plan)

    def make(v: int) -> Block:
        w = partners[v]
        (response,) = examples.block(plan.row[w], plan.responses[w, :1]).responses
        prompt = examples.block(plan.row[v], []).prompt
        return Block(prompt, (response[: c.max_length - len(prompt)],))

    return store.Blocks(len(partners), make)


def mismatched_kl(
    policy: model.PolicyModel,
    blocks: Sequence[Block],
    ref_logps: np.ndarray,
    visits: range,
    c: Config,
    ranks: dist.Ranks,
    packing: dict[str, Any],
) -> float:
    """KTO's z0 of a step, nats: the mean log-ratio of its mismatched pairs over all ranks; a negative one counts as 0.

    It has no gradient. A few pairs estimate a KL divergence, which is never negative.
    """
    total = torch.zeros(1, dtype=torch.float64)
    lengths = [len(blocks[v]) for v in visits]
    for members in micro_batches(lengths, budget=c.tokens_per_micro_batch, world_size=ranks.world_size)[ranks.rank]:
        at = [visits[i] for i in members or [0]]  # an idle rank keeps in step with the others, as in the loop
        with torch.no_grad():
            logps = policy(pack([blocks[v] for v in at], **packing).to(ranks.device))[:, 0].double().cpu()
        if members:
            total += (logps - torch.from_numpy(ref_logps[at])).sum()
    dist.reshard(policy)
    return max(0.0, float(dist.all_sum(total.to(ranks.device))) / len(visits))


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


RECORD = "restore it, or start again in a new --out"


def check_folder(out: Path, c: Config, started: bool) -> None:
    """ValueError where the folder holds a run with other settings."""
    path = out / "run.json"
    if path.exists() and (started or (out / "policy").exists()):
        before = files.read_record(path, RECORD, config=dict)["config"]
        changed = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in settings(c).items() if before.get(k) != v]
        if changed:
            raise ValueError(f"{out} holds a run with other settings ({'; '.join(changed)}): choose another --out")


def settings(c: Config) -> dict[str, object]:
    """The options that decide the result; a run may go on with other values of the rest."""
    free = ("stop_after", "save_every", "tokens_per_micro_batch", "out", "token_cache", "reference_cache")
    free += ("sample_every", "sample_prompts", "log_to", "timeout")
    return {key: value for key, value in dataclasses.asdict(c).items() if key not in free}


def changed_settings(c: Config) -> list[str]:
    """Names of the settings that the run uses at another value than their default."""
    default = {field.name: field.default for field in dataclasses.fields(Config)}
    return [key for key, value in settings(c).items() if key in used_options(c) and value != default[key]]


def claim(out: Path, c: Config, inputs: dict[str, str], started: bool, ranks: dist.Ranks) -> None:
    """Write run.json; for a run that goes on, ValueError if what its paths hold is not what it began with."""
    path = out / "run.json"
    if started:
        before = files.read_record(path, RECORD, inputs=dict)["inputs"]
        changed = [key for key in inputs if inputs[key] != before.get(key)]
        if changed:
            raise ValueError(
                f"{out}: the {' and '.join(changed)} of this run changed since it began, so it cannot go on: restore "
                "what it began with, or start again in a new --out"
            )
    dist.barrier()
    if ranks.first:
        record = {"config": settings(c), "changed": changed_settings(c), "inputs": inputs}
        record |= {"world_size": ranks.world_size, "argv": sys.argv[1:]}
        files.write_record(path, record)


def say(ranks: dist.Ranks, message: str) -> None:
    """One line from rank 0, above the progress bar."""
    if ranks.first:
        tqdm.write(message, file=sys.stderr)


if __name__ == "__main__":
    config.run_main(main)
