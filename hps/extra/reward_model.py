"""A reward model: a Hugging Face sequence classifier as a function from packed prompts to one reward per response.

Either brought along (a scalar head like Skywork's, or several objectives whose mean counts, as the paper uses ArmoRM)
or trained here: `train.py --loss reward` fits one to human pairs (Bradley-Terry, the paper's Eq. 15). It reads the
prompt, the response and its end; the state of the last token, through the linear layer `score`, is the reward.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hps import adapters, attention, loading
from hps.io import hub
from hps.model import states, unwrapped
from hps.packing import Packed

SEVERAL = (
    "{what} has {labels} labels where a reward model has one: is it a classifier? If they are objectives whose mean is "
    "the reward, say so with --objectives mean"
)


class RewardModel(nn.Module):
    """`forward(packed) -> (B, K) fp32` rewards; `lm` is a sequence classifier with a layer `score`, plain or in peft.

    Of several objectives the mean is the reward. Attributes as in PolicyModel.
    """

    def __init__(self, lm: nn.Module, *, autocast: torch.dtype | None = None):
        super().__init__()
        self.lm = lm
        self.padded = not attention.install(self.classifier)
        self.autocast = autocast

    @property
    def classifier(self) -> nn.Module:
        """The transformers model itself, with its adapters in place."""
        return unwrapped(self.lm)

    def forward(self, packed: Packed) -> Tensor:
        """Rewards (B, K) fp32, 0 where there is no response."""
        return torch.where(packed.valid, self._rewards(states(self, packed)[packed.last]), 0.0)

    def _rewards(self, states: Tensor) -> Tensor:
        """(..., D) -> (...), always in fp32: in bf16 the rewards of a hundred candidates tie."""
        score = self.classifier.score
        bias = None if score.bias is None else score.bias.float()
        return nn.functional.linear(states.float(), score.weight.float(), bias).mean(-1)


class RemoteRewardModel(nn.Module):
    """`forward(packed) -> (B, K) fp32` of a model that brings its own code: each response alone, as its card shows.

    The mean over `rewards` where its output has them (ArmoRM's objectives), else over `logits`.
    """

    def __init__(self, lm: nn.Module, *, objectives: str = "one"):
        super().__init__()
        self.lm, self.objectives, self.padded = lm, objectives, True

    def forward(self, packed: Packed) -> Tensor:
        """Rewards (B, K) fp32, 0 where there is no response; ValueError for several objectives not expected."""
        rewards = torch.zeros(packed.valid.shape)
        for (b, k), ids, block in zip(packed.valid.nonzero().tolist(), packed.input_ids, packed.block, strict=True):
            output = self.lm(input_ids=ids[None, block >= 0])
            found = getattr(output, "rewards", None)
            found = output.logits if found is None else found
            if found.numel() != 1 and self.objectives == "one":
                raise ValueError(SEVERAL.format(what="this model", labels=found.numel()))
            rewards[b, k] = found.float().mean()
        return rewards


def load_reward_model(
    path: str,
    *,
    dtype: torch.dtype,
    tokenizer: Any = None,
    objectives: str = "one",
    begin: bool = False,
    merged: bool = False,
) -> nn.Module:
    """A sequence classifier from a local folder or the hub, in evaluation mode; an adapter stays beside its base.

    Args:
        tokenizer, merged: as in model.load_causal_lm.
        objectives: one, or mean for a head with several.
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
            whole = load_reward_model(base, dtype=dtype, objectives=objectives, begin=True)
            lm = adapters.load_adapter(whole, path, merged=merged)
        else:
            lm = _load_classifier(path, dtype=dtype, objectives=objectives, begin=begin)
        if tokenizer is not None:
            loading.check_vocabulary(lm, tokenizer)
    return lm


def _load_classifier(path: str, *, dtype: torch.dtype, objectives: str, begin: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    name, revision = hub.resolve(path)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=revision)
    ready = any("SequenceClassification" in name for name in config.architectures or [])
    if not ready and not begin:
        kind = ", ".join(config.architectures or ["of no kind"])
        raise ValueError(f"it is no reward model but {kind}: train one from it with train.py --loss reward")
    how: dict[str, Any] = dict(revision=revision, dtype=dtype, trust_remote_code=False)
    how |= {} if ready else {"num_labels": 1}
    lm = loading.load_whole(AutoModelForSequenceClassification, name, begin=not ready, **how)
    if not isinstance(getattr(lm, "score", None), nn.Linear):
        raise ValueError(f"{type(lm).__name__} has no linear layer `score` over its last token's state")
    if lm.score.out_features != 1 and objectives == "one":
        raise ValueError(SEVERAL.format(what=path, labels=lm.score.out_features))
    if not ready:
        nn.init.zeros_(lm.score.weight)
        # transformers takes the last token that is no pad: with EOS as the pad it would read the one before the end.
        text = lm.config.get_text_config()
        if pad_token_id(lm) in (text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]):
            text.pad_token_id = None
    lm.score.float()
    return lm


def pad_token_id(lm: nn.Module) -> int | None:
    """The token that a classifier takes for padding, in its config or in that of its text part."""
    return getattr(lm.config.get_text_config(), "pad_token_id", None)


def load_remote(path: str, *, dtype: torch.dtype, revision: str) -> nn.Module:
    """A sequence classifier that runs the code which it brings: only for one that you have read, so pinned.

    Raises:
        ValueError: no such model at that revision.
    """
    from transformers import AutoModelForSequenceClassification

    how: dict[str, Any] = {} if Path(path).exists() else {"revision": revision, "code_revision": revision}
    with loading.explain_load_errors(f"reward model of revision {revision}", path):
        return loading.load_whole(AutoModelForSequenceClassification, path, dtype=dtype, trust_remote_code=True, **how)
