"""The text of a stream, and the bytes of its tokens, for every way that decoders have to spell tokens."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.gateway.text.detokenize import WindowDetokenizer
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from tests.gateway.text.tokenizers_of_all_kinds import KINDS, tokenizer_of

BY_NEIGHBOURS = {"words with a suffix", "pieces, replaced at last"}
SPOILS_RUNS = {
    "Llama",
    "Gemma",
    "metaspace, always",
    "metaspace, first",
    "metaspace, never",
    "pieces, replaced at last",
}
"""Their decoder replaces a whole run of bytes when one of them is no character."""

kinds = pytest.mark.parametrize("kind", KINDS)
written = (
    st.text() | st.text("the cat, ▁a\u0301é你🙂🏳️‍🌈.'\n", max_size=30) | st.just("<tool>the <|end|> cat<s>")
)
thorough = settings(max_examples=60, deadline=None)


@cache
def text_of(kind: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_of(kind))


def streamed(
    text: ChatTokenizer, ids: list[int], context: list[int] | None = None, *, skip: bool = True
) -> list[str]:
    """What each token shows, and the end."""
    detokenizer = text.detokenizer(context or [], skip_special_tokens=skip)
    return [*[detokenizer.push(token) for token in ids], detokenizer.finish()]


def bytes_of(text: ChatTokenizer, ids: list[int], context: list[int] | None = None) -> list[bytes]:
    detokenizer = text.detokenizer(context or [])
    spelled = []
    for token in ids:
        spelled.append(detokenizer.peek(token))
        detokenizer.push(token)
    return spelled


@kinds
def test_which_decoders_are_read_token_by_token(kind: str) -> None:
    by_window = isinstance(text_of(kind).detokenizer(), WindowDetokenizer)
    assert by_window == (kind in BY_NEIGHBOURS)


@kinds
@thorough
@given(st.data())
def test_text_is_what_the_decoder_makes_of_all_tokens(kind: str, data: st.DataObject) -> None:
    text = text_of(kind)
    ids = text.encode(data.draw(written))
    for skip in (True, False):
        whole = tokenizer_of(kind).decode(ids, skip_special_tokens=skip)
        assert "".join(streamed(text, ids, skip=skip)) == whole
        assert text.decode(ids, skip_special_tokens=skip) == whole


@kinds
@thorough
@given(st.data())
def test_any_tokens_do_not_only_what_texts_have(kind: str, data: st.DataObject) -> None:
    """Bytes that are no character, ids without a token, special tokens anywhere."""
    text = text_of(kind)
    ids = data.draw(st.lists(st.integers(0, text.vocab_size + 3), max_size=20))
    whole = tokenizer_of(kind).decode(ids, skip_special_tokens=True)
    spoilt = "\ufffd" in whole and kind in SPOILS_RUNS
    assert spoilt or text.decode(ids) == whole
    assert (spoilt and kind in BY_NEIGHBOURS) or "".join(streamed(text, ids)) == text.decode(ids)


@kinds
@thorough
@given(st.data())
def test_the_bytes_of_all_tokens_joined_are_those_of_the_text(kind: str, data: st.DataObject) -> None:
    text = text_of(kind)
    ids = data.draw(st.lists(st.integers(0, text.vocab_size + 3), max_size=20) | written.map(text.encode))
    shown = "".join(streamed(text, ids))
    joined = b"".join(bytes_of(text, ids))
    if "\ufffd" not in shown or kind not in BY_NEIGHBOURS:
        assert joined.decode("utf-8", "replace") == shown
    if "\ufffd" not in shown:
        assert joined == shown.encode()


@kinds
@thorough
@given(st.data())
def test_a_stream_goes_on_from_its_prompt(kind: str, data: st.DataObject) -> None:
    """Prompt and answer are one text: an answer's first word keeps the blank before it."""
    text = text_of(kind)
    ids = text.encode(data.draw(written))
    cut = data.draw(st.integers(0, len(ids)))
    prompt, answer = ids[:cut], ids[cut:]
    before = text.decode(prompt)
    if "\ufffd" in before:
        return
    assert before + "".join(streamed(text, answer, prompt)) == text.decode(ids)
    assert before.encode() + b"".join(bytes_of(text, answer, prompt)) == text.decode(ids).encode()


@kinds
@thorough
@given(st.data())
def test_a_prompt_that_ends_inside_a_character_is_not_shown_again(kind: str, data: st.DataObject) -> None:
    text = text_of(kind)
    ids = text.encode("the cat 🙂 and 你")
    cut = data.draw(st.integers(0, len(ids)))
    shown = "".join(streamed(text, ids[cut:], ids[:cut]))
    assert shown.replace("\ufffd", "") in text.decode(ids)
    assert shown.count("\ufffd") <= 3


@kinds
@thorough
@given(st.data())
def test_no_half_character_is_shown(kind: str, data: st.DataObject) -> None:
    text = text_of(kind)
    ids = text.encode(data.draw(written.filter(lambda text: "\ufffd" not in text)))
    assert "\ufffd" not in "".join(streamed(text, ids))
