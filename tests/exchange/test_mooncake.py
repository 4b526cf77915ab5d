"""What of the exchange over Mooncake can be seen without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bench.file_store import FileStore

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.mooncake import (
    MooncakeExchange,
    MooncakeUnavailable,
    load_buffer_class,
)
from elastic_ep.exchange.step_words import NOT_BEGUN, StepWords
from elastic_ep.messages import Member


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_the_refusal_says_so() -> None:
    with pytest.raises(MooncakeUnavailable, match="no CUDA device"):
        load_buffer_class()


def test_a_hidden_size_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    shape = ExchangeShape(2, 4, 100, 2, 2, 2)
    with pytest.raises(ValueError, match="multiple of 128"):
        MooncakeExchange(shape, Member(0, 0), FileStore(tmp_path))


def test_step_words_are_seen_by_all_and_a_new_incarnation_has_begun_nothing(tmp_path: Path) -> None:
    words = [StepWords(tmp_path, 3, rank) for rank in range(3)]
    words[1].say(12)
    assert [words[0].of(rank) for rank in range(3)] == [NOT_BEGUN, 12, NOT_BEGUN]
    StepWords(tmp_path, 3, 1)
    assert words[2].of(1) == NOT_BEGUN
