"""`python -m elastic_ep.charts`: renders the machines' tables into `statecharts/` as Mermaid and SVG.

The states stand in a column in the order of their life. A transition from one or two states is an arrow, ahead on
the right and back on the left; one from many states is written beside the state that it leads to.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from enum import Enum
from html import escape
from pathlib import Path

from elastic_ep.machines.membership import GROUP
from elastic_ep.machines.rank_lifecycle import RANK
from elastic_ep.machines.request import REQUEST
from elastic_ep.machines.tables import Table

FOLDER = Path("statecharts")
TABLES = (RANK, GROUP, REQUEST)
_MANY = 3
_BOX_W, _BOX_H, _GAP = 150, 40, 52
_LEFT, _TOP, _CHAR = 330, 56, 7.2
_STYLE = (
    "text{font:13px sans-serif;fill:#1f2933}.t{font-weight:600;font-size:16px}.l{font-size:12px;fill:#334e68}"
    ".m{font-size:12px;fill:#7b8794;font-style:italic}rect{fill:#e3f2fd;stroke:#1565c0;stroke-width:1.4}"
    "rect.f{fill:#eceff1;stroke:#546e7a}path{fill:none;stroke:#486581;stroke-width:1.3}circle{fill:#1f2933}"
)


@dataclass(frozen=True)
class Edge:
    source: Enum
    dest: Enum
    label: str


def edges(table: Table) -> list[Edge]:
    """Arrows for rows with few sources; parallel ones share an arrow."""
    labels: dict[tuple[Enum, Enum], list[str]] = {}
    for row in table.rows:
        if row.dest is not None and len(row.source) < _MANY:
            for source in row.source:
                labels.setdefault((source, row.dest), []).append(row.trigger)
    return [Edge(source, dest, " / ".join(found)) for (source, dest), found in labels.items()]


def notes(table: Table, state: Enum) -> list[str]:
    """What leads to `state` from many states, and what it ignores."""
    found = []
    for row in table.rows:
        if row.dest is state and len(row.source) >= _MANY:
            others = [other for other in table.states if other not in row.source and other is not state]
            sources = (
                f"any but {', '.join(o.value for o in others)}" if len(others) < len(row.source) else None
            )
            sources = sources or ", ".join(source.value for source in row.source)
            found.append(f"{row.trigger} (from {sources if others else 'any'})")
        if row.dest is None and state in row.source:
            found.append(f"ignores {row.trigger}")
    return found


def mermaid(table: Table) -> str:
    lines = ["stateDiagram-v2", f"    [*] --> {table.initial.value}"]
    for row in table.rows:
        for source in row.source:
            dest = row.dest or source
            suffix = "" if row.dest else " (ignored)"
            lines.append(f"    {source.value} --> {dest.value}: {row.trigger}{suffix}")
    lines += [f"    {state.value} --> [*]" for state in table.states if state in table.final]
    return "\n".join(lines) + "\n"


def svg(table: Table) -> str:
    order = {state: index for index, state in enumerate(table.states)}
    parts = [f'<text class="t" x="{_LEFT}" y="28">{escape(table.name)}</text>']
    reach = 0.0
    lanes: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
    for edge in sorted(edges(table), key=lambda e: (abs(order[e.dest] - order[e.source]), order[e.source])):
        drawn, width = _arrow(edge, order, lanes)
        parts += drawn
        reach = max(reach, width)
    for state, index in order.items():
        parts += _box(table, state, _TOP + index * (_BOX_H + _GAP))
        longest = max((len(note) for note in notes(table, state)), default=0)
        reach = max(reach, _LEFT + _BOX_W + 60 + longest * 6.4)
    height = _TOP + len(order) * (_BOX_H + _GAP)
    width = int(reach) + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
        f"<style>{_STYLE}</style><defs><marker id='a' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' "
        "markerHeight='7' orient='auto-start-reverse'><path d='M0 0 10 5 0 10z' style='fill:#486581'/></marker></defs>"
        f'<rect width="{width}" height="{height}" style="fill:white;stroke:none"/>'
        + "".join(parts)
        + "</svg>\n"
    )


def _box(table: Table, state: Enum, y: int) -> list[str]:
    kind = ' class="f"' if state in table.final else ""
    middle = _LEFT + _BOX_W / 2
    parts = [
        f'<rect{kind} x="{_LEFT}" y="{y}" width="{_BOX_W}" height="{_BOX_H}" rx="10"/>',
        f'<text x="{middle:g}" y="{y + 25}" text-anchor="middle">{escape(state.value)}</text>',
    ]
    if state is table.initial:
        parts.append(f'<circle cx="{_LEFT + _BOX_W / 2:g}" cy="{y - 14}" r="4"/>')
    for number, note in enumerate(notes(table, state)):
        baseline = y + _BOX_H + 16 + 15 * number
        parts.append(f'<text class="m" x="{_LEFT + _BOX_W / 2 + 14:g}" y="{baseline}">{escape(note)}</text>')
    return parts


def _arrow(
    edge: Edge, order: dict[Enum, int], lanes: dict[bool, list[tuple[int, int, int]]]
) -> tuple[list[str], float]:
    """The arrow's elements, and how far right they reach."""
    a, b = order[edge.source], order[edge.dest]
    top_a, top_b = (_TOP + index * (_BOX_H + _GAP) for index in (a, b))
    label = escape(edge.label)
    if b == a + 1:
        x, y = _LEFT + 40, (top_a + _BOX_H + top_b) / 2
        return [
            f'<path d="M{x} {top_a + _BOX_H}V{top_b - 2}" marker-end="url(#a)"/>',
            f'<text class="l" x="{x + 8}" y="{y + 4:g}">{label}</text>',
        ], _LEFT + _BOX_W
    ahead = b > a
    lane = _free_lane(lanes[ahead], min(a, b), max(a, b))
    out = 28 + 34 * lane
    edge_x, sign = (_LEFT + _BOX_W, 1) if ahead else (_LEFT, -1)
    start, end = top_a + _BOX_H * 0.65, top_b + _BOX_H * 0.35
    x = edge_x + sign * out
    y = (start + end) / 2 + 16 * (lane % 3 - 1)
    anchor = "start" if ahead else "end"
    return [
        f'<path d="M{edge_x} {start:g}C{x} {start:g} {x} {start:g} {x} {(start * 3 + end) / 4:g}'
        f'V{(start + end * 3) / 4:g}C{x} {end:g} {x} {end:g} {edge_x + sign * 2} {end:g}" marker-end="url(#a)"/>',
        f'<text class="l" x="{x + sign * 6}" y="{y:g}" text-anchor="{anchor}">{label}</text>',
    ], x + 10 + len(edge.label) * _CHAR


def _free_lane(taken: list[tuple[int, int, int]], low: int, high: int) -> int:
    lane = 0
    while any(other == lane and low < end and start < high for other, start, end in taken):
        lane += 1
    taken.append((lane, low, high))
    return lane


def rendered() -> dict[str, str]:
    """File name -> content, for every table."""
    files = {}
    for table in TABLES:
        files[f"{table.name}.mmd"] = mermaid(table)
        files[f"{table.name}.svg"] = svg(table)
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elastic_ep.charts", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a file is not up to date"
    )
    options = parser.parse_args(arguments)
    stale = []
    for name, content in rendered().items():
        file = options.folder / name
        if options.check:
            if not file.exists() or file.read_text() != content:
                stale.append(name)
        else:
            options.folder.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
    if stale:
        print(f"not up to date: {', '.join(stale)}; run python -m elastic_ep.charts", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
