"""Parsers by the names that vLLM and SGLang have for them, and how an answer is read with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from elastic_ep.gateway.parsers.base import CallArguments, CallBegin, Content, Delta, Reasoning, Tool
from elastic_ep.gateway.parsers.deepseek import DeepSeekV3, DeepSeekV31, KimiK2
from elastic_ep.gateway.parsers.harmony import Harmony
from elastic_ep.gateway.parsers.json_calls import Hermes, Mistral, NamedCall, RequiredCalls
from elastic_ep.gateway.parsers.tagged_calls import Glm45, MiniMaxM2, Qwen3Coder
from elastic_ep.gateway.parsers.thinking import BEGIN, END, Thinking

NAMED: Literal["named"] = "named"
REQUIRED: Literal["required"] = "required"


class Parser(Protocol):
    def push(self, text: str) -> list[Delta]: ...

    def finish(self) -> list[Delta]: ...


@dataclass(frozen=True, slots=True)
class CallFormat:
    """`shows_special`: the marks are special tokens, which the text would otherwise leave out."""

    make: Callable[[Sequence[Tool]], Parser]
    shows_special: bool = False


_HERMES, _HARMONY = CallFormat(Hermes), CallFormat(Harmony, shows_special=True)
_CODER, _GLM = CallFormat(Qwen3Coder), CallFormat(Glm45, shows_special=True)
_MISTRAL = CallFormat(Mistral, shows_special=True)
_V3, _V31 = CallFormat(DeepSeekV3, shows_special=True), CallFormat(DeepSeekV31, shows_special=True)
_KIMI, _MINIMAX = CallFormat(KimiK2, shows_special=True), CallFormat(MiniMaxM2, shows_special=True)
CALL_FORMATS: dict[str, CallFormat] = {
    "hermes": _HERMES, "qwen3": _HERMES, "qwen": _HERMES, "qwen25": _HERMES,
    "qwen3_coder": _CODER, "qwen3_xml": _CODER,
    "mistral": _MISTRAL,
    "deepseek_v3": _V3, "deepseekv3": _V3, "deepseek_v31": _V31, "deepseekv31": _V31,
    "glm45": _GLM, "glm47": _GLM, "glm": _GLM,
    "kimi_k2": _KIMI, "minimax_m2": _MINIMAX, "minimax-m2": _MINIMAX,
    "openai": _HARMONY, "harmony": _HARMONY, "gpt-oss": _HARMONY,
}  # fmt: skip
"""By --tool-call-parser."""

REASONING_FORMATS: dict[str, bool] = {
    "qwen3": False, "glm45": False, "deepseek_v3": False, "deepseek-v3": False, "deepseek_r1": True,
    "deepseek-r1": True, "openai_gptoss": False, "gpt-oss": False, "kimi_k2": False, "minimax_m2": True, "minimax": True,
}  # fmt: skip
"""By --reasoning-parser: whether the model reasons also where neither prompt nor answer has the first mark."""
_HARMONIES = ("openai_gptoss", "gpt-oss")


def begins_within(prompt: str, reasoning: str) -> bool:
    """Whether what follows `prompt`, the text that a chat template made, is reasoning unless it says otherwise."""
    end = prompt.rstrip()
    return end.endswith(BEGIN) or (REASONING_FORMATS[reasoning] and not end.endswith(END))


@dataclass(frozen=True, slots=True)
class MessageForm:
    """How the text of one answer is to be read. Picklable.

    `thinking`: with the reasoning parser `reasoning`, whether the text begins within reasoning. `calls`: by which
    format calls are read, "required" and "named" being what a grammar makes of any model; None: they are text.
    """

    reasoning: str | None = None
    thinking: bool = False
    shows_reasoning: bool = True
    calls: str | None = None
    tools: tuple[Tool, ...] = ()
    several: bool = True
    """Calls in one answer; else the first alone."""

    @property
    def shows_special(self) -> bool:
        return self.reasoning in _HARMONIES or (
            self.calls in CALL_FORMATS and CALL_FORMATS[self.calls].shows_special
        )


class MessageReader:
    """Reads one answer."""

    def __init__(self, form: MessageForm) -> None:
        self._form = form
        self._first: Parser | None = Thinking(begun=form.thinking) if form.reasoning else None
        self._second: Parser | None = _calls(form)
        if form.calls in (NAMED, REQUIRED):
            self._first = None  # the grammar is of the whole text
        elif form.reasoning in _HARMONIES or isinstance(self._second, Harmony):
            self._first, self._second = None, Harmony()

    def push(self, text: str) -> list[Delta]:
        return self._on([Content(text)] if self._first is None else self._first.push(text))

    def finish(self) -> list[Delta]:
        told = self._on(self._first.finish()) if self._first else []
        rest = self._second.finish() if self._second else []
        return told + [delta for delta in rest if self._shown(delta)]

    def _on(self, deltas: list[Delta]) -> list[Delta]:
        told = deltas
        if self._second is not None:
            told = []
            for delta in deltas:
                told += self._second.push(delta.text) if isinstance(delta, Content) else [delta]
        return [delta for delta in told if self._shown(delta)]

    def _shown(self, delta: Delta) -> bool:
        match delta:
            case Reasoning():
                return self._form.shows_reasoning
            case CallBegin(index) | CallArguments(index):
                return index == 0 or self._form.several
        return True


def _calls(form: MessageForm) -> Parser | None:
    match form.calls:
        case None:
            return None
        case "required":
            return RequiredCalls()
        case "named":
            return NamedCall(form.tools[0].name)
        case name:
            return CALL_FORMATS[name].make(form.tools)
