"""How long a host may go on that has joined: its own side of it. Pure; times are whatever the caller counts in."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Lease:
    """It ends `length` after the last sign of life was *sent* that was answered, however late the answer came."""

    length: int
    until: int
    number: int = 0
    sent: dict[int, int] = field(default_factory=dict)
    """When each sign of life was sent that is not answered."""

    @classmethod
    def begun(cls, length: int, now: int) -> Lease:
        """Nothing runs before the first answer."""
        return cls(length, now + length)

    def speak(self, now: int) -> int:
        """The number of the sign of life that is sent now."""
        self.number += 1
        self.sent[self.number] = now
        return self.number

    def answered(self, number: int) -> bool:
        """Whether that was one of the host's own. An answer to a later one stands for all before."""
        sent = self.sent.get(number)
        if sent is None:
            return False
        self.sent = {later: at for later, at in self.sent.items() if later > number}
        self.until = max(self.until, sent + self.length)
        return True

    def ended(self, now: int) -> bool:
        return now >= self.until
