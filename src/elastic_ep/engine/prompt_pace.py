"""How many tokens of prompts a step may compute, so that those who decode keep their pace. Pure: reads no clock.

All ranks step together, so a chunk of a prompt on one of them delays everybody's next token. How long a step of so many
tokens takes is learnt from the steps themselves: it depends on the device, on the other ranks, and on what is cached.
"""

from __future__ import annotations

from collections import deque
from statistics import median

_PLAIN = 64
"""Steps of decodes alone that are remembered."""
_LOOK = 8
_SEEN = 4
"""Steps of one size of chunk that are remembered, the slowest of which counts: each of them somebody has waited for."""
_FIRST_GUESS = 1.5
"""How much more than a step of decodes twice as many tokens are taken to cost, if nothing but these is known."""
_FORGET = 512
"""Steps after which what was seen of a size is no longer believed, and it is tried again."""


class PromptPace:
    """For chunks of `floor` tokens a step, twice as many and so on, up to `capacity`.

    A step with chunks of prompts may take `stretch` times as long as one of decodes alone; or as one with the smallest
    chunks, if these alone make it slower than that: few decodes read few of the experts, any chunk reads them all.
    """

    def __init__(self, floor: int, capacity: int, stretch: float) -> None:
        self._stretch = stretch
        floor = min(floor, capacity)
        self.sizes = [floor << power for power in range(capacity.bit_length()) if floor << power < capacity]
        self.sizes.append(capacity)
        self._plain: deque[int] = deque(maxlen=_PLAIN)
        self._seen: dict[int, deque[tuple[int, int]]] = {size: deque(maxlen=_SEEN) for size in self.sizes}
        """(number of the step, duration) by size."""
        self._steps = 0

    def observe(self, tokens: int, decodes: int, duration: int) -> None:
        """A step in which the ranks together ran `decodes`, and none more than `tokens` of prompts. Any unit of time."""
        self._steps += bool(tokens or decodes)
        if tokens:
            size = next((size for size in self.sizes if tokens <= size), self.sizes[-1])
            self._seen[size].append((self._steps, duration))
        elif decodes:
            self._plain.append(duration)

    def budget(self, decodes: int) -> int:
        """Tokens of prompts for a step with `decodes` in the group: all that fit if nobody waits for it.

        A size that was not tried yet is tried if the sizes below let one expect that it keeps the pace, and none beyond.
        0 now and then as long as no step of decodes alone was seen: then this one may be.
        """
        if not decodes:
            return self.sizes[-1]
        plain = self._pace()
        if plain is None:
            return self.sizes[0] if self._steps % _LOOK else 0
        seen = [self._slowest(size) for size in self.sizes]
        limit = self._stretch * max(plain, self._fastest(self.sizes[0]) or plain)
        place = 0
        while place + 1 < len(self.sizes):
            beyond = seen[place + 1]
            expected = self._expected(place, seen, plain) if beyond is None else beyond
            if expected is None or expected > limit:
                break
            place += 1
        return self.sizes[place]

    def _expected(self, place: int, seen: list[float | None], plain: float) -> float | None:
        """Of the size beyond `place`: on a line with the two below it, if both were seen. None: wait and see."""
        here, before = seen[place], seen[place - 1] if place else None
        if here is None:
            return None
        if before is None:
            return plain + _FIRST_GUESS * (here - plain)
        return here + 2 * max(0.0, here - before)

    def _pace(self) -> float | None:
        """How long a step of decodes alone takes. Others may always have prompts: then the fastest with some will do."""
        if self._plain:
            return float(median(self._plain))
        if self._steps < _PLAIN:
            return None
        return min([duration for seen in self._seen.values() for _, duration in seen], default=None)

    def _slowest(self, size: int) -> float | None:
        """None: not known, or not any more."""
        return max(self._recent(size), default=None)

    def _fastest(self, size: int) -> float | None:
        return min(self._recent(size), default=None)

    def _recent(self, size: int) -> list[int]:
        return [duration for step, duration in self._seen[size] if step > self._steps - _FORGET]
