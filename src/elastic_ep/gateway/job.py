"""What a request asks for, valid and in the model's terms: tokens, sampling parameters, what is shown. Picklable."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.gateway.parsers.registry import MessageForm
from elastic_ep.wire.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt of a job. `echo` is the text to show before the generated one; `beginnings` are hashes of its own."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    echo: str = ""
    beginnings: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What is shown of the generated tokens. `stop` counts from the token after the `min_tokens`-th on."""

    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Of the client's own."""
    min_tokens: int = 0
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    token_ids: bool = False
    prompt_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    form: MessageForm | None = None
    """How the text is told into reasoning, content and calls; None: it is content."""


@dataclass(frozen=True, slots=True)
class Job:
    """A valid request: `n` choices for each part; choice j of part i has index i * n + j."""

    parts: tuple[Part, ...]
    n: int
    stream: bool
    output: Output
    request_id: str | None = None
    """What the client calls it."""
    unknown: tuple[str, ...] = ()
    """Fields that were ignored because nobody knows them, the first of them."""
    about: object = None
    """What an endpoint needs of its request besides. Picklable."""


@dataclass(frozen=True, slots=True)
class Previous:
    """Instead of a job: the request goes on with this response, whose conversation it cannot be read without."""

    id: str
