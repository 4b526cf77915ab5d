"""The event log of a rank's machine: what the control loop hears now and then. Steps are none of it."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from elastic_ep.config import RankConfig
from elastic_ep.event_log.log import EventLog, at_once
from elastic_ep.event_log.writer import Later
from elastic_ep.machines.rank.events import Effect, Event, StepsFailed
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.machines.registry import arguments
from elastic_ep.wire.messages import Beat, Member, Numbered, RankReport
from elastic_ep.wire.privacy import masked

log = structlog.get_logger()


class MachineLog:
    """Control loop only. Begins at once; a disk that refuses is a warning, and no reason not to serve."""

    def __init__(self, config: RankConfig, machine: RankMachine, later: Later = at_once) -> None:
        """`later`: the control loop's `call_later`."""
        self._told_of_beats = False
        """The first one changes the state: the subscription is proven."""
        machines = {"rank": machine}
        run = {"version": importlib.metadata.version("elastic-ep"), "machines": arguments(machines)}
        try:
            self._log = _opened(config)
            self._log.begin(run, machines, later)
        except OSError as error:
            log.warning("this rank's events are not logged", why=error.strerror or str(error))
            self._log = EventLog(None)

    def heard(self, event: Event, effects: Sequence[Effect]) -> None:
        """After each step of the machine. A beat from which nothing follows changes no state and is left out."""
        beat = isinstance(event, Numbered) and isinstance(event.body, Beat)
        if beat and not effects and self._told_of_beats:
            return
        self._told_of_beats = self._told_of_beats or beat
        private = self._log.private
        self._log.record("rank", _shown(event, private), [_shown(effect, private) for effect in effects])

    def close(self) -> None:
        self._log.close()


def _opened(config: RankConfig) -> EventLog:
    told = config.event_log
    if told is None:
        return EventLog(None)
    folder = Path(told.folder)
    _forget(folder, config.rank)
    name = str(Member(config.rank, config.incarnation))
    return EventLog(folder / name, told.mode, max_bytes=told.max_bytes)


def _forget(folder: Path, rank: int) -> None:
    """All incarnations' logs but the last one's, which tells how that ended: two of each rank are kept in all."""
    earlier = sorted(folder.glob(f"{rank}.[0-9]*"), key=lambda one: int(one.suffix[1:]))
    for old in earlier[:-1]:
        shutil.rmtree(old, ignore_errors=True)


def _shown(said: Event | Effect, private: bool) -> Event | Effect:
    """What fails may quote a client's text: the line on stderr has it whole."""
    if private and isinstance(said, StepsFailed | RankReport):
        return replace(said, reason=masked(said.reason))
    return said
