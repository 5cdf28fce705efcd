"""A Hugging Face causal LM as a function from packed prompts to sequence log-probs, and its loading.

What it can take, and that packed responses get what they would get alone, is checked in hps.limits. Most of it serves
reward models as well.
"""

import functools
import hashlib
import json
import logging
from typing import Any

import torch
from torch import Tensor, nn

from hps import attention
from hps.io import hub
from hps.logps import sequence_logps, token_logps
from hps.packing import Packed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --dtype
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}  # the last one's is ARM's name for them


class PolicyModel(nn.Module):
    """`forward(packed) -> (B, K) fp32` summed log-probs; `lm` is a causal LM, plain or wrapped by peft."""

    def __init__(self, lm: nn.Module, *, autocast: torch.dtype | None = None):
        super().__init__()
        self.lm = lm
        # Takes plain rows only, each by its own forward; limits.check sets it too.
        self.padded = not attention.install(self.causal_lm)
        self.autocast = autocast  # compute dtype where nothing else (frozen bf16 weights, FSDP) lowers it

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model itself, with its adapters in place."""
        return unwrapped(self.lm)

    @property
    def head(self) -> Tensor:
        """The output head's weight, (V, D)."""
        return self.causal_lm.get_output_embeddings().weight

    def hidden(self, packed: Packed) -> Tensor:
        """States that predict the scored tokens, (T, D), in the compute dtype; of plain rows the logits, (T, V)."""
        if not self.padded:
            return states(self, packed)[packed.predictor]

        def scored(_head: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:  # all that goes into the head
            return (given[0].flatten(0, 1)[packed.predictor][None],)

        assert packed.causal, "this model takes plain rows only"
        head = self.causal_lm.get_output_embeddings()
        with autocasting(self, packed.input_ids), head.register_forward_pre_hook(scored):
            return self.causal_lm(input_ids=packed.input_ids, use_cache=False).logits[0]

    def forward(self, packed: Packed) -> Tensor:
        """Log-probs of every response, summed over its tokens, end token included, (B, K) fp32 nats."""
        if self.padded:
            logps = torch.log_softmax(self.hidden(packed).float(), -1).gather(-1, packed.targets[:, None])[:, 0]
        else:
            head = self.head if self.autocast is None else self.head.to(self.autocast)
            logps = token_logps(self.hidden(packed), head, packed.targets)
        return sequence_logps(logps, packed.num_tokens)


def unwrapped(lm: Any) -> Any:
    """The transformers model inside a peft model, adapters in place, or the model itself."""
    return lm.get_base_model() if hasattr(lm, "get_base_model") else lm


def autocasting(model: Any, on: Tensor) -> torch.autocast:
    """The context in which a policy or reward model computes on a tensor's device."""
    return torch.autocast(on.device.type, model.autocast, enabled=model.autocast is not None)


def decoder_of(lm: Any) -> Any:
    """All of a transformers model, plain or wrapped by peft, below its head."""
    found = unwrapped(lm).get_decoder()
    return found if found is not unwrapped(lm) else found.model  # of Llama 4's text model


def layers_of(lm: Any) -> list[nn.Module]:
    """The layers of its decoder, in order."""
    return list(max((m for m in decoder_of(lm).children() if isinstance(m, nn.ModuleList)), key=len))


def states(model: Any, packed: Packed) -> Tensor:
    """A model's last states at all packed positions, and at pads behind them, (R * N, D), in the compute dtype."""
    assert packed.causal or not model.padded, "this model takes plain rows only"
    decoder, given = decoder_of(model.lm), {"input_ids": packed.input_ids}
    if not model.padded:
        heads = getattr(decoder.config.get_text_config(), "num_attention_heads", 1)
        given = attention.inputs(packed, heads=heads)
    with autocasting(model, packed.input_ids):
        return decoder(use_cache=False, **given).last_hidden_state.flatten(0, 1)


# -- loading --


@functools.cache  # so that the log says it once
def compute_dtype(name: str) -> torch.dtype:
    """torch's dtype of --dtype; the log says so where this machine has another one that is many times faster."""
    known = torch.cpu.get_capabilities()
    if name == "fp32" and torch.cuda.is_available():  # TF32 would round as bf16 does, which fp32 was chosen to avoid
        logging.getLogger(__name__).warning("fp32 products take no tensor cores, 10 times slower: use --dtype bf16")
    if name == "bf16" and not torch.cuda.is_available() and not any(map(known.get, BF16_INSTRUCTIONS)):
        logging.getLogger(__name__).warning("this CPU emulates bf16, 8 to 27 times slower: use --dtype fp32")
    return DTYPES[name]


def load_causal_lm(path: str, *, dtype: torch.dtype | None, tokenizer: Any = None, merged: bool = False) -> nn.Module:
    """A causal LM from a local folder or the hub, in evaluation mode; an adapter stays beside its base, as in training.

    Args:
        dtype: of its weights; None as in loading.load_whole.
        tokenizer: must have no id without an embedding; None where nothing is tokenised.
        merged: put an adapter into the weights of its base, all of which can train then. In bf16 that loses most of it.

    Raises:
        ValueError: no such model, one whose weights are not all there, or one that would have to be unpickled, or to
            run its own code.
    """
    from transformers import AutoModelForCausalLM

    from hps import adapters, loading

    with loading.explain_load_errors("model", path):
        adapter = adapters.adapter_in(path)
        if adapter:
            base = load_causal_lm(adapter[0], dtype=dtype or torch.float32)
            lm = adapters.load_adapter(base, path, merged=merged)
        else:
            name, revision = hub.resolve(path)
            how: dict[str, Any] = dict(revision=revision, dtype=dtype)
            lm = loading.load_whole(AutoModelForCausalLM, name, trust_remote_code=False, **how)
        if tokenizer is not None:
            loading.check_vocabulary(lm, tokenizer)
    return lm


def checkpoint_layers(lm: nn.Module) -> None:
    """Recompute each decoder layer in the backward pass, in place.

    transformers does so only in training mode, where dropout would be on too: it is set to zero first.
    """
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    lm.activation_checkpointing_enable()  # without re-entrance, which FSDP needs
    lm.train()


def fingerprint(lm: nn.Module, *, dtype: torch.dtype | None = None) -> str:
    """sha256 hex of a model's weights (names, dtypes, bytes) and architecture; equal content, equal name. dtype: what
    they will be cast to, if to anything."""
    config = lm.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    if hasattr(lm, "peft_config"):
        from hps import adapters

        digest.update(adapters.settings(lm).encode())
    for name, parameter in sorted(lm.named_parameters()):  # tied weights appear once
        cast = parameter.detach().to(dtype)
        digest.update(f"{name} {cast.dtype} {tuple(cast.shape)}".encode())
        digest.update(cast.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
