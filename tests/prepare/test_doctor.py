"""The data report against numbers worked out by hand."""

import hashlib
import itertools
import json

import numpy as np
import pytest
from helpers import byte_tokenizer, save
from scipy.stats import entropy, spearmanr
from tokenizers import normalizers

import data_prep
from hps.data.listwise import write
from hps.data.rows import Row
from hps.data.tokens import COUNTS, Example
from hps.io import files
from hps.options import Config
from hps.prepare.doctor import cut_off, diagnose, format_report, kept_rows


def case(responses, rewards=None, chosen=None, rejected=None, prompt="why", **others):
    """A row and its example with one token a character, end token 0."""
    id = str(next(NUMBERS))
    row = Row(id, prompt, tuple(responses), rewards and tuple(rewards), chosen, rejected, others=others)
    example = Example(
        id=id,
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


NUMBERS = itertools.count()


def report_of(*cases, **more):
    counts = dict.fromkeys(COUNTS, 0) | {"rows_read": len(cases)} | more.pop("counts", {})
    return diagnose(cases, counts, **more)


def report_with(tokenizer, rows):
    counts = {}
    return diagnose(kept_rows(tokenizer, rows, counts, max_length=99), counts, tokenizer=tokenizer)


MIXED = [
    # A tie for the best and a copy of it; a pair that the rewards reverse; nothing below the best.
    case(["aa", "b", "aa", "ccc", "d"], [3.0, 1.0, 2.5, 3.0, 2.0], chosen=0, rejected=1),
    case(["a", "b", "b"], [0.0, 1.0, 1.0], chosen=0, rejected=1),
    case(["a", "b"], [2.0, 2.0], chosen=0, rejected=1),
]


def test_counts_by_hand():
    report = report_of(*MIXED)
    ranges, counts = report["ranges"], report["counts"]
    assert ranges["responses per prompt"] == {"min": 2, "median": 3, "max": 5}
    assert ranges["tokens of a response, end token included"] == {"min": 2, "median": 2, "max": 4}
    assert ranges["tokens of a prompt"] == {"min": 3, "median": 3, "max": 3}
    assert (report["rows"], report["examples"], counts["copies_of_other_responses"]) == (3, 3, 2)
    assert (counts["human_pairs"], counts["human_pairs_identical"]) == (3, 0)
    assert ranges["best reward minus worst"] == {"min": 0, "median": 1, "max": 2}
    assert ranges["dispreferred responses per prompt"] == {"min": 0, "median": 1, "max": 2}
    assert report["q"][0]["negatives"] == 1.5
    assert (counts["rows_with_top_tie"], counts["copies_of_best"]) == (3, 1)
    assert counts["rows_no_dispreferred"] == 1
    assert (counts["human_pairs_with_rewards"], counts["human_pairs_reversed"]) == (3, 1)
    assert report["errors"] == []
    assert json.loads(json.dumps(report)) == report


def test_the_q_of_a_run():
    """At its first, middle and last step, by hand: first two rows of MIXED, one prompt per step, three phases; of other
    samplers none."""
    first = np.array([1.0, 2.0])  # below 3.0, without the copy at 2.5; the second row has one negative
    how = dict(gamma_schedule="inclusive", gamma_phases=3, gamma_start=-4.0, gamma_end=2.0)
    for norm, std in (("none", 1.0), ("zscore", np.std([3.0, 1.0, 2.5, 3.0, 2.0]))):
        run = Config("", "", "", epochs=3, prompts_per_step=1, reward_norm=norm, reward_scale=0.5, **how)
        found = report_of(*MIXED, run=run)["q"]
        assert [(q["step"], q["steps"], q["gamma"]) for q in found] == [(1, 6, -4), (4, 6, -1), (6, 6, 2)]
        for q in found:
            w = np.exp(q["gamma"] * 0.5 * first / std)
            assert q["effective_negatives"] == pytest.approx((np.exp(entropy(w / w.sum())) + 1) / 2)
    run = Config(
        "", "", "", epochs=1, prompts_per_step=1, length_penalty=1.0, gamma_start=-1.0, gamma_schedule="constant"
    )
    [q, *_] = report_of(case(["a", "bbbbb", "cc"], [3.0, 2.0, 1.0]), run=run)["q"]  # minus 2, 6, 3 tokens: 1, -4, -2
    assert q["effective_negatives"] == pytest.approx(np.exp(entropy([np.exp(4), np.exp(2)])))
    [q, *_] = report_of(*MIXED, run=Config("", "", "", method="dpo-uniform"))["q"]
    assert (q["gamma"], q["effective_negatives"]) == (0, 1.5)
    for other in (dict(method="dpo-bt"), dict(method="dpo-human"), dict(loss="sft"), dict(loss="reward")):
        assert report_of(*MIXED, run=Config("", "", "", **other))["q"] == []
    [q, _, large] = report_of(case("abc", [1e4, -1e4, 0.0]), run=Config("", "", "", prompts_per_step=1, epochs=10))["q"]
    assert q["effective_negatives"] == large["effective_negatives"] == 1.0  # finite


def scaled(scale):
    rng = np.random.default_rng(0)
    return [case("abcdefgh", (scale * rng.permutation(8)).tolist()) for _ in range(5)]


def test_advice_follows_the_reward_scale():
    """At the hardest phase, gamma = 3: q with 1 - exp(-3) = 95% of its mass on one negative spreads over 1.23."""

    def advice_of(scale, **how):
        return report_of(*scaled(scale), run=Config("", "", "", prompts_per_step=1, **how))["advice"]

    [advice] = advice_of(1)
    assert "gamma = 3 is nearly an argmax (it spreads over 1.23 of 7.00 negatives)" in advice
    assert advice.endswith("standardise with --reward_norm zscore")
    [advice] = advice_of(0.01)
    assert "gamma = 3 is hardly different from gamma = 0" in advice and "--reward_norm zscore" in advice
    assert advice_of(0.3) == advice_of(0.7, gamma_end=1.0) == advice_of(1, gamma_end=-1.0) == []
    [advice] = advice_of(1, reward_norm="zscore", reward_scale=20.0)
    assert advice.endswith("lower --reward_scale (20)")


def test_every_other_advice():
    text = "\n".join(
        report_of(
            *MIXED,
            case(["x", "x"], [1.0, 0.0], chosen=1, rejected=0),
            counts={"responses_read": 8, "responses_overlong": 2, "pairs_broken": 3, "prompts_cut": 4},
        )["advice"]
    )
    for part in (
        "2 responses (25.0%) do not fit: raise --max_length",
        "4 prompts lose their beginning: raise --max_length",
        "3 rows lost a response of their human pair",
        "1 human pairs hold equal responses",
        "2 rows have no dispreferred response",
        "tie for the best reward",
        "the rewards reverse 50% of the human pairs",
    ):
        assert part in text


NO_REWARDS = "no rewards: for -human methods and --loss reward; others need data_prep.py annotate first"


def test_errors_and_pairs_alone_which_are_none():
    report = report_of(case("ab", chosen=1, rejected=0))
    assert report["q"] == report["errors"] == [] and report["advice"] == [NO_REWARDS]
    for cases, error in (
        ([], "no row can be trained on: no rewards"),
        ([case("ab", [1.0, 1.0])], "no row can be trained on: the rewards tell no two responses apart"),
        ([case("aa", [1.0, 0.0])], "no row can be trained on: the rewards tell no two responses apart"),
        ([case("aa", chosen=0, rejected=1)], "no human pair of two different responses"),
        ([case("ab", [1.0, 0.0]), case("ab")], "only 1 of 2 rows have rewards: run data_prep.py annotate"),
    ):
        [message] = report_of(*cases)["errors"]
        assert error in message
        assert f"  - {message}" in format_report(report_of(*cases)).partition("errors:")[2].partition("advice:")[0]


def test_the_page():
    """Errors and advice come first, counts of nothing are left out, and a screen holds it."""
    report = report_of(*MIXED, counts={"rows_read": 12345, "responses_empty": 7})
    page = format_report(report)
    lines = [line.split() for line in page.splitlines()]
    assert page.index("errors:") < page.index("advice:") < page.index("responses per prompt") and len(lines) < 40
    assert ["responses", "per", "prompt", "2", "3", "5"] in lines
    assert ["best", "reward", "minus", "worst", "0", "1", "2"] in lines
    assert ["rows", "read", "12,345"] in lines and ["responses", "empty", "7"] in lines
    assert ["copies", "of", "best", "1"] in lines and "human pairs identical" not in page
    assert ["human", "pairs", "reversed", "1"] in lines
    assert ["step", "1", "of", "1", "-5", "1.50", "1.02"] in lines


# -- what may win instead of quality --


def advice(part, *cases, **more):
    """The one line of advice with these words in it, or nothing."""
    return [line for line in report_of(*cases, **more)["advice"] if part in line]


def test_rewards_and_lengths_as_scipy_has_them():
    """The mean of Spearman's correlation within prompts; equal rewards or lengths say nothing, ties share a rank."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, (60, 6))
    rewards = rng.normal(size=(60, 6)).round(1) + 0.2 * lengths
    lengths[0], rewards[1] = 3, 0.5
    rows = [case(["x" * n for n in lengths[i]], rewards[i].tolist()) for i in range(60)]
    found = report_of(*rows)
    assert found["reward_length_correlation"] == pytest.approx(
        np.mean([spearmanr(rewards[i], lengths[i]).statistic for i in range(2, 60)])
    )
    best = rewards.argmax(1)
    shares = []
    for of, k in zip(lengths.tolist(), best, strict=True):
        shares.append(np.mean([(of[k] > n) + 0.5 * (of[k] == n) for n in of[:k] + of[k + 1 :]]))
    assert found["best_longer"] == pytest.approx(np.mean(shares))
    assert "of its rivals, reward and length correlate by 0." in found["advice"][-1]


def test_lengths_of_human_pairs():
    """Three of four chosen are longer than the rejected one, beside which other responses do not count; of four prompts
    that is chance."""
    longer, shorter = (case(["aaa", "b", "ccccc"], chosen=k, rejected=1 - k) for k in (0, 1))
    found = report_of(*[longer, longer, longer, shorter] * 5)
    assert found["best_longer"] == 0.75 and found["reward_length_correlation"] is None
    assert "longer than 75% of its rivals: if length is no quality, train with --length_penalty" in found["advice"][-2]
    assert not advice("longer", *[longer, shorter] * 10) and not advice("longer", longer, longer, longer, shorter)


def test_what_wins_many_prompts_is_named():
    """A text that games the judge is best in two prompts of three; chance would have it in a fifth of them."""
    fair = [([f"{c}{i}" for c in "abcde"], [5.0 * (c == i % 5) + c / 10 for c in range(5)]) for i in range(30)]
    assert not advice("one ", *(case(y, r) for y, r in fair))
    gamed = [case([*y[1:], "Say\nthat I win"], [*r[1:], 9.0 * (i % 3 > 0)]) for i, (y, r) in enumerate(fair)]
    winner = report_of(*gamed)["winners"]["text"]
    assert winner == {"name": "Say that I win", "wins": 20, "by_chance": pytest.approx(6), "prompts": 30}
    [line] = advice("one ", *gamed)
    assert line.startswith("one text is the best of 67% of the prompts (20% by chance): 'Say that I win'; look")
    for at, rows in (
        ("beginning", [case([*y, f"I am sure, it is {i}"], [*r, 9.0 * (i % 3 == 0)]) for i, (y, r) in enumerate(fair)]),
        ("source", [case(y, r[1:] + r[:1], models=[*"ABCD", "Z"]) for y, r in fair[4::5]]),
    ):
        [line] = advice("one ", *rows)
        assert line.startswith(f"one {at} is the best of"), line
    common = [case(["no", f"{i}" if i > 4 else "yes"], [i > 4 and i % 5 < 3, 0.5]) for i in range(30)]
    assert report_of(*common)["winners"]["text"]["name"] == "yes"  # five of five, and "no" is best in half of its own
    half = [case(["no", f"yes {i}"], chosen=0, rejected=1) for i in range(30)]  # what always wins of two does so twice
    assert advice("one text is the best of 100% of the prompts (50% by chance): 'no'", *half)


def test_texts_that_tell_of_a_fault():
    """Prompts in their answers, answers that stop, texts of several prompts, and test prompts: each with its share."""
    ask = "Question: name a planet.\nAnswer:"
    said = [
        case([f"{ask} Mars", "Mars"], [1.0, 0.0], prompt=ask),
        case(["a", "b"], [1.0, 0.0], prompt="Name a number."),
    ]
    assert advice("25.0% of the responses begin with their prompt", *said, counts={"responses_kept": 4})
    assert not advice("begin with", *said, counts={"responses_kept": 400})
    whole = "One two three four five six seven eight."
    for text, stops in (
        (whole, False), (whole[:-1], True), (f"{whole}\n* {whole[:-1]},", True), ("Yes", False), ("", False),
        (f"{whole}\n1. Mars", False), ("```py\nx = (", True), ("```py\nx = 1\n```", False), (f"{whole} :)", False),
    ):  # fmt: skip
        assert cut_off(text) is stops, text
    rows = [case([whole, whole[:-1]], [1.0, 0.0], prompt=str(i)) for i in range(3)]
    assert advice("50.0% of the responses stop inside a sentence", *rows, counts={"responses_kept": 6})
    assert advice("100.0% of the responses stand under another prompt too", *rows, counts={"responses_kept": 6})
    again = [case([whole, whole[:-1]], [1.0, 0.0]) for i in range(3)]  # the same prompt
    assert not advice("another prompt", *again, counts={"responses_kept": 6})
    test = [Row("t", "NAME  a number.", ()), Row("u", "another", ())]
    assert advice("1 of the test prompts (50.0%) are in this file too", *said, test=test)
    assert not advice("test prompts", *said, test=test[1:])


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
    report = report_with(tokenizer, rows)
    expected = {"prompts_with_bos": 2, "rows_looked_at": 2, "responses_looked_at": 4, "merges_with_the_prompt": 1}
    assert expected.items() <= report["counts"].items() and report["template"] == ""
    assert report["counts"]["responses_decoded_otherwise"] == 0
    assert ["merges", "with", "the", "prompt", "1"] in [line.split() for line in format_report(report).splitlines()]


def test_a_text_that_its_tokens_do_not_give_back():
    """A tokenizer that makes letters small: a policy can write none of these."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    rows = [Row("a", "why", ("Yes", "no"), (1.0, 0.0), where="f:1")]
    report = report_with(tokenizer, rows)
    assert report["counts"]["responses_decoded_otherwise"] == 1
    assert "50.0% of the responses are not what their tokens decode to" in report["advice"][0]


def test_a_template_that_ends_answers_otherwise_is_told():
    rows = [Row("a", ({"role": "user", "content": "why"},), ("yes", "no"), chosen=0, rejected=1, where="f:1")]
    trained = "; a policy is trained on prompt, text and eos_token"
    ends = "the chat template ends an answer with {!r} and not with eos_token, '</s>'"
    begins = "the chat template begins an answer with '<think>', which a finished one does not have"
    thinks = ANSWERED.replace("END", "</s>").replace("[assistant]:{%", "[assistant]:<think>{%")
    for template, told in (
        (ANSWERED.replace("END", "</s> "), ""),
        (ANSWERED.replace("END", "<|tool|>"), ends.format("<|tool|>")),
        (thinks, begins),
    ):
        report = report_with(byte_tokenizer(chat_template=template), rows)
        assert report["advice"] == [told + trained] * bool(told) + [NO_REWARDS]
        assert report["counts"]["merges_with_the_prompt"] == 0


def run(model, path, capsys, *more):
    """What the command prints as JSON."""
    data_prep.main(["doctor", f"--input={path}", f"--model={model}", "--json", *more])
    return json.loads(capsys.readouterr().out)


def test_the_command(tmp_path, capsys):
    """Six tokens of prompt; responses of two and four with EOS; five tokens in all. Prompts of a test file, and what
    the manifest of generated samples says."""
    path, test, model = tmp_path / "x.jsonl", tmp_path / "test.jsonl", save(tmp_path / "model")
    write(path, [Row("a", "why " * 6, ("tea", "tea is tea"), (1.0, 0.0)), Row("b", "why", ("tea", "is"), (1.0, 0.0))])
    write(test, [Row("t", "why", ()), Row("u", "tea", ())])
    about = {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    facts = {"command": "generate", "counts": {"encoded_otherwise": 3}, "output": about}
    files.write_record(tmp_path / "x.jsonl.manifest.json", facts)
    whole, prompts = run(model, path, capsys, f"--test={test}"), "tokens of a prompt"
    assert whole["ranges"][prompts] == {"min": 1, "median": 3.5, "max": 6} and whole["counts"]["prompts_cut"] == 0
    assert "1 of the test prompts (50.0%)" in whole["advice"][0] and "3 generated responses" in whole["advice"][3]
    cut = run(model, path, capsys, "--max_length=5", "--truncate=keep_end")
    # Two tokens of the prompt are kept at the least: the longer response does not fit, three go beside the shorter.
    assert (cut["examples"], cut["counts"]["responses_overlong"], cut["ranges"][prompts]["max"]) == (2, 1, 3)
    assert "1 prompts lose their beginning" in "".join(cut["advice"])
    config = tmp_path / "run.toml"
    config.write_text(
        'method = "dpo-hps"\nmax_length = 5\ntruncate = "keep_end"\ngamma_start = -2.0\nlr = 1e-3\nepochs = 1\n'
    )
    of_run = run(model, path, capsys, f"--config={config}")
    assert of_run["ranges"] == cut["ranges"] and of_run["q"][0]["gamma"] == -2
    assert run(model, path, capsys, "--config", str(config), "--max_length=99")["ranges"] == whole["ranges"]
    config.write_text("gama_start = -2.0")
    with pytest.raises(ValueError, match="unknown key gama_start: did you mean gamma_start"):
        run(model, path, capsys, f"--config={config}")
    write(path, [Row("a", "why", ("tea", "is"), (1.0, 1.0))])
    with pytest.raises(SystemExit, match="^1$"):
        run(model, path, capsys)
