"""Prompts are what transformers makes of the same folder: over features of templates, messages and options."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import elastic_ep.gateway.text.chat_template
from elastic_ep.gateway.text.chat_template import ChatTemplateError
from elastic_ep.gateway.text.content_form import ContentForm
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from tests.gateway.fakes import byte_level_tokenizer
from tests.gateway.text.templates import AROUND, OF_A_MESSAGE, WHOLE

SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "image_token": "<think>"}


MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class Noon(datetime):
    """Both sides are asked at the same moment."""

    @classmethod
    def now(cls, tz: Any = None) -> Noon:
        return cls(2031, 2, 3, 12, 0, 0)


@pytest.fixture(autouse=True, scope="module")
def _clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Noon)
        patch.setattr(elastic_ep.gateway.text.chat_template, "datetime", Noon)
        yield


@cache
def oracle() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer(), **SPECIAL)


def theirs(messages: list[dict[str, Any]], template: str, **options: Any) -> str | None:
    """The prompt, or None where transformers refuses."""
    given = dict(options.pop("variables", None) or {})
    try:
        prompt: str = oracle().apply_chat_template(
            messages, chat_template=template, tokenize=False, **options, **given
        )
    except Exception:
        return None
    # Where a template shows the last message twice, their mark stays in the prompt.
    return prompt.replace(MARK, "").replace(MARK.strip(), "")


def ours(
    messages: list[dict[str, Any]], template: str, form: ContentForm | None, **options: Any
) -> str | None:
    try:
        return text_with(template, form).render_chat(messages, **options)
    except (ChatTemplateError, ValueError):
        return None


@cache
def text_with(template: str, form: ContentForm | None) -> ChatTokenizer:
    return ChatTokenizer(byte_level_tokenizer(), template, SPECIAL, form)


words = st.text(max_size=12) | st.sampled_from(
    ["Hello", "  two  ", "a\nb\n", "<think>\nhm\n</think>\n\nyes", "é🙂", "<|im_end|>", "{{ 1 }}", " x "]
)
parts = st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": words}) | st.just({"type": "image"}), max_size=3
)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-2, 2) | words,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
calls = st.lists(
    st.fixed_dictionaries(
        {
            "function": st.fixed_dictionaries(
                {"name": words, "arguments": words | st.dictionaries(words, plain_json)}
            )
        }
    ),
    max_size=2,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "assistant", "tool", "developer"])},
        optional={
            "content": words | words | parts | st.none(),
            "name": words | st.none(),
            "reasoning_content": words | st.none(),
            "thinking": words,
            "reasoning": words,
            "tool_calls": calls | st.none(),
        },
    ),
    min_size=1,
    max_size=5,
)
turns = st.lists(words, min_size=1, max_size=5).map(
    lambda said: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
)
tools = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {
                    "name": st.sampled_from(["weather", "clock"]),
                    "description": words,
                    "parameters": st.fixed_dictionaries(
                        {
                            "type": st.just("object"),
                            "properties": st.dictionaries(
                                st.sampled_from("xyz"),
                                st.fixed_dictionaries(
                                    {"type": st.sampled_from(["string", "array", ["string", "null"]])},
                                    optional={"default": plain_json},
                                ),
                                max_size=2,
                            ),
                        },
                        optional={"required": st.lists(st.sampled_from("xyz"), max_size=2)},
                    ),
                }
            ),
        }
    ),
    max_size=2,
)
documents = st.lists(st.fixed_dictionaries({"title": words, "text": words}), max_size=2)
variables = st.dictionaries(
    st.sampled_from(
        ["enable_thinking", "date", "mood", "bos_token", "cutoff", "reasoning_effort", "add_vision_id"]
    ),
    st.booleans() | words,
    max_size=3,
)


@st.composite
def composed(draw: st.DrawFn) -> str:
    before = "".join(draw(st.lists(st.sampled_from(AROUND), max_size=3)))
    inner = "".join(draw(st.lists(st.sampled_from(OF_A_MESSAGE), min_size=1, max_size=3)))
    after = "".join(draw(st.lists(st.sampled_from(AROUND), max_size=1)))
    last = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}\n"
    return f"{before}{{% for message in messages %}}{inner}{{% endfor %}}{after}{last}"


templates = composed() | composed() | st.sampled_from(list(WHOLE.values()))
ways = st.sampled_from([(False, False), (True, False), (False, True), (True, True)])
thorough = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@thorough
@given(templates, messages | turns, ways, st.none() | tools, st.none() | documents, variables)
def test_prompts_are_those_of_transformers(
    template: str,
    messages: list[dict[str, Any]],
    way: tuple[bool, bool],
    tools: list[Any] | None,
    documents: list[Any] | None,
    variables: dict[str, Any],
) -> None:
    options: dict[str, Any] = {
        "add_generation_prompt": way[0],
        "continue_final_message": way[1],
        "tools": tools,
        "documents": documents,
        "variables": variables,
    }
    expected = theirs(messages, template, **options)
    assert ours(messages, template, ContentForm.EITHER, **options) == expected
    if expected is not None:
        ids = oracle()(expected, add_special_tokens=False)["input_ids"]
        assert text_with(template, None).encode(expected, add_special_tokens=False) == ids


@pytest.mark.parametrize("template", WHOLE.values(), ids=WHOLE.keys())
@pytest.mark.parametrize("end", ["So", "So ", "So\n\n", "  So  ", " ", "", "<think>\nhm\n</think>\n\nSo "])
def test_every_way_that_a_final_message_may_end(template: str, end: str) -> None:
    for content in (
        end,
        [{"type": "text", "text": "One. "}, {"type": "text", "text": end}, {"type": "image"}],
    ):
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "Anna?"},
            {"role": "assistant", "content": content},
        ]
        options: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
        assert ours(messages, template, ContentForm.EITHER, **options) == theirs(
            messages, template, **options
        )


def test_loops_that_go_round_for_long_are_ended() -> None:
    """Whatever they are over, and wherever they stand."""
    bodies = (
        "{% for i in range(9000) %}{% for j in range(9000) %}{% endfor %}{% endfor %}",
        "{% macro inner(n) %}{% for i in range(n) %}{% endfor %}{% endmacro %}"
        "{% for i in range(9000) %}{{ inner(9000) }}{% endfor %}",
        "{% set held %}{% for i in range(9000) %}{% for j in range(9000) if j > 9 %}{% endfor %}{% endfor %}{% endset %}",
    )
    for body in bodies:
        with pytest.raises(ChatTemplateError, match="do not end"):
            ChatTokenizer(byte_level_tokenizer(), body).render_chat([])
    once = ChatTokenizer(byte_level_tokenizer(), "{% for i in range(99999) %}{% endfor %}done")
    for _ in range(30):
        assert once.render_chat([]) == "done", "each rendering has a budget of its own"


def test_a_large_conversation_is_within_the_bounds() -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(60_000)]
    for name in ("ChatML", "Mistral", "DeepSeek", "harmony"):
        assert ChatTokenizer(byte_level_tokenizer(), WHOLE[name], SPECIAL).render_chat(messages)
