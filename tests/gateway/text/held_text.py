"""A text that does in its process what a test's prompt tells it to."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from tests.gateway.fakes import TEMPLATE, byte_level_tokenizer


class HeldText(ChatTokenizer):
    """A prompt of one word and a path: "die" ends the process, "die-once" if the path does not exist yet, "hold"
    opens the path, a FIFO, and waits until its writer closes it. Decoding token 0 alone is a defect."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        order, _, path = text.partition(" ")
        path = path.strip()
        if order == "die" or (order == "die-once" and not Path(path).exists()):
            Path(path).touch()
            os._exit(9)
        if order == "hold":
            Path(path).read_bytes()
        return super().encode(text, add_special_tokens=add_special_tokens)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        if list(tokens) == [0]:
            raise ZeroDivisionError
        return super().decode(tokens, skip_special_tokens=skip_special_tokens)


def held_text() -> ChatTokenizer:
    return HeldText(byte_level_tokenizer(), TEMPLATE)


def broken_text() -> ChatTokenizer:
    raise ValueError("tokenizer.json is missing")


def text_after_a_death(marker: str) -> ChatTokenizer:
    """The process that loads it first is killed meanwhile."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return held_text()
