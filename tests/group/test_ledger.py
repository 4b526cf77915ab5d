"""What operators are told agrees with what the log says: lines, the status's last loss, and counters."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import anyio.to_process
import pytest
import structlog
from structlog.testing import capture_logs

from elastic_ep.group.history import History
from elastic_ep.group.ledger import STALL_S, Ledger, cause_of
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.pace import Disturbance
from elastic_ep.group.port import LossCause
from elastic_ep.group.rebalance import Rebalancer
from elastic_ep.machines.experts import events as repair
from elastic_ep.machines.experts.planner import Plan
from elastic_ep.machines.membership import events as ev
from elastic_ep.wire.messages import Member, RankReport, RankState, SamplingParams
from elastic_ep.wire.slot_messages import CopySlot
from tests.kit.fake_group import FakeGroup, FakeLog, FakeRank
from tests.kit.virtual_time import VirtualTimeLoop, run_virtually

LOST = ("rank lost", "rank lost before it served")


@pytest.fixture(autouse=True)
def _plain_logging() -> None:
    structlog.reset_defaults()


def samples(metrics: Metrics) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in metrics.render().decode().splitlines())
    return {name: float(value) for name, _, value in lines if not name.startswith("#")}


def counted_losses(metrics: Metrics) -> Counter[str]:
    now = samples(metrics)
    return Counter({str(c): int(now[f'elastic_ep:rank_losses_total{{cause="{c}"}}']) for c in LossCause})


def story(main: Callable[[FakeGroup], Any], **shape: Any) -> tuple[FakeGroup, list[dict[str, Any]]]:
    """The group afterwards, and every line that it has logged."""

    async def run(loop: VirtualTimeLoop) -> FakeGroup:
        group = FakeGroup(loop, **shape)
        group.launch()
        await group.until(lambda: group.all_serve, "all ranks serve")
        await main(group)
        await asyncio.sleep(2 * STALL_S)
        return group

    with capture_logs() as lines:
        group = run_virtually(run)
    return group, [cast("dict[str, Any]", line) for line in lines if line["log_level"] != "debug"]


def suspect_twice(group: FakeGroup, member: Member) -> None:
    """By two survivors, say."""
    for _ in range(2):
        group.controller.suspect(member, LossCause.HANG, "hang: silent")


ENDS: dict[str, tuple[LossCause, Callable[[FakeGroup, FakeRank], None]]] = {
    "kill": (LossCause.KILLED, lambda group, rank: group.end(rank.member, "signal 9")),
    "crash": (LossCause.CRASH, lambda group, rank: group.end(rank.member, "signal 11")),
    "leave": (LossCause.EXIT, lambda group, rank: group.end(rank.member, "exit status 3")),
    "orphan": (LossCause.UNKNOWN, lambda group, rank: group.end(rank.member, "unknown")),
    "hang": (LossCause.HANG, lambda group, rank: suspect_twice(group, rank.member)),
    "raise": (
        LossCause.EXCEPTION,
        lambda group, rank: rank.say(RankReport(RankState.FAILED, "ValueError: no")),
    ),
    "lie": (
        LossCause.PROTOCOL,
        lambda group, rank: rank.say(RankReport(RankState.INIT_CUDA)),
    ),
}


@pytest.mark.parametrize("seed", range(40))
def test_each_loss_is_told_once_counted_once_and_kept(seed: int) -> None:
    """Whatever ends ranks, one at a time or several at once, serving or on their way, with requests or without."""
    choose = random.Random(seed)
    expected: Counter[str] = Counter()

    async def main(group: FakeGroup) -> None:
        for _ in range(choose.randrange(1, 6)):
            if choose.random() < 0.5:
                group.router.submit((1, 2), SamplingParams(max_tokens=9), 1, 0)
            for rank in choose.sample(list(group.ranks.values()), choose.randrange(1, 3)):
                name, (cause, end) = choose.choice(list(ENDS.items()))
                serving = group.controller.machine.records[rank.member.rank].state is RankState.SERVING
                if rank.alive and (serving or name != "lie"):  # who only starts may well say so
                    expected[str(cause)] += 1
                    end(group, rank)
            await asyncio.sleep(choose.choice([0.05, 0.5, 20.0]))
        await group.until(lambda: group.all_serve, "all are back", 100.0)

    group, lines = story(main, relaunch_limit=1000)
    told = [line for line in lines if line["event"] in LOST]
    assert Counter(line["cause"] for line in told) == expected
    assert +counted_losses(group.metrics) == expected
    logged = [moved for moved in group.log.effects(ev.RankMoved) if moved.is_loss]
    assert sorted(str(moved.member) for moved in logged) == sorted(line["rank"] for line in told)
    noted = [facts for kind, facts in group.log.notes if kind == "loss"]
    assert Counter(facts["cause"] for facts in noted) == expected

    for rank, record in group.controller.machine.records.items():
        last = group.controller.ledger.last(rank)
        mine = [line for line in told if line["rank"].split(".")[0] == str(rank)]
        assert (last is None) == (not mine)
        if last is not None:
            assert f"{rank}.{last.incarnation}" == mine[-1]["rank"]
            assert (last.cause, last.why) == (mine[-1]["cause"], mine[-1]["why"])
            assert last.back_after_s is not None, "it serves"
            assert any(
                line["event"] == "rank is back" and line["rank"] == str(record.member) for line in lines
            )
    # Who looks on has the same, and each change of a state.
    history = group.controller.history
    seen = [loss() for loss in history.losses]
    assert sorted(f"{loss.rank}.{loss.incarnation}" for loss in seen) == sorted(line["rank"] for line in told)
    assert Counter(loss.cause for loss in seen) == expected
    moved = [(*move.member, move.state) for move in group.log.effects(ev.RankMoved)]
    assert [move[2:] for move in history.moves if move.rank >= 0] == moved
    numbers = [move.number for move in history.moves]
    assert numbers == list(range(1, history.number + 1))

    served = [up for up in group.log.effects(ev.MemberUp) if up.member.incarnation > 1]
    returns = [line["rank"] for line in lines if line["event"] == "rank is back"]
    assert sorted(returns) == sorted(str(up.member) for up in served if str(up.member) in returns)
    assert len(returns) == len(set(returns))
    fenced = [line["rank"] for line in lines if line["event"] == "rank fenced"]
    assert len(fenced) == len(set(fenced)), "who is fenced is said once"
    assert len(fenced) == expected[LossCause.HANG] + expected[LossCause.PROTOCOL]
    assert not group.controller.ledger._blamed, "nothing is kept of those who are gone"
    assert not group.controller.ledger._untold


def test_who_took_over_is_who_has_the_requests() -> None:
    heirs: Counter[str] = Counter()

    async def main(group: FakeGroup) -> None:
        for _ in range(5):
            group.router.submit((1, 2), SamplingParams(max_tokens=9), 1, 0)
        had = set(group.router.machine.ranks[Member(1, 1)].requests)
        assert had
        group.end(Member(1, 1), "signal 9")
        requests = group.router.machine.requests
        heirs.update(str(requests[each].owner or "nobody yet") for each in had)
        await group.until(lambda: group.all_serve, "it is back")

    _, lines = story(main)
    (line,) = [line for line in lines if line["event"] == "rank lost"]
    assert line["taken_over_by"] == ", ".join(f"{heir}: {count}" for heir, count in sorted(heirs.items()))
    assert line["requests"] == heirs.total()


def ledger_story(act: Callable[[Ledger], Any]) -> list[dict[str, Any]]:
    """A ledger alone: ranks 0 and 1 have served and have work when rank 2 is lost from view 7."""

    async def run(_loop: VirtualTimeLoop) -> None:
        ledger = Ledger(Metrics(), cast(Any, FakeLog()), History())
        for rank in range(3):
            ledger.moved(Member(rank, 1), RankState.SERVING)
        ledger.lost(Member(2, 1))
        ledger.left_view(7, {0, 1})
        await act(ledger)

    with capture_logs() as lines:
        run_virtually(run)
    return [
        cast("dict[str, Any]", line) for line in lines if line["event"] not in ("rank serves", "rank state")
    ]


def felt(rank: int, beyond_s: float, epoch: int = 7, kind: str = "loss") -> Disturbance:
    return Disturbance(kind, epoch, rank, gap_s=beyond_s + 0.03, beyond_s=beyond_s, steps=2.0)


def test_a_line_waits_for_what_all_survivors_felt_and_no_longer() -> None:
    async def act(ledger: Ledger) -> None:
        ledger.gone(Member(2, 1), "signal 9", 0.0)
        ledger.disturbed(felt(0, 0.042))
        ledger.disturbed(felt(1, 9.0, kind="gain"))
        ledger.disturbed(felt(1, 9.0, epoch=6))
        assert ledger._untold
        ledger.disturbed(felt(1, 0.007))
        assert not ledger._untold
        last = ledger.last(2)
        assert last is not None
        assert last.stall_s == 0.042

    (line,) = ledger_story(act)
    assert line["survivors_stalled"] == "42 ms beyond a step"


def test_a_survivor_that_says_nothing_holds_up_no_line_and_is_heard_later() -> None:
    async def act(ledger: Ledger) -> None:
        ledger.gone(Member(2, 1), "signal 9", 0.0)
        ledger.disturbed(felt(0, 0.042))
        ledger.moved(Member(2, 2), RankState.SERVING)
        await asyncio.sleep(STALL_S + 0.1)
        assert not ledger._untold
        ledger.disturbed(felt(1, 5.0))

    lost, back, late = ledger_story(act)
    assert (lost["event"], lost["survivors_stalled"]) == ("rank lost", "42 ms beyond a step")
    assert (back["event"], back["rank"]) == ("rank is back", "2.2")
    assert (late["event"], late["by"]) == ("survivors stalled", "5000 ms beyond a step")


def test_a_survivor_that_is_lost_too_is_not_waited_for() -> None:
    async def act(ledger: Ledger) -> None:
        ledger.gone(Member(2, 1), "signal 9", 0.0)
        ledger.disturbed(felt(0, 0.042))
        ledger.lost(Member(1, 1))
        ledger.left_view(8, {0})
        ledger.gone(Member(1, 1), "exit status 7", None)
        assert [loss.member for loss in ledger._untold] == [Member(1, 1)]
        ledger.close()
        assert not ledger._untold

    first, second = ledger_story(act)
    assert (first["rank"], second["rank"]) == ("2.1", "1.1")
    assert second["relaunch"] == "never"


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        ("signal 9", LossCause.KILLED), ("signal 15", LossCause.KILLED), ("signal 2", LossCause.KILLED),
        ("signal 40", LossCause.KILLED), ("signal 11", LossCause.CRASH), ("signal 7", LossCause.CRASH),
        ("exit status 0", LossCause.EXIT), ("exit status 4", LossCause.EXIT),
        ("launch failed: fork: no memory", LossCause.LAUNCH_FAILED), ("unknown", LossCause.UNKNOWN),
    ],
)  # fmt: skip
def test_every_end_has_a_cause(status: str, cause: LossCause) -> None:
    found, why = cause_of(status)
    assert found is cause
    assert why


@pytest.mark.parametrize("seed", range(10))
def test_copies_are_counted_as_the_log_has_them(seed: int) -> None:
    """Those that were made, and apart from them those that could not be."""
    choose = random.Random(seed)

    async def main(group: FakeGroup) -> None:
        def ordered(rank: FakeRank, order: CopySlot) -> None:
            rank.copy(order, error=choose.choice(["", "", "cannot read"]))

        group.ordered = ordered
        for _ in range(3):
            placement = group.controller.repairs.placement
            members = tuple(sorted(group.controller.machine.view.members))
            shift = choose.randrange(1, 3) * placement.slots_per_rank
            turned = tuple(row[shift:] + row[:shift] for row in placement.slots)
            group.controller.repairs.feed(repair.Planned(members, turned))
            await asyncio.sleep(20.0)
        group.ordered = lambda rank, order: rank.copy(order)

    group, _ = story(main, ranks=3, experts=4, redundant=4, spare=1)
    copied = [event for _, event, _ in group.log.recorded if isinstance(event, repair.Copied)]
    made = [event for event in copied if not event.error]
    assert made
    assert len(made) < len(copied)
    now = samples(group.metrics)
    counted = {
        source: now[f'elastic_ep:expert_copies_total{{source="{source}"}}']
        for source in ("peer", "checkpoint")
    }
    assert sum(counted.values()) == len(made)
    assert now["elastic_ep:expert_copy_failures_total"] == len(copied) - len(made)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_no_slot_stays_spare_that_tolerance_needs(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After losses a plan has as many copies of every expert as the slots of the living allow, spare slots or not."""
    plans: list[Plan] = []

    async def at_once(call: Callable[[], Plan], **_options: object) -> Plan:
        plans.append(call())
        return plans[-1]

    monkeypatch.setattr(anyio.to_process, "run_sync", at_once)

    async def main(group: FakeGroup) -> None:
        controller = group.controller
        rebalancer = Rebalancer(
            controller.repairs,
            lambda: controller.machine.view.members,
            every=0,
            spare=1,
            report=lambda _: None,
        )
        for rank in range(lost):
            group.kill(rank)
        await asyncio.sleep(30.0)
        await rebalancer.rebalance()
        living = [seat.rank for seat in controller.machine.view.seats]
        assert len(living) == 4 - lost
        planned = dataclasses.replace(controller.repairs.placement, slots=plans[-1].slots)
        for layer, row in enumerate(planned.slots):
            assert min(planned.copies(layer, living)) >= controller.repairs.machine.floor(layer)
            held = [row[p] >= 0 for p in range(len(row)) if planned.rank_of(p) in living]
            assert lost or not all(held), "with room to spare a slot is left for copies to pass through"

    story(main, ranks=4, experts=4, redundant=4, spare=1, relaunch_limit=0)
