"""A rank's machine in the event log: all that it hears replays, nothing quotes a text, and little is kept."""

from __future__ import annotations

import json
import stat
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_ep.config import EventLogMode, RankLog
from elastic_ep.event_log.files import CURRENT, RANKS
from elastic_ep.event_log.log import EventLog
from elastic_ep.machines.rank.events import EngineReady, Event, PeerDied, Started, StepsFailed, WarmedUp
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.placement import Change, launch_placement
from elastic_ep.rank.machine_log import MachineLog
from elastic_ep.replay import DIFFERS, SAME, main
from elastic_ep.wire.messages import Beat, Member, Numbered, PlacementChanged, Seat, Snapshot, View
from tests.kit.lone_rank import CONFIG

SECRET = "'the secret word is swordfish 4242'"
VIEW = View(3, (Seat(1, 1, 0), Seat(0, 1, 7)))
EVENTS: list[Event] = [
    Started(),
    EngineReady(),
    WarmedUp(),
    Snapshot(4, View(2, ()), None, launch_placement(2, 1, 2, 0)),
    Numbered(4, Beat()),
    Numbered(5, VIEW),
    Numbered(5, Beat()),
    PeerDied(Member(1, 1)),
    StepsFailed(f"ValueError: {SECRET}", (3,)),
]


def lived(
    run: Path, events: list[Event], mode: EventLogMode = EventLogMode.IDS, most: int = 0, incarnation: int = 1
) -> Path:
    """The folder of the log of a rank that has heard `events`, in the run at `run`."""
    told = RankLog(str(run / RANKS), mode, most)
    machine = RankMachine(Member(0, incarnation))
    log = MachineLog(replace(CONFIG, incarnation=incarnation, event_log=told), machine)
    for event in events:
        log.heard(event, machine.step(event))
    log.close()
    return run / RANKS / f"0.{incarnation}"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of a run whose own log has no machines."""
    log = EventLog(tmp_path / "run")
    log.begin({"machines": {}})
    log.close()
    return tmp_path / "run"


def test_what_it_hears_replays_with_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = lived(run, EVENTS)
    assert main([str(run)]) == SAME
    assert "1 logs of ranks" in capsys.readouterr().out
    lines = map(json.loads, (folder / CURRENT).read_text().splitlines())
    text = str([(line.get("heard"), line.get("effects")) for line in lines])  # a checksum may have any digits
    assert "PeerDied" in text
    assert "swordfish" not in text
    assert "4242" not in text
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / CURRENT).stat().st_mode) == 0o600


def test_in_full_mode_what_an_exception_says_is_there(run: Path) -> None:
    folder = lived(run, EVENTS, EventLogMode.FULL)
    assert main([str(run)]) == SAME
    assert "swordfish" in (folder / CURRENT).read_text()


def test_a_changed_line_is_found_and_the_rank_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lived(run, EVENTS) / CURRENT
    file.write_bytes(file.read_bytes().replace(b'["PeerDied",[1,1]]', b'["PeerDied",[1,2]]'))
    assert main([str(run)]) == DIFFERS
    assert "rank 0.1: " in capsys.readouterr().err


def test_another_decision_is_found_even_with_its_checksum_mended(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lived(run, EVENTS) / CURRENT
    checksum, mended = 0, []
    for line in file.read_bytes().replace(b'["RouteAround",[1,1]]', b'["RouteAround",[1,2]]').splitlines():
        body = line.rpartition(b',"crc":')[0]
        checksum = zlib.crc32(body + b"}", checksum)
        mended.append(b'%s,"crc":%d}\n' % (body, checksum))
    file.write_bytes(b"".join(mended))
    assert main([str(run)]) == DIFFERS
    assert "RouteAround" in capsys.readouterr().err


def test_beats_from_which_nothing_follows_are_left_out(run: Path) -> None:
    folder = lived(run, [*EVENTS[:6], *[Numbered(5, Beat())] * 500])
    heard = [json.loads(line).get("heard") for line in (folder / CURRENT).read_text().splitlines()]
    assert ["Numbered", 5, ["Beat"]] not in heard
    assert len(heard) == 1 + 6
    assert main([str(run)]) == SAME


def test_it_keeps_within_its_limit_and_goes_on_from_the_middle(run: Path) -> None:
    changes = [Numbered(5 + n, PlacementChanged(n, (Change(0, 0, n % 2),))) for n in range(1, 400)]
    folder = lived(run, [*EVENTS[:6], *changes], most=20_000)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 20_000
    assert main([str(run)]) == SAME
    assert main([str(folder)]) == SAME


def test_two_incarnations_are_kept(run: Path) -> None:
    for incarnation in (1, 2, 10, 11):
        lived(run, EVENTS[:1], incarnation=incarnation)
    (run / RANKS / "00.3").mkdir()  # of nobody that this rank knows
    assert sorted(folder.name for folder in (run / RANKS).iterdir()) == ["0.10", "0.11", "00.3"]


def test_a_folder_that_cannot_be_made_is_no_reason_not_to_serve(run: Path) -> None:
    (run / RANKS).write_text("a file is in the way")
    lived(run, EVENTS)
    assert (run / RANKS).is_file()


def test_without_a_log_nothing_is_made(tmp_path: Path) -> None:
    machine = RankMachine(Member(0, 1))
    log = MachineLog(CONFIG, machine)
    log.heard(Started(), machine.step(Started()))
    log.close()
    assert not list(tmp_path.iterdir())
