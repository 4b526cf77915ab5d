"""Every deadline, period and factor that depends on another, from few numbers, and which must exceed which.

Milliseconds throughout. What relates to nothing else stands where it is used. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

SLOW_CLOCK = 1.5
"""HAZARD: Mooncake's kernels count their timeout in cycles of the device's peak clock, so at a lower clock they wait
longer than they were told. Files let go before they end let the driver free memory under them, which faults every
client of the MPS server."""


@dataclass(frozen=True, slots=True)
class ProgressConfig:
    """`deadline_ms` from the hang to the verdict. A rank that burns processor time while all wait for it, or says nothing
    and waits for a processor, gets `busy_factor` times it; one that is parked or starting `idle_factor` times, and so do
    all if they fall silent together.
    """

    deadline_ms: int = 1_000
    busy_factor: int = 30
    idle_factor: int = 5

    @property
    def limit_ms(self) -> int:
        """When to judge: early enough for the verdict to be carried out within the deadline."""
        return self.deadline_ms * 3 // 4

    @property
    def common_pause_ms(self) -> int:
        """Nobody was heard for so long: from here on it does not count."""
        return self.deadline_ms // 4


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    attempt_deadline_ms: int = 1_000
    missed_attempts_limit: int = 3
    """A member that let so many attempts in a row time out is fenced."""
    park_after_ms: int = 300
    stable_after_ms: int = 5_000
    relaunch_limit: int = 10
    """Early deaths in a row that are followed by short pauses; then come the long ones. 0: nobody is launched again."""
    relaunch_backoff_ms: int = 100
    relaunch_backoff_max_ms: int = 10_000
    relaunch_long_backoff_ms: int = 10_000
    relaunch_long_backoff_max_ms: int = 300_000
    unwell_after_ms: int = 10_000
    """A group that cannot serve for so long is not called healthy, though its ranks are on their way."""
    forming_grace_ms: int = 15_000
    init_deadline_ms: int = 120_000
    spare_copies_ms: int = 60_000
    """A rank that has drained waits so long for others to have copies of its experts; then it serves on."""
    leave_ms: int = 3_000
    """One that has left the view ends by itself, or is killed."""


@dataclass(frozen=True, slots=True)
class RepairConfig:
    """`copies_in_flight` per rank; a copy that is not reported after `copy_deadline_ms` is planned elsewhere.

    For a plan one slot is in flight for every `ranks_per_planned_copy` members, in the whole group. An event has
    `layers_at_once` looked at; those that are left are a `Tick`'s, which is due at once.
    """

    copies_in_flight: int = 4
    ranks_per_planned_copy: int = 8
    copy_deadline_ms: int = 10_000
    retry_ms: int = 1_000
    layers_at_once: int = 16


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one run. Raises ValueError, which says what must be less than what, and why."""

    hang_deadline_ms: int = ProgressConfig().deadline_ms
    stop_deadline_ms: int = 30_000
    """What running requests get when the group is to stop."""
    ranks: int = 8
    fault_tolerance: bool = True
    """Without it there are no heartbeats, and nobody is judged by them."""
    mps: bool = False
    relaunch_limit: int = MembershipConfig().relaunch_limit

    calm_factor: ClassVar[int] = 3
    """How much rarer pulses and beats are while the group is parked."""
    host_beat_ms: ClassVar[int] = 100
    """A host that has joined says that it lives, and the controller looks who has."""
    silent_beats: ClassVar[int] = 5
    """One that was not heard of when so many were due counts as lost. They are counted: this process may stand still."""
    preparing_beats: ClassVar[int] = 20
    """So many if it has no rank yet: nothing waits for it, and it may be busy."""
    closed_beats: ClassVar[int] = 2
    """So many are left to one whose connection has ended: it makes a new one, if it can."""
    apart_beats: ClassVar[int] = 8
    """Two hosts whose carriers are not connected for so long lose one of them: all ranks wait for what each has for the
    other."""
    agentless_beats: ClassVar[int] = 50
    """So long if one of them waits for its next agent."""
    lease_ms: ClassVar[int] = 1_400
    """A host's ranks end so long after it last spoke and was answered,"""
    lease_margin_ms: ClassVar[int] = 200
    """and a little later they surely have: the kernel's clock is not late by so much."""
    sync_retry_ms: ClassVar[int] = 20
    """A rank that is behind asks again."""
    store_get_ms: ClassVar[int] = 10_000
    """A rank asks for what others have left in the store."""
    slot_pull_ms: ClassVar[int] = 3_000
    """A rank that serves asks a peer for an expert."""
    expert_pull_ms: ClassVar[int] = 5_000
    """So does one that starts,"""
    dense_pull_ms: ClassVar[int] = 30_000
    """and for all that is dense."""
    audit_ms: ClassVar[int] = 30_000
    """Ranks are asked for the checksums of their slots."""
    carry_out_ms: ClassVar[int] = 60_000
    """Whoever has asked for a rebalancing waits for it."""
    server_ready_ms: ClassVar[int] = 120_000
    """The fork server imports what ranks need."""
    server_reply_ms: ClassVar[int] = 10_000
    """It answers a launch, else it is replaced."""
    status_ms: ClassVar[int] = 1_000
    """The exit status of a process that is gone becomes known: its fork server says it, on a busy machine late."""
    leave_ms: ClassVar[int] = 3_000
    """Ranks that are told to stop do, and are gone when they are killed."""
    close_ms: ClassVar[int] = 5_000
    """Each phase of the launcher's end;"""
    reap_ms: ClassVar[int] = 2_000
    """in it the fork server reaps the ranks that it has killed."""

    def __post_init__(self) -> None:
        watched = self._of_the_watch() if self.fault_tolerance else ()
        for shorter_ms, longer_ms, why in (*self._of_all_runs(), *watched):
            if shorter_ms > longer_ms:
                raise ValueError(f"{shorter_ms} ms is more than {longer_ms} ms, but {why}")

    @property
    def progress(self) -> ProgressConfig:
        return ProgressConfig(self.hang_deadline_ms)

    @property
    def pulse_ms(self) -> int:
        """The watch over progress looks."""
        return self.hang_deadline_ms // 10

    @property
    def heartbeat_ms(self) -> int:
        """0: none."""
        return round(self.hang_deadline_ms / 5) if self.fault_tolerance else 0

    @property
    def parked_heartbeat_ms(self) -> int:
        return 4 * self.heartbeat_ms

    @property
    def held_up_ms(self) -> int:
        """A member's control loop that a driver call keeps so much longer than a heartbeat has all threads' stacks
        written to stderr."""
        return self.hang_deadline_ms * 3 // 10

    @property
    def quiet_ms(self) -> int:
        """A rank without a commit for so long had nothing to do: its gap is no stall."""
        return max(2_000, 2 * self.hang_deadline_ms)

    @property
    def kernel_wait_ms(self) -> int:
        """How long a kernel of the exchange waits for a peer before it masks it by itself.

        With MPS it is shorter: a rank that comes back waits for its predecessor's kernels, and these for each peer.
        """
        return round(self.hang_deadline_ms / (5 if self.mps else 2)) if self.fault_tolerance else 20_000

    @property
    def drain_ms(self) -> int:
        """How long a dead rank's kernels may run: at worst they wait for one peer after the other. 0: no matter."""
        return round((self.ranks - 1) * self.kernel_wait_ms * SLOW_CLOCK) + 100 if self.mps else 0

    @property
    def beat_ms(self) -> int:
        """The controller repeats its last number, so that a lost message is noticed."""
        return min(250, self.hang_deadline_ms // 4)

    @property
    def membership(self) -> MembershipConfig:
        least = MembershipConfig()
        attempts = -(-self.hang_deadline_ms // least.attempt_deadline_ms)
        idle_ms = self.progress.idle_factor * self.hang_deadline_ms
        return MembershipConfig(
            missed_attempts_limit=max(least.missed_attempts_limit, attempts),
            stable_after_ms=max(least.stable_after_ms, idle_ms),
            relaunch_limit=self.relaunch_limit,
            init_deadline_ms=max(least.init_deadline_ms, idle_ms, 2 * self.drain_ms),
            leave_ms=self.leave_ms,
        )

    @property
    def host_silent_ms(self) -> int:
        """By then a host that has fallen silent counts as lost."""
        return (self.silent_beats + 2) * self.host_beat_ms

    def _of_all_runs(self) -> Iterator[tuple[int, int, str]]:
        """What must not be longer than what, and why."""
        member, repair = self.membership, RepairConfig()
        init_ms = member.init_deadline_ms
        behind_ms = self.calm_factor * self.beat_ms + self.sync_retry_ms
        copy_ms = repair.copy_deadline_ms
        yield self.host_silent_ms, self.lease_ms, "who is silent is lost before it gives itself up"
        yield (
            4 * self.host_beat_ms,
            self.lease_ms - self.host_silent_ms,
            "a rank sees in time that it may go on",
        )
        yield self.sync_retry_ms, self.beat_ms, "who is behind asks before it hears again that it is"
        yield behind_ms, member.attempt_deadline_ms, "who has missed a prepare catches up"
        yield member.relaunch_backoff_ms, member.relaunch_backoff_max_ms, "pauses before a launch grow"
        yield member.relaunch_backoff_max_ms, member.relaunch_long_backoff_ms, "and never shrink,"
        yield member.relaunch_long_backoff_ms, member.relaunch_long_backoff_max_ms, "the long ones neither"
        yield 2 * member.forming_grace_ms, init_ms, "who is ready does not wait for a rank that is stuck"
        yield 2 * self.drain_ms, init_ms, "a rank whose predecessor's kernels still run is not stuck"
        yield self.server_ready_ms, init_ms, "nor is one that waits for a new fork server"
        yield self.server_reply_ms, self.server_ready_ms, "what is imported is at hand"
        yield 2 * self.dense_pull_ms + self.expert_pull_ms, init_ms, "one silent peer leaves time for another"
        yield 2 * self.store_get_ms, init_ms, "a rank that misses its peers says so itself"
        yield 2 * self.slot_pull_ms, copy_ms, "another source is asked in good time"
        yield (
            copy_ms + repair.retry_ms,
            member.spare_copies_ms,
            "nor does a rank stay for the want of one copy",
        )
        yield copy_ms + repair.retry_ms, self.carry_out_ms, "a copy of a plan may be made again"
        yield 2 * self.slot_pull_ms, self.audit_ms, "a rank ends a pull before it sums its slots"
        yield 2 * self.status_ms, self.leave_ms, "who is killed at the end is heard to be gone"
        yield 2 * self.reap_ms, self.close_ms, "the fork server cleans up before it is killed itself"

    def _of_the_watch(self) -> Iterator[tuple[int, int, str]]:
        watch, member = self.progress, self.membership
        pause_ms, limit_ms, factor = watch.common_pause_ms, watch.limit_ms, watch.idle_factor
        calm_pulse_ms, kernels_ms = self.calm_factor * self.pulse_ms, round(self.kernel_wait_ms * SLOW_CLOCK)
        missed_ms = member.missed_attempts_limit * member.attempt_deadline_ms
        for beat_ms, idle in ((self.heartbeat_ms, 1), (self.parked_heartbeat_ms, factor)):
            yield beat_ms, pause_ms * idle, "heartbeats that come in time are no pause of all"
            yield 3 * beat_ms, limit_ms * idle, "two of them may be late without a verdict"
            yield beat_ms + self.held_up_ms, limit_ms * idle, "stacks are written before a rank is fenced"
        yield limit_ms + self.pulse_ms, self.hang_deadline_ms, "there is time left to carry a verdict out"
        yield 2 * self.pulse_ms, limit_ms - limit_ms // 3, "who is in doubt is looked at twice before"
        yield calm_pulse_ms, pause_ms * factor, "the watch does not rest for a whole pause of all"
        yield self.beat_ms + self.sync_retry_ms, limit_ms, "nobody is judged by what it could not know"
        yield kernels_ms, self.hang_deadline_ms, "whom kernels mask is fenced, too"
        yield limit_ms * factor, member.stable_after_ms, "who hangs at once has not served"
        yield self.hang_deadline_ms, missed_ms, "whether a member hangs is for the watch to say"
        yield 2 * self.hang_deadline_ms, self.quiet_ms, "the gap that a hang leaves is a stall"


USUAL = Timing()
"""At default settings."""
