"""Every message survives the wire, and nothing else gets through."""

from __future__ import annotations

import base64
import itertools
import json
import types
import typing
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.wire import messages
from elastic_ep.wire.codec import PACKED_FROM, MalformedMessage, decode, encode, to_plain
from elastic_ep.wire.messages import Assign, FromRank, Member, Numbered, SamplingParams, ToRank
from elastic_ep.wire.store_messages import StoreSet


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
@given(values(messages.StepReport), st.integers(0, 3), JSON)
def test_one_wrong_field_is_malformed_or_of_its_type(report: Any, place: int, value: Any) -> None:
    plain = to_plain(report)
    plain[1 + place] = value
    if type(value) is int:
        return
    with pytest.raises(MalformedMessage):
        decode(json.dumps(plain).encode(), FromRank)


@pytest.mark.parametrize("value", ["AA", "A===", "é", "AA==\n", 1, None, ["AA=="]])
def test_bytes_that_are_not_base64_are_malformed(value: Any) -> None:
    plain = to_plain(StoreSet("key", b"\0"))
    assert decode(json.dumps(plain).encode(), FromRank) == StoreSet("key", b"\0")
    plain[-1] = value
    with pytest.raises(MalformedMessage):
        decode(json.dumps(plain).encode(), FromRank)


LONG = st.lists(st.integers(-(2**70), 2**70) | st.integers(0, 9), min_size=1, max_size=4)


@settings(max_examples=100, deadline=None)
@given(LONG, st.integers(PACKED_FROM - 2, PACKED_FROM + 9))
def test_many_integers_are_packed_and_come_back(some: list[int], length: int) -> None:
    ids = tuple(itertools.islice(itertools.cycle(some), length))
    message = Assign(1, ids, (), SamplingParams(1), 0, 0)
    plain = to_plain(message)
    fits = all(-(2**63) <= number < 2**63 for number in some)
    assert isinstance(plain[2], str) == (length >= PACKED_FROM and fits)
    assert decode(encode(message), ToRank) == message


@pytest.mark.parametrize("item", ["x", None, 1.5, Member(0, 1), (1, 2)])
def test_many_values_of_another_type_are_a_list(item: Any) -> None:
    assert isinstance(to_plain((1,) * PACKED_FROM + (item,)), list)


@settings(max_examples=100, deadline=None)
@given(
    st.text(max_size=12)
    | st.sampled_from("Iqdb").flatmap(lambda code: st.binary().map(lambda b: packed(code, b)))
)
def test_what_is_not_packed_integers_is_malformed(text: str) -> None:
    plain = [*to_plain(Assign(1, (), (), SamplingParams(1), 0, 0))]
    plain[2] = text
    try:
        found: Assign = decode(json.dumps(plain).encode(), ToRank)
    except MalformedMessage:
        return
    assert isinstance(found, Assign)
    assert all(type(token) is int for token in found.prompt)


def packed(code: str, data: bytes) -> str:
    return code + base64.b64encode(data).decode()


def test_packed_integers_are_no_values_of_another_type() -> None:
    report = to_plain(messages.View(1, ()))
    report[2] = packed("I", bytes(8))
    with pytest.raises(MalformedMessage):
        decode(json.dumps(["Numbered", 1, report]).encode(), Numbered)
