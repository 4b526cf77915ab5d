"""What all parsers are made of: text in, deltas out, the same deltas however the text is cut into pieces.

A parser is a generator over text that comes bit by bit; it waits in `yield`. It is a function of the text alone, so a
stream that goes on elsewhere after the loss of its rank is told as if nothing had happened.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

_T = TypeVar("_T")
Reading = Generator[None, None, _T]
"""What waits for text in between, and returns something."""
Tell = Callable[[str], None]
_LONGEST_NAME = 256
"""A call's header that is longer is none."""


@dataclass(frozen=True, slots=True)
class Content:
    """Text of the answer itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text in which the model thinks."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """The call number `index` of the answer, of the tool `name`. Its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next of a call's arguments, which joined are JSON (as far as the model writes JSON)."""

    index: int
    text: str


Delta = Content | Reasoning | CallBegin | CallArguments
_Kind = Literal["content", "reasoning", "begin", "arguments"]
_DELTAS: dict[_Kind, Callable[[int, str], Delta]] = {
    "content": lambda _, text: Content(text),
    "reasoning": lambda _, text: Reasoning(text),
    "begin": CallBegin,
    "arguments": CallArguments,
}


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool that may be called. `types`: of each parameter the JSON types that its schema allows, if it says so."""

    name: str
    types: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, function: Mapping[str, Any]) -> Tool:
        """From OpenAI's description of a function."""
        parameters = function.get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        known = properties if isinstance(properties, dict) else {}
        return cls(function["name"], {name: _types(schema) for name, schema in known.items()})


def _types(schema: Any) -> frozenset[str]:
    if not isinstance(schema, dict):
        return frozenset()
    inner: list[Any] = next(
        (schema[key] for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list)), []
    )
    found = schema.get("type")
    named = found if isinstance(found, list) else [found]
    return frozenset(one for one in named if isinstance(one, str)).union(*(_types(one) for one in inner))


class TextReader(ABC):
    """A parser is a subclass with `_read`. When that has returned, all other text is content."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        """How much of the text is taken."""
        self._ended = False
        self._out: list[tuple[_Kind, int, list[str]]] = []
        self._raw: list[str] | None = None
        """What has been taken since `_keep`."""
        self._space_held = ""
        self._calls = 0
        self._reading = self._all()

    def push(self, text: str) -> list[Delta]:
        """`text` is the next of the whole."""
        self._text = self._text[self._at :] + text
        self._at = 0
        return self._go()

    def finish(self) -> list[Delta]:
        """Nothing comes any more: what was held back as it could have been the beginning of something."""
        self._ended = True
        return self._go()

    def _go(self) -> list[Delta]:
        next(self._reading, None)
        told, self._out = self._out, []
        return [_DELTAS[kind](index, "".join(pieces)) for kind, index, pieces in told]

    def _all(self) -> Reading[None]:
        yield from self._read()
        while (yield from self._more()):
            self._content(self._take(len(self._text)))
        # Beside calls blanks mean nothing.
        if not self._calls and self._space_held:
            self._tell("content", 0, self._space_held)

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Take from the text what is of the parser's format, and tell it."""

    # What is told

    def _content(self, text: str) -> None:
        """Blanks wait for what comes behind them: before, between and after calls they are not told."""
        kept = text.rstrip()
        if kept:
            self._tell("content", 0, self._space_held + kept)
            self._space_held = ""
        self._space_held += text[len(kept) :]

    def _begin(self, name: str) -> int:
        """A call begins; its index."""
        index, self._calls = self._calls, self._calls + 1
        self._out.append(("begin", index, [name]))
        self._raw = None
        return index

    def _arguments(self, index: int) -> Tell:
        return lambda text: self._tell("arguments", index, text)

    def _tell(self, kind: _Kind, index: int, text: str) -> None:
        if not text:
            return
        if self._out and self._out[-1][:2] == (kind, index):
            self._out[-1][2].append(text)
        else:
            self._out.append((kind, index, [text]))

    # What is read

    def _keep(self, already: str) -> None:
        """From here on remember what is taken, behind `already`, until it turns out to be a call."""
        self._raw = [already]

    def _give_back(self) -> None:
        """It is none: it was content after all."""
        raw, self._raw = self._raw, None
        self._content("".join(raw or ()))

    def _take(self, count: int) -> str:
        taken = self._text[self._at : self._at + count]
        self._at += len(taken)
        if self._raw is not None:
            self._raw.append(taken)
        return taken

    def _more(self) -> Reading[bool]:
        """Wait until there is text; False if there will be none."""
        while self._at >= len(self._text):
            if self._ended:
                return False
            yield
        return True

    def _peek(self) -> Reading[str]:
        """The next character; empty at the end."""
        return self._text[self._at] if (yield from self._more()) else ""

    def _blanks(self) -> Reading[None]:
        """Take them."""
        while (yield from self._peek()).isspace():
            self._take(1)

    def _goes_on(self, *marks: str) -> Reading[str]:
        """Which of `marks` the text goes on with, taken; empty if with none, and nothing is taken."""
        longest = max(map(len, marks))
        while True:
            for mark in marks:
                if self._text.startswith(mark, self._at):
                    return self._take(len(mark))
            rest = self._text[self._at : self._at + longest]
            if self._ended or not any(mark.startswith(rest) for mark in marks):
                return ""
            yield

    def _upto(self, tell: Tell, *marks: str) -> Reading[str]:
        """Tell the text before the first of `marks` and take it with the mark, which is returned; empty at the end.

        HAZARD: no mark may begin with another, else it would matter how the text is cut.
        """
        while True:
            found = [(place, mark) for mark in marks if (place := self._text.find(mark, self._at)) >= 0]
            if found:
                place, mark = min(found)
                tell(self._take(place - self._at))
                return self._take(len(mark))
            held = 0 if self._ended else _overlap(self._text, self._at, marks)
            tell(self._take(len(self._text) - self._at - held))
            if self._ended:
                return ""
            yield

    def _collect(self, *marks: str) -> Reading[tuple[str, str]]:
        """The text before the first of `marks`, and the mark."""
        pieces: list[str] = []
        mark = yield from self._upto(pieces.append, *marks)
        return "".join(pieces), mark

    def _name(self, *marks: str) -> Reading[tuple[str, str]]:
        """As `_collect`, of a call's header: no mark, and some of the text, as soon as it is too long for one."""
        pieces: list[str] = []
        length = 0
        while (yield from self._more()):
            if mark := (yield from self._goes_on(*marks)):
                return "".join(pieces).strip(), mark
            if length >= _LONGEST_NAME or not (yield from self._more()):
                break
            pieces.append(self._take(1))
            length += 1
        return "", ""

    def _json(self, tell: Tell) -> Reading[bool]:
        """Tell the JSON value that begins here, as it is written. False: the text ends first."""
        depth = 0
        while char := (yield from self._peek()):
            if depth == 0 and (char in ",}]" or char.isspace()):
                return True  # the end of a number or of a word
            tell(self._take(1))
            if char == '"' and not (yield from self._string(tell)):
                return False
            if char in "{[":
                depth += 1
            elif char in "}]":
                depth -= 1
            if depth == 0 and char in '"}]':
                return True
        return False

    def _string(self, tell: Tell) -> Reading[bool]:
        """The rest of a JSON string, its closing quotation mark included."""
        while (mark := (yield from self._upto(tell, '"', "\\"))) == "\\":
            tell(mark)
            if not (yield from self._more()):
                return False
            tell(self._take(1))
        tell(mark)
        return bool(mark)


def _overlap(text: str, start: int, marks: tuple[str, ...]) -> int:
    """How much of the end of `text` could be the beginning of a mark."""
    longest = min(len(text) - start, max(map(len, marks)) - 1)
    return next(
        (size for size in range(longest, 0, -1) if any(one.startswith(text[-size:]) for one in marks)), 0
    )


def quoted(text: str) -> str:
    """As JSON has it within quotation marks."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
