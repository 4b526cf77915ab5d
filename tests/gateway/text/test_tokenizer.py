"""Detokenising one token at a time, and stop strings, against their plain definitions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from elastic_ep.gateway.generate import ChoiceReader
from elastic_ep.gateway.job import Output
from elastic_ep.gateway.text.detokenize import (
    ByteDetokenizer,
    Detokenizer,
    EdgedDetokenizer,
    byte_level_alphabet,
)
from elastic_ep.gateway.text.stop_strings import StopStrings
from elastic_ep.gateway.text.tokenizer import ChatTemplateError, ChatTokenizer
from tests.gateway.fakes import TEMPLATE, byte_level_tokenizer, byte_tokens, sample_text, tokens_of


@cache
def sentencepiece_like() -> ChatTokenizer:
    """Words marked by U+2581 and bytes for what the vocabulary lacks, as Llama 2's tokenizer has them."""
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"abcdefghijklmnopqrstuvwxyz0123456789 ▁.",
    ]
    model = models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return ChatTokenizer(tokenizer)


def piecewise(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join([detokenizer.push(token) for token in ids]) + detokenizer.finish()


@settings(deadline=None)
@given(st.text())
def test_byte_level_text_comes_back(written: str) -> None:
    text = sample_text()
    ids = text.encode(written)
    assert piecewise(text.detokenizer(), ids) == text.decode(ids)


@given(st.lists(st.integers(0, byte_level_tokenizer().get_vocab_size() + 3)))
def test_any_byte_level_tokens_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    text = sample_text()
    assert isinstance(text.detokenizer(), ByteDetokenizer)
    assert piecewise(text.detokenizer(), ids) == text.decode(ids)


@given(st.text())
def test_text_of_other_tokenizers_comes_back(written: str) -> None:
    text = sentencepiece_like()
    ids = text.encode(written)
    assert isinstance(text.detokenizer(), EdgedDetokenizer)
    assert piecewise(text.detokenizer(), ids) == text.decode(ids)


def test_no_half_character_is_shown() -> None:
    for text in (sample_text(), sentencepiece_like()):
        detokenizer = text.detokenizer()
        ids = text.encode("é🙂")
        shown = [detokenizer.push(token) for token in ids]
        assert len(ids) >= 6
        assert "\ufffd" not in "".join(shown)
        assert shown.count("") >= 4
        assert detokenizer.finish() == ""


def test_bytes_that_are_no_text_are_not_held_forever() -> None:
    text = sentencepiece_like()
    detokenizer = text.detokenizer()
    stray = [1 + 0x80] * 100
    shown = "".join(detokenizer.push(token) for token in stray)
    assert len(shown) > 80


def test_the_alphabet_of_bytes() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert alphabet["Ġ"] == ord(" ")


letters = st.text(alphabet="ab", min_size=1, max_size=5)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: at the stop string that ends first; of those that end together, the longest."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(found)[1]], True) if found else (text, False)


@settings(max_examples=400)
@given(
    st.text(alphabet="ab", max_size=40),
    st.lists(letters, min_size=1, max_size=3),
    st.lists(st.integers(0, 40)),
)
@example("aaab", ["aab"], [])
@example("ababbab", ["abb", "babba"], [2, 3])
def test_the_cut_does_not_depend_on_the_pieces(text: str, stops: list[str], splits: list[int]) -> None:
    places = sorted(min(place, len(text)) for place in splits)
    matcher = StopStrings(stops)
    shown = ""
    stopped = False
    for start, end in zip([0, *places], [*places, len(text)], strict=True):
        certain, found = matcher.push(text[start:end])
        stopped = found is not None
        assert found is None or found in stops
        shown += certain
        assert cut(text, stops)[0].startswith(shown), "text past the cut was shown"
        if stopped:
            break
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops), "held back without need"
    if not stopped:
        shown += matcher.finish()
    assert (shown, stopped) == cut(text, stops)


@given(
    st.text(alphabet="ab7 é🙂", max_size=30),
    st.lists(st.text(alphabet="ab7 é🙂", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=1),
)
def test_tokens_and_batches_do_not_move_the_cut(text: str, stops: list[str], sizes: list[int]) -> None:
    """From token messages, whole characters split over several tokens and any number of tokens a batch."""
    ids = [*byte_tokens(text), *sample_text().encode("<|im_end|>")]
    tokens = tokens_of(ids, finish="stop")
    reader = ChoiceReader(sample_text(), Output(stop=tuple(stops)))
    shown = ""
    while tokens and reader.finish is None:
        size = sizes[len(tokens) % len(sizes)]
        batch, tokens = tokens[:size], tokens[size:]
        shown += reader.feed(tuple(batch))
    assert shown == cut(text, stops)[0]
    assert reader.finish == "stop"
    through = min((text.find(s) + len(s) for s in stops if s in text), default=None)
    expected = len(ids) if through is None else len(text[:through].encode())
    assert reader.generated == expected, "usage counts up to the token that completed the stop string"


def test_text_at_the_length_limit_may_hold_half_a_stop_string_or_character() -> None:
    ids = sample_text().encode("7 ###")
    reader = ChoiceReader(sample_text(), Output(stop=("####",)))
    assert reader.feed(tuple(tokens_of(ids, finish="length"))) == "7 ###"
    assert reader.finish == "length"
    ids = sample_text().encode("7 ####")
    reader = ChoiceReader(sample_text(), Output(stop=("####",)))
    assert reader.feed(tuple(tokens_of(ids, finish="length"))) == "7 "
    assert reader.finish == "stop"
    half = sample_text().encode("🙂")[:-1]
    reader = ChoiceReader(sample_text(), Output())
    assert reader.feed(tuple(tokens_of(half, finish="length"))) == "\ufffd"


def test_chat_template_gets_what_templates_expect() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('no bad roles') }}"
    )
    template += "{% endif %}{{ m | tojson }}{% endfor %}{{ mood }}"
    text = ChatTokenizer(byte_level_tokenizer(), template, {"bos_token": "<s>"})
    messages = [{"role": "user", "content": "<b> & é"}]
    rendered = text.render_chat(messages, variables={"mood": "calm"})
    assert rendered == '<s>{"role": "user", "content": "<b> & é"}calm'
    assert text.render_chat([], variables={"mood": "calm", "bos_token": ""}) == "calm"
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        with pytest.raises(ChatTemplateError, match=name):
            text.render_chat(messages, variables={name: []})
    with pytest.raises(ChatTemplateError, match="no bad roles"):
        text.render_chat([{"role": "bad"}])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
    ],
)
def test_the_template_is_in_a_sandbox(attack: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTokenizer(byte_level_tokenizer(), attack).render_chat([])


def _folder(tmp_path: Path, **files: str) -> Path:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_text(content)
    return tmp_path


def test_load_finds_the_template_in_either_place(tmp_path: Path) -> None:
    config: dict[str, Any] = {"chat_template": "config {{ eos_token }}", "eos_token": {"content": "<e>"}}
    folder = _folder(tmp_path, tokenizer_config__json=json.dumps(config))
    assert ChatTokenizer.load(folder).render_chat([]) == "config <e>"
    config["chat_template"] = [{"name": "tool", "template": "no"}, {"name": "default", "template": "named"}]
    folder = _folder(tmp_path, tokenizer_config__json=json.dumps(config))
    assert ChatTokenizer.load(folder).render_chat([]) == "named"
    folder = _folder(tmp_path, chat_template__jinja="file {{ eos_token }}")
    assert ChatTokenizer.load(folder).render_chat([]) == "file <e>"


def test_load_without_a_template(tmp_path: Path) -> None:
    text = ChatTokenizer.load(_folder(tmp_path))
    with pytest.raises(ChatTemplateError, match="no chat template"):
        text.render_chat([])
    assert text.encode("Anna has 12") == sample_text().encode("Anna has 12")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"tokenizer__json": "{"}, "not a readable tokenizer"),
        ({"tokenizer_config__json": "{"}, "not JSON"),
        ({"tokenizer_config__json": "[]"}, "JSON object"),
        ({"chat_template__jinja": "{% if %}"}, "does not parse"),
    ],
)
def test_load_refuses_broken_files_in_one_line(tmp_path: Path, files: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        ChatTokenizer.load(_folder(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_load_refuses_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        ChatTokenizer.load(tmp_path)


def test_the_templates_default_is_the_generation_prompt() -> None:
    text = ChatTokenizer(byte_level_tokenizer(), TEMPLATE)
    assert text.render_chat([]) == "<|im_start|>assistant\n"
    assert text.render_chat([], add_generation_prompt=False) == ""
