"""A plane of the test process's own, or a skip that says why there is none."""

from __future__ import annotations

import pytest

from elastic_ep.weights.transfer import TransferPlane, apply_settings, available


@pytest.fixture(scope="session")
def plane() -> TransferPlane:
    apply_settings()
    reason = available()
    if reason is not None:
        pytest.skip(reason)
    return TransferPlane()
