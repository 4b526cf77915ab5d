"""A vocabulary for the small models, and runners that follow grammars with it."""

from __future__ import annotations

from concurrent.futures import wait

from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.guided.shared import Guide
from elastic_ep.guided.vocabulary import Vocabulary
from elastic_ep.wire.messages import Token
from tests.engine.solo import TINY, drain

END, OTHER_END = 3, 2
_LETTERS = [bytes([byte]) for byte in range(10, 127)]
_WORDS = [b'{"', b'": ', b"true", b"ab", b"12", b"null", b'", "', b"}"]
_TOKENS = [b"<0>", b"<1>", b"<2>", b"<3>", *_LETTERS, *_WORDS]
VOCABULARY = Vocabulary(
    (*_TOKENS, *[b""] * (TINY.vocab_size - len(_TOKENS))), special=(0, 1, 2, 3), ends=(END,)
)


def mask_maker(*, beside: bool = True) -> MaskMaker:
    return MaskMaker(Guide.of(VOCABULARY), beside=beside)


def opened(runner: StepRunner) -> StepRunner:
    """All grammars of its requests are compiled, or will not be."""
    wait([ready for _, ready in runner._guiding.opening], 30)
    return runner


def finish(runner: StepRunner) -> dict[int, list[Token]]:
    return drain(opened(runner))


def text(tokens: list[int]) -> str:
    return b"".join(VOCABULARY.tokens[token] for token in tokens if token not in (END, OTHER_END)).decode()
