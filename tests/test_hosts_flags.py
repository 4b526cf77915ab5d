"""Flags of several hosts: what belongs together, and what is refused by a line that says what to do."""

from __future__ import annotations

import pytest

from elastic_ep.config import ConfigError, ServeConfig, address_of
from elastic_ep.plan import make_plan
from elastic_ep.run import parse

TWO = ["--hosts", "2", "--ranks-per-host", "2", "--hosts-address", "10.0.0.1:9000", "--key-file", "key"]


def without(*names: str) -> list[str]:
    left = list(TWO)
    for name in names:
        at = left.index(name)
        del left[at : at + 2]
    return left


def test_ranks_are_numbered_host_by_host_and_no_expert_is_on_one_host_alone() -> None:
    config = parse([*TWO, "--device", "cpu"])
    assert (config.ranks, config.host_of_rank, config.joined_at) == (4, (0, 0, 1, 1), ("10.0.0.1", 9000))
    assert config.timing.ranks == 4
    plan = make_plan(config)
    assert plan.placement.hosts == (0, 0, 1, 1)
    assert plan.placement.tolerates_hosts(range(4)) == 1


def test_what_is_shared_is_sized_for_the_capacity_and_the_group_begins_with_its_hosts() -> None:
    config = parse([*TWO, "--max-hosts", "3", "--device", "cpu"])
    assert (config.ranks, config.capacity, config.host_of_rank) == (4, 6, (0, 0, 1, 1, 2, 2))
    plan = make_plan(config)
    assert (plan.shape.num_ranks, plan.placement.hosts) == (6, (0, 0, 1, 1, 2, 2))
    assert plan.shelf is None or plan.shelf.regions == 6
    assert plan.placement.tolerates_hosts(range(4)) == 1
    alone = parse([*without("--hosts"), "--max-hosts", "2", "--device", "cpu"])
    assert (alone.hosts, alone.ranks, alone.host_of_rank) == (1, 2, (0, 0, 1, 1))


def test_one_host_is_as_ever() -> None:
    config = parse([])
    assert (config.ranks, config.host_of_rank) == (8, ())
    assert ServeConfig(model="", ranks=3).ranks == 3


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (without("--hosts"), "--ranks-per-host is for several hosts"),
        (without("--hosts", "--ranks-per-host"), "--hosts-address is for several hosts"),
        (without("--ranks-per-host"), "needs --ranks-per-host"),
        ([*without("--ranks-per-host"), "--ranks-per-host", "33"], "at most 64 ranks"),
        ([*TWO, "--max-hosts", "1"], "--max-hosts 1 is less than --hosts 2"),
        ([*TWO, "--max-hosts", "33"], "--max-hosts 33 needs --ranks-per-host, for at most 64 ranks"),
        (["--max-hosts", "2", "--ranks-per-host", "2"], "--max-hosts 2 needs --hosts-address"),
        (without("--hosts-address"), "needs --hosts-address ADDRESS:PORT"),
        (without("--key-file"), "and --key-file"),
        ([*TWO, "--ranks", "5"], "give --ranks-per-host alone"),
        ([*TWO, "--disable-fault-tolerance"], "--disable-fault-tolerance is for one host"),
        ([*TWO, "--mps"], "--mps is for ranks that share a GPU of one host"),
    ],
)
def test_what_does_not_belong_together_is_refused(arguments: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse(arguments)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "10.0.0.1",
        "10.0.0.1:",
        ":9000",
        "a-name:9000",
        "10.0.0.1:x",
        "10.0.0.1:65533",
        "10.0.0.1:-1",
        "0.0.0.0:1",
    ],
)
def test_where_hosts_join_is_an_address_and_a_port(given: str) -> None:
    with pytest.raises(ConfigError, match="give ADDRESS:PORT"):
        address_of("--join", given)


def test_an_address_may_be_of_either_kind() -> None:
    assert address_of("--join", "10.0.0.1:0") == ("10.0.0.1", 0)
    assert address_of("--join", "[fd00::1]:9000") == ("fd00::1", 9000)
