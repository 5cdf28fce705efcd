"""Candidate responses: n samples per prompt, by our own decoding (hps.prepare.decode) or by vLLM.

Every prompt owns a stream of random numbers that depends on (seed, prompt id) only, and its j-th sample uses the j-th
row of that stream, whatever the other prompts, their order, the batch size or the sharding are. The one exception is
rounding, which differs between batch shapes: a draw that falls within that difference of a boundary (a few in a million
in fp32, more in bf16) takes the next token.

The vLLM engine keeps to the same rule with a seed per prompt, and its samples are others than ours. It was written
against vLLM's signatures (tests compare them where it is installed) and has run against a stand-in of these only, never
on a GPU.
"""

import hashlib
import math
from collections import Counter, deque
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hps import adapters, limits
from hps.data.rows import Prompt
from hps.data.tokens import Encoder
from hps.io import files, hub
from hps.prepare.decode import Request, Sample, decode, end_ids

OVERSAMPLE = 1.1  # draws for each sample that is asked for, at first: some will be lost
DRAW_LIMIT = 4.0  # draws for each sample that is asked for, at most
VLLM_CALL = 64  # times max_rows sequences go to vLLM in one call: it batches by itself, and idles as a call ends
VLLM_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that its max_lora_rank may be


def prompt_seed(seed: int, prompt_id: str) -> int:
    """The seed, 0 to 2**63 - 1, of the random stream that belongs to one prompt of one run."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keep(samples: Sequence[Sample], n: int, *, as_drawn: bool) -> tuple[list[Sample], Counter[str]]:
    """The first n samples that are finished and distinct, or that came if as_drawn; and what became of all."""
    kept, seen, counts = list[Sample](), set[bytes](), Counter(samples=len(samples))
    for one in samples:
        key = one.token_ids.tobytes()
        if len(kept) == n:
            counts["surplus"] += 1
        elif not one.finished and not as_drawn:
            counts["unfinished"] += 1
        elif key in seen and not as_drawn:
            counts["duplicates"] += 1
        else:
            kept.append(one)
            seen.add(key)
    return kept, counts


def generate(
    model: Any,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    n: int,
    counts: Counter[str],
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float = 0.9,
    top_p: float = 1.0,
    seed: int = 0,
    as_drawn: bool = False,
    max_rows: int = 512,
    progress: bool = True,
) -> Iterator[tuple[str, list[Sample]]]:
    """Yields (prompt id, its first n samples that are finished and distinct) in input order.

    A prompt gets n * OVERSAMPLE draws at first and further ones until it has n such samples or n * DRAW_LIMIT draws.

    Args:
        model: a causal language model of `transformers` in eval mode, or what `load_vllm` returns.
        prompts: (id, token ids), gone through twice; ids must be distinct, for they select the random stream.
        counts: is added to, prompt by prompt: "samples" drawn = kept + "unfinished" + "duplicates" + "surplus"
            (drawn beyond the n-th), "prompts_short", prompts that ended with fewer than n, and "prompts_no_room", those
            without any sample since the model has no positions for prompt and max_new_tokens.
        max_new_tokens: longest response in tokens, end token included.
        temperature: 0 is greedy, else at least 0.01. top_p: as in `draw_tokens`.
        as_drawn: the first n samples whatever they are: an evaluation must see a policy that rambles or repeats itself.
        max_rows: sequences of a batch at most; vLLM, which sizes its own batches, is handed VLLM_CALL times as many.

    Raises:
        ValueError: an empty prompt or none but too long ones, settings out of range; and as `decode`.
    """
    if n < 1 or max_rows < 1 or max_new_tokens < 1:
        raise ValueError("n, max_rows and max_new_tokens must be at least 1")
    if temperature != 0 and not 0.01 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 (greedy) or at least 0.01, not {temperature}")
    if not 0 < top_p <= 1 or (temperature == 0 and top_p < 1):
        raise ValueError(f"top_p must lie above 0 and at most at 1, and temperature 0 does not use it; got {top_p}")
    if temperature == 0 and n > 1:
        raise ValueError("temperature 0 would give n equal responses: set n=1 or a temperature")
    # A further greedy response would be the same one.
    oversample, limit = (1.0, 1.0) if as_drawn or temperature == 0 else (OVERSAMPLE, DRAW_LIMIT)
    ours = isinstance(model, torch.nn.Module)
    assert not (ours and model.training), "the model is in training mode (dropout): call model.eval() before sampling"
    room = limits.positions(model.config) - max_new_tokens if ours else math.inf  # vLLM checks its own
    if not prompts:
        return
    lengths = np.fromiter((len(ids) for _, ids in prompts), np.int64)
    if (empty := lengths == 0).any() or not (fits := lengths <= room).any():
        prompt_id, ids = prompts[int(empty.argmax())]
        raise ValueError(
            f"prompt {prompt_id!r} has {len(ids)} tokens; the model's {room + max_new_tokens} positions and "
            f"max_new_tokens={max_new_tokens} allow 1 to {room}: lower max_new_tokens, or shorten or drop it "
            f"(data_prep.py generate drops it with --max_prompt_length {room})"
        )
    found: dict[str, Any] = {}  # what `keep` gives, of prompts that were not yielded yet; None while one is on its way
    waiting: deque[Any] = deque()
    upcoming = iter(prompts)

    def due(kept: int, drawn: int) -> int:
        """How many samples to draw next: what is missing, by the share that was kept so far."""
        more = math.ceil((n - kept) * oversample * (drawn + 1) / (kept + 1))
        more = more and max(more, drawn // 8)  # growing steps, or the last ones would trickle in
        return min(more, math.ceil(n * limit) - drawn)

    def read_ahead() -> None:
        """Prompts wait in no larger number than the engine may begin before it ends one."""
        while len(waiting) < 2 * max_rows and (one := next(upcoming, None)):
            prompt_id, ids = one
            assert prompt_id not in found, "two prompts share an id and would get the same samples"
            found[prompt_id] = ([], Counter(prompts_no_room=1)) if len(ids) > room else None
            if len(ids) <= room:
                waiting.append(Request(ids, prompt_seed(seed, prompt_id), due(0, 0), name=prompt_id))

    settings: dict[str, Any] = dict(eos_token_id=eos_token_id, max_new_tokens=max_new_tokens, temperature=temperature)
    settings["top_p"] = top_p
    settings |= dict(longest_prompt=int(lengths[fits].max())) if ours else {}
    max_rows *= 1 if ours else VLLM_CALL
    read_ahead()
    results: Iterator[Any] = (decode if ours else ask_vllm)(model, waiting, max_rows=max_rows, **settings)
    with tqdm(total=len(prompts), unit="prompt", desc="generate", disable=not progress) as bar:
        for request in results:
            kept, drawn = keep(request.samples, n, as_drawn=as_drawn)
            if more := due(len(kept), drawn["samples"]):
                request.due = more
                waiting.appendleft(request)
                continue
            bar.update()
            found[request.name] = kept, drawn
            read_ahead()
            while found and found[first := next(iter(found))]:
                kept, drawn = found.pop(first)  # they need not stay in memory until the last prompt is done
                counts.update(drawn, prompts_short=int(len(kept) < n))
                yield first, kept


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    seed: int,
    strings: Container[str] = (),
    **how: Any,
) -> Iterator[tuple[str, list[str], list[Sample]]]:
    """Yields (prompt id, n texts, their samples): what a model says, equal and unfinished answers included. Arguments
    as `generate`.

    The streams are none of `generate` with a seed of 0 or more: with those, the model that drew the candidates would
    draw them once more, and BLEU against the best of them find them equal. strings: ids of the prompts that are no
    messages.
    """
    encoder = Encoder(tokenizer)
    for id, some in generate(model, prompts, eos_token_id=encoder.eos, seed=~seed, as_drawn=True, **how):
        yield id, [encoder.text(one.said, chat=False if id in strings else None) for one in some], some


def texts_of(encoder: Encoder, prompt: Prompt, samples: Sequence[Sample], counts: Counter[str]) -> list[str]:
    """Samples as texts. counts: "encoded_otherwise", texts of which training will make other tokens than these, their
    ends aside."""
    chat, texts = not isinstance(prompt, str), []
    for one in samples:
        texts.append(encoder.text(one.said, chat=chat))
        try:
            again = next(encoder.responses(texts[-1:], chat=chat))[:-1]
        except ValueError:  # a control token that the tokenizer reads in the text
            again = None
        counts["encoded_otherwise"] += again != one.said.tolist()
    return texts


def encoded_otherwise(data: str | Path) -> int:
    """Of a file that `data_prep.py generate` wrote, or what was made from one: the samples of which training will make
    other tokens than were drawn, as the manifests tell; 0 where there is none."""
    manifest = Path(f"{data}.manifest.json")
    if not manifest.exists():
        return 0
    about: Any = files.read_json(manifest)
    if about.get("command") == "annotate":
        return encoded_otherwise(about["input"]["path"])
    return about.get("counts", {}).get("encoded_otherwise", 0)


def load_vllm(path: str, *, dtype: str, max_length: int, tensor_parallel: int = 1) -> Any:
    """A vLLM engine of a folder or hub name, or of an adapter's base with the adapter for each request, whose log-probs
    are those of the model itself, before temperature and top_p.

    max_length: tokens of prompt and response together. tensor_parallel: GPUs of this machine over which its weights
    and its cache are spread. Raises ValueError without vLLM, and for an adapter that it does not take.
    """
    try:
        from vllm import LLM  # pyright: ignore[reportMissingImports]
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"--engine vllm cannot import vllm ({error}): pip install vllm, or --engine hf") from error
    adapter, lora = adapters.adapter_in(path), None
    name, revision = hub.resolve(adapter[0] if adapter else path)
    how: dict[str, Any] = dict(revision=revision, tokenizer_revision=revision, max_model_len=max_length)
    if adapter:
        about: Any = files.read_json(Path(path) / "adapter_config.json")
        rank = max(about["r"], *(about.get("rank_pattern") or {}).values(), 0)
        if rank > VLLM_LORA_RANKS[-1] or about.get("use_dora"):
            raise ValueError(f"{path}: vLLM takes LoRA of a rank up to {VLLM_LORA_RANKS[-1]}, no DoRA: use --engine hf")
        how |= dict(enable_lora=True, max_lora_rank=next(r for r in VLLM_LORA_RANKS if r >= rank))
        lora = LoRARequest(lora_name="policy", lora_int_id=1, lora_path=str(Path(path).resolve()))
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    how |= dict(dtype=dtype, tensor_parallel_size=tensor_parallel, logprobs_mode="raw_logprobs")
    llm = LLM(model=name, **how)
    llm.lora_request = lora
    with suppress(OSError):  # where there is none the tokenizer's end token is all
        llm.generation_config = GenerationConfig.from_pretrained(name, revision=revision or "main")
    return llm


def ask_vllm(
    llm: Any,
    requests: deque[Request],
    *,
    eos_token_id: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    max_rows: int,
) -> Iterator[Request]:
    """`hps.prepare.decode.decode` by a vLLM engine, which batches on its own; up to `max_rows` sequences per call."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    # logprobs=0: of the drawn token alone. ignore_eos: or it would end at a token of its own choice.
    how: dict[str, Any] = dict(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, logprobs=0)
    how |= dict(detokenize=False, ignore_eos=True, stop_token_ids=end_ids(llm, eos_token_id))
    while requests:
        batch = [requests.popleft()]
        while requests and sum(request.due for request in batch) + requests[0].due <= max_rows:
            batch.append(requests.popleft())
        seeds = [request.seed // 2 + len(request.samples) for request in batch]  # vLLM's j-th sample takes seed + j
        settings = [SamplingParams(n=request.due, seed=seed, **how) for request, seed in zip(batch, seeds, strict=True)]
        asked = [{"prompt_token_ids": list(request.prompt_ids)} for request in batch]
        outputs = llm.generate(asked, settings, use_tqdm=False, lora_request=llm.lora_request)
        for request, output in zip(batch, outputs, strict=True):
            for one in sorted(output.outputs, key=lambda one: one.index):
                ids = np.array(one.token_ids, dtype=np.int32)
                logp = sum(step[token].logprob for token, step in zip(one.token_ids, one.logprobs, strict=True))
                request.samples.append(Sample(ids, one.finish_reason == "stop", logp))
            request.due = 0
            yield request
