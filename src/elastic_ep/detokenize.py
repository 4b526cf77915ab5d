"""Token ids to text, one token at a time, without ever showing half a character.

Joining what `push` and `finish` return gives the text that decoding all tokens at once would give.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

# Pending ids of a `WindowDetokenizer` beyond which they cannot be the start of one character any more: a
# character has at most four bytes, and a token at least one.
_MAX_PENDING = 8

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """The text that is certain now; may be empty."""
        ...

    def finish(self) -> str:
        """What was still held back."""
        ...


class ByteDetokenizer:
    """For byte-level BPE (GPT-2, Qwen, Llama 3): a table from id to bytes and an incremental UTF-8 decoder.

    O(1) a token whatever the tokens are, which decoding a window of ids again is not. Ids beyond the table
    (a model's vocabulary may be padded) have no text.
    """

    __slots__ = ("_decode", "_size", "_table")

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._size = len(table)
        self._decode = _new_utf8_decoder("replace").decode

    def push(self, token: int) -> str:
        return self._decode(self._table[token]) if token < self._size else ""

    def finish(self) -> str:
        return self._decode(b"", True)


class WindowDetokenizer:
    """For any other tokenizer: decode the last few ids with and without the new one; the difference is new.

    The way of Hugging Face's text-generation-inference: a decoder may look at neighbours (it drops the space
    before the first word), so a token cannot be decoded alone.
    """

    __slots__ = ("_decode", "_ids", "_read")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._read = 0

    def push(self, token: int) -> str:
        self._ids.append(token)
        before = self._decode(self._ids[: self._read])
        after = self._decode(self._ids)
        if after.endswith("\ufffd") and len(self._ids) - self._read < _MAX_PENDING:
            return ""
        # Keep one group of ids as the context of the next; nothing new to show keeps the context as it is.
        if len(after) > len(before):
            del self._ids[: self._read]
            self._read = len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        before = self._decode(self._ids[: self._read])
        after = self._decode(self._ids)
        self._ids.clear()
        self._read = 0
        return after[len(before) :]


def byte_level_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte (the GPT-2 convention): printable ones stand for
    themselves, the others follow from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}
