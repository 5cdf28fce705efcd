"""A Hugging Face causal LM as a function from packed prompts to sequence log-probs.

What it can take, and that packed responses get what they would get alone, is checked in hps.limits. Most of it serves
reward models as well.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hps import attention
from hps.logps import sequence_logps, token_logps
from hps.packing import Packed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # of --dtype


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
