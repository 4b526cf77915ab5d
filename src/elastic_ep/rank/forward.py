"""The forward thread: the only user of the device.

It runs lockstep steps. At each boundary it looks into the mailbox (the join-ready flag, new requests) and adopts
the newest view; between two boundaries it takes notice of nothing, because a step always completes.

Where the device works on its own, what a step has to report is handed over when the next step is launched: to encode and
to send it the control loop takes the interpreter lock, which this thread needs to give the device work. It goes out
earlier before whatever may take long (a wait, a change of the routing), after a poisoned step, and at the end. So it is
late by a boundary, never by a step: the watch over progress hears of each step while the next one runs, as it does
without this. A rank killed before has committed tokens that nobody heard of; who gets its requests computes them again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import structlog

from elastic_ep.config import CannotRun, RankConfig
from elastic_ep.engine.step_runner import StepResult, StepRunner
from elastic_ep.exchange.base import Exchange
from elastic_ep.host.scheduling import make_ordinary
from elastic_ep.machines.rank.events import StepsEnded, StepsFailed, WarmedUp
from elastic_ep.placement import Placement
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.outbox import Post, Ready
from elastic_ep.wire.messages import Assign, FailureCode, Member, RequestFailed, StepReport, View
from elastic_ep.wire.slot_messages import ExpertLoads, PlacementSeen

log = structlog.get_logger()
_WAIT_S = 1.0
"""How long a boundary waits before it looks again; a wake-up comes earlier."""


LOAD_REPORT_STEPS = 128
"""How often the controller hears what the experts had to do."""

Build = Callable[[RankConfig], tuple[StepRunner, Exchange]]


class ForwardThread:
    """`build` makes the engine, on this thread: it may take seconds and touches the device."""

    def __init__(
        self,
        config: RankConfig,
        mailbox: Mailbox,
        post: Post,
        build: Build,
    ) -> None:
        self._config = config
        self._me = Member(config.rank, config.incarnation)
        self._mailbox = mailbox
        self._post = post
        self._build = build
        self.exchange: Exchange | None = None
        self.step = 0
        self._view = View(epoch=0, seats=())
        self._pending = False
        self._active: frozenset[Member] = frozenset()
        self._covered = False
        self._placement: Placement | None = None
        self._report: tuple[Callable[..., StepReport], StepResult] | None = None
        """Of the last step, all but its tokens, until it is handed over."""
        self._held: tuple[int, ...] = ()
        """The requests that wait here, as last reported."""
        self._load_due = False
        self._stepping = False
        self._thread = threading.Thread(target=self._main, name="forward", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cpu_ms(self) -> int:
        """Processor time of the forward thread, milliseconds. Any thread."""
        if not self._thread.is_alive() or self._thread.ident is None:
            return 0
        return time.clock_gettime_ns(time.pthread_getcpuclockid(self._thread.ident)) // 1_000_000

    def _main(self) -> None:
        make_ordinary()
        ready = False
        try:
            self.runner, self.exchange = self._build(self._config)
            self._post(Ready(self.runner, self.exchange))
            self.runner.warm_up()
            self._post(WarmedUp(self.runner.num_pages))
            ready = True
            try:
                self._run()
            finally:
                self._hand_over()
            self._post(StepsEnded())
        except CannotRun as error:
            self._post(StepsFailed(str(error)))
        except BaseException as error:
            # What keeps one rank from starting mostly keeps all, and the run process says it once, without the stack.
            say = log.error if ready else log.debug
            say("the forward thread ends by an exception", step=self.step, exc_info=True)
            suspects = self.runner.suspects if self._stepping else ()
            self._post(StepsFailed(f"{type(error).__name__}: {error}", suspects))

    def _run(self) -> None:
        mailbox = self._mailbox
        while not mailbox.stop:
            if self._view.seat(self._me.rank) is None and not self._take_seat():
                self._wait()
            elif not mailbox.may_begin(self.step):
                self._settle_in()
                self._wait()
            else:
                self._settle_in()
                self._one_step()

    def _wait(self) -> None:
        self._hand_over()
        self._mailbox.wait(_WAIT_S)

    def _take_seat(self) -> bool:
        view = self._mailbox.view
        seat = view.seat(self._me.rank)
        if seat is None or seat.member != self._me:
            return False
        self.step = seat.first_step
        self._view, self._pending = view, True
        return True

    def _settle_in(self) -> None:
        """Adopt what the control loop left at this boundary."""
        mailbox = self._mailbox
        if mailbox.join_ready:
            mailbox.join_ready = False  # cleared first: a view that comes now sets it again
            self._view, self._pending = mailbox.view, True
        self._adopt_placement()
        if self._pending:
            self._activate()
        while mailbox.inbox:
            message = mailbox.inbox.popleft()
            if isinstance(message, Assign):
                reason = self.runner.add(message)
                if reason:
                    self._request_failed(message.request_id, FailureCode.REFUSED, reason)
            else:
                self.runner.cancel(message.request_id)

    def _request_failed(self, request_id: int, code: FailureCode, reason: str) -> None:
        """After the tokens that it has."""
        self._hand_over()
        self._post(RequestFailed(request_id, code, reason))

    def _adopt_placement(self) -> None:
        placement = self._mailbox.placement
        if placement is None or placement is self._placement:
            return
        self._hand_over()
        self._placement = placement
        self._covered = self.runner.set_routing({member.rank for member in self._active}, placement)
        self._post(PlacementSeen(placement.version))

    def _activate(self) -> None:
        assert self.exchange is not None
        begun = [seat.member for seat in self._view.seats if seat.first_step <= self.step]
        self._pending = len(begun) < len(self._view.seats)
        active = frozenset(member for member in begun if not self._mailbox.is_dead(member))
        if active != self._active:
            self._hand_over()
            for member in sorted(active - self._active - {self._me}):
                self.exchange.activate(member)
            self._active = active
            self._covered = self.runner.set_routing({member.rank for member in active})

    def _one_step(self) -> None:
        assert self.exchange is not None
        started_ns = time.monotonic_ns()
        # Without a copy of every expert no token would be right: keep the lockstep, schedule nothing.
        self._stepping = True
        result = self.runner.run_step(self.step, schedule=self._covered, launched=self._hand_over)
        self._stepping = False
        held = self.runner.held if self.runner.waiting or self._held else ()
        if result.sampled or result.masked or held != self._held:
            report = partial(
                StepReport,
                step=self.step,
                epoch=self._view.epoch,
                started_ns=started_ns,
                ended_ns=time.monotonic_ns(),
                running=self.runner.running,
                waiting=self.runner.waiting,
                operations=self.exchange.operations,
                cpu_ms=time.thread_time_ns() // 1_000_000,
                masked=tuple(sorted(result.masked)),
                mask_ns=self._mailbox.mask_ns if result.masked else 0,
                pages=self.runner.page_counts,
                cached=tuple(result.cached),
                held=held if held != self._held else None,
            )
            self._report, self._held = (report, result), held
        for request_id, reason in result.failed:
            self._request_failed(request_id, FailureCode.FAILED, reason)
        self.step += 1
        if self.step % LOAD_REPORT_STEPS == 0:
            self.runner.load.cut()
            self._load_due = True
        if result.masked or not self.runner.launches_ahead:
            self._hand_over()

    def _hand_over(self) -> None:
        """What the last step has left to report."""
        if self._report is not None:
            (report, result), self._report = self._report, None
            self._post(report(tokens=result.tokens))
        if self._load_due:
            self._load_due = False
            loads = self.runner.load.take()
            if any(map(any, loads)):
                self._post(ExpertLoads(loads))
