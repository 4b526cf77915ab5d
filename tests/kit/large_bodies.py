"""The largest requests of each kind that the server takes, for a model with a long context."""

from __future__ import annotations

from typing import Any

CONTEXT = 262_144
"""The model's, tokens."""
MESSAGE = 3_900_000
"""Characters: with the rest, just below the largest body."""
SENTENCE = "Tom has 12 apples and quickly buys 30 more. "


def bodies() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name to path and body."""
    text = (SENTENCE * (MESSAGE // len(SENTENCE) + 1))[:MESSAGE]
    message = {"role": "user", "content": "a"}
    kwargs = {f"key {i}": [SENTENCE] * 10 for i in range(8000)}
    return {
        "one message of 3.9 MB": ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}),
        "60,000 messages": ("/v1/chat/completions", {"messages": [message] * 60_000}),
        "1,000 messages": ("/v1/chat/completions", {"messages": [message] * 1000}),
        "template variables, 3.7 MB": (
            "/v1/chat/completions", {"messages": [message], "chat_template_kwargs": kwargs}
        ),
        "200 prompts, 3.9 MB": ("/v1/completions", {"prompt": [text[: MESSAGE // 200]] * 200}),
        "600 KB to tokenize": ("/tokenize", {"prompt": text[:600_000]}),
        "250,000 token ids to detokenize": ("/detokenize", {"tokens": [17] * 250_000}),
        "600,000 token ids": ("/v1/completions", {"prompt": [17] * 600_000}),
        "100,000 token ids": ("/v1/completions", {"prompt": [17] * 100_000, "max_tokens": 1}),
        "100,000 token ids, n=64": ("/v1/completions", {"prompt": [17] * 100_000, "n": 64, "temperature": 1}),
        "a prompt of 400 KB": ("/v1/completions", {"prompt": text[:400_000]}),
    }  # fmt: skip
