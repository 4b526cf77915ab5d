"""From the bytes of a request body to what is done with it, without holding up the event loop.

The work (JSON, fields, chat template, tokenizer) grows with the body, and most of it keeps the interpreter lock,
so a thread would not help. A small body is read on the event loop, as many a turn of it as take a few milliseconds;
any other by a process of its own (`text_worker.py`), by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from elastic_ep.gateway.fields import bad_value, parse_object, read
from elastic_ep.gateway.guided import KnownGrammars, Unchecked
from elastic_ep.gateway.job import Job, Previous
from elastic_ep.gateway.jobs import JobReader
from elastic_ep.gateway.prepared import prepare
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.text_worker import SHORT_BYTES, Found, TextWorker
from elastic_ep.gateway.turns import Turns

INLINE_BYTES = SHORT_BYTES
"""A body of so many bytes takes a few milliseconds. HAZARD: work that a small body can make long (a template of the
client's own, a grammar that nobody has compiled yet) does not belong on the event loop either."""

JobTask = Literal["completion", "chat", "responses", "messages"]
AnswerTask = Literal["tokenize", "detokenize", "count_tokens"]


class BodyReader:
    """All that is done with a body before anything is generated. Every method raises `ApiError`.

    `known`: see `GrammarReader`.
    """

    def __init__(
        self, settings: ApiSettings, text: ChatTokenizer, known: KnownGrammars | None = None
    ) -> None:
        self._settings = settings
        self._text = text
        self._jobs = JobReader(settings, text, known)
        self._bodies = prepare(settings)

    def warm_up(self) -> None:
        """What the first grammar would wait for otherwise."""
        self._jobs.warm_up()

    def read(self, task: str, raw: bytes, before: str | None = None) -> Found:
        """A job for a `JobTask`, or whose conversation is missing for it; for an `AnswerTask` the whole answer as JSON.

        `before`: the conversation that a request goes on with.
        """
        return self._read(task, parse_object(raw), before)

    def read_if_short(self, task: str, raw: bytes, before: str | None = None) -> Found | None:
        """The same; None if it may be much work however short the body is."""
        body = parse_object(raw)
        if body.get("chat_template") is not None:  # a program
            return None
        try:
            return self._read(task, body, before)
        except Unchecked:
            return None

    def _read(self, task: str, body: dict[str, Any], before: str | None) -> Found:
        match task:
            case "completion":
                return self._jobs.completion(body)
            case "chat":
                return self._jobs.chat(body)
            case "responses":
                return self._jobs.responses(body, before)
            case "messages":
                return self._jobs.messages(body)
            case "count_tokens":
                return _json({"input_tokens": self._jobs.count(body)})
            case "tokenize":
                return self._tokenize(body)
            case "detokenize":
                return self._detokenize(body)
        raise ValueError(task)

    def _tokenize(self, body: dict[str, Any]) -> bytes:
        values = read(self._bodies.tokenize, body)
        self._jobs.check_model(values.model)
        if (values.prompt is None) == (values.messages is None):
            raise bad_value("prompt", "or 'messages' must be given, and not both.")
        if values.prompt is None:
            tokens = [*self._jobs.chat_tokens(body)]
        else:
            special = values.add_special_tokens is not False
            tokens = self._jobs.prompts.encode(values.prompt, "prompt", add_special_tokens=special)
        longest = self._settings.max_model_len
        found: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": longest}
        if values.return_token_strs:
            found["token_strs"] = [self._text.token_name(token) for token in tokens]
        return _json(found)

    def _detokenize(self, body: dict[str, Any]) -> bytes:
        values = read(self._bodies.detokenize, body)
        self._jobs.check_model(values.model)
        return _json({"prompt": self._text.decode(values.tokens)})


class Reading:
    """Reads bodies for the HTTP handlers. Every method raises `ApiError` and `Busy`.

    `known` is the reader's, and learns of grammars what the worker finds.
    """

    def __init__(self, reader: BodyReader, worker: TextWorker, known: KnownGrammars) -> None:
        self._reader = reader
        self.worker = worker
        self._known = known
        self._turns = Turns()

    async def job(self, task: JobTask, raw: bytes, conversation: Callable[[str], str] | None = None) -> Job:
        """`conversation`: of a response that the request goes on with, by its id. It raises `ApiError`, too."""
        found = await self._read(task, raw)
        if isinstance(found, Previous):
            assert conversation is not None
            found = await self._read(task, raw, conversation(found.id))
        assert isinstance(found, Job)
        return found

    async def answer(self, task: AnswerTask, raw: bytes) -> bytes:
        found = await self._read(task, raw)
        assert isinstance(found, bytes)
        return found

    async def _read(self, task: str, raw: bytes, before: str | None = None) -> Found:
        if len(raw) + len(before or "") <= INLINE_BYTES:
            found = await self._turns.run(lambda: self._reader.read_if_short(task, raw, before))
            if found is not None:
                return found
        found = await self.worker.read(task, raw, before)
        if isinstance(found, Job):
            for part in found.parts:
                if part.params.grammar is not None:
                    self._known.add(part.params.grammar)
        return found


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode("ascii")
