"""Samples against full forward passes, exact distributions, transformers' own generate, and each other."""

import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from hps.data.generate import draw_tokens, generate, prompt_generator, sample

EOS = 2
SMALL = {
    "vocab_size": 13,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # uneven next-token distributions
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "gpt2": GPT2Config(vocab_size=13, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"]).eval()


def scripted(probs_of_prefix, vocab_size):
    """A model whose next-token distribution is a function of the whole prefix; the cache holds the prefix."""

    class Cache:
        def __init__(self, ids):
            self.ids = ids

        def batch_select_indices(self, rows):
            self.ids = self.ids[rows]

    class Model(torch.nn.Module):
        config = SimpleNamespace(max_position_embeddings=64)

        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))  # gives the model a device
            self.row_counts = []

        def forward(self, ids, past_key_values=None, use_cache=True, logits_to_keep=1):
            cache = past_key_values or Cache(ids)
            if past_key_values is not None:
                cache.ids = torch.cat([cache.ids, ids], 1)
            self.row_counts.append(len(ids))
            probs = torch.tensor([probs_of_prefix(row) for row in cache.ids.tolist()])
            assert probs.shape == (len(ids), vocab_size)
            return SimpleNamespace(logits=probs.log()[:, None], past_key_values=cache)

    return Model().eval()


def flat(groups):
    return [(one.token_ids.tolist(), one.finished) for group in groups for one in group]


def draw(model, prompts, ids, *, n=5, seed=7, **more):
    settings = {"eos_token_id": EOS, "max_new_tokens": 12, "temperature": 0.9} | more
    return sample(model, prompts, n=n, generators=[prompt_generator(seed, i) for i in ids], **settings)


def run(model, prompts, **more):
    counts = Counter()
    settings = {
        "n": 4,
        "eos_token_id": EOS,
        "max_new_tokens": 12,
        "draw_limit": 30.0,
        "progress": False,
        "counts": counts,
    } | more
    return dict(generate(model, prompts, **settings)), counts


# --- one batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.9, 2.0])
def test_logp_is_the_full_forward_pass_sum_at_temperature_1(model, temperature):
    prompts = [[1, 5, 6, 7, 8], [1, 9, 3, 3, 4]]
    groups = draw(model, prompts, ["a", "b"], n=20, temperature=temperature)
    assert {one.finished for group in groups for one in group} == {True, False}  # both kinds are compared
    for prompt, group in zip(prompts, groups, strict=True):
        for one in group:
            ids = torch.tensor([prompt + one.token_ids.tolist()])
            with torch.no_grad():
                logps = model(ids).logits.double().log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected = logps.gather(1, ids[0, len(prompt) :, None]).sum().item()
            assert one.logp == pytest.approx(expected, abs=1e-5)


def test_token_ids_stop_at_the_first_end_token(model):
    samples = draw(model, [[1, 5, 6]], ["a"], n=60)[0]
    for one in samples:
        tokens = one.token_ids.tolist()
        assert one.token_ids.dtype == np.int32
        assert EOS not in tokens[:-1]
        assert one.finished == (tokens[-1] == EOS)
        assert one.finished or len(tokens) == 12


def test_greedy_equals_transformers_generate(model):
    prompts = [[1, 5, 6, 7], [1, 9, 3, 4], [1, 12, 11, 3]]
    ours = draw(model, prompts, ["a", "b", "c"], n=1, temperature=0)
    for prompt, (one,) in zip(prompts, ours, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0
        )
        assert one.token_ids.tolist() == theirs[0, len(prompt) :].tolist()


def test_dropping_ended_rows_leaves_the_others_as_they_are(model):
    prompts, ids = [[1, 5, 6], [1, 7, 8]], ["a", "b"]
    never = draw(model, prompts, ids, n=40, drop_fraction=2.0)
    assert sum(one.finished for group in never for one in group) > 20
    for fraction in (0.0, 0.3):
        dropped = draw(model, prompts, ids, n=40, drop_fraction=fraction)
        assert flat(dropped) == flat(never)
        for group, other in zip(dropped, never, strict=True):
            assert [one.logp for one in group] == pytest.approx([one.logp for one in other], abs=1e-5)


def test_ended_rows_leave_the_batch():
    fake = scripted(lambda row: [0.5, 0.0, 0.5], 3)  # half of the rows end at each step
    draw(fake, [[1, 1]], ["a"], n=64, drop_fraction=0.125)
    decode = fake.row_counts[1:]
    assert decode[0] < 50 and decode == sorted(decode, reverse=True) and decode[-1] < 8


def test_row_j_is_the_same_whatever_n_and_however_the_draws_are_split(llama):
    whole = flat(draw(llama, [[1, 5, 6]], ["a"], n=8))
    generator = prompt_generator(7, "a")
    settings = {"eos_token_id": EOS, "max_new_tokens": 12, "temperature": 0.9}
    parts = [sample(llama, [[1, 5, 6]], n=k, generators=[generator], **settings) for k in (3, 5)]
    assert flat(parts[0]) + flat(parts[1]) == whole


def test_a_prompt_of_a_batch_draws_as_if_alone(model):
    prompts, ids = [[1, 5, 6], [1, 7, 8], [1, 9, 3]], ["a", "b", "c"]
    together = draw(model, prompts, ids, n=[3, 17, 6])
    assert [len(group) for group in together] == [3, 17, 6]
    for group, prompt, name in zip(together, prompts, ids, strict=True):
        assert flat([group]) == flat(draw(model, [prompt], [name], n=len(group)))


def test_bfloat16_logps_are_computed_in_float32(llama):
    half = AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.bfloat16).eval()
    half.load_state_dict(llama.state_dict())
    for one in draw(half, [[1, 5, 6]], ["a"], n=5, max_new_tokens=1)[0]:
        with torch.no_grad():
            logits = half(torch.tensor([[1, 5, 6]])).logits[0, -1]
        assert logits.dtype == torch.bfloat16
        assert one.logp == pytest.approx(logits.double().log_softmax(-1)[one.token_ids[0]].item(), abs=1e-5)


# --- the distribution --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, -math.inf, 1.1])
    rows = 20_000
    uniforms = torch.rand(rows, generator=torch.Generator().manual_seed(5))
    tokens, logps = draw_tokens(logits.expand(rows, -1), uniforms, temperature=temperature)
    exact = torch.softmax(logits.double() / temperature, 0)
    seen = torch.bincount(tokens, minlength=6)
    assert seen[4] == 0
    possible = exact > 0
    assert stats.chisquare(seen[possible].numpy(), (exact * rows)[possible].numpy()).pvalue > 0.01
    assert torch.allclose(logps.double(), logits.double().log_softmax(0)[tokens], atol=1e-6)


def test_impossible_tokens_are_not_drawn_at_the_ends_of_the_unit_interval():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 0.1, -math.inf]).expand(2, -1)
    tokens, _ = draw_tokens(logits, torch.tensor([0.0, 1 - 2**-24]), temperature=1.0)
    assert tokens.tolist() == [1, 3]


def test_whole_responses_follow_their_exact_probabilities():
    # Tokens: 0, 1, EOS. The second step depends on the first, so a mixed-up cache would show.
    table = {(): [0.5, 0.3, 0.2], (0,): [0.1, 0.2, 0.7], (1,): [0.6, 0.1, 0.3]}
    fake = scripted(lambda row: table.get(tuple(row[1:]), [0.0, 0.0, 1.0]), 3)
    rows = 4000
    seen = Counter(tuple(ids) for ids, _ in flat(draw(fake, [[1]], ["x"], n=rows, temperature=1.0, drop_fraction=0.05)))
    exact = {(2,): 0.2}
    for first, p in ((0, 0.5), (1, 0.3)):
        for second in range(3):
            key = (first, 2) if second == 2 else (first, second, 2)
            exact[key] = p * table[(first,)][second]
    assert set(seen) == set(exact)
    assert stats.chisquare([seen[k] for k in exact], [rows * p for p in exact.values()]).pvalue > 0.01


# --- many prompts ------------------------------------------------------------------------------------------

PROMPTS = [(f"id{i}", [1, *[3 + (i * k) % 10 for k in range(1, 3 + i % 3)]]) for i in range(11)]


def listed(samples):
    return {name: flat([group]) for name, group in samples.items()}


def test_samples_do_not_depend_on_grouping_order_or_sharding(llama):
    def run_few(prompts, **more):
        return run(llama, prompts, draw_limit=4.0, **more)

    whole = run_few(PROMPTS)[0]
    assert list(whole) == [name for name, _ in PROMPTS]
    assert {4} < {len(group) for group in whole.values()}  # full ones and such as hit the limit
    for other in (
        run_few(PROMPTS, max_rows=7)[0],
        run_few(PROMPTS, max_rows=30)[0],
        run_few(PROMPTS[::-1])[0],
        run_few(PROMPTS, oversample=3.0)[0],
        run_few(PROMPTS[::2])[0] | run_few(PROMPTS[1::2])[0],
    ):
        assert listed(other) == listed(whole)
    assert listed(run_few(PROMPTS, seed=1)[0]) != listed(whole)


def test_equal_prompts_with_different_ids_have_their_own_draws(llama):
    samples, _ = run(llama, [("a", [1, 5]), ("b", [1, 5])])
    assert flat([samples["a"]]) != flat([samples["b"]])


def test_results_come_in_input_order_and_batches_hold_no_more_than_max_rows():
    fake = scripted(lambda row: [0, 0, 1.0] if 0 in row else [1.0, 0, 0], 3)  # every row decodes one step
    samples, _ = run(fake, PROMPTS, unique=False, max_rows=9)
    assert list(samples) == [name for name, _ in PROMPTS]
    assert max(fake.row_counts) == 9


@pytest.mark.parametrize("unique", [True, False])
def test_kept_samples_are_the_first_n_of_the_stream(llama, unique):
    samples, counts = run(llama, PROMPTS[:3], n=6, unique=unique)
    for name, ids in PROMPTS[:3]:
        expected, seen = [], set()
        for one in draw(llama, [ids], [name], n=180, seed=0)[0]:
            if one.finished and not (unique and tuple(one.token_ids) in seen):
                expected.append(one.token_ids.tolist())
                seen.add(tuple(one.token_ids))
        assert [one.token_ids.tolist() for one in samples[name]] == expected[:6]
    kept = sum(map(len, samples.values()))
    assert counts["samples"] == kept + counts["unfinished"] + counts["duplicates"] + counts["surplus"]


def test_a_model_that_can_say_three_things_is_counted_and_given_up():
    # First token 0 or 1 or EOS, then EOS; a first token 3 never ends.
    fake = scripted(lambda row: [0.0, 0.0, 0.0, 1.0] if 3 in row else [0.25] * 4 if len(row) == 2 else [0, 0, 1, 0], 4)
    samples, counts = run(fake, [("a", [1, 1]), ("b", [1, 0])], n=10, draw_limit=3.0)
    for group in samples.values():
        assert {tuple(one.token_ids) for one in group} == {(0, 2), (1, 2), (2,)} and len(group) == 3
        assert all(one.logp == pytest.approx(math.log(0.25), abs=1e-6) for one in group)
    streams = draw(fake, [[1, 1], [1, 0]], ["a", "b"], n=30, seed=0)
    unfinished = sum(not one.finished for group in streams for one in group)
    assert counts == Counter(
        samples=60, unfinished=unfinished, duplicates=60 - unfinished - 6, prompts_short=2, surplus=0
    )


def test_duplicates_stay_when_uniqueness_is_not_asked_for():
    fake = scripted(lambda row: [0.5, 0.0, 0.5] if len(row) == 2 else [0, 0, 1.0], 3)
    samples, counts = run(fake, [("a", [1, 1])], n=10, unique=False)
    assert len(samples["a"]) == 10 and counts["duplicates"] == 0 and counts["prompts_short"] == 0


def test_unfinished_samples_are_kept_when_asked_for(llama):
    ids = PROMPTS[0][1]
    samples, counts = run(llama, [("a", ids)], n=30, unique=False, keep_unfinished=True)
    assert flat([samples["a"]]) == flat(draw(llama, [ids], ["a"], n=30, seed=0))
    assert {one.finished for one in samples["a"]} == {True, False} and counts["unfinished"] == 0


def test_greedy_generation_draws_once_per_prompt(llama):
    samples, counts = run(llama, PROMPTS[:4], n=1, temperature=0)
    assert counts["samples"] == 4 == sum(map(len, samples.values())) + counts["unfinished"]


# --- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "more", "message"),
    [
        ([("a", [1]), ("long", [3] * 53)], {}, "'long' has 53 tokens"),
        ([("empty", [])], {}, "'empty' has 0 tokens"),
        ([("a", [1]), ("a", [3])], {}, "share an id"),
        ([("a", [1])], {"n": 0}, "n >= 1"),
        ([("a", [1])], {"oversample": 0.5}, "oversample"),
        ([("a", [1])], {"temperature": -1.0}, "temperature must be"),
        ([("a", [1])], {"temperature": math.nan}, "temperature must be"),
        ([("a", [1])], {"temperature": 0}, "equal responses"),
    ],
)
def test_mistakes_are_named(llama, prompts, more, message):
    with pytest.raises(ValueError, match=message):
        run(llama, prompts, **more)


def test_longest_allowed_prompt_runs(llama):
    samples, _ = run(llama, [("a", [3] * 52)], n=1)
    assert set(samples) == {"a"}


def test_sample_refuses_unequal_prompts_training_mode_and_broken_weights(llama):
    with pytest.raises(ValueError, match="equally long"):
        draw(llama, [[1, 5], [1]], ["a", "b"])
    broken = scripted(lambda row: [math.nan] * 3, 3)
    with pytest.raises(ValueError, match="not finite"):
        draw(broken, [[1]], ["a"])
    with pytest.raises(ValueError, match="training mode"):
        draw(broken.train(), [[1]], ["a"])
