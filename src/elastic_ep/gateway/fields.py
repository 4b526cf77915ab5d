"""Reading request bodies by table: a field has a kind (type and range) and a default.

A kind checks a JSON value and gives it back in the type that the server works with, or raises `ApiError`
naming the field. It also describes itself as JSON Schema, so the OpenAPI description cannot differ from what
is checked. Null means "not given" everywhere, and fields that no table lists are ignored, as in vLLM; a table lists all
that OpenAI, vLLM and SGLang know, with what cannot be honoured as `OneOf` the values that ask for nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from elastic_ep.gateway.errors import ApiError

Schema = dict[str, Any]


class Kind(Protocol):
    def read(self, value: Any, param: str) -> Any:
        """`value` checked and converted. Raises `ApiError` naming `param`."""
        ...

    def schema(self) -> Schema: ...


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    kind: Kind
    default: Any = None
    required: bool = False
    about: str = ""
    """For people, in the OpenAPI description and in docs/api.md."""


def read_fields(body: Mapping[str, Any], table: Iterable[Field], within: str = "") -> dict[str, Any]:
    """The fields of `table` as they are in `body`, which is the value of `within`. Raises `ApiError`."""
    values = {}
    for field in table:
        value = body.get(field.name)
        param = within + field.name
        if value is not None:
            values[field.name] = field.kind.read(value, param)
        elif field.required:
            raise ApiError(f"'{param}' is required.", param=param, code="missing_required_parameter")
        else:
            values[field.name] = field.default
    return values


def unknown_fields(body: Mapping[str, Any], table: Iterable[Field], within: str = "") -> Iterator[str]:
    """Names in `body`, and in its objects that have a table of their own, that no table lists."""
    known = {field.name: field.kind for field in table}
    for name, value in body.items():
        kind = known.get(name)
        if kind is None:
            yield within + name
        elif isinstance(kind, Object) and kind.table and isinstance(value, dict):
            yield from unknown_fields(value, kind.table, f"{within}{name}.")


def object_schema(table: Iterable[Field]) -> Schema:
    """The JSON Schema of an object with the fields of `table`."""
    listed = tuple(table)
    properties = {}
    for field in listed:
        schema = field.kind.schema()
        schema = schema if field.required else {"anyOf": [schema, {"type": "null"}]}
        properties[field.name] = {**schema, "description": field.about} if field.about else schema
    required = [field.name for field in listed if field.required]
    return {"type": "object", "properties": properties, **({"required": required} if required else {})}


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises `ApiError`."""
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError("The request body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(f"The request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError("The request body must be a JSON object.", code="invalid_json")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def wrong_type(param: str, expected: str, value: Any) -> ApiError:
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string", list: "an array"}
    given = names.get(type(value), "an object")
    return ApiError(f"'{param}' must be {expected}, not {given}.", param=param, code="invalid_type")


def bad_value(param: str, message: str) -> ApiError:
    return ApiError(f"'{param}' {message}", param=param, code="invalid_value")


@dataclass(frozen=True, slots=True)
class Boolean:
    def read(self, value: Any, param: str) -> bool:
        if not isinstance(value, bool):
            raise wrong_type(param, "a boolean", value)
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Integer:
    low: int
    high: int

    def read(self, value: Any, param: str) -> int:
        # JSON does not tell 5 from 5.0, and some clients send the latter.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int:
            raise wrong_type(param, "an integer", value)
        if not self.low <= value <= self.high:
            raise bad_value(param, f"must be between {self.low} and {self.high}.")
        return value

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number in [low, high], or in (low, high] with `above_low`."""

    low: float
    high: float
    above_low: bool = False

    def read(self, value: Any, param: str) -> float:
        if type(value) not in (int, float):
            raise wrong_type(param, "a number", value)
        # Compare before converting: an int can be too large for a float. NaN fails both comparisons.
        if not self.low <= value <= self.high or (self.above_low and value == self.low):
            sign = ">" if self.above_low else ">="
            raise bad_value(param, f"must be {sign} {self.low:g} and <= {self.high:g}.")
        return float(value)

    def schema(self) -> Schema:
        lower = "exclusiveMinimum" if self.above_low else "minimum"
        return {"type": "number", lower: self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class String:
    """Text that can be encoded: JSON escapes can make lone surrogates, which no tokenizer takes."""

    min_length: int = 0
    max_length: int | None = None
    pattern: str | None = None
    """A regular expression for all of it."""

    def read(self, value: Any, param: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(param, "a string", value)
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise bad_value(param, "holds a lone surrogate, which is not valid Unicode text.") from None
        if len(value) < self.min_length:
            raise bad_value(param, "must not be empty.")
        if self.max_length is not None and len(value) > self.max_length:
            raise bad_value(param, f"must have at most {self.max_length} characters.")
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            raise bad_value(param, f"must match {self.pattern}.")
        return value

    def schema(self) -> Schema:
        longest = {} if self.max_length is None else {"maxLength": self.max_length}
        shortest = {"minLength": self.min_length} if self.min_length else {}
        pattern = {} if self.pattern is None else {"pattern": f"^{self.pattern}$"}
        return {"type": "string", **shortest, **longest, **pattern}


@dataclass(frozen=True, slots=True)
class ListOf:
    """An array read to a tuple. With `or_single` one bare item stands for an array of one."""

    item: Kind
    min_items: int = 0
    max_items: int | None = None
    or_single: bool = False

    def read(self, value: Any, param: str) -> tuple[Any, ...]:
        if self.or_single and not isinstance(value, list):
            value = [value]
        if not isinstance(value, list):
            raise wrong_type(param, "an array", value)
        if len(value) < self.min_items:
            raise bad_value(param, "must not be empty.")
        if self.max_items is not None and len(value) > self.max_items:
            raise bad_value(param, f"must have at most {self.max_items} items.")
        return tuple(self.item.read(item, f"{param}[{place}]") for place, item in enumerate(value))

    def schema(self) -> Schema:
        most = {} if self.max_items is None else {"maxItems": self.max_items}
        least = {"minItems": self.min_items} if self.min_items else {}
        array = {"type": "array", "items": self.item.schema(), **least, **most}
        return {"anyOf": [self.item.schema(), array]} if self.or_single else array


@dataclass(frozen=True, slots=True)
class Object:
    """A JSON object read by a table of its own; with an empty table, any object as it is."""

    table: tuple[Field, ...] = ()

    def read(self, value: Any, param: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong_type(param, "an object", value)
        return read_fields(value, self.table, f"{param}.") if self.table else value

    def schema(self) -> Schema:
        return object_schema(self.table)


@dataclass(frozen=True, slots=True)
class Label:
    """Any value: it says who asks, or hints at how to be fast. It never changes an answer, here or elsewhere."""

    def read(self, value: Any, param: str) -> Any:
        return value

    def schema(self) -> Schema:
        return {}


@dataclass(frozen=True, slots=True)
class OneOf:
    """Only these values: for what would change the answer, or its form, and is not implemented.

    Ignoring such a field would be a wrong answer without a word. `why` is what the client is told.
    """

    allowed: tuple[Any, ...] = ()
    why: str = "not implemented"

    def read(self, value: Any, param: str) -> Any:
        if any(_same(value, one) for one in self.allowed):
            return value
        but = f" other than {' or '.join(json.dumps(one) for one in self.allowed)}" if self.allowed else ""
        raise unsupported(param, f"cannot be honoured here with a value{but}: {self.why}.")

    def schema(self) -> Schema:
        return {"enum": list(self.allowed)} if self.allowed else {"type": "null"}


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(f"'{param}' {message}", param=param, code="unsupported_parameter")


def _same(value: Any, other: Any) -> bool:
    """As JSON has it: 1 is 1.0, and neither is true."""
    if type(value) in (int, float) and type(other) in (int, float):
        return bool(value == other)
    return type(value) is type(other) and bool(value == other)
