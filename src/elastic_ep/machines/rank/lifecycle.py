"""The lifecycle of a rank, as a table. The rank drives it; the controller mirrors it from the rank's reports."""

from __future__ import annotations

from elastic_ep.machines.tables import Row, Table
from elastic_ep.wire.messages import RankState

_ALIVE = (
    RankState.LAUNCHING,
    RankState.INIT_CUDA,
    RankState.INIT_DIST,
    RankState.JOINING,
    RankState.SERVING,
    RankState.DRAINING,
)
SEATED = (RankState.SERVING, RankState.DRAINING)
"""In a view."""

RANK = Table(
    name="rank",
    initial=RankState.LAUNCHING,
    rows=(
        Row("process_started", (RankState.LAUNCHING,), RankState.INIT_CUDA),
        Row("device_ready", (RankState.INIT_CUDA,), RankState.INIT_DIST),
        Row("buffers_ready", (RankState.INIT_DIST,), RankState.JOINING),
        Row("admitted", (RankState.JOINING,), RankState.SERVING),
        Row("drain", (RankState.SERVING,), RankState.DRAINING),
        Row("resume", (RankState.DRAINING,), RankState.SERVING),
        Row("stopped", _ALIVE, RankState.STOPPED),
        Row("lost", _ALIVE, RankState.FAILED),
        Row("lost", (RankState.FAILED, RankState.STOPPED), None),
        Row("relaunch", (RankState.FAILED, RankState.STOPPED), RankState.LAUNCHING),
    ),
    final=frozenset({RankState.STOPPED, RankState.FAILED}),
)

REPORTED_TRIGGERS = {
    RankState.INIT_CUDA: "process_started",
    RankState.INIT_DIST: "device_ready",
    RankState.JOINING: "buffers_ready",
}
"""The trigger that the controller fires when a rank reports this state."""
