"""What a model writes, in each format: as told whole, and however it is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from elastic_ep.gateway.parsers.base import CallArguments, CallBegin, Content, Delta, Reasoning, Tool
from elastic_ep.gateway.parsers.registry import (
    CALL_FORMATS,
    REASONING_FORMATS,
    MessageForm,
    MessageReader,
    begins_within,
)

TOOLS = (
    Tool.of(
        {
            "name": "weather",
            "parameters": {
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "deep": {"type": "object"},
                    "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                }
            },
        }
    ),
    Tool.of({"name": "clock"}),
)
Told = dict[str, Any]


def told(deltas: Iterable[Delta]) -> Told:
    """What a client puts together from deltas."""
    content, reasoning = "", ""
    calls: list[list[str]] = []
    for delta in deltas:
        match delta:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallBegin(index, name):
                assert index == len(calls)
                calls.append([name, ""])
            case CallArguments(index, text):
                assert index == len(calls) - 1, "one call after the other"
                calls[index][1] += text
    return {"content": content, "reasoning": reasoning, "calls": [tuple(call) for call in calls]}


def read(pieces: Iterable[str], form: MessageForm) -> Told:
    reader = MessageReader(form)
    deltas = [delta for piece in pieces for delta in reader.push(piece)]
    return told(deltas + reader.finish())


def form(calls: str | None = None, reasoning: str | None = None, *, thinking: bool = False) -> MessageForm:
    return MessageForm(reasoning, thinking, calls=calls, tools=TOOLS)


ARGUMENTS = '{"city": "Ol\\"d <b> \\\\", "days": 3, "deep": {"a": [1, "}"]}}'
OBJECT = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'
SAID = [("weather", json.loads(ARGUMENTS)), ("clock", {})]
WRITTEN = {
    "hermes": f"<tool_call>\n{OBJECT}\n</tool_call>\n"
    '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
    "mistral": f'[TOOL_CALLS][{OBJECT}, {{"name": "clock", "arguments": {{}}}}]',
    "qwen3_coder": '<tool_call>\n<function=weather>\n<parameter=city>\nOl"d <b> \\\n</parameter>\n<parameter=days>\n3\n'
    '</parameter>\n<parameter=deep>\n{"a": [1, "}"]}\n</parameter>\n</function>\n</tool_call>\n'
    "<tool_call>\n<function=clock>\n</function>\n</tool_call>",
    "glm45": '<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Ol"d <b> \\</arg_value>\n<arg_key>days</arg_key>\n'
    '<arg_value>3</arg_value>\n<arg_key>deep</arg_key>\n<arg_value>{"a": [1, "}"]}</arg_value>\n</tool_call>\n'
    "<tool_call>clock\n</tool_call>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{ARGUMENTS}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>clock\n```json\n{{}}\n"
    "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{ARGUMENTS}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>clock<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    f"{ARGUMENTS}<|tool_call_end|><|tool_call_begin|>functions.clock:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    "<|tool_calls_section_end|>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Ol"d <b> \\</parameter>\n'
    '<parameter name="days">3</parameter>\n<parameter name="deep">{"a": [1, "}"]}</parameter>\n</invoke>\n'
    '<invoke name="clock">\n</invoke>\n</minimax:tool_call>',
    "openai": f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
    "<|start|>assistant to=functions.clock<|channel|>commentary<|message|><|call|>",
    "required": f'[{OBJECT}, {{"name": "clock", "parameters": {{}}}}]',
}
"""Two calls, as each format has them."""
OTHER_FORMS = {
    "mistral": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]clock{{}}",
    "hermes": f'<tool_call>{{"arguments": {json.dumps(ARGUMENTS)}, "id": [1], "name": "weather"}}</tool_call>'
    '<tool_call>{"name": "clock", "arguments": null}',
    "qwen3_coder": WRITTEN["qwen3_coder"].replace("<tool_call>\n", "").replace("\n</tool_call>", ""),
    "glm45": WRITTEN["glm45"].replace("\n", ""),
    "minimax_m2": WRITTEN["minimax_m2"].replace("\n", ""),
    "kimi_k2": WRITTEN["kimi_k2"]
    .replace("|>", "|> ")
    .replace("functions.", "")
    .removesuffix("<|tool_calls_section_end|> "),
    "openai": WRITTEN["openai"].replace("<|call|>", "", 1),
}


def as_said(calls: Iterable[tuple[str, str]]) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(("name", "text"), [*WRITTEN.items(), *OTHER_FORMS.items()])
def test_calls(name: str, text: str) -> None:
    found = read([text], form(name))
    assert as_said(found["calls"]) == SAID
    assert (found["content"], found["reasoning"]) == ("", "")


def test_named() -> None:
    assert read([f" {ARGUMENTS} "], form("named")) == {
        "content": "", "reasoning": "", "calls": [("weather", ARGUMENTS)],
    }  # fmt: skip


PLAIN = sorted(set(CALL_FORMATS) - {"openai", "harmony", "gpt-oss"})


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("text", ["", " ", "Hello.\n", "a < b <tool_cal", "\n x"])
def test_text_without_calls_is_content(name: str, text: str) -> None:
    assert read([text], form(name)) == {"content": text, "reasoning": "", "calls": []}


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"openai", "required"}))
def test_content_before_and_behind(name: str) -> None:
    found = read([f"Let me see.\n\n{WRITTEN[name]}\n"], form(name))
    assert as_said(found["calls"]) == SAID
    assert found["content"] == "Let me see."


BROKEN = {
    "hermes": [
        "<tool_call>{'name': 3}</tool_call>",
        "<tool_call>oh",
        '<tool_call>{"name": "weather"',
        "<tool_call>{}",
    ],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS][oh]", "[TOOL_CALLS]" + "x" * 300],
    "qwen3_coder": ["<tool_call> oh", "<function=", "<tool_call><function=>"],
    "glm45": ["<tool_call>", "<tool_call>\n\n", "<tool_call>" + "x" * 300],
    "kimi_k2": ["<|tool_calls_section_begin|>oh", "<|tool_calls_section_begin|><|tool_call_begin|>clock"],
    "minimax_m2": [
        "<minimax:tool_call>oh",
        "<minimax:tool_call>\n<invoke name=",
        '<minimax:tool_call><invoke name="">',
    ],
    "deepseek_v3": ["<｜tool▁calls▁begin｜>oh", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function"],
    "openai": ["<|channel|>analysis", "plain text", "<|start|>" + "x" * 2000],
    "required": ["{}", "no"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_what_is_no_call_is_content_as_it_is(name: str, text: str) -> None:
    assert read([text], form(name)) == {"content": text, "reasoning": "", "calls": []}


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek_v31", "openai"])
def test_arguments_are_told_as_they_come(name: str) -> None:
    """While a call is written the client has what there is of it."""
    cut = WRITTEN[name].index('"days"')
    found = told(MessageReader(form(name)).push(WRITTEN[name][:cut]))
    assert found["calls"] == [("weather", ARGUMENTS[: ARGUMENTS.index('"days"')])]


@pytest.mark.parametrize("name", ["qwen3_coder", "glm45"])
def test_what_is_cut_off_within_tags_is_still_json(name: str) -> None:
    cut = WRITTEN[name].index("<b>")
    (call,) = read([WRITTEN[name][:cut]], form(name))["calls"]
    assert json.loads(call[1]) == {"city": 'Ol"d '}


@pytest.mark.parametrize(
    ("text", "value"),
    [("null", None), ("None", None), ("x", "x"), ("3", "3"), ("", "")],
)
def test_values_are_what_the_schema_allows(text: str, value: Any) -> None:
    written = f"<tool_call><function=weather><parameter=maybe>\n{text}\n</parameter></function></tool_call>"
    (call,) = read([written], form("qwen3_coder"))["calls"]
    assert json.loads(call[1]) == {"maybe": value}


@pytest.mark.parametrize("text", ["3.0", " 3\n", "x", "NaN", "[NaN]", "1e400"])
def test_a_value_of_another_type_is_a_string(text: str) -> None:
    written = f"<tool_call><function=weather><parameter=days>{text}</parameter></function></tool_call>"
    (call,) = read([written], form("qwen3_coder"))["calls"]
    assert json.loads(call[1])["days"] in (3, text)


def test_reasoning() -> None:
    both = form("hermes", "qwen3")
    found = read([f"<think>\nWell,\n\nyes.\n</think>\n\nI look.\n{WRITTEN['hermes']}"], both)
    assert (found["reasoning"], found["content"]) == ("Well,\n\nyes.", "I look.")
    assert as_said(found["calls"]) == SAID
    assert read(["Well.</think>Yes."], form(reasoning="qwen3", thinking=True)) == {
        "content": "Yes.", "reasoning": "Well.", "calls": [],
    }  # fmt: skip
    assert read(["a <think> b"], form(reasoning="qwen3"))["content"] == "a <think> b"
    assert read(["Well"], form(reasoning="deepseek_r1", thinking=True))["reasoning"] == "Well"


def test_calls_within_reasoning_are_no_calls() -> None:
    found = read([f"<think>{WRITTEN['hermes']}</think>no"], form("hermes", "qwen3"))
    assert (found["calls"], found["content"]) == ([], "no")


def test_harmony_tells_reasoning_and_answer() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>analysis<|message|>Yes.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Done.<|return|>"
    )
    for one in (form("openai"), form(reasoning="openai_gptoss"), form("openai", "openai_gptoss")):
        assert read([text], one) == {"content": "Done.", "reasoning": "Hm.\nYes.", "calls": []}


@pytest.mark.parametrize(
    ("prompt", "reasoning", "within"),
    [
        ("<|assistant|>", "qwen3", False),
        ("<|assistant|><think>\n", "qwen3", True),
        ("<think>x</think> <|assistant|>", "qwen3", False),
        ("<|assistant|>", "deepseek_r1", True),
        ("<|assistant|><think></think>", "deepseek_r1", False),
    ],
)
def test_where_an_answer_begins(prompt: str, reasoning: str, within: bool) -> None:
    assert begins_within(prompt, reasoning) is within


MARKS = [
    "<tool_call>", "</tool_call>", "{", "}", '"', '{"name": "f", "arguments": {', "\\", "[", "]", ",", ": ", "\n", " ",
    "<function=f>", "</function>", "<parameter=days>", "</parameter>", "f", "é", "<arg_key>", "</arg_key>", "<arg_value>",
    "</arg_value>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>", "<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "f:0",
    "<|tool_call_end|>", "<|tool_calls_section_end|>", "<minimax:tool_call>", '<invoke name="f">', "</invoke>",
    '<parameter name="days">', "</minimax:tool_call>", "function",
    "```json\n", "```", "[TOOL_CALLS]", "[ARGS]", "<|channel|>", "analysis", "<|message|>",
    " to=functions.f", "<|start|>", "<|end|>", "<think>", "</think>", "3", "null", '"name"', '"arguments"',
]  # fmt: skip
pieces = st.lists(st.sampled_from(MARKS), max_size=14).map("".join)
FORMS = [
    *(form(name) for name in (*WRITTEN, "named")),
    *(form(None, name, thinking=thinking) for name in REASONING_FORMATS for thinking in (False, True)),
    form("hermes", "qwen3"),
    form("glm45", "deepseek_r1", thinking=True),
]


def cuts(text: str, places: Iterable[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@hypothesis_settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(FORMS), st.lists(st.integers(0, 10_000), max_size=8))
def test_however_the_text_is_cut(data: st.DataObject, one: MessageForm, places: list[int]) -> None:
    known = [*WRITTEN.values(), *OTHER_FORMS.values()]
    text = data.draw(pieces | st.sampled_from(known) | st.builds(str.__add__, pieces, st.sampled_from(known)))
    whole = read([text], one)
    assert read(cuts(text, places), one) == whole
    assert read(text, one) == whole, "one character after the other"


@pytest.mark.parametrize(("name", "text"), [*WRITTEN.items(), *OTHER_FORMS.items()])
def test_at_every_cut(name: str, text: str) -> None:
    whole = read([text], form(name))
    for place in range(len(text)):
        assert read([text[:place], text[place:]], form(name)) == whole


TRANSCRIPTS: dict[str, tuple[MessageForm, str, str, str]] = {
    "qwen3": (
        form("hermes", "qwen3"),
        f"<think>\nThey want <both>.\n\nSo two calls.\n</think>\n\nOne moment.\n{WRITTEN['hermes']}",
        "They want <both>.\n\nSo two calls.", "One moment.",
    ),
    "qwen3 without reasoning": (form("hermes", "qwen3"), f"<think>\n\n</think>\n\n{WRITTEN['hermes']}", "", ""),
    "qwen3-coder": (form("qwen3_coder"), f"I look: a < b.\n\n{WRITTEN['qwen3_coder']}", "", "I look: a < b."),
    "deepseek r1": (
        form("deepseek_v3", "deepseek_r1", thinking=True),
        f"Let me see <｜tool▁ what.\n</think>\n\nOf course.\n\n{WRITTEN['deepseek_v3']}",
        "Let me see <｜tool▁ what.", "Of course.",
    ),
    "deepseek v3.1": (
        form("deepseek_v31", "deepseek_v3", thinking=True), f"Hm.</think>{WRITTEN['deepseek_v31']}", "Hm.", "",
    ),
    "glm 4.5": (
        form("glm45", "glm45"), f"<think>Both.</think>\nI ask.\n{WRITTEN['glm45']}", "Both.", "I ask.",
    ),
    "kimi k2": (form("kimi_k2", "kimi_k2"), f"<think>Hm.</think>Now.{WRITTEN['kimi_k2']}", "Hm.", "Now."),
    "minimax m2": (
        form("minimax_m2", "minimax_m2", thinking=True),
        f"Hm.\n</think>\n\nNow.\n{WRITTEN['minimax_m2']}\n", "Hm.", "Now.",
    ),
    "mistral": (form("mistral"), f"Wait [TOOL_ ... {OTHER_FORMS['mistral']}", "", "Wait [TOOL_ ..."),
    "gpt-oss": (
        form("openai", "openai_gptoss"),
        "<|channel|>analysis<|message|>Two <|calls.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        f"<|end|><|start|>assistant{WRITTEN['openai']}",
        "Two <|calls.", "I look.",
    ),
}  # fmt: skip
"""Whole answers as each family writes them: reasoning, a word before, and both calls."""


@pytest.mark.parametrize("family", TRANSCRIPTS)
def test_a_whole_answer_at_every_cut(family: str) -> None:
    one, text, reasoning, content = TRANSCRIPTS[family]
    whole = read([text], one)
    assert (whole["reasoning"], whole["content"]) == (reasoning, content)
    assert as_said(whole["calls"]) == SAID
    assert read(text, one) == whole, "one character after the other"
    for place in range(len(text)):
        assert read([text[:place], text[place:]], one) == whole, text[:place]


def test_every_format_has_an_answer() -> None:
    """Of all parsers of calls and of reasoning, by whichever of their names."""
    forms = [one for one, *_ in TRANSCRIPTS.values()]
    assert {CALL_FORMATS[one.calls].make for one in forms if one.calls} == {
        known.make for known in CALL_FORMATS.values()
    }
    assert {one.reasoning for one in forms} >= {
        "qwen3",
        "glm45",
        "deepseek_v3",
        "deepseek_r1",
        "openai_gptoss",
        "kimi_k2",
        "minimax_m2",
    }
