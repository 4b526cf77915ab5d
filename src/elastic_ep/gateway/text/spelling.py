"""The bytes that each token adds to a text, read off a tokenizer's decoder.

Most decoders treat each token by itself, and only the first one of a text differently (no blank before it). Then two
tables say all, and a text can be followed token by token, in bytes, also where a token is a part of a character.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders

from elastic_ep.gateway.text.detokenize import Spelling, Trim, byte_level_alphabet

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Piece = Callable[[str, bool], str]
"""A token and whether it is a text's first one, to what it contributes."""


def read_spelling(tokenizer: Tokenizer, names: Sequence[str]) -> Spelling | None:
    """None for a decoder that looks at neighbours. `names` by id."""
    plan = _Plan.of(_decoder_steps(tokenizer))
    if plan is None:
        return None
    rest = [plan.spell(name, first=False) if name else b"" for name in names]
    first = [plan.spell(name, first=True) if name else b"" for name in names] if plan.pieces else rest
    return Spelling(first, rest, plan.trim)


def token_names(tokenizer: Tokenizer) -> list[str]:
    """By id; ids without a token have an empty name."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    names = [""] * (max(vocabulary.values(), default=-1) + 1)
    for token, index in vocabulary.items():
        names[index] = token
    return names


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    decoder = tokenizer.decoder
    return [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [one for inner in step["decoders"] for one in _flatten(inner)]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Steps token by token, then bytes, then trimming of the whole."""

    pieces: tuple[_Piece, ...]
    to_bytes: Callable[[str], bytes]
    trim: Trim

    @classmethod
    def of(cls, steps: list[dict[str, Any]]) -> _Plan | None:
        # Without a decoder words are joined by blanks; a decoder of nothing but Fuse joins them by nothing.
        if not steps:
            return cls((_blank_between,), str.encode, Trim())
        pieces: list[_Piece] = []
        place = 0
        while place < len(steps) and (piece := _piece(steps[place])) is not None:
            pieces.append(piece)
            place += 1
        to_bytes: Callable[[str], bytes] = _encode
        joined = False
        if place < len(steps) and steps[place]["type"] in _TO_BYTES:
            joined = steps[place]["type"] == "ByteLevel"
            to_bytes = _TO_BYTES[steps[place]["type"]]
            place += 1
        trim = _trim(steps[place:], joined)
        return None if trim is None else cls(tuple(pieces), to_bytes, trim)

    def spell(self, token: str, *, first: bool) -> bytes:
        for piece in self.pieces:
            token = piece(token, first)
        return self.to_bytes(token)


def _trim(steps: list[dict[str, Any]], joined: bool) -> Trim | None:
    """What is done to a text after its pieces have been joined; None if that is more than one trimming."""
    trim: Trim | None = None
    for step in steps:
        if step["type"] == "Fuse":
            joined = True
        elif step["type"] == "Strip" and joined and trim is None:
            trim = Trim(_encode(step["content"]), step["start"], step["stop"])
        else:
            return None
    return trim or Trim()


def _piece(step: dict[str, Any]) -> _Piece | None:
    """A step that treats each token by itself; None for others."""
    match step["type"]:
        case "Replace" if "String" in step["pattern"]:
            old, new = step["pattern"]["String"], step["content"]
            return lambda token, first: token.replace(old, new) if old else token
        case "Replace":
            replace = decoders.Replace(Regex(step["pattern"]["Regex"]), step["content"]).decode
            return lambda token, first: replace([token])
        case "Metaspace":
            mark, keep = step["replacement"], step["prepend_scheme"] == "never"
            return lambda token, first: token.replace(mark, "" if first and not keep else " ")
        case "Strip":
            return _stripper(step["content"], step["start"], step["stop"])
        case "WordPiece":
            decode = decoders.WordPiece(step["prefix"], step["cleanup"]).decode
            return lambda token, first: decode([token] if first else ["", token])
    return None


def _stripper(content: str, left: int, right: int) -> _Piece:
    def strip(token: str, first: bool) -> str:
        start = 0
        while start < min(left, len(token)) and token[start] == content:
            start += 1
        end = len(token)
        while end > max(start, len(token) - right) and token[end - 1] == content:
            end -= 1
        return token[start:end]

    return strip


def _blank_between(token: str, first: bool) -> str:
    return token if first else f" {token}"


def _encode(token: str) -> bytes:
    return token.encode("utf-8", "replace")


def _byte_fallback(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else _encode(token)


_ALPHABET = byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    # A token with a character that stands for no byte is taken as it is.
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:
        return _encode(token)


_TO_BYTES: dict[str, Callable[[str], bytes]] = {"ByteFallback": _byte_fallback, "ByteLevel": _byte_level}
