"""From bodies to jobs, without a server: what is computed once, what is refused, whose model it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.jobs import JobReader
from elastic_ep.gateway.reading import BodyReader
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from tests.gateway.conftest import settings
from tests.gateway.fakes import MODEL, TEMPLATE, byte_level_tokenizer


def sample() -> ChatTokenizer:
    return ChatTokenizer(byte_level_tokenizer(), TEMPLATE, {"eos_token": "<|im_end|>"})


def test_words_are_told_in_tokens_once_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes some microseconds, and a short body is read on the event loop: not for each of its prompts."""
    text = sample()
    encode, encoded = text.encode, list[str]()

    def noted(said: str, **how: bool) -> list[int]:
        encoded.append(said)
        return encode(said, **how)

    monkeypatch.setattr(text, "encode", noted)
    prompts, words = ["x"] * 50, [f"word{number}" for number in range(20)]
    job = JobReader(settings(), text).completion({"prompt": prompts, "bad_words": words})
    assert len(job.parts) == 50
    assert len(encoded) == len(prompts) + 2 * len(words)


@pytest.mark.parametrize("field", ["prompt", "bad_words"])
def test_a_text_that_the_tokenizer_raises_for_is_refused(field: str) -> None:
    """One without a token for what it does not know raises an exception of no kind."""
    tokenizer = Tokenizer(models.WordLevel({"x": 0}, unk_token="[none]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    reader = JobReader(settings(), ChatTokenizer(tokenizer, TEMPLATE, {}))
    wrong = {"prompt": "y"} if field == "prompt" else {"prompt": "x", field: ["x", "y"]}
    with pytest.raises(ApiError) as refusal:
        reader.completion(wrong)
    assert (refusal.value.status, refusal.value.param) == (
        400,
        "prompt" if field == "prompt" else "bad_words[1]",
    )


@pytest.mark.parametrize(
    ("asked", "most"), [({"max_tokens": 5}, 5), ({"max_tokens": 0}, 0), ({}, 16), ({"prompt": [5] * 250}, 6)]
)
def test_no_more_tokens_are_promised_than_may_come(asked: dict[str, Any], most: int) -> None:
    reader = JobReader(settings(), sample())
    body = {"prompt": "x", **asked}
    assert reader.completion({**body, "min_tokens": most}).parts[0].params.min_tokens == most
    with pytest.raises(ApiError, match="min_tokens") as refusal:
        reader.completion({**body, "min_tokens": most + 1})
    assert (refusal.value.status, refusal.value.param) == (400, "min_tokens")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: [ids, ids]])
@pytest.mark.parametrize("length", [3, 255, 256, 5000])
@pytest.mark.parametrize("keep", [1, 5, 5.0, 255, -1, -1.0])
def test_a_prompt_of_any_length_is_cut(length: int, keep: float, side: str, form: Any) -> None:
    """A text of a thousand tokens is, and so are its tokens."""
    ids = [place % 400 for place in range(length)]
    body = {"prompt": form(ids), "truncate_prompt_tokens": keep, "truncation_side": side, "max_tokens": 1}
    most = int(keep) if keep > 0 else 255
    kept = tuple(ids[-most:] if side == "left" else ids[:most])
    for part in JobReader(settings(), sample()).completion(body).parts:
        assert part.prompt == kept


@pytest.mark.parametrize(
    ("task", "body"),
    [
        ("tokenize", {"prompt": "x"}),
        ("tokenize", {"messages": [{"role": "user", "content": "x"}]}),
        ("detokenize", {"tokens": [5]}),
        ("completion", {"prompt": "x"}),
        ("chat", {"messages": [{"role": "user", "content": "x"}]}),
        ("responses", {"input": "x"}),
        ("messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        ("count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_each_body_is_for_this_model(task: str, body: dict[str, Any]) -> None:
    reader = BodyReader(settings(), sample())
    reader.read(task, json.dumps(body | {"model": MODEL}).encode())
    with pytest.raises(ApiError) as refusal:
        reader.read(task, json.dumps(body | {"model": "nobody"}).encode())
    assert (refusal.value.status, refusal.value.param) == (404, "model")
