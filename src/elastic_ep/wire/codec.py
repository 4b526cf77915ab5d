"""Frozen dataclasses and named tuples to bytes and back, checked against their declared types by msgspec.

Each record is an array ``[type name, field, ...]`` of exactly that length. Messages between processes are MessagePack
(`pack`, `unpack`); the event log and what people may want to read are JSON.

msgspec has no unions of dataclasses. So for each a struct with the same fields is made, which it decodes to and the
dataclass is built from; what holds no dataclass it decodes as it is.
"""

from __future__ import annotations

import base64
import binascii
import functools
import json
import operator
import re
import types
import typing
from array import array
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import msgspec


class MalformedMessage(ValueError):
    """The bytes are not one of this project's messages."""


_T = TypeVar("_T")
_Build = Callable[[Any], Any]


def to_plain(value: Any) -> Any:
    """`value` as JSON takes it: a dataclass becomes ``[type name, field, ...]``, a named tuple a list of its fields.

    Bytes become base64 text, and so do many integers, `PACKED_FROM` or more in a tuple: a long prompt would take tens of
    milliseconds as a list, on the event loop at one end and in a rank's control loop at the other. A named tuple holds
    scalars (no bytes) and other named tuples only. A class that has `plain_fields` says itself which fields, as JSON
    takes them and without text; it is for the log only, and cannot be read back.
    """
    cls = type(value)
    if cls in _PLAIN:
        return value
    if cls is tuple or cls is list:
        if len(value) >= PACKED_FROM and (packed := _packed(value)) is not None:
            return packed
        return [item if type(item) in _PLAIN else to_plain(item) for item in value]
    if issubclass(cls, tuple):
        _PLAIN.add(cls)
        return value
    if is_dataclass(cls):
        parts = _getter(cls)(value)
        return [cls.__name__, *[part if type(part) in _PLAIN else to_plain(part) for part in parts]]
    if cls is bytes:
        return base64.b64encode(value).decode()
    return value  # a StrEnum is a string to JSON


def encode(message: Any) -> bytes:
    """JSON."""
    return json.dumps(to_plain(message), separators=(",", ":")).encode()


def decode(data: bytes, expected: type[_T] | Any) -> _T:
    """The inverse of `encode`: what it gives is of the type (or union of types) `expected`.

    Raises `MalformedMessage`.
    """
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"not JSON: {data[:80]!r}") from error
    return cast(_T, from_plain(plain, expected))


def from_plain(plain: Any, expected: type[_T] | Any) -> _T:
    """The inverse of `to_plain`, checked against `expected`. Raises `MalformedMessage`."""
    return cast(_T, _read(expected, lambda shape: msgspec.convert(plain, shape)))


def pack(message: Any) -> bytes:
    """MessagePack. Raises OverflowError for an integer that 64 bits do not hold.

    Half a surrogate pair in a text (a file's name that is not UTF-8, in a reason) becomes a question mark.
    """
    row = _row(message)
    try:
        return _pack_plain(row)
    except UnicodeEncodeError:
        return _pack_plain(_utf8(row))


def unpack(data: bytes, expected: type[_T] | Any) -> _T:
    """The inverse of `pack`, checked against `expected`. Raises `MalformedMessage`."""
    return cast(_T, _read(expected, lambda _shape: _decoder(cast(Any, expected)).decode(data)))


def check(value: Any, expected: Any) -> None:
    """Raise `MalformedMessage`, which names the field, unless `value` comes through `pack` and `unpack` unchanged."""
    try:
        same = unpack(pack(value), expected) == value
    except (TypeError, OverflowError) as error:
        raise MalformedMessage(f"not {_name(expected)}: {error}") from error
    if not same:
        raise MalformedMessage(f"not {_name(expected)}: a field has another type than is declared")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


PACKED_FROM = 256


def _packed(values: Sequence[Any]) -> str | None:
    """Type code (as in `array`), then the little-endian items as base64; None if they are not integers that fit."""
    for code in ("I", "q"):
        try:
            items = array(code, values)
        except OverflowError:
            continue
        except TypeError:
            return None
        return code + base64.b64encode(items.tobytes()).decode()
    return None


def _unpack(text: str) -> array[int]:
    """Raises `MalformedMessage`."""
    try:
        if text[:1] not in ("I", "q"):
            raise ValueError
        items = array(text[0])
        # Many times as fast as base64.b64decode(validate=True), which looks for foreign characters with a pattern.
        items.frombytes(binascii.a2b_base64(text[1:], strict_mode=True))
    except ValueError as error:
        raise MalformedMessage(f"not a list, nor packed integers: {text[:80]!r}") from error
    return items


_PLAIN = {int, str, float, bool, type(None)}
"""What JSON takes as it is. Named tuples join when first seen: they are lists to it."""


@functools.cache
def _getter(cls: Any) -> Callable[[Any], tuple[Any, ...]]:
    """All fields at once: the messages of every step pass here."""
    if hasattr(cls, "plain_fields"):
        return cast(Callable[[Any], tuple[Any, ...]], cls.plain_fields)
    names = _names(cls)
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: tuple([getattr(value, name) for name in names])


@functools.cache
def _names(cls: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


_tuple: Any = tuple
_pack_plain = msgspec.msgpack.Encoder().encode
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


def _row(record: Any) -> list[Any]:
    """`record` as msgspec takes it: the dataclasses in it are rows too."""
    cls: Any = type(record)
    row = [cls.__name__, *_getter(cls)(record)]
    for place in _nested(cls):
        row[place] = _rows(row[place])
    return row


def _rows(value: Any) -> Any:
    if type(value) is tuple:
        return [_rows(item) for item in value]
    return _row(value) if is_dataclass(value) else value


@functools.cache
def _nested(cls: type) -> tuple[int, ...]:
    """Where in a row there may be dataclasses."""
    return tuple(place for place, hint in enumerate(_hints(cls).values(), 1) if _has_record(hint))


def _has_record(hint: Any) -> bool:
    return is_dataclass(hint) or any(map(_has_record, typing.get_args(hint)))


def _utf8(plain: Any) -> Any:
    if isinstance(plain, str):
        return plain.encode("utf-8", "replace").decode()
    return [_utf8(item) for item in plain] if isinstance(plain, list | tuple) else plain


def _read(expected: Any, parse: Callable[[Any], Any]) -> Any:
    shape, build = _shape(expected)
    try:
        plain = parse(shape)
    except _UNREADABLE as error:
        raise MalformedMessage(f"not {_name(expected)}: {_in_words(str(error), expected)}") from error
    return build(plain) if build else plain


def _name(expected: Any) -> str:
    arms = typing.get_args(expected)
    return f"one of {len(arms)} messages" if len(arms) > 1 else f"a {getattr(expected, '__name__', expected)}"


def _in_words(error: str, expected: Any) -> str:
    """`error` with the field's name in place of its number, where it can be only one."""
    place = re.search(r"\$\[([1-9]\d*)\]", error)
    if place is None or not is_dataclass(expected):
        return error
    return error.replace(place[0], _names(cast(Any, expected))[int(place[1]) - 1], 1)


@functools.cache
def _decoder(expected: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(_shape(expected)[0])


@functools.cache
def _shape(hint: Any) -> tuple[Any, _Build | None]:
    """What msgspec is to decode, and what makes a value of `hint` of that; None where it is one already."""
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union_shape(arms)
    if origin is tuple:
        return _sequence_shape(arms[0])
    if isinstance(hint, type) and issubclass(hint, tuple):
        return _named_tuple_shape(hint)
    if is_dataclass(hint):
        return _record_shape(hint)
    return hint, None


def _union_shape(arms: tuple[Any, ...]) -> tuple[Any, _Build | None]:
    shapes = [_shape(arm) for arm in arms]
    builds = {shape: build for shape, build in shapes if build and isinstance(shape, type)}
    # msgspec allows one kind of array besides the structs.
    of_array = next((build for shape, build in shapes if build and shape not in builds), None)

    def build(plain: Any) -> Any:
        if (record := builds.get(type(plain))) is not None:
            return record(plain)
        return of_array(plain) if of_array and type(plain) in (tuple, str) else plain

    return typing.Union[tuple(shape for shape, _ in shapes)], build if builds or of_array else None  # noqa: UP007


def _sequence_shape(item: Any) -> tuple[Any, _Build | None]:
    shape, build = _shape(item)
    if getattr(item, "__origin__", item) is int:  # Annotated[int, ...] too, but no tuple of them
        return _tuple[shape, ...] | str, lambda plain: tuple(_unpack(plain)) if type(plain) is str else plain
    if build is None:
        return _tuple[shape, ...], None
    return _tuple[shape, ...], lambda plain: tuple([build(entry) for entry in plain])


def _named_tuple_shape(cls: Any) -> tuple[Any, _Build | None]:
    """HAZARD: msgspec fills what a row lacks with defaults; it must be of the exact length."""
    shapes = [_shape(hint) for hint in _hints(cls).values()]
    if not cls._field_defaults and not any(build for _, build in shapes):
        return cls, None
    return _tuple[tuple(shape for shape, _ in shapes)], _builder(cls, shapes, lambda plain: plain)


def _record_shape(cls: Any) -> tuple[Any, _Build | None]:
    hints = _hints(cls)
    shapes = [_shape(hints[name]) for name in _names(cls)]
    struct = msgspec.defstruct(
        cls.__name__,
        [(name, shape) for name, (shape, _) in zip(_names(cls), shapes, strict=True)],
        array_like=True, tag=cls.__name__, forbid_unknown_fields=True,
    )  # fmt: skip
    return struct, _builder(cls, shapes, msgspec.structs.astuple)


def _builder(
    cls: Callable[..., Any],
    shapes: Sequence[tuple[Any, _Build | None]],
    parts: Callable[[Any], tuple[Any, ...]],
) -> _Build:
    builds = [(place, build) for place, (_, build) in enumerate(shapes) if build]
    if not builds:
        return lambda plain: cls(*parts(plain))

    def build(plain: Any) -> Any:
        values = list(parts(plain))
        for place, make in builds:
            values[place] = make(values[place])
        return cls(*values)

    return build
