"""When the forward thread hands over what a step has brought: run on the test's thread, its every act written down."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from elastic_ep.config import EngineLimits, RankConfig
from elastic_ep.engine.expert_load import ExpertLoad
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.engine.sampler import Sampled
from elastic_ep.engine.scheduler import Chunk, Sequence
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.machines.rank.events import StepsEnded, StepsFailed, WarmedUp
from elastic_ep.models.registry import load_spec
from elastic_ep.placement import launch_placement
from elastic_ep.rank import forward as forward_module
from elastic_ep.rank.forward import ForwardThread
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.outbox import Posted, Ready
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Assign, Cached, Member, SamplingParams, Seat, StepReport, View
from elastic_ep.wire.slot_messages import ExpertLoads, PlacementSeen

MODEL = load_spec(Path(BUNDLED_MODEL))
PLACEMENT = launch_placement(2, MODEL.moe_layers, MODEL.moe.experts, MODEL.moe.experts)
LIMITS = EngineLimits(max_model_len=64)
CONFIG = RankConfig(
    rank=0, incarnation=1, directory="", model="", load_format="dummy", device="cpu", seed=0,
    limits=LIMITS, timing=USUAL, placement=PLACEMENT,
)  # fmt: skip
ALONE = View(1, (Seat(0, 1, 0),))


class Story(Mailbox):
    """Writes down what the forward thread does, and then does what `then` says, as the control loop would."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox: list[Posted] = []
        self.told: list[str] = []
        self.then: dict[str, Callable[[], object]] = {}
        self.adopt(ALONE)

    def tell(self, what: str) -> None:
        self.told.append(what)
        self.then.pop(what, lambda: None)()

    def post(self, item: Posted) -> None:
        self.outbox.append(item)
        match item:
            case StepReport():
                self.tell(f"report {item.step}")
            case PlacementSeen():
                self.tell("placement seen")
            case ExpertLoads():
                self.tell("loads")
            case Ready() | WarmedUp() | StepsEnded() | StepsFailed():
                self.tell(type(item).__name__)

    def wait(self, timeout_s: float) -> None:
        assert "wait" in self.then, f"nobody ends this wait: {self.told}"
        self.tell("wait")

    @property
    def reports(self) -> list[StepReport]:
        return [item for item in self.outbox if isinstance(item, StepReport)]


class FakeExchange:
    """One operation when a step begins, one when it has ended. `poison` names the ranks masked during a step."""

    def __init__(self, story: Story) -> None:
        self._story = story
        self.operations = 0
        self.poison: dict[int, frozenset[int]] = {}
        self._step = -1

    def begin_step(self, step: int) -> None:
        self.operations += 1
        self._step = step

    def end_step(self) -> frozenset[int]:
        self.operations += 1
        self._story.tell(f"end {self._step}")
        return self.poison.get(self._step, frozenset())

    def activate(self, member: Member) -> None:
        self._story.tell(f"activate {member.rank}")


class FakeLoad(ExpertLoad):
    def __init__(self, story: Story) -> None:
        super().__init__(PLACEMENT, 0)
        self._story = story

    def cut(self) -> None:
        self._story.tell("cut")


class FakeRunner(StepRunner):
    """Each token is the length of its sequence so far. Every step gives the first expert a row."""

    def __init__(self, story: Story, exchange: FakeExchange, *, ahead: bool) -> None:
        routing = RoutingTable(MODEL.moe_layers, MODEL.moe.experts, torch.device("cpu"))
        load = FakeLoad(story)
        weights: Any = SimpleNamespace(spec=MODEL)
        super().__init__(LIMITS, weights, PLACEMENT, 0, cast(Any, exchange), routing, load)
        self.launches_ahead = ahead
        self._story = story
        self._launched = -1

    def warm_up(self) -> None:
        pass

    def _launch(self, chunks: list[Chunk]) -> None:
        self._launched += 1
        self.load.by_slot[0][0] += 1
        self._story.tell(f"launch {self._launched}")

    def _complete(self) -> None:
        raise  # what `_launch` has raised is this rank's end

    def prove_well(self) -> None:
        pass

    def _discard(self) -> None:
        pass

    def _sample(self, sequences: Seq[Sequence]) -> list[Sampled]:
        return [Sampled(len(sequence.tokens)) for sequence in sequences]


class Rank:
    """One that takes its seat at step 0, with a request of `new` tokens."""

    def __init__(self, *, ahead: bool = True, new: int = 40) -> None:
        self.story = Story()
        self.exchange = FakeExchange(self.story)
        self.runner = FakeRunner(self.story, self.exchange, ahead=ahead)
        params = SamplingParams(max_tokens=new, ignore_eos=True)
        self.story.deliver(Assign(7, (1, 2, 3), (), params, 0, 0))
        self.forward = ForwardThread(
            CONFIG, self.story, self.story.post, lambda config: (self.runner, cast(Any, self.exchange))
        )

    def run(self, **then: Callable[[], object]) -> list[str]:
        """To its end; `then` is what the control loop does after, say, launch_2. The story from the first launch on."""
        self.story.then = {when.replace("_", " "): act for when, act in then.items()}
        self.forward._main()
        assert not self.story.then, f"never came to it: {self.story.told}"
        assert self.story.told[:2] == ["Ready", "WarmedUp"]
        return self.story.told[2:]

    def stop(self) -> None:
        self.story.request_stop()

    def tokens(self) -> list[int]:
        """Delivered ones, each at its place."""
        tokens = [token for report in self.story.reports for token in report.tokens]
        assert [token.index for token in tokens] == list(range(len(tokens)))
        return [token.token for token in tokens]


def test_a_report_goes_out_after_the_next_launch_and_the_last_one_before_the_end() -> None:
    rank = Rank()
    assert rank.run(launch_2=rank.stop) == [
        "launch 0", "end 0",
        "launch 1", "report 0", "end 1",
        "launch 2", "report 1", "end 2",
        "report 2", "StepsEnded",
    ]  # fmt: skip
    assert rank.tokens() == [3, 4, 5]


def test_where_a_launch_computes_the_step_its_report_goes_out_at_once() -> None:
    rank = Rank(ahead=False)
    assert rank.run(launch_1=rank.stop) == [
        "launch 0", "end 0", "report 0",
        "launch 1", "end 1", "report 1",
        "StepsEnded",
    ]  # fmt: skip


@pytest.mark.parametrize("ahead", [True, False])
def test_a_report_says_how_things_were_when_the_step_ended(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    rank = Rank(ahead=ahead, new=2)
    told = rank.story.told
    clock = SimpleNamespace(monotonic_ns=lambda: len(told), thread_time_ns=lambda: len(told) * 1_000_000)
    monkeypatch.setattr(forward_module, "time", clock)
    rank.run(launch_1=rank.stop)
    for report in rank.story.reports:
        ended = told.index(f"end {report.step}") + 1
        assert (report.ended_ns, report.cpu_ms) == (ended, ended)
        assert report.started_ns < report.ended_ns
        assert report.operations == 2 * (report.step + 1)
    assert [report.running for report in rank.story.reports] == [1, 0]
    assert [report.tokens[0].finish for report in rank.story.reports] == [None, "length"]
    assert [report.pages.held for report in rank.story.reports] == [1, 0]
    assert all(report.pages.total == LIMITS.num_pages for report in rank.story.reports)


def test_a_report_tells_what_was_cached_beside_the_first_token() -> None:
    rank = Rank()
    prompt = tuple(range(5, 5 + LIMITS.page_size + 4))
    one, same = (Assign(number, prompt, (), SamplingParams(3), 0, 0) for number in (8, 9))
    rank.run(
        launch_0=lambda: rank.story.deliver(one),
        launch_3=lambda: rank.story.deliver(same),
        launch_5=rank.stop,
    )
    cached = [(report.step, each) for report in rank.story.reports for each in report.cached]
    assert cached == [(4, Cached(9, LIMITS.page_size))]
    (report,) = [report for report in rank.story.reports if report.step == 4]
    assert (9, 0) in [(token.request_id, token.index) for token in report.tokens]


def test_nothing_is_kept_back_while_it_is_held() -> None:
    rank = Rank()

    def hold() -> None:
        rank.story.hold_at = 2

    def release() -> None:
        rank.story.release()

    assert rank.run(end_1=hold, wait=release, launch_2=rank.stop)[5:] == [
        "report 1", "wait", "launch 2", "end 2", "report 2", "StepsEnded",
    ]  # fmt: skip


def test_nothing_is_kept_back_while_it_is_parked() -> None:
    rank = Rank()

    def park() -> None:
        rank.story.adopt(View(2, ALONE.seats, park_at=1))

    assert rank.run(end_0=park, wait=rank.stop) == ["launch 0", "end 0", "report 0", "wait", "StepsEnded"]


def test_a_poisoned_step_is_reported_at_once_after_the_step_before_it() -> None:
    rank = Rank()
    rank.exchange.poison = {1: frozenset({3})}
    assert rank.run(launch_2=rank.stop) == [
        "launch 0", "end 0",
        "launch 1", "report 0", "end 1", "report 1",
        "launch 2", "end 2", "report 2",
        "StepsEnded",
    ]  # fmt: skip
    assert [report.masked for report in rank.story.reports] == [(), (3,), ()]
    assert rank.tokens() == [3, 4], "those of the poisoned step are sampled once"


@pytest.mark.parametrize("when", ["launch_1", "end_1"])
def test_what_was_committed_before_a_failure_is_delivered(
    when: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rank = Rank()

    def fail() -> None:
        raise RuntimeError("the device is gone")

    told = rank.run(**{when: fail})
    assert told[-2:] == (["report 0", "StepsFailed"] if when == "launch_1" else ["end 1", "StepsFailed"])
    assert rank.story.outbox[-1] == StepsFailed("RuntimeError: the device is gone", (7,))
    assert rank.tokens() == [3]
    assert "the device is gone" in "".join(capfd.readouterr())


@pytest.mark.parametrize("ahead", [True, False])
def test_the_load_is_cut_at_its_boundary_and_goes_the_way_of_the_report(
    monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    monkeypatch.setattr(forward_module, "LOAD_REPORT_STEPS", 2)
    rank = Rank(ahead=ahead)
    told = rank.run(launch_2=rank.stop)
    handed_over = ["report 1", "loads"]
    then = ["launch 2", *handed_over, "end 2"] if ahead else [*handed_over, "launch 2", "end 2"]
    assert told[told.index("cut") + 1 :][:4] == then
    assert told.count("cut") == told.count("loads") == 1


def test_the_load_goes_out_before_a_placement_that_gives_the_slots_other_experts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(forward_module, "LOAD_REPORT_STEPS", 1)
    rank = Rank()

    def place() -> None:
        rank.story.adopt_placement(PLACEMENT.changed(1, ()))
        rank.story.then["loads"] = rank.stop

    told = rank.run(end_0=place)
    assert told[2:6] == ["cut", "report 0", "loads", "placement seen"]


def test_a_new_routing_waits_for_the_report() -> None:
    """A placement, then a member that joins: both may keep a boundary up for long."""
    rank = Rank()

    def place() -> None:
        rank.story.adopt_placement(PLACEMENT.changed(1, ()))

    def admit() -> None:
        rank.story.adopt(View(2, (*ALONE.seats, Seat(1, 1, 2))))

    assert rank.run(end_0=place, end_1=admit, launch_2=rank.stop) == [
        "launch 0", "end 0", "report 0", "placement seen",
        "launch 1", "end 1", "report 1", "activate 1",
        "launch 2", "end 2", "report 2",
        "StepsEnded",
    ]  # fmt: skip
