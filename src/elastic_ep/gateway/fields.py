"""Request bodies on pydantic: what their fields are made of, and how what is wrong with one is told.

Null means "not given" everywhere, and fields that no model lists are ignored, as in vLLM; a model lists all that
OpenAI, vLLM and SGLang know, with what cannot be honoured as `Refused`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
    with_config,
)
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from elastic_ep.gateway.errors import ApiError, prompt_too_long
from elastic_ep.models.config_json import as_integer

Schema = dict[str, Any]
MOST = 2**31 - 1
LONE_SURROGATE = "holds a lone surrogate, which is not valid Unicode text."
"""JSON escapes can make them, and no tokenizer takes them."""
_LONGEST_NAME = 40
"""Of a part of `param`: some are the client's own."""
_NULL = {"type": "null"}
_B = TypeVar("_B", bound="Body")


@dataclass(frozen=True, slots=True)
class Refused:
    """Only null and these values: for what would change the answer, or its form, and is not implemented.

    Ignoring such a field would be a wrong answer without a word. `why` is what the client is told.
    """

    allowed: tuple[Any, ...] = ()
    why: str = "not implemented"

    def read(self, value: Any, inside: str = "") -> Any:
        if value is None or any(_same(value, one) for one in self.allowed):
            return value
        but = f" other than {' or '.join(json.dumps(one) for one in self.allowed)}" if self.allowed else ""
        message = f"cannot be honoured here with a value{but}: {self.why}."
        raise fault("unsupported_parameter", message, inside=inside)

    def schema(self) -> Schema:
        return {"enum": [*self.allowed, None]}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return self.schema()


def _same(value: Any, other: Any) -> bool:
    """As JSON has it: 1 is 1.0, and neither is true."""
    if type(value) in (int, float) and type(other) in (int, float):
        return bool(value == other)
    return type(value) is type(other) and bool(value == other)


@dataclass(frozen=True, slots=True)
class Integer:
    """From `low` to `high`. JSON does not tell 5 from 5.0, and some clients send the latter."""

    low: int
    high: int = MOST

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        whole = core_schema.int_schema(strict=True, ge=self.low, le=self.high)
        return core_schema.no_info_before_validator_function(as_integer, whole)


@dataclass(frozen=True, slots=True)
class Array:
    """So many items. Of those only the first that is wrong is told: a list can have many."""

    least: int = 0
    most: int = MOST

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: Any = handler(source)
        return {**schema, "fail_fast": True, "min_length": self.least, "max_length": self.most}


def is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _encodable(text: str) -> str:
    if not is_encodable(text):
        raise fault("invalid_value", LONE_SURROGATE)
    return text


Text = Annotated[str, AfterValidator(_encodable)]


_CONFIG = ConfigDict(strict=True, extra="allow")
as_written = with_config(_CONFIG)
"""For a `TypedDict` within a body: what it does not list stays as it is."""


class Body(BaseModel):
    """A JSON object; its unknown fields are in `model_extra`."""

    model_config = _CONFIG
    refused: ClassVar[Mapping[str, Refused]] = {}
    """Fields that are known and not honoured."""

    @model_validator(mode="before")
    @classmethod
    def _given(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        given = {}
        for name, value in body.items():
            if name in cls.refused:
                cls.refused[name].read(value, f".{name}")
            elif value is not None:
                given[name] = value
        return given

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        fields = schema["properties"]
        for name in fields.keys() - set(schema.get("required", [])):
            about = {key: fields[name].pop(key) for key in ("default", "description") if key in fields[name]}
            kinds = fields[name].get("anyOf", [fields[name]])
            fields[name] = {"anyOf": kinds if _NULL in kinds else [*kinds, _NULL], **about}
        for name, refused in cls.refused.items():
            fields[name] = {**refused.schema(), "description": f"Refused: {refused.why}."}
        return schema


class Schemas(GenerateJsonSchema):
    """JSON Schema without titles, which would say the name again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def read(kind: type[_B], body: dict[str, Any]) -> _B:
    """Raises `ApiError`, naming the first field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise refusal(error) from None


def parse_object(raw: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises `ApiError`."""
    try:
        text = raw.decode("utf-8")
        # `json.loads` would make a decoder for each body; of a byte order mark it has more to say.
        body = json.loads(text) if text.startswith("\ufeff") else _parse(text)
    except RecursionError:
        raise ApiError("The request body is nested too deeply.", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(f"The request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError("The request body must be a JSON object.", code="invalid_json")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(written: str) -> float:
    """An infinity could not be told again: not to a chat template, and not in an answer."""
    number = float(written)
    if math.isinf(number):
        raise ValueError(f"{written[:_LONGEST_NAME]} is beyond every double")
    return number


_parse = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite).decode


def refusal(error: ValidationError) -> ApiError:
    """What a client is told of the first of its faults; what an object lacks is told after that its kind is not known."""
    faults = error.errors(include_url=False)
    fault = faults[0]
    if fault["type"] == "missing":
        beside = [other for other in faults if other["loc"][:-1] == fault["loc"][:-1]]
        fault = next((other for other in beside if other["type"] == "unsupported_parameter"), fault)
    param, kind, message = _path(fault), fault["type"], fault["msg"]
    match kind:
        case "missing":
            return ApiError(f"'{param}' is required.", param=param, code="missing_required_parameter")
        case "prompt_too_long":
            return prompt_too_long(fault["ctx"]["longest"], fault["ctx"]["tokens"], param)
        case "unsupported_parameter":
            return unsupported(param, message)
        case "string_unicode":  # also a name that no model lists
            return bad_value(param, LONE_SURROGATE)
    message = re.sub(
        r" after validation| or instance of \w+|\.$", "", re.sub(r"^\w+ should", "must", message)
    )
    if isinstance(fault["input"], str):
        message = re.sub(r"\bitem(s?)\b", r"character\1", message)
    message = message.replace("valid dictionary", "valid object").replace("valid list", "valid array")
    code = "invalid_type" if kind.endswith("_type") else "invalid_value"
    return ApiError(f"'{param}' {message}.", param=param, code=code)


def _path(fault: ErrorDetails) -> str:
    """As clients write it: messages[0].content. What unions and keys add to the place is left out."""
    path = ""
    for part in fault["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part[:1] not in ("|", "["):
            path += f".{part[:_LONGEST_NAME]}"
    return (path + fault.get("ctx", {}).get("inside", "")).removeprefix(".") or "body"


def bad_value(param: str, message: str) -> ApiError:
    return ApiError(f"'{param}' {message}", param=param, code="invalid_value")


def unsupported(param: str, message: str) -> ApiError:
    return ApiError(f"'{param}' {message}", param=param, code="unsupported_parameter")


def fault(code: str, message: str, **about: Any) -> PydanticCustomError:
    """For validators to raise; `refusal` puts the field's name, and `inside` it, before `message`."""
    return PydanticCustomError(code, "{message}", {"message": message, **about})
