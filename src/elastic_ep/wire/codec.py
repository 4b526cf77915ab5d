"""Frozen dataclasses and named tuples to JSON and back, checked against their declared types. Standard library only."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import operator
import types
import typing
from array import array
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar, cast


class MalformedMessage(ValueError):
    """The bytes are not one of this project's messages."""


_T = TypeVar("_T")
_Reader = Callable[[Any], Any]


def to_plain(value: Any) -> Any:
    """`value` as JSON takes it: a dataclass becomes ``[type name, field, ...]``, a named tuple a list of its fields.

    Bytes become base64 text, and so do many integers, `PACKED_FROM` or more in a tuple: a long prompt would take tens of
    milliseconds as a list, on the event loop at one end and in a rank's control loop at the other. A named tuple holds
    scalars (no bytes) and other named tuples only. A class that has `plain_fields` says itself which fields; it is for
    the log only, and cannot be read back.
    """
    cls = type(value)
    if cls in _PLAIN:
        return value
    if cls is tuple or cls is list:
        if len(value) >= PACKED_FROM and (packed := _pack(value)) is not None:
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
    return json.dumps(to_plain(message), separators=(",", ":")).encode()


def decode(data: bytes, expected: type[_T] | Any) -> _T:
    """The message in `data`, which must be of the type (or union of types) `expected`.

    Raises `MalformedMessage`.
    """
    try:
        plain = json.loads(data)
    except ValueError as error:
        raise MalformedMessage(f"not JSON: {data[:80]!r}") from error
    except RecursionError as error:
        raise MalformedMessage("nested too deeply") from error
    return typing.cast(_T, _reader(expected)(plain))


def from_plain(plain: Any, expected: type[_T] | Any) -> _T:
    """The inverse of `to_plain`, checked against `expected`. Raises `MalformedMessage`."""
    return typing.cast(_T, _reader(expected)(plain))


def check(value: Any, expected: Any) -> None:
    """Raise `MalformedMessage`, which names the field, unless `value` would come through `decode` as `expected`.

    Far quicker than to try, as long tuples of scalars are not walked through in Python.
    """
    arms = typing.get_args(expected)
    if typing.get_origin(expected) in (typing.Union, types.UnionType):
        if not any(_passes(value, arm) for arm in arms):
            raise _mismatch(value, expected)
    elif typing.get_origin(expected) is tuple:
        if type(value) is not tuple:
            raise _mismatch(value, expected)
        if arms[0] not in _PLAIN:
            for entry in value:
                check(entry, arms[0])
        elif not set(map(type, value)) <= {arms[0]}:
            raise _mismatch(next(entry for entry in value if type(entry) is not arms[0]), arms[0])
    elif is_dataclass(expected) or hasattr(expected, "_fields"):
        if type(value) is not expected:
            raise _mismatch(value, expected)
        for name, hint in _hints(cast(Any, expected)).items():
            try:
                check(getattr(value, name), hint)
            except MalformedMessage as error:
                raise MalformedMessage(f"{name}: {error}") from None
    elif type(value) is not expected and not (expected is float and type(value) is int):
        raise _mismatch(value, expected)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _passes(value: Any, expected: Any) -> bool:
    try:
        check(value, expected)
    except MalformedMessage:
        return False
    return True


def _mismatch(value: Any, expected: Any) -> MalformedMessage:
    return MalformedMessage(f"expected {getattr(expected, '__name__', expected)}, got {str(value)[:80]}")


PACKED_FROM = 256


def _pack(values: Sequence[Any]) -> str | None:
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
_names_cache: dict[type, tuple[str, ...]] = {}
_getters: dict[type, Callable[[Any], tuple[Any, ...]]] = {}
_readers: dict[Any, _Reader] = {}


def _getter(cls: type) -> Callable[[Any], tuple[Any, ...]]:
    """All fields at once: the messages of every step pass here."""
    if cls not in _getters and hasattr(cls, "plain_fields"):
        _getters[cls] = cls.plain_fields
    elif cls not in _getters:
        names = _names(cls)
        one = operator.attrgetter(names[0]) if len(names) == 1 else None
        many = operator.attrgetter(*names) if len(names) > 1 else None
        _getters[cls] = many or ((lambda value: (one(value),)) if one else (lambda _value: ()))
    return _getters[cls]


def _names(cls: type) -> tuple[str, ...]:
    if cls not in _names_cache:
        _names_cache[cls] = tuple(field.name for field in fields(cls))
    return _names_cache[cls]


def _reader(hint: Any) -> _Reader:
    if hint not in _readers:
        _readers[hint] = _make_reader(hint)
    return _readers[hint]


def _make_reader(hint: Any) -> _Reader:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _union_reader(list(typing.get_args(hint)))
    if origin is tuple:
        return _sequence_reader(typing.get_args(hint)[0])
    if isinstance(hint, type) and issubclass(hint, tuple):
        return _named_tuple_reader(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return _record_reader(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_reader(hint)
    if hint is bytes:
        return _read_bytes
    return _scalar_reader(hint)


def _union_reader(arms: list[Any]) -> _Reader:
    records = {str(arm.__name__): _reader(arm) for arm in arms if isinstance(arm, type) and is_dataclass(arm)}
    others = [_reader(arm) for arm in arms if not is_dataclass(arm) and arm is not type(None)]
    optional = type(None) in arms

    def read(plain: Any) -> Any:
        if plain is None and optional:
            return None
        if isinstance(plain, list) and plain and isinstance(plain[0], str) and plain[0] in records:
            return records[plain[0]](plain)
        for other in others:
            return other(plain)
        raise MalformedMessage(f"none of {sorted(records)}: {str(plain)[:80]}")

    return read


def _sequence_reader(item: Any) -> _Reader:
    read_item = _reader(item)

    def read(plain: Any) -> Any:
        if type(plain) is str:
            items = tuple(_unpack(plain))
            return items if item is int else tuple([read_item(entry) for entry in items])
        if not isinstance(plain, list):
            raise MalformedMessage(f"expected a list, got {str(plain)[:80]}")
        return tuple([read_item(entry) for entry in plain])

    return read


def _named_tuple_reader(cls: type) -> _Reader:
    hints = typing.get_type_hints(cls)
    readers = [_reader(hint) for hint in hints.values()]

    def read(plain: Any) -> Any:
        if not isinstance(plain, list) or len(plain) != len(readers):
            raise MalformedMessage(f"expected {list(hints)}, got {str(plain)[:80]}")
        return cls(*[reader(value) for reader, value in zip(readers, plain, strict=True)])

    return read


def _record_reader(cls: type) -> _Reader:
    hints = typing.get_type_hints(cls)
    readers = [_reader(hints[name]) for name in _names(cls)]
    expected = len(readers) + 1

    def read(plain: Any) -> Any:
        if not isinstance(plain, list) or len(plain) != expected or plain[0] != cls.__name__:
            raise MalformedMessage(f"expected {cls.__name__}, got {str(plain)[:80]}")
        return cls(*[reader(value) for reader, value in zip(readers, plain[1:], strict=True)])

    return read


def _enum_reader(cls: type[StrEnum]) -> _Reader:
    def read(plain: Any) -> Any:
        try:
            return cls(plain)
        except ValueError as error:
            raise MalformedMessage(f"not a {cls.__name__}: {plain!r}") from error

    return read


def _read_bytes(plain: Any) -> bytes:
    try:
        return base64.b64decode(plain, validate=True)
    except (TypeError, ValueError) as error:
        raise MalformedMessage(f"not base64: {str(plain)[:80]}") from error


def _scalar_reader(cls: type) -> _Reader:
    def read(plain: Any) -> Any:
        if type(plain) is cls:
            return plain
        if cls is float and type(plain) is int:
            return float(plain)
        raise MalformedMessage(f"expected {cls.__name__}, got {str(plain)[:80]}")

    return read
