"""Hosts of a test: windows and a carrier each, on this machine, and between them TCP that can be cut."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.mirror import Mirror
from elastic_ep.exchange.windows import Windows
from elastic_ep.host.carrier import Address, Carrier, CarrierConfig

KEY = b"a key for tests"


class CarrierPair:
    """Two hosts; with ranks on the first alone, one, which needs no carrier. `through` is what host 1 dials instead of
    host 0."""

    def __init__(
        self,
        shape: ExchangeShape,
        hosts: Sequence[int],
        through: Address | None = None,
        silence_s: float = 1.0,
    ) -> None:
        self.shape = shape
        self.hosts = tuple(hosts)
        self._silence_s = silence_s
        self.fds = [Windows.create(shape, carried=True) for _ in range(2)]
        self.carriers: dict[int, Carrier] = {}
        self.links = threading.Condition()
        """Told when those of one may have changed."""
        if len(set(hosts)) == 2:
            for host in (0, 1):
                self.start(host)
            self.carriers[1].reach(0, through or self.carriers[0].address)

    def start(self, host: int, incarnation: int = 1, key: bytes = KEY) -> Carrier:
        """In place of the one that was there, if any."""
        config = CarrierConfig(self.hosts, host, incarnation, key, silence_s=self._silence_s)
        mirror = Mirror(self.fds[host], self.shape, self.hosts, host)
        self.carriers[host] = Carrier(config, mirror, on_links=self._links_changed)
        return self.carriers[host]

    def _links_changed(self) -> None:
        with self.links:
            self.links.notify_all()

    def close(self) -> None:
        for carrier in self.carriers.values():
            carrier.close()
        for fd in self.fds:
            os.close(fd)
