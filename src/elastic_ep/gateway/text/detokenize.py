"""Token ids to text, one token at a time, without ever showing half a character.

Joining what `push` and `finish` return gives the text that decoding all tokens at once would give. One difference: the
decoder of byte-fallback tokenizers spoils a whole run of bytes if any of it is no character. A stream has shown
the characters before that one by then, so here only what is none becomes U+FFFD.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Pending ids of a `WindowDetokenizer` beyond which they cannot be the start of one character any more: a
# character has at most four bytes, and a token at least one.
_MAX_PENDING = 8

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class Trim:
    """At most `left` and `right` times `content` are taken off the ends of a whole text."""

    content: bytes = b" "
    left: int = 0
    right: int = 0


@dataclass(frozen=True, slots=True)
class Spelling:
    """By token id: what it adds as the first token of a text, and after others. Ids beyond have no text."""

    first: Sequence[bytes]
    rest: Sequence[bytes]
    trim: Trim = field(default_factory=Trim)

    @property
    def has_no_ends(self) -> bool:
        """Tokens are the same at a text's ends as in its middle."""
        return self.first == self.rest and not (self.trim.left or self.trim.right)


class Detokenizer(Protocol):
    def peek(self, token: int) -> bytes:
        """The bytes that `token` would add to the text if it came next; changes nothing."""
        ...

    def push(self, token: int) -> str:
        """The text that is certain now; may be empty."""
        ...

    def finish(self) -> str:
        """What was still held back."""
        ...


class ByteDetokenizer:
    """For decoders that look at no neighbours, above all byte-level BPE (GPT-2, Qwen, Llama 3): a table from id to
    bytes and an incremental UTF-8 decoder.

    O(1) a token whatever the tokens are, which decoding a window of ids again is not. Ids beyond the table
    (a model's vocabulary may be padded) have no text.
    """

    __slots__ = ("_decode", "_size", "_table")

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._size = len(table)
        self._decode = _new_utf8_decoder("replace").decode

    def peek(self, token: int) -> bytes:
        return self._table[token] if token < self._size else b""

    def push(self, token: int) -> str:
        return self._decode(self._table[token]) if token < self._size else ""

    def finish(self) -> str:
        return self._decode(b"", True)


class EdgedDetokenizer:
    """The same for decoders that treat the ends of a text differently: its first token, blanks at its ends."""

    __slots__ = ("_decode", "_first", "_held", "_left", "_silent", "_size", "_spelling")

    def __init__(self, spelling: Spelling, silent: Collection[int], context: Sequence[int] = ()) -> None:
        """`silent` tokens have no text, and what comes after them is still first. The text goes on from `context`."""
        self._spelling = spelling
        self._size = len(spelling.rest)
        self._silent = silent
        self._first = True
        self._left = spelling.trim.left
        self._held = b""
        for token in context:
            if not self._first and not self._left:
                break
            self._take(token)
        self._held = b""
        self._decode = _new_utf8_decoder("replace").decode

    def peek(self, token: int) -> bytes:
        return self._spell(token)[0]

    def push(self, token: int) -> str:
        return self._decode(self._take(token))

    def finish(self) -> str:
        # What is held back are blanks at the end, which the decoder drops.
        return self._decode(b"", True)

    def _take(self, token: int) -> bytes:
        certain, self._held, self._left = self._spell(token)
        if 0 <= token < self._size and token not in self._silent:
            self._first = False
        return certain

    def _spell(self, token: int) -> tuple[bytes, bytes, int]:
        """(what is certain now, what is held back then, blanks still to be taken off at the start)"""
        if not 0 <= token < self._size or token in self._silent:
            return b"", self._held, self._left
        raw = (self._spelling.first if self._first else self._spelling.rest)[token]
        trim, left = self._spelling.trim, self._left
        while left and raw.startswith(trim.content):
            raw, left = raw.removeprefix(trim.content), left - 1
        if raw:
            left = 0
        raw = self._held + raw
        end, right = len(raw), trim.right
        while right and raw.endswith(trim.content, 0, end):
            end, right = end - len(trim.content), right - 1
        return raw[:end], raw[end:], left


class WindowDetokenizer:
    """For any other tokenizer: decode the last few ids with and without the new one; the difference is new.

    The way of Hugging Face's text-generation-inference: a decoder may look at neighbours, so a token cannot be
    decoded alone. Not `tokenizers`' own `DecodeStream`: it raises where a decoder takes back bytes that are shown
    already ("pieces, replaced at last" in the tests), and has no end.
    """

    __slots__ = ("_decode", "_ids", "_read")

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        """The text goes on from `context`."""
        self._decode = decode
        # HAZARD: a context that ends inside a character would be shown again with the character's end.
        whole = not decode(list(context)).endswith("\ufffd")
        self._ids: list[int] = list(context) if whole else []
        self._read = len(self._ids)

    def peek(self, token: int) -> bytes:
        return self._next(token).encode("utf-8", "replace")

    def push(self, token: int) -> str:
        shown = self._next(token)
        self._ids.append(token)
        # Keep one group of ids as the context of the next; nothing new to show keeps the context as it is.
        if shown:
            del self._ids[: self._read]
            self._read = len(self._ids)
        return shown

    def finish(self) -> str:
        before = self._decode(self._ids[: self._read])
        after = self._decode(self._ids)
        self._ids.clear()
        self._read = 0
        return after[len(before) :]

    def _next(self, token: int) -> str:
        before = self._decode(self._ids[: self._read])
        after = self._decode([*self._ids, token])
        if after.endswith("\ufffd") and len(self._ids) + 1 - self._read < _MAX_PENDING:
            return ""
        return after[len(before) :]


def byte_level_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte (the GPT-2 convention): printable ones stand for
    themselves, the others follow from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}
