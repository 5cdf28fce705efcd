"""A random model in each role of recipes/paper.sh, and rows of its two data sets: every line of it runs in a minute.

    python recipes/tiny_models.py DIR

Writes DIR/policy (a Llama), DIR/skywork (a sequence classifier on one), DIR/armorm (with ArmoRM's gate), all with one
tokenizer and template of Llama 3's form, and DIR/hh-rlhf.jsonl and DIR/pku-saferlhf.jsonl. They know nothing: what is
measured on them says nothing, only that it could be.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from hps.extra.armorm import LlamaForRewardModelWithGating

CONTROL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[PAD]"]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
WORDS = (
    "tea is hot and good but some people drink cold water why do they ask how may i help you with that please".split()
)
ROWS = 48  # of each data set


def tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes and a few merges, with Llama 3's control tokens and the form of its template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["user assistant", " ".join(WORDS), "\n\n"], trainer)
    named = dict(bos_token=CONTROL[0], eos_token="<|eot_id|>", pad_token="[PAD]")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **named)


def config(words: PreTrainedTokenizerFast, **more: Any) -> LlamaConfig:
    """Llama 3's architecture, a few thousand times smaller."""
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    return LlamaConfig(
        vocab_size=len(words), num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
        tie_word_embeddings=False, **sizes, **ids, **more,
    )  # fmt: skip


def policy(words: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A language model whose answers end: all states have one large value, which speaks for the end token."""
    lm = LlamaForCausalLM(config(words))
    with torch.no_grad():
        lm.model.embed_tokens.weight[:, 0] = 3.0
        lm.lm_head.weight[words.convert_tokens_to_ids("<|eot_id|>"), 0] += 1.0
    return lm


def dialogue(draw: random.Random) -> tuple[str, str, str]:
    """A question and two answers."""
    question, *answers = (" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(3))
    return question + "?", answers[0] + ".", answers[1] + "!"


def main() -> None:
    out = Path(sys.argv[1])
    torch.manual_seed(0)
    draw, words = random.Random(0), tokenizer()
    made: dict[str, Any] = {
        "policy": policy(words),
        "skywork": LlamaForSequenceClassification(config(words, num_labels=1)),
        "armorm": LlamaForRewardModelWithGating(
            config(words, num_objectives=19, gating_temperature=10, gating_hidden_dim=16, gating_n_hidden=3)
        ),
    }
    nn.init.normal_(made["armorm"].reward_transform_matrix)
    for name, lm in made.items():
        lm.save_pretrained(out / name)
        words.save_pretrained(out / name)
    with (out / "hh-rlhf.jsonl").open("w") as file:
        for _ in range(ROWS):
            question, chosen, rejected = dialogue(draw)
            begin = f"\n\nHuman: {question}\n\nAssistant: "
            file.write(json.dumps({"chosen": begin + chosen, "rejected": begin + rejected}) + "\n")
    with (out / "pku-saferlhf.jsonl").open("w") as file:
        for _ in range(ROWS):
            question, one, other = dialogue(draw)
            labels = {"better_response_id": draw.randint(0, 1), "safer_response_id": draw.randint(0, 1)}
            file.write(json.dumps({"prompt": question, "response_0": one, "response_1": other} | labels) + "\n")


if __name__ == "__main__":
    main()
