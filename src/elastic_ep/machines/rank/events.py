"""What a rank's machine hears, and what it says must be done. Messages of the controller are events as they come."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.placement import Placement
from elastic_ep.wire.messages import Drain, Member, Numbered, RankReport, Resume, Shutdown, Snapshot, View

# Events


@dataclass(frozen=True, slots=True)
class Started:
    """The process runs and its control loop can be watched. The engine is being built from now on."""


@dataclass(frozen=True, slots=True)
class DeviceOpened:
    """The GPU is open, and no kernel has run yet."""


@dataclass(frozen=True, slots=True)
class EngineReady:
    """Device, weights and exchange are there: masks reach the exchange from now on."""


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """Nothing slow is left to do before the first step. `num_pages` is the size of the KV cache."""

    num_pages: int = 0


@dataclass(frozen=True, slots=True)
class StepsEnded:
    """The forward thread has ended, as asked."""


@dataclass(frozen=True, slots=True)
class StepsFailed:
    """Steps cannot go on: the forward thread has ended by an error, while it computed the requests `suspects`."""

    reason: str
    suspects: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PeerDied:
    """The short way's notice, most of the time before the view that lacks it."""

    member: Member


ThreadEvent = DeviceOpened | WarmedUp | StepsEnded | StepsFailed
"""The forward thread's own word."""
Event = Numbered | Snapshot | Drain | Resume | Shutdown | Started | EngineReady | PeerDied | ThreadEvent

# Effects; a `RankReport` is one as it goes to the controller


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """A message is missing: ask until the machine is `synchronised`."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Get ready for these members, which stay inactive."""

    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True)
class MakePromise:
    """Choose a step not begun yet, hold before it, and tell the controller. A joiner (`seated` false) promises 0."""

    attempt: int
    seated: bool


@dataclass(frozen=True, slots=True)
class ReleaseHold:
    """The promise is redeemed or void."""


@dataclass(frozen=True, slots=True)
class Mask:
    """In the exchange, which is there. Once a member."""

    member: Member


@dataclass(frozen=True, slots=True)
class RouteAround:
    """A dead peer, from the next boundary on, whatever the view says of it."""

    member: Member


@dataclass(frozen=True, slots=True)
class Adopt:
    """Use this view from the next boundary on."""

    view: View


@dataclass(frozen=True, slots=True)
class AdoptPlacement:
    """Route by this placement from the next boundary on."""

    placement: Placement

    def plain_fields(self) -> tuple[int]:
        """For the log: a large model's changes often, and what it holds follows from the events."""
        return (self.placement.version,)


@dataclass(frozen=True, slots=True)
class StopSteps:
    """The forward thread is to end at its next boundary."""


@dataclass(frozen=True, slots=True)
class Exit:
    """Everything is said: end the process with this status."""

    status: int


@dataclass(frozen=True, slots=True)
class Expelled:
    """The others go on without this incarnation: it must end at once, whatever its threads do."""


Effect = (
    AskSnapshot
    | Connect
    | MakePromise
    | ReleaseHold
    | Mask
    | RouteAround
    | Adopt
    | AdoptPlacement
    | RankReport
    | StopSteps
    | Exit
    | Expelled
)
