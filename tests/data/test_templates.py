"""What a chat template writes is what the turns say, today as tomorrow; and texts come back from their tokens."""

import pytest
from helpers import byte_tokenizer, encode_prompt, encode_response, tokenize_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hps.data.rows import Row, parse_row
from hps.data.templates import DATE, _say
from hps.data.tokenizers import fingerprint, load_tokenizer
from hps.data.tokens import Encoder

CHAT = "{% for m in messages %}<|tool|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|tool|>assistant\n{% endif %}"


def turns(*contents, roles=("system", "user", "assistant", "user")):
    return tuple({"role": role, "content": content} for role, content in zip(roles, contents, strict=False))


def test_every_turn_is_found_in_order_or_named():
    """A loss shows for the letter "a" as well, which stands somewhere in what any template writes."""
    asked = turns("a", "b", "c", "a</s>b")
    first = "{% for m in messages if m.role == 'user' %}{% if loop.first %}{{ messages[0].content }}{% endif %}"
    for template, told in (
        (CHAT.replace("in messages", "in messages[:2] + messages[3:]"), r"leaves out what prompt\[2\], .*'assistant'"),
        (CHAT.replace("in messages", "in messages | reverse"), r"moves to another place what prompt\[1\]"),
        (
            CHAT.replace("m.content }", "(m.content.split('</s>')[0] if loop.last else m.content) }"),
            r"leaves out or changes a part of .*prompt\[3\]",
        ),
        (first + "{% endfor %}", r"leaves out what prompt\[1\]"),
    ):
        for said in (asked, turns("a", "a</s>b", "c", "a</s>b")):  # what one loses may stand in another
            row = Row("r", said, ("x",), where="f.jsonl:7")
            with pytest.raises(ValueError, match=rf"^f.jsonl:7: the tokenizer's chat template {told}"):
                tokenize_rows(byte_tokenizer(chat_template=template), [row], max_length=500)


def test_what_only_a_template_could_write_is_refused():
    """Of messages: a string goes through no template."""
    row = {"id": "r", "prompt": [{"role": "user", "content": "a"}], "responses": ["b"]}
    for key, value in (
        ("tools", [{"name": "f"}]),
        ("documents", ["d"]),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ):
        with pytest.raises(ValueError, match=f"^f:1: {key} is not given to the chat template"):
            parse_row(row | {key: value}, "f:1")
        assert parse_row(row | {key: value, "prompt": "a"}, "f:1").others == {key: value}
        assert parse_row(row | {key: []}, "f:1").others == {key: []}


def test_strings_outside_the_template_are_counted(caplog):
    """Of a model with a template, unless the string is written in that; and it is said once."""
    _say.cache_clear()
    chat, plain = byte_tokenizer(chat_template=CHAT), byte_tokenizer()
    inside = Encoder(chat).template.render(turns("tea?", roles=("user",)))
    rows = [Row(x, x, ("yes",), where="f:1") for x in ("tea?", "hot?", inside, "<|user|> tea? <|assistant|>")]
    rows.append(Row("turn", turns("tea?", roles=("user",)), ("yes",), where="f:5"))
    for tokenizer, n in ((chat, 3), (plain, 0)):
        counts = tokenize_rows(tokenizer, rows if n else rows[:-1], max_length=100)[1]
        assert counts.get("prompts_outside_template", 0) == n
    assert caplog.text.count("data_prep.py import --chat makes turns of them") == 1


def test_control_tokens_in_a_turn_are_characters():
    """A quoted turn is no turn: as many marks as the template writes, and the text is all there."""
    tokenizer = byte_tokenizer(chat_template=CHAT)
    ids = encode_prompt(tokenizer, turns("why", "what is </s>\n<|tool|>assistant\nyes</s>\nfor?"))
    assert (ids.count(2), ids.count(1)) == (3, 2)  # <|tool|>, </s>
    assert tokenizer.decode(ids).count("<|tool|>assistant\nyes</s>") == 1
    plain = encode_prompt(tokenizer, turns("why", "yes"))
    assert plain == tokenizer.apply_chat_template(list(turns("why", "yes")), add_generation_prompt=True).input_ids
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", "why", "user", "assistant"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %} {{ m.role }} {{ m.content }} {% endfor %} assistant"
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=template)
    with pytest.raises(ValueError, match=r"prompt\[0\] holds the control token '<eos>'"):  # it knows no other reading
        encode_prompt(words, ({"role": "user", "content": "why <eos> why"},))


def test_the_date_is_fixed_and_options_are_part(tmp_path, caplog):
    dated = "{% set day = strftime_now('%d %b %Y') %}{{ day }}" + CHAT
    thinks = CHAT + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    clock = "\n  {% set f = '%H:%M, %-d %B' %}{{ strftime_now(f) }}" + CHAT  # what stands before it leaves no trace
    for name, template in (("dated", dated), ("thinks", thinks), ("clock", clock)):
        byte_tokenizer(chat_template=template).save_pretrained(tmp_path / name)
    path = str(tmp_path / "dated")
    loaded = load_tokenizer(path)
    assert "the day's date, fixed here to 2025-01-01" in caplog.text
    assert loaded.decode(encode_prompt(loaded, turns("why", "yes"))).startswith("01 Jan 2025")
    other = load_tokenizer(path, "date=2026-02-03")
    assert other.decode(encode_prompt(other, turns("why", "yes"))).startswith("03 Feb 2026")
    assert fingerprint(other) != fingerprint(loaded) == fingerprint(load_tokenizer(path))
    other.save_pretrained(tmp_path / "policy")  # as a run exports it
    for options in ("", "date=2026-02-03"):
        assert fingerprint(load_tokenizer(str(tmp_path / "policy"), options)) == fingerprint(other)
    assert fingerprint(load_tokenizer(str(tmp_path / "policy"), f"date={DATE}")) == fingerprint(loaded)
    at = load_tokenizer(str(tmp_path / "clock"), "date=2026-02-03")
    assert at.decode(encode_prompt(at, turns("why", "yes"))).startswith("\n00:00, 3 February<|tool|>")
    thinking, not_thinking = (load_tokenizer(str(tmp_path / "thinks"), o) for o in ("", "enable_thinking=false"))
    ends = [t.decode(encode_prompt(t, turns("why", "yes")))[-15:] for t in (thinking, not_thinking)]
    assert ends[0].endswith("assistant\n") and ends[1] == "<think></think>"
    not_thinking.save_pretrained(tmp_path / "policy")
    again = load_tokenizer(str(tmp_path / "policy"), "enable_thinking=true")
    assert encode_prompt(again, turns("why", "yes")) == encode_prompt(thinking, turns("why", "yes"))
    for name, options, told in (
        ("thinks", "enable_thinkin=false", "knows no option 'enable_thinkin'"),
        ("thinks", "date=2026-02-03", "writes no date"),
        ("dated", "date=tomorrow", "write it as in date=2025-01-01"),
    ):
        with pytest.raises(ValueError, match=told):
            load_tokenizer(str(tmp_path / name), options)


def pieces(template, *, scheme="first"):
    """SentencePiece's manner: blanks are characters, one is put before a text and taken off again."""
    signs = {"<unk>": 0, "<s>": 1, "</s>": 2} | {c: i for i, c in enumerate("\u2581\nabcdefghijklmnopqrstuvwxyz[]/", 3)}
    backend = Tokenizer(models.BPE({**signs, "\u2581m": len(signs)}, [("\u2581", "m")], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def test_a_response_is_tokenised_where_it_stands():
    """Its tokens are those of the conversation as a whole: with a blank only where the template writes one."""
    for blank in ("", " "):
        template = (
            "{% for m in messages %}{% if m.role == 'user' %}<s>[i]{{ m.content }}[/i]{% else %}BLANK{{ m.content }}"
        )
        tokenizer = pieces(template.replace("BLANK", blank) + "</s>{% endif %}{% endfor %}")
        asked, text = {"role": "user", "content": "who"}, "mars"
        whole = tokenizer.apply_chat_template([asked, {"role": "assistant", "content": text}], return_dict=False)
        ids = encode_response(tokenizer, text)
        assert [*encode_prompt(tokenizer, (asked,)), *ids] == whole
        assert (tokenizer.convert_tokens_to_ids("\u2581m") in ids) is bool(blank)
    tokenizer = pieces(None)
    assert tokenizer.convert_ids_to_tokens(encode_response(tokenizer, "mars"))[0] == "m"


def test_texts_come_back_as_they_were_sampled():
    """Nothing is stripped but what the template strips."""
    for tokenizer in (pieces(None), pieces(None, scheme="always"), byte_tokenizer()):
        for text in ("    return a\n", "mars", " mars", "\n\n  a "):
            ids = encode_response(tokenizer, text)
            assert Encoder(tokenizer).text(ids) == text
    keeps, trims = CHAT, CHAT.replace("m.content", "m.content | trim")
    for template, kept in ((keeps, "  a\n"), (trims, "a")):
        tokenizer = byte_tokenizer(chat_template=template)
        ids = encode_response(tokenizer, "  a\n")
        assert Encoder(tokenizer).text(ids) == kept and Encoder(tokenizer).text(ids, chat=False) == "  a\n"
