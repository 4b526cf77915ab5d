"""Every message survives the wire, and nothing else gets through."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep import messages
from elastic_ep.messages import FromRank, MalformedMessage, Numbered, ToRank, decode, encode

KINDS: list[Any] = [*FromRank.__args__, *ToRank.__args__, Numbered]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_round_trip(kind: Any) -> None:
    @given(st.from_type(kind))
    def check(message: Any) -> None:
        assert decode(encode(message), kind) == message

    check()


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_what_is_not_a_message_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data, FromRank)


@given(st.from_type(messages.StepReport), st.integers(0, 5), JSON)
def test_one_wrong_field_is_malformed_or_of_its_type(report: Any, place: int, value: Any) -> None:
    plain = messages.to_plain(report)
    plain[1 + place] = value
    if type(value) is int:
        return
    with pytest.raises(MalformedMessage):
        decode(json.dumps(plain).encode(), FromRank)
