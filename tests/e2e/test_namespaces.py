"""Three hosts of two ranks in network namespaces: a power failure, cut links, and who must not join; under streams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from tests.kit.harness import title
from tests.kit.host_faults import Texts, full, notes, undisturbed, views, with_fault
from tests.kit.hosts import Group, Host, group, may_run
from tests.kit.network import Network, network, refused

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.hosts,
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(refused()), reason=refused()),
]
JOIN, PUB, RANKS = 9000, 9001, 9002
ALL = {0, 1, 2, 3, 4, 5}


@dataclass(frozen=True)
class Hosts:
    """Every test leaves all of them there."""

    network: Network
    group: Group
    expected: Texts

    @property
    def url(self) -> str:
        return self.group.server.url

    def at(self, number: int) -> Host:
        return self.group.hosts[self.network.addresses[number]]

    def start(self, number: int) -> Host:
        return self.group.start(self.network.addresses[number], self.network.hosts[number].prefix)

    def number_of(self, rank: int) -> int:
        """Which namespace it is in: hosts are numbered in the order in which they join."""
        ranks = {f"rank {rank}."}
        return next(
            number
            for number in range(1, len(self.network.hosts))
            if any(word in title(pid) for pid in self.at(number).pids for word in ranks)
        )


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with network(3) as net, net.hosts[0].entered():
        prefixes = [(), *(host.prefix for host in net.hosts[1:])]
        folder, log = tmp_path_factory.mktemp("hosts"), ["--event-log", "full"]
        with group(folder, net.addresses, arguments=log, prefixes=prefixes, port=JOIN) as running:
            yield Hosts(net, running, undisturbed(running.server.url))


def under(hosts: Hosts, fault: Callable[[], object]) -> dict[int, int]:
    """All texts are right though it strikes; the incarnations before."""
    texts, before = asyncio.run(with_fault(hosts.url, fault))
    assert texts == hosts.expected
    return before


def again(hosts: Hosts, before: dict[int, int], ranks: set[int]) -> None:
    """All serve, these alone in new incarnations."""
    now = asyncio.run(full(hosts.url, {rank: before[rank] for rank in ranks}))
    incarnations = {engine["id"]: engine["incarnation"] for engine in now["engines"]}
    assert {rank: incarnations[rank] for rank in ALL - ranks} == {rank: before[rank] for rank in ALL - ranks}


def test_a_power_failure_costs_no_token_though_no_packet_tells_of_it(hosts: Hosts) -> None:
    """Connections are half-open then, until the host is back and answers with resets."""
    earlier = len(views(hosts.group))
    lost = hosts.number_of(3)
    with ExitStack() as cut:

        def fail() -> None:
            cut.enter_context(hosts.network.cut(lost))
            hosts.at(lost).kill()

        before = under(hosts, fail)
        assert {0, 1, 4, 5} in views(hosts.group)[earlier:]
    hosts.start(lost)
    again(hosts, before, {2, 3})


def test_a_host_that_is_cut_off_ends_its_ranks_by_itself_and_comes_back(hosts: Hosts) -> None:
    number = hosts.number_of(5)
    host = hosts.at(number)
    ranks = {pid for pid in host.pids if ": rank " in title(pid)}
    assert len(ranks) == 2
    with ExitStack() as cut:
        before = under(hosts, lambda: cut.enter_context(hosts.network.cut(number)))
        host.lines.await_line("the group was not heard of for too long")
        hosts.group.lines.await_line("rank lost .* rank=5")
        assert not any(map(may_run, ranks)), "they end before they count as gone"
    again(hosts, before, {4, 5})


@pytest.mark.long
def test_two_hosts_that_do_not_reach_each_other_lose_one_and_nobody_stands_still(hosts: Hosts) -> None:
    earlier = len(notes(hosts.group, "host_lost"))
    one, other = hosts.number_of(3), hosts.number_of(5)
    with ExitStack() as cut:
        before = under(hosts, lambda: cut.enter_context(hosts.network.cut(one, other)))
        [lost] = notes(hosts.group, "host_lost")[earlier:]
        assert (lost["host"], lost["why"]) == (2, "it and host 1 do not reach each other")
        hosts.group.lines.await_line("does not reach others: its ranks wait")
    again(hosts, before, {4, 5})


@pytest.mark.long
def test_ranks_that_are_not_heard_are_fenced_though_their_host_is(hosts: Hosts) -> None:
    with ExitStack() as cut:
        before = under(hosts, lambda: cut.enter_context(hosts.network.cut(hosts.number_of(3), 0, RANKS)))
    again(hosts, before, {2, 3})


@pytest.mark.long
def test_ranks_that_do_not_hear_of_a_loss_do_not_hold_others_up_for_ever(hosts: Hosts) -> None:
    with ExitStack() as cut:

        def fault() -> None:
            cut.enter_context(hosts.network.cut(hosts.number_of(3), 0, PUB))
            hosts.at(lost).kill()

        lost = hosts.number_of(5)
        before = under(hosts, fault)
    hosts.start(lost)
    again(hosts, before, {4, 5})


@pytest.mark.long
@pytest.mark.parametrize("back", [False, True])
def test_a_link_that_is_cut_in_one_direction_is_a_cut_link(hosts: Hosts, back: bool) -> None:
    number = hosts.number_of(3)
    ends = (0, number) if back else (number, 0)
    with ExitStack() as cut:
        before = under(hosts, lambda: cut.enter_context(hosts.network.cut(*ends, back=False)))
        hosts.at(number).lines.await_line("for too long|taken this host for dead")
    again(hosts, before, {2, 3})


@pytest.mark.long
def test_a_slow_link_costs_time_alone(hosts: Hosts) -> None:
    with ExitStack() as slow:
        before = under(hosts, lambda: slow.enter_context(hosts.network.slow(hosts.number_of(3), "20mbit")))
    again(hosts, before, set())


@pytest.mark.long
def test_who_must_not_join_gets_a_line_that_says_why_and_nobody_else_notices(hosts: Hosts) -> None:
    other_key = hosts.group.key_file.with_name("other")
    other_key.write_text("00" * 32)
    other_key.chmod(0o600)
    inside = hosts.network.hosts[1].prefix
    address = hosts.network.addresses[1]
    asked = {
        "nobody answers: is the group there, and does it have the same key": ["--key-file", str(other_key)],
        "is in the group: is it the one before this": ["--key-file", str(hosts.group.key_file)],
    }
    for line, key in asked.items():
        host = Host(["--join", hosts.group.join, *key, "--address", address], inside)
        host.lines.await_line(line)
        if "other" not in key[1]:
            host.lines.await_line("this host is ready for a place")
        again(hosts, under(hosts, lambda: None), set())
        host.close()
    hosts.group.lines.await_line("without the group's key is refused")
