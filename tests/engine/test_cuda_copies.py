"""Experts are copied on the rank's own GPU, though the thread that does it has another as its current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.placement import launch_placement

GPU = torch.device("cuda", 3)


class Weights:
    def __init__(self, seen: list[str]) -> None:
        self._seen = seen

    def load_expert(self, layer: int, slot: int, logical: int) -> None:
        self._seen.append("load")

    def checksum(self, layer: int, slot: int) -> int:
        self._seen.append("checksum")
        return 77


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (
            SimpleNamespace(device=GPU),
            ["device", "stream", "load", "checksum", "end of stream", "end of device"],
        ),
        (None, ["load", "checksum"]),
    ],
)
def test_the_stream_is_put_back_while_the_device_is_still_the_ranks(
    monkeypatch: pytest.MonkeyPatch, stream: Any, expected: list[str]
) -> None:
    seen: list[str] = []

    def entering(name: str, argument: Any) -> Any:
        @contextmanager
        def enter(given: Any) -> Iterator[None]:
            assert given is argument
            seen.append(name)
            yield
            seen.append(f"end of {name}")

        return enter

    monkeypatch.setattr(torch.cuda, "device", entering("device", GPU))
    monkeypatch.setattr(torch.cuda, "stream", entering("stream", stream))
    runner = object.__new__(CudaRunner)
    runner._copies = stream
    runner._placement = launch_placement(1, 1, 2, 0)
    runner.weights = cast(Any, Weights(seen))
    assert runner.copy_expert(0, 1, 0) == 77
    assert seen == expected
