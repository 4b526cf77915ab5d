"""HTTPS with a certificate made on the spot."""

from __future__ import annotations

import shutil
import ssl
from asyncio import to_thread
from pathlib import Path

import aiohttp
import pytest

from elastic_ep.gateway.app import create_app, serve
from elastic_ep.gateway.prepared import prepare
from elastic_ep.gateway.tls import server_context
from elastic_ep.group.metrics import Metrics
from tests.gateway.conftest import settings
from tests.gateway.fakes import FakeBackend, sample_text
from tests.kit.bound import run

OPENSSL_S = 20.0

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Key and certificate, which is its own authority."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    folder: Path = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    prepare(settings())
    run(["openssl", "req", "-x509", *made, *names, *files], OPENSSL_S).check_returncode()
    return str(key), str(certificate)


async def test_https(pair: tuple[str, str]) -> None:
    key, certificate = pair
    app = create_app(FakeBackend(), settings(), sample_text(), Metrics(), sample_text)
    context = await to_thread(server_context, key, certificate, None, 0)
    server = await serve(app, "127.0.0.1", 0, tls=context, grace_s=0.1)
    try:
        assert server.url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=certificate)
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{server.url}/live", ssl=trusted) as response,
        ):
            assert response.status == 200
    finally:
        await server.close()


async def test_clients_without_a_certificate(pair: tuple[str, str]) -> None:
    key, certificate = pair
    app = create_app(FakeBackend(), settings(), sample_text(), Metrics(), sample_text)
    context = await to_thread(server_context, key, certificate, certificate, 2)
    server = await serve(app, "127.0.0.1", 0, tls=context, grace_s=0.1)
    try:
        bare = ssl.create_default_context(cafile=certificate)
        known = ssl.create_default_context(cafile=certificate)
        known.load_cert_chain(certificate, key)
        async with aiohttp.ClientSession() as http:
            with pytest.raises(aiohttp.ClientError):
                await http.get(f"{server.url}/live", ssl=bare)
            async with http.get(f"{server.url}/live", ssl=known) as response:
                assert response.status == 200
    finally:
        await server.close()
