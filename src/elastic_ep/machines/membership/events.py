"""What goes into the membership machine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_ep.machines.contract import Tick
from elastic_ep.placement import Change
from elastic_ep.wire.messages import Drain, Member, Published, RankState, Resume, Shutdown

AS_ASKED = "as asked"
"""Why a rank that was told to stop has ended."""
STOPPING = "stopping"
"""Why one that cannot be told, or does not hear, was killed when the group stopped."""


class GroupState(StrEnum):
    FORMING = "Forming"
    SERVING = "Serving"
    DEGRADED = "Degraded"
    ADMITTING = "Admitting"
    PAUSED = "Paused"
    HOLDING = "Holding"
    STOPPING = "Stopping"


# Events


@dataclass(frozen=True, slots=True)
class Start:
    """Launch the first incarnation of every rank."""


@dataclass(frozen=True, slots=True)
class Grown:
    """There is a place for these ranks: those that the group does not want yet, it wants from now on."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProcessStarted:
    member: Member


@dataclass(frozen=True, slots=True)
class Reported:
    """The rank says which state it has reached: InitCUDA, InitDist, Joining, Stopped or Failed.

    `suspects` are the requests that it holds for the cause, if it failed.
    """

    member: Member
    state: RankState
    reason: str = ""
    suspects: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Promised:
    member: Member
    attempt: int
    step: int


@dataclass(frozen=True, slots=True)
class DeathNoticed:
    """The process is dead or surely dying. Its device work and its memory may outlive the notice."""

    member: Member
    cause: str


@dataclass(frozen=True, slots=True)
class HostLost:
    """A host is taken for dead, and with it all of these, in one view. They may run on until `ProcessGone`: till then
    their next incarnations get ready, and are not admitted."""

    members: tuple[Member, ...]
    cause: str


@dataclass(frozen=True, slots=True)
class ProcessGone:
    """Nothing of the process is left; the rank may be launched again, or if it was, be admitted."""

    member: Member
    status: str


@dataclass(frozen=True, slots=True)
class Suspected:
    """The watch over progress, or a protocol error, holds this member for faulty: fence it."""

    member: Member
    reason: str


@dataclass(frozen=True, slots=True)
class WorkBegan:
    """There is a request somewhere."""


@dataclass(frozen=True, slots=True)
class WorkEnded:
    """There is no request anywhere."""


@dataclass(frozen=True, slots=True)
class StepSeen:
    """Some member has begun `step`. Needed only when nobody is left to ask."""

    step: int


@dataclass(frozen=True, slots=True)
class Placed:
    """The placement was changed so: an expert may be covered now, or no longer."""

    version: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class RelaunchRequested:
    """An operator wants these ranks launched now, however long they were to wait. Nothing happens to one that runs."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RetireRequested:
    """An operator wants these ranks to leave, and to stay away until they are asked back.

    One that serves drains first: its requests have `patience_ms` to end, then they go on elsewhere. Asked again, the
    shorter patience counts. Nothing happens to a rank without which experts would have no slots.
    """

    ranks: tuple[int, ...]
    patience_ms: int


@dataclass(frozen=True, slots=True)
class ReturnRequested:
    """An operator wants these ranks in the group again. One that drains goes on; nothing happens to others that run."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RankDrained:
    """The member drains, and no request is left at it."""

    member: Member


@dataclass(frozen=True, slots=True)
class StopRequested:
    """No more relaunches; the router drains."""


@dataclass(frozen=True, slots=True)
class StopRanks:
    """The requests are done: every rank may go."""


@dataclass(frozen=True, slots=True)
class StopForced:
    """The deadline for a graceful stop has passed."""


Event = (
    Start
    | Grown
    | Tick
    | ProcessStarted
    | Reported
    | Promised
    | DeathNoticed
    | HostLost
    | ProcessGone
    | Suspected
    | WorkBegan
    | WorkEnded
    | StepSeen
    | Placed
    | RelaunchRequested
    | RetireRequested
    | ReturnRequested
    | RankDrained
    | StopRequested
    | StopRanks
    | StopForced
)

# Effects


@dataclass(frozen=True, slots=True)
class Launch:
    member: Member


@dataclass(frozen=True, slots=True)
class Fence:
    """Kill this process for certain."""

    member: Member
    reason: str


@dataclass(frozen=True, slots=True)
class Publish:
    body: Published


@dataclass(frozen=True, slots=True)
class SendTo:
    member: Member
    message: Drain | Resume | Shutdown


@dataclass(frozen=True, slots=True)
class MemberUp:
    """The router may give it requests."""

    member: Member


@dataclass(frozen=True, slots=True)
class MemberDown:
    """Its requests continue elsewhere. `left`: it was asked to go, and is no loss."""

    member: Member
    reason: str
    left: bool = False


@dataclass(frozen=True, slots=True)
class MemberResumed:
    """It does not leave after all: the router may give it requests again. `reason` if nobody has asked for that."""

    member: Member
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RankMoved:
    member: Member
    state: RankState
    reason: str

    @property
    def is_loss(self) -> bool:
        """The incarnation has ended, and nobody had asked it to."""
        if self.state is RankState.STOPPED:
            return not self.reason.startswith((AS_ASKED, STOPPING))
        return self.state is RankState.FAILED


@dataclass(frozen=True, slots=True)
class GroupMoved:
    state: GroupState


@dataclass(frozen=True, slots=True)
class NothingWillServe:
    """The group cannot serve, and nothing that it does by itself will change that. Said once; the run is over.

    The routing machine hears it too: all requests fail then, and nothing is admitted any more.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class StartFailed:
    """Nobody has ever been ready, and every rank failed alike: to try again is of no use. Said once; the run is over."""

    reason: str


@dataclass(frozen=True, slots=True)
class AllStopped:
    """No process is left."""


Verdict = NothingWillServe | StartFailed
Effect = (
    Launch
    | Fence
    | Publish
    | SendTo
    | MemberUp
    | MemberDown
    | MemberResumed
    | RankMoved
    | GroupMoved
    | NothingWillServe
    | StartFailed
    | AllStopped
)
