"""The page table: all states of a small one, and chains of pages that are shared, let go of and evicted."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from elastic_ep.kv.names import PageName, extend
from elastic_ep.kv.page_table import NULL_PAGE, PageTable


def names(count: int) -> list[PageName]:
    chain: list[PageName] = []
    extend(chain, PageName(16), range(count), 1)
    return chain


class Holder:
    """One sequence: the pages that it holds, in order, of which the first `full` are full."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.full = 0


class World:
    """A table of `num_pages` and two sequences, each of them always of the same tokens: a prefix in common, then not."""

    def __init__(self, num_pages: int) -> None:
        self.table = PageTable(num_pages, 1)
        self.holders = (Holder(), Holder())
        shared, own = names(2)[:1], names(4)
        self.chains = (own[:3], [*shared, *reversed(own[1:3])])

    def moves(self) -> Iterator[tuple[str, World]]:
        for number, holder in enumerate(self.holders):
            if not holder.pages:
                yield f"{number} begins", self._do(number, "begin")
                continue
            yield f"{number} ends", self._do(number, "end")
            if holder.full < len(holder.pages):
                yield f"{number} commits", self._do(number, "commit")
            elif len(holder.pages) < len(self.chains[number]):
                yield f"{number} grows", self._do(number, "grow")

    def _do(self, number: int, what: str) -> World:
        world = deepcopy(self)
        table, holder, chain = world.table, world.holders[number], world.chains[number]
        match what:
            case "begin":
                here = table.find(chain)
                expected = [page for page in here if table._names[page] in chain]
                assert here == expected
                table.hold(here)
                holder.pages, holder.full = here, len(here)
                if not here:
                    holder.pages = table.take(1) or []
            case "grow":
                holder.pages += table.take(1) or []
            case "commit":
                table.name(holder.pages[holder.full], chain[holder.full])
                holder.full += 1
            case "end":
                table.release(holder.pages)
                holder.pages, holder.full = [], 0
        return world

    def state(self) -> object:
        return self.table.state(), tuple((tuple(one.pages), one.full) for one in self.holders)

    def check(self) -> None:
        table = self.table
        table.check()
        held = [page for holder in self.holders for page in holder.pages]
        assert NULL_PAGE not in held
        assert {page: held.count(page) for page in held} == table._holders
        for chain, holder in zip(self.chains, self.holders, strict=True):
            for page, name in zip(holder.pages[: holder.full], chain, strict=False):
                assert table._names.get(page, name) == name, "a sequence holds a page of other tokens"


def test_every_state_of_a_small_table() -> None:
    for num_pages in (1, 2, 3, 4):
        start = World(num_pages)
        seen = {start.state()}
        frontier = [start]
        shared = evictions = 0
        while frontier:
            for _, world in frontier.pop().moves():
                world.check()
                if world.state() not in seen:
                    seen.add(world.state())
                    frontier.append(world)
                    shared += any(count == 2 for count in world.table._holders.values())
                    evictions += world.table.evictions
        assert shared
        assert evictions or num_pages == 1


def test_the_end_of_a_chain_is_evicted_before_its_beginning() -> None:
    table, chain = PageTable(4, 1), names(4)
    pages = table.take(4) or []
    for page, name in zip(pages, chain, strict=True):
        assert table.name(page, name)
    table.release(pages)
    for left in (3, 2, 1, 0):
        table.take(1)
        assert table.find(chain) == pages[:left]
    assert table.evictions == 4
    assert table.take(1) is None


def test_who_was_used_last_is_evicted_last() -> None:
    table = PageTable(3, 1)
    chains = [names(1), [PageName(bytes([1] * 16))], [PageName(bytes([2] * 16))]]
    pages = table.take(3) or []
    for page, (name,) in zip(pages, chains, strict=True):
        table.name(page, name)
        table.release([page])
    table.hold(table.find(chains[0]))
    table.release(table.find(chains[0]))
    table.take(1)
    assert [table.find(chain) for chain in chains] == [[pages[0]], [], [pages[2]]]


def test_what_is_held_is_never_given_to_another() -> None:
    table, chain = PageTable(2, 1), names(1)
    page = (table.take(1) or [])[0]
    table.name(page, chain[0])
    table.hold([page])
    table.release([page])
    assert table.take(2) is None
    assert table.take(1) != [page]
    table.release([page])
    assert table.take(1) == [page]
