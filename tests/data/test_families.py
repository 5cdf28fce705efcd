"""Chat templates in the manner of the model families, each with every kind of conversation: either all that was said
stands in the prompt, as jinja2 by itself renders it, and the loss falls on the answer alone; or the row is refused."""

import datetime
import functools
import json

import pytest
from helpers import tokenize_rows
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hps.data.rows import Row
from hps.data.templates import fix
from hps.data.tokens import COUNTS
from hps.prepare.doctor import diagnose


def loop(start: str, ask: str, *, content: str = "m.content", **by_role: str) -> str:
    """A template of one piece per role, in which @ is the content; the role `every` is any other one."""
    every = "{% else %}" + by_role.pop("every") if "every" in by_role else ""
    cases = "".join(f"{{% elif m.role == '{role}' %}}{text}" for role, text in by_role.items()) + every
    turns = "{% for m in messages %}{% if false %}" + cases.replace("@", "{{ " + content + " }}")
    return start + turns + "{% endif %}{% endfor %}{% if add_generation_prompt %}" + ask + "{% endif %}"


TRIM = {"content": "m.content | trim"}
APART = (  # takes the system's turn off, to be written elsewhere
    "{% set system = SYSTEM %}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
)
FOLDED, DEFAULT = APART.replace("SYSTEM", "''"), APART.replace("SYSTEM", "'You are helpful.'")
FIRST, LAST = ("{% if loop." + which + " and system %}{{ system }}\n\n{% endif %}" for which in ("first", "last"))
ALTERNATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{{ raise_exception('System role not supported') }}"
DAY = "Today is {{ strftime_now('%d %b %Y') }}.\n"
PARTS = "{% if m.content is string %}@{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
# -- of models that think: earlier thoughts are left out, those since the last question kept --
SAID = "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
ASKED = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
QWEN3 = (
    "<|im_start|>assistant\n" + SAID + "{% set thought = m.reasoning_content or '' %}{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought }}\n</think>\n\n{% endif %}"
    "{{ said }}<|im_end|>\n"
)
NO_THOUGHT = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
R1_SAID = "<|assistant|>" + SAID.replace(".lstrip('\n')", "") + "{{ said }}</s>"
# -- parts that several share --
ASK = "<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\n{{ system }}<|im_end|>\n"
RESPONSE = "<|im_start|>user\n<tool_response>\n@\n</tool_response><|im_end|>\n"
LLAMA_3, LLAMA_ASK = ("<|start|>" + role + "<|end|>\n\n" for role in ("{{ m.role }}", "assistant"))
LLAMA_SYSTEM = "<|start|>system<|end|>\n\nToday Date: {{ date_string }}\n\n{{ system | trim }}<|eot|>"
LLAMA_DAY = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
GEMMA_ASK = "<start_of_turn>model\n"


def chatml(start: str = "", ask: str = ASK, **more: str) -> str:
    return loop(start, ask, **more, every="<|im_start|>{{ m.role }}\n@<|im_end|>\n")


def gemma(start: str = "<s>", first: str = "", **more: str) -> str:
    asked, said = f"<start_of_turn>user\n{first}@<end_of_turn>\n", GEMMA_ASK + "@<end_of_turn>\n"
    return loop(start, GEMMA_ASK, **TRIM, user=asked, assistant=said, **more)


def inst(start: str = "<s>", user: str = "[INST] @ [/INST]", answer: str = " @</s>", **more: str) -> str:
    """Of Mistral and Llama 2: the answer begins behind [/INST]."""
    return loop(start, "", user=user, assistant=answer, **more)


def named(user: str, answer: str, end: str = "\n", start: str = "", **more: str) -> str:
    """Roles by names in plain text."""
    return loop(start, answer.rstrip(" "), user=f"{user}@{end}", assistant=f"{answer}@</s>", **more)


FAMILIES = {  # and the token that ends a turn, where it is not </s>
    "chatml": (chatml(), "<|im_end|>"),
    "yi": (loop("", "<im>assistant\n", every="<im>{{ m.role }}\n@<|im_end|>\n"), "<|im_end|>"),  # <im> is not special
    "qwen2.5": (chatml(DEFAULT + SYSTEM, tool=RESPONSE), "<|im_end|>"),
    "qwen3": (chatml(ASKED, ASK + NO_THOUGHT, assistant=QWEN3, tool=RESPONSE), "<|im_end|>"),
    "qwen3-thinking": (chatml(ASKED, ASK + "<think>\n", assistant=QWEN3), "<|im_end|>"),
    "qwq": (chatml("", ASK + "<think>\n", assistant=QWEN3.replace("ns.last", "99")), "<|im_end|>"),
    "smollm3": (
        chatml(FOLDED + "<|im_start|>system\n" + DAY + "{{ system.replace('/no_think', '').rstrip() }}<|im_end|>\n",
               ASK + "{% if '/no_think' in system %}<think>\n\n</think>\n{% endif %}",
               assistant=ASK + SAID + "{{ said }}<|im_end|>\n", tool=RESPONSE),
        "<|im_end|>",
    ),
    "llama-2": inst(
        FOLDED + ALTERNATE,
        "{% set text = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' ~ m.content if loop.first and system else m.content %}"
        "<s>[INST] {{ text | trim }} [/INST]",
        " {{ m.content | trim }} </s>",
    ),
    "llama-3.1": (
        loop("<s>" + LLAMA_DAY + FOLDED + LLAMA_SYSTEM, LLAMA_ASK, **TRIM, every=LLAMA_3 + "@<|eot|>",
             tool=LLAMA_3 + "{{ m.content | tojson }}<|eot|>"),
        "<|eot|>",
    ),
    "llama-3.2, parts": (loop("<s>", LLAMA_ASK, every=LLAMA_3 + PARTS + "<|eot|>"), "<|eot|>"),
    "gemma": (gemma(system=NO_SYSTEM), "<end_of_turn>"),
    "gemma-3": (gemma(FOLDED + ALTERNATE + "<s>", FIRST), "<end_of_turn>"),
    "mistral-v0.1": inst("<s>" + ALTERNATE, answer="@</s> "),
    "mistral-v0.3": inst(FOLDED + "<s>", "[INST] " + LAST + "@[/INST]"),
    "mistral-nemo": inst(FOLDED + "<s>", "[INST]" + LAST + "@[/INST]", "@</s>",
                         tool='[TOOL]{"content": {{ m.content | tojson }}}[/TOOL]'),
    "mistral-small-3": inst("<s>", "[INST]@[/INST]", "@</s>", system="[SYSTEM]" + DAY + "@[/SYSTEM]"),
    "zephyr": loop("", "<|assistant|>\n", every="<|{{ m.role }}|>\n@</s>\n"),
    "olmo-2": named("<|user|>\n", "<|assistant|>\n", start="</s>", system="<|system|>\n@\n"),
    "vicuna": named("USER: ", "ASSISTANT: ", " ", DEFAULT + "{{ system }} "),
    "alpaca": named("### Instruction:\n", "### Response:\n", "\n\n", system="@\n\n"),
    "falcon": named("User: ", "Assistant: ", "\n\n", system="@\n\n", content="m.content.replace('\n\n', '\n')"),
    "granite": loop("{% if messages[0].role != 'system' %}" + DAY + "{% endif %}", "<|start|>assistant<|end|>",
                    every="<|start|>{{ m.role }}<|end|>@</s>\n"),
    "falcon-3": loop("", "<|assistant|>\n", every="<|{{ m.role }}|>\n@\n"),
    "chatglm": loop("[gMASK]<sop>", "<|assistant|>\n", every="<|{{ m.role }}|>\n@"),
    "deepseek-r1": loop(FOLDED + "<s>{{ system }}", "<|assistant|><think>\n", user="<|user|>@", assistant=R1_SAID,
                        tool="<tool_response>@</tool_response>"),
    "deepseek-v3.1": loop(FOLDED + "<s>{{ system }}", "<|assistant|></think>", user="<|user|>@",
                          assistant=R1_SAID.replace("{{", "</think>{{")),
    "gpt-oss": loop(
        FOLDED + "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
        "{% if system %}<|start|>developer<|message|># Instructions\n\n{{ system }}<|end|>{% endif %}",
        "<|start|>assistant", tool="{{ raise_exception('a tool without a call') }}",
        user="<|start|>user<|message|>@<|end|>",
        assistant="<|start|>assistant<|channel|>final<|message|>@{{ '</s>' if loop.last else '<|end|>' }}",
    ),
    "exaone": loop("", "[|assistant|]", **TRIM, every="[|{{ m.role }}|]@{{ '\n' if m.role == 'user' else '</s>\n' }}"),
    "minicpm": loop("", "<|assistant|>", user="<|user|>{{ m.content | trim }}", every="<|assistant|>@"),
    "baichuan": loop("", "<|assistant|>", system="@", user="<|user|>@", assistant="<|assistant|>@</s>"),
    "bos in every turn": (chatml(user="<s><|im_start|>user\n@<|im_end|>\n"), "<|im_end|>"),
    "the clock": (chatml("{% set f = '%H:%M %j' %}{{ strftime_now(f) }}"), "<|im_end|>"),
    # -- that lose something, of some conversations or of all --
    "drops the system": (chatml(system=""), "<|im_end|>"),
    "the last turn alone": (chatml("{% set messages = messages[-1:] %}"), "<|im_end|>"),
    "backwards": (chatml("{% set messages = messages | reverse | list %}"), "<|im_end|>"),
    "truncates": (chatml(content="m.content[:30]"), "<|im_end|>"),
    "escapes": (chatml(content="m.content | e"), "<|im_end|>"),
    "first lines": (chatml(content="m.content.split('\n')[0]"), "<|im_end|>"),
    "parts alone": (chatml(assistant=ASK + PARTS.replace("is string", "is none") + "<|im_end|>\n"), "<|im_end|>"),
}  # fmt: skip

SPECIAL = "<s> </s> <|im_start|> <|im_end|> <|sep|> <|start|> <|end|> <|message|> <|channel|> <|eot|> <start_of_turn> "
SPECIAL += "<end_of_turn> <|system|> <|user|> <|assistant|> <|tool|> <|observation|> [INST] [/INST] [gMASK] <sop>"
BESIDE = "<im> <think> </think> <tool_response> </tool_response>"


def bytes_alone(template: str, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """A token is a byte or one of the marks, so that where a text begins, a token begins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL.split())
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in BESIDE.split()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, chat_template=template)


def talk(**said: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": role.rstrip("_"), "content": text} for role, text in said.items())


QUOTED = "Why <|im_end|>\n<|im_start|>assistant\nNo</s><im>user<|eot|>\n<|start|><end_of_turn>[/INST] or <|user|>?"
CONVERSATIONS = {
    "a question": talk(user="What is Alpha?"),
    "with a system": talk(system="Say Beta.", user="What is Alpha?"),
    "turns": talk(user="What is Alpha?", assistant="It is Gamma.", user_="And Delta?"),
    "turns with a system": talk(system="Say Beta.", user="Alpha?", assistant="It is Gamma.", user_="And Delta?"),
    "a tool": talk(user="What is Alpha?", assistant="I look.", tool='{"Eta": "\u00e9"}'),
    "thoughts": talk(user="Alpha?", assistant="<think>\nHm, Iota.\n</think>\n\nIt is Gamma.", user_="And Delta?"),
    "reasoning": tuple(
        turn | {"reasoning_content": "Iota"} if turn["role"] == "assistant" else turn
        for turn in talk(user="Alpha?", assistant="Gamma.", user_="Eta?")
    ),
    "white space": talk(system=" \nBeta\n", user="\n  Alpha  x\n\n", assistant="  Gamma \n", user_=" Delta\t"),
    "paragraphs": talk(user="Two things:\n\n1. Alpha\n2. Eta, with some more words", assistant="a\n\nb", user_="<b>?"),
    "quoted marks": talk(user="Is it so?", assistant="Yes</s>", user_=QUOTED),
}
ANSWER = "It is Omega:\n\n  x = 1"


JINJA = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
JINJA.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
JINJA.globals["strftime_now"] = datetime.datetime(2021, 3, 2).strftime
compiled = functools.cache(JINJA.from_string)


def refuse(why):
    raise TemplateError(why)


def by_jinja(template: str, eos: str, turns) -> str:
    """A rendering that shares no line with transformers'; on the second of March 2021."""
    ask = turns[-1]["role"] != "assistant"
    more = dict(messages=list(turns), add_generation_prompt=ask, raise_exception=refuse)
    return compiled(template).render(**more, bos_token="<s>", eos_token=eos)


def loses(text: str, turns) -> bool:
    """Whether a turn is not in the text; all that is said is said once."""
    at = 0
    for turn in turns:
        said = turn["content"].strip()
        forms = [said, json.dumps(said)[1:-1], json.dumps(said, ensure_ascii=False)[1:-1]]
        forms += [said.split("</think>\n\n")[1]] if "</think>" in said else []
        places = [text.find(form, 0 if turn["role"] == "system" else at) for form in forms]
        if max(places) < 0:
            return True
        at = at if turn["role"] == "system" else max(places)
    return False


def read(tokenizer, kind: str, **how):
    row = Row(kind, CONVERSATIONS[kind], (ANSWER,), where="f:1")
    [example], counts = tokenize_rows(tokenizer, [row], max_length=9999, **how)
    return example, counts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_read_or_refused(family):
    template, eos = FAMILIES[family] if isinstance(FAMILIES[family], tuple) else (FAMILIES[family], "</s>")
    tokenizer = bytes_alone(template, eos)
    if "strftime_now" in template:
        tokenizer.chat_template = fix(template, "date=2021-03-02", path=family)
    marks = set(tokenizer.convert_tokens_to_ids(SPECIAL.split() + ["<im>"] * ("<im>" in template)))
    [asked], said = CONVERSATIONS["a question"], {"role": "assistant", "content": ANSWER}
    head, answered = by_jinja(template, eos, [asked]), by_jinja(template, eos, [asked, said])
    before = answered[len(head) :].partition(ANSWER.split("\n")[0])[0] if answered.startswith(head) else ""
    before = "" if before.strip() else before  # the white space before an answer
    examples = []
    for kind, turns in CONVERSATIONS.items():
        try:
            text = by_jinja(template, eos, turns)
        except TemplateError:
            text = None
        if text is None or loses(text, turns):
            with pytest.raises(ValueError, match=r"^f:1: the tokenizer's chat template (leaves|moves|refuses) .*"):
                read(tokenizer, kind)
            continue
        example, counts = read(tokenizer, kind)
        assert tokenizer.decode(example.prompt_ids) == text, kind
        if kind != "quoted marks":
            assert example.prompt_ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids, kind
        else:
            plain = by_jinja(template, eos, [turn | {"content": "x"} for turn in turns])
            own = [i for i in tokenizer(plain, add_special_tokens=False).input_ids if i in marks]
            assert [i for i in example.prompt_ids if i in marks] == own
        thoughts = {"thoughts": "Hm, Iota.", "reasoning": "Iota"}.get(kind, "")
        assert counts.get("rows_thoughts_dropped", 0) == (thoughts not in text), kind
        ids = tokenizer(before + ANSWER, add_special_tokens=False).input_ids
        assert example.response_ids[0].tolist() == [*ids, tokenizer.eos_token_id], kind
        examples.append(example)
        # A reward model reads the whole conversation.
        whole = by_jinja(template, eos, [*turns, said])
        if kind != "quoted marks" and not loses(whole, [*turns, said]):
            example, _ = read(tokenizer, kind, closing=True)
            ids = [*example.prompt_ids, *example.response_ids[0]]
            assert ids == tokenizer(whole, add_special_tokens=False).input_ids
    if not examples:
        return
    rows = [Row(e.id, CONVERSATIONS[e.id], (ANSWER,)) for e in examples]
    counts = dict.fromkeys(COUNTS, 0) | {"rows_read": len(rows)}
    report = diagnose(zip(rows, examples, strict=True), counts, tokenizer=tokenizer)
    assert report["counts"]["responses_decoded_otherwise"] == 0
    assert bool(report["template"]) is not answered.startswith(head + before + ANSWER + eos)
    changes = answered.startswith(head + before) and ANSWER not in answered and ANSWER.split("\n")[0] in answered
    assert (report["template"] == "changes what an answer says") is changes
