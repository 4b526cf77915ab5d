"""The models that bodies are read by, made for what a server was told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from elastic_ep.gateway.bodies import (
    Chat,
    Completion,
    Detokenize,
    Tokenize,
    chat_body,
    completion_body,
    detokenize_body,
    tokenize_body,
)
from elastic_ep.gateway.messages.body import Messages, count_body, messages_body
from elastic_ep.gateway.messages.body import Prompt as Counted
from elastic_ep.gateway.responses.body import Responses, responses_body
from elastic_ep.gateway.settings import ApiSettings


@dataclass(frozen=True, slots=True)
class Bodies:
    completion: type[Completion]
    chat: type[Chat]
    tokenize: type[Tokenize]
    detokenize: type[Detokenize]
    responses: type[Responses]
    messages: type[Messages]
    count: type[Counted]


@cache
def prepare(settings: ApiSettings) -> Bodies:
    """HAZARD: to make them takes tens of milliseconds: call it before an event loop runs. They are kept."""
    return Bodies(
        completion=completion_body(settings),
        chat=chat_body(settings),
        tokenize=tokenize_body(settings),
        detokenize=detokenize_body(settings),
        responses=responses_body(settings),
        messages=messages_body(settings),
        count=count_body(settings),
    )
