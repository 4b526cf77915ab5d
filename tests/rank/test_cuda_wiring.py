"""--device cuda from the command line to the engine, and what becomes of a machine that cannot do it."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from elastic_ep.config import CannotRun, EngineLimits, RankConfig
from elastic_ep.group.controller import Controller
from elastic_ep.host import devices
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.rank.events import DeviceOpened, Started, StepsFailed
from elastic_ep.placement import launch_placement
from elastic_ep.rank import process as rank_module
from elastic_ep.rank.engine import build_engine
from elastic_ep.rank.forward import ForwardThread
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.store_client import ControlStore
from elastic_ep.run import USAGE_ERROR, main
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Heartbeat, Member, RankReport, RankState, Seat, StepReport, View
from tests.kit.lone_rank import Wire, lone_rank

CONFIG = RankConfig(
    rank=0, incarnation=1, directory="", model="", load_format="auto", device="cuda", seed=0,
    limits=EngineLimits(max_model_len=16), timing=USUAL, placement=launch_placement(2, 1, 2, 2),
)  # fmt: skip


def test_without_a_gpu_it_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(devices.Machine, "why_not_cuda", lambda self, backend: "no NVIDIA GPU here")
    assert main(["--ranks", "1", "--device", "cuda"]) == USAGE_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("--device cuda: no NVIDIA GPU here")


def test_a_cuda_rank_builds_the_cuda_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    module = ModuleType("elastic_ep.engine.ops_cuda.build")
    cast(Any, module).build_cuda_engine = lambda *arguments: built.extend(arguments)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    store = ControlStore(lambda message: None, USUAL)
    build_engine(CONFIG, SharedFiles(-1, -1), lambda: "no plane", store, print)
    assert built[:3] == [CONFIG, store, print]
    assert built[3].shelf is None


def test_what_a_machine_lacks_is_the_reason_and_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def build(config: RankConfig) -> Any:
        raise CannotRun("install the driver")

    said: list[Any] = []
    forward = ForwardThread(CONFIG, Mailbox(), said.append, build)
    forward.start()
    forward._thread.join(10)
    assert said == [StepsFailed("install the driver")]
    assert capfd.readouterr().err == ""


REPORT = StepReport(
    step=9, epoch=4, started_ns=0, ended_ns=1, tokens=(), running=0, waiting=0,
    operations=0, cpu_ms=0, masked=(1,),
)  # fmt: skip
SEATS = (Seat(0, 1, 0), Seat(1, 2, 5))


@pytest.mark.parametrize(
    ("report", "stopping", "suspected"),
    [
        (REPORT, False, [Member(1, 2)]),
        (replace(REPORT, epoch=3), False, []),
        (replace(REPORT, step=4), False, []),
        (REPORT, True, []),
    ],
)
def test_a_member_masked_by_a_kernel_is_suspected(
    report: StepReport, stopping: bool, suspected: list[Member]
) -> None:
    events: list[Any] = []
    machine = SimpleNamespace(view=View(epoch=4, seats=SEATS), stopping=stopping)
    controller = SimpleNamespace(
        _processes=SimpleNamespace(hear=lambda: None),
        machine=machine,
        suspect=lambda member, cause, why: events.append(ev.Suspected(member, why)),
    )
    Controller._suspect(cast(Any, controller), Member(0, 1), report)
    assert [event.member for event in events if isinstance(event, ev.Suspected)] == suspected


@pytest.mark.parametrize(
    ("state_then", "member_then", "heard"),
    [
        (RankState.INIT_DIST, Member(1, 2), 1),
        (RankState.FAILED, Member(1, 2), 0),
        (RankState.INIT_DIST, Member(1, 3), 0),
    ],
)
def test_a_joiner_is_heard_of_when_its_predecessor_has_left_the_device(
    state_then: RankState, member_then: Member, heard: int
) -> None:
    joiner = Member(1, 2)
    events: list[Any] = []
    held: list[Member] = []
    waiting: list[Callable[[], None]] = []
    slots = {1: SimpleNamespace(member=joiner, state=RankState.INIT_DIST)}
    controller = SimpleNamespace(
        machine=SimpleNamespace(records=slots),
        _processes=SimpleNamespace(when_free=lambda rank, then: waiting.append(then)),
        _keep_device=held.append,
        feed=events.append,
        _reason=lambda member, report: report.reason,
    )
    for state in (RankState.INIT_CUDA, RankState.INIT_DIST, RankState.JOINING):
        Controller._on_rank_report(cast(Any, controller), joiner, RankReport(state))
    assert [event.state for event in events] == [RankState.INIT_CUDA, RankState.INIT_DIST]
    assert held == [joiner, joiner, joiner]
    slots[1] = SimpleNamespace(member=member_then, state=state_then)
    (then,) = waiting
    then()
    assert [event.state for event in events[2:]] == heard * [RankState.JOINING]


@pytest.mark.parametrize(
    ("state", "member_now", "held"),
    [
        (RankState.INIT_CUDA, Member(1, 2), [Member(1, 2)]),
        (RankState.INIT_DIST, Member(1, 2), [Member(1, 2)]),
        (RankState.JOINING, Member(1, 2), [Member(1, 2)]),
        (RankState.SERVING, Member(1, 2), []),
        (RankState.FAILED, Member(1, 2), []),
        (RankState.INIT_CUDA, Member(1, 3), []),
    ],
)
def test_a_rank_that_starts_is_held_at_each_heartbeat(
    state: RankState, member_now: Member, held: list[Member]
) -> None:
    asked: list[Member] = []
    controller = SimpleNamespace(
        machine=SimpleNamespace(records={1: SimpleNamespace(member=member_now, state=state)}),
        _keep_device=asked.append,
        watch=SimpleNamespace(heard=lambda _member, _sign: None),
        _known=lambda member: SimpleNamespace(),
    )
    Controller._heard(cast(Any, controller), Member(1, 2), Heartbeat(0, 0, 0, None, parked=False))
    assert asked == held


def test_a_rank_says_when_its_device_is_open() -> None:
    wire = Wire()
    rank = lone_rank(wire)
    rank._hear(Started())
    rank._outbox.post(DeviceOpened())
    assert wire.sent == 2 * [RankReport(RankState.INIT_CUDA)]


@pytest.mark.parametrize(
    ("device", "seats", "armed"), [("cuda", SEATS, [0.5]), ("cuda", SEATS[1:], []), ("cpu", SEATS, [])]
)
def test_a_member_on_a_gpu_that_is_held_up_says_where(
    monkeypatch: pytest.MonkeyPatch, device: str, seats: tuple[Seat, ...], armed: list[float]
) -> None:
    dumps: list[float] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", dumps.append)
    reported = anyio.Event()
    reported.set()
    process = SimpleNamespace(
        _mailbox=SimpleNamespace(waiting_at=None),
        _machine=SimpleNamespace(view=View(epoch=4, seats=seats)),
        _config=replace(CONFIG, device=device),
        _me=Member(0, 1),
        _reported=reported,
    )

    async def one_beat() -> None:
        with anyio.move_on_after(0.01):
            await rank_module.RankProcess._send_heartbeats(cast(Any, process))

    anyio.run(one_beat)
    assert dumps == pytest.approx(armed)
