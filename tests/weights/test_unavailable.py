"""Without the library: a reason in one line."""

from __future__ import annotations

import importlib

import pytest

from elastic_ep.weights.layout import slot_region
from elastic_ep.weights.transfer import (
    PullFailed,
    TransferPlane,
    TransferUnavailable,
    apply_settings,
    available,
)
from elastic_ep.wire.slot_messages import Region, StateAddress


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (ModuleNotFoundError("No module named 'mooncake'"), "pip install"),
        (ImportError("libibverbs.so.1: cannot open shared object file"), "Debian package libibverbs1"),
        (ImportError("undefined symbol:\n something"), "does not load: undefined symbol: something"),
    ],
)
def test_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch, error: ImportError, advice: str) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    apply_settings()
    reason = available()
    assert reason is not None
    assert advice in reason
    assert "\n" not in reason
    with pytest.raises(TransferUnavailable, match="Mooncake"):
        TransferPlane()


def test_it_is_silent(capfd: pytest.CaptureFixture[str], plane: TransferPlane) -> None:
    with pytest.raises(PullFailed, match="does not answer"), plane.read("127.0.0.1:1", [(0, 8)]) as read:
        read.wait(20)
    TransferPlane().close()
    assert capfd.readouterr() == ("", "")


def test_a_slot_lies_behind_those_before_it() -> None:
    regions = Region("layers.2.experts.a", 1000, 400), Region("layers.2.experts.b", 5000, 200)
    address = StateAddress("h:1", regions)
    assert slot_region(address, 2, 3, {"a": 100, "b": 50}) == [(1300, 100), (5150, 50)]
    for layer, slot, sizes in ((2, 4, (100, 50)), (2, -1, (100, 50)), (1, 0, (100, 50)), (2, 0, (300, 50))):
        with pytest.raises(ValueError, match=r"no slot|names no memory"):
            slot_region(address, layer, slot, dict(zip("ab", sizes, strict=True)))
