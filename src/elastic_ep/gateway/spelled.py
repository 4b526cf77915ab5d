"""A generated token with its part of the text, as logprobs show it."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.wire.messages import Token


@dataclass(frozen=True, slots=True)
class SpelledToken:
    """`raw` is what the token adds to the text where it stands: joined, those of all tokens are the text's bytes. A
    token without text, a special one, has its name there. `top` has the same for each of `token.top`.

    `start` is where it begins, in characters of the generated text.
    """

    token: Token
    raw: bytes
    top: tuple[bytes, ...]
    start: int
