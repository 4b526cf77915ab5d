"""The fields of /v1/chat/completions that make its prompt: messages, and what else a chat template is given."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Discriminator, Field, Tag
from typing_extensions import TypedDict

from elastic_ep.gateway.fields import Array, Body, Refused, Text, as_written, fault
from elastic_ep.gateway.text.chat_template import RESERVED

_OLD = "the format before 'tools': say it as 'tool_calls'"
_OF_THE_REQUEST = sorted(RESERVED | {"chat_template", "continue_final_message"})


@as_written
class TextPart(TypedDict):
    """What is not listed stays as it is, here and in a message: a chat template may know it."""

    type: Annotated[Any, Refused(("text",))]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("|text")] | Annotated[list[TextPart], Array(), Tag("|parts")],
    Discriminator(lambda value: "|parts" if isinstance(value, list) else "|text"),
]
"""A string, or OpenAI's list of text parts; the template gets it in the form it wants."""


Name = Annotated[Text, Field(min_length=1, max_length=256)]
"""Of a tool."""


@as_written
class FunctionCall(TypedDict):
    name: Name
    arguments: NotRequired[Text | None]


@as_written
class ToolCall(TypedDict):
    """What the model called before. The template gets its arguments as an object, which is what templates want."""

    id: NotRequired[Text | None]
    type: NotRequired[Annotated[Any, Refused(("function",), "tools are functions here")]]
    function: FunctionCall


@as_written
class Function(TypedDict):
    name: Name
    description: NotRequired[Text | None]
    parameters: NotRequired[dict[str, Any] | None]
    strict: NotRequired[bool | None]


@as_written
class FunctionTool(TypedDict):
    type: Annotated[Any, Refused(("function",), "tools are functions here")]
    function: Function


@as_written
class NamedFunction(TypedDict):
    name: Name


@as_written
class NamedTool(TypedDict):
    type: Annotated[Any, Refused(("function",), "a choice is a word or names a function")]
    function: NamedFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("|word")] | Annotated[NamedTool, Tag("|named")],
    Discriminator(lambda value: "|named" if isinstance(value, dict) else "|word"),
]


@as_written
class Message(TypedDict):
    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: NotRequired[Content | None]
    name: NotRequired[Text | None]
    reasoning_content: NotRequired[Text | None]
    tool_calls: NotRequired[Annotated[list[ToolCall], Array()] | None]
    tool_call_id: NotRequired[Text | None]
    function_call: NotRequired[Annotated[Any, Refused((), _OLD)]]
    audio: NotRequired[Annotated[Any, Refused((), "it takes and gives text alone")]]


def _beside(variables: dict[str, Any]) -> dict[str, Any]:
    for name in _OF_THE_REQUEST:
        if name in variables:
            raise fault(
                "invalid_value", "belongs beside 'chat_template_kwargs', not into it.", inside=f".{name}"
            )
    return variables


TemplateVariables = Annotated[
    dict[str, Any],
    AfterValidator(_beside),
    Field(json_schema_extra={"not": {"anyOf": [{"required": [name]} for name in _OF_THE_REQUEST]}}),
]


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
MOST_TOOLS = 1024


class ChatPrompt(Body):
    messages: Annotated[list[Message], Array(1)]
    add_generation_prompt: bool | None = Field(
        None, description="Default true, unless continue_final_message is."
    )
    continue_final_message: bool = Field(False, description="Go on with the last message, do not close it.")
    add_special_tokens: bool = False
    chat_template_kwargs: TemplateVariables | None = Field(
        None, description="Variables for the chat template."
    )
    chat_template: Text | None = Field(
        None, description="A template, or the name of one of the model's, to use instead."
    )
    reasoning_effort: Effort | None = Field(
        None, description="For chat templates that look at it; medium for all others."
    )
    tools: Annotated[list[FunctionTool], Array(most=MOST_TOOLS)] = Field(
        [],
        description="For chat templates that show them; and what may be called. Strict or not, a call is sure to fit its "
        "parameters where tool_choice makes it certain; else it is as the model writes it.",
    )
    documents: Annotated[list[dict[str, Any]], Array()] | None = Field(
        None, description="For chat templates that show documents."
    )

    @property
    def begins_a_message(self) -> bool:
        """As told, or unless the last one is gone on with."""
        return (
            not self.continue_final_message
            if self.add_generation_prompt is None
            else self.add_generation_prompt
        )
