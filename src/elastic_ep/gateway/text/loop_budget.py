"""A bound on how often all loops of a template go round in one rendering: what has no end must end somewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes

MOST_ROUNDS = 2_000_000
"""A conversation of 60,000 messages takes some hundred thousand; this many take the better part of a second."""
FILTER = "within_the_loop_budget"
VARIABLE = "_loop_budget"
"""Where the budget of a rendering is among the template's variables."""


class LoopBudget:
    """What is left for one rendering."""

    __slots__ = ("left",)

    def __init__(self, rounds: int = MOST_ROUNDS) -> None:
        self.left = rounds


class _Counted:
    """`items`, counted as they are taken."""

    __slots__ = ("_budget", "_items")

    def __init__(self, items: Iterable[Any], budget: LoopBudget) -> None:
        self._items = items
        self._budget = budget

    def __iter__(self) -> Iterator[Any]:
        budget = self._budget
        for item in self._items:
            budget.left -= 1
            if budget.left < 0:
                raise jinja2.TemplateRuntimeError("its loops do not end")
            yield item

    def __len__(self) -> int:
        # A TypeError says that there is none; Jinja then counts for itself.
        return len(self._items)  # type: ignore[arg-type]  # what has no length raises


@jinja2.pass_context
def count(context: jinja2.runtime.Context, items: Any) -> Any:
    """The filter that every loop's items go through."""
    budget = context.parent.get(VARIABLE)
    return _Counted(items, budget) if isinstance(budget, LoopBudget) and hasattr(items, "__iter__") else items


def bound_loops(tree: nodes.Template) -> nodes.Template:
    """`tree` with every loop's items counted."""
    for loop in tree.find_all(nodes.For):
        loop.iter = nodes.Filter(loop.iter, FILTER, [], [], None, None, lineno=loop.lineno)
    return tree
