"""ArmoRM (Wang et al. 2024): objectives by a linear layer, weighed by a network that reads the prompt's end.

    rewards = regression_layer(state of the last token)                                      19 objectives
    gating  = logit_scale * softmax(layers(state where the prompt's text ends) / temperature)
    score   = sum(gating * (rewards @ reward_transform_matrix))

Names of tensors, keys of the config and formulas are those of `modeling_custom.py` beside the weights of
RLHFlow/ArmoRM-Llama3-8B-v0.1, which is not run. Differs: all of this is in fp32 whatever the dtype of the decoder.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaModel, LlamaPreTrainedModel

from hps.packing import Packed

# As the model's card names them, in the order of its linear layer; its config does not.
OBJECTIVES = """helpsteer-helpfulness helpsteer-correctness helpsteer-coherence helpsteer-complexity helpsteer-verbosity
    ultrafeedback-overall_score ultrafeedback-instruction_following ultrafeedback-truthfulness ultrafeedback-honesty
    ultrafeedback-helpfulness beavertails-is_safe prometheus-score argilla-overall_quality argilla-judge_lm
    code-complexity code-style code-explanation code-instruction-following code-readability""".split()
# The gate reads the first token of this, where it stands last: the end of the turn that is answered.
ANSWER_BEGINS = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"


class GatingNetwork(nn.Module):
    """The weight of each objective, by a state of the prompt."""

    def __init__(self, config: Any, objectives: int):
        super().__init__()
        self.temperature = getattr(config, "gating_temperature", 10)
        hidden = [getattr(config, "gating_hidden_dim", 1024)] * getattr(config, "gating_n_hidden", 3)
        widths = [config.hidden_size, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, [*widths[1:], objectives], strict=True))
        self.logit_scale = nn.Parameter(torch.ones(1))

    def forward(self, states: Tensor) -> Tensor:
        """(B, D) -> (B, objectives), of which each row sums to logit_scale."""
        for layer in self.layers[:-1]:
            states = torch.relu(layer(states))
        return self.logit_scale * torch.softmax(self.layers[-1](states) / self.temperature, -1)


class LlamaForRewardModelWithGating(LlamaPreTrainedModel):
    """The checkpoint's own class, for loading its weights: `gated` is called on states, there is no forward."""

    _keep_in_fp32_modules_strict: ClassVar = {"regression_layer", "reward_transform_matrix", "gating"}

    def __init__(self, config: Any):
        super().__init__(config)
        objectives = getattr(config, "num_objectives", 19)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, objectives, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.zeros(objectives, objectives))
        self.gating = GatingNetwork(config, objectives)
        self.post_init()

    def gated(self, rewards: Tensor, prompt_states: Tensor) -> Tensor:
        """Objectives (B, K, O) and the states that the gate reads (B, D), fp32 -> the gate's reward (B, K)."""
        return (self.gating(prompt_states)[:, None] * (rewards @ self.reward_transform_matrix)).sum(-1)


def gate_places(packed: Packed, answer_begins: list[int]) -> list[int]:
    """Of each prompt the index into the flattened R * N positions of the token whose state the gate reads.

    Raises:
        ValueError: a prompt in which `answer_begins`, the ids of ANSWER_BEGINS, does not stand.
    """
    ids, width = packed.input_ids.flatten().tolist(), packed.input_ids.shape[1]
    begin, places = 0, []
    for prompt, responses in packed.spans:
        end = begin + prompt + responses[0]  # where EOS is the pad, an empty response is the prompt's last token
        found = [at for at in range(begin, end) if ids[at : at + len(answer_begins)] == answer_begins]
        if not found:
            raise ValueError(
                f"a prompt without {ANSWER_BEGINS!r}, behind which the gate's state stands: it reads chat prompts, in "
                "its own template; --objectives mean reads others too"
            )
        places.append(found[-1])
        begin += len(responses) * width if packed.causal else prompt + sum(responses)
    return places
