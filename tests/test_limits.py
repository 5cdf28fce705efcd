"""What a model can take, over architectures: each value against eager transformers, one response at a time."""

from collections import Counter

import numpy as np
import pytest
import torch
import transformers as T
from helpers import VOCABULARY as V
from helpers import noisy, plain_logp, tiny

from hps import attention, attention_cpu, limits
from hps.evaluate.scoring import token_kl
from hps.extra.reward_model import RewardModel
from hps.model import PolicyModel
from hps.packing import Block, pack
from hps.prepare.generate import generate

SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, eos_token_id=2, bos_token_id=1, pad_token_id=0,
)  # fmt: skip
KV = SIZES | {"num_key_value_heads": 2}
HEADS = KV | {"head_dim": 16}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1)
WINDOW = HEADS | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    shared_expert_intermediate_size=24, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
MLA = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1, first_k_dense_replace=1,
    n_group=1, topk_group=1,
)  # fmt: skip
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
# Of each: its config, and whether rows stay packed.
ARCHITECTURES = {
    "phi": (lambda: T.PhiConfig(**SIZES), False),  # a bias of the head
    "olmo2": (lambda: T.Olmo2Config(**KV), True),
    "qwen3_moe": (lambda: T.Qwen3MoeConfig(**HEADS, **EXPERTS), True),
    "cohere": (lambda: T.CohereConfig(**KV), False),  # scaled logits
    "gemma2": (lambda: T.Gemma2Config(**HEADS, final_logit_softcapping=2.0), False),
    "gemma2, scores alone": (lambda: T.Gemma2Config(**HEADS, final_logit_softcapping=None), False),
    "gemma3": (
        lambda: T.Gemma3Config(
            text_config=WINDOW, vision_config=VISION | {"patch_size": 14}, mm_tokens_per_image=4,
            image_token_index=V + 2, boi_token_index=V + 3, eoi_token_index=V + 4,
        ), False,
    ),
    "llama4": (
        lambda: T.Llama4TextConfig(
            **HEADS, num_local_experts=2, num_experts_per_tok=1, intermediate_size_mlp=48, attention_chunk_size=16
        ), False,
    ),
    "gpt_oss": (lambda: T.GptOssConfig(**HEADS, num_local_experts=4, num_experts_per_tok=2), False),  # sinks
    "deepseek_v3": (lambda: T.DeepseekV3Config(**SIZES, **MLA), False),
    "falcon": (lambda: T.FalconConfig(**SIZES, alibi=True), False),
    "lfm2": (lambda: T.Lfm2Config(**KV, layer_types=["conv", "full_attention"]), False),
    "qwen3_next": (lambda: T.Qwen3NextConfig(**HEADS, **EXPERTS, **LINEAR), False),
    "mamba": (lambda: T.MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=8), False),
}  # fmt: skip


def random_model(name: str, cls=T.AutoModelForCausalLM):
    torch.manual_seed(0)
    return noisy(cls.from_config(ARCHITECTURES[name][0]()))


def long_blocks() -> list[Block]:
    """Longer than every window above."""
    draw = np.random.default_rng(0)
    return [Block(draw.integers(3, V, 21), tuple(draw.integers(3, V, n) for n in (9, 4, 12))) for _ in range(2)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_gets_its_own_values(name, caplog):
    """Log-probs of packed blocks, and a sample's, to 1e-3 nats; slow ways are said in a line with the name."""
    _, packs = ARCHITECTURES[name]
    lm, blocks = random_model(name), long_blocks()
    policy = PolicyModel(lm)
    limits.check(policy, longest=33)  # of the blocks
    assert policy.padded == (not packs)
    assert (f"{type(lm).__name__} cannot take packed rows" in caplog.text) == (not packs)
    packed = pack(blocks, pad_id=0, share_prompt=packs)
    with torch.no_grad():
        ours = policy(packed)
        zero = token_kl(*[policy.hidden(packed), policy.head if packs else None] * 2)
    counts = Counter()
    how = dict(n=2, eos_token_id=2, max_new_tokens=6, as_drawn=True, progress=False, counts=counts)
    samples = [one for _, some in generate(lm, [("a", blocks[0].prompt.tolist()), ("b", [5])], **how) for one in some]
    prompts = [blocks[0].prompt] * 2 + [np.array([5])] * 2
    attention.put(lm, "eager")
    with torch.no_grad():
        for block, row in zip(blocks, ours, strict=True):
            own = torch.stack([plain_logp(lm, block.prompt, y) for y in block.responses])
            torch.testing.assert_close(row, own, rtol=0, atol=1e-3)
        for prompt, one in zip(prompts, samples, strict=True):
            assert one.logp == pytest.approx(float(plain_logp(lm, prompt, one.token_ids)), abs=1e-3)
    assert not zero.any()


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2"])
def test_layers_that_carry_siblings_along_are_found_in_bf16(name):
    """The leak needs no tolerance: a gradient that should be 0 is not."""
    policy = PolicyModel(random_model(name).bfloat16())
    packed, plain = (pack(limits.probe(policy, tokens=16), pad_id=0, share_prompt=share) for share in (True, False))
    assert limits.tried(policy, packed, limits.MIDDLE)[2]
    policy.padded = True
    assert not limits.tried(policy, plain, limits.MIDDLE)[2]
    assert not limits.tried(PolicyModel(tiny("llama").bfloat16()), packed, limits.MIDDLE)[2]


def test_a_model_that_looks_ahead_is_refused():
    lm = noisy(T.BertLMHeadModel(T.BertConfig(**SIZES)))
    with pytest.raises(ValueError, match="BertLMHeadModel cannot be trained or scored here"):
        limits.check(PolicyModel(lm))
    lm = tiny("llama")  # by one token, and no pad: a log-prob knows what it is of
    lm.model.layers[0].register_forward_pre_hook(lambda _, given: (given[0].roll(-1, 1), *given[1:]))
    with pytest.raises(ValueError, match="depends on tokens that are none of its own"):
        limits.check(PolicyModel(lm))


@pytest.mark.parametrize("fault", ["a gradient differs by", "its values are"])
def test_the_gradient_is_compared_on_rows_as_long_as_training_s(monkeypatch, caplog, fault):
    """An attention with the right values and no gradient to what is seen, or with wrong values of the one response
    beside another prompt, whose gradient nobody looks at; 144 tokens are past the decoding kernels."""
    layout, rows = attention_cpu.layout, []

    def wrong(packed, heads):
        rows.append(packed.spans[1][0] + max(packed.spans[1][1]))
        right, first = layout(packed, heads), packed.block[0, :, None] == 0
        if fault == "its values are":
            return lambda *given: right(*given).masked_fill(first, 0)
        return lambda query, key, value, scaling: right(query, key, value.detach(), scaling)

    monkeypatch.setattr(attention_cpu, "layout", wrong)
    for longest in (40, 2048):
        policy = PolicyModel(tiny("llama"))
        limits.check(policy, longest=longest)
        assert policy.padded and fault in caplog.text
        caplog.clear()
    assert rows == [40, 144]


def test_gradients_of_plain_rows_are_those_of_the_model(caplog):
    """Prompts stand in several rows; weights and inputs get what separate forwards give them."""
    lm, blocks = random_model("gemma2"), long_blocks()
    policy = PolicyModel(lm)
    limits.check(policy)
    policy(pack(blocks, pad_id=0, share_prompt=False)).sum().backward()
    ours = {n: p.grad.clone() for n, p in lm.named_parameters()}
    lm.zero_grad()
    sum(plain_logp(lm, block.prompt, y) for block in blocks for y in block.responses).backward()
    for n, p in lm.named_parameters():
        torch.testing.assert_close(ours[n], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()))


def test_reward_models_get_plain_rows_too(caplog):
    """One that begins, too, all of whose rewards are 0."""
    lm, blocks = random_model("qwen3_next", T.AutoModelForSequenceClassification), long_blocks()
    lm.score = torch.nn.Linear(32, 1, bias=False)
    head = lm.score.weight.data.clone()
    lm.score.weight.data.zero_()
    model = RewardModel(lm)
    limits.check(model)
    assert model.padded and "Qwen3NextForSequenceClassification cannot take packed rows" in caplog.text
    lm.score.weight.data.copy_(head)
    found = model(pack(blocks, pad_id=0, share_prompt=False))
    for block, row in zip(blocks, found, strict=True):
        for y, value in zip(block.responses, row, strict=True):
            ids = torch.from_numpy(np.concatenate([block.prompt, y]))
            own = lm.model(input_ids=ids[None]).last_hidden_state[0, -1] @ lm.score.weight[0]
            torch.testing.assert_close(value, own, rtol=1e-4, atol=1e-4)


def test_rows_within_a_window_stay_packed(caplog):
    policy = PolicyModel(random_model("gemma3"))
    limits.check(policy, longest=16)
    assert not policy.padded and not caplog.records
    limits.check(policy, longest=17)
    assert policy.padded and "longer than its window of 16 tokens" in caplog.text


def test_limits_are_read_from_the_text_of_a_config():
    """Of composite models; a window that no layer uses is none; a rope that the longest row changes ends there."""
    gemma3, llama4 = ARCHITECTURES["gemma3"][0](), ARCHITECTURES["llama4"][0]()
    assert (limits.positions(gemma3), limits.window(gemma3)) == (128, 16)
    assert limits.window(llama4) == 16
    assert limits.window(T.MistralConfig(**KV, sliding_window=20)) == 20
    unused = T.Qwen2Config(**KV, sliding_window=20)
    assert limits.window(unused) == limits.window(T.LlamaConfig(**KV)) == float("inf")
    assert limits.positions(T.GPT2Config(n_positions=64)) == 64
    assert limits.positions(T.BloomConfig()) == float("inf")
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    assert limits.positions(T.Phi3Config(**KV, rope_parameters=rope, original_max_position_embeddings=32)) == 32
    with pytest.raises(ValueError, match="a row has 129 tokens, the model 128 positions: set --max_length 128"):
        limits.check(PolicyModel(random_model("gemma3")), longest=129)
