"""Who is in the group: numbers and lives of hosts, leases, and that no rank is launched while one before it may run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.group.hosts import Hosts
from elastic_ep.machines.hosts.events import HostsConfig
from elastic_ep.machines.membership.relaunch import HOST_LOST
from elastic_ep.timing import USUAL
from elastic_ep.wire.host_messages import (
    Died,
    Expelled,
    Fence,
    FromHost,
    GetReady,
    GiveUp,
    HostAlive,
    HostEvent,
    HostLost,
    HostReady,
    HostUp,
    Join,
    Launched,
    LaunchWith,
    Lease,
    Leave,
    Left,
    Links,
    Reach,
    Reaped,
    Refuse,
    ToHost,
    Wait,
    Watch,
    Welcome,
)
from elastic_ep.wire.messages import Member
from tests.kit.virtual_time import VirtualTimeLoop, run_virtually

HOSTS = (0, 0, 1, 1, 2, 2)
SHAPE = (6, 4, 8, 2, 2, 2)
BEAT_S = USUAL.host_beat_ms / 1000
SILENCE_S = (USUAL.silent_beats + 2) * BEAT_S
LEASE_S = USUAL.lease_ms / 1000
OVER_S = LEASE_S + USUAL.lease_margin_ms / 1000
ALL = Links((0, 1, 2))
"""As said by a host that reaches every other."""


class FakeKeeper:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def launch(self, member: Member, config_json: str) -> None:
        self.told.append(LaunchWith(member, config_json))

    def watch(self, member: Member) -> None:
        self.told.append(Watch(member))

    def kill(self, member: Member) -> None:
        self.told.append(Fence(member))

    def reach(self, where: Reach) -> None:
        self.told.append(where)

    def give_up(self, whom: GiveUp) -> None:
        self.told.append(whom)

    def hear(self) -> None:
        pass


class FakeWire:
    port = 1

    def __init__(self, world: World, *hears: Callable[..., None]) -> None:
        self.world = world
        self.on_message, self.on_closed, self.on_bad = hears

    def send(self, token: bytes, message: ToHost) -> None:
        self.world.sent(token, message)

    def hear(self) -> None:
        pass

    def close(self) -> None:
        pass


class World:
    """Holds every host's lease as the host would, and that nobody counts as gone who may go on."""

    def __init__(self, loop: VirtualTimeLoop, hosts: tuple[int, ...], at_start: int) -> None:
        self.loop = loop
        self.keeper = FakeKeeper()
        self.messages: dict[bytes, list[ToHost]] = {}
        self.events: list[HostEvent] = []
        self.lease_ends: dict[bytes, float] = {}
        """Of each life, at the latest."""
        self.asked: dict[bytes, dict[int, float]] = {}
        self.number_of: dict[bytes, int] = {}
        self.launched_on: dict[Member, bytes] = {}
        needs = GetReady(hosts, "{}", "entry:main", (), SHAPE, b"", "run", 1, 2, 0)
        config = HostsConfig(
            hosts, at_start, "10.0.0.1", "1.0", needs, "v3", Reach(0, "10.0.0.1", 9), "this machine"
        )
        self.hosts = Hosts(config, USUAL, cast(Any, self.keeper), self.open)
        self.hosts.start(self.happens)
        self.hosts.on_links(ALL)

    def open(self, *hears: Callable[..., None]) -> Any:
        self.wire = FakeWire(self, *hears)
        return self.wire

    def happens(self, event: HostEvent) -> None:
        if isinstance(event, Reaped) and event.status == HOST_LOST and event.member in self.launched_on:
            assert self.lease_ends.get(self.launched_on[event.member], 0) < self.loop.time(), "it may go on"
        self.events.append(event)

    def sent(self, token: bytes, message: ToHost) -> None:
        self.messages.setdefault(token, []).append(message)
        match message:
            case Welcome(host):
                self.number_of[token] = host
            case Lease(number):
                self.lease_ends[token] = self.asked[token][number] + LEASE_S
            case LaunchWith(member):
                assert self.number_of[token] == HOSTS[member.rank]
                self.launched_on[member] = token

    def says(self, token: bytes, message: FromHost) -> None:
        if isinstance(message, HostAlive):
            self.asked.setdefault(token, {})[message.number] = self.loop.time()
        if isinstance(message, Left):
            self.lease_ends[token] = 0
        self.wire.on_message(token, message)

    def join(self, token: bytes, address: str) -> None:
        self.says(token, Join(address, "1.0", ("v3",), "this machine"))

    def up(self, token: bytes, address: str) -> None:
        self.join(token, address)
        self.says(token, HostReady(7))
        self.says(token, ALL)

    def of(self, token: bytes, kind: type[Any]) -> list[Any]:
        return [message for message in self.messages.get(token, []) if isinstance(message, kind)]

    def happened(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def passes(self, seconds: float, *alive: bytes) -> None:
        """`alive` go on saying that they are."""
        until = self.loop.time() + seconds
        number = 1000
        while self.loop.time() < until:
            for token in alive:
                number += 1
                self.says(token, HostAlive(number))
            await asyncio.sleep(min(BEAT_S, until - self.loop.time()) or 0.001)


def in_world(
    story: Callable[[World], Coroutine[Any, Any, None]], hosts: tuple[int, ...] = HOSTS, at_start: int = 3
) -> World:
    async def main(loop: VirtualTimeLoop) -> World:
        world = World(loop, hosts, at_start)
        await story(world)
        world.hosts.leave()
        return world

    return run_virtually(main)


KINDS = ("join", "silent", "launch", "pass", "pass", "speak", "close", "leave", "bad")
A, B, C = b"a", b"b", b"c"
RANK_2, RANK_3, RANK_4 = Member(2, 1), Member(3, 1), Member(4, 1)


def test_ranks_are_launched_where_they_belong_and_wait_for_their_host() -> None:
    async def story(world: World) -> None:
        for rank in range(6):
            world.hosts.launch(Member(rank, 1), f"{rank}")
        assert world.keeper.told == [LaunchWith(Member(0, 1), "0"), LaunchWith(Member(1, 1), "1")]
        world.up(A, "10.0.0.2")
        assert world.of(A, LaunchWith) == [LaunchWith(RANK_2, "2"), LaunchWith(RANK_3, "3")]
        world.hosts.watch(RANK_2)
        world.hosts.kill(RANK_3)
        assert world.messages[A][-2:] == [Watch(RANK_2), Fence(RANK_3)]
        world.says(A, Launched(RANK_2, 77))
        world.says(A, Launched(RANK_4, 77))  # which is not on this host
        assert world.happened(Launched) == [Launched(RANK_2, 77)]
        assert world.happened(HostUp) == [HostUp(1, "10.0.0.2", 0)]

    in_world(story)


def test_who_orders_is_told_what_comes_of_it_when_it_has_gone_on() -> None:
    async def story(world: World) -> None:
        world.hosts.launch(RANK_2, "")
        world.hosts.kill(RANK_2)
        assert not world.events
        await asyncio.sleep(0)
        assert world.events

    in_world(story)


def test_a_silent_host_is_one_loss_and_its_ranks_are_gone_when_its_lease_has_run_out() -> None:
    async def story(world: World) -> None:
        world.up(A, "10.0.0.2")
        world.up(B, "10.0.0.3")
        for member in (RANK_2, RANK_3, RANK_4):
            world.hosts.launch(member, "")
        await world.passes(1, A, B)
        silent_at = world.loop.time()
        world.join(C, "10.0.0.4")
        await world.passes(SILENCE_S, B)
        [lost] = world.happened(HostLost)
        assert (lost.host, lost.members) == (1, (RANK_2, RANK_3))
        assert world.of(A, Expelled)
        assert GiveUp(1, 1) in world.keeper.told
        assert world.of(B, GiveUp) == [GiveUp(1, 1)]
        assert not world.happened(Reaped)
        [welcome] = world.of(C, Welcome)
        assert (welcome.host, welcome.incarnation) == (1, 2)
        world.says(C, HostReady(7))
        world.says(C, ALL)
        world.hosts.launch(Member(2, 2), "")
        assert world.of(C, LaunchWith) == [LaunchWith(Member(2, 2), "")], "it gets ready meanwhile"
        assert not world.happened(Reaped)
        while not world.happened(Reaped):
            await world.passes(BEAT_S, B, C)
        assert silent_at + LEASE_S <= world.loop.time() <= silent_at + OVER_S + BEAT_S
        assert [(event.member, event.status) for event in world.happened(Reaped)] == [
            (RANK_2, HOST_LOST),
            (RANK_3, HOST_LOST),
        ]
        assert world.of(C, GiveUp) == [], "nobody else was ever given up"
        assert {where.host for where in world.of(C, Reach)} == {0, 2}
        assert not world.happened(HostLost)[1:]

    in_world(story)


def test_a_lease_that_began_late_ends_late_though_no_sign_of_life_came() -> None:
    async def story(world: World) -> None:
        world.join(A, "10.0.0.2")
        await world.passes(SILENCE_S - 2.5 * BEAT_S)
        began = world.loop.time()
        world.says(A, HostReady(7))
        world.says(A, ALL)
        world.hosts.launch(RANK_2, "")
        assert world.of(A, LaunchWith)
        while not world.happened(Reaped):
            await world.passes(BEAT_S)
        assert world.loop.time() >= began + LEASE_S + USUAL.lease_margin_ms / 1000 - BEAT_S / 100

    in_world(story)


def test_one_whose_connection_has_ended_is_lost_sooner_unless_it_comes_again() -> None:
    async def story(world: World) -> None:
        world.up(A, "10.0.0.2")
        world.up(B, "10.0.0.3")
        await world.passes(1, A, B)
        for token in (A, B):
            world.wire.on_closed(token)
        await world.passes((USUAL.closed_beats + 1.5) * BEAT_S, B)
        assert [lost.host for lost in world.happened(HostLost)] == [1]

    in_world(story)


def test_one_that_prepares_may_be_silent_for_longer() -> None:
    async def story(world: World) -> None:
        world.join(A, "10.0.0.2")
        await world.passes(USUAL.preparing_beats * BEAT_S - 0.01)
        assert not world.happened(HostLost)
        await world.passes(3 * BEAT_S)
        assert [lost.host for lost in world.happened(HostLost)] == [1]

    in_world(story)


def test_one_that_leaves_has_nothing_left_and_its_number_is_free() -> None:
    async def story(world: World) -> None:
        world.up(A, "10.0.0.2")
        world.hosts.launch(RANK_2, "")
        world.says(A, Left())
        await world.passes(BEAT_S)
        assert [event.member for event in world.happened(Reaped)] == [RANK_2]
        world.up(B, "10.0.0.2")
        assert world.of(B, Welcome)[0].incarnation == 2
        await world.passes(BEAT_S, B)
        world.join(A, "10.0.0.7")
        assert world.of(A, Welcome)[1].host == 2

    in_world(story)


def test_a_lost_host_that_says_it_has_ended_its_ranks_is_not_waited_for() -> None:
    async def story(world: World) -> None:
        world.up(A, "10.0.0.2")
        world.hosts.launch(RANK_2, "")
        await world.passes(SILENCE_S)
        assert world.happened(HostLost)
        assert not world.happened(Reaped)
        world.says(A, Left())
        assert [event.member for event in world.happened(Reaped)] == [RANK_2]
        await world.passes(OVER_S)
        assert len(world.happened(Reaped)) == 1

    in_world(story)


def test_a_group_grows_when_no_host_is_missing_and_who_comes_to_a_full_one_is_a_spare() -> None:
    async def story(world: World) -> None:
        world.up(A, "10.0.0.2")
        world.hosts.launch(RANK_2, "")
        world.says(A, HostAlive(1))
        await world.passes(SILENCE_S)
        world.join(B, "10.0.0.3")
        world.join(C, "10.0.0.4")
        assert [world.of(token, Welcome)[0].host for token in (B, C)] == [1, 2], "first who is missing"
        for token in (B, C):
            world.says(token, HostReady(7))
            world.says(token, ALL)
        assert [up.host for up in world.happened(HostUp)] == [1, 1, 2]
        world.join(b"spare", "10.0.0.5")
        assert world.of(b"spare", Wait)
        assert world.of(b"spare", GetReady), "it is ready when there is a place"
        world.says(C, Left())
        await world.passes(BEAT_S, B)
        assert world.of(b"spare", Welcome)[0].host == 2, "what it has grown by is missed, too"

    in_world(story, at_start=2)


def test_a_host_that_ends_before_it_serves_is_not_grown_by() -> None:
    async def story(world: World) -> None:
        world.join(A, "10.0.0.2")
        world.says(A, Left())
        world.join(B, "10.0.0.3")
        world.says(B, Left())
        await world.passes(BEAT_S)
        world.join(A, "10.0.0.4")
        world.join(C, "10.0.0.5")
        assert [world.of(token, Welcome)[-1].host for token in (A, C)] == [1, 2]

    in_world(story, at_start=1)


def test_who_is_of_no_use_is_refused_and_who_has_no_place_waits() -> None:
    async def story(world: World) -> None:
        good = Join("10.0.0.2", "1.0", ("v3", "v4"), "this machine")
        for number, (bad, why) in enumerate(
            [
                (replace(good, release="2.0"), "elastic_ep 2.0"),
                (replace(good, builds=("v4",)), "build v3"),
                (replace(good, address="10.0.0.1"), "first host"),
                (replace(good, machine="another"), "ranks on GPUs"),
            ]
        ):
            world.says(b"%d" % number, bad)
            [refused] = world.of(b"%d" % number, Refuse)
            assert why in refused.why
        world.says(A, good)
        world.says(B, good)
        assert world.of(B, Wait)
        world.up(C, "10.0.0.3")
        world.join(b"late", "10.0.0.4")
        world.join(b"late", "10.0.0.4")
        assert len(world.of(b"late", Wait)) == 1
        world.says(b"unknown", HostAlive(1))
        assert world.of(b"unknown", Expelled)
        world.wire.on_bad(C, "nonsense")
        assert world.of(C, Refuse)
        assert [lost.host for lost in world.happened(HostLost)] == [2]

    world = in_world(story)
    assert world.of(A, Leave)
    assert world.of(B, Leave)
    assert world.of(b"late", Leave)


def test_a_host_gets_its_ranks_when_it_and_all_others_say_that_they_reach_each_other() -> None:
    async def story(world: World) -> None:
        world.up(A, "10.0.0.2")
        world.hosts.launch(RANK_4, "")
        world.join(B, "10.0.0.3")
        world.says(B, HostReady(7))
        world.says(A, Links((0,)))
        world.says(B, Links((0, 1)))
        assert not world.of(B, LaunchWith)
        await world.passes(3, A, B)
        assert not world.happened(HostLost), "it holds nobody up"
        world.says(A, ALL)
        assert world.of(B, LaunchWith) == [LaunchWith(RANK_4, "")]
        assert world.happened(HostUp) == [HostUp(1, "10.0.0.2", 0), HostUp(2, "10.0.0.3", 0)]

    in_world(story)


def test_of_two_hosts_that_do_not_reach_each_other_one_is_lost() -> None:
    async def story(world: World) -> None:
        world.up(A, "10.0.0.2")
        world.up(B, "10.0.0.3")
        world.says(A, Links((0,)))
        await world.passes(USUAL.apart_beats * BEAT_S - 0.01, A, B)
        world.says(A, ALL)
        await world.passes(BEAT_S, A, B)
        world.says(B, Links((0,)))
        await world.passes(USUAL.apart_beats * BEAT_S - 0.01, A, B)
        assert not world.happened(HostLost)
        await world.passes(2 * BEAT_S, A, B)
        [lost] = world.happened(HostLost)
        assert (lost.host, lost.why) == (2, "it and host 1 do not reach each other")
        assert world.of(B, Expelled)

    in_world(story)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["join", "speak", "silent", "close", "leave", "launch", "pass", "bad"]),
            st.integers(0, 1),
        ),
        max_size=40,
    )
)
def test_whatever_happens_no_two_lives_have_a_number_and_each_rank_ends_once(
    story: list[tuple[str, int]],
) -> None:
    """`World` holds the leases."""

    async def run(world: World) -> None:
        lives = dict.fromkeys(range(2), 0)
        speaking: set[int] = set()
        incarnations = dict.fromkeys(range(6), 0)

        def token(which: int) -> bytes:
            return b"%d-%d" % (which, lives[which])

        for what, which in story:
            match what:
                case "join":
                    lives[which] += 1
                    speaking.add(which)
                    world.up(token(which), f"10.0.1.{which}")
                case "speak":
                    speaking.add(which)
                case "silent":
                    speaking.discard(which)
                case "close":
                    world.wire.on_closed(token(which))
                case "leave":
                    speaking.discard(which)
                    world.says(token(which), Left())
                case "launch":
                    rank = 2 + which
                    incarnations[rank] += 1
                    world.hosts.launch(Member(rank, incarnations[rank]), "")
                case "bad":
                    world.wire.on_bad(token(which), "nonsense")
                case "pass":
                    await world.passes((0.8, 3.0)[which], *[token(one) for one in speaking])
        await world.passes(SILENCE_S + OVER_S + BEAT_S)
        reaped = [event.member for event in world.happened(Reaped)]
        assert len(set(reaped)) == len(reaped)
        launched = [m.member for told in world.messages.values() for m in told if isinstance(m, LaunchWith)]
        assert sorted(launched) == sorted(reaped), "nobody speaks any more"
        lost = [member for event in world.happened(HostLost) for member in event.members]
        assert sorted(lost) == sorted(reaped)

    in_world(run, (0, 0, 1, 1))


@pytest.mark.parametrize("event", [Died(RANK_2, "mutex", 1), Reaped(RANK_2, "signal 9", 1)])
def test_what_becomes_of_a_rank_is_told_in_this_hosts_time(event: Died | Reaped) -> None:
    async def story(world: World) -> None:
        world.up(A, "10.0.0.2")
        world.hosts.launch(RANK_2, "")
        world.says(A, event)
        [told] = world.happened(type(event))
        assert told.at_ns > 1
        world.says(A, event)
        assert len(world.happened(type(event))) == (2 if isinstance(event, Died) else 1)

    in_world(story)
