"""Where ranks of other hosts find the run process."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ControlAddress:
    """Where ranks of other hosts find the run process, and the group's key, in hexadecimal.

    HAZARD: a secret. It is in the configuration of ranks on a host that has joined, which a file in memory holds.
    """

    host: str
    pub_port: int
    rank_port: int
    key: str = field(repr=False)
