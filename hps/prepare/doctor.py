"""What a careful person checks before training on a list-wise file, as a dict and as one readable page."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from hps import plan, samplers
from hps.data import tokens
from hps.data.rows import Row
from hps.data.tokens import Example

JOINTS = 1000  # rows whose texts are tokenised once more, as one


def diagnose(
    rows: Sequence[Row],
    examples: Sequence[Example],
    counts: dict[str, int],
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    gammas: Sequence[float] = (-5, -3, -1, 1, 3),
) -> dict[str, Any]:
    """Measure the data that training would see; every value of the result fits into JSON.

    rows: as read. examples, counts: as `tokenize_rows` gives them. tokenizer: the one they come from, to look at where
    texts meet as well. gammas: hardnesses at which q (Eq. 9) is weighed: by exp of its entropy, the number of negatives
    it spreads over, and by its largest mass, both averaged over the rows. "errors" in the result lists what makes
    training impossible, "advice" the rest.
    """
    scored = [e for e in examples if e.rewards is not None]
    pairs = [e for e in examples if _is_pair(e)]
    identical = sum(bool(e.identity[e.chosen] == e.identity[e.rejected]) for e in pairs)
    report: dict[str, Any] = {
        "rows": len(rows),
        "examples": len(examples),
        "counts": counts,
        "responses_per_prompt": _range([len(e.kept) for e in examples]),
        "prompt_tokens": _range([len(e.prompt_ids) for e in examples]),
        "response_tokens": _range([len(ids) for e in examples for ids in e.response_ids]),
        "duplicates": sum(len(e.identity) - len(np.unique(e.identity)) for e in examples),
        "human_pairs": len(pairs),
        "human_pairs_identical": identical,
        "rewards": _rewards(scored, gammas) if scored else None,
        "joints": _joints(tokenizer, rows, examples) if tokenizer else None,
    }
    contrasted = len(scored) - report["rewards"]["rows_no_dispreferred"] if scored else 0
    report["errors"] = _errors(report, trainable=contrasted + len(pairs) - identical)
    report["advice"] = _advice(report)
    return report


def format_report(report: dict[str, Any]) -> str:
    """Lay a report out as a page for people: ranges, counts, weights of the negatives, advice, errors."""
    rewards = report["rewards"] or {}
    lines = [f"{report['rows']:,} rows read, {report['examples']:,} usable", ""]
    lines += [f"{'':40}{'min':>10}{'median':>10}{'max':>10}"]
    ranges = {
        "responses per prompt": report["responses_per_prompt"],
        "dispreferred responses per prompt": rewards.get("negatives"),
        "best reward minus worst": rewards.get("spread"),
        "tokens of a prompt": report["prompt_tokens"],
        "tokens of a response, end token included": report["response_tokens"],
    }
    for label, r in ranges.items():
        lines += [f"{label:40}{r['min']:>10,.6g}{r['median']:>10,.6g}{r['max']:>10,.6g}"] if r else []
    totals = {key.replace("_", " "): value for key, value in report["counts"].items()}
    totals |= {"copies of another response of the row": report["duplicates"]}
    if rewards:
        totals |= {
            "copies of the best response": rewards["copies_of_best"],
            "rows with rewards": rewards["rows"],
            "rows with a tie for the best reward": rewards["rows_with_top_tie"],
            "rows without a dispreferred response": rewards["rows_no_dispreferred"],
        }
    totals |= {"rows with a human pair": report["human_pairs"]}
    if rewards and report["human_pairs"]:
        totals |= {"human pairs that the rewards reverse": rewards["human_pairs_reversed"]}
    if joints := report["joints"]:
        totals |= {
            "prompts that begin with BOS": joints["prompts_with_bos"],
            "responses that end in EOS, the only one": joints["responses_with_one_eos"],
            f"merges with the prompt, in {joints['looked_at']:,} rows": joints["merges"],
            "responses whose tokens are another text": joints["changed"],
        }
    lines += ["", *(f"{label:40}{value:>10,}" for label, value in totals.items())]
    if rewards and rewards["gammas"]:
        lines += ["", f"{'reward_norm':16}{'gamma':>8}{'effective negatives':>24}{'mass on the top one':>24}"]
        lines += [
            f"{w['reward_norm']:16}{w['gamma']:>8g}{w['effective_negatives']:>24.2f}{w['top_mass']:>24.1%}"
            for w in rewards["gammas"]
        ]
    for title in ("advice", "errors"):
        lines += ["", f"{title}:", *(f"  - {line}" for line in report[title] or ["none"])]
    return "\n".join(lines)


def _weights(rewards: np.ndarray, below: np.ndarray, gamma: float, norm: str) -> dict[str, float]:
    """Means over prompts of what q comes to; rewards (R, n) float64 and below (R, n) bool as in `plan.dispreferred`."""
    effective, top = [], []
    for rows in plan.chunks(len(rewards)):
        scaled = samplers.normalise_rewards(rewards[rows], norm=norm)
        log_q = samplers.log_q(scaled, gamma, below[rows]).numpy()
        q = np.exp(log_q)
        effective.append(np.exp(-(q * np.where(q > 0, log_q, 0.0)).sum(1)))
        top.append(q.max(1))
    return {
        "effective_negatives": float(np.concatenate(effective).mean()),
        "top_mass": float(np.concatenate(top).mean()),
    }


def _rewards(scored: list[Example], gammas: Sequence[float]) -> dict[str, Any]:
    rewards = [cast(np.ndarray, e.rewards) for e in scored]
    r = plan.padded(rewards, -np.inf, np.float64)
    _, below, left_out = plan.dispreferred(r, plan.padded([e.identity for e in scored], -1, np.int64))
    negatives, some = below.sum(1), below.any(1)
    pairs = [r[e.chosen] - r[e.rejected] for r, e in zip(rewards, scored, strict=True) if _is_pair(e)]
    return {
        "rows": len(scored),
        "spread": _range([float(np.ptp(r)) for r in rewards]),
        "negatives": _range(negatives.tolist()),
        "mean_negatives": float(negatives[some].mean()) if some.any() else 0.0,
        "rows_with_top_tie": int((left_out["ties_with_best"] > 0).sum()),
        "copies_of_best": int(left_out["copies_of_best"].sum()),
        "rows_no_dispreferred": int((~some).sum()),
        "human_pairs": len(pairs),
        "human_pairs_reversed": sum(bool(d < 0) for d in pairs),
        "gammas": [
            {"gamma": float(gamma), "reward_norm": norm, **_weights(r[some], below[some], gamma, norm)}
            for norm in samplers.REWARD_NORMS
            for gamma in (gammas if some.any() else ())
        ],
    }


def _joints(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row], examples: Sequence[Example]) -> dict[str, Any]:
    """Where texts meet. merges: of the rows looked at, those whose prompt and first response give other tokens when
    they are tokenised as one text. changed: their responses of which the tokens give another text. differs: in which
    way the template writes a finished answer otherwise than prompt, text and EOS; empty if it does not."""
    eos, encoder = tokenizer.eos_token_id, tokens.Encoder(tokenizer)
    ends = [ids[-1] == eos and (ids == eos).sum() == 1 for e in examples for ids in e.response_ids]
    kept = {e.id: e.kept.tolist() for e in examples[:JOINTS]}
    looked_at = [row for row in rows if row.id in kept]
    merges = changed = 0
    for row in looked_at:
        chat = not isinstance(row.prompt, str)
        texts = [encoder.without_eos(row.responses[k]) for k in kept[row.id]]
        found = list(encoder.responses(texts, chat=chat))
        strips = chat and encoder.template.answer[1]
        changed += sum(encoder.text(ids, chat=chat) != (y.strip() if strips else y) for ids, y in zip(found, texts))
        before = row.prompt if isinstance(row.prompt, str) else encoder.template.render(row.prompt)
        joined = tokenizer(before + encoder.before(chat) + texts[0], add_special_tokens=False, verbose=False).input_ids
        apart = [*encoder.prompt(row.prompt), *found[0][:-1]]
        merges += joined not in (apart, apart[1:])  # without the BOS that is put before a string
    chats = any(not isinstance(row.prompt, str) for row in looked_at)
    not_closed = chats and encoder.template.closing is None
    return {
        "prompts_with_bos": sum(bool(e.prompt_ids[0] == tokenizer.bos_token_id) for e in examples),
        "responses_with_one_eos": int(sum(ends)),
        "looked_at": len(looked_at),
        "merges": merges,
        "changed": changed,
        "differs": (encoder.template.answer[2] or "merges text and EOS") if not_closed else "",
    }


def _errors(report: dict[str, Any], *, trainable: int) -> list[str]:
    errors = []
    scored, examples = report["rewards"]["rows"] if report["rewards"] else 0, report["examples"]
    if 0 < scored < examples:
        errors.append(f"only {scored:,} of {examples:,} rows have rewards: run data_prep.py annotate")
    if not trainable:
        why = "the rewards tell no two responses apart" if scored else "no rewards (data_prep.py annotate)"
        errors.append(f"no row can be trained on: {why}, and no human pair of two different responses")
    return errors


def _advice(report: dict[str, Any]) -> list[str]:
    advice, rewards, counts = [], report["rewards"], report["counts"]
    if counts.get("responses_overlong"):
        share = counts["responses_overlong"] / counts["responses_read"]
        advice.append(f"{share:.1%} of the responses do not fit: raise --max_length if memory allows")
    if counts.get("prompts_cut"):
        advice.append(f"{counts['prompts_cut']:,} prompts lose their beginning: raise --max_length if memory allows")
    if report["joints"] and report["joints"]["differs"]:
        differs = report["joints"]["differs"]
        advice.append(f"the chat template {differs}; a policy is trained on prompt, text and eos_token")
    if counts.get("pairs_broken"):
        advice.append(f"{counts['pairs_broken']:,} rows lost a response of their human pair")
    if report["human_pairs_identical"]:
        advice.append(f"{report['human_pairs_identical']:,} human pairs hold equal responses: no signal")
    if rewards is None:
        if report["human_pairs"]:
            advice.append("no rewards: for -human methods and --loss reward; others need data_prep.py annotate first")
        return advice
    if rewards["rows_no_dispreferred"]:
        advice.append(f"{rewards['rows_no_dispreferred']:,} rows have no dispreferred response: left out")
    if rewards["rows_with_top_tie"] > 0.1 * rewards["rows"]:
        advice.append("many rows tie for the best reward, which shrinks the choice: score in fp32, not bf16")
    if rewards["human_pairs_reversed"] > 0.4 * rewards["human_pairs"]:
        advice.append("the rewards reverse over 40% of the human pairs: check the scorer and its template")
    raw = [w for w in rewards["gammas"] if w["reward_norm"] == "none"]
    hardest = max(raw, key=lambda w: w["gamma"], default=None)
    if hardest and hardest["gamma"] > 0 and rewards["mean_negatives"] >= 2:
        sharp = hardest["top_mass"] > 0.9
        flat = hardest["effective_negatives"] > 0.95 * rewards["mean_negatives"]
        if sharp or flat:
            what = "nearly an argmax" if sharp else "hardly different from gamma = 0"
            advice.append(
                f"on this reward scale gamma = {hardest['gamma']:g} is {what} (the top negative has "
                f"{hardest['top_mass']:.0%} of the mass): standardise with --reward_norm zscore"
            )
    return advice


def _is_pair(example: Example) -> bool:
    return example.chosen is not None and example.rejected is not None


def _range(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}
