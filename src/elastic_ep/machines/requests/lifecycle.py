"""The life of one request, as a table. The routing machine fires the triggers; never one per token."""

from __future__ import annotations

from enum import StrEnum

from elastic_ep.machines.tables import Row, Table


class RequestState(StrEnum):
    """Where a request is: in the router's queue (Queued, Replaying), at one rank (Running), or done.

    A request that moves from one rank to another stays Running.
    """

    QUEUED = "Queued"
    RUNNING = "Running"
    REPLAYING = "Replaying"
    FINISHED = "Finished"
    FAILED = "Failed"
    CANCELLED = "Cancelled"


_LIVE = (RequestState.QUEUED, RequestState.RUNNING, RequestState.REPLAYING)

REQUEST = Table(
    name="request",
    initial=RequestState.QUEUED,
    rows=(
        Row("assign", (RequestState.QUEUED, RequestState.REPLAYING), RequestState.RUNNING),
        Row("rank_lost", (RequestState.RUNNING,), RequestState.REPLAYING),
        Row("finish", (RequestState.RUNNING,), RequestState.FINISHED),
        Row("fail", _LIVE, RequestState.FAILED),
        Row("cancel", _LIVE, RequestState.CANCELLED),
    ),
    final=frozenset({RequestState.FINISHED, RequestState.FAILED, RequestState.CANCELLED}),
)
