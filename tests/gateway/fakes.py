"""A tokenizer made on the spot and a backend that says what it is told to."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from elastic_ep.gateway.text.detokenize import byte_level_alphabet
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.group.history import History
from elastic_ep.group.port import (
    Busy,
    Conflict,
    CorruptSlot,
    Draining,
    EngineStatus,
    ExpertsStatus,
    Failure,
    FaultToleranceStatus,
    Health,
    Killing,
    Layer,
    LayerStatus,
    Load,
    OutOfRange,
    Rebalancing,
    Relaunch,
    Scaled,
    SlotStatus,
    Stopping,
    UnknownRank,
    Verification,
)
from elastic_ep.wire.messages import SamplingParams, Token, TopLogprob

MODEL = "little-moe"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = ["Anna has 12 apples and gives 5 to Bob. How many are left? 12 - 5 = 7 #### 7"] * 4
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END = 2
"""What ends a text of the model."""


@cache
def byte_level_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    # One added token that is not special and one whose characters the byte alphabet lacks.
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<é ▁>", normalized=False)])
    return tokenizer


@cache
def sample_text() -> ChatTokenizer:
    return ChatTokenizer(byte_level_tokenizer(), TEMPLATE, {"eos_token": "<|im_end|>"})


def byte_tokens(written: str) -> list[int]:
    """One token for each byte."""
    characters = {byte: char for char, byte in byte_level_alphabet().items()}
    vocabulary = byte_level_tokenizer().get_vocab()
    return [vocabulary[characters[byte]] for byte in written.encode()]


def tokens_of(
    ids: Sequence[int],
    *,
    finish: str | None = "stop",
    logprobs: int | None = None,
    first: int = 0,
    scored: bool = False,
) -> list[Token]:
    """One token message for each id; the last one has `finish`."""
    made = []
    for place, token in enumerate(ids):
        top = tuple(TopLogprob((token + other) % 256 + 3, -1.0 - other) for other in range(logprobs or 0))
        last = place == len(ids) - 1
        made.append(
            Token(
                request_id=0,
                index=first + place,
                token=token,
                finish=finish if last else None,
                logprob=None if logprobs is None else -0.25 if scored else -0.5,
                top=top,
            )
        )
    return made


@dataclass(frozen=True)
class Submitted:
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    choice: int
    beginnings: tuple[bytes, ...] = ()


class FakeStream:
    """Gives its batches, then waits for more until cancelled, as a real one does."""

    def __init__(self, batches: Iterable[tuple[Token, ...]], cached_tokens: int = 0) -> None:
        self._batches = deque(batches)
        self._ended = False
        self.taken = 0
        self.idle = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.failure: Failure | None = None
        self.cached_tokens = cached_tokens
        self.assigned_s: float | None = time.monotonic()
        self.moved_s: tuple[float, ...] = ()
        self._came: Callable[[int], None] = lambda _count: None

    def __aiter__(self) -> AsyncIterator[tuple[Token, ...]]:
        return self

    def gather(self, least: int, came: Callable[[int], None]) -> None:
        """Its batches stay as they are."""
        self._came = came

    async def __anext__(self) -> tuple[Token, ...]:
        if self._ended:
            raise StopAsyncIteration
        if not self._batches:
            self.idle.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        batch = self._batches.popleft()
        self._came(len(batch))
        self.taken += 1
        self._ended = batch[-1].finish is not None
        return batch

    def cancel(self) -> None:
        self.cancelled.set()


Reply = Callable[[Submitted], Iterable[tuple[Token, ...]]]


def says(words: str, *, end: str = "<|im_end|>") -> Reply:
    """One token a batch, cut off at max_tokens as an engine does."""

    def reply(request: Submitted) -> Iterable[tuple[Token, ...]]:
        text = sample_text()
        params, ids = request.params, [*text.encode(words), text.encode(end)[0]]
        limit, given = params.max_tokens - len(params.given), len(params.given)
        finish = "stop" if len(ids) <= limit else "length"
        scored = tokens_of(
            params.given, finish=None if limit else "length", logprobs=params.given_logprobs, scored=True
        )
        drawn = tokens_of(ids[:limit], finish=finish, logprobs=params.logprobs, first=given)
        return [(token,) for token in (*scored, *drawn)]

    return reply


def never_ends(words: str) -> Reply:
    """The words without an end: the stream then waits."""

    def reply(request: Submitted) -> Iterable[tuple[Token, ...]]:
        return [(token,) for token in tokens_of(sample_text().encode(words), finish=None)]

    return reply


def aborts(words: str) -> Reply:
    """The words, whose last token is one that says that the rest does not come."""

    def reply(request: Submitted) -> Iterable[tuple[Token, ...]]:
        *batches, (last,) = never_ends(words)(request)
        return [*batches, (Token(0, last.index, 5, "abort"),)]

    return reply


@dataclass
class FakeBackend:
    reply: Reply = field(default_factory=lambda: says("The answer is 7."))
    serving: int = 8
    capacity: int | None = None
    cached: list[int] = field(default_factory=list)
    """Of the next choices, tokens of the prompt that are not computed."""
    stopping: bool = False
    submitted: list[Submitted] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    relaunches: list[int | None] = field(default_factory=list)
    kills: list[tuple[int, int]] = field(default_factory=list)
    drains: list[tuple[int, float]] = field(default_factory=list)
    sizes: list[tuple[int, float]] = field(default_factory=list)
    scaling: bool = False
    scrapes: int = 0
    history: History = field(default_factory=History)
    engines: tuple[EngineStatus, ...] = (EngineStatus(0, "healthy", "Serving", 1, 4711, 2, 0, ""),)
    arrived: asyncio.Queue[FakeStream] = field(default_factory=asyncio.Queue)

    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        choice: int,
        beginnings: tuple[bytes, ...] = (),
    ) -> FakeStream:
        if self.stopping:
            raise Stopping
        if self.capacity is not None and len(self.streams) >= self.capacity:
            raise Busy(3)
        request = Submitted(prompt, params, seed, choice, beginnings)
        stream = FakeStream(self.reply(request), self.cached.pop(0) if self.cached else 0)
        self.submitted.append(request)
        self.streams.append(stream)
        self.arrived.put_nowait(stream)
        return stream

    def refresh_metrics(self) -> None:
        self.scrapes += 1

    def status(self) -> FaultToleranceStatus:
        return FaultToleranceStatus("Serving", 3, 1000, 1, self.engines)

    def load(self) -> Load:
        return Load(sum(engine.running for engine in self.engines), 0)

    def placement_version(self) -> int:
        return 5

    async def layer(self, layer: int) -> Layer | None:
        return Layer(5, layer, 4, 2, (3, -1), (1, 1)) if layer < 2 else None

    async def experts(self) -> ExpertsStatus:
        slots = (SlotStatus(0, 0, 3, True, "00c0ffee"), SlotStatus(1, 0, None, True, None))
        return ExpertsStatus(5, 1, (LayerStatus(0, 1, slots),))

    async def verify(self) -> Verification:
        return Verification(31, (CorruptSlot(0, 1, 0),), (7,))

    async def rebalance(self) -> Rebalancing:
        return Rebalancing(4, 3, 1.5, 1.1, 12)

    def health(self) -> Health:
        return Health(self.serving > 0, "Serving", self.serving, "" if self.serving else "no rank serves")

    def relaunch(self, rank: int | None) -> Relaunch:
        if rank is not None and rank > 7:
            raise UnknownRank(f"There is no rank {rank}: they are 0 to 7.")
        self.relaunches.append(rank)
        return Relaunch((2, 3), ()) if rank is None else Relaunch((), (rank,))

    def drain(self, rank: int, patience_s: float) -> Draining:
        if rank == 7:
            raise Conflict("8 ranks are to take part, and every expert has a slot only with 8 of them.")
        self.drains.append((rank, patience_s))
        return Draining(rank, 1, "Draining", 7)

    async def scale(self, size: int, patience_s: float) -> Scaled:
        if size > 8:
            raise OutOfRange("new_data_parallel_size", "'new_data_parallel_size' must be from 4 to 8.")
        self.sizes.append((size, patience_s))
        if size == 5:
            raise TimeoutError("300 s have passed.")
        return Scaled(f"Scaled to {size} data parallel engines", size, tuple(range(size)))

    def kill(self, rank: int, incarnation: int) -> Killing:
        if rank > 7:
            raise UnknownRank(f"There is no rank {rank}: they are 0 to 7.")
        self.kills.append((rank, incarnation))
        return Killing(incarnation == 2, 2)
