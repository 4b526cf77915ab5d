"""Two agents on one machine, whose ranks share its GPU or have one each: all of one is killed under streams, and no
client sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.kit.host_faults import full, undisturbed, views, with_fault
from tests.kit.hosts import group

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

OTHER = "127.0.0.2"
ARGUMENTS = ["--device", "cuda", "--num-gpu-blocks-override", "512", "--event-log", "full"]


def test_a_killed_host_costs_no_token_and_comes_back(tmp_path: Path) -> None:
    with group(tmp_path, arguments=ARGUMENTS) as hosts:
        expected = undisturbed(hosts.server.url)
        texts, before = asyncio.run(with_fault(hosts.server.url, hosts.hosts[OTHER].kill))
        assert texts == expected
        assert {0, 1} in views(hosts)
        hosts.start(OTHER)
        now = asyncio.run(full(hosts.server.url, {rank: before[rank] for rank in (2, 3)}))
        incarnations = {engine["id"]: engine["incarnation"] for engine in now["engines"]}
        assert {rank: incarnations[rank] for rank in (0, 1)} == {rank: before[rank] for rank in (0, 1)}
