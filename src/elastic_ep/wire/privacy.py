"""What of an event is a client's text, and the form of events without it. Standard library only.

A field that tells of a text is marked where it is declared: ``token: TokenId``, ``seed: Annotated[int, PRIVATE]``.
Without text, such a field is the same whatever it held, but for the length of a sequence of tokens. No decision of
a machine may depend on more than that, so events without text lead fresh machines to the same effects.
"""

from __future__ import annotations

import base64
import operator
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Final, TypeAlias


class _Private:
    def __repr__(self) -> str:
        return "PRIVATE"


PRIVATE: Final = _Private()
"""Marks a field that holds a client's text, or what the text can be told from."""
TokenId: TypeAlias = Annotated[int, PRIVATE]

BLANK: Final = "blank"
"""``{"blank": n}`` stands for n tokens; `expanded` makes them zeros again."""
MAX_BLANK: Final = 1 << 24

Blank: TypeAlias = Callable[[Any], Any]
"""What is left of a private value, as JSON takes it."""

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|[^\s\[({,;:]*\d[^\s\])},;:]*|[^\s\[({,;:]{25,}")

_SCALARS = {int, str, float, bool, type(None)}
_EMPTY: dict[Any, Any] = {int: 0, float: 0.0, bool: False, str: "", bytes: "", tuple: [], list: []}


def without_text(value: Any) -> Any:
    """As `codec.to_plain`, with the private fields blank."""
    cls = type(value)
    if cls in _SCALARS:
        return value
    return (_encoders.get(cls) or _learned(cls))(value)


def expanded(pairs: dict[str, Any]) -> Any:
    """An `object_hook` for `json.loads`. Raises ValueError for a blank that no request can have had."""
    if pairs.keys() != {BLANK}:
        return pairs
    length = pairs[BLANK]
    if type(length) is not int or not 0 <= length <= MAX_BLANK:
        raise ValueError(f"a blank of {length!r} tokens")
    return [0] * length


def masked(text: str) -> str:
    """`text` without what an exception may quote: what stands in quotes, words with a digit, and very long words."""
    return _QUOTED.sub("_", text)


def blanks(cls: type) -> tuple[Blank | None, ...]:
    """For each field of a dataclass or named tuple what blanks it, None where it is not private.

    Raises TypeError for a mark in a place where nobody looks.
    """
    if cls not in _blanks:
        hints = typing.get_type_hints(cls, include_extras=True)
        names = [field.name for field in fields(cls)] if is_dataclass(cls) else list(hints)
        _blanks[cls] = tuple(_blank(hints[name], f"{cls.__name__}.{name}") for name in names)
    return _blanks[cls]


def _blank(hint: Any, where: str) -> Blank | None:
    if not _marked(hint):
        return None
    if typing.get_origin(hint) is Annotated:
        empty = _empty(typing.get_args(hint)[0], where)
        return lambda _value: empty
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (tuple, list) and arguments[0] == TokenId and arguments[1:] in ((), (...,)):
        return lambda value: {BLANK: len(value)}
    raise TypeError(f"{where}: mark the whole of {hint} as private, or each item of a sequence of tokens")


def _marked(hint: Any) -> bool:
    if typing.get_origin(hint) is Annotated and PRIVATE in typing.get_args(hint)[1:]:
        return True
    return any(_marked(argument) for argument in typing.get_args(hint))


def _empty(hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint) or hint
    if origin in (typing.Union, types.UnionType) and type(None) in typing.get_args(hint):
        return None
    if origin not in _EMPTY:
        raise TypeError(f"{where}: what is an empty {hint}?")
    return _EMPTY[origin]


_blanks: dict[type, tuple[Blank | None, ...]] = {}
_encoders: dict[type, Blank] = {}


def _learned(cls: type) -> Blank:
    return _encoders.setdefault(cls, _encoder(cls))


def _items(value: Sequence[Any]) -> list[Any]:
    """Without a call for each item: a step's tokens pass here."""
    known = _encoders.get
    return [
        item if (cls := type(item)) in _SCALARS else (known(cls) or _learned(cls))(item) for item in value
    ]


def _encoder(cls: type) -> Blank:
    if cls is tuple or cls is list:
        return _items
    if issubclass(cls, tuple):
        return _row_encoder(cls) or _fields_encoder(cls, tuple, [])
    if is_dataclass(cls):
        if hasattr(cls, "plain_fields"):
            return lambda value: [cls.__name__, *value.plain_fields()]  # plain, as they say
        return _fields_encoder(cls, _getter([field.name for field in fields(cls)]), [cls.__name__])
    if cls is bytes:
        return lambda value: base64.b64encode(value).decode()
    return lambda value: value  # a StrEnum is a string to JSON


def _row_encoder(cls: type) -> Blank | None:
    """For a named tuple of scalars, the private ones among which are blanked by constants: a token, above all."""
    hints = typing.get_type_hints(cls, include_extras=True)
    empty: list[Any] = []
    places: list[int] = []
    for place, (name, hint) in enumerate(hints.items()):
        if typing.get_origin(hint) is Annotated and _marked(hint):
            places.append(len(hints) + len(empty))
            empty.append(_empty(typing.get_args(hint)[0], f"{cls.__name__}.{name}"))
        elif _SCALARS.issuperset(typing.get_args(hint) or (hint,)):
            places.append(place)
        else:
            return None
    if not empty:
        return lambda value: value  # a list to JSON
    blank, pick = tuple(empty), operator.itemgetter(*places)
    return lambda value: pick(value + blank)


def _fields_encoder(cls: type, parts: Callable[[Any], Sequence[Any]], head: list[str]) -> Blank:
    encoders = [blank or without_text for blank in blanks(cls)]
    return lambda value: head + [encode(part) for encode, part in zip(encoders, parts(value), strict=True)]


def _getter(names: Sequence[str]) -> Callable[[Any], Sequence[Any]]:
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda value: [getattr(value, name) for name in names]
