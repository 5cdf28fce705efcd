"""A reward model: a Hugging Face sequence classifier as a function from packed prompts to one reward a response.

Either brought along (a scalar head like Skywork's, or several objectives whose mean counts, as the paper uses ArmoRM)
or trained here: `train.py --loss reward` fits one to human pairs (Bradley-Terry, the paper's Eq. 15). It reads the
prompt, the response and its end; the state of the last token, through the linear layer `score`, is the reward.
"""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from hps import attention
from hps.io import hub
from hps.model import adapter_settings, base_of, decoder_layers, states, why_not
from hps.packing import Block, Packed, pack

SEVERAL = (
    "{what} has {labels} labels where a reward model has one: is it a classifier? If they are objectives whose mean is "
    "the reward, say so with --objectives mean"
)


class RewardModel(nn.Module):
    """`forward(packed) -> (B, K) fp32` rewards; `lm` is a sequence classifier with a layer `score`, plain or in peft.

    Of several objectives the mean is the reward.
    """

    def __init__(self, lm: nn.Module, *, autocast: torch.dtype | None = None):
        super().__init__()
        self.lm = lm
        attention.install(self.classifier)
        self.dense_attention = False  # set by check_paths_agree for a model that needs it
        self.autocast = autocast  # as in PolicyModel

    @property
    def classifier(self) -> nn.Module:
        """The transformers model itself, with adapters in place if there are any."""
        return self.lm.get_base_model() if hasattr(self.lm, "peft_config") else self.lm

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return decoder_layers(self.classifier.base_model)

    def forward(self, packed: Packed) -> Tensor:
        """Rewards (B, K) fp32, 0 where there is no response."""
        decoder, score = self.classifier.base_model, self.classifier.score
        found = states(decoder, packed, dense=self.dense_attention, autocast=self.autocast)[packed.last]
        bias = getattr(score, "bias", None)
        # Always in fp32: in bf16 rewards of a hundred candidates tie.
        rewards = nn.functional.linear(found.float(), score.weight.float(), None if bias is None else bias.float())
        return torch.where(packed.valid, rewards.mean(-1), 0.0)


class RemoteRewardModel(nn.Module):
    """`forward(packed) -> (B, K) fp32` of a model that brings its own code: each response alone, as its card shows.

    The mean over `rewards` where its output has them (ArmoRM's objectives), else over `logits`.
    """

    def __init__(self, lm: nn.Module, *, objectives: str = "one"):
        super().__init__()
        self.lm, self.objectives = lm, objectives

    def forward(self, packed: Packed) -> Tensor:
        """Rewards (B, K) fp32, 0 where there is no response; ValueError for several objectives not expected."""
        rewards = torch.zeros(packed.valid.shape)
        at = packed.prefix
        for b, (length, responses) in enumerate(packed.spans):
            start, own = packed.input_ids[:, : packed.prefix], packed.input_ids[:, at : at + length]
            prompt, at = torch.cat([start, own], dim=1), at + length
            for k, n in enumerate(responses):
                output = self.lm(input_ids=torch.cat([prompt, packed.input_ids[:, at : at + n]], dim=1))
                found = getattr(output, "rewards", None)
                found = output.logits if found is None else found
                if found.numel() != 1 and self.objectives == "one":
                    raise ValueError(SEVERAL.format(what="this model", labels=found.numel()))
                rewards[b, k] = found.float().mean()
                at += n
        return rewards


def load_reward_model(path: str, *, dtype: torch.dtype, objectives: str = "one", begin: bool = False) -> nn.Module:
    """A sequence classifier from a local folder or the hub, in evaluation mode; an adapter comes merged into its base.

    Args:
        objectives: one, or mean for a head with several.
        begin: a causal LM is welcome too, and gets a head of zeros: every reward is 0 then, and the first loss log 2.

    Raises:
        ValueError: no such model, no reward model, or a head of another width than `objectives` says.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if about := adapter_settings(path):
        from peft import PeftModel

        if about.get("task_type") != "SEQ_CLS":
            raise ValueError(f"{path} is the adapter of a policy, not of a reward model: train one with --loss reward")
        base = load_reward_model(base_of(about), dtype=dtype, objectives=objectives, begin=True)
        return cast(Any, PeftModel.from_pretrained(base, path)).merge_and_unload().requires_grad_(True).eval()
    try:
        name, revision = hub.resolve(path)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, revision=revision)
    except (OSError, ValueError) as e:
        raise ValueError(f"cannot load the reward model {path!r}: {why_not(path, e)}") from e
    ready = any("SequenceClassification" in name for name in config.architectures or [])
    if not ready and not begin:
        kind = ", ".join(config.architectures or ["of no kind"])
        raise ValueError(f"{path} is no reward model but {kind}: train one from it with train.py --loss reward")
    how: dict[str, Any] = dict(dtype=dtype, attn_implementation="sdpa", revision=revision)
    how |= {} if ready else {"num_labels": 1}
    try:
        lm = AutoModelForSequenceClassification.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, **how
        )
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(f"cannot load the reward model {path!r}: {why_not(path, e)}") from e
    if not isinstance(getattr(lm, "score", None), nn.Linear):
        raise ValueError(f"{path}: {type(lm).__name__} has no linear layer `score` over its last token's state")
    if lm.score.out_features != 1 and objectives == "one":
        raise ValueError(SEVERAL.format(what=path, labels=lm.score.out_features))
    if not ready:
        nn.init.zeros_(lm.score.weight)
        # transformers takes the last token that is no pad: with EOS as the pad it would read the one before the end.
        eos = config.eos_token_id
        if lm.config.pad_token_id in (eos if isinstance(eos, list) else [eos]):
            lm.config.pad_token_id = None
    lm.score.float()
    return lm.eval()


def load_remote(path: str, *, dtype: torch.dtype, revision: str) -> nn.Module:
    """A sequence classifier that runs the code which it brings: only for one that you have read, so pinned.

    Raises:
        ValueError: no such model at that revision.
    """
    from transformers import AutoModelForSequenceClassification

    how: dict[str, Any] = {} if Path(path).exists() else {"revision": revision, "code_revision": revision}
    try:
        lm = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=True, use_safetensors=True, **how
        )
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(f"cannot load the reward model {path!r} at revision {revision!r}: {why_not(path, e)}") from e
    return lm.eval()


def check_paths_agree(model: RewardModel, *, vocab_size: int) -> float:
    """Compare packed rewards with the model's own on a few tokens, and return the largest difference.

    A model whose attention the packed layout does not reach is switched to dense masks.

    Raises:
        ValueError: the two differ by more than rounding.
    """
    worst = float("inf")
    coarse = model.autocast or next(model.classifier.base_model.parameters()).dtype
    for dense in (False, True):
        model.dense_attention = dense
        try:
            worst = min(worst, _difference(model, vocab_size))
        except attention.LayoutLost:
            continue
        if worst <= (1e-3 if coarse == torch.float32 else 0.5):
            return worst
    raise ValueError(
        f"packed rewards differ from this model's own by {worst:.3g}: {type(model.classifier).__name__} pools another "
        "token than the last, or ignores block masks, which is not supported"
    )


def _difference(model: RewardModel, vocab_size: int) -> float:
    draw = np.random.default_rng(0)
    pad = model.classifier.config.pad_token_id
    allowed = np.array([i for i in range(min(vocab_size, 1000)) if i != pad])
    prompt, *responses = (draw.choice(allowed, size=size) for size in (5, 4, 3))
    classifier, device = model.classifier, next(model.parameters()).device
    with torch.inference_mode():
        ours = model(pack([Block(prompt, tuple(responses))], pad_id=0).to(device))[0].cpu()
        own = []
        for response in responses:
            whole = torch.from_numpy(np.concatenate([prompt, response])).long().to(device)
            with torch.autocast(device.type, model.autocast, enabled=model.autocast is not None):
                found = classifier.base_model(input_ids=whole[None], use_cache=False).last_hidden_state[0, -1]
            own.append(classifier.score(found.to(classifier.score.weight.dtype)).float().mean().cpu())
    return float((ours - torch.stack(own)).abs().max())
