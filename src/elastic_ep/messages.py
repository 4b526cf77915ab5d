"""Every message that crosses a process boundary, and their one encoding.

Messages are frozen dataclasses, encoded as one JSON array ``[type name, field, field, ...]``. Decoding checks
every field against its declared type, so a malformed or foreign message raises `MalformedMessage` and never
reaches a machine.

Which message travels where (DESIGN: three planes):

* PUB, controller to all, numbered: `Prepare`, `Commit`, `Abort`, `View`, `Beat`, wrapped in `Numbered`.
* ROUTER/DEALER, rank to controller: `Hello`, `RankReport`, `Promise`, `Heartbeat`, `StepReport`,
  `SnapshotRequest`.
* ROUTER/DEALER, controller to rank: `Snapshot`, `Assign`, `Cancel`, `Drain`, `Shutdown`.
"""

from __future__ import annotations

import json
import operator
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from elastic_ep.placement import Change, Placement


class MalformedMessage(ValueError):
    """The bytes are not one of this project's messages."""


class Member(NamedTuple):
    """One launch of one rank."""

    rank: int
    incarnation: int


class RankState(StrEnum):
    """The lifecycle of a rank; the words that operators see."""

    LAUNCHING = "Launching"
    INIT_CUDA = "InitCUDA"
    INIT_DIST = "InitDist"
    JOINING = "Joining"
    SERVING = "Serving"
    DRAINING = "Draining"
    STOPPED = "Stopped"
    FAILED = "Failed"


@dataclass(frozen=True, slots=True)
class Seat:
    """A member's place in a view: it takes part in every step from `first_step` on."""

    rank: int
    incarnation: int
    first_step: int

    @property
    def member(self) -> Member:
        return Member(self.rank, self.incarnation)


@dataclass(frozen=True, slots=True)
class View:
    """Who takes part, from which step on. Self-contained: the newest epoch wins, whatever came before it.

    A member that is in an older view and not in this one is lost: mask it at once. `park_at` is the step
    that nobody may begin (the group pauses at the boundary before it), or None.
    """

    epoch: int
    seats: tuple[Seat, ...]
    park_at: int | None = None

    def seat(self, rank: int) -> Seat | None:
        return next((seat for seat in self.seats if seat.rank == rank), None)

    @property
    def members(self) -> frozenset[Member]:
        return frozenset(seat.member for seat in self.seats)


@dataclass(frozen=True, slots=True)
class Prepare:
    """Connect to the joiners (inactive) and promise. Without joiners: promise, the group wants to park."""

    attempt: int
    joiners: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """All promised: the attempt's outcome is this view."""

    attempt: int
    view: View


@dataclass(frozen=True, slots=True)
class Abort:
    """The attempt is void, and so is every promise made for it."""

    attempt: int


@dataclass(frozen=True, slots=True)
class PlacementChanged:
    """Read-copy-update: each rank routes by it from its own next boundary on. Versions count up by one."""

    version: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class Beat:
    """Nothing new. Shows the last number, so that a lost message is noticed."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """A PUB message with its number. A `Beat` repeats the last number, all others take the next."""

    number: int
    body: Prepare | Commit | Abort | View | PlacementChanged | Beat


@dataclass(frozen=True, slots=True)
class Hello:
    """The rank holds its death mutex and its control loop runs: it can be watched now."""

    rank: int
    incarnation: int
    pid: int


@dataclass(frozen=True, slots=True)
class RankReport:
    """The rank's lifecycle moved to `state`. `reason` explains `Failed`."""

    rank: int
    incarnation: int
    state: RankState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Promise:
    """I will not begin `step` before I hear Commit or Abort of `attempt`. A joiner promises step 0."""

    rank: int
    incarnation: int
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sign of life.

    `step` is the step the forward thread is in, `operations` counts its exchange operations, `cpu_ms` the
    processor time of the forward thread, `waiting_for` the rank whose data it waits for, `parked` that it
    waits at a boundary because it was told to.
    """

    rank: int
    incarnation: int
    step: int
    operations: int
    cpu_ms: int
    waiting_for: int | None
    parked: bool


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens; the same meaning as in vLLM. Defaults: greedy.

    `logprobs` is the number of alternatives to report (0: the sampled token's own), None for no logprobs.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Assign:
    """Run this request from position len(prompt) + len(emitted) on.

    `emitted` is what earlier owners already produced. Sampling noise at a position is a function of
    (`seed`, `choice`, position) alone, so any rank continues the same stream.
    """

    request_id: int
    prompt: tuple[int, ...]
    emitted: tuple[int, ...]
    params: SamplingParams
    seed: int
    choice: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Forget this request. Unknown or finished ids are no error."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Finish what you run, take nothing new."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Stop at the next boundary and exit."""


class TopLogprob(NamedTuple):
    token: int
    logprob: float


class Token(NamedTuple):
    """One committed token. `index` counts the request's generated tokens from 0, earlier owners' included.

    `finish` is "stop" (end-of-sequence or stop token; that token is included), "length", "abort" or None.
    """

    request_id: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs of a token
    token: int
    finish: str | None = None
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step brought. Sent when tokens were committed or the step was poisoned.

    `masked` names the ranks that were masked during a poisoned step. `started_ns` and `ended_ns` are
    CLOCK_MONOTONIC nanoseconds.
    """

    rank: int
    incarnation: int
    step: int
    epoch: int
    started_ns: int
    ended_ns: int
    tokens: tuple[Token, ...]
    running: int
    waiting: int
    operations: int
    """As in a heartbeat, which this replaces; so is `cpu_ms`."""
    cpu_ms: int
    masked: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """The rank has just started or has seen a gap in the numbers."""

    rank: int
    incarnation: int


@dataclass(frozen=True, slots=True)
class PlacementSeen:
    """The forward thread has passed a boundary with this version: it addresses no slot by an older one."""

    rank: int
    incarnation: int
    version: int


@dataclass(frozen=True, slots=True)
class CopySlot:
    """Fill the slot `physical` of `layer`, which nobody addresses, with `logical`."""

    ticket: int
    layer: int
    physical: int
    logical: int


@dataclass(frozen=True, slots=True)
class SlotCopied:
    """The outcome of `CopySlot`: the checksum of the bytes now in the slot, or why there are none."""

    rank: int
    incarnation: int
    ticket: int
    checksum: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class SumSlots:
    """Compute the checksums of all your slots anew."""

    ticket: int


class SlotSum(NamedTuple):
    """What the memory of slot `physical` of `layer` amounts to: CRC-32 of its float32 bytes."""

    layer: int
    physical: int
    checksum: int


@dataclass(frozen=True, slots=True)
class SlotSums:
    rank: int
    incarnation: int
    ticket: int
    sums: tuple[SlotSum, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the PUB messages up to `number` amount to: the view, and the attempt in progress, if any."""

    number: int
    view: View
    attempt: Prepare | None
    placement: Placement | None = None


FromRank = (
    Hello
    | RankReport
    | Promise
    | Heartbeat
    | StepReport
    | SnapshotRequest
    | PlacementSeen
    | SlotCopied
    | SlotSums
)
ToRank = Snapshot | Assign | Cancel | Drain | Shutdown | CopySlot | SumSlots
Published = Prepare | Commit | Abort | View | PlacementChanged | Beat

_T = TypeVar("_T")
_Reader = Callable[[Any], Any]


def to_plain(value: Any) -> Any:
    """`value` as JSON takes it: a dataclass becomes ``[type name, field, ...]``, a named tuple a list of its fields.

    A class that has `plain_fields` says itself which fields; it is for the log only, and cannot be read back.
    """
    cls = type(value)
    if cls in _PLAIN:
        return value
    if cls is tuple or cls is list:
        return [item if type(item) in _PLAIN else to_plain(item) for item in value]
    if is_dataclass(cls):
        parts = _getter(cls)(value)
        return [cls.__name__, *[part if type(part) in _PLAIN else to_plain(part) for part in parts]]
    return value  # a StrEnum is a string to JSON


def encode(message: Any) -> bytes:
    return json.dumps(to_plain(message), separators=(",", ":")).encode()


def decode(data: bytes, expected: type[_T] | Any) -> _T:
    """The message in `data`, which must be of the type (or union of types) `expected`.

    Raises `MalformedMessage`.
    """
    try:
        plain = json.loads(data)
    except ValueError as error:
        raise MalformedMessage(f"not JSON: {data[:80]!r}") from error
    except RecursionError as error:
        raise MalformedMessage("nested too deeply") from error
    return typing.cast(_T, _reader(expected)(plain))


def from_plain(plain: Any, expected: type[_T] | Any) -> _T:
    """The inverse of `to_plain`, checked against `expected`. Raises `MalformedMessage`."""
    return typing.cast(_T, _reader(expected)(plain))


_PLAIN = frozenset({int, str, float, bool, type(None), Member, Token, TopLogprob, Change, SlotSum})
"""What JSON takes as it is: a named tuple is a list to it. Tokens are, because every step's pass here twice."""
_names_cache: dict[type, tuple[str, ...]] = {}
_getters: dict[type, Callable[[Any], tuple[Any, ...]]] = {}
_readers: dict[Any, _Reader] = {}


def _getter(cls: type) -> Callable[[Any], tuple[Any, ...]]:
    """All fields at once: the messages of every step pass here."""
    if cls not in _getters and hasattr(cls, "plain_fields"):
        _getters[cls] = cls.plain_fields
    elif cls not in _getters:
        names = _names(cls)
        one = operator.attrgetter(names[0]) if len(names) == 1 else None
        many = operator.attrgetter(*names) if len(names) > 1 else None
        _getters[cls] = many or ((lambda value: (one(value),)) if one else (lambda _value: ()))
    return _getters[cls]


def _names(cls: type) -> tuple[str, ...]:
    if cls not in _names_cache:
        _names_cache[cls] = tuple(field.name for field in fields(cls))
    return _names_cache[cls]


def _reader(hint: Any) -> _Reader:
    if hint not in _readers:
        _readers[hint] = _make_reader(hint)
    return _readers[hint]


def _make_reader(hint: Any) -> _Reader:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _union_reader(list(typing.get_args(hint)))
    if origin is tuple:
        return _sequence_reader(typing.get_args(hint)[0])
    if isinstance(hint, type) and issubclass(hint, tuple):
        return _named_tuple_reader(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return _record_reader(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_reader(hint)
    return _scalar_reader(hint)


def _union_reader(arms: list[Any]) -> _Reader:
    records = {str(arm.__name__): _reader(arm) for arm in arms if isinstance(arm, type) and is_dataclass(arm)}
    others = [_reader(arm) for arm in arms if not is_dataclass(arm) and arm is not type(None)]
    optional = type(None) in arms

    def read(plain: Any) -> Any:
        if plain is None and optional:
            return None
        if isinstance(plain, list) and plain and isinstance(plain[0], str) and plain[0] in records:
            return records[plain[0]](plain)
        for other in others:
            return other(plain)
        raise MalformedMessage(f"none of {sorted(records)}: {str(plain)[:80]}")

    return read


def _sequence_reader(item: Any) -> _Reader:
    read_item = _reader(item)

    def read(plain: Any) -> Any:
        if not isinstance(plain, list):
            raise MalformedMessage(f"expected a list, got {str(plain)[:80]}")
        return tuple([read_item(entry) for entry in plain])

    return read


def _named_tuple_reader(cls: type) -> _Reader:
    hints = typing.get_type_hints(cls)
    readers = [_reader(hint) for hint in hints.values()]

    def read(plain: Any) -> Any:
        if not isinstance(plain, list) or len(plain) != len(readers):
            raise MalformedMessage(f"expected {list(hints)}, got {str(plain)[:80]}")
        return cls(*[reader(value) for reader, value in zip(readers, plain, strict=True)])

    return read


def _record_reader(cls: type) -> _Reader:
    hints = typing.get_type_hints(cls)
    readers = [_reader(hints[name]) for name in _names(cls)]
    expected = len(readers) + 1

    def read(plain: Any) -> Any:
        if not isinstance(plain, list) or len(plain) != expected or plain[0] != cls.__name__:
            raise MalformedMessage(f"expected {cls.__name__}, got {str(plain)[:80]}")
        return cls(*[reader(value) for reader, value in zip(readers, plain[1:], strict=True)])

    return read


def _enum_reader(cls: type[StrEnum]) -> _Reader:
    def read(plain: Any) -> Any:
        try:
            return cls(plain)
        except ValueError as error:
            raise MalformedMessage(f"not a {cls.__name__}: {plain!r}") from error

    return read


def _scalar_reader(cls: type) -> _Reader:
    def read(plain: Any) -> Any:
        if type(plain) is cls:
            return plain
        if cls is float and type(plain) is int:
            return float(plain)
        raise MalformedMessage(f"expected {cls.__name__}, got {str(plain)[:80]}")

    return read
