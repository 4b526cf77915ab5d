"""Log-probabilities of a prompt's tokens: before those of the answer, as OpenAI has them, or in a list of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial

from elastic_ep.gateway.job import Part
from elastic_ep.gateway.shapes import Json, SpelledToken, finite
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.turns import Turns
from elastic_ep.wire.messages import Token

_AT_ONCE = 64
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


async def spelled_prompt(
    text: ChatTokenizer, part: Part, scores: Sequence[Token], turns: Turns
) -> list[SpelledToken]:
    """The prompt's tokens as they are echoed, ending where the generated text begins.

    `scores` are of all but the first, before which there is nothing.
    """
    detokenizer = text.detokenizer(skip_special_tokens=not part.echo_special)
    spelled: list[SpelledToken] = []
    at = -len(part.echo)

    def spell(tokens: Sequence[Token]) -> None:
        nonlocal at
        for token in tokens:
            raw, *top = [
                text.token_bytes(one) if text.is_special(one) else detokenizer.peek(one)
                for one in (token.token, *(other.token for other in token.top))
            ]
            spelled.append(SpelledToken(token, raw, tuple(top), at))
            at += len(detokenizer.push(token.token))

    for some in _parts([Token(0, 0, part.prompt[0]), *scores]):
        await turns.run(partial(spell, some))
    return spelled


async def prompt_logprobs_json(
    text: ChatTokenizer, prompt: Sequence[int], scores: Sequence[Token], wanted: int, turns: Turns
) -> Json:
    """As vLLM has them: of each token an object with it and the `wanted` likeliest, by id, each with text and rank.

    The first has null: there is nothing before it. So has the rank of one that is not among the likeliest.
    """
    spell = await turns.run(partial(text.detokenizer, skip_special_tokens=False))
    pieces = ["null"]
    await turns.run(partial(spell.push, prompt[0]))

    def entry(token: int, logprob: float | None, rank: int | None) -> dict[str, object]:
        raw = text.token_bytes(token) if text.is_special(token) else spell.peek(token)
        return {"logprob": finite(logprob), "rank": rank, "decoded_token": raw.decode("utf-8", "replace")}

    def write(tokens: Sequence[Token]) -> None:
        for token in tokens:
            ranks = {other.token: place for place, other in enumerate(token.top, 1)}
            shown = {str(token.token): entry(token.token, token.logprob, ranks.get(token.token))}
            for other in token.top[:wanted]:
                shown[str(other.token)] = entry(other.token, other.logprob, ranks[other.token])
            pieces.append(_dumps(shown))
            spell.push(token.token)

    for some in _parts(scores):
        await turns.run(partial(write, some))
    return Json(f"[{','.join(pieces)}]")


def _parts(tokens: Sequence[Token]) -> Iterator[Sequence[Token]]:
    for start in range(0, len(tokens), _AT_ONCE):
        yield tokens[start : start + _AT_ONCE]
