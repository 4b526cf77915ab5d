"""Every field that clients of OpenAI, vLLM and SGLang know is honoured or refused by name, never ignored."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from scripts.api_reference import PAGE, page
from structlog.testing import capture_logs
from tokenizers import Tokenizer, processors

from elastic_ep.gateway.app import READING, create_app, serve
from elastic_ep.gateway.bodies import Chat, Completion, chat_body, completion_body
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.fields import read
from elastic_ep.gateway.prepared import prepare
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.group.metrics import Metrics
from tests.gateway.conftest import Running, settings
from tests.gateway.fakes import MODEL, TEMPLATE, FakeBackend, byte_level_tokenizer, says

pytestmark = pytest.mark.anyio

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
OPENAI = {
    COMPLETIONS: {*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream"},
    CHAT: {*chat_create_params.CompletionCreateParamsBase.__annotations__, "stream"},
}
"""As the official client has them."""
OF_BOTH = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream stream_options temperature
    top_p user response_format

    use_beam_search top_k min_p repetition_penalty watermarking length_penalty early_stopping stop_token_ids
    include_stop_str_in_output ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens
    truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids bad_words
    add_special_tokens structured_outputs guided_json guided_regex guided_choice guided_grammar
    guided_decoding_backend guided_whitespace_pattern structural_tag priority request_id session_id logits_processors
    return_tokens_as_token_ids return_token_ids return_token_offsets return_mm_kwargs routed_experts_prompt_start
    cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection thinking_token_budget
    stream_interval detokenize

    json_schema regex ebnf stop_regex no_stop_trim lora_path session_params custom_params custom_logit_processor
    images_config bootstrap_host bootstrap_port bootstrap_room routed_dp_rank disagg_prefill_dp_rank
    data_parallel_rank rid extra_key ngram_corpus_id custom_labels return_hidden_states return_routed_experts
    routed_experts_start_len return_cached_tokens_details max_new_tokens min_new_tokens sampling_seed
"""
OF_COMPLETIONS = """
    prompt best_of echo suffix prompt_embeds
    max_completion_tokens top_logprobs messages tools tool_choice functions documents chat_template
"""
OF_CHAT = """
    messages top_logprobs max_completion_tokens tools tool_choice parallel_tool_calls reasoning_effort
    include_reasoning echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs return_prompt_text
    return_prompt_token_ids return_meta_info task separate_reasoning stream_reasoning max_dynamic_patch
    min_dynamic_patch use_audio_in_video input_ids reasoning
    prompt suffix best_of
"""
PARSING = settings(tool_call_parser="hermes", reasoning_parser="qwen3")
KNOWN = {
    COMPLETIONS: OPENAI[COMPLETIONS] | {*OF_BOTH.split(), *OF_COMPLETIONS.split()},
    CHAT: OPENAI[CHAT] | {*OF_BOTH.split(), *OF_CHAT.split()},
}
"""From the request classes of vLLM 0.33 and SGLang 0.5.23, deprecated names too, and from their sampling parameters."""
LABELS = {
    "user", "metadata", "safety_identifier", "session_id", "extra_key", "cache_salt", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options",
}  # fmt: skip
"""Who asks, or how to be fast. They change no answer of OpenAI, vLLM or SGLang either."""
ALREADY_SO: dict[str, list[Any]] = {
    "parallel_tool_calls": [False],
    "spaces_between_special_tokens": [False],
    "service_tier": ["default"],
    "tool_choice": ["auto"],
    "reasoning_effort": ["medium"],
    "function_call": ["auto"],
}
"""What is not the default and yet what happens anyway, as no tools are given beside it and there is one tier."""
ASKS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "Anna has 12 apples", "seed": 1},
    CHAT: {"messages": [{"role": "user", "content": "Anna has 12 apples"}], "seed": 1},
}
OTHERS: dict[str, Any] = {
    "model": "another",
    "prompt": "Bob",
    "messages": [{"role": "user", "content": "Bob"}],
    "n": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["is"],
    "stop_token_ids": [5],
    "max_tokens": 2,
    "max_completion_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.5,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"5": 3},
    "allowed_token_ids": [5],
    "seed": 2,
    "min_tokens": 4,
    "ignore_eos": True,
    "logprobs": {COMPLETIONS: 1, CHAT: True},
    "top_logprobs": 2,
    "truncate_prompt_tokens": 2,
    "truncation_side": "right",
    "request_id": "mine",
    "rid": "mine",
    "skip_special_tokens": False,
    "add_special_tokens": {COMPLETIONS: False, CHAT: True},
    "add_generation_prompt": False,
    "chat_template_kwargs": {"style": "short"},
    "documents": [{"title": "One", "text": "Anna"}],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "none",
    "parallel_tool_calls": False,
    "include_reasoning": False,
    "separate_reasoning": False,
    "reasoning_effort": "high",
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a+"},
    "guided_json": {"type": "object"},
    "guided_choice": ["Anna", "Bob"],
    "guided_grammar": 'root ::= "Anna"',
    "guided_whitespace_pattern": " ?",
    "json_schema": '{"type": "object"}',
    "ebnf": 'root ::= "Anna"',
    "structural_tag": {"format": {"type": "any_text"}},
}
"""A valid value that is not the default. For other fields: anything will do, as none must pass unseen."""
BESIDE: dict[str, dict[str, Any]] = {
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
    "include_stop_str_in_output": {"stop": ["is"]},
    "no_stop_trim": {"stop": ["is"]},
    "truncation_side": {"truncate_prompt_tokens": 2},
    "tool_choice": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "guided_whitespace_pattern": {"guided_json": {}},
}
"""What a field needs beside it to mean something."""
ANYTHING = [True, False, 0, 7, 2.5, "x", ["x"], [7], {"x": "x"}]
DEPENDS = {"stop", "stream_options", "chat_template_kwargs"}
"""Only the value above is sure to show: a text need not hold a stop string, nor a template a variable."""


@dataclass(frozen=True)
class Seen:
    """All that a client sees, and all that an engine is told."""

    status: int
    body: str
    told: str

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.body)["error"])


def sensitive_text() -> ChatTokenizer:
    """A tokenizer and a template with which every field about them shows."""
    tokenizer = Tokenizer.from_str(byte_level_tokenizer().to_str())
    start = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", start)]
    )
    return ChatTokenizer(
        tokenizer,
        TEMPLATE + "{{ style }}{{ documents }}{{ tools }}{{ reasoning_effort }}",
        {"eos_token": "<|im_end|>"},
    )


@pytest.fixture(scope="module", autouse=True)
def bodies() -> None:
    prepare(PARSING)


@pytest.fixture
async def running(anyio_backend: str) -> Any:
    answer = '<think>is</think>The <|im_start|>answer is 7.<tool_call>{"name": "f"}</tool_call>'
    backend = FakeBackend(says(answer))
    metrics = Metrics()
    app = create_app(backend, PARSING, sensitive_text(), metrics, sensitive_text)
    server = await serve(app, "127.0.0.1", 0, grace_s=0.1)
    async with aiohttp.ClientSession(headers={"X-Request-Id": "fixed"}) as http:
        yield Running(server.url, backend, metrics, http, server, app[READING].worker)
    await server.close()


async def ask(running: Running, path: str, **body: Any) -> Seen:
    running.backend.submitted.clear()
    async with running.http.post(running.url + path, json=ASKS[path] | body) as response:
        text = re.sub(r'"created":\d+|call_[0-9a-f]{24}', "", await response.text())
        return Seen(response.status, text, repr(running.backend.submitted))


def others(path: str, name: str) -> list[Any]:
    value = OTHERS.get(name)
    if isinstance(value, dict) and path in value:
        value = value[path]
    return ANYTHING if value is None else [value] if name in DEPENDS else [value, *ANYTHING]


def needs(path: str, name: str) -> dict[str, Any]:
    refused = path == COMPLETIONS and name in ("top_logprobs", "tool_choice")
    return {} if refused else BESIDE.get(name, {})


BODIES: dict[str, type[Completion] | type[Chat]] = {
    COMPLETIONS: completion_body(PARSING),
    CHAT: chat_body(PARSING),
}


def honoured(path: str) -> set[str]:
    return BODIES[path].model_fields.keys() - BODIES[path].refused.keys()


def labels(path: str) -> set[str]:
    """Fields of which any value is accepted."""
    fields = BODIES[path].model_fields
    return {name for name in honoured(path) if fields[name].annotation is Any and not fields[name].metadata}


def asks_for_nothing(path: str, name: str, value: Any) -> bool:
    """Whether `value` is what the field is without being given, or what happens anyway."""
    if name == "add_special_tokens":
        return value is (path == COMPLETIONS)
    if (path, name, value) == (COMPLETIONS, "tool_choice", "none"):
        return True
    if name in ALREADY_SO and any(value is one or value == one for one in ALREADY_SO[name]):
        return True
    if isinstance(value, bool):
        return value is SWITCHES.get(name)
    return isinstance(value, int | float) and value in NUMBERS.get(name, ())


NUMBERS: dict[str, tuple[float, ...]] = {
    "priority": (0,), "min_tokens": (0,), "min_new_tokens": (0,), "length_penalty": (1,), "n": (1,), "best_of": (1,),
    "thinking_token_budget": (-1,), "stream_interval": (1,), "routed_experts_start_len": (0,),
    "routed_experts_prompt_start": (0,), "top_logprobs": (0,), "temperature": (1,), "top_p": (1,), "top_k": (0, -1),
    "min_p": (0,), "repetition_penalty": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "seed": (1,),
    "truncate_prompt_tokens": (-1, 7),
}  # fmt: skip
"""Defaults by the vendors' documents; also what changes nothing for these prompts."""
OFF = """
    stream ignore_eos use_beam_search early_stopping watermarking include_stop_str_in_output no_stop_trim store
    return_tokens_as_token_ids return_token_ids return_token_offsets return_hidden_states return_meta_info
    return_routed_experts return_cached_tokens_details return_prompt_text return_prompt_token_ids echo
    continue_final_message use_audio_in_video logprobs
"""
ON = """
    detokenize return_mm_kwargs include_reasoning separate_reasoning stream_reasoning spaces_between_special_tokens
    skip_special_tokens add_generation_prompt parallel_tool_calls
"""
SWITCHES: dict[str, bool] = {**dict.fromkeys(OFF.split(), False), **dict.fromkeys(ON.split(), True)}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_known_field_is_honoured_or_refused_by_name(running: Running, path: str) -> None:
    for name in sorted(KNOWN[path]):
        beside = needs(path, name)
        before = await ask(running, path, **beside)
        assert before.status == 200
        for value in others(path, name):
            seen = await ask(running, path, **{**beside, name: value})
            if seen.status != 200:
                assert seen.status in (400, 404)
                assert re.split(r"[.\[]", seen.error["param"])[0] == name, (value, seen.error)
                assert name in seen.error["message"]
            elif name not in LABELS and not asks_for_nothing(path, name, value):
                assert seen != before, f"{name}: {value!r} was accepted and had no effect"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_a_value_that_asks_for_nothing_is_accepted(running: Running, path: str) -> None:
    """Null always; and what the table says that a field which is not honoured may be."""
    body = BODIES[path]
    for name in honoured(path) | body.refused.keys():
        before = await ask(running, path, **needs(path, name))
        refused = body.refused.get(name)
        values = (
            [*refused.allowed, None] if refused else [] if body.model_fields[name].is_required() else [None]
        )
        for value in values:
            seen = await ask(running, path, **{**needs(path, name), name: value})
            assert seen.status == 200, (name, value, seen.body)
            assert seen == before or name == "seed", (name, value)


def test_a_valid_value_of_each_honoured_field_is_tried() -> None:
    """Else the first property could hold because nothing valid was sent."""
    for path in (COMPLETIONS, CHAT):
        for name in honoured(path) - labels(path):
            if name in OTHERS:
                assert refusal(path, name, others(path, name)[0]) is None
            else:
                assert not all(refusal(path, name, value) for value in ANYTHING), name


def refusal(path: str, name: str, value: Any) -> ApiError | None:
    try:
        read(BODIES[path], ASKS[path] | {name: value})
    except ApiError as error:
        return error
    return None


def test_refusals_have_the_code_for_it() -> None:
    for path in (COMPLETIONS, CHAT):
        for name in BODIES[path].refused:
            refused = refusal(path, name, {"x": "x"})
            assert refused is not None
            assert (refused.code, refused.status, refused.param) == ("unsupported_parameter", 400, name)


def test_labels_are_few() -> None:
    for path in (COMPLETIONS, CHAT):
        assert labels(path) == LABELS


SHAPING: list[dict[str, Any]] = [
    {"structured_outputs": {"regex": "a+", "backend": "x"}},
    {"regex": "a+", "guided_decoding_backend": "outlines"},
    {"regex": "a+", "ignore_eos": True},
    {"regex": "a+", "allowed_token_ids": [5]},
    {"response_format": {"type": "json_object", "also": 1}},
    {"stream": True, "stream_options": {"include_obfuscation": True}},
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_what_shapes_the_answer_is_refused(running: Running, path: str) -> None:
    for body in SHAPING:
        seen = await ask(running, path, **body)
        assert (seen.status, seen.error["code"]) == (400, "unsupported_parameter"), body


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@hypothesis_settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data(), JSON)
def test_any_value_of_any_field_is_read_or_refused_by_name(data: st.DataObject, value: Any) -> None:
    path = data.draw(st.sampled_from([COMPLETIONS, CHAT]))
    name = data.draw(st.sampled_from(sorted(KNOWN[path])))
    refused = refusal(path, name, value)
    if refused is not None:
        assert refused.status == 400
        assert (refused.param or "").startswith(name)
        assert refused.message.startswith(("'", "This model"))
        assert not re.search("Input|should|dictionary|validation|instance", refused.message), (
            "pydantic's own words"
        )


async def test_unknown_fields_are_ignored_and_said_once(running: Running) -> None:
    before = await ask(running, CHAT, stream=True, stream_options={})
    with capture_logs() as lines:
        for _ in range(2):
            seen = await ask(
                running, CHAT, stream=True, stream_options={"no_such": 1}, no_such_field="x" * 1000
            )
            assert seen == before
    said = sorted(line["field"] for line in lines if "unknown request field" in line["event"])
    assert said == ["'no_such_field'", "'stream_options.no_such'"]


async def test_a_flood_of_unknown_names_is_not_a_flood_of_lines(running: Running) -> None:
    with capture_logs() as lines:
        for round_ in range(5):
            names = {f"{'x' * 5000}{round_}": 1} | {f"field{round_}-{place}": 1 for place in range(300)}
            assert (await ask(running, COMPLETIONS, **names)).status == 200
    said = [line["field"] for line in lines if "unknown request field" in line["event"]]
    assert 0 < len(said) <= 200
    assert all(len(field) < 200 for field in said)


async def test_the_official_names_of_one_model(running: Running) -> None:
    assert (await ask(running, CHAT, model=MODEL)).status == 200


def test_the_page_of_fields_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "write it with python scripts/api_reference.py"
