"""What the HTTP layer needs of the rest of the run process. The router's shell implements it; tests fake it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

from elastic_ep.wire.messages import FailureCode, SamplingParams, Token

if TYPE_CHECKING:
    from elastic_ep.group.history import History


# Not frozen dataclasses: contextlib and asyncio assign __traceback__ and __context__ on exceptions.
class Busy(Exception):
    """Too many requests are queued already: 429, try again after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"too many requests, retry after {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Stopping(Exception):
    """The server takes no new requests because it is shutting down: 503."""


class Refused(Exception):
    """This request cannot be run, whoever tries: 400."""


class Unavailable(Exception):
    """Nothing will serve unless an operator acts: 503, try again after `retry_after_s` seconds."""

    def __init__(self, reason: str, retry_after_s: int) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an admitted request ended before its time."""

    code: FailureCode
    detail: str


class LossCause(StrEnum):
    """Why a rank was lost: all that there are, so that each has its series in the metrics from the start."""

    KILLED = "killed"
    """By a signal from outside."""
    CRASH = "crash"
    """By a signal that a process gives itself: a segmentation fault, an abort."""
    HANG = "hang"
    EXCEPTION = "exception"
    """It said itself what went wrong."""
    EXIT = "exit"
    TIMEOUT = "timeout"
    """Fenced: it did not start, connect or promise in time."""
    PROTOCOL = "protocol"
    """Fenced: it said what it must not say, or what it was told may not have reached it."""
    LAUNCH_FAILED = "launch_failed"
    HOST = "host"
    """With all others on its host."""
    UNKNOWN = "unknown"
    """Its fork server ended first, so nobody has its exit status."""


@dataclass(frozen=True, slots=True)
class LastLoss:
    """The last time that a rank was lost.

    `at` is ISO 8601 in UTC, `state` the one that it was lost in, `requests` how many it had, `stall_s` the longest gap
    between two steps of a survivor beyond a usual step (None: nobody had work), `back_after_s` None while it is away.
    """

    incarnation: int
    at: str
    state: str
    cause: str
    why: str
    requests: int
    stall_s: float | None
    back_after_s: float | None


class Move(NamedTuple):
    """The `number`th change of a state: `rank` (or `history.GROUP`, `history.HOST`) came into `state`.

    `at_ms` is in milliseconds since 1970.
    """

    number: int
    at_ms: int
    rank: int
    incarnation: int
    state: str


class Loss(NamedTuple):
    """A rank that was lost, as far as it is known; the fields are those of `LastLoss`.

    `at_ns` is CLOCK_MONOTONIC, as in the event log. `why` quotes nothing that a client has sent.
    """

    rank: int
    incarnation: int
    at_ms: int
    at_ns: int
    state: str
    cause: str
    why: str
    requests: int
    taken_over_by: str
    stall_s: float | None
    back_after_s: float | None


class Load(NamedTuple):
    """Requests that a rank has, and that none has."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Layer:
    """Of one layer, the expert in each slot, or -1; rank by rank, `slots_per_rank` each. `least[layer]`: how few copies
    of an expert ranks that take part have, of every layer."""

    version: int
    layer: int
    num_experts: int
    slots_per_rank: int
    slots: tuple[int, ...]
    least: tuple[int, ...]


class UnknownRank(Exception):
    """There is no such rank, or no such incarnation of it yet: 404. The message says which there are."""


class Conflict(Exception):
    """The group cannot do that as it is now: 409. The message says why, and what would help."""


class OutOfRange(Exception):
    """No group that was started like this one can do that: 400. `field` of the body is wrong, the message says how."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Health:
    """The body of `GET /health`: of the service as a whole.

    `healthy`: a request is answered now, or within the pause that a loss normally makes. `reason` says why nobody serves
    at this moment; empty if somebody does.
    """

    healthy: bool
    state: str
    serving_ranks: int
    reason: str


@dataclass(frozen=True, slots=True)
class Relaunch:
    """The body of `POST /v1/fault_tolerance/relaunch`: ranks launched (or to be, as soon as their process is gone), and
    those that were there already and are left alone."""

    relaunched: tuple[int, ...]
    running: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Killing:
    """The body of `POST /v1/fault_tolerance/kill`: whether it was this call that had it killed; `incarnation` is the
    rank's present one."""

    killed: bool
    incarnation: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The body of `POST /v1/fault_tolerance/drain`: `state` of the rank by now: "Draining", or already one in which it
    has no seat. `data_parallel_size`: how many ranks are to take part from now on."""

    rank: int
    incarnation: int
    state: str
    data_parallel_size: int


@dataclass(frozen=True, slots=True)
class Scaled:
    """The body of `POST /scale_elastic_ep`: `message` as vLLM says it; which ranks have a seat now."""

    message: str
    data_parallel_size: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVPages:
    """Of one rank in `GET /v1/fault_tolerance/status`: pages on its `device`, of which requests hold `held`, and others
    may share `named`; pages and bytes of its part of the `shelf`."""

    device: int = 0
    held: int = 0
    named: int = 0
    shelf: int = 0
    shelf_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One rank in `GET /v1/fault_tolerance/status`.

    `status` is "healthy", "unhealthy" or "dead"; `state` the lifecycle's own word (`RankState`); `pid` None
    when no process exists; `reason` says why a rank is not healthy; `last_loss` stays when the rank is back;
    `kv_cache_usage` is the share of its KV cache that is in use, 0 to 1.
    """

    id: int
    status: str
    state: str
    incarnation: int
    pid: int | None
    running: int
    waiting: int
    reason: str
    last_loss: LastLoss | None = None
    kv_cache_usage: float = 0.0
    kv_pages: KVPages = KVPages()


@dataclass(frozen=True, slots=True)
class FaultToleranceStatus:
    """The body of `GET /v1/fault_tolerance/status`.

    `state` is the group's lifecycle word, `tolerates` how many more ranks can be lost, in the worst case,
    with every expert still alive, `tolerates_hosts` how many more hosts (0 if there is one). `idle`: there is nothing
    to do, so no steps are run; the next request starts them. `data_parallel_size`: ranks that an operator wants;
    `scaling`: some of the others have not left yet, or some that were asked back are not there yet.
    """

    state: str
    epoch: int
    step: int
    tolerates: int
    engines: tuple[EngineStatus, ...]
    idle: bool = False
    tolerates_hosts: int = 0
    data_parallel_size: int = 0
    scaling: bool = False


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """One physical expert. `logical` is None for an empty slot; `alive` whether its rank takes part."""

    physical: int
    rank: int
    logical: int | None
    alive: bool
    checksum: str | None


@dataclass(frozen=True, slots=True)
class LayerStatus:
    layer: int
    tolerates: int
    slots: tuple[SlotStatus, ...]


@dataclass(frozen=True, slots=True)
class ExpertsStatus:
    """The body of `GET /v1/fault_tolerance/experts`: who holds what. `version` counts changes since the launch."""

    version: int
    tolerates: int
    layers: tuple[LayerStatus, ...]
    tolerates_hosts: int = 0


@dataclass(frozen=True, slots=True)
class CorruptSlot:
    layer: int
    physical: int
    rank: int


@dataclass(frozen=True, slots=True)
class Verification:
    """The body of `POST /v1/fault_tolerance/verify`: slots re-checked, those that differ, ranks that did not answer."""

    checked: int
    differ: tuple[CorruptSlot, ...]
    silent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rebalancing:
    """The body of `POST /rebalance`: copies planned and made, max/mean load of a rank before and as expected."""

    planned: int
    made: int
    imbalance_before: float
    imbalance: float
    version: int


class Stream(Protocol):
    """The tokens of one request, in batches of what is ready. Ends after the token whose `finish` is set, or without
    one when `failure` is."""

    @property
    def failure(self) -> Failure | None: ...

    @property
    def assigned_s(self) -> float | None:
        """When a rank was first given the request, `time.monotonic()`; None: none has been."""
        ...

    @property
    def moved_s(self) -> tuple[float, ...]:
        """When others were given it afterwards."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that did not have to be computed. Known when there is a token."""
        ...

    def __aiter__(self) -> AsyncIterator[tuple[Token, ...]]: ...

    async def __anext__(self) -> tuple[Token, ...]: ...

    def gather(self, least: int, came: Callable[[int], None]) -> None:
        """From now on a batch has `least` tokens or more, unless it is the last; `came` hears at once how many come."""

    def cancel(self) -> None:
        """Stop generating. Idempotent, and no error after the end."""


class Backend(Protocol):
    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        choice: int,
        beginnings: tuple[bytes, ...] = (),
    ) -> Stream:
        """Queue one request. Noise is a function of (`seed`, `choice`, position); 0 <= seed < 2**63. `beginnings` of the
        prompt, if it may share pages with others: see machines/requests/prefixes.py.

        Raises `Busy`, `Refused`, `Unavailable` and `Stopping`.
        """
        ...

    def status(self) -> FaultToleranceStatus: ...

    @property
    def history(self) -> History: ...

    def load(self) -> Load: ...

    def placement_version(self) -> int: ...

    async def layer(self, layer: int) -> Layer | None:
        """None: there is no such layer."""
        ...

    def refresh_metrics(self) -> None:
        """Set what is read where it is, and not told at every change: before each scrape."""

    def health(self) -> Health: ...

    def relaunch(self, rank: int | None) -> Relaunch:
        """Launch `rank`, or every rank (None), now if it is dead, however long it was to wait. Idempotent.

        Raises `UnknownRank` and `Stopping`.
        """
        ...

    def kill(self, rank: int, incarnation: int) -> Killing:
        """Kill that incarnation, as if it had died by itself: one that is gone, or is being killed, is left alone.

        Raises `UnknownRank` and `Stopping`.
        """
        ...

    def drain(self, rank: int, patience_s: float) -> Draining:
        """Have the rank leave, its requests ending within `patience_s` or going on elsewhere, and stay away. Idempotent.

        Raises `UnknownRank`, `Conflict` and `Stopping`.
        """
        ...

    async def scale(self, size: int, patience_s: float) -> Scaled:
        """Have `size` ranks take part; answers when they do. Who goes is asked as by `drain`.

        Raises `OutOfRange`, `Conflict`, `Stopping`, and `TimeoutError`, after which it may come about still.
        """
        ...

    @property
    def scaling(self) -> bool:
        """Whether ranks leave, or those that were asked back are on their way."""
        ...

    async def experts(self) -> ExpertsStatus: ...

    async def verify(self) -> Verification: ...

    async def rebalance(self) -> Rebalancing: ...
