"""Decoding many rows of several prompts at once: a prompt's keys and values are kept once, whatever its rows.

Prompts of any lengths share the batch. Rows that ended leave it, and rows of further prompts take their places. To
transformers the batch is a cache whose `update` stores a row's own keys and values; `packed_attention` (hps.attention)
hands the query to `_Rows.attend`, which looks at the row's prompt and at the row itself.
"""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hps import attention

PADDED_TOKENS = 4096  # of one prefill, at most
WORTH_A_PREFILL = 32  # rows; fewer of a prompt's rows do not start without the rest
COLUMNS = 32  # of own keys, at least: PyTorch has no fast product for fewer on a CPU
ENDED = 1 / 8  # share of the rows that must have ended before others take their places ...
IDLE = 1 / 4  # ... or, when no others are waiting, before the rest moves together
ELSEWHERE = "only data_prep.py generate can sample from this model, with --engine vllm"


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One sampled response: the end token, if it was emitted, is part of `token_ids` and of `logp`."""

    token_ids: np.ndarray  # (T,) int32
    finished: bool  # the end token came within max_new_tokens
    logp: float  # sum of the tokens' log-probs at temperature 1, whatever the sampling temperature


@dataclasses.dataclass(slots=True)
class Request:
    """A prompt that asks for `due` further samples; they go to `samples` in the order of its random stream."""

    prompt_ids: Sequence[int]
    seed: int  # of its random stream, of which every sample takes max_new_tokens numbers
    due: int = 0
    samples: list[Sample | None] = dataclasses.field(default_factory=list)
    running: int = 0
    generator: torch.Generator | None = None  # 5 kB, so not before the first draw


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
def decode(
    model: nn.Module,
    requests: deque[Request],
    *,
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float,
    max_rows: int,
) -> Iterator[Request]:
    """Yields each request when all its samples are there, in the order in which they end.

    Args:
        model: a causal language model of `transformers` in eval mode, on any device; hps.attention takes the place
            of its attention.
        requests: is emptied; may be added to between two results, also with a request that was yielded.
        max_new_tokens: longest response in tokens, end token included.
        max_rows: rows of the batch at most.

    Raises:
        ValueError: a model whose attention cannot be replaced, or log-probs that are not finite.
    """
    attention.install(model)
    if model.config._attn_implementation != attention.NAME:
        raise ValueError(f"{type(model).__name__} takes no attention but its own: {ELSEWHERE}")
    rows = _Rows(model, eos_token_id=eos_token_id, max_new_tokens=max_new_tokens, temperature=temperature)
    checked = False
    while requests or rows.num_running:
        room, joining = max_rows - rows.num_running, []
        while requests and room >= min(requests[0].due, WORTH_A_PREFILL, max_rows):
            request = requests[0]
            joining.append((request, min(request.due, room)))
            room -= joining[-1][1]
            request.due -= joining[-1][1]
            if not request.due:
                requests.popleft()
        rows.regroup(joining)
        while not rows.have_ended(ENDED if requests else IDLE):
            rows.step()
        for request in rows.harvest():
            if not checked:
                _check(model, request)
                checked = True
            yield request


def _check(model: nn.Module, request: Request) -> None:
    """Compare the log-prob of a request's first sample with a plain forward; ValueError where they differ."""
    sample, P = request.samples[0], len(request.prompt_ids)
    assert sample is not None
    ids = torch.tensor([[*request.prompt_ids, *sample.token_ids.tolist()]], device=next(model.parameters()).device)
    logits = model(ids, use_cache=False).logits[0, P - 1 : -1]
    logps = logits.float().log_softmax(-1).gather(1, ids[0, P:, None])
    apart = abs(float(logps.double().sum()) - sample.logp) / len(sample.token_ids)
    if not apart <= (1e-3 if logits.dtype == torch.float32 else 0.1):
        raise ValueError(
            f"a response's log-probs differ from a plain forward's by {apart:.2g} nats a token: the attention of "
            f"{type(model).__name__} is not decoded correctly here: {ELSEWHERE}"
        )


class _Rows:
    """The rows of the batch: R of them, of P prompts. A row that has ended goes on until it is replaced or dropped."""

    def __init__(self, model: nn.Module, *, eos_token_id: int, max_new_tokens: int, temperature: float):
        self.model, self.eos_token_id, self.temperature = model, eos_token_id, temperature
        self.device = next(model.parameters()).device
        self.max_new_tokens = max_new_tokens
        self.owner: list[tuple[Request, int] | None] = []  # of each row: its request and place among the samples
        self.prompt = np.zeros(0, dtype=np.int64)  # (R,) index of each row's prompt
        self.length = np.zeros(0, dtype=np.int64)  # (P,) tokens of each prompt
        self.prompt_cache: list[Tensor] = []  # of each layer keys and values, (P, G, L, Dh)
        self.own_cache: list[Tensor] = []  # of each layer keys and values, (R, G, max_new_tokens, Dh)
        # One column more than there are tokens: rows that ended write there.
        self.tokens = torch.zeros(0, max_new_tokens + 1, dtype=torch.int64, device=self.device)
        self.uniforms = torch.zeros(0, max_new_tokens + 1, device=self.device)
        self.logps = torch.zeros(0, dtype=torch.float64, device=self.device)
        self.count = torch.zeros(0, dtype=torch.int64, device=self.device)  # tokens drawn
        self.last = torch.zeros(0, dtype=torch.int64, device=self.device)  # next input
        self.alive = torch.zeros(0, dtype=torch.bool, device=self.device)
        self.no_mask = torch.empty(1, 1, 1, 0, device=self.device)  # transformers makes none of its own then
        self.num_running = 0
        self.clock = 0  # steps taken

    # -- who is in the batch --

    def regroup(self, joining: list[tuple[Request, int]]) -> None:
        """Rows that ended give their places to the given numbers of rows of some requests, or leave."""
        alive = self.alive.cpu().numpy()
        kept, free = np.flatnonzero(alive), np.flatnonzero(~alive)
        num_joining = sum(n for _, n in joining)
        if num_joining > len(free) or len(free) - num_joining > IDLE * len(alive):
            self._resize(kept, len(kept) + num_joining)
            kept, free = np.arange(len(kept)), np.arange(len(kept), len(kept) + num_joining)
        live = np.unique(self.prompt[kept])
        self.prompt[kept] = np.searchsorted(live, self.prompt[kept])
        self.prompt[free] = 0  # of rows that stay idle any prompt will do
        joining = sorted(joining, key=lambda pair: len(pair[0].prompt_ids))
        logits = self._prefill(live, [request.prompt_ids for request, _ in joining])
        self.num_running = len(kept) + num_joining

        uniforms, first, begin = [], [], 0
        for at, (request, n) in enumerate(joining):
            request.generator = request.generator or torch.Generator().manual_seed(request.seed)
            # Drawn for all steps at once: what a row gets cannot depend on when its siblings end.
            uniforms.append(torch.rand(n, self.max_new_tokens, generator=request.generator))
            first.append(logits[at].expand(n, -1))
            for row in free[begin : begin + n]:
                self.owner[row] = (request, len(request.samples))
                request.samples.append(None)
                self.prompt[row] = len(live) + at
            request.running += n
            begin += n
        if joining:
            index = torch.from_numpy(free[:begin]).to(self.device)
            self.uniforms[index, :-1] = torch.cat(uniforms).to(self.device)
            self.logps[index], self.count[index], self.alive[index] = 0.0, 0, True
            self._draw(index, torch.cat(first))

        # Where a row meets its prompt: cell (prompt, head, place among the prompt's rows) of a grid.
        sizes = np.bincount(self.prompt, minlength=len(self.length))
        order, self.width = np.argsort(self.prompt, kind="stable"), int(sizes.max())
        place = np.empty_like(order)
        place[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        heads = {x.shape[1] for x in self.own_cache}
        cells = {G: (self.prompt * G * self.width + place)[:, None] + np.arange(G) * self.width for G in heads}
        self.cells = {G: torch.from_numpy(cell.flatten()).to(self.device) for G, cell in cells.items()}
        length = self.length[self.prompt]
        self.first_position = torch.from_numpy(length).to(self.device)
        hidden = np.arange(self.prompt_cache[0].shape[2]) >= length[:, None]
        self.prompt_hidden = torch.from_numpy(hidden).to(self.device)

    def _resize(self, kept: np.ndarray, num_rows: int) -> None:
        """Keep some rows, as the first ones, and make room for others."""
        index = torch.from_numpy(kept).to(self.device)

        def moved(x: Tensor) -> Tensor:
            new = x.new_zeros(num_rows, *x.shape[1:])
            if x.dim() == 4:  # keys and values: columns that no row has come to are not touched
                new[: len(kept), :, : self.clock] = x[index, :, : self.clock]
            else:
                new[: len(kept)] = x[index]
            return new

        for name in ("tokens", "uniforms", "logps", "count", "last", "alive"):
            setattr(self, name, moved(getattr(self, name)))
        self.own_cache = [moved(x) for x in self.own_cache]
        self.owner = [self.owner[row] for row in kept] + [None] * (num_rows - len(kept))
        self.prompt = np.concatenate([self.prompt[kept], np.zeros(num_rows - len(kept), dtype=np.int64)])

    def _prefill(self, live: np.ndarray, prompts: list[Sequence[int]]) -> list[Tensor]:
        """Keep the caches of the prompts `live` and add those of `prompts`, which come in order of length.

        Returns the first token's logits of each of `prompts`, (V,).
        """
        parts: list[list[Tensor]] = []
        logits: list[Tensor] = []
        if len(live):
            index, longest = torch.from_numpy(live).to(self.device), int(self.length[live].max())
            parts.append([x[index, :, :longest] for x in self.prompt_cache])
        begin = 0
        for end in range(1, len(prompts) + 1):
            # Prompts of like lengths run together, padded on the right: causal attention does not see pads.
            longer = len(prompts[end]) if end < len(prompts) else 0
            if longer and longer <= 1.25 * len(prompts[begin]) + 8 and (end + 1 - begin) * longer <= PADDED_TOKENS:
                continue
            lengths = [len(ids) for ids in prompts[begin:end]]
            padded = [[*ids, *[self.eos_token_id] * (lengths[-1] - len(ids))] for ids in prompts[begin:end]]
            ends = sorted(set(lengths))
            keep = torch.tensor(ends, device=self.device) - 1
            out = self.model(torch.tensor(padded, device=self.device), use_cache=True, logits_to_keep=keep)
            parts.append([x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)])
            logits += [out.logits[i, ends.index(length)] for i, length in enumerate(lengths)]
            begin = end
        self.length = np.array([*self.length[live], *map(len, prompts)])
        longest = max(part[0].shape[2] for part in parts)
        self.prompt_cache = [
            torch.cat([pad(x, (0, 0, 0, longest - x.shape[2])) for x in layer]) for layer in zip(*parts, strict=True)
        ]
        if not self.own_cache:
            self.own_cache = [
                x.new_zeros(len(self.prompt), x.shape[1], self.max_new_tokens, x.shape[3]) for x in self.prompt_cache
            ]
        return logits

    def have_ended(self, share: float) -> bool:
        """Whether more than a share of the rows have ended, or all; the one wait for the device of a step."""
        running = int(self.alive.sum())
        return running == 0 or self.num_running - running > share * len(self.owner)

    def harvest(self) -> Iterator[Request]:
        """Hand the rows that ended to their requests; yields those that now have all their samples."""
        alive = self.alive.tolist()
        ended = [(row, owner) for row, owner in enumerate(self.owner) if owner and not alive[row]]
        index = torch.tensor([row for row, _ in ended], device=self.device)
        tokens = self.tokens[index].to("cpu", torch.int32).numpy()
        counts, logps = self.count[index].tolist(), self.logps[index].tolist()
        if not np.isfinite(logps).all():
            raise ValueError("the model gave log-probs that are not finite: check its weights and dtype")
        self.num_running -= len(ended)
        for (row, (request, j)), ids, n, logp in zip(ended, tokens, counts, logps, strict=True):
            self.owner[row] = None
            request.samples[j] = Sample(ids[:n].copy(), bool(ids[n - 1] == self.eos_token_id), logp)
            request.running -= 1
            if not request.running and not request.due:
                yield request

    # -- a step --

    def step(self) -> None:
        """Every row draws a token."""
        self.column = self.clock % self.max_new_tokens
        self.columns = min(max(self.clock + 1, COLUMNS), self.max_new_tokens)
        age = (self.column - torch.arange(self.columns, device=self.device)) % self.max_new_tokens
        own_hidden = age >= self.count[:, None]
        hidden = torch.cat([self.prompt_hidden, own_hidden], 1)[:, None, None]
        self.bias = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)
        logits = self.model(
            self.last[:, None],
            position_ids=(self.first_position + self.count)[:, None] - 1,
            past_key_values=self,
            use_cache=True,
            attention_mask=self.no_mask,
            packed_layout=self.attend,
        ).logits[:, -1]
        self._draw(torch.arange(len(self.owner), device=self.device), logits)
        self.clock += 1

    def _draw(self, rows: Tensor, logits: Tensor) -> None:
        """The given rows draw a token each from logits (rows, V)."""
        count, alive = self.count[rows], self.alive[rows]
        uniforms = self.uniforms[rows, count]
        # Some rows at a time on a CPU: what is computed then stays in its cache.
        size = max(1, 2**20 // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        parts = zip(logits.split(size), uniforms.split(size), strict=True)
        drawn = [draw_tokens(x, u, temperature=self.temperature) for x, u in parts]
        last, logps = (torch.cat(x) for x in zip(*drawn, strict=True))
        self.last[rows] = self.tokens[rows, count] = last
        self.logps[rows] += logps.where(alive, 0)
        count = count + alive
        self.count[rows] = count
        self.alive[rows] = alive & (last != self.eos_token_id) & (count < self.max_new_tokens)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """What transformers calls a cache for: stores a step's keys and values, (R, G, 1, Dh).

        The layer's attention follows at once and is ours, so what it is given does not matter.
        """
        self.layer = slice(2 * layer, 2 * layer + 2)
        for own, x in zip(self.own_cache[self.layer], (keys, values), strict=True):
            own[:, :, self.column] = x[:, :, 0]
        return keys, values

    def get_seq_length(self, *_: object) -> int:
        """Models ask for it that count positions by themselves."""
        raise ValueError(f"{type(self.model).__name__} wants equally long rows: {ELSEWHERE}")

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
        # Cells without a row hold anything.
        cell = self.cells[G]
        grid = x.new_empty(P * G * S, g * A).index_copy_(0, cell, x.reshape(-1, g * A))
        out = grid.view(P * G, S * g, A) @ y.flatten(0, 1)
        return out.view(-1, g * B).index_select(0, cell).view(len(x), G, g, B)
