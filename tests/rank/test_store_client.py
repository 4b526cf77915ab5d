"""The ranks' store over real sockets: both ends' wires and the table on the loop, each rank's calls on threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.exchange.store import IncarnationStore, PeerGone
from elastic_ep.group.store_table import StoreTable
from elastic_ep.rank.store_client import ControlStore
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import FromRank, Member, ToRank
from elastic_ep.wire.sockets import ControllerWire, RankWire
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet, StoreValue
from tests.kit.lone_rank import Wire, lone_rank

DEADLINE_S = 20.0
LONG = timedelta(seconds=DEADLINE_S)
SHORT = timedelta(seconds=0.05)
VALUE = bytes(range(256)) * 16
A, B = Member(0, 1), Member(1, 1)


def _no_error(*what: object) -> None:
    raise AssertionError(what)


class Plane:
    """The run process' end, and ranks that join it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._loop = asyncio.get_running_loop()
        self._wires: list[RankWire] = []
        self._changed = asyncio.Event()
        self._controller = ControllerWire(directory)
        self._controller.receive(self._on_message, _no_error)
        self.table = StoreTable(self._controller.send, lambda kind, /, **facts: None)

    def _on_message(self, member: Member, message: FromRank) -> None:
        assert isinstance(message, StoreSet | StoreGet | StoreDelete)
        self.table.heard(member, message)
        self._changed.set()

    def join(self, member: Member) -> ControlStore:
        def on_direct(message: ToRank) -> None:
            assert isinstance(message, StoreValue)
            store.received(message)

        wire = RankWire(self._directory, member, lambda numbered: None, on_direct, _no_error)
        self._wires.append(wire)
        store = ControlStore(lambda message: self._post(wire, message), USUAL)
        return store

    def _post(self, wire: RankWire, message: FromRank) -> None:
        self._loop.call_soon_threadsafe(wire.send, message)

    async def until(self, condition: Callable[[StoreTable], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not condition(self.table):
                self._changed.clear()
                await self._changed.wait()

    def close(self) -> None:
        dropped = [self._controller.dropped, *(wire.dropped for wire in self._wires)]
        for wire in self._wires:
            wire.close()
        self._controller.close()
        assert not any(dropped)


@asynccontextmanager
async def plane(directory: Path) -> AsyncIterator[Plane]:
    running = Plane(directory)
    try:
        yield running
    finally:
        running.close()


def run(directory: Path, scenario: Callable[[Plane], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(2 * DEADLINE_S), plane(directory) as running:
            await scenario(running)

    asyncio.run(main())


def test_a_value_set_before_the_wait_comes_unchanged(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        a, b = plane.join(A), plane.join(B)
        a.set("key", VALUE)
        await plane.until(lambda table: "key" in table.keys)
        await asyncio.to_thread(b.wait, ["key"], LONG)
        assert b.multi_get(["key"]) == [VALUE]

    run(directory, scenario)


def test_a_wait_ends_when_the_last_value_is_set(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        a, b = plane.join(A), plane.join(B)
        a.set("first", b"1")
        waiting = asyncio.create_task(asyncio.to_thread(b.wait, ["second", "first"], LONG))
        await plane.until(lambda table: "second" in table.wanted and "first" in table.keys)
        assert not waiting.done()
        a.set("second", b"2")
        await waiting
        assert b.multi_get(["second", "first", "second"]) == [b"2", b"1", b"2"]

    run(directory, scenario)


def test_a_wait_in_vain_names_what_is_missing_and_only_that(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        a, b = plane.join(A), plane.join(B)
        a.set("there", b"")
        await plane.until(lambda table: "there" in table.keys)
        with pytest.raises(TimeoutError) as caught:
            await asyncio.to_thread(b.wait, ["there", "missing", "lost"], timedelta(seconds=1))
        assert str(caught.value) == "nobody has set missing, lost"

    run(directory, scenario)


def test_a_value_that_comes_too_late_is_there_for_the_next_wait(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        a, b = plane.join(A), plane.join(B)
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(b.wait, ["key"], timedelta(0))
        a.set("key", b"late")
        await plane.until(lambda table: "key" in table.keys and not table.wanted)
        await asyncio.to_thread(b.wait, ["key"], LONG)
        assert b.multi_get(["key"]) == [b"late"]

    run(directory, scenario)


def test_a_key_may_be_set_again_and_a_wait_asks_anew(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        a, b = plane.join(A), plane.join(B)
        for value in (b"one", b"one", b"other"):
            a.set("key", value)
            a.set("after", value)
            await asyncio.to_thread(b.wait, ["after"], LONG)
            b.delete_key("after")
            await plane.until(lambda table: "after" not in table.keys)
            await asyncio.to_thread(b.wait, ["key"], LONG)
            assert b.multi_get(["key"]) == [value]

    run(directory, scenario)


def test_what_is_deleted_is_gone_for_all(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        a, b = plane.join(A), plane.join(B)
        a.set("key", b"value")
        assert await asyncio.to_thread(b.multi_get, ["key"]) == [b"value"]
        await asyncio.to_thread(b.wait, ["key"], LONG)
        assert b.delete_key("key")
        assert not b.delete_key("key")
        await plane.until(lambda table: not table.keys)
        for store in (a, b):
            with pytest.raises(TimeoutError, match="key"):
                await asyncio.to_thread(store.wait, ["key"], SHORT)

    run(directory, scenario)


def test_waits_on_several_threads_get_each_their_own(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        a, b = plane.join(A), plane.join(B)
        keys = [f"key {number}" for number in range(4)]  # fewer than the threads of asyncio
        waits = [asyncio.create_task(asyncio.to_thread(b.wait, [key, "all"], LONG)) for key in keys]
        await plane.until(lambda table: set(keys) <= table.wanted)
        for key in keys:
            a.set(key, key.encode())
        a.set("all", b"")
        await asyncio.gather(*waits)
        assert b.multi_get(keys) == [key.encode() for key in keys]

    run(directory, scenario)


def test_a_wait_for_a_peer_that_is_masked_ends(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        masked = threading.Event()
        store = IncarnationStore(plane.join(A), lambda member: member != B or not masked.is_set())
        store.incarnations = {A.rank: A.incarnation, B.rank: B.incarnation}
        waiting = asyncio.create_task(asyncio.to_thread(store.wait, ["EP/1/0"], LONG))
        await plane.until(lambda table: bool(table.wanted))
        masked.set()
        with pytest.raises(PeerGone):
            await waiting

    run(directory, scenario)


def test_a_wait_for_a_peer_that_died_ends_with_its_deadline_and_leaves_nothing(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        store = IncarnationStore(plane.join(A))
        store.incarnations = {A.rank: A.incarnation, B.rank: B.incarnation}
        waiting = asyncio.create_task(asyncio.to_thread(store.wait, ["EP/1/0"], timedelta(seconds=0.3)))
        await plane.until(lambda table: bool(table.wanted))
        plane.table.gone(B)
        with pytest.raises(TimeoutError, match=r"EP/1\.1/0\.1"):
            await waiting
        assert not plane.table.wanted

    run(directory, scenario)


def meet(store: ControlStore, me: Member, peer: Member) -> bytes:
    """What Mooncake does to connect two ranks."""
    keys = IncarnationStore(store)
    keys.incarnations = {me.rank: me.incarnation, peer.rank: peer.incarnation}
    there, back = f"EP/{me.rank}/{peer.rank}", f"EP/{peer.rank}/{me.rank}"
    keys.set(there, repr(me).encode())
    keys.wait([back], LONG)
    (value,) = keys.multi_get([back])
    assert keys.delete_key(back)
    return value


def test_a_rank_meets_each_incarnation_of_its_peer_and_the_table_stays_empty(directory: Path) -> None:
    async def scenario(plane: Plane) -> None:
        a = plane.join(A)
        for incarnation in range(1, 9):
            peer = Member(1, incarnation)
            b = plane.join(peer)
            met = await asyncio.gather(
                asyncio.to_thread(meet, a, A, peer), asyncio.to_thread(meet, b, peer, A)
            )
            assert list(met) == [repr(peer).encode(), repr(A).encode()]
            plane.table.gone(peer)
        assert not plane.table.keys | plane.table.wanted

    run(directory, scenario)


def test_a_ranks_control_loop_carries_questions_and_answers() -> None:
    async def main() -> None:
        loop_thread = threading.get_ident()

        def heard(message: Any) -> None:
            assert threading.get_ident() == loop_thread
            if isinstance(message, StoreGet):
                rank._on_direct(StoreValue("key", b"value"))

        wire = Wire(heard)
        rank = lone_rank(wire)
        rank._loop = asyncio.get_running_loop()
        await asyncio.to_thread(rank._store.set, "mine", b"")
        await asyncio.to_thread(rank._store.wait, ["key"], LONG)
        await asyncio.to_thread(rank._store.delete_key, "key")
        await asyncio.sleep(0)  # what threads have posted is sent in the loop's next turn
        assert wire.sent == [StoreSet("mine", b""), StoreGet(("key",)), StoreDelete("key")]

    asyncio.run(main())
