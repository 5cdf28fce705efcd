"""Decoding many rows of several prompts at once: a prompt's keys and values are kept once, whatever its rows.

Prompts of any lengths share the batch. Rows that ended leave it, and rows of further prompts take their places. To
transformers the batch is a cache whose `update` stores a row's own keys and values; `packed_attention` (hps.attention)
hands the query to `_Rows.attend`, which looks at the row's prompt and at the row itself.
"""

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from hps import attention, limits, loading

PADDED_TOKENS = 4096  # of one prefill, at most
WORTH_A_PREFILL = 32  # rows; fewer of a prompt's rows do not start without the rest
COLUMNS = 32  # of own keys, at least: PyTorch has no fast product for fewer on a CPU
ENDED_SHARE = 1 / 8  # of the rows must have ended before others take their places ...
IDLE_SHARE = 1 / 4  # ... or, when no others are waiting, before the rest moves together


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response: the end token, if it was emitted, is part of `token_ids` and of `logp`."""

    token_ids: np.ndarray  # (T,) int32
    finished: bool  # the end token came within max_new_tokens
    logp: float  # sum of the tokens' log-probs at temperature 1, whatever the sampling temperature

    @property
    def said(self) -> np.ndarray:
        """The tokens of its text: all but the end token, which to the tokenizer may be a token like others."""
        return self.token_ids[:-1] if self.finished else self.token_ids


@dataclasses.dataclass(slots=True)
class Request:
    """A prompt that asks for `due` further samples; they go to `samples` in the order of its random stream."""

    prompt_ids: Sequence[int]
    seed: int  # of its random stream, of which every sample takes max_new_tokens numbers
    due: int = 0
    samples: list[Sample | None] = dataclasses.field(default_factory=list)
    generator: torch.Generator | None = None  # 5 kB, so not before the first draw
    name: str = ""  # for whoever asks for it

    def uniforms(self, n: int, max_new_tokens: int) -> Tensor:
        """The next n rows of the stream, (n, max_new_tokens): whole, so that no sample's depend on when others end."""
        self.generator = self.generator or torch.Generator().manual_seed(self.seed)
        return torch.rand(n, max_new_tokens, generator=self.generator)


def draw_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """Draws one token per row by inverting the cumulative distribution.

    logits: (R, V), any float dtype. uniforms: (R,) fp32 in [0, 1); not used at temperature 0, which takes the most
    likely token. top_p: of the most likely tokens, those that together have this probability at that temperature can be
    drawn. Returns tokens (R,) int64 and their log-probs at temperature 1 over all tokens, (R,) fp32.
    """
    logits = logits.float()
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        probabilities = (logits / temperature).softmax(-1)
        if top_p < 1:
            falling, order = probabilities.sort(-1, descending=True)
            falling[falling.cumsum(-1) - falling >= top_p] = 0  # what stands before it has enough
            probabilities.scatter_(-1, order, falling)
        cumulative = probabilities.cumsum(-1)
        # The last entry is not quite 1. right=True never lands on a token of probability 0.
        tokens = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
        tokens.clamp_(max=logits.shape[-1] - 1)  # reached by NaN only, which the caller reports
    logps = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    return tokens[:, 0], logps[:, 0]


@torch.inference_mode()
def decode(
    model: nn.Module,
    requests: deque[Request],
    *,
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float,
    max_rows: int,
    top_p: float = 1.0,
    longest_prompt: int = 0,
) -> Iterator[Request]:
    """Yields each request when all its samples are there, in the order in which they end.

    A model that packed attention cannot decode is sampled by transformers' `generate`, one prompt after the other and
    slower, with a line in the log; its samples take the same random numbers.

    Args:
        model: a causal language model of `transformers` in eval mode, on any device.
        requests: is emptied; may be added to between two results, also with a request that was yielded.
        max_new_tokens: longest response in tokens, end token included.
        longest_prompt: tokens of the longest prompt, if others are added than wait now.

    Raises:
        ValueError: log-probs that are not finite, or not those of the model's own forward.
    """
    ends = end_ids(model, eos_token_id)
    settings = dict(ends=ends, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
    longest = max(longest_prompt, *(len(request.prompt_ids) for request in requests)) + max_new_tokens
    with attention.instead(model, model.config._attn_implementation):
        way = _way(model, longest, requests[0].prompt_ids[:16], settings)
        yield from way(model, requests, max_rows=max_rows, **settings)


def _way(model: Any, longest: int, prompt_ids: Sequence[int], settings: dict[str, Any]) -> Callable[..., Any]:
    """`_in_rows` if a few tokens behind a prompt show that it is right, else `_by_transformers`, with a line in the log
    the first time; the attention that it needs is put in place. ValueError if neither is right."""
    known, beyond = model.__dict__.setdefault("ways_to_decode", {}), longest > limits.window(model.config)
    if beyond not in known:
        reason = "samples may be longer than its window" if beyond else "it takes no attention but its own"
        if not beyond and attention.install(model):
            reason = _wrong(model, _in_rows, prompt_ids, settings)
        if reason:
            attention.put(model)
            name = type(model).__name__
            if wrong := _wrong(model, _by_transformers, prompt_ids, settings):
                raise ValueError(f"{name} cannot be sampled from: {wrong}")
            logging.getLogger(__name__).warning("%s is sampled by transformers' generate, slower: %s", name, reason)
        known[beyond] = _by_transformers if reason else _in_rows
    attention.put(model, attention.NAME if known[beyond] is _in_rows else "")
    return known[beyond]


def _wrong(model: Any, way: Callable[..., Any], prompt_ids: Sequence[int], settings: dict[str, Any]) -> str:
    """What is wrong with two samples of a way to decode, or nothing, by the model's own forward of each."""
    P, request = len(prompt_ids), Request(prompt_ids, seed=0, due=2)
    few = settings | {"max_new_tokens": 4, "ends": [-1]}  # a sample that ends at once would show nothing
    try:
        list(way(model, deque([request]), max_rows=2, **few))
        with attention.instead(model, "eager"):
            for sample in request.samples:
                assert sample is not None
                ids = torch.tensor([[*prompt_ids, *sample.token_ids.tolist()]], device=next(model.parameters()).device)
                logits = model(ids, use_cache=False).logits[0, P - 1 : -1]
                logps = logits.float().log_softmax(-1).gather(1, ids[0, P:, None])
                apart = abs(float(logps.double().sum()) - sample.logp) / len(sample.token_ids)
                if not apart <= (1e-3 if logits.dtype == torch.float32 else 0.1):
                    return f"its log-probs differ from its own forward's by {apart:.2g} nats per token"
    except Exception as error:  # whatever its code raises on what it does not know
        return loading.said(error)
    return ""


def _in_rows(model: nn.Module, requests: deque[Request], *, max_rows: int, **settings: Any) -> Iterator[Request]:
    """`decode` by packed attention."""
    rows = _Rows(model, **settings)
    while requests or rows.owner:
        room, joining = max_rows - len(rows.owner), []
        while requests and room >= min(requests[0].due, WORTH_A_PREFILL, max_rows):
            request = requests[0]
            joining.append((request, min(request.due, room)))
            room -= joining[-1][1]
            request.due -= joining[-1][1]
            if not request.due:
                requests.popleft()
        rows.regroup(joining)
        while not rows.have_ended(ENDED_SHARE if requests else IDLE_SHARE):
            rows.step()
        yield from rows.harvest()


def _by_transformers(
    model: Any, requests: deque[Request], *, max_rows: int, ends: list[int], max_new_tokens: int, **how: float
) -> Iterator[Request]:
    """`decode` by transformers' `generate`, a prompt at a time; a processor of its logits draws with our numbers."""
    from transformers import GenerationConfig

    device = next(model.parameters()).device
    plain = dict(do_sample=False, eos_token_id=ends, pad_token_id=0, max_new_tokens=max_new_tokens)
    while requests:
        request = requests.popleft()
        while request.due:
            n = min(request.due, max_rows)
            uniforms = request.uniforms(n, max_new_tokens).to(device)
            drawn: list[tuple[Tensor, Tensor]] = []

            def draw(_ids: Tensor, logits: Tensor, uniforms: Tensor = uniforms, drawn: list = drawn) -> Tensor:
                drawn.append(draw_tokens(logits, uniforms[:, len(drawn)], **how))
                return torch.full_like(logits, -torch.inf).scatter_(1, drawn[-1][0][:, None], 0.0)

            ids = torch.tensor([list(request.prompt_ids)] * n, device=device)
            # The model's own generation config may repeat less, forbid tokens, or begin with one.
            with mock.patch.object(model, "generation_config", GenerationConfig(**plain)):
                model.generate(ids, attention_mask=torch.ones_like(ids), logits_processor=[draw])
            tokens, logps = (torch.stack(x, 1).cpu() for x in zip(*drawn, strict=True))
            for row, row_logps in zip(tokens.numpy(), logps.double(), strict=True):
                ended = np.flatnonzero(np.isin(row, ends))
                count = ended[0] + 1 if len(ended) else len(row)
                request.samples.append(_sample(row[:count], bool(len(ended)), float(row_logps[:count].sum())))
            request.due -= n
        yield request


def _sample(token_ids: np.ndarray, finished: bool, logp: float) -> Sample:
    if not math.isfinite(logp):
        raise ValueError("the model gave log-probs that are not finite: check its weights and dtype")
    return Sample(token_ids.astype(np.int32), finished, logp)


def end_ids(model: Any, eos_token_id: int) -> list[int]:
    """The tokens at any of which a sample ends: the tokenizer's, and all that the model's generation config names."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # one, several or none
    return sorted({eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


class _Rows:
    """The rows of the batch: R of them, of P prompts. A row that has ended goes on, in vain, until the next regroup."""

    def __init__(self, model: nn.Module, *, ends: list[int], max_new_tokens: int, **how: float):
        self.model, self.max_new_tokens = model, max_new_tokens
        self.how = how  # temperature and top_p of draw_tokens
        self.device = next(model.parameters()).device
        self.ends = torch.tensor(ends, device=self.device)
        self.owner: list[tuple[Request, int]] = []  # of each row: its request and place among the samples
        self.prompt_cache: list[Tensor] = []  # of each layer keys and values, (P, G, L, Dh)
        self.own_cache: list[Tensor] = []  # of each layer keys and values, (R, G, max_new_tokens, Dh)
        none = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.length = none  # (P,) tokens of each prompt
        self.prompt = none  # (R,) each row's prompt, in order; of each row also:
        self.tokens = none.new_zeros(0, max_new_tokens + 1)  # one more than are drawn: rows that ended write there
        self.uniforms = self.tokens.float()
        self.logps, self.count, self.alive = none.double(), none, none.bool()  # count: tokens drawn
        self.most_tokens = 0  # that a row has drawn, or more

    # -- who is in the batch --

    def regroup(self, joining: list[tuple[Request, int]]) -> None:
        """Rows that ended leave, and the given numbers of rows of some requests join behind the others."""
        joining = sorted(joining, key=lambda pair: len(pair[0].prompt_ids))
        kept = self.alive.nonzero()[:, 0]
        live, prompt = self.prompt[kept].unique(return_inverse=True)
        logits = self._prefill(live, [request.prompt_ids for request, _ in joining])
        new = torch.tensor([at for at, (_, n) in enumerate(joining) for _ in range(n)], device=self.device).long()
        self.prompt = torch.cat([prompt, len(live) + new])
        R, old = len(self.prompt), len(kept)

        for name in ("tokens", "uniforms", "logps", "count", "alive"):
            x = getattr(self, name)
            setattr(self, name, torch.cat([x[kept], x.new_zeros(R - old, *x.shape[1:])]))
        self.most_tokens = max(int(self.count.max()), 1)
        own_cache, self.own_cache = self.own_cache, []
        for x in self.prompt_cache:
            self.own_cache.append(x.new_zeros(R, x.shape[1], self.max_new_tokens, x.shape[3]))
            if own_cache:  # taken from the list, so that one layer at a time is in memory twice
                drawn = own_cache.pop(0)[:, :, : self.most_tokens]
                self.own_cache[-1][:old, :, : self.most_tokens] = drawn[kept]

        for request, n in joining:
            self.owner += [(request, len(request.samples) + j) for j in range(n)]
            request.samples += [None] * n
        if joining:
            uniforms = [request.uniforms(n, self.max_new_tokens) for request, n in joining]
            self.uniforms[old:, :-1] = torch.cat(uniforms).to(self.device)
            self.alive[old:] = True
            self._draw(slice(old, None), torch.stack(logits)[new])

        # Where a row meets its prompt: cell (prompt, head, place among the prompt's rows) of a grid.
        sizes = self.prompt.bincount(minlength=len(self.length))
        self.every, self.width = torch.arange(R, device=self.device), int(sizes.max())
        self.place = self.every - (sizes.cumsum(0) - sizes)[self.prompt]
        self.first_position = self.length[self.prompt]
        columns = torch.arange(self.prompt_cache[0].shape[2], device=self.device)
        self.prompt_hidden = columns >= self.first_position[:, None]

    def _prefill(self, live: Tensor, prompts: list[Sequence[int]]) -> list[Tensor]:
        """Keep the caches of the prompts `live` and add those of `prompts`, which come in order of length; the first
        token's logits of each of these, (V,)."""
        self.length = torch.cat([self.length[live], self.length.new_tensor([len(ids) for ids in prompts])])
        longest = int(self.length.max())
        parts, logits = [[x[live, :, :longest] for x in self.prompt_cache]] if len(live) else [], []
        size = max(1, PADDED_TOKENS // longest)
        for begin in range(0, len(prompts), size):
            group = prompts[begin : begin + size]
            # Padded on the right: causal attention does not see pads.
            padded = pad_sequence([torch.tensor(ids) for ids in group], batch_first=True)
            ends = sorted({len(ids) for ids in group})
            keep = torch.tensor(ends, device=self.device) - 1
            out = self.model(padded.to(self.device), use_cache=True, logits_to_keep=keep)
            parts.append([x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)])
            logits += [out.logits[i, ends.index(len(ids))] for i, ids in enumerate(group)]
        self.prompt_cache = [
            torch.cat([pad(x, (0, 0, 0, longest - x.shape[2])) for x in layer]) for layer in zip(*parts, strict=True)
        ]
        return logits

    def have_ended(self, share: float) -> bool:
        """Whether more than a share of the rows have ended, or all; the one wait for the device of a step."""
        running = int(self.alive.sum())
        return running == 0 or len(self.owner) - running > share * len(self.owner)

    def harvest(self) -> list[Request]:
        """Hand the rows that ended to their requests; those that now have all their samples."""
        ended, ends, requests, owners = ~self.alive, self.ends.tolist(), {}, self.owner
        self.owner = [owner for owner, goes_on in zip(owners, self.alive.tolist(), strict=True) if goes_on]
        tokens, counts, logps = self.tokens[ended].cpu().numpy(), self.count[ended].tolist(), self.logps[ended].tolist()
        for at, n, ids, logp in zip(ended.nonzero()[:, 0].tolist(), counts, tokens, logps, strict=True):
            request, j = owners[at]
            request.samples[j] = _sample(ids[:n], int(ids[n - 1]) in ends, logp)
            requests[id(request)] = request
        return [request for request in requests.values() if not request.due and None not in request.samples]

    # -- a step --

    def step(self) -> None:
        """Every row draws a token."""
        self.columns = min(max(self.most_tokens, COLUMNS), self.max_new_tokens)
        own_hidden = torch.arange(self.columns, device=self.device) >= self.count[:, None]
        hidden = torch.cat([self.prompt_hidden, own_hidden], 1)[:, None, None]
        self.bias = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)
        self.column = self.count - 1  # of each row's last token, which the model now reads
        logits = self.model(
            self.tokens.gather(1, self.column[:, None]),
            position_ids=(self.first_position + self.column)[:, None],
            past_key_values=self,
            use_cache=True,
            attention_mask=torch.empty(1, 1, 1, 0, device=self.device),  # transformers makes none of its own then
            packed_layout=self.attend,
        ).logits[:, -1]
        self._draw(slice(None), logits)
        self.most_tokens += 1

    def _draw(self, rows: slice, logits: Tensor) -> None:
        """The given rows draw a token each from logits (rows, V)."""
        count, alive = self.count[rows], self.alive[rows]
        uniforms = self.uniforms[rows].gather(1, count[:, None])[:, 0]
        # Some rows at a time on a CPU: what is computed then stays in its cache.
        size = max(1, 2**20 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        parts = zip(logits.split(size), uniforms.split(size), strict=True)
        drawn = [draw_tokens(x, u, **self.how) for x, u in parts]
        last, logps = (torch.cat(x) for x in zip(*drawn, strict=True))
        self.tokens[rows].scatter_(1, count[:, None], last[:, None])
        self.logps[rows] += logps.where(alive, 0)
        self.count[rows] += alive  # which ended rows do no longer
        self.alive[rows] = alive & ~torch.isin(last, self.ends) & (self.count[rows] < self.max_new_tokens)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """What transformers calls a cache for: stores a step's keys and values, (R, G, 1, Dh). The layer's attention
        follows at once and is ours, so what it is given does not matter."""
        self.layer = slice(2 * layer, 2 * layer + 2)
        for own, x in zip(self.own_cache[self.layer], (keys, values), strict=True):
            own[self.every, :, self.column] = x[:, :, 0].to(own.dtype)
        return keys, values

    def get_seq_length(self, *_: object) -> int:
        """Models ask for it that count positions by themselves."""
        raise ValueError("it wants equally long rows")

    def attend(self, query: Tensor, _keys: Tensor, _values: Tensor, scaling: float) -> Tensor:
        """Attention of one token a row, (R, H, 1, Dh), to its prompt and to itself."""
        R, H, _, Dh = query.shape
        prompt_keys, prompt_values = (x.to(query.dtype) for x in self.prompt_cache[self.layer])
        own_keys, own_values = (x[:, :, : self.columns].to(query.dtype) for x in self.own_cache[self.layer])
        G, L = own_keys.shape[1], prompt_keys.shape[2]
        query = (query * scaling).reshape(R, G, H // G, Dh)
        scores = [self._with_prompts(query, prompt_keys.mT), query @ own_keys.mT]
        weights = torch.cat(scores, -1).float().add_(self.bias).softmax(-1).to(query.dtype)
        out = self._with_prompts(weights[..., :L], prompt_values) + weights[..., L:] @ own_values
        return out.reshape(R, H, 1, -1)

    def _with_prompts(self, x: Tensor, y: Tensor) -> Tensor:
        """(R, G, g, A) of the rows times (P, G, A, B) of their prompts, all rows of a prompt in one product."""
        P, G, A, B = y.shape
        g, S = x.shape[2], self.width
        grid = x.new_empty(P, G, S, g * A)  # cells without a row hold anything
        grid[self.prompt, :, self.place] = x.reshape(len(x), G, g * A)
        out = grid.view(P, G, S * g, A) @ y
        return out.view(P, G, S, g * B)[self.prompt, :, self.place].view(len(x), G, g, B)
