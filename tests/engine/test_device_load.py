"""The rows counted on the device, read while it goes on counting."""

from __future__ import annotations

import torch

from elastic_ep.engine.ops_cuda.load import DeviceLoad
from elastic_ep.placement import launch_placement


def test_a_cut_divides_what_was_counted_from_what_comes_after() -> None:
    counts = torch.zeros(1, 2, dtype=torch.int32)
    load = DeviceLoad(launch_placement(1, 1, 2, 0), 0, counts)
    counts += torch.tensor([[1, 2]])
    load.cut()
    counts += torch.tensor([[10, 20]])
    assert [load.take(), load.take(), load.take()] == [((1, 2),), ((10, 20),), ((0, 0),)]
