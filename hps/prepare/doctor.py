"""What a careful person checks before training on a list-wise file, as a dict and as one readable page."""

import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from hps import plan, samplers
from hps.data import tokens
from hps.data.rows import Prompt, Row
from hps.data.tokens import Example
from hps.prepare.formats import prompt_repeated

JOINTS = 1000  # rows whose texts are tokenised once more, as one
BEGINNING_WORDS = 5
CUT_OFF_WORDS = 8  # of a last line at least: no heading and no item of a list, which end without a full stop
COUNTED = tomllib.loads(Path(__file__).with_name("doctor.toml").read_text(encoding="utf-8"))
CORRELATION, LONGER = 0.25, 0.15  # of reward and length; of the share of longer ones from a half: doctor speaks
# What may win too often: the share of prompts from which doctor speaks if it is 1.5 times that of chance.
WINS = {"text": 0.05, "beginning": 0.2, "source": 0.5}
OVER_CHANCE, WINS_AT_LEAST = 1.5, 3


def diagnose(
    rows: Sequence[Row],
    examples: Sequence[Example],
    counts: dict[str, int],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    test: Sequence[Row] = (),
    gammas: Sequence[float] = (-5, -3, -1, 1, 3),
) -> dict[str, Any]:
    """Measure the data that training would see; every value of the result fits into JSON.

    rows: as read. examples, counts: as `tokenize_rows` gives them. tokenizer: the one they come from, to look at where
    texts meet as well. test: rows whose prompts should not be among these. gammas: hardnesses at which q (Eq. 9) is
    weighed: by exp of its entropy, the number of negatives it spreads over, and by its largest mass, both averaged over
    the rows. "errors" in the result lists what makes training impossible, "advice" the rest.
    """
    by_id = {row.id: row for row in rows}
    kept = [(by_id[e.id], e) for e in examples]
    scored = [e for e in examples if e.rewards is not None]
    pairs = [e for e in examples if _is_pair(e)]
    known = {_words(row.prompt).casefold() for row in rows} if test else set()
    counts = counts | {
        "test_prompts": len(test),
        "test_prompts_in_training": sum(_words(row.prompt).casefold() in known for row in test),
        "human_pairs": len(pairs),
        "human_pairs_identical": sum(bool(e.identity[e.chosen] == e.identity[e.rejected]) for e in pairs),
        "copies_of_other_responses": sum(len(e.identity) - len(np.unique(e.identity)) for e in examples),
    }
    report: dict[str, Any] = {"rows": len(rows), "examples": len(examples), "counts": counts, "template": ""}
    report["ranges"] = {
        "responses per prompt": _range([len(e.kept) for e in examples]),
        "tokens of a prompt": _range([len(e.prompt_ids) for e in examples]),
        "tokens of a response, end token included": _range([len(ids) for e in examples for ids in e.response_ids]),
    }
    report |= _texts(kept, counts)
    report["gammas"] = _rewards(scored, gammas, counts, report["ranges"]) if scored else []
    if tokenizer:
        report["template"] = _joints(tokenizer, kept[:JOINTS], counts)
    report["errors"] = _errors(len(examples), counts)
    report["advice"] = _advice(report)
    return report


def format_report(report: dict[str, Any]) -> str:
    """Lay a report out as a page for people: errors and advice, ranges, what there is of each count, weights of q."""
    lines = [f"{report['rows']:,} rows read, {report['examples']:,} usable"]
    for title in ("errors", "advice"):
        lines += ["", f"{title}:", *(f"  - {line}" for line in report[title] or ["none"])]
    lines += ["", f"{'':42}{'min':>12}{'median':>12}{'max':>12}"]
    for label, r in report["ranges"].items():
        lines += [f"{label:42}{r['min']:>12,.6g}{r['median']:>12,.6g}{r['max']:>12,.6g}"] if r else []
    lines += [""] + [f"{key.replace('_', ' '):42}{n:>12,}" for key, n in report["counts"].items() if n]
    shares = {"reward and length, correlation in a row": "reward_length_correlation", "best longer": "best_longer"}
    lines += [f"{label:42}{report[key]:>12.2f}" for label, key in shares.items() if report[key] is not None]
    if report["gammas"]:
        norms = "".join(f"{'reward_norm ' + norm:>24}" for norm in samplers.REWARD_NORMS)
        lines += ["", f"{'effective negatives (mass on the top one)':42}{norms}"]
        for gamma in dict.fromkeys(w["gamma"] for w in report["gammas"]):
            shown = (
                f"{w['effective_negatives']:.2f} ({w['top_mass']:.1%})" for w in report["gammas"] if w["gamma"] == gamma
            )
            lines += [f"{f'  gamma = {gamma:g}':42}" + "".join(f"{text:>24}" for text in shown)]
    return "\n".join(lines)


def _texts(kept: list[tuple[Row, Example]], counts: dict[str, int]) -> dict[str, Any]:
    """What rewards may follow instead of quality: length, and a text, a beginning or a source that wins everywhere.

    Of a row are compared its responses with rewards, or its human pair; the best is the first of the highest ones.
    """
    correlations, longer = [], []
    rivals: dict[str, list[list[str]]] = {kind: [] for kind in WINS}
    texts: list[tuple[str, str]] = []  # of all responses: the text, the prompt
    for row, e in kept:
        prompt, responses = _words(row.prompt), [_words(row.responses[k]) for k in e.kept]
        texts += [(text, prompt) for text in responses]
        compared: Any = list(range(len(responses))) if e.rewards is not None else [e.chosen, e.rejected] * _is_pair(e)
        if len(compared) < 2:
            continue
        lengths = np.array([len(ids) for ids in e.response_ids])
        if e.rewards is not None:
            best = int(e.rewards.argmax())
            compared = [best, *(k for k in compared if k != best)]
            a, b = _ranks(e.rewards), _ranks(lengths)
            correlations += [np.corrcoef(a, b)[0, 1]] if np.ptp(a) and np.ptp(b) else []
        best, *others = compared
        longer.append(((lengths[best] > lengths[others]) + 0.5 * (lengths[best] == lengths[others])).mean())
        labels = {"text": responses, "beginning": [" ".join(y.split()[:BEGINNING_WORDS]) for y in responses]}
        for found in row.others.values():  # one name for each response, as UltraFeedback has `models`
            if isinstance(found, list) and len(found) == len(row.responses) and all(type(x) is str for x in found):
                labels["source"] = [found[k] for k in e.kept]
        for kind, named in labels.items():
            rivals[kind].append([named[k] for k in compared])
    prompts = Counter(text for text, _ in set(texts))
    counts["responses_of_several_prompts"] = sum(prompts[text] > 1 for text, _ in texts)
    counts["responses_with_prompt"] = sum(
        found[k] for row, e in kept for found in [prompt_repeated(row)] for k in e.kept
    )
    counts["responses_cut_off"] = sum(cut_off(row.responses[k]) for row, e in kept for k in e.kept)
    return {
        "prompts_compared": len(longer),
        "reward_length_correlation": float(np.mean(correlations)) if correlations else None,
        "best_longer": float(np.mean(longer)) if longer else None,
        "winners": {kind: _winner(found) for kind, found in rivals.items() if found},
    }


def cut_off(text: str) -> bool:
    """Whether a text stops inside a block of code, or inside the sentence of a last line of eight words at least."""
    last = text.rstrip().rpartition("\n")[2]
    goes_on = last[-1:].isalnum() or last.endswith((",", ";", "("))
    return text.count("```") % 2 == 1 or (goes_on and len(last.split()) >= CUT_OFF_WORDS)


def _winner(rivals: list[list[str]]) -> dict[str, Any]:
    """What is best more often than by chance; rivals: of each prompt what its responses are, the best one's first."""
    wins, chance = Counter(names[0] for names in rivals), dict[str, float]()
    for names in rivals:
        for name in names:
            chance[name] = chance.get(name, 0) + 1 / len(names)
    name = max(wins, key=lambda name: wins[name] - chance[name])
    return {"name": name, "wins": wins[name], "by_chance": chance[name], "prompts": len(rivals)}


def _words(said: Prompt) -> str:
    """A text, or what the turns of messages say, with single blanks."""
    return " ".join((said if isinstance(said, str) else " ".join(turn["content"] for turn in said)).split())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of each value twice its rank, that of ties their mean: Spearman's correlation is Pearson's of these."""
    ordered = np.sort(values)
    return np.searchsorted(ordered, values) + np.searchsorted(ordered, values, side="right")


def _rewards(
    scored: list[Example], gammas: Sequence[float], counts: dict[str, int], ranges: dict[str, Any]
) -> list[dict[str, Any]]:
    rewards = [cast(np.ndarray, e.rewards) for e in scored]
    r = plan.padded(rewards, -np.inf, np.float64)
    _, below, left_out = plan.dispreferred(r, plan.padded([e.identity for e in scored], -1, np.int64))
    some = below.any(1)
    pairs = [r[e.chosen] - r[e.rejected] for r, e in zip(rewards, scored, strict=True) if _is_pair(e)]
    ranges["dispreferred responses per prompt"] = _range(below.sum(1).tolist())
    ranges["best reward minus worst"] = _range([float(np.ptp(r)) for r in rewards])
    counts |= {
        "copies_of_best": int(left_out["copies_of_best"].sum()),
        "rows_with_rewards": len(scored),
        "rows_with_top_tie": int((left_out["ties_with_best"] > 0).sum()),
        "rows_no_dispreferred": int((~some).sum()),
        "human_pairs_with_rewards": len(pairs),
        "human_pairs_reversed": sum(bool(d < 0) for d in pairs),
    }
    weights = []
    for norm in samplers.REWARD_NORMS:
        scaled = samplers.normalise_rewards(r[some], norm=norm)
        for gamma in gammas if some.any() else ():
            log_q = samplers.log_q(scaled, gamma, below[some]).numpy()
            q = np.exp(log_q)
            effective = np.exp(-(q * np.where(q > 0, log_q, 0.0)).sum(1)).mean()
            about = {"gamma": float(gamma), "reward_norm": norm, "negatives": float(below[some].sum(1).mean())}
            weights.append(about | {"effective_negatives": float(effective), "top_mass": float(q.max(1).mean())})
    return weights


def _joints(tokenizer: PreTrainedTokenizerFast, kept: list[tuple[Row, Example]], counts: dict[str, int]) -> str:
    """Where texts meet: rows whose prompt and first response give other tokens when they are tokenised as one text, and
    responses whose tokens give another text. Returns in which way the template writes a finished answer otherwise than
    prompt, text and EOS; empty if it does not."""
    encoder = tokens.Encoder(tokenizer)
    merges = changed = 0
    for row, e in kept:
        chat = not isinstance(row.prompt, str)
        texts = [encoder.without_eos(row.responses[k]) for k in e.kept]
        strips = chat and encoder.template.answer[1]
        changed += sum(
            encoder.text(ids, chat=chat) != (y.strip() if strips else y) for ids, y in zip(e.response_ids, texts)
        )
        before = row.prompt if isinstance(row.prompt, str) else encoder.template.render(row.prompt)
        joined = tokenizer(before + encoder.before(chat) + texts[0], add_special_tokens=False, verbose=False).input_ids
        apart = [*encoder.prompt(row.prompt), *e.response_ids[0][:-1].tolist()]
        merges += joined not in (apart, apart[1:])  # without the BOS that is put before a string
    counts |= {
        "prompts_with_bos": sum(bool(e.prompt_ids[0] == tokenizer.bos_token_id) for _, e in kept),
        "rows_looked_at": len(kept),
        "responses_looked_at": sum(len(e.kept) for _, e in kept),
        "merges_with_the_prompt": merges,
        "responses_decoded_otherwise": changed,
    }
    chats = any(not isinstance(row.prompt, str) for row, _ in kept)
    return (encoder.template.answer[2] or "merges text and EOS") if chats and encoder.template.closing is None else ""


def _errors(examples: int, counts: dict[str, int]) -> list[str]:
    errors, scored = [], counts.get("rows_with_rewards", 0)
    if 0 < scored < examples:
        errors.append(f"only {scored:,} of {examples:,} rows have rewards: run data_prep.py annotate")
    if scored == counts.get("rows_no_dispreferred", 0) and counts["human_pairs"] == counts["human_pairs_identical"]:
        why = "the rewards tell no two responses apart" if scored else "no rewards (data_prep.py annotate)"
        errors.append(f"no row can be trained on: {why}, and no human pair of two different responses")
    return errors


def _advice(report: dict[str, Any]) -> list[str]:
    counts, advice = report["counts"], []
    for kind, found in report["winners"].items():
        wins, prompts, chance = found["wins"], found["prompts"], found["by_chance"]
        if wins >= max(WINS_AT_LEAST, WINS[kind] * prompts, OVER_CHANCE * chance):
            share = f"one {kind} is the best of {wins / prompts:.0%} of the prompts ({chance / prompts:.0%} by chance)"
            advice.append(f"{share}: {found['name'][:60]!r}; look whether it deserves that, or leave it out")
            break  # a text has a beginning, and a source texts
    for key, rule in COUNTED.items():
        if (n := counts.get(key, 0)) > rule["above"] * (total := counts.get(rule["of"], 0)):
            advice.append(rule["says"].format(n=n, share=n / max(total, 1)))
    longer, correlation = report["best_longer"], report["reward_length_correlation"]
    chance = 2 / max(report["prompts_compared"], 1) ** 0.5  # two standard errors, of half as much for a share
    uneven = abs((0.5 if longer is None else longer) - 0.5) > max(LONGER, chance / 2)
    if uneven or abs(correlation or 0) > max(CORRELATION, chance):
        known = "" if correlation is None else f", reward and length correlate by {correlation:.2f} in a row"
        told = f"the best response is longer than {longer:.0%} of its rivals{known}"
        advice.append(f"{told}: if length is no quality, train with --length_penalty or --loss rdpo")
    if report["template"]:
        advice.append(f"the chat template {report['template']}; a policy is trained on prompt, text and eos_token")
    if "rows_with_rewards" not in counts and counts["human_pairs"]:
        advice.append("no rewards: for -human methods and --loss reward; others need data_prep.py annotate first")
    hardest = max((w for w in report["gammas"] if w["reward_norm"] == "none"), key=lambda w: w["gamma"], default=None)
    if hardest and hardest["gamma"] > 0 and hardest["negatives"] >= 2:
        sharp = hardest["top_mass"] > 0.9
        if sharp or hardest["effective_negatives"] > 0.95 * hardest["negatives"]:
            what = "nearly an argmax" if sharp else "hardly different from gamma = 0"
            mass = f"the top negative has {hardest['top_mass']:.0%} of the mass"
            told = f"on this reward scale gamma = {hardest['gamma']:g} is {what} ({mass})"
            advice.append(f"{told}: standardise with --reward_norm zscore")
    return advice


def _is_pair(example: Example) -> bool:
    return example.chosen is not None and example.rejected is not None


def _range(values: Sequence[float]) -> dict[str, float] | None:
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)} if values else None
