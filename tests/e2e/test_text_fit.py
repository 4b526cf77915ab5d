"""A model whose tokenizer has more than the model: a real server says so, stops where it should, and loses no rank."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from train.problems import held_out

from elastic_ep.run import BUNDLED_MODEL
from tests.kit.served import http, server, status

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def mismatched(folder: Path) -> Path:
    """The end of a turn is known to the tokenizer alone, which also has a token that the model has not."""
    shutil.copytree(BUNDLED_MODEL, folder)
    for name in ("config.json", "generation_config.json"):
        plain = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(plain | {"eos_token_id": 5}))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    while tokenizer.get_vocab_size() <= vocabulary:
        tokenizer.add_tokens([AddedToken(f"<|new{tokenizer.get_vocab_size()}|>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


async def ask(url: str, question: str) -> tuple[int, dict[str, object]]:
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    async with http() as session, session.post(f"{url}/v1/chat/completions", json=body) as response:
        return response.status, await response.json()


async def incarnations(url: str) -> list[int]:
    async with http() as session:
        return [engine["incarnation"] for engine in (await status(session, url))["engines"]]


def test_a_tokenizer_with_more_than_the_model_has(tmp_path: Path) -> None:
    folder = mismatched(tmp_path / "model")
    with server(["--ranks", "2", "--model", str(folder)], tmp_path) as running:
        for _ in range(6):
            code, answer = asyncio.run(ask(running.url, "What is <|new640|>?"))
            assert code == 400
            assert "640" in str(answer)
        code, answer = asyncio.run(ask(running.url, held_out(1)[0].question))
        assert code == 200
        choices = answer["choices"]
        assert isinstance(choices, list)
        assert choices[0]["finish_reason"] == "stop"
        assert asyncio.run(incarnations(running.url)) == [1, 1]
