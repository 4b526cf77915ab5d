"""One server for many tests: real processes, real sockets, real kills."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.served import Server, server

ADMIN_KEY = "boss"


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Eight ranks and the bundled model; every test leaves them all Serving."""
    with server(["--ranks", "8", "--admin-key", ADMIN_KEY], tmp_path_factory.mktemp("runs")) as running:
        yield running
