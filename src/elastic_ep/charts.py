"""`python -m elastic_ep.charts`: writes the machines' tables into `statecharts/`, for Mermaid to draw.

The group's state follows from its data, so it is drawn as what decides it: a list of questions, the first yes counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from elastic_ep.machines.membership.group import GROUP, Case
from elastic_ep.machines.rank.lifecycle import RANK
from elastic_ep.machines.requests.lifecycle import REQUEST
from elastic_ep.machines.tables import Table

FOLDER = Path("statecharts")


def mermaid(table: Table) -> str:
    lines = ["stateDiagram-v2", f"    [*] --> {table.initial.value}"]
    for row in table.rows:
        for source in row.source:
            dest = row.dest or source
            suffix = "" if row.dest else " (ignored)"
            lines.append(f"    {source.value} --> {dest.value}: {row.trigger}{suffix}")
    lines += [f"    {state.value} --> [*]" for state in table.states if state in table.final]
    return "\n".join(lines) + "\n"


def decisions(cases: Sequence[Case]) -> str:
    lines = ["flowchart TD"]
    for number, case in enumerate(cases[:-1]):
        lines.append(f"    q{number}{{{case.when}?}} -- yes --> {case.state.value}")
        last = number + 2 == len(cases)
        lines.append(f"    q{number} -- no --> {cases[-1].state.value if last else f'q{number + 1}'}")
    return "\n".join(lines) + "\n"


def rendered() -> dict[str, str]:
    """File name -> content."""
    return {
        "group.mmd": decisions(GROUP),
        **{f"{table.name}.mmd": mermaid(table) for table in (RANK, REQUEST)},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m elastic_ep.charts", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, content in rendered().items():
        (options.folder / name).write_text(content)


if __name__ == "__main__":
    main()
