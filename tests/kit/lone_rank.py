"""A rank's control loop without a group: what it sends is kept."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from elastic_ep.config import EngineLimits, RankConfig
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.placement import launch_placement
from elastic_ep.rank.process import RankProcess
from elastic_ep.timing import USUAL

CONFIG = RankConfig(
    rank=0, incarnation=1, directory="", model="", load_format="dummy",
    device="cpu", seed=0, limits=EngineLimits(max_model_len=16), timing=USUAL,
    placement=launch_placement(2, 1, 2, 0),
)  # fmt: skip


class Wire:
    """`heard`, if given, is told of each message when it is sent."""

    def __init__(self, heard: Callable[[Any], None] = lambda message: None) -> None:
        self.sent: list[Any] = []
        self._heard = heard

    def send(self, message: Any) -> None:
        self.sent.append(message)
        self._heard(message)


def lone_rank(wire: Wire) -> RankProcess:
    rank = RankProcess(CONFIG, files=SharedFiles(-1, -1), life_fd=-1)
    rank._loop = SimpleNamespace(call_soon_threadsafe=lambda call: call())  # type: ignore[assignment]  # as above
    rank._wire = wire  # type: ignore[assignment]  # the only part of it that is used
    return rank
