"""A reward model: a Hugging Face sequence classifier as a function from packed prompts to one reward per response.

Either brought along (a scalar head like Skywork's, several objectives, or ArmoRM, whose gate weighs them) or trained
here: `train.py --loss reward` fits one to human pairs (Bradley-Terry, the paper's Eq. 15). It reads the prompt, the
response and its end; the state of the last token, through a linear layer, is the reward.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hps import adapters, attention, loading
from hps.io import hub
from hps.model import states, unwrapped
from hps.packing import Packed

GATED = "LlamaForRewardModelWithGating"  # the architecture of hps.extra.armorm


class RewardModel(nn.Module):
    """`forward(packed) -> (B, K) fp32` rewards; `lm`: a classifier with a layer `score`, plain or in peft, or ArmoRM.

    Args:
        objectives: which of several outputs is the reward: mean, score (what ArmoRM's gate makes of them), or the name
            of one. answer_begins: ids of `armorm.ANSWER_BEGINS`, which the gate needs.

    Attributes as in PolicyModel.
    """

    def __init__(
        self,
        lm: nn.Module,
        *,
        objectives: str = "mean",
        answer_begins: list[int] | None = None,
        autocast: torch.dtype | None = None,
    ):
        super().__init__()
        self.lm = lm
        self.padded = not attention.install(self.classifier)
        self.autocast = autocast
        self.objectives, self.answer_begins = objectives, answer_begins

    @property
    def classifier(self) -> nn.Module:
        """The transformers model itself, with its adapters in place."""
        return unwrapped(self.lm)

    def forward(self, packed: Packed) -> Tensor:
        """Rewards (B, K) fp32, 0 where there is no response."""
        found = states(self, packed)
        head = head_of(self.classifier)
        bias = None if head.bias is None else head.bias.float()
        # Always in fp32: in bf16 the rewards of a hundred candidates tie.
        rewards = nn.functional.linear(found[packed.last].float(), head.weight.float(), bias)  # (B, K, objectives)
        if self.objectives == "score":
            from hps.extra import armorm

            assert self.answer_begins, "the gate reads a place that the tokenizer tells"
            reward = self.classifier.gated(rewards, found[armorm.gate_places(packed, self.answer_begins)].float())
        elif self.objectives in ("one", "mean"):
            reward = rewards.mean(-1)
        else:
            reward = rewards[..., objective_names(self.classifier).index(self.objectives)]
        return torch.where(packed.valid, reward, 0.0)


def head_of(lm: Any) -> Any:
    """The linear layer over the last token's state, ArmoRM's or `score` in transformers; None where there is none."""
    return getattr(lm, "regression_layer", None) or getattr(lm, "score", None)


def objective_names(lm: Any) -> list[str]:
    """What a head's outputs are called: the labels of its config, of ArmoRM the objectives that its card names."""
    if hasattr(lm, "gating"):
        from hps.extra import armorm

        return armorm.OBJECTIVES if head_of(lm).out_features == len(armorm.OBJECTIVES) else []
    return [str(lm.config.id2label.get(i, i)) for i in range(head_of(lm).out_features)]


def check_objectives(lm: Any, objectives: str, what: str) -> None:
    """ValueError where `objectives` does not say which of a head's outputs is the reward, or names none of them."""
    count, names = head_of(lm).out_features, objective_names(lm)
    known = ["mean", *(["score"] if hasattr(lm, "gating") else []), *names]
    if objectives == "one" and count != 1:
        raise ValueError(
            f"{what} has {count} labels where a reward model has one: is it a classifier? If they are objectives, say "
            f"which is the reward, --objectives {', '.join(known)}"
        )
    if objectives not in ("one", *known):
        raise ValueError(f"--objectives {objectives} is nothing of {what}: choose one of {', '.join(known)}")


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype | None,
    tokenizer: Any = None,
    objectives: str = "one",
    begin: bool = False,
    merged: bool = False,
) -> nn.Module:
    """A sequence classifier from a local folder or the hub, in evaluation mode; an adapter stays beside its base.

    Args:
        dtype, tokenizer, merged: as in pretrained.load_causal_lm.
        objectives: one, or of a head with several mean, score (ArmoRM's gate) or the name of one.
        begin: a causal LM is welcome too, and gets a head of zeros: every reward is 0 then, and the first loss log 2.

    Raises:
        ValueError: no such model, no reward model, or a head of another width than `objectives` says.
    """
    with loading.explain_load_errors("reward model", path):
        adapter = adapters.adapter_in(path)
        if adapter:
            base, task = adapter
            if task != "SEQ_CLS":
                raise ValueError("it is the adapter of a policy, not of a reward model: train one with --loss reward")
            whole = load_reward_model(base, dtype=dtype or torch.float32, objectives=objectives, begin=True)
            lm = adapters.load_adapter(whole, path, merged=merged)
        else:
            lm = _load_classifier(path, dtype=dtype, objectives=objectives, begin=begin)
        if tokenizer is not None:
            loading.check_vocabulary(lm, tokenizer)
    return lm


def _load_classifier(path: str, *, dtype: torch.dtype | None, objectives: str, begin: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    name, revision = hub.resolve(path)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=revision)
    kinds, auto = config.architectures or [], AutoModelForSequenceClassification
    if kinds == [GATED]:
        from hps.extra import armorm

        auto = armorm.LlamaForRewardModelWithGating  # its config names code of its own, which is not run
    ready = kinds == [GATED] or any("SequenceClassification" in name for name in kinds)
    if not ready and not begin:
        kind = ", ".join(kinds or ["of no kind"])
        raise ValueError(f"it is no reward model but {kind}: train one from it with train.py --loss reward")
    how: dict[str, Any] = dict(revision=revision, dtype=dtype, trust_remote_code=False)
    how |= {} if ready else {"num_labels": 1}
    lm = loading.load_whole(auto, name, begin=not ready, **how)
    if not isinstance(head_of(lm), nn.Linear):
        raise ValueError(f"{type(lm).__name__} has no linear layer `score` over its last token's state")
    check_objectives(lm, objectives, path)
    if not ready:
        nn.init.zeros_(lm.score.weight)
        # transformers takes the last token that is no pad: with EOS as the pad it would read the one before the end.
        text = lm.config.get_text_config()
        if pad_token_id(lm) in (text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]):
            text.pad_token_id = None
    head_of(lm).float()
    return lm


def pad_token_id(lm: nn.Module) -> int | None:
    """The token that a classifier takes for padding, in its config or in that of its text part."""
    return getattr(lm.config.get_text_config(), "pad_token_id", None)
