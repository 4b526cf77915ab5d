"""One rank, as it sees itself: its lifecycle (`lifecycle.RANK`) and its side of the membership protocol.

It keeps the numbered messages in order (asking for a snapshot when one is missing) and says what follows from
each: whom to connect to, when to promise, which view to adopt, whom to mask, what to report, when to end.
"""

from __future__ import annotations

from elastic_ep.machines.machine import Machine
from elastic_ep.machines.rank import events as ev
from elastic_ep.machines.rank.lifecycle import RANK, SEATED
from elastic_ep.machines.tables import TableMachine
from elastic_ep.placement import Placement
from elastic_ep.wire.messages import (
    Abort,
    Beat,
    Commit,
    Drain,
    Member,
    Numbered,
    PlacementChanged,
    Prepare,
    Published,
    RankReport,
    RankState,
    Resume,
    Shutdown,
    Snapshot,
    View,
)

_WITHOUT_ENGINE = (RankState.LAUNCHING, RankState.INIT_CUDA)


class RankMachine(Machine[ev.Event, ev.Effect]):
    """Feed it with `step`; `stage`, `view` and `synchronised` may be read."""

    def __init__(self, me: Member) -> None:
        self.me = me
        self.lifecycle = TableMachine(RANK)
        self.number: int | None = None
        """Of the newest message that was applied; None: nothing is known yet."""
        self.view = View(epoch=0, seats=())
        self.attempt: Prepare | None = None
        self.placement: Placement | None = None
        self.masked: frozenset[Member] = frozenset()
        """Those that are masked, or will be as soon as there is an exchange."""
        self._subscribed = False
        """A PUB message has come: PUB loses what precedes the subscription, without a trace."""
        self._behind = False
        """A message was missing, and no snapshot has come since."""
        self._warm = False
        self._num_pages = 0
        self._drain = False
        """Asked to drain. HAZARD: that may overtake the view that seats this rank: they come by two sockets."""
        self._early: dict[int, Numbered] = {}
        self._effects: list[ev.Effect] = []

    def _step(self, event: ev.Event) -> list[ev.Effect]:
        """Nothing follows from what comes after the end."""
        self._effects = []
        if not self.lifecycle.final:
            self._hear(event)
            self._say_ready()
        return self._effects

    def _check(self) -> None:
        assert self.number is not None or not self.view.seats, "a view without a number"
        assert all(number > (self.number or 0) for number in self._early), "an old message is kept"
        assert self.me not in self.masked, "it masks itself"
        if not self.lifecycle.final:
            assert (self.stage in SEATED) is (self.me in self.view.members), f"{self.stage} and {self.view}"

    @property
    def stage(self) -> RankState:
        """Where in its life it is."""
        stage: RankState = self.lifecycle.state
        return stage

    @property
    def synchronised(self) -> bool:
        """There is nothing to ask the controller for."""
        return self._subscribed and self.number is not None and not self._behind

    def _hear(self, event: ev.Event) -> None:
        match event:
            case Numbered():
                self._on_numbered(event)
            case Snapshot():
                self._on_snapshot(event)
            case ev.PeerDied(member):
                if member != self.me:
                    self._mask(member)
                    self._effects.append(ev.RouteAround(member))
            case Drain():
                self._drain = True
                self._drain_if_asked()
            case Resume():
                self._drain = False
                if self.stage is RankState.DRAINING:
                    self.lifecycle.fire("resume")
            case Shutdown():
                self._stop()
            case ev.Started():
                self._move("process_started")
            case ev.DeviceOpened():
                # Said again, so that the run process holds what is open before kernels run.
                self._effects.append(RankReport(self.stage))
            case ev.EngineReady():
                self._effects += [ev.Mask(member) for member in sorted(self.masked)]
                self._move("device_ready")
            case ev.WarmedUp(num_pages):
                self._warm, self._num_pages = True, num_pages
            case ev.StepsEnded():
                self._move("stopped")
                self._effects.append(ev.Exit(0))
            case ev.StepsFailed(reason, suspects):
                self._move("lost", reason, suspects)
                self._effects.append(ev.Exit(1))

    # Lifecycle

    def _move(
        self, trigger: str, reason: str = "", suspects: tuple[int, ...] = (), num_pages: int = 0
    ) -> None:
        self.lifecycle.fire(trigger)
        self._effects.append(RankReport(self.stage, reason, suspects, num_pages))

    def _say_ready(self) -> None:
        """The controller may admit a rank that says this, so it must not miss what is published from then on."""
        if self.stage is RankState.INIT_DIST and self._warm and self._subscribed and self.number is not None:
            self._move("buffers_ready", num_pages=self._num_pages)

    def _drain_if_asked(self) -> None:
        if self._drain and self.stage is RankState.SERVING:
            self.lifecycle.fire("drain")  # the router gives nothing new; what runs, runs on

    def _stop(self) -> None:
        """Stop at the next boundary. Peers stop too, each at its own boundary: wait for none of them."""
        self._effects.append(ev.StopSteps())
        if self.stage in _WITHOUT_ENGINE:
            self.lifecycle.fire("stopped")
            self._effects.append(ev.Exit(0))
            return
        for member in sorted(self.view.members - {self.me}):
            self._mask(member)

    # Membership

    def _on_numbered(self, event: Numbered) -> None:
        self._subscribed = True
        if isinstance(event.body, Beat):
            if self.number is None or event.number > self.number:
                self._ask_snapshot()
            return
        if self.number is not None and event.number <= self.number:
            return
        self._early[event.number] = event
        if self.number is None or self.number + 1 not in self._early:
            self._ask_snapshot()
            return
        self._apply_in_order()

    def _ask_snapshot(self) -> None:
        self._behind = True
        self._effects.append(ev.AskSnapshot())

    def _on_snapshot(self, event: Snapshot) -> None:
        self._behind = False
        if self.number is not None and event.number < self.number:
            return
        self.number = event.number
        self._early = {number: kept for number, kept in self._early.items() if number > event.number}
        if event.placement is not None and event.placement != self.placement:
            self.placement = event.placement
            self._effects.append(ev.AdoptPlacement(event.placement))
        self._adopt(event.view)
        if event.attempt is None:
            self._end_attempt()
        else:
            self._prepare(event.attempt)
        self._apply_in_order()

    def _apply_in_order(self) -> None:
        assert self.number is not None
        while (event := self._early.pop(self.number + 1, None)) is not None:
            self.number = event.number
            self._apply(event.body)

    def _apply(self, body: Published) -> None:
        match body:
            case Prepare():
                self._prepare(body)
            case Commit():
                self._adopt(body.view)
                self._end_attempt()
            case Abort():
                self._end_attempt()
            case View():
                self._adopt(body)
            case PlacementChanged():
                assert self.placement is not None, "a change of a placement that no snapshot brought"
                self.placement = self.placement.changed(body.version, body.changes)
                self._effects.append(ev.AdoptPlacement(self.placement))
            case Beat():
                raise AssertionError("a beat is never kept")

    def _prepare(self, prepare: Prepare) -> None:
        if self.attempt == prepare:
            return  # promising twice would move the hold past the promise that counts
        self.attempt = prepare
        seated = self.me in self.view.members
        if seated:
            others = prepare.joiners
        elif self.me in prepare.joiners:
            others = tuple(sorted(self.view.members | set(prepare.joiners) - {self.me}))
        else:
            return
        if others:
            self._effects.append(ev.Connect(others))
        self._effects.append(ev.MakePromise(prepare.attempt, seated))

    def _end_attempt(self) -> None:
        if self.attempt is not None:
            self.attempt = None
            self._effects.append(ev.ReleaseHold())

    def _adopt(self, view: View) -> None:
        if view.epoch <= self.view.epoch:
            return
        if self.me in view.left:  # that view is the others'
            self._stop()
            return
        gone = self.view.members - view.members
        was_seated = self.me in self.view.members
        self.view = view
        for member in sorted(gone - {self.me}):
            self._mask(member)
        if was_seated and self.me not in view.members:
            self.lifecycle.fire("lost")
            self._effects.append(ev.Expelled())
            return
        self._effects.append(ev.Adopt(view))
        if not was_seated and self.me in view.members:
            self.lifecycle.fire("admitted")
            self._drain_if_asked()

    def _mask(self, member: Member) -> None:
        if member not in self.masked:
            self.masked |= {member}
            if self.stage not in _WITHOUT_ENGINE:
                self._effects.append(ev.Mask(member))
