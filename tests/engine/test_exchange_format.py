"""A runner computes in the numbers that its exchange carries."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.placement import launch_placement
from tests.engine.solo import TINY, SoloExchange, dummy_weights, solo_runner
from tests.kit.solo_exchange import SoloDeviceExchange


def test_an_exchange_with_other_rows_than_the_weights_is_refused_on_the_device() -> None:
    placement = launch_placement(1, TINY.moe_layers, TINY.moe.experts, 0)
    exchange = SoloDeviceExchange(TINY.moe.experts, torch.device("cpu"), torch.bfloat16)
    weights = dummy_weights(TINY, placement)
    with pytest.raises(ValueError, match=r"rows of torch\.bfloat16, but the weights are torch\.float32"):
        CudaRunner(EngineLimits(max_model_len=100), weights, placement, 0, exchange)


def test_an_exchange_with_other_rows_than_the_weights_is_refused_on_the_host() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    other = SoloDeviceExchange(1, torch.device("cpu")).format
    with (
        mock.patch.object(exchange, "format", other),
        pytest.raises(ValueError, match="the exchange carries"),
    ):
        solo_runner(exchange=exchange)
