"""The promise: no step is begun at or past it before it is released, however the two threads interleave."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_ep.placement import launch_placement
from elastic_ep.rank.mailbox import NEVER, PROMISE_MARGIN, Mailbox
from elastic_ep.wire.messages import Cancel, Seat, View

SHARED = {"hold_at", "begun", "waiting_at", "view"}
"""The fields whose order of reading and writing carries the promise."""


def view(park_at: int | None) -> View:
    return View(1, (Seat(0, 1, 0),), park_at)


def test_running_it_promises_a_step_ahead_of_the_one_in_progress() -> None:
    mailbox = Mailbox()
    assert all(mailbox.may_begin(step) for step in range(5))
    assert mailbox.promise() == 4 + PROMISE_MARGIN
    assert [mailbox.may_begin(step) for step in (5, 6)] == [True, False]
    assert mailbox.waiting_at == 6
    mailbox.release()
    assert mailbox.may_begin(6)
    assert mailbox.waiting_at is None


def test_waiting_it_promises_the_step_that_it_waits_before() -> None:
    mailbox = Mailbox()
    mailbox.adopt(view(park_at=3))
    assert [mailbox.may_begin(step) for step in (2, 3)] == [True, False]
    assert mailbox.promise() == 3
    mailbox.adopt(view(park_at=None))
    assert not mailbox.may_begin(3), "no longer parked, but still held"
    assert mailbox.promise() == 3
    mailbox.release()
    assert mailbox.may_begin(3)


def test_messages_and_wake_ups_pass() -> None:
    mailbox = Mailbox()
    mailbox.deliver(Cancel(7))
    assert list(mailbox.inbox) == [Cancel(7)]
    mailbox.request_stop()
    assert mailbox.stop
    began = time.monotonic()
    mailbox.wait(60.0)
    assert time.monotonic() - began < 30.0, "a stop wakes the waiting thread"


WAKES: dict[str, Callable[[Mailbox], None]] = {
    "a view": lambda mailbox: mailbox.adopt(view(None)),
    "a placement": lambda mailbox: mailbox.adopt_placement(launch_placement(1, 1, 1, 0)),
    "the end of a promise": lambda mailbox: mailbox.release(),
    "a stop": lambda mailbox: mailbox.request_stop(),
}


@pytest.mark.parametrize("act", WAKES.values(), ids=WAKES.keys())
def test_whoever_waits_at_a_boundary_is_woken_once(act: Callable[[Mailbox], None]) -> None:
    mailbox = Mailbox()
    waits: list[bool] = []
    wait = mailbox._wake.wait
    mailbox._wake.wait = lambda timeout=None: waits.append(wait(0.0)) or True  # type: ignore[func-returns-value,method-assign]
    act(mailbox)
    mailbox.wait(60.0)
    mailbox.wait(60.0)
    assert waits == [True, False]


# Every interleaving with few interruptions


class Worker(threading.Thread):
    """Stops before each access to a shared field until it is told to go on."""

    def __init__(self, body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._body = body
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self.done = False
        self.error: BaseException | None = None

    def run(self) -> None:
        self._go.acquire()
        try:
            self._body()
        except BaseException as error:
            self.error = error
        self.done = True
        self._stopped.release()

    def pause(self) -> None:
        self._stopped.release()
        self._go.acquire()

    def go_on(self) -> None:
        """Until it is about to touch the next shared field, or is done."""
        self._go.release()
        assert self._stopped.acquire(timeout=30.0)
        if self.error:
            raise self.error


class SteppedMailbox(Mailbox):
    def __getattribute__(self, name: str) -> Any:
        _pause_at(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        _pause_at(name)
        super().__setattr__(name, value)


def _pause_at(name: str) -> None:
    thread = threading.current_thread()
    if name in SHARED and isinstance(thread, Worker):
        thread.pause()


PREEMPTIONS = 3
"""How often one thread may be interrupted for the other. Orders of two reads and two writes need two."""


def schedules() -> Iterator[Callable[[int], int]]:
    """Deepest first: each is asked at every choice how to choose, and together they choose in every way."""
    path: list[tuple[int, int]] = []
    while True:
        at = 0

        def choose(options: int) -> int:
            nonlocal at
            if at == len(path):
                path.append((0, options))
            at += 1
            return path[at - 1][0]

        yield choose
        while path and path[-1][0] + 1 == path[-1][1]:
            path.pop()
        if not path:
            return
        path[-1] = (path[-1][0] + 1, path[-1][1])


def interleave(bodies: list[Callable[[], None]], choose: Callable[[int], int]) -> None:
    """Run both bodies, one at a time; `choose` says who begins and where they are interrupted."""
    workers = [Worker(body) for body in bodies]
    for worker in workers:
        worker.start()
    running = choose(2)
    interruptions = 0
    while not all(worker.done for worker in workers):
        if workers[running].done:
            running = 1 - running
        elif not workers[1 - running].done and interruptions < PREEMPTIONS and choose(2):
            running = 1 - running
            interruptions += 1
        workers[running].go_on()


class Forward:
    """The forward thread's boundaries: it begins every step that it may."""

    def __init__(self, mailbox: Mailbox, step: int) -> None:
        self.mailbox = mailbox
        self.step = step
        self.started = -1

    def boundary(self) -> None:
        if self.mailbox.may_begin(self.step):
            self.started = self.step
            self.step += 1


def prepare_running(mailbox: Mailbox) -> Forward:
    forward = Forward(mailbox, 5)
    forward.boundary()
    return forward


def prepare_parked(mailbox: Mailbox) -> Forward:
    mailbox.adopt(view(park_at=5))
    forward = Forward(mailbox, 5)
    forward.boundary()
    return forward


def promise(mailbox: Mailbox) -> int:
    return mailbox.promise()


def unpark_and_promise(mailbox: Mailbox) -> int:
    mailbox.adopt(view(park_at=None))
    return mailbox.promise()


def promise_again(mailbox: Mailbox) -> int:
    """An attempt aborted, the next one at once."""
    mailbox.hold_at = 6
    mailbox.release()
    return mailbox.promise()


@pytest.mark.parametrize("prepare", [prepare_running, prepare_parked])
@pytest.mark.parametrize("control", [promise, unpark_and_promise, promise_again])
def test_however_they_interleave_the_promise_is_kept(
    prepare: Callable[[Mailbox], Forward], control: Callable[[Mailbox], int]
) -> None:
    tried = 0
    for choose in schedules():
        tried += 1
        mailbox = SteppedMailbox()
        forward = prepare(mailbox)
        promised: list[int] = []

        def run_forward(forward: Forward = forward) -> None:
            for _ in range(2):
                forward.boundary()

        def run_control(mailbox: Mailbox = mailbox, promised: list[int] = promised) -> None:
            promised.append(control(mailbox))

        interleave([run_forward, run_control], choose)
        for _ in range(4):
            forward.boundary()
            assert forward.started < promised[0], f"promised {promised[0]}, began {forward.started}"
        if mailbox.view.park_at is None:
            assert mailbox.waiting_at == promised[0], "it stops sooner than it must"
        mailbox.release()
        mailbox.adopt(view(park_at=None))
        forward.boundary()
        assert forward.started == forward.step - 1 >= 5, "released, it goes on"
    assert tried > 100


# Two real threads, as fast as they can


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_eager_switching")
def test_two_threads_hammering() -> None:
    mailbox = Mailbox()
    forward = Forward(mailbox, 0)

    def run() -> None:
        while not mailbox.stop:
            if forward.step and mailbox.waiting_at is not None:
                mailbox.wait(0.001)
            forward.boundary()

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 20.0
    rounds = 0
    try:
        while rounds < 2_000 and time.monotonic() < deadline:
            step = mailbox.promise()
            while mailbox.waiting_at != step:
                assert forward.started < step
                assert time.monotonic() < deadline, f"never came to step {step}"
            assert forward.started == step - 1
            assert mailbox.hold_at == step
            mailbox.release()
            while rounds % 2 and forward.started < step:
                assert time.monotonic() < deadline, f"released, it does not begin step {step}"
            rounds += 1
        assert mailbox.hold_at == NEVER
    finally:
        mailbox.request_stop()
        thread.join(10.0)
    assert not thread.is_alive()
    assert forward.started > 20, "the machine is too slow for this to mean anything"
