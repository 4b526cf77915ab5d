"""What the machines decide is carried out: effects reach whom they are for, and what ranks say the machines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from elastic_ep.gateway.backend import GroupBackend
from elastic_ep.group.port import (
    Conflict,
    Draining,
    Killing,
    KVPages,
    LossCause,
    OutOfRange,
    Relaunch,
    Scaled,
    Stopping,
    Unavailable,
    UnknownRank,
)
from elastic_ep.group.serving_log import ServingLog
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.events import GroupState
from elastic_ep.wire.messages import (
    Assign,
    Cached,
    Drain,
    FailureCode,
    Heartbeat,
    Hello,
    Member,
    PageCounts,
    RankReport,
    RankState,
    SamplingParams,
    Shutdown,
    StepReport,
    Token,
)
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet, StoreValue
from tests.group.test_controller import simulate
from tests.kit.fake_group import FakeGroup

ALL = [Member(0, 1), Member(1, 1), Member(2, 1)]
AGAIN = Member(1, 2)


def metric(group: FakeGroup, name: str, **labels: str) -> float:
    value = group.metrics.registry.get_sample_value(f"elastic_ep:{name}", labels)
    assert value is not None, f"{name} {labels} is not there"
    return value


def report(group: FakeGroup, *tokens: Token, step: int = 7) -> StepReport:
    epoch = group.controller.machine.view.epoch
    return StepReport(step, epoch, 1, 2, tokens, running=3, waiting=2, operations=9, cpu_ms=5)


def test_who_said_hello_is_watched_and_held_while_it_starts() -> None:
    async def main(group: FakeGroup) -> None:
        assert sorted(group.processes.watched) == ALL
        for member in ALL:
            assert group.processes.held.count(member) == 3, "in each state on its way"
            assert group.controller.facts[member].pid == 1000 + member.rank
        group.controller.facts.clear()
        group.controller.on_message(ALL[0], Hello(77))  # sooner than the launcher has said so
        assert group.controller.facts[ALL[0]].pid == 77
        group.controller.on_message(ALL[0], Heartbeat(1, 0, 0, None, False))
        assert group.processes.held.count(ALL[0]) == 3, "not while it serves"
        group.kill(1)
        await group.until(lambda: AGAIN in group.processes.held, "it starts again")
        held = group.processes.held.count(AGAIN)
        if group.controller.machine.records[1].state is not RankState.SERVING:
            group.controller.on_message(AGAIN, Heartbeat(0, 0, 0, None, False))
            assert group.processes.held.count(AGAIN) == held + 1

    simulate(main)


def test_an_operator_kills_one_incarnation_and_no_other() -> None:
    async def main(group: FakeGroup) -> None:
        backend = GroupBackend(group.controller, group.router, cast(Any, None), group.metrics)
        assert backend.kill(1, 1) == Killing(True, 1)
        assert backend.kill(1, 1) == Killing(False, 1), "it is being killed"
        await group.until(lambda: group.ranks[1].member == AGAIN and group.all_serve, "it is back")
        assert backend.kill(1, 1) == Killing(False, 2), "the next one has done nothing"
        assert group.processes.fenced == [ALL[1]]
        await asyncio.sleep(3.0)
        assert group.ranks[1].member == AGAIN
        loss = backend.status().engines[1].last_loss
        assert loss is not None
        assert (loss.cause, loss.why) == (LossCause.KILLED, "killed by an operator")
        for rank, incarnation in ((1, 3), (3, 1)):
            with pytest.raises(UnknownRank, match="0 to 2" if rank == 3 else "its present one is 2"):
                backend.kill(rank, incarnation)
        group.controller.feed(ev.StopRequested())
        with pytest.raises(Stopping):
            backend.kill(0, 1)
        assert group.processes.fenced == [ALL[1]]

    simulate(main)


def test_a_rank_drains_leaves_and_comes_back_without_a_loss() -> None:
    async def main(group: FakeGroup) -> None:
        backend = GroupBackend(group.controller, group.router, cast(Any, None), group.metrics)
        streams = [group.router.submit((1, 2), SamplingParams(max_tokens=4), 0, 0) for _ in range(3)]
        told = backend.drain(1, 5.0)
        assert told == Draining(1, 1, "Draining", 2)
        assert backend.drain(1, 60.0) == told, "it drains already"
        assert group.controller.machine.scaling
        with pytest.raises(Conflict, match="2 ranks are to take part"):
            backend.drain(0, 5.0)
        await asyncio.sleep(4.9)
        assert group.processes.launched == ALL
        assert group.log.effects(ev.MemberDown) == [], "its request has some time yet"
        group.router.submit((1, 2), SamplingParams(max_tokens=4), 0, 0)
        assert not group.router.machine.ranks[ALL[1]].accepting
        await group.until(lambda: not group.ranks[1].alive, "it has left")
        assert sum(1 for each in group.router.machine.requests.values() if each.owner) == 4
        assert [stream.failure for stream in streams] == [None] * 3
        status = backend.status()
        assert (status.state, status.data_parallel_size, status.scaling) == ("Serving", 2, False)
        assert (status.engines[1].state, status.engines[1].last_loss) == ("Stopped", None)
        assert status.engines[1].reason == "as asked; stays away until it is asked back"
        assert metric(group, "rank_losses_total", cause="exit") == 0
        await asyncio.sleep(30.0)
        assert group.processes.launched == ALL, "it stays away"
        assert backend.relaunch(None) == Relaunch((), (0, 2)), "only who names it has it back"
        scaled = await backend.scale(3, 5.0)
        assert scaled == Scaled("Scaled to 3 data parallel engines", 3, (0, 1, 2))
        assert group.ranks[1].member == AGAIN
        assert group.processes.fenced == []
        for size in (1, 4):
            with pytest.raises(OutOfRange, match="must be from 2"):
                await backend.scale(size, 5.0)

    simulate(main)


def test_copies_are_made_before_a_rank_leaves() -> None:
    async def main(group: FakeGroup) -> None:
        machine = group.controller.machine
        covered: list[bool] = []
        group.copied = lambda _rank, _order, _done: covered.append(machine.covered)
        backend = GroupBackend(group.controller, group.router, cast(Any, None), group.metrics)
        assert (await backend.scale(2, 0.0)).ranks == (0, 1)
        assert covered
        assert machine.covered
        assert all(covered), "each expert had a copy all the time"
        assert group.log.effects(ev.MemberResumed) == []

    simulate(main, experts=4, redundant=0, spare=6)


def test_a_rank_whose_connection_broke_may_have_missed_something_and_is_fenced() -> None:
    async def main(group: FakeGroup) -> None:
        group.controller.on_connection_ended(ALL[1])
        await group.until(lambda: group.ranks[1].member == AGAIN and group.all_serve, "it is back")
        backend = GroupBackend(group.controller, group.router, cast(Any, None), group.metrics)
        loss = backend.status().engines[1].last_loss
        assert loss is not None
        assert (loss.cause, loss.why) == (LossCause.PROTOCOL, "its connection to the controller ended")
        group.controller.on_connection_ended(ALL[1])
        await asyncio.sleep(3.0)
        assert group.processes.fenced == [ALL[1]], "the next one has a connection of its own"

    simulate(main)


def test_one_that_has_died_is_lost_by_its_death_not_by_its_connection() -> None:
    async def main(group: FakeGroup) -> None:
        group.controller.on_connection_ended(ALL[1])
        group.kill(1)
        await group.until(lambda: group.ranks[1].member == AGAIN and group.all_serve, "it is back")
        await asyncio.sleep(3.0)
        backend = GroupBackend(group.controller, group.router, cast(Any, None), group.metrics)
        loss = backend.status().engines[1].last_loss
        assert loss is not None
        assert loss.cause is not LossCause.PROTOCOL
        assert group.processes.fenced == []
        assert group.ranks[1].member == AGAIN

    simulate(main)


def test_a_joiner_waits_until_its_device_is_free_of_the_dead() -> None:
    async def main(group: FakeGroup) -> None:
        group.processes.occupied[1] = []
        group.kill(1)
        await asyncio.sleep(5.0)
        assert len(group.processes.occupied[1]) == 1
        assert group.controller.machine.records[1].state is RankState.INIT_DIST
        group.kill(1)
        await asyncio.sleep(5.0)
        assert len(group.processes.occupied[1]) == 2
        group.processes.free(1)  # the first of them is dead by now
        await group.until(lambda: group.all_serve, "it joins")
        assert group.ranks[1].member == Member(1, 3)
        assert not group.processes.fenced

    simulate(main)


def test_what_is_known_of_a_dead_rank_goes_with_it() -> None:
    async def main(group: FakeGroup) -> None:
        controller = group.controller
        group.ranks[1].say(StoreSet("1/its", b"x"))
        await asyncio.sleep(0.01)
        assert ALL[1] in controller.repairs.states
        group.kill(1)
        assert ALL[1] not in controller.facts
        assert ALL[1] not in controller.repairs.states
        assert ALL[1] not in controller.repairs.machine.members
        group.ranks[0].say(StoreGet(("1/its",)))
        await asyncio.sleep(0.01)
        assert StoreValue("1/its", b"x") not in group.ranks[0].told
        await group.until(lambda: group.all_serve, "it is back")
        assert AGAIN in controller.repairs.states

    simulate(main)


def test_ranks_leave_each_other_values() -> None:
    async def main(group: FakeGroup) -> None:
        group.ranks[0].say(StoreGet(("key",)))
        group.ranks[1].say(StoreSet("key", b"value"))
        await asyncio.sleep(0.01)
        assert StoreValue("key", b"value") in group.ranks[0].told
        group.ranks[1].say(StoreDelete("key"))
        group.ranks[2].say(StoreGet(("key",)))
        await asyncio.sleep(0.01)
        assert StoreValue("key", b"value") not in group.ranks[2].told

    simulate(main)


def test_requests_go_to_ranks_and_their_tokens_to_clients_through_a_loss() -> None:
    async def main(group: FakeGroup) -> None:
        stream = group.router.submit((1, 2), SamplingParams(2), 0, 0)
        await asyncio.sleep(0.01)
        (first,) = [n for n, rank in group.ranks.items() if any(isinstance(m, Assign) for m in rank.told)]
        told = replace(report(group, Token(0, 0, 5)), cached=(Cached(0, 1),))
        group.controller.on_message(group.ranks[first].member, told)
        assert stream.cached_tokens == 1
        facts = group.controller.facts[group.ranks[first].member]
        assert (facts.running, facts.waiting, facts.step) == (3, 2, 7)
        assert group.controller.step == 7
        assert group.steps == [7]
        group.kill(first)
        await asyncio.sleep(0.01)
        (second,) = [
            n
            for n, rank in group.ranks.items()
            if n != first and any(isinstance(m, Assign) and m.emitted == (5,) for m in rank.told)
        ]
        group.controller.on_message(
            group.ranks[second].member,
            replace(report(group, Token(0, 1, 6, "length"), step=8), cached=(Cached(0, 2),)),
        )
        assert stream.cached_tokens == 1, "to take it over costs its client nothing"
        assert [token.token for token in await anext(stream)] == [5, 6]
        await group.until(lambda: group.all_serve, "it is back")
        last = group.controller.ledger.last(first)
        assert last is not None
        assert last.requests == 1, "who took over is asked of the router"

    simulate(main)


def test_what_ranks_say_of_their_pages_is_in_the_status_and_in_the_metrics() -> None:
    """By a heartbeat or by a step's report, the newest counts; what an incarnation counted stays when it is gone."""

    async def main(group: FakeGroup) -> None:
        backend = GroupBackend(group.controller, group.router, cast(Any, None), group.metrics)
        beat, counts = Heartbeat(1, 0, 0, None, False), PageCounts(total=200, held=50, named=20, hits=7)
        backend.refresh_metrics()
        assert metric(group, "prefix_cache_hits_total", rank="1") == 0, "there from the start"
        group.controller.on_message(ALL[1], replace(beat, pages=counts._replace(held=150)))
        group.controller.on_message(ALL[1], replace(report(group), pages=counts))
        group.controller.on_message(ALL[2], replace(report(group), pages=counts))
        later = counts._replace(held=100, shelf_pages=3, shelf_bytes=4096, stored=5)
        group.controller.on_message(ALL[2], replace(beat, pages=later))
        engines = backend.status().engines
        assert [engine.kv_cache_usage for engine in engines] == [0.0, 0.25, 0.5]
        assert [engine.kv_pages for engine in engines] == [
            KVPages(), KVPages(device=200, held=50, named=20), KVPages(200, 100, 20, shelf=3, shelf_bytes=4096),
        ]  # fmt: skip
        group.kill(1)
        assert backend.status().engines[1].kv_pages == KVPages()
        await group.until(lambda: group.all_serve, "it is back")
        group.controller.on_message(AGAIN, replace(beat, pages=counts))
        backend.refresh_metrics()
        assert metric(group, "prefix_cache_hits_total", rank="1") == 14
        assert metric(group, "shelf_pages_stored_total", rank="2") == 5
        assert metric(group, "kv_cache_held_pages", rank="2") == 100
        assert metric(group, "kv_cache_usage_perc") == pytest.approx((0 + 0.25 + 0.5) / 3)

    simulate(main)


def test_the_router_knows_the_pages_of_a_rank_and_who_waits_in_it() -> None:
    async def main(group: FakeGroup) -> None:
        group.processes.occupied[1] = []
        group.kill(1)
        await group.until(lambda: bool(group.processes.occupied[1]), "it starts again")
        group.controller.on_message(AGAIN, Heartbeat(0, 0, 0, None, False, PageCounts(total=77)))
        group.processes.free(1)
        await group.until(lambda: group.all_serve, "it is back")
        assert group.router.machine.ranks[AGAIN].num_pages == 77
        for held, known in (((4, 5), {4, 5}), (None, {4, 5}), ((), set())):
            group.controller.on_message(AGAIN, replace(report(group), held=held))
            assert group.router.machine.ranks[AGAIN].held == known

    simulate(main)


CAUSES = {
    "a suspicion": (
        lambda group: group.controller.suspect(ALL[1], LossCause.HANG, "hang: it sits there"),
        LossCause.HANG, "it sits there",
    ),
    "nobody's blame": (
        lambda group: group.controller.feed(ev.Suspected(ALL[1], "late")),
        LossCause.TIMEOUT, "late",
    ),
    "its own words": (
        lambda group: group.ranks[1].say(_failed("the disk is on fire")),
        LossCause.EXCEPTION, "the disk is on fire",
    ),
}  # fmt: skip


def _failed(why: str) -> Any:
    return RankReport(RankState.FAILED, why)


@pytest.mark.parametrize(("act", "cause", "why"), CAUSES.values(), ids=CAUSES.keys())
def test_the_ledger_knows_why_a_rank_was_fenced(act: Any, cause: LossCause, why: str) -> None:
    async def main(group: FakeGroup) -> None:
        act(group)
        await group.until(lambda: group.ranks[1].member == AGAIN and group.all_serve, "it is back")
        assert group.processes.fenced == [ALL[1]]
        last = group.controller.ledger.last(1)
        assert last is not None
        assert (last.incarnation, last.state, last.cause) == (1, RankState.SERVING, cause)
        assert why in last.why
        assert metric(group, "rank_losses_total", cause=cause) == 1.0
        assert last.back_after_s is not None

    simulate(main)


@contextmanager
def told_when_back(group: FakeGroup) -> Iterator[list[float | None]]:
    told: list[float | None] = []
    gone = group.controller.ledger.gone

    def spy(member: Member, status: str, again_in_s: float | None) -> None:
        told.append(again_in_s)
        gone(member, status, again_in_s)

    group.controller.ledger.gone = spy  # type: ignore[method-assign]
    yield told


def test_the_ledger_is_told_when_the_rank_is_started_again() -> None:
    async def main(group: FakeGroup) -> None:
        with told_when_back(group) as told:
            for _ in range(5):
                died_at = group.loop.time()
                launched = len(group.processes.launched)
                group.kill(1)
                again_in_s = told[-1]
                assert again_in_s is not None
                while len(group.processes.launched) == launched:
                    await asyncio.sleep(0.005)
                assert abs(group.loop.time() - died_at - again_in_s) < 0.02
                await asyncio.sleep(0.001)
        assert told[-1] > 0.0  # type: ignore[operator]  # checked above

    simulate(main)


def test_the_view_and_the_states_are_in_the_metrics() -> None:
    async def main(group: FakeGroup) -> None:
        assert metric(group, "epoch") == group.controller.machine.view.epoch == 1
        assert metric(group, "rank_state", rank="1", state="Serving") == 1.0
        assert group.controller.serving.is_set()
        group.kill(1)
        assert metric(group, "epoch") == 2.0
        assert metric(group, "rank_state", rank="1", state="Serving") == 0.0
        await group.until(lambda: group.all_serve, "it is back")
        assert metric(group, "epoch") == group.controller.machine.view.epoch > 2

    simulate(main)


def test_when_nothing_will_serve_all_requests_fail_and_none_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[GroupState] = []
    tell = ServingLog.moved

    def moved(lines: ServingLog, state: GroupState) -> None:
        said.append(state)
        tell(lines, state)

    monkeypatch.setattr(ServingLog, "moved", moved)

    async def main(group: FakeGroup) -> None:
        stream = group.router.submit((1,), SamplingParams(2), 0, 0)
        assert not group.controller.over.is_set()
        for number in (0, 1, 2):
            group.kill(number)
        await asyncio.sleep(1.0)
        assert group.controller.over.is_set()
        assert [batch async for batch in stream] == []
        assert stream.failure is not None
        assert stream.failure.code is FailureCode.UNAVAILABLE
        for _ in range(2):
            with pytest.raises(Unavailable):
                group.router.submit((1,), SamplingParams(2), 0, 0)
        assert said[:2] == [GroupState.ADMITTING, GroupState.SERVING]

    with capture_logs() as lines:
        simulate(main, relaunch_limit=0)
    told = [line["requests"] for line in lines if line["event"].startswith("the group holds")]
    assert told == ["fail"], "none waits for what will not come"


def test_a_stop_drains_then_ends_all() -> None:
    async def main(group: FakeGroup) -> None:
        controller = group.controller
        controller.feed(ev.StopRequested())
        await asyncio.sleep(0.01)
        assert all(Drain() in rank.told for rank in group.ranks.values())
        assert not any(rank.accepting for rank in group.router.machine.ranks.values())
        assert not controller.stopped.is_set()
        controller.feed(ev.StopRanks())
        await asyncio.sleep(0.01)
        assert all(Shutdown() in rank.told for rank in group.ranks.values())
        assert controller.stopped.is_set()
        assert all(controller.ledger.last(rank) is None for rank in group.ranks), "nothing was lost"

    simulate(main)


def test_a_rank_that_falls_silent_is_fenced_and_nobody_else() -> None:
    async def main(group: FakeGroup) -> None:
        controller = group.controller
        watch = asyncio.create_task(controller.watch.run())
        group.ranks[1].silent = True

        def beat(count: int) -> None:
            for rank in list(group.ranks.values()):
                seated = rank.member in controller.machine.view.members
                parked = seated and controller.machine.view.park_at is not None
                rank.say(Heartbeat(count, count, count, None, parked))
            group.loop.call_later(0.1, beat, count + 1)

        controller.feed(ev.WorkBegan())
        beat(1)
        await group.until(lambda: group.processes.fenced != [], "the silent one is found", 20.0)
        await group.until(lambda: group.all_serve, "it is back")
        await asyncio.sleep(10.0)
        assert group.processes.fenced == [ALL[1]]
        last = controller.ledger.last(1)
        assert last is not None
        assert last.cause is LossCause.HANG
        watch.cancel()

    simulate(main)


@pytest.mark.parametrize(("kind", "name"), [("loss", "failover_stall"), ("gain", "rejoin_pause")])
def test_what_survivors_felt_is_measured_and_told(kind: str, name: str) -> None:
    """A survivor of three ranks makes its steps every 10 ms, but one of them takes 200 ms longer."""

    async def main(group: FakeGroup) -> None:
        controller = group.controller

        def steps(numbers: range, ended_ms: int) -> None:
            for index, step in enumerate(numbers):
                told = report(group, Token(99, index, 1), step=step)  # of a request that is over
                ended_ns = (ended_ms + 10 * index) * 1_000_000
                controller.on_message(ALL[0], replace(told, started_ns=0, ended_ns=ended_ns))

        controller.feed(ev.WorkBegan())
        if kind == "gain":
            group.kill(1)
        steps(range(20), 1_000)
        if kind == "loss":
            group.processes.occupied[1] = []
            group.kill(1)
        else:
            await group.until(lambda: group.all_serve, "it is back")
        steps(range(20, 40), 1_400)
        found = {
            other: metric(group, f"{other}_seconds_count") for other in ("failover_stall", "rejoin_pause")
        }
        assert found[name] == 1.0, found
        (noted,) = [facts for what, facts in group.log.notes if what == "disturbance"]
        assert (noted["kind"], noted["rank"], noted["gap_s"], noted["beyond_s"]) == (kind, 0, 0.21, 0.2)
        assert metric(group, f"{name}_seconds_sum") == pytest.approx(0.2)

    simulate(main)


def test_who_sends_what_is_no_message_is_fenced_and_nobody_else_for_what_nobody_sent() -> None:
    async def main(group: FakeGroup) -> None:
        group.controller.on_protocol_error(None, "from nobody")
        await asyncio.sleep(0.01)
        assert group.processes.fenced == []
        group.controller.on_protocol_error(Member(1, 9), "from an incarnation that is not there")
        await asyncio.sleep(0.01)
        assert group.processes.fenced == []
        group.controller.on_protocol_error(ALL[1], "no message")
        assert group.processes.fenced == [ALL[1]]

    simulate(main)


@pytest.mark.parametrize("private", [True, False])
def test_what_a_serving_rank_says_of_its_failure_is_masked_in_private_logs(private: bool) -> None:
    async def main(group: FakeGroup) -> None:
        group.log.private = private
        group.controller.on_message(ALL[1], RankReport(RankState.FAILED, "token 4711 is wrong"))
        logged = [event for _, event, _ in group.log.recorded if isinstance(event, ev.Reported)][-1]
        assert ("4711" in logged.reason) is not private

    simulate(main)
