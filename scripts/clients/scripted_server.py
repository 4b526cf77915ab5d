"""The HTTP front alone, before a model that always writes two calls of tools: how clients read what `auto` gives.

    python -m scripts.clients.scripted_server API_KEY

It prints its URL, and ends with its parent.
"""

from __future__ import annotations

import asyncio
import sys

from tests.gateway.conftest import settings
from tests.gateway.fakes import FakeBackend, byte_level_tokenizer, says
from tests.kit.served import TOOL_TEMPLATE

from elastic_ep.gateway.app import create_app, serve
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.group.metrics import Metrics

CALLS = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {"city": "Oslo", "days": 1}}\n</tool_call>'
)


def text() -> ChatTokenizer:
    return ChatTokenizer(byte_level_tokenizer(), TOOL_TEMPLATE.read_text(), {"eos_token": "<|im_end|>"})


async def main() -> None:
    chosen = settings(
        model_name="default", api_keys=(sys.argv[1],), tool_call_parser="hermes", max_model_len=65536
    )
    app = create_app(FakeBackend(says(CALLS)), chosen, text(), Metrics(), text)
    listening = await serve(app, "127.0.0.1", 0)
    print(listening.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
