"""Every message survives the wire, and nothing else gets through."""

from __future__ import annotations

import base64
import itertools
import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from elastic_ep.wire import messages
from elastic_ep.wire.codec import PACKED_FROM, MalformedMessage, check, decode, encode, pack, to_plain, unpack
from elastic_ep.wire.messages import (
    Assign,
    FromRank,
    Member,
    Numbered,
    RankReport,
    RankState,
    SamplingParams,
    ToRank,
)
from elastic_ep.wire.privacy import TokenId
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
        int: st.integers(-(2**63), 2**64 - 1),
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


READ_AND_WRITTEN = [(encode, decode), (pack, unpack)]


@pytest.mark.parametrize(("write", "read"), READ_AND_WRITTEN, ids=["json", "messagepack"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind.__name__))
def test_round_trip(kind: Any, write: Any, read: Any) -> None:
    @settings(max_examples=30, deadline=None)
    @given(values(kind))
    def hold(message: Any) -> None:
        found = read(write(message), kind)
        assert found == message
        assert repr(found) == repr(message), "equal, but of another type"

    hold()


UNIONS = [FromRank, ToRank, Numbered]
OTHERS: list[Any] = [None, True, 7, 1.5, "x", "1", b"x", [], {}]


@pytest.mark.parametrize("union", UNIONS, ids=["from a rank", "to a rank", "published"])
def test_nothing_but_a_whole_message_is_one(union: Any) -> None:
    @settings(max_examples=150, deadline=None)
    @given(values(union), st.data())
    def hold(message: Any, data: st.DataObject) -> None:
        packed = pack(message)
        for wrong in (
            packed[: data.draw(st.integers(0, len(packed) - 1))],
            packed + data.draw(st.binary(min_size=1)),
        ):
            with pytest.raises(MalformedMessage):
                unpack(wrong, union)
        row = msgspec.msgpack.decode(packed)
        for other in (
            row[:-1],
            [*row, None],
            [*row, 0],
            ["Unknown", *row[1:]],
            row[1:],
            dict.fromkeys(row[:1]),
        ):
            with pytest.raises(MalformedMessage):
                unpack(msgspec.msgpack.encode(other), union)

    hold()


@pytest.mark.parametrize("union", UNIONS, ids=["from a rank", "to a rank", "published"])
def test_whatever_is_changed_inside_is_refused_or_read_as_it_stands(union: Any) -> None:
    """Nothing is filled in, left out or taken for another type; but a whole number may stand for a float."""

    @settings(max_examples=300, deadline=None)
    @given(values(union), st.data())
    def hold(message: Any, data: st.DataObject) -> None:
        row = msgspec.msgpack.decode(pack(message))
        holder, place = data.draw(st.sampled_from(list(places(row))))
        was = holder[place]
        changes = [other for other in OTHERS if not (type(other) is int and type(was) is float)]
        if isinstance(was, list):
            changes += [was[:-1], [*was, None], [*was, 0], [*was, *was[-1:]]]
        holder[place] = data.draw(st.sampled_from(changes))
        changed = msgspec.msgpack.encode(row)
        try:
            found = unpack(changed, union)
        except MalformedMessage:
            return
        assert pack(found) == changed
        assert isinstance(found, typing.get_args(union) or union)

    hold()


def places(row: list[Any]) -> Iterator[tuple[list[Any], int]]:
    for place, item in enumerate(row):
        yield row, place
        if isinstance(item, list):
            yield from places(item)


@settings(max_examples=60, deadline=None)
@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b"\x91" * 100_000)
@example(b"\xdd\xff\xff\xff\xff" * 3)
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\x92\xa5Hello\xc7\x08\x01abcdefgh")
@example(b"\x92\xa1\xff\x01")
def test_what_is_not_a_message_is_malformed(data: bytes) -> None:
    for read in (decode, unpack):
        with pytest.raises(MalformedMessage):
            read(data, FromRank)


@settings(max_examples=60, deadline=None)
@given(values(messages.StepReport), st.integers(0, 3), JSON)
def test_one_wrong_field_is_malformed_or_of_its_type(report: Any, place: int, value: Any) -> None:
    plain = to_plain(report)
    plain[1 + place] = value
    if type(value) is int:
        return
    with pytest.raises(MalformedMessage):
        decode(json.dumps(plain).encode(), FromRank)


TOKEN: list[Any] = [1, 2, 3, None, None, []]


@pytest.mark.parametrize("row", [*(TOKEN[:length] for length in range(6)), [*TOKEN, 0], [*TOKEN, None]])
def test_a_row_is_not_filled_with_defaults(row: list[Any]) -> None:
    report = messages.StepReport(1, 1, 1, 1, (messages.Token(1, 2, 3),), 1, 1, 1, 1)
    plain = msgspec.msgpack.decode(pack(report))
    assert plain[5] == [TOKEN]
    plain[5] = [row]
    for data, read in ((msgspec.msgpack.encode(plain), unpack), (msgspec.json.encode(plain), decode)):
        with pytest.raises(MalformedMessage):
            read(data, FromRank)


def test_an_error_names_the_field() -> None:
    row = msgspec.msgpack.decode(pack(Assign(1, (), (), SamplingParams(1), 0, 0)))
    row[2] = [1, "x"]
    with pytest.raises(MalformedMessage, match=r"not a Assign: Expected `int`, got `str` - at `prompt\[1\]`"):
        unpack(msgspec.msgpack.encode(row), Assign)


def test_a_reason_with_a_file_name_that_is_not_utf_8_can_be_said() -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    report = RankReport(RankState.FAILED, f"{name}: no such file", (1,))
    assert unpack(pack(report), FromRank) == replace(report, reason="caf?: no such file")
    assert decode(encode(report), FromRank) == report


SAMPLING: Any = SamplingParams
REQUEST: Any = Assign(1, (5,), (), SamplingParams(1), 0, 0)


@settings(deadline=None)
@given(values(Assign))
def test_what_passes_the_check_can_be_sent(request: Assign) -> None:
    check(request, Assign)
    unpack(pack(request), Assign)


@pytest.mark.parametrize(
    "wrong",
    [
        replace(REQUEST, seed=2**64), replace(REQUEST, seed=-(2**63) - 1), replace(REQUEST, seed=True),
        replace(REQUEST, prompt=[5]), replace(REQUEST, prompt=(5, 2**70)), replace(REQUEST, prompt=(5, 5.0)),
        replace(REQUEST, prompt="5"), replace(REQUEST, params=None), replace(REQUEST, params=SAMPLING(1.0)),
        replace(REQUEST, seed=object()), replace(REQUEST, params=SAMPLING(1, top_p="1")), None, (1,),
        SamplingParams(1),
    ],
)  # fmt: skip
def test_what_could_not_be_sent_does_not_pass_the_check(wrong: Any) -> None:
    with pytest.raises(MalformedMessage):
        check(wrong, Assign)


@pytest.mark.parametrize("value", ["AA", "A===", "é", "AA==\n", 1, None, ["AA=="]])
def test_bytes_that_are_not_base64_are_malformed(value: Any) -> None:
    plain = to_plain(StoreSet("key", b"\0"))
    assert decode(json.dumps(plain).encode(), FromRank) == StoreSet("key", b"\0")
    plain[-1] = value
    with pytest.raises(MalformedMessage):
        decode(json.dumps(plain).encode(), FromRank)


@dataclass(frozen=True)
class Nested:
    rows: tuple[tuple[int, ...], ...]
    layers: tuple[tuple[tuple[int, ...], ...], ...]
    maybe: tuple[tuple[TokenId, ...] | None, ...]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(PACKED_FROM - 2, PACKED_FROM + 2), max_size=3))
def test_rows_of_many_integers_come_back(lengths: list[int]) -> None:
    """As the slots of a placement, with more experts in a layer than a row's list is written out for."""
    rows = tuple(tuple(range(length)) for length in lengths)
    for record in (Nested(rows, (rows, rows), (*rows, None)), Nested(((1, 2),) * PACKED_FROM, (), ())):
        assert [decode(encode(record), Nested), unpack(pack(record), Nested)] == [record, record]


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
