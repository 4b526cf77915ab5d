"""Whom to lose of hosts that do not reach each other."""

from __future__ import annotations

from itertools import permutations

import pytest

from elastic_ep.machines.hosts.links import LinkTable
from elastic_ep.timing import USUAL
from elastic_ep.wire.host_messages import Links

HOSTS = (0, 1, 2, 3)


def table(*cuts: tuple[int, int]) -> LinkTable:
    made = LinkTable(0)
    gone = {*cuts, *((b, a) for a, b in cuts)}
    for host in HOSTS:
        made.say(host, Links(tuple(other for other in HOSTS if other != host and (host, other) not in gone)))
    return made


def looks(made: LinkTable, count: int) -> tuple[int, int] | None:
    *_, last = (made.look(HOSTS) for _ in range(count))
    return last


@pytest.mark.parametrize(
    ("cuts", "lost"),
    [
        ([(1, 2)], (2, 1)),
        ([(0, 1)], (1, 0)),
        ([(1, 2), (1, 3)], (1, 2)),
        ([(0, 1), (1, 2)], (1, 0)),
        ([(1, 2), (1, 3), (2, 3)], (3, 1)),
        ([(0, 1), (0, 2), (0, 3)], (3, 0)),
    ],
)
def test_the_one_that_is_apart_from_most_is_lost_after_a_while(
    cuts: list[tuple[int, int]], lost: tuple[int, int]
) -> None:
    made = table(*cuts)
    assert looks(made, USUAL.apart_beats) is None
    assert made.look(HOSTS) == lost


def test_who_says_so_is_all_the_same() -> None:
    for one, other in permutations((1, 2)):
        made = table()
        made.say(one, Links(tuple(host for host in HOSTS if host != other)))
        assert looks(made, USUAL.apart_beats + 1) == (2, 1)


def test_all_together_lose_nobody_and_a_link_that_is_back_is_counted_anew() -> None:
    made = table()
    assert looks(made, 100) is None
    made.say(3, Links((0, 1)))
    looks(made, USUAL.apart_beats)
    made.say(3, Links((0, 1, 2)))
    made.look(HOSTS)
    made.say(3, Links((0, 1)))
    assert looks(made, USUAL.apart_beats) is None


def test_who_waits_for_its_next_agent_gets_longer_but_not_for_ever() -> None:
    made = table()
    made.say(1, Links((), known=False))
    assert looks(made, USUAL.agentless_beats) is None
    assert made.look(HOSTS) == (1, 0)


def test_of_one_whose_life_is_over_nothing_counts() -> None:
    made = table()
    made.forget(1)
    assert made.apart_from(1, (0, 2)) == [0, 2]
    assert made.apart_from(0, HOSTS[1:]) == [1]
