"""A log replays to the same effects; a cut one is read up to the cut; a changed one is refused where it differs."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from elastic_ep.event_log.log import EventLog
from elastic_ep.machines.contract import Tick
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.registry import arguments
from elastic_ep.machines.requests import events as routing
from elastic_ep.machines.requests.events import RoutingConfig
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.placement import launch_placement
from elastic_ep.replay import DIFFERS, SAME, UNREADABLE, main
from elastic_ep.wire.messages import Member, RankState, SamplingParams, Token


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Two ranks form, one is lost, a request runs: as the controller's shell would log it."""
    placement = launch_placement(2, 1, 4, 4)
    membership = MembershipMachine(2, placement)
    router = RoutingMachine(RoutingConfig(max_num_seqs=4, max_queued=1024))
    events = EventLog(tmp_path / "run")
    events.begin({"machines": arguments({"membership": membership, "routing": router})})
    states = (RankState.INIT_CUDA, RankState.INIT_DIST, RankState.JOINING)
    story: list[ev.Event] = [ev.Start(), Tick(1)]
    story += [ev.Reported(Member(rank, 1), state) for rank in range(2) for state in states]
    story += [ev.Promised(Member(rank, 1), 1, 0) for rank in range(2)]
    story += [ev.WorkBegan(), ev.DeathNoticed(Member(1, 1), "died"), ev.ProcessGone(Member(1, 1), "signal 9")]
    for event in story:
        events.record("membership", event, membership.step(event))
    request = routing.NewRequest(0, (1, 2), SamplingParams(max_tokens=3), 7, 0)
    heard: list[routing.Event] = [routing.RankUp(Member(0, 1)), routing.Submitted(request)]
    heard.append(routing.TokensCommitted(Member(0, 1), (Token(0, 0, 5),)))
    for told in heard:
        events.record("routing", told, router.step(told))
    events.note("disturbance", kind="loss", epoch=2, rank=0, gap_s=0.02, beyond_s=0.01, steps=2.0)
    events.close()
    assert events.path
    return events.path


def test_the_same_comes_out(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(log.parent)]) == SAME
    out = capsys.readouterr().out
    assert "rank 1.1: Failed (died)" in out
    assert "rank 0: stall of 20.0 ms around view 2" in out
    assert (
        "loss of rank 1.1 (died, view 2): longest stall 20.0 ms (2.0 median steps, rank 0), not back" in out
    )
    assert "view 2: without 1.1, because of DeathNoticed" in out
    assert "cut off" not in out


def test_a_log_cut_anywhere_in_its_last_line_is_read_up_to_there(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = log.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for cut in range(last + 1, len(whole)):
        log.write_bytes(whole[:cut])
        assert main([str(log), "--quiet"]) == SAME
        assert "cut off" in capsys.readouterr().out


def test_any_changed_line_is_refused_at_that_line(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        changed = line.replace(b'"t_ns":', b'"t_ns":1', 1)
        log.write_bytes(b"".join([*lines[:number], changed, *lines[number + 1 :]]))
        assert main([str(log)]) == DIFFERS
        assert f"line {number + 1}:" in capsys.readouterr().err


def test_a_missing_line_is_noticed(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:5], *lines[6:]]))
    assert main([str(log)]) == DIFFERS


def test_another_effect_is_refused_even_with_its_checksum_mended(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checksum, out = 0, []
    for line in log.read_bytes().splitlines():
        body = line.rpartition(b',"crc":')[0].replace(b'"Failed"', b'"Stopped"') + b"}"
        checksum = zlib.crc32(body, checksum)
        out.append(b'%s,"crc":%d}\n' % (body[:-1], checksum))
    log.write_bytes(b"".join(out))
    assert main([str(log)]) == DIFFERS
    assert "replay:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cause", "status"), [(0, SAME), (1, SAME), (2, DIFFERS), (3, DIFFERS), (-1, DIFFERS)]
)
def test_a_cause_is_an_event_before_it_that_had_effects(tmp_path: Path, cause: int, status: int) -> None:
    """The first event has none, the second has one, and there are no three before the third."""
    router = RoutingMachine(RoutingConfig(max_num_seqs=4, max_queued=1024))
    events = EventLog(tmp_path / "run")
    events.begin({"machines": arguments({"routing": router})})
    request = routing.NewRequest(0, (1, 2), SamplingParams(max_tokens=3), 7, 0)
    for told in (routing.RankUp(Member(0, 1)), routing.Submitted(request)):
        events.record("routing", told, router.step(told))
    last = routing.CancelRequested(0)
    events.record("routing", last, router.step(last), cause)
    events.close()
    assert main([str(tmp_path / "run")]) == status


def test_what_is_no_log_is_unreadable(tmp_path: Path) -> None:
    assert main([str(tmp_path / "nowhere")]) == UNREADABLE
    (tmp_path / "events.jsonl").write_text("")
    assert main([str(tmp_path)]) == UNREADABLE
