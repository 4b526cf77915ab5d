"""`python -m elastic_ep.placement_picture RUN`: who held which expert around the first loss, from a run's log, as text.

Experts are rows and ranks are columns, one grid for each moment: before the loss, after it, when copies had been made
again, when the rank was back. Exit status: 0 drawn, 1 there was no loss to draw, 2 the log cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

from elastic_ep.event_log.reader import Differs, Log, Unreadable
from elastic_ep.machines.experts.events import MembersChanged, Replace
from elastic_ep.placement import Placement
from elastic_ep.wire.codec import from_plain
from elastic_ep.wire.messages import Member, PlacementChanged

_LEGEND = "# rank (column) holds expert (row)   + copy made since the loss   x copy on a lost rank"

_HOSTS = ascii_lowercase


class NothingLost(Exception):
    """No rank was lost in this run."""


@dataclass(frozen=True)
class Moment:
    """`at_ns` since the loss."""

    title: str
    at_ns: int
    placement: Placement
    ranks: frozenset[int]

    def tolerates(self, layer: int) -> int:
        return max(0, min(self.placement.copies(layer, self.ranks)) - 1)

    def tolerates_hosts(self, layer: int) -> int:
        return max(0, min(self.placement.host_copies(layer, self.ranks)) - 1)


@dataclass
class _Scene:
    """What the log has told so far."""

    placement: Placement
    members: frozenset[Member] = frozenset()
    at_ns: int = 0
    changed_ns: int | None = None
    """When the placement last changed since the last moment."""

    def moment(self, title: str, at_ns: int) -> Moment:
        self.changed_ns = None
        return Moment(title, at_ns, self.placement, frozenset(member.rank for member in self.members))

    def repaired(self, lost_ns: int) -> Iterator[Moment]:
        if self.changed_ns is not None:
            yield self.moment("copies made again", self.changed_ns - lost_ns)


def moments(path: Path) -> list[Moment]:
    """Around the first loss in the log at `path` (a file, or the folder of a run).

    Raises `Unreadable`, `Differs`, `NothingLost`.
    """
    found: list[Moment] = []
    lost_ns = 0
    scene: _Scene | None = None
    for scene, event in _heard(path):
        if isinstance(event, PlacementChanged):
            scene.placement = scene.placement.changed(event.version, event.changes)
            scene.changed_ns = scene.at_ns
            continue
        members = frozenset(event.members)
        gone = {m.rank for m in scene.members} - {m.rank for m in members}
        back = {m.rank for m in members} - {m.rank for m in scene.members}
        if not found and gone:
            lost_ns = scene.at_ns
            found.append(scene.moment("before", 0))
        elif found:
            found += scene.repaired(lost_ns)
        scene.members = members
        if found and (gone or back):
            names = ", ".join(f"rank {rank}" for rank in sorted(gone or back))
            found.append(scene.moment(f"{names} {'lost' if gone else 'back'}", scene.at_ns - lost_ns))
    if scene is None or not found:
        raise NothingLost(f"{path}: no rank was lost")
    return [*found, *scene.repaired(lost_ns)]


def _heard(path: Path) -> Iterator[tuple[_Scene, MembersChanged | PlacementChanged]]:
    """Changes of members and of the placement, in their order, until the group stops."""
    log = Log(path)
    repair = log.machines().get("repair")
    if repair is None:
        raise Unreadable(f"{log.begins.where} does not describe the placement")
    scene = _Scene(repair.placement, repair.members)
    for line in (line.fields for line in log.lines()):
        if line.get("machine") == "membership" and ["GroupMoved", "Stopping"] in line["effects"]:
            return
        if line.get("machine") != "repair":
            continue
        scene.at_ns = line["t_ns"]
        if line["heard"][0] == MembersChanged.__name__:
            event: MembersChanged = from_plain(line["heard"], MembersChanged)
            yield scene, event
        for effect in line["effects"]:
            if effect[0] == Replace.__name__:
                made: Replace = from_plain(effect, Replace)
                yield scene, made.changed


def draw(found: list[Moment], layer: int) -> str:
    """As text, the moments side by side. Raises ValueError if there is no such layer."""
    first = found[0].placement
    if not 0 <= layer < len(first.slots):
        raise ValueError(f"--layer {layer}: there are {len(first.slots)}, from 0")
    columns = [_column(moment, first, layer) for moment in found]
    margin = ["", "", *(["host"] if first.hosts else []), "", *map(str, range(first.num_experts))]
    widths = [max(map(len, column)) for column in columns]
    rows = [
        f"{number:>4}  " + "   ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        for number, *cells in zip(margin, *columns, strict=True)
    ]
    return "\n".join([*map(str.rstrip, rows), "", _LEGEND]) + "\n"


def _column(moment: Moment, before: Placement, layer: int) -> list[str]:
    """What is known of the moment, the ranks' last digits, and a row for each expert."""
    placement = moment.placement
    ranks = range(placement.num_ranks)
    when = "" if moment.title == "before" else f"{moment.at_ns / 1e6:+.0f} ms, "
    hosts = f", hosts {moment.tolerates_hosts(layer)}" if placement.hosts else ""
    named = ["".join(_HOSTS[placement.host_of(rank) % len(_HOSTS)] for rank in ranks)]
    return [
        moment.title,
        f"{when}tolerates {moment.tolerates(layer)}{hosts}",
        *(named if placement.hosts else []),
        "".join(str(rank % 10) for rank in ranks),
        *(
            "".join(_mark(expert, rank, moment, before, layer) for rank in ranks)
            for expert in range(placement.num_experts)
        ),
    ]


def _mark(expert: int, rank: int, moment: Moment, before: Placement, layer: int) -> str:
    held = expert in moment.placement.on_rank(layer, rank)
    if rank not in moment.ranks:
        return "x" if held else " "
    if held:
        return "#" if expert in before.on_rank(layer, rank) else "+"
    return "."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="elastic_ep.placement_picture",
        description="Draw who held which expert around the first loss of a run.",
    )
    parser.add_argument("run", type=Path, help="a run's folder, or one file of its event log")
    parser.add_argument("--layer", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        print(draw(moments(options.run), options.layer), end="")
    except NothingLost as error:
        print(error, file=sys.stderr)
        return 1
    except (Unreadable, Differs, ValueError, OSError) as error:
        print(f"elastic_ep.placement_picture: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
