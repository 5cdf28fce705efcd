"""The data report against numbers worked out by hand."""

import json

import numpy as np
import pytest
from helpers import byte_tokenizer
from scipy.stats import entropy
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data_prep
from hps.data.listwise import write
from hps.data.rows import Row
from hps.data.tokens import COUNTS, Example, tokenize_rows
from hps.prepare.doctor import diagnose, format_report


def case(responses, rewards=None, chosen=None, rejected=None, prompt="why"):
    """A row and its example with one token a character, end token 0."""
    row = Row("a", prompt, tuple(responses), rewards and tuple(rewards), chosen, rejected)
    example = Example(
        id="a",
        prompt_ids=np.ones(len(prompt), np.int32),
        response_ids=tuple(np.array([*map(ord, text), 0], np.int32) for text in responses),
        rewards=None if rewards is None else np.array(rewards, np.float64),
        identity=np.array([list(responses).index(text) for text in responses]),
        kept=np.arange(len(responses)),
        chosen=chosen,
        rejected=rejected,
        where="f:1",
    )
    return row, example


def report_of(*cases, **more):
    counts = dict.fromkeys(COUNTS, 0) | more.pop("counts", {})
    return diagnose([row for row, _ in cases], [example for _, example in cases], counts, **more)


MIXED = [
    # A tie for the best and a copy of it; a pair that the rewards reverse; nothing below the best.
    case(["aa", "b", "aa", "ccc", "d"], [3.0, 1.0, 2.5, 3.0, 2.0], chosen=0, rejected=1),
    case(["a", "b", "b"], [0.0, 1.0, 1.0], chosen=0, rejected=1),
    case(["a", "b"], [2.0, 2.0], chosen=0, rejected=1),
]


def test_counts_by_hand():
    report = report_of(*MIXED)
    assert report["responses_per_prompt"] == {"min": 2, "median": 3, "max": 5}
    assert report["response_tokens"] == {"min": 2, "median": 2, "max": 4}
    assert report["prompt_tokens"] == {"min": 3, "median": 3, "max": 3}
    assert (report["rows"], report["examples"], report["duplicates"]) == (3, 3, 2)
    assert (report["human_pairs"], report["human_pairs_identical"]) == (3, 0)
    rewards = report["rewards"]
    assert rewards["spread"] == {"min": 0, "median": 1, "max": 2}
    assert rewards["negatives"] == {"min": 0, "median": 1, "max": 2} and rewards["mean_negatives"] == 1.5
    assert (rewards["rows_with_top_tie"], rewards["copies_of_best"]) == (3, 1)
    assert rewards["rows_no_dispreferred"] == 1
    assert (rewards["human_pairs"], rewards["human_pairs_reversed"]) == (3, 1)
    assert report["errors"] == []
    assert json.loads(json.dumps(report)) == report


def test_weights_of_the_negatives():
    gammas = (-5.0, -1.0, 0.0, 3.0)
    weights = {(w["reward_norm"], w["gamma"]): w for w in report_of(*MIXED, gammas=gammas)["rewards"]["gammas"]}
    first = np.array([1.0, 2.0])  # below 3.0, without the copy at 2.5; the second row has one negative
    for norm, std in (("none", 1.0), ("zscore", np.std([3.0, 1.0, 2.5, 3.0, 2.0]))):
        for gamma in gammas:
            q = np.exp(gamma * first / std) / np.exp(gamma * first / std).sum()
            found = weights[norm, gamma]
            assert found["effective_negatives"] == pytest.approx((np.exp(entropy(q)) + 1) / 2)
            assert found["top_mass"] == pytest.approx((q.max() + 1) / 2)
    [large, _] = report_of(case("abc", [1e4, -1e4, 0.0]), gammas=(5,))["rewards"]["gammas"]
    assert (large["effective_negatives"], large["top_mass"]) == (1.0, 1.0)  # finite


def scaled(scale):
    rng = np.random.default_rng(0)
    return [case("abcdefgh", (scale * rng.permutation(8)).tolist()) for _ in range(5)]


def test_advice_follows_the_reward_scale():
    [advice] = report_of(*scaled(1))["advice"]  # 1 - exp(-3) = 95% of the mass is on one negative
    assert "gamma = 3 is nearly an argmax" in advice and "--reward_norm zscore" in advice
    [advice] = report_of(*scaled(0.01))["advice"]
    assert "gamma = 3 is hardly different from gamma = 0" in advice and "--reward_norm zscore" in advice
    assert report_of(*scaled(0.3))["advice"] == report_of(*scaled(0.7))["advice"] == []


def test_every_other_advice():
    text = "\n".join(
        report_of(
            *MIXED,
            case(["x", "x"], [1.0, 0.0], chosen=1, rejected=0),
            counts={"responses_read": 8, "responses_overlong": 2, "pairs_broken": 3, "prompts_cut": 4},
        )["advice"]
    )
    for part in (
        "25.0% of the responses do not fit: raise --max_length",
        "4 prompts lose their beginning: raise --max_length",
        "3 rows lost a response of their human pair",
        "1 human pairs hold equal responses",
        "2 rows have no dispreferred response",
        "tie for the best reward",
        "reverse over 40%",
    ):
        assert part in text


NO_REWARDS = "no rewards: for -human methods and --loss reward; others need data_prep.py annotate first"


def test_errors_and_pairs_alone_which_are_none():
    report = report_of(case("ab", chosen=1, rejected=0))
    assert report["rewards"] is None and report["errors"] == [] and report["advice"] == [NO_REWARDS]
    for cases, error in (
        ([], "no row can be trained on: no rewards"),
        ([case("ab", [1.0, 1.0])], "no row can be trained on: the rewards tell no two responses apart"),
        ([case("aa", [1.0, 0.0])], "no row can be trained on: the rewards tell no two responses apart"),
        ([case("aa", chosen=0, rejected=1)], "no human pair of two different responses"),
        ([case("ab", [1.0, 0.0]), case("ab")], "only 1 of 2 rows have rewards: run data_prep.py annotate"),
    ):
        [message] = report_of(*cases)["errors"]
        assert error in message
        assert f"  - {message}" in format_report(report_of(*cases)).partition("errors:")[2]


def test_the_page():
    report = report_of(*MIXED, counts={"rows_read": 12345, "responses_empty": 7})
    lines = [line.split() for line in format_report(report).splitlines()]
    assert ["responses", "per", "prompt", "2", "3", "5"] in lines
    assert ["best", "reward", "minus", "worst", "0", "1", "2"] in lines
    assert ["rows", "read", "12,345"] in lines and ["responses", "empty", "7"] in lines
    assert ["copies", "of", "the", "best", "response", "1"] in lines
    assert ["human", "pairs", "that", "the", "rewards", "reverse", "1"] in lines
    assert [line[:2] for line in lines].count(["zscore", "-5"]) == 1
    assert lines[-2:] == [["errors:"], ["-", "none"]]
    bare = format_report(report_of(case("ab", chosen=0, rejected=1)))
    assert "gamma" not in bare and "rewards reverse" not in bare


# -- with a tokenizer: where texts meet, and the limit --

ANSWERED = "<s>{% for m in messages %}[{{ m.role }}]:{{ m.content }}{% if m.role == 'assistant' %}END{% endif %}"
ANSWERED += "{% endfor %}{% if add_generation_prompt %}[assistant]:{% endif %}"


def test_where_texts_meet():
    """`ans` and `wer` merge into one word when they are read as one text; a space keeps `why?` apart."""
    tokenizer = byte_tokenizer()
    texts = [("The ans", ("wer is yes", "no")), ("Question:", (" why?", "", "yes"))]
    rows = [Row(str(i), prompt, responses, where=f"f:{i}") for i, (prompt, responses) in enumerate(texts)]
    for (prompt, (first, *_)), merged in zip(texts, (True, False), strict=True):
        ids, whole = tokenizer(prompt).input_ids, tokenizer(prompt + first).input_ids
        assert ([*ids, *tokenizer(first).input_ids[1:]] != whole) is merged
    examples, counts = tokenize_rows(tokenizer, rows, max_length=99)
    report = diagnose(rows, examples, counts, tokenizer=tokenizer)
    expected = {"prompts_with_bos": 2, "responses_with_one_eos": 4, "looked_at": 2, "merges": 1}
    assert report["joints"] == expected | {"changed": 0, "differs": ""}
    lines = [line.split() for line in format_report(report).splitlines()]
    assert ["prompts", "that", "begin", "with", "BOS", "2"] in lines
    assert ["responses", "that", "end", "in", "EOS,", "the", "only", "one", "4"] in lines
    assert ["merges", "with", "the", "prompt,", "in", "2", "rows", "1"] in lines
    assert json.loads(json.dumps(report)) == report


def test_a_template_that_ends_answers_otherwise_is_told():
    rows = [Row("a", ({"role": "user", "content": "why"},), ("yes", "no"), chosen=0, rejected=1, where="f:1")]
    trained = "; a policy is trained on prompt, text and eos_token"
    ends, begins = (
        "the chat template ends an answer with {!r} and not with eos_token, '</s>'",
        "[assistant]:{% endif %}",
    )
    for end, told in (("</s> ", ""), ("<|tool|>", ends.format("<|tool|>")), ("", ends.format(""))):
        tokenizer = byte_tokenizer(chat_template=ANSWERED.replace("END", end))
        report = diagnose(rows, *tokenize_rows(tokenizer, rows, max_length=99), tokenizer=tokenizer)
        assert report["advice"] == [told + trained] * bool(told) + [NO_REWARDS] and report["joints"]["merges"] == 0
    thinks = ANSWERED.replace("END", "</s>").replace(begins, begins.replace("{%", "<think>{%"))
    before = ANSWERED.replace("END", "</s>").replace(
        "]:{{ m.content }}{% if", "]:{% if loop.last and m.role == 'assistant' %}<think>{% endif %}{{ m.content }}{% if"
    )
    for template, told in (
        (thinks, "the chat template begins an answer with '<think>', which a finished one does not have"),
        (before, "the chat template writes '<think>' before a finished answer, which the prompt does not end in"),
    ):
        tokenizer = byte_tokenizer(chat_template=template)
        report = diagnose(rows, *tokenize_rows(tokenizer, rows, max_length=99), tokenizer=tokenizer)
        assert report["advice"] == [told + trained, NO_REWARDS]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a tokenizer of single letters, without BOS."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate("abcdefxy.?")}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=".", unk_token="?").save_pretrained(folder)
    return folder


def run(words, path, capsys, *more):
    """What the command prints as JSON."""
    data_prep.main(["doctor", f"--input={path}", f"--model={words}", "--json", *more])
    return json.loads(capsys.readouterr().out)


def test_the_limit_and_what_becomes_of_longer_rows(words, tmp_path, capsys):
    """Six tokens of prompt; responses of two and four with EOS; five tokens in all."""
    path = tmp_path / "x.jsonl"
    write(path, [Row("a", "a b c d e f", ("x", "x y x"), (1.0, 0.0)), Row("b", "a", ("x", "y"), (1.0, 0.0))])
    whole = run(words, path, capsys)
    assert whole["prompt_tokens"] == {"min": 1, "median": 3.5, "max": 6} and whole["counts"]["prompts_cut"] == 0
    assert whole["response_tokens"] == {"min": 2, "median": 2, "max": 4} and whole["advice"] == []
    dropped = run(words, path, capsys, "--max_length=5")
    assert (dropped["examples"], dropped["counts"]["responses_overlong"], dropped["prompt_tokens"]["max"]) == (1, 2, 1)
    cut = run(words, path, capsys, "--max_length=5", "--truncate=keep_end")
    # Two tokens of the prompt are kept at the least: the longer response does not fit, three go beside the shorter.
    assert (cut["examples"], cut["counts"]["responses_overlong"], cut["prompt_tokens"]["max"]) == (2, 1, 3)
    assert cut["counts"]["prompts_cut"] == 1 and "1 prompts lose their beginning" in cut["advice"][1]
    with pytest.raises(ValueError, match=r"x.jsonl:1: prompt of 6 tokens \+ responses\[0\] of 2 tokens > max_length"):
        run(words, path, capsys, "--max_length=5", "--truncate=error")
    write(path, [Row("a", "a", ("x", "y"), (1.0, 1.0))])
    with pytest.raises(SystemExit) as ended:
        run(words, path, capsys)
    assert ended.value.code == 1
