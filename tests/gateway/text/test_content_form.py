"""Templates get the content of messages in the form that they want, whichever of the two a client sends."""

from __future__ import annotations

import pytest

from elastic_ep.gateway.text.content_form import ContentForm
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from tests.gateway.fakes import byte_level_tokenizer
from tests.gateway.text.templates import WHOLE

STRING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}",
    "{% for m in messages %}{% for line in m.content.split('\n') %}{{ line }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for t in m.tool_calls or [] %}{{ t }}{% endfor %}{{ m.content[:99] }}{% endfor %}",
    "{{ messages[0].content + messages[-1]['content'] }}",
    "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    "{% for d in documents or [] %}{% for part in d.content %}{{ part }}{% endfor %}{% endfor %}"
    "{{ messages[0].content }}{{ messages[1].content }}",
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
    "{% macro show(c) %}{% if c is not string %}{% for p in c %}{{ p.text }}{% endfor %}{% else %}{{ c }}{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% for m in messages %}{% set c = m['content'] %}{% if c is string %}{{ c }}{% else %}"
    "{{ c | map(attribute='text') | join }}{% endif %}{% endfor %}",
)
PARTS = (
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m.get('content') %}{{ p['text'] }}{% endfor %}{% endfor %}",
    "{% for m in messages[1:] %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    "{% for p in messages[0].content %}{{ p.text }}{% endfor %}",
    "{% set all = messages %}{% for m in all %}{% set c = m.content %}{% for p in c %}{{ p.text }}"
    "{% endfor %}{% endfor %}",
    "{% set ns = namespace(rest=messages) %}{% for m in ns.rest %}{% for p in m.content if p.type == 'text' %}"
    "{{ p.text }}{% endfor %}{% endfor %}",
    "{% set ns = namespace() %}{% for m in messages %}{% set ns.c = m.content %}{% for p in ns.c %}{{ p.text }}"
    "{% endfor %}{% endfor %}",
    "{% macro show(content) %}{% for p in content %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
    "{% macro show(a, b) %}{% for p in b %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ show(1, b=m['content']) }}{% endfor %}",
    "{% macro turn(m) %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "{% for m in messages %}{{ m.content[0].text }}{% endfor %}",
    "{% for m in messages %}{{ m.content[0]['text'] }}{% endfor %}",
    "{% for m in messages %}{{ m.content | map(attribute='text') | join('') }}{% endfor %}",
    "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}"
    "{% endfor %}",
    "{% for i in range(messages | length) %}{% for p in messages[i].content %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages | list %}{% for p in (m.content or []) %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% with c = m.content %}{% for p in c %}{{ p.text }}{% endfor %}{% endwith %}{% endfor %}",
    "{% for m in messages if m.role != 'tool' %}{% for p in (m.content if m.content else []) %}{{ p.text }}{% endfor %}"
    "{% endfor %}",
    "{% for m in messages %}{% generation %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% endgeneration %}{% endfor %}",
)
PLAIN = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
IN_PARTS = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in PLAIN]


def form_of(template: str) -> ContentForm:
    return ChatTokenizer(byte_level_tokenizer(), template).content_forms["default"]


@pytest.mark.parametrize("template", STRING)
def test_templates_that_want_strings(template: str) -> None:
    assert form_of(template) is ContentForm.STRING


@pytest.mark.parametrize("template", EITHER)
def test_templates_that_take_either(template: str) -> None:
    assert form_of(template) is ContentForm.EITHER


@pytest.mark.parametrize("template", PARTS)
def test_templates_that_want_parts(template: str) -> None:
    assert form_of(template) is ContentForm.PARTS


@pytest.mark.parametrize("template", STRING + EITHER + PARTS)
@pytest.mark.parametrize("messages", [PLAIN, IN_PARTS], ids=["strings", "parts"])
def test_nothing_that_was_said_gets_lost(template: str, messages: list[dict[str, object]]) -> None:
    prompt = ChatTokenizer(byte_level_tokenizer(), template).render_chat(messages)
    assert "ping" in prompt
    assert "pong" in prompt
    assert "'text'" not in prompt, "a list of parts, written out"


def test_templates_of_well_known_models() -> None:
    forms = {name: form_of(template) for name, template in WHOLE.items()}
    assert forms.pop("vision") is ContentForm.EITHER
    assert set(forms.values()) == {ContentForm.STRING}


def test_texts_of_several_parts_are_lines_of_one_string() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text = ChatTokenizer(byte_level_tokenizer(), STRING[0])
    assert text.render_chat([{"role": "user", "content": parts}]) == "one\ntwo"


@pytest.mark.parametrize("form", [ContentForm.STRING, ContentForm.PARTS])
def test_what_an_operator_asks_for_is_not_guessed(form: ContentForm) -> None:
    text = ChatTokenizer(byte_level_tokenizer(), "{{ messages[0].content is string }}", content_form=form)
    for messages in (PLAIN, IN_PARTS):
        assert text.render_chat(messages) == str(form is ContentForm.STRING)
