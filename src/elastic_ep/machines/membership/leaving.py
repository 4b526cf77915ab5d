"""Which ranks that were asked to leave may do so. Pure: what is known of them goes in, who goes and who stays comes out.

A rank leaves when its requests have ended, or have had the time that they were given, and others hold every expert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from elastic_ep.placement import Coverage


@dataclass(frozen=True, slots=True)
class Leaving:
    """A member that drains. `due_ms`: then its requests have had their time; `emptied`: none is left."""

    due_ms: int
    emptied: bool = False


@dataclass(slots=True)
class Verdict:
    """`go` leave now, in one view; `stay` serve on, as the group could not do without them, and why."""

    go: list[int] = field(default_factory=list)
    stay: dict[int, str] = field(default_factory=dict)


def judge(
    leaving: Mapping[int, Leaving],
    seated: Collection[int],
    coverage: Coverage,
    now_ms: int,
    copies_ms: int,
) -> Verdict:
    """`seated`: the ranks of the view, those that leave among them. Copies of their experts have `copies_ms` to be made
    on others, after which they are needed where they are."""
    verdict = Verdict()
    if all(rank in leaving for rank in seated):
        verdict.stay = dict.fromkeys(leaving, "no other rank serves")
        return verdict
    for rank, each in leaving.items():
        others = [other for other in seated if other != rank and other not in verdict.go]
        ready = each.emptied or now_ms >= each.due_ms
        if ready and coverage.by(others):
            verdict.go.append(rank)
        elif now_ms >= each.due_ms + copies_ms:
            verdict.stay[rank] = "no other rank has a copy of each of its experts"
    return verdict
