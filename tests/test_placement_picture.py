"""The picture of a loss, from a log as the controller's shell writes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from elastic_ep.event_log.log import EventLog
from elastic_ep.machines.experts import events as ev
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.registry import arguments
from elastic_ep.placement import launch_placement
from elastic_ep.placement_picture import NothingLost, draw, main, moments
from elastic_ep.wire.messages import Member

RANKS, EXPERTS = 4, 4


def write_log(folder: Path, *, lose: bool, hosts: tuple[int, ...] = ()) -> Path:
    """Rank 3 of four is lost, what it held is copied onto the survivors, it comes back."""
    placement = launch_placement(RANKS, 2, EXPERTS, 4, num_spare=1, hosts=hosts)
    repair = RepairMachine(placement)
    log = EventLog(folder / "run")
    membership = MembershipMachine(RANKS, placement)
    log.begin({"machines": arguments({"membership": membership, "repair": repair})})

    def feed(event: ev.Event) -> list[ev.Effect]:
        effects = repair.step(event)
        log.record("repair", event, effects)
        return effects

    all_four = tuple(Member(rank, 1) for rank in range(RANKS))
    feed(ev.MembersChanged(all_four))
    if lose:
        orders = [e for e in feed(ev.MembersChanged(all_four[:3])) if isinstance(e, ev.Order)]
        assert orders
        for order in orders:
            feed(ev.Copied(order.member, order.ticket, order.logical + 1))
        feed(ev.MembersChanged((*all_four[:3], Member(3, 2))))
    log.close()
    assert log.path
    return log.path


def test_hosts_are_drawn_where_there_are_several(tmp_path: Path) -> None:
    found = moments(write_log(tmp_path, lose=True, hosts=(0, 0, 1, 1)))
    assert [moment.tolerates_hosts(0) for moment in found] == [1, 0, 0, 1], "one rank has no room for all"
    _, facts, hosts, _, *_ = draw(found, 0).splitlines()
    assert re.split(r" {3,}", facts.strip())[0] == "tolerates 1, hosts 1"
    assert hosts.split() == ["host", *["aabb"] * 4]


def test_moments_of_a_loss(tmp_path: Path) -> None:
    found = moments(write_log(tmp_path, lose=True))
    assert [moment.title for moment in found] == ["before", "rank 3 lost", "copies made again", "rank 3 back"]
    assert [moment.tolerates(0) for moment in found] == [1, 0, 1, 1]
    assert [moment.ranks for moment in found] == [
        frozenset(range(4)),
        frozenset(range(3)),
        frozenset(range(3)),
        frozenset(range(4)),
    ]
    assert 0 <= found[1].at_ns <= found[2].at_ns <= found[3].at_ns


def test_the_drawing_shows_what_was_held_lost_and_made(tmp_path: Path) -> None:
    found = moments(write_log(tmp_path, lose=True))
    drawn = draw(found, 0)
    titles, facts, _, *rows = drawn.splitlines()
    assert re.split(r" {3,}", titles.strip()) == [moment.title for moment in found]
    assert "tolerates 0" in facts
    marks = "".join(row[4:] for row in rows[:EXPERTS])
    lost = sum(expert >= 0 for expert in found[0].placement.on_rank(0, 3))
    assert marks.count("x") == 2 * lost, "the copies of the lost rank, in two of the moments"
    assert marks.count("+") == 2 * lost, "as many were made again, in the last two"
    whole = [row.split()[1] for row in rows[:EXPERTS]]
    for expert, row in enumerate(whole):
        held = [expert in found[0].placement.on_rank(0, rank) for rank in range(RANKS)]
        assert row == "".join(".#"[one] for one in held)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path, lose=True)
    assert main([str(log.parent), "--layer", "1"]) == 0
    assert capsys.readouterr().out == draw(moments(log), 1)
    assert main([str(log), "--layer", "2"]) == 2
    assert "--layer 2: there are 2" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
    log.write_text("{}\n")
    assert main([str(log)]) == 2


def test_without_a_loss_there_is_nothing_to_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write_log(tmp_path, lose=False)
    with pytest.raises(NothingLost):
        moments(log)
    assert main([str(log)]) == 1
    assert "no rank was lost" in capsys.readouterr().err
