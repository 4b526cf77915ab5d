"""Quantised checkpoints serve and fail over; a wrong bit in an expert's scales is found and mended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.models import deepseek_v3, gpt_oss, qwen3_moe
from elastic_ep.run import BUNDLED_MODEL
from tests.e2e.corruptible_server import SPOIL, SPOILT
from tests.e2e.test_families import SHAPES, texts
from tests.e2e.test_wrong_bytes import MODULE, slots_of, until_mended, verify
from tests.kit.quantised import SCHEMES, write_pair
from tests.kit.served import Server, http, server, status, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

RANKS, KILLED, SPOILED = 4, 3, 2


TRIED = {deepseek_v3: "fp8", gpt_oss: "mxfp4", qwen3_moe: "int 4 with zero points"}
"""Each as its checkpoints are."""
CHOSEN = TRIED if "ELASTIC_EP_ALL_FAMILIES" in os.environ else (deepseek_v3, gpt_oss)


@pytest.mark.parametrize("family", CHOSEN, ids=lambda family: family.MODEL_TYPE)
def test_a_kill_and_a_wrong_scale_cost_no_token(tmp_path: Path, family: Any) -> None:
    named = {"architectures": [family.ARCHITECTURE], "model_type": family.MODEL_TYPE}
    small = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    config |= {**named, **SHAPES[family.ARCHITECTURE], **small}
    write_pair(tmp_path / "model", tmp_path / "plain", SCHEMES[TRIED[family]], config)
    flags = ["--ranks", str(RANKS), "--model", str(tmp_path / "model")]
    with server(flags, tmp_path / "runs", MODULE) as serving:
        asyncio.run(killed_and_spoiled(serving))


async def killed_and_spoiled(serving: Server) -> None:
    url = serving.url
    async with http() as session:
        await until_full(session, url)
        expected = await texts(session, url, asyncio.Event())
        assert len(set(expected)) == len(expected), "texts that are alike compare nothing"
        started = asyncio.Event()
        streams = asyncio.create_task(texts(session, url, started))
        await asyncio.wait_for(started.wait(), 60)
        before = await status(session, url)
        os.kill(before["engines"][KILLED]["pid"], signal.SIGKILL)
        assert await asyncio.wait_for(streams, 120) == expected
        await until_full(session, url)
        assert await verify(session, url) == []

        physical = SPOILED * len(await slots_of(session, url)) // RANKS + SPOILT[1]
        os.kill(before["engines"][SPOILED]["pid"], SPOIL)
        assert await verify(session, url) == [{"layer": SPOILT[0], "physical": physical, "rank": SPOILED}]
        await until_mended(session, url, physical, before["tolerates"])
        assert await verify(session, url) == []
        assert await texts(session, url, asyncio.Event()) == expected
