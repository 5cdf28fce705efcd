"""Candidate responses: n samples per prompt from one prefill of the prompt.

Every prompt owns a stream of random numbers that depends on (seed, prompt id) only, and its j-th sample uses
the j-th row of that stream. So the samples of a prompt do not depend on the other prompts, their order, the
batch size or the sharding. The one exception is rounding, which differs between batch shapes: a draw that
falls within that difference of a boundary (a few in a million in fp32, more in bf16) takes the next token.
"""

import hashlib
import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response: the end token, if it was emitted, is part of `token_ids` and of `logp`."""

    token_ids: np.ndarray  # (T,) int32
    finished: bool  # the end token came within max_new_tokens
    logp: float  # sum of the tokens' log-probs at temperature 1, whatever the sampling temperature


def prompt_generator(seed: int, prompt_id: str) -> torch.Generator:
    """Returns the random stream (a CPU generator) that belongs to one prompt of one run."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting the cumulative distribution.

    Args:
        logits: (R, V), any float dtype; computed with in fp32.
        uniforms: (R,) fp32 in [0, 1); ignored at temperature 0, which takes the most likely token.
        temperature: divides the logits for the draw only.

    Returns:
        tokens (R,) int64 and their log-probs at temperature 1, (R,) fp32.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        cumulative = (logits / temperature).softmax(-1).cumsum(-1)
        # The last entry is not quite 1. right=True never lands on a token of probability 0.
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
        tokens.clamp_(max=logits.shape[-1] - 1)  # reached by NaN only, which the caller reports
    logps = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    return tokens[:, 0], logps[:, 0]


@torch.inference_mode()
def sample(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    n: int | Sequence[int],
    generators: Sequence[torch.Generator],
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float = 0.9,
    drop_fraction: float = 0.125,
) -> list[list[Sample]]:
    """Draws n responses to each of several equally long prompts in one batch.

    The prompts are prefilled once, the cache is expanded to one row per response, and rows that ended leave
    the batch as soon as they are `drop_fraction` of it (which changes the speed only).

    Args:
        model: a causal language model of `transformers` in eval mode, on any device.
        prompts: P lists of L token ids each; equal lengths, because nothing is ever padded.
        n: responses per prompt, one number for all or one for each.
        generators: P CPU generators, each advanced by n * max_new_tokens numbers: drawing 3 and then 5
            responses gives the same 8 as drawing 8.
        max_new_tokens: longest response in tokens, end token included.
        temperature: 0 is greedy, else at least 0.01.

    Returns:
        P lists of n samples.

    Raises:
        ValueError: model in training mode, unequal or empty prompts, settings out of range, or log-probs
            that are not finite.
    """
    if model.training:
        raise ValueError("the model is in training mode (dropout): call model.eval() before sampling")
    if len({len(ids) for ids in prompts}) != 1 or not len(prompts[0]):
        raise ValueError("sample() needs at least one prompt, none empty, all equally long: use generate()")
    if temperature != 0 and not 0.01 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or at least 0.01, not {temperature}")
    counts = [n] * len(prompts) if isinstance(n, int) else list(n)
    if min(counts) < 1 or max_new_tokens < 1:
        raise ValueError(f"n and max_new_tokens must be at least 1, not {n} and {max_new_tokens}")
    if temperature == 0 and max(counts) > 1:
        raise ValueError("temperature 0 would give n equal responses: set n=1 or a temperature")

    device = next(model.parameters()).device
    out = model(torch.tensor(prompts, device=device), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    prompt_of_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)  # (R,)
    cache.batch_select_indices(prompt_of_row)
    logits = out.logits[prompt_of_row, -1]

    # Drawn for all rows and steps at once: what a row gets cannot depend on when its siblings end.
    pairs = zip(counts, generators, strict=True)
    uniforms = torch.cat([torch.rand(count, max_new_tokens, generator=g) for count, g in pairs])
    uniforms = uniforms.T.contiguous().to(device)  # (steps, R)
    tokens = torch.full(uniforms.shape, eos_token_id, device=device)
    logps = torch.zeros(uniforms.shape, device=device)
    rows = torch.arange(uniforms.shape[1], device=device)  # the rows still in the batch ...
    alive = torch.ones_like(rows, dtype=torch.bool)  # ... and which of them have not ended
    for step in range(max_new_tokens):
        last, logps[step, rows] = draw_tokens(logits, uniforms[step, rows], temperature=temperature)
        tokens[step, rows] = last
        alive &= last != eos_token_id
        num_alive = int(alive.sum())  # the one device sync of a step
        if num_alive == 0 or step + 1 == max_new_tokens:
            break
        if len(rows) - num_alive >= drop_fraction * len(rows):
            keep = alive.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, last, alive = rows[keep], last[keep], alive[keep]
        logits = model(last[:, None], past_key_values=cache, use_cache=True).logits[:, -1]

    # Rows that ended but were not dropped at once went on drawing: cut at the first end token.
    is_end = tokens == eos_token_id
    finished = is_end.any(0)
    lengths = torch.where(finished, is_end.int().argmax(0) + 1, max_new_tokens)
    scored = torch.arange(max_new_tokens, device=device)[:, None] < lengths
    sums = logps.where(scored, 0).sum(0)
    if not sums.isfinite().all():
        raise ValueError("the model gave log-probs that are not finite: check its weights and dtype")
    token_rows = tokens.T.to("cpu", torch.int32).numpy()
    fields = zip(token_rows, lengths.tolist(), finished.tolist(), sums.tolist(), strict=True)
    samples = iter([Sample(row[:length].copy(), end, logp) for row, length, end, logp in fields])
    return [[next(samples) for _ in range(count)] for count in counts]


@dataclass(slots=True)
class _Stream:
    """One prompt on its way to n samples."""

    prompt_id: str
    prompt_ids: Sequence[int]
    generator: torch.Generator | None = None  # 5 kB, so not before the first draw
    drawn: int = 0
    kept: list[Sample] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)


def _absorb(
    stream: _Stream, samples: list[Sample], *, n: int, unique: bool, keep_unfinished: bool, counts: Counter[str]
) -> None:
    stream.drawn += len(samples)
    for one in samples:
        key = one.token_ids.tobytes()
        counts["samples"] += 1
        if len(stream.kept) == n:
            counts["surplus"] += 1
        elif not one.finished and not keep_unfinished:
            counts["unfinished"] += 1
        elif unique and key in stream.seen:
            counts["duplicates"] += 1
        else:
            stream.kept.append(one)
            stream.seen.add(key)


def generate(
    model: torch.nn.Module,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    n: int,
    counts: Counter[str],
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float = 0.9,
    seed: int = 0,
    unique: bool = True,
    keep_unfinished: bool = False,
    oversample: float = 1.1,
    draw_limit: float = 4.0,
    max_rows: int = 512,
    progress: bool = True,
) -> Iterator[tuple[str, list[Sample]]]:
    """Yields (prompt id, its first n finished samples) in input order; equally long prompts share a batch.

    A prompt gets n * oversample draws at first and further ones until it has n finished (and, with
    `unique`, distinct) samples or n * draw_limit draws. Draws of other prompts fill up the batches.

    Args:
        model: as for `sample`.
        prompts: (id, token ids); ids must be distinct, for they select the random stream.
        counts: is added to: "samples" drawn = kept + "unfinished" + "duplicates" + "surplus" (drawn beyond
            the n-th), and "prompts_short", prompts that ended with fewer than n.
        keep_unfinished: keep samples cut off at max_new_tokens: an evaluation must see a policy that rambles.
        max_rows: rows of a batch at most; lower it when memory runs out.

    Raises:
        ValueError: a repeated id, an empty or a too long prompt, and what `sample` raises.
    """
    if n < 1 or max_rows < 1 or not 1 <= oversample <= draw_limit < math.inf:
        raise ValueError("generate() needs n >= 1, max_rows >= 1 and 1 <= oversample <= draw_limit")
    if temperature == 0:
        oversample = draw_limit = 1.0  # a further greedy response would be the same one
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    queues: dict[int, deque[_Stream]] = {}  # by prompt length, each in input order
    streams: deque[_Stream] = deque()
    for prompt_id, ids in prompts:
        if not 0 < len(ids) <= limit - max_new_tokens:
            raise ValueError(
                f"prompt {prompt_id!r} has {len(ids)} tokens; the model's {limit} positions and "
                f"max_new_tokens={max_new_tokens} allow 1 to {limit - max_new_tokens}: shorten or drop it"
            )
        streams.append(_Stream(prompt_id, ids))
        queues.setdefault(len(ids), deque()).append(streams[-1])
    if len({stream.prompt_id for stream in streams}) < len(streams):
        raise ValueError("two prompts share an id and would get the same samples: make the ids distinct")

    def still_due(stream: _Stream) -> int:
        draws_per_kept = (stream.drawn + 1) / (len(stream.kept) + 1)
        due = math.ceil((n - len(stream.kept)) * oversample * draws_per_kept)
        due = due and max(due, stream.drawn // 8)  # growing steps, or the last ones would trickle in
        return min(due, math.ceil(n * draw_limit) - stream.drawn)

    bar = tqdm(total=len(streams), unit="prompt", desc="generate", disable=not progress)
    while streams:
        first = streams.popleft()
        queue = queues[len(first.prompt_ids)]
        while still_due(first):  # then it heads its queue
            batch, rows, room = [], [], max_rows
            while queue and room:
                stream = queue.popleft()
                stream.generator = stream.generator or prompt_generator(seed, stream.prompt_id)
                batch.append(stream)
                rows.append(min(still_due(stream), room))
                room -= rows[-1]
            results = sample(
                model,
                [stream.prompt_ids for stream in batch],
                n=rows,
                generators=[stream.generator for stream in batch],
                eos_token_id=eos_token_id,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
            for stream, samples in zip(batch, results, strict=True):
                _absorb(stream, samples, n=n, unique=unique, keep_unfinished=keep_unfinished, counts=counts)
            undone = [stream for stream in batch if still_due(stream)]
            queue.extendleft(reversed(undone))
            bar.update(len(batch) - len(undone))
        counts["prompts_short"] += len(first.kept) < n
        yield first.prompt_id, first.kept
    bar.close()
