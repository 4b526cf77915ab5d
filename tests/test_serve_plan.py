"""The deadlines that follow from --hang-deadline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_ep.config import ServeConfig
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.serve_plan import make_plan

CONFIG = ServeConfig(ranks=4, model=str(BUNDLED_MODEL), device="cpu", hang_deadline_s=2.0)


@pytest.mark.parametrize(
    ("config", "heartbeat_ms", "kernel_wait_ms"),
    [
        (CONFIG, 400, 1000),
        (replace(CONFIG, mps=True), 400, 500),
        (replace(CONFIG, fault_tolerance=False), 0, 20_000),
    ],
)
def test_deadlines(config: ServeConfig, heartbeat_ms: int, kernel_wait_ms: int) -> None:
    plan = replace(make_plan(CONFIG), config=config)
    assert (plan.heartbeat_ms, plan.kernel_wait_ms) == (heartbeat_ms, kernel_wait_ms)
    # A dead rank's kernels may wait for each of three peers, at two thirds of the clock that they count by.
    assert plan.drain_s > 3 * kernel_wait_ms / 1000 / (2 / 3)
