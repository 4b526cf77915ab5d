"""`python -m elastic_ep.charts`: renders the machines' tables into `statecharts/` as Mermaid and SVG.

The group's state follows from its data, so it is drawn as what decides it: a list of questions, the first yes counts.

The states stand in a column in the order of their life. A transition from one or two states is an arrow, ahead on
the right and back on the left; one from many states is a short arrow that says where it may come from. Arrows with
one trigger and one target join.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from pathlib import Path

from elastic_ep.machines.membership.group import GROUP, Case
from elastic_ep.machines.rank.lifecycle import RANK
from elastic_ep.machines.requests.lifecycle import REQUEST
from elastic_ep.machines.tables import Table

FOLDER = Path("statecharts")
TABLES = (RANK, REQUEST)
_MANY = 3
_BOX_W, _BOX_H, _GAP, _TOP = 150, 40, 48, 92
_LANE, _LANE_STEP, _STUB, _CHAR, _MARGIN = 30, 110, 30, 6.9, 24
_STYLE = (
    "text{font:13px sans-serif;fill:#1f2933}.t{font-weight:600;font-size:16px}.l{font-size:12px;fill:#243b53}"
    ".m{font-size:12px;fill:#7b8794;font-style:italic}rect{fill:#e3f2fd;stroke:#1565c0;stroke-width:1.4}"
    "rect.f{fill:#eceff1;stroke:#546e7a}path{fill:none;stroke:#486581;stroke-width:1.3}circle{fill:#1f2933}"
)


@dataclass(frozen=True)
class Arrow:
    """From each of `sources` to `dest`; numbers are places in the column."""

    sources: tuple[int, ...]
    dest: int
    label: str

    @property
    def ahead(self) -> bool:
        return self.sources[0] < self.dest

    @property
    def span(self) -> tuple[int, int]:
        return min(*self.sources, self.dest), max(*self.sources, self.dest)


@dataclass
class Drawing:
    """SVG elements and how far they reach. The column of boxes begins at x = 0."""

    parts: list[str]
    left: float = 0.0
    right: float = float(_BOX_W)

    def text(self, kind: str, x: float, y: float, text: str, anchor: str = "start") -> None:
        width = len(text) * _CHAR
        begin = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
        self.left, self.right = min(self.left, begin), max(self.right, begin + width)
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def path(self, d: str, head: bool = True) -> None:
        self.parts.append(f'<path d="{d}"{_HEAD if head else ""}/>')


_HEAD = ' marker-end="url(#a)"'


def arrows(table: Table) -> list[Arrow]:
    """The rows with few sources. Parallel ones share an arrow; those of one trigger, target and side join."""
    place = {state: index for index, state in enumerate(table.states)}
    labels: dict[tuple[int, int], list[str]] = {}
    for row in table.rows:
        if row.dest is not None and len(row.source) < _MANY:
            for source in row.source:
                labels.setdefault((place[source], place[row.dest]), []).append(row.trigger)
    joined: dict[tuple[int, str, bool], list[int]] = {}
    for (begin, end), triggers in labels.items():
        joined.setdefault((end, " / ".join(triggers), begin < end), []).append(begin)
    found = [Arrow(tuple(sorted(begins)), end, label) for (end, label, _), begins in joined.items()]
    return sorted(found, key=lambda arrow: (arrow.span[1] - arrow.span[0], arrow.span, arrow.label))


def arrivals(table: Table, state: Enum) -> list[tuple[str, str]]:
    """(trigger, where from) of the rows that lead to `state` from many states."""
    found = []
    for row in table.rows:
        if row.dest is state and len(row.source) >= _MANY:
            others = [s.value for s in table.states if s not in row.source and s is not state]
            few = len(others) < len(row.source)
            names = f"any but {', '.join(others)}" if few else ", ".join(s.value for s in row.source)
            found.append((row.trigger, f"from {names if others else 'any other'}"))
    return found


def ignored(table: Table, state: Enum) -> list[str]:
    return [row.trigger for row in table.rows if row.dest is None and state in row.source]


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
    drawing = Drawing([])
    drawing.text("t", 0, 30, f"{table.name} states")
    taken: list[tuple[bool, int, int, int]] = []
    for arrow in arrows(table):
        _draw_arrow(drawing, arrow, taken)
    for index, state in enumerate(table.states):
        _draw_state(drawing, table, state, _top(index))
    return _framed(drawing, len(table.states))


def decision_mermaid(cases: Sequence[Case]) -> str:
    lines = ["flowchart TD"]
    for number, case in enumerate(cases[:-1]):
        lines.append(f"    q{number}{{{case.when}?}} -- yes --> {case.state.value}")
        last = number + 2 == len(cases)
        lines.append(f"    q{number} -- no --> {cases[-1].state.value if last else f'q{number + 1}'}")
    return "\n".join(lines) + "\n"


def decision_svg(name: str, cases: Sequence[Case]) -> str:
    """A column of questions, each with its answer's state to the right; the last is what is left."""
    drawing = Drawing([])
    drawing.text("t", 0, 30, f"{name} states: the first yes counts")
    x = max(len(case.when) for case in cases) * _CHAR + _STUB
    for number, case in enumerate(cases):
        y = _top(number)
        drawing.text("s", 0, y + 25, case.when + "?" * (case is not cases[-1]))
        drawing.path(f"M{x:g} {y + 20}H{x + 2 * _STUB - 1:g}")
        drawing.parts.append(
            f'<rect x="{x + 2 * _STUB:g}" y="{y}" width="{_BOX_W}" height="{_BOX_H}" rx="10"/>'
        )
        drawing.text("s", x + 2 * _STUB + _BOX_W / 2, y + 25, case.state.value, "middle")
        drawing.right = max(drawing.right, x + 2 * _STUB + _BOX_W)
        if number:
            drawing.path(f"M{_LANE} {y - _BOX_H + 4}V{y + 8}")
            drawing.text("m", _LANE + 9, y - 16, "no")
    return _framed(drawing, len(cases))


def _framed(drawing: Drawing, rows: int) -> str:
    left, right = drawing.left - _MARGIN, drawing.right + _MARGIN
    width, height = round(right - left), _top(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{round(left)} 0 {width} {height}" width="{width}" '
        f'height="{height}"><style>{_STYLE}</style><defs><marker id="a" viewBox="0 0 10 10" refX="9" refY="5" '
        'markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0 10 5 0 10z" style="fill:#486581"/></marker>'
        f'</defs><rect x="{round(left)}" width="{width}" height="{height}" style="fill:white;stroke:none"/>\n'
        + "\n".join(drawing.parts)
        + "\n</svg>\n"
    )


def _top(index: int) -> int:
    return _TOP + index * (_BOX_H + _GAP)


def _draw_state(drawing: Drawing, table: Table, state: Enum, y: int) -> None:
    kind = ' class="f"' if state in table.final else ""
    drawing.parts.append(f'<rect{kind} x="0" y="{y}" width="{_BOX_W}" height="{_BOX_H}" rx="10"/>')
    drawing.text("s", _BOX_W / 2, y + 25, state.value, "middle")
    if state is table.initial:
        drawing.parts.append(f'<circle cx="{_BOX_W / 2:g}" cy="{y - 34}" r="5"/>')
        drawing.path(f"M{_BOX_W / 2:g} {y - 34}V{y - 1}")
    found = arrivals(table, state)
    for number, (trigger, source) in enumerate(found):
        line = y + _BOX_H * (number + 1) / (len(found) + 1)
        end = _BOX_W + _STUB + (len(trigger) + 1) * _CHAR
        drawing.path(f"M{end:g} {line:g}H{_BOX_W + 1}")
        drawing.text("l", _BOX_W + _STUB / 2 + 6, line - 5, trigger)
        drawing.text("m", end + 8, line + 4, source)
    if late := ignored(table, state):
        drawing.text("m", _BOX_W / 2, y + _BOX_H + 16, f"ignores a late {', '.join(late)}", "middle")


def _draw_arrow(drawing: Drawing, arrow: Arrow, taken: list[tuple[bool, int, int, int]]) -> None:
    if arrow.sources == (arrow.dest - 1,):
        below, above = _top(arrow.sources[0]) + _BOX_H, _top(arrow.dest)
        drawing.path(f"M{_BOX_W / 2:g} {below}V{above - 1}")
        drawing.text("l", _BOX_W / 2 + 9, (below + above) / 2 + 3, arrow.label)
        return
    low, high = arrow.span
    lane = _free_lane(taken, arrow.ahead, low, high)
    edge, sign = (_BOX_W, 1) if arrow.ahead else (0, -1)
    # An outer lane leaves room for the label of the one inside it.
    x = edge + sign * (_LANE + lane * _LANE_STEP)
    end = _top(arrow.dest) + _BOX_H * 0.3
    for source in arrow.sources:
        start = _top(source) + _BOX_H * 0.7
        turn = 12 if end > start else -12
        drawing.path(
            f"M{edge} {start:g}H{x - sign * 12}Q{x} {start:g} {x} {start + turn:g}V{end - turn:g}"
            f"Q{x} {end:g} {x - sign * 12} {end:g}H{edge + sign}"
        )
    middle = (_top(low) + _top(high) + _BOX_H) / 2
    drawing.left, drawing.right = min(drawing.left, x), max(drawing.right, x)
    drawing.text("l", x + sign * 7, middle + 4, arrow.label, "start" if arrow.ahead else "end")


def _free_lane(taken: list[tuple[bool, int, int, int]], ahead: bool, low: int, high: int) -> int:
    lane = 0
    while any((ahead, lane) == used[:2] and low < used[3] and used[2] < high for used in taken):
        lane += 1
    taken.append((ahead, lane, low, high))
    return lane


def rendered() -> dict[str, str]:
    """File name -> content."""
    files = {"group.mmd": decision_mermaid(GROUP), "group.svg": decision_svg("group", GROUP)}
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
