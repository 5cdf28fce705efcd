"""Which samples are kept, in what order, by which engine; `data_prep.py generate` on one rank and on two."""

import importlib
import inspect
import json
import math
import sys
from collections import Counter, deque
from types import ModuleType, SimpleNamespace
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import SMALL, byte_tokenizer, flat, plain_logp, torchrun
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

import data_prep
from hps.data import listwise
from hps.data.rows import Row
from hps.data.tokens import Encoder
from hps.io import hub
from hps.prepare import decode, journal, manifests
from hps.prepare import generate as generation
from hps.prepare.generate import answer, generate, load_vllm, prompt_seed

EOS = 2
PROMPTS = [("a", [1, 5]), ("b", [1, 9, 3, 3, 4]), ("c", [1, 7]), ("d", [4, 6, 8]), ("e", [1, 5, 6, 7]), ("f", [3])]


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()


def scripted(monkeypatch, *responses):
    """In place of the engine: each prompt gets these responses in turn, the last one that asks is served first."""

    def engine(model, requests, **_):
        while requests:
            request = requests.pop()
            for at in range(len(request.samples), len(request.samples) + request.due):
                ids = np.array(responses[at % len(responses)], np.int32)
                request.samples.append(decode.Sample(ids, bool(ids[-1] == EOS), -1.0))
            request.due = 0
            yield request

    monkeypatch.setattr(generation, "decode", engine)


def draw(model, ids, name, *, n, max_new_tokens=12):
    """The first n samples of a prompt's stream, kept or not."""
    request = decode.Request(ids, prompt_seed(0, name), n)
    settings = dict(eos_token_id=EOS, max_new_tokens=max_new_tokens, temperature=0.9, max_rows=512)
    list(decode.decode(model, deque([request]), **settings))
    return request.samples


def run(model, prompts, *, draw_limit=30.0, **more):
    """All samples by prompt and the counts; the small model seldom ends within 12 tokens, so it may try often."""
    counts = Counter()
    settings = dict(n=4, eos_token_id=EOS, max_new_tokens=12, progress=False, counts=counts) | more
    with mock.patch.object(generation, "DRAW_LIMIT", draw_limit):
        return dict(generate(model, prompts, **settings)), counts


# --- what is kept ------------------------------------------------------------------------------------------


def test_answers_are_not_the_candidates_once_more(llama):
    """Of the same model with the same seed: BLEU against the best candidate would find it among them."""
    tokenizer = byte_tokenizer()
    settings = dict(n=4, counts=Counter(), max_new_tokens=12, temperature=0.9, seed=0, progress=False)
    with mock.patch.object(Encoder, "text", lambda _, ids, **__: str(ids)):
        answers = {id: texts for id, texts, _ in answer(llama, tokenizer, PROMPTS, **settings)}
    drawn, _ = run(llama, PROMPTS, seed=0, as_drawn=True)
    candidates = {name: [str(one.token_ids) for one in some] for name, some in drawn.items()}
    same = [len({*answers[name]} & {*candidates[name]}) for name, _ in PROMPTS]
    assert len(answers) == len(PROMPTS) > 3 and sum(same) < len(PROMPTS)  # some are short and met by chance


def test_samples_do_not_depend_on_grouping_order_or_sharding(llama):
    whole, counts = run(llama, PROMPTS, n=6)
    assert counts["prompts_short"] == 0 and [len(group) for group in whole.values()] == [6] * len(PROMPTS)
    for max_rows in (1, 10):
        other, other_counts = run(llama, PROMPTS, n=6, max_rows=max_rows)
        assert flat(other.values()) == flat(whole.values()) and other_counts == counts
    backwards, _ = run(llama, PROMPTS[::-1], n=6)
    assert list(backwards) == [name for name, _ in PROMPTS[::-1]]
    shards = run(llama, PROMPTS[::2], n=6)[0] | run(llama, PROMPTS[1::2], n=6)[0]
    for name in whole:
        assert flat([whole[name]]) == flat([backwards[name]]) == flat([shards[name]])
    assert flat(run(llama, PROMPTS, n=6, seed=1)[0].values()) != flat(whole.values())
    other = run(llama, [("another id", PROMPTS[0][1])], n=6)[0]
    assert flat(other.values()) != flat([whole["a"]])  # equal prompts with unequal ids have their own draws


def test_few_prompts_are_read_ahead(llama, monkeypatch):
    """Of forty, when the first is done, no more than wait or run; all have the samples that they have alone."""
    prompts = [(f"p{i}", PROMPTS[i % 6][1]) for i in range(40)]
    read = []

    class Asked(list):
        def __iter__(self):
            for at, one in enumerate(super().__iter__()):
                read.append(at)
                yield one

    settings = dict(n=2, eos_token_id=EOS, max_new_tokens=12, progress=False, as_drawn=True, max_rows=4)
    found = generate(llama, Asked(prompts), counts=Counter(), **settings)
    first = next(found)
    assert read[:40] == list(range(40)) and len(read) <= 40 + 16  # all once for their lengths
    for (_, samples), (name, ids) in zip([first, *found], prompts, strict=True):
        assert flat([samples]) == flat([draw(llama, ids, name, n=2)])


def test_kept_samples_are_the_first_n_of_the_stream(llama):
    samples, counts = run(llama, PROMPTS[:3], n=6)
    for name, ids in PROMPTS[:3]:
        expected, seen = [], set()
        for one in draw(llama, ids, name, n=180):
            if one.finished and tuple(one.token_ids) not in seen:
                expected.append(one.token_ids.tolist())
                seen.add(tuple(one.token_ids))
        assert [one.token_ids.tolist() for one in samples[name]] == expected[:6]
    kept = sum(map(len, samples.values()))
    assert counts["samples"] == kept + counts["unfinished"] + counts["duplicates"] + counts["surplus"]


def test_a_model_that_can_say_three_things_is_given_up(llama, monkeypatch):
    """30 draws of each of two prompts: every fourth does not end, the rest are the three over again."""
    three = [[0, EOS], [1, EOS], [EOS]]
    scripted(monkeypatch, *three, [3] * 12)
    samples, counts = run(llama, PROMPTS[:2], n=10, draw_limit=3.0)
    assert flat(samples.values()) == [[(ids, True) for ids in three]] * 2
    assert counts == Counter(samples=60, unfinished=14, duplicates=40, prompts_short=2, surplus=0)


def test_as_drawn_keeps_unfinished_and_equal_samples(llama, monkeypatch):
    scripted(monkeypatch, [0, EOS], [0, EOS], [3] * 12)
    samples, counts = run(llama, PROMPTS[:1], n=6, as_drawn=True)
    assert flat(samples.values()) == [([([0, EOS], True)] * 2 + [([3] * 12, False)]) * 2]
    assert +counts == {"samples": 6}


def test_a_prompt_without_room_gets_no_samples(llama):
    """53 tokens and 12 new ones do not fit into 64 positions: the others' samples are what they are without it."""
    long = ("long", [3] * 53)
    alone, _ = run(llama, PROMPTS)
    for prompts in ([long, *PROMPTS], [*PROMPTS[:2], long, *PROMPTS[2:]], [*PROMPTS, long]):
        found, counts = run(llama, prompts)
        assert list(found) == [name for name, _ in prompts] and found["long"] == []
        assert flat(found[name] for name in alone) == flat(alone.values())
        assert counts["prompts_no_room"] == counts["prompts_short"] == 1


def test_mistakes_are_named(llama, monkeypatch):
    run(llama, [("a", [3] * 52)], n=1)  # the longest that fits into 64 positions
    for prompts, more, message in (
        ([("long", [3] * 53)], {}, "'long' has 53 tokens; the model's 64 positions"),
        ([("empty", [])], {}, "'empty' has 0 tokens"),
        ([("a", [1])], {"n": 0}, "n, max_rows"),
        ([("a", [1])], {"temperature": -1.0}, "temperature must be"),
        ([("a", [1])], {"temperature": math.nan}, "temperature must be"),
        ([("a", [1])], {"temperature": 0}, "equal responses"),
        ([("a", [1])], {"top_p": 0.0}, "top_p must lie above 0"),
        ([("a", [1])], {"temperature": 0, "n": 1, "top_p": 0.5}, "temperature 0 does not use it"),
    ):
        with pytest.raises(ValueError, match=message):
            run(llama, prompts, **more)
    with pytest.raises(AssertionError, match="share an id"):
        run(llama, [("a", [1]), ("a", [3])])
    with pytest.raises(AssertionError, match="training mode"):
        run(AutoModelForCausalLM.from_config(llama.config).train(), [("a", [1])])


def test_samples_that_training_encodes_otherwise_are_counted(tmp_path):
    """The same text in other tokens; but not an end at another token than EOS, of which a text has nothing."""
    tokenizer = byte_tokenizer()
    word, letters = ([tokenizer.convert_tokens_to_ids(token) for token in some] for some in (["the"], "the"))
    letter, end = letters[0], tokenizer.convert_tokens_to_ids("!")
    drawn = [([*word, 1], True), ([*letters, 1], True), ([*word, end], True), ([letter, *word], False), ([0, 1], True)]
    samples = [decode.Sample(np.array(ids, np.int32), finished, 0.0) for ids, finished in drawn]
    (tmp_path / "in").write_text("in")
    counts = Counter()
    texts = generation.texts_of(Encoder(tokenizer), "a", samples, counts)
    assert texts == ["the", "the", "the", "tthe", ""] and counts == {"encoded_otherwise": 2}  # a <s> leaves no text
    made = {"command": "generate", "counts": counts}
    for name, facts in (("drawn", made), ("scored", {"command": "annotate", "counts": {"rows": 1}})):
        (tmp_path / name).write_text(name)
        made_from = str(tmp_path / {"drawn": "in", "scored": "drawn"}[name])
        manifests.write([(made_from, made_from)], tmp_path / name, facts)
    found = [generation.encoded_otherwise(tmp_path / name) for name in ("in", "drawn", "scored")]
    assert found == [0, 2, 2]


# --- vLLM --------------------------------------------------------------------------------------------------


class SamplingParams:
    """Those of vLLM's fields that we set, with its defaults and checks (vllm/sampling_params.py)."""

    def __init__(
        self, n=1, temperature=1.0, top_p=1.0, seed=None, stop_token_ids=None, ignore_eos=False, max_tokens=16,
        logprobs=None, detokenize=True,
    ):  # fmt: skip
        self.__dict__.update({key: value for key, value in locals().items() if key != "self"})
        assert n >= 1 and (n == 1 or temperature > 0) and 0 <= temperature <= 2 and 0 < top_p <= 1
        assert -(2**63) <= (seed or 0) < 2**63


class LoRARequest:
    """As in vllm/lora/request.py."""

    def __init__(self, lora_name, lora_int_id, lora_path=""):
        assert lora_int_id > 0 and lora_path
        self.lora_path = lora_path


class LLM:
    """A stand-in for vllm.LLM that draws from a small model by full forwards, one response at a time.

    As documented: a prompt is {"prompt_token_ids": [...]}; the j-th of n responses has seed + j; a response ends with
    the end token of the model's generation_config.json unless ignore_eos, with any of stop_token_ids, both of which
    are in token_ids, or at max_tokens; `logprobs` has a dict for each token that holds the drawn one, whose log-prob is
    the model's own if logprobs_mode is raw_logprobs.
    """

    model = None  # the test's
    calls: ClassVar[list] = []

    def __init__(
        self, model, *, tensor_parallel_size=1, dtype="auto", revision=None, tokenizer_revision=None,
        max_model_len=None, logprobs_mode="processed_logprobs", enable_lora=False, max_lora_rank=16,
    ):  # fmt: skip
        self.options = {key: value for key, value in locals().items() if key not in ("self", "logprobs_mode")}
        assert logprobs_mode == "raw_logprobs"
        assert max_lora_rank in (8, 16, 32, 64, 128, 256, 320, 512)

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
        assert self.options["enable_lora"] == (lora_request is not None)
        LLM.calls.append(sum(p.n for p in sampling_params))
        self.asked = lora_request
        results = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            outputs = [self._one(prompt["prompt_token_ids"], params, j) for j in range(params.n)]
            results.append(SimpleNamespace(outputs=outputs[::-1]))  # in no order that is documented
        return results

    def _one(self, prompt, params, index):
        generator = torch.Generator().manual_seed(params.seed + index)
        ids, logprobs, reason = [], [], None
        stops = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS, 7))}  # 7: the model's own
        while reason is None:
            with torch.no_grad():
                logits = LLM.model(torch.tensor([prompt + ids])).logits[:, -1]
            uniform, how = torch.rand(1, generator=generator), dict(temperature=params.temperature, top_p=params.top_p)
            token, logp = (x.item() for x in decode.draw_tokens(logits, uniform, **how))
            ids.append(token)
            logprobs.append({token: SimpleNamespace(logprob=logp)})
            reason = "stop" if token in stops else "length" if len(ids) == params.max_tokens else None
        some = logprobs if params.logprobs is not None else None
        return SimpleNamespace(index=index, token_ids=tuple(ids), finish_reason=reason, logprobs=some)


@pytest.fixture
def vllm(llama, monkeypatch):
    fake, lora = ModuleType("vllm"), ModuleType("vllm.lora.request")
    fake.LLM, fake.SamplingParams, lora.LoRARequest = LLM, SamplingParams, LoRARequest
    for name, module in (("vllm", fake), ("vllm.lora", ModuleType("vllm.lora")), ("vllm.lora.request", lora)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LLM, "model", llama)
    monkeypatch.setattr(LLM, "calls", [])
    monkeypatch.setattr(hub, "_commit_of", lambda *named: {("some/model", "v2"): "c" * 40}[named])
    return load_vllm("some/model@v2", dtype="bf16", max_length=40, tensor_parallel=4)


def test_vllm_gives_the_same_records(vllm, llama):
    """Each with its log-prob by a full forward at temperature 1; greedy samples are ours."""
    options = {"model": "some/model", "dtype": "bfloat16", "max_model_len": 40, "tensor_parallel_size": 4}
    options |= {"revision": "c" * 40, "tokenizer_revision": "c" * 40, "enable_lora": False, "max_lora_rank": 16}
    assert vllm.options == options
    samples, counts = run(vllm, PROMPTS[:3], n=8, temperature=0.7, as_drawn=True)
    ends = set()
    for name, ids in PROMPTS[:3]:
        for one in samples[name]:
            tokens = one.token_ids.tolist()
            ends.add((one.finished, tokens[-1] == EOS, one.finished or len(tokens) == 12))
            assert one.logp == pytest.approx(plain_logp(llama, ids, tokens).item(), abs=1e-5)
    assert ends == {(True, True, True), (False, False, True)}
    assert counts["samples"] == sum(map(len, samples.values())) + counts["surplus"]
    greedy = dict(n=1, temperature=0, as_drawn=True)
    assert flat(run(vllm, PROMPTS, **greedy)[0].values()) == flat(run(llama, PROMPTS, **greedy)[0].values())


def test_vllm_takes_an_adapter_with_each_request(vllm, llama, tmp_path):
    """Its base by the name that it gives, room for its rank, and the folder from wherever vLLM's processes stand."""
    llama.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=9, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "a"
    )
    adapted = load_vllm(str(tmp_path / "a"), dtype="fp32", max_length=40)
    assert adapted.options["model"] == str(tmp_path / "base") and adapted.options["max_lora_rank"] == 16
    assert flat(run(adapted, PROMPTS)[0].values()) == flat(run(vllm, PROMPTS)[0].values())  # its B is zero
    assert adapted.asked.lora_path == str((tmp_path / "a").resolve())
    about = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for change in (dict(use_dora=True), dict(rank_pattern={"q_proj": 513})):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match="no DoRA: use --engine hf"):
            load_vllm(str(tmp_path / "a"), dtype="fp32", max_length=40)


def test_vllms_signatures_have_what_we_give():
    """What the stand-ins above take, and so all that the code gives, exists in the installed package."""
    vllm = pytest.importorskip("vllm", reason="wants CUDA, and is no requirement")
    request = importlib.import_module("vllm.lora.request").LoRARequest
    engine = importlib.import_module("vllm.engine.arg_utils").EngineArgs
    for ours, theirs in (
        (LLM.__init__, [vllm.LLM.__init__, engine]), (LLM.generate, [vllm.LLM.generate]),
        (SamplingParams.__init__, [vllm.SamplingParams]), (LoRARequest.__init__, [request]),
    ):  # fmt: skip
        known = {name for one in theirs for name in inspect.signature(one).parameters}
        assert inspect.signature(ours).parameters.keys() - {"self"} <= known, (ours, theirs)


def test_top_p_draws_the_likeliest_tokens_alone(vllm, llama):
    """Those that together have half of the probability, never none; both engines, log-probs still over all tokens."""
    logits = torch.tensor([[0.4, 0.05, 0.3, 0.25], [0.05, 0.6, 0.3, 0.05]]).log().repeat_interleave(500, 0)
    uniforms = torch.linspace(0, 1 - 1e-6, 500).repeat(2)
    tokens, logps = decode.draw_tokens(logits, uniforms, temperature=1.0, top_p=0.5)
    assert tokens[:500].bincount(minlength=4).tolist() == pytest.approx([500 * 4 / 7, 0, 500 * 3 / 7, 0], abs=1)
    assert set(tokens[500:].tolist()) == {1} and logps[0].item() == pytest.approx(math.log(0.4))
    for engine in (llama, vllm):
        samples, _ = run(engine, PROMPTS[:2], n=20, as_drawn=True, top_p=0.4, temperature=0.8)
        for name, ids in PROMPTS[:2]:
            for one in samples[name]:
                whole = torch.tensor([ids + one.token_ids.tolist()])
                with torch.no_grad():
                    found = (llama(whole).logits[0, len(ids) - 1 : -1].double() / 0.8).softmax(-1)
                drawn = found.gather(1, whole[0, len(ids) :, None])
                assert ((found * (found > drawn)).sum(-1) < 0.4 + 1e-6).all()


def test_vllm_samples_depend_on_seed_and_id_alone(vllm, monkeypatch):
    prompts = PROMPTS[:3]
    whole, counts = run(vllm, prompts, n=3)
    assert LLM.calls[0] == 12  # one call for all
    monkeypatch.setattr(generation, "VLLM_CALL", 1)
    assert counts["prompts_short"] == 0
    LLM.calls.clear()
    places = []
    small, _ = run(vllm, prompts[::-1], n=3, max_rows=9)
    assert all(flat([small[name]]) == flat([whole[name]]) for name in whole) and LLM.calls[0] == 8  # of 12
    for name, ids in prompts:
        params = SamplingParams(seed=prompt_seed(0, name) // 2, temperature=0.9, stop_token_ids=[EOS], ignore_eos=True,
                                max_tokens=12, logprobs=0)  # fmt: skip
        stream = [vllm._one(ids, params, j).token_ids for j in range(30)]
        ended = list(dict.fromkeys(y for y in stream if y[-1] == EOS))
        assert [tuple(one.token_ids.tolist()) for one in whole[name]] == ended[:3]
        places.append(stream.index(ended[2]))
    assert max(places) > 4  # which the first round does not reach: the second goes on with the stream
    assert flat(run(vllm, prompts, n=3, seed=1)[0].values()) != flat(whole.values())


def test_vllm_ends_at_each_end_token_of_the_model(vllm, llama, tmp_path, monkeypatch):
    """As ours does: those that the generation config names beside the tokenizer's."""
    settings = dict(n=4, as_drawn=True)
    drawn = [ids for some in flat(run(vllm, PROMPTS, **settings)[0].values()) for ids, _ in some]
    other = max(range(EOS + 1, 13), key=lambda i: sum(i in ids for ids in drawn))
    GenerationConfig(eos_token_id=[EOS, other]).save_pretrained(tmp_path)
    several = load_vllm(str(tmp_path), dtype="fp32", max_length=40)
    samples = [one for some in flat(run(several, PROMPTS, **settings)[0].values()) for one in some]
    for ids, whole in zip([ids for ids, _ in samples], drawn, strict=True):
        end = next((i for i, token in enumerate(whole) if token in (EOS, other)), len(whole) - 1)
        assert ids == whole[: end + 1]
    assert sum(ids[-1] == other for ids, _ in samples) > 3
    assert all(finished == (ids[-1] in (EOS, other)) for ids, finished in samples)


def test_without_vllm_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed, whether or not it is
    with pytest.raises(ValueError, match="pip install vllm"):
        load_vllm("some/model", dtype="fp32", max_length=8)


# --- data_prep.py generate ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tiny_world, tmp_path_factory):
    """Prompts with two human responses each, the flags of a run on them, and what an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("generate")
    rows = listwise.read(tiny_world / "test.jsonl")
    pairs = [Row(r.id, r.prompt, r.responses[:2], None, 0, 1, None, "") for r in rows]
    listwise.write(folder / "in.jsonl", pairs)
    flags = [f"--model={tiny_world / 'model'}", f"--input={folder / 'in.jsonl'}", "--n=4", "--max_new_tokens=60"]
    data_prep.main(["generate", *flags, f"--output={folder / 'out.jsonl'}"])
    assert journal.journals(folder / "out.jsonl") == []
    written = listwise.read(folder / "out.jsonl")
    assert [r.responses[:2] for r in written] == [r.responses for r in pairs] and written[0].chosen == 0
    assert sum(len(r.responses) - 2 for r in written) > 16
    return SimpleNamespace(flags=flags, expected=(folder / "out.jsonl").read_bytes(), ids=[r.id for r in rows])


def test_two_ranks_write_what_one_does(task, tmp_path):
    output = tmp_path / "out.jsonl"
    torchrun(2, ["data_prep.py", "generate", *task.flags, f"--output={output}"])
    assert output.read_bytes() == task.expected and journal.journals(output) == []


def test_vllm_through_the_script(task, vllm, tmp_path, monkeypatch, tiny_world):
    def one(self, prompt, params, index):
        assert params.n == 5 and params.max_tokens == 60 and params.temperature == 0.9
        steps = [{token: SimpleNamespace(logprob=0.0)} for token in (10 + index, EOS)]
        return SimpleNamespace(index=index, token_ids=[10 + index, EOS], finish_reason="stop", logprobs=steps)

    monkeypatch.setattr(LLM, "_one", one)
    data_prep.main(["generate", *task.flags, f"--output={tmp_path / 'out.jsonl'}", "--engine=vllm"])
    written = listwise.read(tmp_path / "out.jsonl")
    tokenizer = data_prep.tokenizers.load_tokenizer(str(tiny_world / "model"))
    assert all(r.responses[2:] == tuple(tokenizer.convert_ids_to_tokens([10, 11, 12, 13])) for r in written)
