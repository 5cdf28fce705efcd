"""What a careful person checks before training on a list-wise file, as a dict and as one readable page."""

import itertools
import tomllib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from hps import batches, methods, plan
from hps.data import tokens
from hps.data.rows import Prompt, Row, row_key
from hps.data.tokens import Example
from hps.options import Config
from hps.prepare.formats import prompt_repeated
from hps.samplers import SAMPLERS

JOINTS = 1000  # rows whose texts are tokenised once more, as one
BEGINNING_WORDS = 5
CUT_OFF_WORDS = 8  # of a last line at least: no heading and no item of a list, which end without a full stop
COUNTED = tomllib.loads(Path(__file__).with_name("doctor.toml").read_text(encoding="utf-8"))
CORRELATION, LONGER = 0.25, 0.15  # of reward and length; of the share of longer ones from a half: doctor speaks
# What may win too often: the share of prompts from which doctor speaks if it is 1.5 times that of chance.
WINS = {"text": 0.05, "beginning": 0.2, "source": 0.5}
OVER_CHANCE, WINS_AT_LEAST = 1.5, 3
ARGMAX = 1.4  # effective negatives; of two, one has nine tenths of the mass then
RANGES = {
    "responses": "responses per prompt",
    "prompt_tokens": "tokens of a prompt",
    "response_tokens": "tokens of a response, end token included",
    "dispreferred": "dispreferred responses per prompt",
    "reward_range": "best reward minus worst",
}
Kept = tuple[Row, Example]


def kept_rows(
    tokenizer: PreTrainedTokenizerFast, rows: Iterable[Row], counts: dict[str, int], **how: Any
) -> Iterator[Kept]:
    """The rows that training would see, each with its example; arguments and errors as `tokens.tokenize`."""
    kept, rows = itertools.tee(rows)
    for example in tokens.tokenize(tokenizer, rows, counts, **how):
        yield next(row for row in kept if row.id == example.id), example


class Found:
    """What is gathered of the rows, one after the other; about 90 bytes per response and 350 per row with rewards."""

    def __init__(self) -> None:
        shown = ("human_pairs", "human_pairs_identical", "copies_of_other_responses")  # in this order, zeros too
        self.counts: Counter[str] = Counter(dict.fromkeys(shown, 0))
        self.values: defaultdict[str, array] = defaultdict(lambda: array("d"))
        self.texts, self.prompts = array("Q"), array("Q")  # hashes, of each response
        self.rivals = {kind: Rivals() for kind in WINS}
        self.scored: list[tuple[np.ndarray, np.ndarray, int]] = []  # rewards, identity and key of rows with rewards


def diagnose(
    kept: Iterable[Kept],
    counts: dict[str, int],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    test: Iterable[Row] = (),
    run: Config | None = None,
) -> dict[str, Any]:
    """Measure the data that training would see; every value of the result fits into JSON.

    kept, counts: as `kept_rows` gives and fills them; gone through once. tokenizer: the one they come from, to look at
    where texts meet as well. test: rows whose prompts should not be among these. run: options of a training (default:
    train.py's own); its plan is drawn to see its q (Eq. 9) at the first, the middle and the last step: gamma, and the
    number of negatives that q spreads over, exp of its entropy, the mean over the visits at that gamma. "errors" in the
    result lists what makes training impossible, "advice" the rest.
    """
    run = run or Config("", "", "")
    wanted = Counter(row_key(_words(row.prompt).casefold()) for row in test)
    met: set[int] = set()
    found, first = Found(), list[Kept]()
    for row, e in kept:
        first += [(row, e)] if len(first) < JOINTS else []
        responses, prompt = [_words(row.responses[k]) for k in e.kept], row_key(_words(row.prompt).casefold())
        found.texts.extend(map(row_key, responses))
        found.prompts.extend([prompt] * len(responses))
        met |= wanted.keys() & {prompt}
        found.values["responses"].append(len(e.kept))
        found.values["prompt_tokens"].append(len(e.prompt_ids))
        found.values["response_tokens"].extend(map(len, e.response_ids))
        same = _is_pair(e) and bool(e.identity[e.chosen] == e.identity[e.rejected])
        copies = len(e.identity) - len(np.unique(e.identity))
        found.counts.update(human_pairs=_is_pair(e), human_pairs_identical=same, copies_of_other_responses=copies)
        _texts(row, e, responses, found)
        if e.rewards is not None:
            _rewards(e, e.rewards - run.length_penalty * np.array([*map(len, e.response_ids)]), found)
    counts = counts | {"test_prompts": wanted.total(), "test_prompts_in_training": sum(wanted[key] for key in met)}
    counts |= found.counts | {"responses_of_several_prompts": _of_several_prompts(found)}
    template = _joints(tokenizer, first, counts) if tokenizer else ""
    values = found.values
    report: dict[str, Any] = {
        "rows": counts["rows_read"],
        "examples": len(values["responses"]),
        "counts": counts,
        "template": template,
        "ranges": {
            label: {"min": min(x), "median": float(np.median(x)), "max": max(x)}
            for name, label in RANGES.items()
            if (x := values.get(name))
        },
        "prompts_compared": len(values["longer"]),
        "reward_length_correlation": float(np.mean(values["correlation"])) if values["correlation"] else None,
        "best_longer": float(np.mean(values["longer"])) if values["longer"] else None,
        "winners": {kind: one.winner() for kind, one in found.rivals.items() if one.prompts},
        "method": run.method if run.loss == "preference" else run.loss,
        "q": [],
    }
    with_q = run.loss == "preference" and SAMPLERS[methods.parts(run)[1]].log_q is not None
    if with_q and counts.get("rows_with_rewards", 0) > counts.get("rows_no_dispreferred", 0):
        rewards, identity, keys = zip(*found.scored, strict=True)
        columns: Any = SimpleNamespace(rewards=rewards, identity=identity, keys=np.array(keys, np.uint64), human=None)
        drawn, below = batches.make_plan(run, columns), float(np.mean([n for n in values["dispreferred"] if n]))
        for step in (0, drawn.steps // 2, drawn.steps - 1):
            gamma = drawn.gamma[drawn.step(step)]
            effective = float(drawn.effective[np.isin(drawn.gamma, gamma)].mean())
            about = {"step": step + 1, "steps": drawn.steps, "gamma": float(gamma.mean())}
            report["q"].append(about | {"negatives": below, "effective_negatives": effective})
    report["errors"] = _errors(report["examples"], counts)
    report["advice"] = _advice(report, run)
    return report


def format_report(report: dict[str, Any]) -> str:
    """Lay a report out as a page for people: errors and advice, ranges, what there is of each count, weights of q."""
    lines = [f"{report['rows']:,} rows read, {report['examples']:,} usable"]
    for title in ("errors", "advice"):
        lines += ["", f"{title}:", *(f"  - {line}" for line in report[title] or ["none"])]
    lines += ["", f"{'':42}{'min':>12}{'median':>12}{'max':>12}"]
    for label, r in report["ranges"].items():
        lines.append(f"{label:42}{r['min']:>12,.6g}{r['median']:>12,.6g}{r['max']:>12,.6g}")
    lines += [""] + [f"{key.replace('_', ' '):42}{n:>12,}" for key, n in report["counts"].items() if n]
    shares = {"reward and length, correlation in a row": "reward_length_correlation", "best longer": "best_longer"}
    lines += [f"{label:42}{report[key]:>12.2f}" for label, key in shares.items() if report[key] is not None]
    if report["q"]:
        lines += ["", f"{'q of ' + report['method']:30}{'gamma':>12}{'negatives':>12}{'effective':>12}"]
        for q in report["q"]:
            step = f"  step {q['step']:,} of {q['steps']:,}"
            lines += [f"{step:30}{q['gamma']:>12.4g}{q['negatives']:>12.2f}{q['effective_negatives']:>12.2f}"]
    return "\n".join(lines)


def _texts(row: Row, e: Example, responses: list[str], found: Found) -> None:
    """What rewards may follow instead of quality: length, and a text, a beginning or a source that wins everywhere.
    Compared are a row's responses with rewards, or its human pair; the best is the first of the highest ones."""
    repeated = prompt_repeated(row)
    found.counts["responses_with_prompt"] += sum(repeated[k] for k in e.kept)
    found.counts["responses_cut_off"] += sum(cut_off(row.responses[k]) for k in e.kept)
    compared: Any = list(range(len(responses))) if e.rewards is not None else [e.chosen, e.rejected] * _is_pair(e)
    if len(compared) < 2:
        return
    lengths = np.array([len(ids) for ids in e.response_ids])
    if e.rewards is not None:
        best = int(e.rewards.argmax())
        compared = [best, *(k for k in compared if k != best)]
        a, b = _ranks(e.rewards), _ranks(lengths)
        if np.ptp(a) and np.ptp(b):
            found.values["correlation"].append(np.corrcoef(a, b)[0, 1])
    best, *others = compared
    longer = (lengths[best] > lengths[others]) + 0.5 * (lengths[best] == lengths[others])
    found.values["longer"].append(longer.mean())
    labels = {"text": responses, "beginning": [" ".join(y.split()[:BEGINNING_WORDS]) for y in responses]}
    for other in row.others.values():  # one name for each response, as UltraFeedback has `models`
        if isinstance(other, list) and len(other) == len(row.responses) and all(type(x) is str for x in other):
            labels["source"] = [other[k] for k in e.kept]
    for kind, named in labels.items():
        found.rivals[kind].add([named[k] for k in compared])


def _of_several_prompts(found: Found) -> int:
    """Responses whose text stands under another prompt too."""
    once_per_prompt = np.unique(np.array([found.texts, found.prompts], np.uint64), axis=1)[0]
    texts, prompts = np.unique(once_per_prompt, return_counts=True)
    return int(np.isin(found.texts, texts[prompts > 1]).sum())


class Rivals:
    """What is best more often than by chance; of each name a hash is held, and of those that won twice the name."""

    def __init__(self) -> None:
        self.prompts, self.names = 0, dict[int, str]()
        self.keys, self.chance, self.wins = array("Q"), array("f"), Counter[int]()

    def add(self, names: list[str]) -> None:
        """What a prompt's responses are, the best one's first."""
        keys = list(map(row_key, names))
        self.keys.extend(keys)
        self.chance.extend([1 / len(names)] * len(names))
        self.wins[keys[0]] += 1
        self.prompts += 1
        if self.prompts == 1 or self.wins[keys[0]] == 2:  # a single win is no more than chance
            self.names[keys[0]] = names[0]

    def winner(self) -> dict[str, Any]:
        known = np.isin(self.keys, np.fromiter(self.names, np.uint64))
        keys, at = np.unique(np.array(self.keys)[known], return_inverse=True)
        chance = dict(zip(keys.tolist(), np.bincount(at, np.array(self.chance)[known]).tolist()))
        best = max(self.names, key=lambda key: self.wins[key] - chance[key])
        about = {"name": self.names[best], "wins": self.wins[best], "by_chance": chance[best]}
        return about | {"prompts": self.prompts}


def cut_off(text: str) -> bool:
    """Whether a text stops inside a block of code, or inside the sentence of a last line of eight words at least."""
    last = text.rstrip().rpartition("\n")[2]
    goes_on = last[-1:].isalnum() or last.endswith((",", ";", "("))
    return text.count("```") % 2 == 1 or (goes_on and len(last.split()) >= CUT_OFF_WORDS)


def _words(said: Prompt) -> str:
    """A text, or what the turns of messages say, with single blanks."""
    return " ".join((said if isinstance(said, str) else " ".join(turn["content"] for turn in said)).split())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Of each value twice its rank, that of ties their mean: Spearman's correlation is Pearson's of these."""
    ordered = np.sort(values)
    return np.searchsorted(ordered, values) + np.searchsorted(ordered, values, side="right")


def _rewards(e: Example, rewards: np.ndarray, found: Found) -> None:
    """What these rewards, which hold the length penalty, say of the row."""
    found.scored.append((rewards, e.identity, row_key(e.id)))
    _, [below], left_out = plan.dispreferred(rewards[None], e.identity[None])
    found.values["dispreferred"].append(below.sum())
    found.values["reward_range"].append(float(np.ptp(rewards)))
    found.counts.update(
        copies_of_best=int(left_out["copies_of_best"][0]),
        rows_with_rewards=1,
        rows_with_top_tie=bool(left_out["ties_with_best"][0]),
        rows_no_dispreferred=not below.any(),
        human_pairs_with_rewards=_is_pair(e),
        human_pairs_reversed=_is_pair(e) and bool(rewards[e.chosen] < rewards[e.rejected]),
    )


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


def _advice(report: dict[str, Any], run: Config) -> list[str]:
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
    hardest = max(report["q"], key=lambda q: q["gamma"], default=None)
    if hardest and hardest["gamma"] > 0 and hardest["negatives"] >= 2:
        sharp = hardest["effective_negatives"] < ARGMAX
        if sharp or hardest["effective_negatives"] > 0.95 * hardest["negatives"]:
            what = "nearly an argmax" if sharp else "hardly different from gamma = 0"
            of = f"it spreads over {hardest['effective_negatives']:.2f} of {hardest['negatives']:.2f} negatives"
            told = f"on this reward scale gamma = {hardest['gamma']:g} is {what} ({of})"
            mend = f"{'lower' if sharp else 'raise'} --reward_scale ({run.reward_scale:g})"
            mend = mend if run.reward_norm == "zscore" else "standardise with --reward_norm zscore"
            advice.append(f"{told}: {mend}")
    return advice


def _is_pair(example: Example) -> bool:
    return example.chosen is not None and example.rejected is not None
