"""What of the exchange over Mooncake can be seen without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.mooncake import (
    MooncakeExchange,
    MooncakeUnavailable,
    load_buffer_class,
)
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Member
from tests.kit.file_store import FileStore


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_refusal_says_so() -> None:
    with pytest.raises(MooncakeUnavailable, match="no CUDA device"):
        load_buffer_class()


def test_a_group_has_an_even_number_of_experts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        MooncakeExchange(
            ExchangeShape(3, 4, 128, 2, 3, 2),
            Member(0, 0),
            FileStore(tmp_path),
            timeout_ms=20_000,
            connect_timeout_ms=USUAL.store_get_ms,
        )


def test_a_hidden_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    shape = ExchangeShape(2, 4, 100, 2, 2, 2)
    with pytest.raises(ValueError, match="multiple of 128"):
        MooncakeExchange(
            shape, Member(0, 0), FileStore(tmp_path), timeout_ms=20_000, connect_timeout_ms=USUAL.store_get_ms
        )
