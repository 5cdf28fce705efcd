"""The models that a run starts from, as the options of train.py name them: loaded, with an adapter, sharded.

Imported when the first one is loaded.
"""

from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast

from hps import dist, model, pretrained, sharding
from hps.io import hub
from hps.methods import needs_reference
from hps.options import Config

if TYPE_CHECKING:
    from hps.extra import reward_model


def load_policy(
    c: Config, ranks: dist.Ranks, tokenizer: PreTrainedTokenizerFast, *, longest: int
) -> tuple["model.PolicyModel | reward_model.RewardModel", str, bool]:
    """The model that is trained, with its adapter, sharded; the fingerprint of the weights that it starts from; and
    whether its first loss is known: policy = reference, or a reward model's head of zeros.

    longest: tokens that it must have positions for.
    """
    dtype = pretrained.compute_dtype(c.dtype)
    # Trained weights are fp32, a frozen base is not updated.
    loaded, cast = (None, torch.float32) if not c.lora_rank or dtype == torch.float32 else (dtype, None)
    how = dict(dtype=loaded, tokenizer=tokenizer, merged=not c.lora_rank)
    if c.loss == "reward":
        from hps.extra import reward_model

        lm, wrapped = reward_model.load_reward_model(c.model, begin=True, **how), reward_model.RewardModel
    else:
        lm, wrapped = pretrained.load_causal_lm(c.model, **how), model.PolicyModel
    # While they are whole and untouched.
    weights = dist.from_first(lambda: pretrained.fingerprint(lm, dtype=cast), ranks)
    if c.load_in_4bit:
        from hps.extra import quantised

        lm, weights = quantised.to_4bit(lm, ranks.device, dtype), f"{weights} in nf4"
    if c.lora_rank:
        from hps import adapters

        adapter = dict(rank=c.lora_rank, alpha=c.lora_alpha, kind=c.lora_kind, seed=c.seed)
        adapter |= dict(targets=c.lora_targets.split(","))
        more = dict(task="SEQ_CLS" if c.loss == "reward" else "CAUSAL_LM", revision=hub.resolve(c.model)[1])
        lm = adapters.add_lora(lm, **adapter, **more)
    if c.gradient_checkpointing:
        pretrained.checkpoint_layers(lm)
    # Under FSDP its mixed precision casts the fp32 weights, in one process autocast does.
    autocast = dtype if not c.lora_rank and not ranks.sharded and dtype != torch.float32 else None
    policy = wrapped(lm, autocast=autocast)
    untrained = (
        not policy.classifier.score.weight.any() if c.loss == "reward" else needs_reference(c) and not c.reference
    )
    sharding.place(policy, c, ranks, cast=cast, longest=longest)
    return policy, weights, untrained


def make_optimizer(c: Config, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW of the parameters, its learning rate the run's highest. Its moments are fp32 as the trained weights are: at
    lr 5e-7 an update in bf16 would round to nothing."""
    how: dict[str, Any] = dict(lr=c.lr, betas=(c.adam_beta1, c.adam_beta2), weight_decay=c.weight_decay)
    if c.optim == "adamw_8bit":
        from hps.extra import quantised

        return quantised.adamw_8bit(parameters, **how)
    return torch.optim.AdamW(parameters, **how, fused=True)


def load_reference(
    c: Config, ranks: dist.Ranks, tokenizer: PreTrainedTokenizerFast, *, longest: int
) -> tuple[model.PolicyModel, str]:
    """The model that `--reference` names, sharded, and the fingerprint of its weights."""
    loaded, cast = (None, torch.float32) if c.dtype == "fp32" else (torch.bfloat16, None)
    lm = pretrained.load_causal_lm(c.reference, dtype=loaded, tokenizer=tokenizer)
    weights = dist.from_first(lambda: pretrained.fingerprint(lm, dtype=cast), ranks)
    scorer = model.PolicyModel(lm)
    sharding.place(scorer, c, ranks, cast=cast, longest=longest)
    return scorer, weights
