"""Every message survives the wire, and nothing else gets through."""

from __future__ import annotations

import json
import types
import typing
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep import messages
from elastic_ep.codec import MalformedMessage, decode, encode, to_plain
from elastic_ep.messages import FromRank, Numbered, ToRank
from elastic_ep.store_messages import StoreSet


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Small values of a declared type: quicker than hypothesis' own reading of nested dataclasses."""
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([st.none() if arm is type(None) else values(arm) for arm in arms])
    if origin is tuple:
        return st.lists(values(arms[0]), max_size=3).map(tuple)
    if isinstance(hint, type) and issubclass(hint, tuple):
        return st.builds(hint, *[values(field) for field in typing.get_type_hints(hint).values()])
    if is_dataclass(hint) and isinstance(hint, type):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: values(hints[field.name]) for field in fields(hint)})
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    simple = {
        int: st.integers(),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(max_size=8),
        bytes: st.binary(max_size=8),
    }
    return simple[hint]


KINDS: list[Any] = [*FromRank.__args__, *ToRank.__args__, Numbered]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_round_trip(kind: Any) -> None:
    @settings(max_examples=30, deadline=None)
    @given(values(kind))
    def check(message: Any) -> None:
        assert decode(encode(message), kind) == message

    check()


@settings(max_examples=60, deadline=None)
@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_what_is_not_a_message_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(data, FromRank)


@settings(max_examples=60, deadline=None)
@given(values(messages.StepReport), st.integers(0, 5), JSON)
def test_one_wrong_field_is_malformed_or_of_its_type(report: Any, place: int, value: Any) -> None:
    plain = to_plain(report)
    plain[1 + place] = value
    if type(value) is int:
        return
    with pytest.raises(MalformedMessage):
        decode(json.dumps(plain).encode(), FromRank)


@pytest.mark.parametrize("value", ["AA", "A===", "é", "AA==\n", 1, None, ["AA=="]])
def test_bytes_that_are_not_base64_are_malformed(value: Any) -> None:
    plain = to_plain(StoreSet(0, 1, "key", b"\0"))
    assert decode(json.dumps(plain).encode(), FromRank) == StoreSet(0, 1, "key", b"\0")
    plain[-1] = value
    with pytest.raises(MalformedMessage):
        decode(json.dumps(plain).encode(), FromRank)
