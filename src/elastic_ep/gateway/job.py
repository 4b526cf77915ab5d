"""What a request asks for, valid and in the model's terms: tokens, sampling parameters, what is shown. Picklable."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.gateway.parsers.registry import MessageForm
from elastic_ep.wire.messages import SamplingParams


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt of a job. `echo` is the text to show before the generated one; `beginnings` are hashes of its own.

    The last tokens of the prompt may be given to the engine as such that it puts out (`params.given`). `limit` is how
    many tokens are to be generated at most; what comes beyond is not shown.
    """

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    limit: int
    echo: str = ""
    echo_special: bool = False
    """Special tokens of the prompt are written in it."""
    beginnings: tuple[bytes, ...] = ()

    @property
    def begun(self) -> tuple[int, ...]:
        """The prompt without what is given."""
        return self.prompt[: len(self.prompt) - len(self.params.given)]


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
    prompt_logprobs: int | None = None
    """In a list of their own."""
    echo_logprobs: bool = False
    """`logprobs` begin with those of the prompt, which is shown."""
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
