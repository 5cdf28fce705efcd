"""Prompt and response ids: no merge over the boundary, one BOS, one EOS, one budget, every loss counted."""

import hashlib

import numpy as np
import pytest
from helpers import byte_tokenizer, encode_prompt, encode_response, tokenize_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hps.data.rows import Row, row_key
from hps.data.tokenizers import fingerprint
from hps.data.tokens import COUNTS, tokenize

WORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>", "tea", "is", "hot", "cold", "why"]
TEMPLATE = "<bos>{% for m in messages %} <{{ m.role }}> {{ m.content }}{% endfor %} <assistant>"


@pytest.fixture(scope="module")
def words():
    """Whole words, a chat template that writes BOS, no BOS of its own on plain text."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Strip()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    more = dict(extra_special_tokens=["<user>", "<assistant>"], chat_template=TEMPLATE)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named, **more)


@pytest.fixture(scope="module")
def bpe():
    return byte_tokenizer()


def row(name="a", prompt="why", responses=("tea is hot", "cold"), **more):
    return Row(name, prompt, tuple(responses), where=f"f.jsonl:{name}", **more)


def test_word_ids_by_hand(words):
    talk = ({"role": "user", "content": "why tea"},)
    assert encode_prompt(words, talk) == [1, 3, 10, 6, 4]
    assert encode_prompt(words, "why tea") == [10, 6]  # it adds no BOS by itself
    assert encode_prompt(words, "<bos> why <assistant>") == [1, 10, 4]
    assert encode_response(words, "tea is nice") == [6, 7, 5, 2]


def test_no_merge_over_the_boundary(bpe):
    prompt, response = "The ans", "wer is yes"
    joined = bpe(prompt + response, add_special_tokens=False).input_ids
    ids = encode_prompt(bpe, prompt) + encode_response(bpe, response)
    assert ids[1:-1] != joined  # the joined text merges "answer", or this test shows nothing
    apart = [bpe(text, add_special_tokens=False).input_ids for text in (prompt, response)]
    assert ids == [0, *apart[0], *apart[1], 1]


def test_exactly_one_bos(bpe, words):
    assert encode_prompt(bpe, "yes")[0] == 0
    assert encode_prompt(bpe, "<s>yes") == encode_prompt(bpe, "yes")
    with pytest.raises(ValueError, match=r"starts with two '<s>'"):
        encode_prompt(bpe, "<s><s>yes")
    doubled = byte_tokenizer(chat_template="<s><s>{{ messages[0].content }}")
    with pytest.raises(ValueError, match=r"starts with two '<s>'"):
        encode_prompt(doubled, ({"role": "user", "content": "yes"},))
    once = byte_tokenizer(chat_template="<s>{{ messages[0].content }}")
    assert encode_prompt(once, ({"role": "user", "content": "yes"},)) == encode_prompt(bpe, "yes")


def test_exactly_one_eos_and_no_control_token_inside(bpe, words):
    plain = encode_response(bpe, "yes")
    assert plain[-1] == 1 and plain.count(1) == 1
    assert encode_response(bpe, "yes</s>") == encode_response(bpe, "yes</s></s>") == plain
    assert encode_response(bpe, "") == [1]
    for text in ("a</s>b", "a<s>b", "<|tool|>", "</s>."):
        ids = encode_response(bpe, text)
        assert not {0, 1, 2} & set(ids[:-1]) and ids[-1] == 1
        assert bpe.decode(ids[:-1]) == text
    # A word-level tokenizer finds "<eos>" in its vocabulary whatever it is told.
    with pytest.raises(ValueError, match=r"control token '<eos>' inside its text"):
        encode_response(words, "tea <eos> is hot")
    assert encode_response(words, "tea <eos>") == encode_response(words, "tea <eos> <eos>") == [6, 2]
    # In a prompt they are meant: the user's own template may have written them.
    assert encode_prompt(bpe, "a<|tool|>b")[2] == 2


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_response_text_survives(bpe, text):
    ids = encode_response(bpe, text)
    assert ids.count(1) == 1 and ids[-1] == 1 and not {0, 2} & set(ids)
    assert bpe.decode(ids[:-1], clean_up_tokenization_spaces=False) == text.removesuffix("</s>")


def test_fingerprint_sees_every_content(bpe):
    """But not use and names: padding, truncation, the pad token, the folder."""
    used = byte_tokenizer(name_or_path="elsewhere", pad_token="</s>")
    encode_response(used, "a</s>b")
    used(["a", "the answer is"], padding=True, truncation=True, max_length=2)
    assert used.backend_tokenizer.truncation and fingerprint(used) == fingerprint(bpe)
    vocabulary = byte_tokenizer()
    vocabulary.add_tokens(["zebra"])
    rules = byte_tokenizer()
    rules.backend_tokenizer.normalizer = normalizers.Lowercase()
    backend = byte_tokenizer().backend_tokenizer
    swapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="</s>", eos_token="<s>")
    templates = [byte_tokenizer(chat_template=t) for t in ("a", "b")]
    prints = [fingerprint(t) for t in (bpe, vocabulary, rules, swapped, *templates)]
    assert len(set(prints)) == len(prints)


def test_examples_by_hand(words):
    texts = ("tea", " ", "tea is hot", "cold", "tea")
    rows = [
        row("a", "why", texts, rewards=(1, 2, 3, 4, 5), chosen=3, rejected=4),
        row("b", "why", ("hot",)),
    ]
    (a, b), counts = tokenize_rows(words, rows, max_length=4)
    assert a.prompt_ids.tolist() == [10] and a.prompt_ids.dtype == np.int32
    assert [ids.tolist() for ids in a.response_ids] == [[6, 2], [9, 2], [6, 2]]
    assert all(ids.dtype == np.int32 for ids in a.response_ids)
    assert a.rewards.tolist() == [1, 4, 5] and a.rewards.dtype == np.float64
    assert a.identity.tolist() == [0, 1, 0] and a.kept.tolist() == [0, 3, 4]
    assert (a.chosen, a.rejected, a.where, a.id) == (1, 2, "f.jsonl:a", "a")
    assert row_key(a.id) == int.from_bytes(hashlib.blake2b(b"a", digest_size=8).digest(), "big") != row_key(b.id)
    assert (b.rewards, b.chosen, b.rejected) == (None, None, None)
    read = dict(rows_read=2, rows_kept=2, responses_read=6, responses_kept=4, responses_empty=1, responses_overlong=1)
    assert counts == dict.fromkeys(COUNTS, 0) | read | {"prompts_outside_template": 2}


def test_the_budget_holds_prompt_response_and_eos(words):
    one = [row(responses=("tea is hot",))]  # 1 + 3 + 1 tokens
    assert len(tokenize_rows(words, one, max_length=5)[0]) == 1
    with pytest.raises(ValueError, match=r"no row is left with max_length = 4, .*responses_overlong = 1"):
        tokenize_rows(words, one, max_length=4)
    lengths = r"f.jsonl:a: prompt of 1 tokens \+ responses\[1\] of 4 tokens > max_length = 4"
    with pytest.raises(ValueError, match=lengths):
        tokenize_rows(words, [row(responses=("", "tea is hot"))], max_length=4, truncate="error")
    assert len(tokenize_rows(words, one, max_length=5, truncate="error")[0]) == 1


def test_lost_rows_and_pairs_are_counted(words):
    rows = [
        row("prompt", "why is tea", ("tea", "")),
        row("long", responses=("tea is hot", "")),
        row("empty", responses=("", "<eos>", "\n")),
        row("none", responses=()),
        row("pair", responses=("tea", "tea is hot"), chosen=0, rejected=1),
        row("fine", responses=("tea", "cold", ""), chosen=0, rejected=1),
        row("half", responses=("tea", "cold"), chosen=1),
    ]
    examples, counts = tokenize_rows(words, rows, max_length=4)
    assert [e.id for e in examples] == ["pair", "fine", "half"]
    assert (examples[0].chosen, examples[0].rejected) == (0, None)
    lost = dict(rows_read=7, rows_kept=3, rows_overlong_prompt=1, rows_no_responses=3, pairs_broken=1, prompts_cut=0)
    lost |= dict(responses_read=14, responses_kept=5, responses_overlong=3, responses_empty=6)
    assert counts == lost | {"prompts_outside_template": 7}
    assert list(counts) == [*COUNTS, "prompts_outside_template"]


def test_keep_end_cuts_the_prompt_alone(words):
    """Budget 6: "why is tea hot cold" (5) with answers of 2 and 4 ids. The longest answer leaves 2 tokens, but half the
    budget, 3, is the prompt's: the answer of 4 does not fit and goes, the other leaves room for 4."""
    long = row("long", "why is tea hot cold", ("tea", "tea is hot"))
    [example], counts = tokenize_rows(words, [long], max_length=6, truncate="keep_end")
    assert words.decode(example.prompt_ids) == "is tea hot cold" and example.kept.tolist() == [0]
    assert (counts["prompts_cut"], counts["responses_overlong"], counts["rows_kept"]) == (1, 1, 1)
    [example], _ = tokenize_rows(words, [long], max_length=7, truncate="keep_end")  # 7 - 4, all fit
    assert words.decode(example.prompt_ids) == "tea hot cold" and example.kept.tolist() == [0, 1]
    [example], counts = tokenize_rows(words, [long], max_length=9, truncate="keep_end")
    assert len(example.prompt_ids) == 5 and counts["prompts_cut"] == 0
    prompt = ({"role": "user", "content": "why is tea hot"},)  # <bos> <user> why is tea hot <assistant>
    [example], _ = tokenize_rows(words, [row("a", prompt, ("tea",))], max_length=6, truncate="keep_end")
    assert words.convert_ids_to_tokens(example.prompt_ids) == ["<bos>", "tea", "hot", "<assistant>"]


@settings(max_examples=200)
@given(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(3, 16))
def test_keep_end_never_exceeds_the_budget_nor_touches_a_response(words, prompt, lengths, budget):
    one = row("a", "tea " * prompt, tuple("hot " * (n - 1) + "cold" for n in lengths))
    try:
        [example], counts = tokenize_rows(words, [one], max_length=budget, truncate="keep_end")
    except ValueError as error:
        assert "no row is left" in str(error) and min(lengths) + 1 > budget - min(prompt, budget // 2)
        return
    assert len(example.prompt_ids) + max(map(len, example.response_ids)) <= budget
    assert len(example.prompt_ids) >= min(prompt, budget // 2)
    assert [len(y) - 1 for y in example.response_ids] == [lengths[k] for k in example.kept]
    assert counts["prompts_cut"] == (len(example.prompt_ids) < prompt)


def test_messages_say_where(words):
    with pytest.raises(ValueError, match=r"^f.jsonl:b: the prompt has no tokens"):
        tokenize_rows(words, [row(), row("b", " ")], max_length=50)
    with pytest.raises(ValueError, match=r"truncate = 'cut' does not exist; choose one of drop, error, keep_end"):
        tokenize_rows(words, [row()], max_length=50, truncate="cut")
    with pytest.raises(ValueError, match=r"no rows were given"):
        tokenize_rows(words, [], max_length=50)


def test_rows_are_tokenised_as_they_come(words):
    asked = []
    rows = (asked.append(i) or row(str(i)) for i in range(9))
    counts: dict[str, int] = {}
    examples = tokenize(words, rows, counts, max_length=50)
    assert next(examples).id == "0" and len(asked) == 1 and counts["rows_read"] == 1
    assert len(list(examples)) == 8 and counts["rows_kept"] == 9
