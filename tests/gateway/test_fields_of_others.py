"""A field that is known is honoured or refused by name at /v1/responses and /v1/messages, too."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic.types import message_create_params
from openai.types.responses import response_create_params

from elastic_ep.gateway.bodies import chat_body
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.fields import Body, read
from elastic_ep.gateway.messages.body import messages_body
from elastic_ep.gateway.responses.body import responses_body
from tests.gateway.conftest import settings
from tests.gateway.fakes import MODEL

SETTINGS = settings(reasoning_parser="qwen3", tool_call_parser="hermes")
CHAT = chat_body(SETTINGS)
BODIES: dict[str, tuple[type[Body], set[str], dict[str, Any]]] = {
    "responses": (
        responses_body(SETTINGS),
        {*response_create_params.ResponseCreateParamsBase.__annotations__},
        {"input": "x"},
    ),
    "messages": (
        messages_body(SETTINGS),
        {*message_create_params.MessageCreateParamsBase.__annotations__},
        {"model": MODEL, "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]},
    ),
}


@pytest.mark.parametrize("endpoint", BODIES)
def test_every_field_of_clients_and_of_conversations_is_known(endpoint: str) -> None:
    body, official, _ = BODIES[endpoint]
    known = body.model_fields.keys() | body.refused.keys()
    assert official | CHAT.model_fields.keys() | CHAT.refused.keys() <= known


@pytest.mark.parametrize("endpoint", BODIES)
def test_what_another_endpoint_honours_is_not_ignored(endpoint: str) -> None:
    body, _, asked = BODIES[endpoint]
    for name in body.refused:
        with pytest.raises(ApiError) as refused:
            read(body, asked | {name: {"no": "such"}})
        assert (refused.value.code, refused.value.param) == ("unsupported_parameter", name)


DEFAULTS: dict[str, Any] = {
    "n": 1, "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "stop": [], "stop_token_ids": [], "min_p": 0,
    "presence_penalty": 0, "include_reasoning": True, "add_generation_prompt": None, "seed": None, "echo": False,
    "return_token_ids": False, "structured_outputs": None, "truncation_side": "left", "guided_regex": "",
}  # fmt: skip


@pytest.mark.parametrize("endpoint", BODIES)
def test_a_default_of_a_conversation_asks_for_nothing(endpoint: str) -> None:
    body, _, asked = BODIES[endpoint]
    for name, value in DEFAULTS.items():
        read(body, asked | {name: value})
