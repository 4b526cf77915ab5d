"""Two hosts of two ranks: one dies, falls silent or loses its agent under streams, and no client sees it. Nor that a
third comes, and dies."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
import zmq

from tests.kit.harness import DEADLINE_S, title, wait_until
from tests.kit.host_faults import Texts, full, grown, undisturbed, views, while_they_stream, with_fault
from tests.kit.hosts import Group, group

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

OTHER, THIRD = "127.0.0.2", "127.0.0.3"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Every test leaves both of them there."""
    given = ["--event-log", "full", "--max-hosts", "3"]
    with group(tmp_path_factory.mktemp("hosts"), arguments=given) as running:
        yield running


@pytest.fixture(scope="module")
def expected(hosts: Group) -> Texts:
    return undisturbed(hosts.server.url)


def of_the_other(incarnations: dict[int, int]) -> dict[int, int]:
    return {rank: incarnation for rank, incarnation in incarnations.items() if rank >= 2}


def test_a_killed_host_costs_no_token_and_comes_back(hosts: Group, expected: Texts) -> None:
    lost = hosts.hosts[OTHER]
    earlier = len(views(hosts))
    texts, before = asyncio.run(with_fault(hosts.server.url, lost.kill))
    assert texts == expected
    seen = views(hosts)[earlier:]
    assert {0, 1} in seen
    assert not [view for view in seen if len(view) == 3], "both ranks of the host are lost in one view"
    hosts.start(OTHER)
    now = asyncio.run(full(hosts.server.url, of_the_other(before)))
    assert {engine["id"]: engine["incarnation"] for engine in now["engines"] if engine["id"] < 2} == {
        0: before[0],
        1: before[1],
    }


def test_a_killed_agent_of_a_host_costs_nothing(hosts: Group, expected: Texts) -> None:
    """Its ranks live, rows are carried again by the next one, and that one tells of a killed rank."""
    host = hosts.hosts[OTHER]
    agent = next(pid for pid in host.pids if "host agent" in title(pid))
    texts, before = asyncio.run(with_fault(hosts.server.url, lambda: os.kill(agent, signal.SIGKILL)))
    assert texts == expected
    rank = next(pid for pid in host.pids if "rank 3." in title(pid))
    texts, _ = asyncio.run(with_fault(hosts.server.url, lambda: os.kill(rank, signal.SIGKILL)))
    assert texts == expected
    asyncio.run(full(hosts.server.url, {3: before[3]}))


def test_a_host_that_is_stopped_is_lost_and_its_ranks_end_though_nobody_there_can_end_them(
    hosts: Group, expected: Texts
) -> None:
    host = hosts.hosts[OTHER]
    ranks = [pid for pid in host.pids if ": rank " in title(pid)]
    assert len(ranks) == 2
    texts, before = asyncio.run(with_fault(hosts.server.url, lambda: host.signal(signal.SIGSTOP)))
    assert texts == expected
    wait_until(lambda: not set(ranks) & set(host.pids), DEADLINE_S, "the kernel has ended them")
    host.signal(signal.SIGCONT)
    host.lines.await_line("not heard of for too long|taken this host for dead")
    asyncio.run(full(hosts.server.url, of_the_other(before)))


def test_who_does_not_have_the_key_is_refused_and_counted(hosts: Group, expected: Texts) -> None:
    address, _, port = hosts.join.rpartition(":")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    public, secret = zmq.curve_keypair()
    socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = public, public, secret
    socket.connect(f"tcp://{address}:{port}")
    hosts.lines.await_line("without the group's key is refused")
    context.destroy(linger=0)
    texts, _ = asyncio.run(with_fault(hosts.server.url, lambda: None))
    assert texts == expected


def test_a_host_that_joins_makes_the_group_grow_and_may_be_killed(hosts: Group, expected: Texts) -> None:
    """The last of these: the group misses that host from then on."""
    third = hosts.start(THIRD)
    waves, _ = asyncio.run(while_they_stream(hosts.server.url, grown(hosts.server.url, 6)))
    assert waves == [expected] * len(waves)
    assert set(range(6)) in views(hosts)
    texts, _ = asyncio.run(with_fault(hosts.server.url, third.kill))
    assert texts == expected
    assert views(hosts)[-1] == set(range(4))
