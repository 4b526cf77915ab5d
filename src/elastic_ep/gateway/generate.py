"""Submitting a job and following one choice: tokens in, text that may be shown out.

This is the path every generated token takes through the run process, so it is kept short.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic

from elastic_ep.gateway.job import Job, Output
from elastic_ep.gateway.shapes import SpelledToken
from elastic_ep.gateway.text.stop_strings import StopStrings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.group.metrics import ChoiceLife, Metrics
from elastic_ep.group.port import Backend, Stream
from elastic_ep.wire.messages import Token


class ChoiceReader:
    """Turns the tokens of one choice into text, cut at stop strings.

    `finish` is None until the end, then OpenAI's finish_reason, or "abort". `generated` counts tokens, the
    end-of-sequence token and those of a stop string included, and nothing that came after them. With
    `keep_tokens`, `tokens` collects them for logprobs and token ids; whoever shows them empties it.
    """

    __slots__ = (
        "_include_stop", "_length", "_min_tokens", "_peek", "_push", "_rest", "_stops", "_text", "ended_by", "finish",
        "generated", "given", "keep_tokens", "nothing", "scores", "stopped_by", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        text: ChatTokenizer,
        output: Output,
        prompt: Sequence[int] = (),
        given: int = 0,
        *,
        nothing: bool = False,
    ) -> None:
        """The text goes on from that of `prompt`. First come so many tokens that are `given`, the prompt's own.

        `nothing`: no token is shown that comes then.
        """
        detokenizer = text.detokenizer(prompt, skip_special_tokens=output.skip_special_tokens)
        self._text = text
        self._length = 0
        """Characters of the tokens so far, those of stop strings included."""
        self._peek = detokenizer.peek
        self._push = detokenizer.push
        self._rest = detokenizer.finish
        self._include_stop = output.include_stop
        self._stops = StopStrings(output.stop, include=output.include_stop) if output.stop else None
        self._min_tokens = output.min_tokens
        self.keep_tokens = output.logprobs is not None or output.token_ids
        self.tokens: list[SpelledToken] = []
        self.given = given
        """Tokens of the prompt that have not come yet."""
        self.scores: list[Token] = []
        """Those that have, if they are to be shown."""
        self.nothing = nothing
        self.generated = 0
        self.finish: str | None = None
        self.stopped_by: str | None = None
        """The stop string that was met."""
        self.ended_by: int | None = None
        """The token that ended it, if one did."""

    @property
    def may_lag(self) -> bool:
        """Whether no text of it can end it: only its last token does."""
        return self._stops is None and not self.given and not self.nothing

    def feed(self, batch: tuple[Token, ...]) -> str:
        """The text that may be shown now."""
        shown = ""
        if self.given or self.nothing:
            batch = self._take_given(batch)
        for token in batch:
            self.generated += 1
            if self.keep_tokens:
                self.tokens.append(self._spell(token))
            if token.finish is not None:
                return shown + self._end(token, token.finish)
            piece = self._push(token.token)
            self._length += len(piece)
            if self._stops is not None and self.generated > self._min_tokens:
                piece, found = self._stops.push(piece)
                if found is not None:
                    self.finish, self.stopped_by = "stop", found
                    return shown + piece
            shown += piece
        return shown

    def _take_given(self, batch: tuple[Token, ...]) -> tuple[Token, ...]:
        """The rest of it."""
        given, rest = batch[: self.given], batch[self.given :]
        self.given -= len(given)
        self.scores += given
        if given and given[-1].finish is not None:
            self.finish = given[-1].finish
        elif rest and self.nothing:
            self.finish = "abort" if rest[0].finish == "abort" else "length"
        return () if self.nothing else rest

    def _spell(self, token: Token) -> SpelledToken:
        top = tuple(self._bytes(one.token) for one in token.top)
        return SpelledToken(token, self._bytes(token.token), top, self._length)

    def _bytes(self, token: int) -> bytes:
        return self._text.token_bytes(token) if self._text.is_special(token) else self._peek(token)

    def _end(self, token: Token, finish: str) -> str:
        # The token that ended the sequence is not part of the text unless asked for; one at the length limit is.
        piece = self._push(token.token) if self._include_stop or finish != "stop" else ""
        piece += self._rest()
        self.finish = finish
        self.ended_by = token.token if finish == "stop" else None
        if self._stops is None:
            return piece
        if self.generated <= self._min_tokens:
            return self._stops.finish() + piece
        piece, found = self._stops.push(piece)
        if found is not None:
            self.finish, self.stopped_by = "stop", found
            return piece
        return piece + self._stops.finish()


class Clock:
    """Records time to first token and between batches of one choice."""

    __slots__ = ("_first", "_last", "_metrics", "_started", "over")

    def __init__(self, metrics: Metrics, started: float) -> None:
        """`started` is when the HTTP request was read, `time.monotonic()` seconds."""
        self._metrics = metrics
        self._started = started
        self._first = self._last = 0.0
        self.over = False
        """The choice has ended."""

    def batch(self, tokens: int) -> None:
        now = monotonic()
        if self._last:
            self._metrics.tokens(tokens, now - self._last)
        else:
            self._metrics.first_token(tokens, now - self._started)
            self._first = now
        self._last = now

    def life(self, stream: Stream, prompt: int, generated: int, max_tokens: int) -> ChoiceLife:
        """Of a choice that ends now; lengths are tokens."""
        given_s = stream.assigned_s
        return ChoiceLife(
            started_s=self._started,
            queued_s=None if given_s is None else given_s - self._started,
            first_s=self._first or None,
            last_s=self._last or None,
            ended_s=monotonic(),
            prompt=prompt,
            generated=generated,
            max_tokens=max_tokens,
            moved_s=stream.moved_s,
        )

    def finished(self, reason: str, life: ChoiceLife) -> None:
        self.over = True
        self._metrics.finished(reason, life)


async def submit(backend: Backend, job: Job) -> list[Stream]:
    """A stream for each choice, in order of index; all or none. Raises `Busy` and `Stopping`.

    Each costs the event loop what its prompt is long, so others have their turn between each two.
    """
    streams: list[Stream] = []
    try:
        for part in job.parts:
            for choice in range(job.n):
                if streams:
                    await asyncio.sleep(0)
                streams.append(backend.submit(part.begun, part.params, part.seed, choice, part.beginnings))
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return streams
