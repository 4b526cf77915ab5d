"""Token ids, special tokens and templates of a folder are those that transformers' fast tokenizer finds there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from elastic_ep.gateway.text.tokenizer import ChatTemplateError, ChatTokenizer
from tests.gateway.fakes import byte_level_tokenizer

MESSAGES = [{"role": "user", "content": "Anna has <tool> 12"}]
TEXT = "<|im_start|>Anna <tool>  has <one> 12 <two><late>  apples<|im_end|> <think> <é ▁>"

contents = st.sampled_from(
    ["<|im_end|>", "<|endoftext|>", "<tool>", "<one>", "<two>", "<late>", "<think>", "Anna", "ap", "Ġhas"]
)
flags = st.fixed_dictionaries(
    {
        "lstrip": st.booleans(),
        "rstrip": st.booleans(),
        "normalized": st.booleans(),
        "single_word": st.booleans(),
    }
)


def as_object(content: str, flags: dict[str, bool], special: bool) -> dict[str, Any]:
    return {"content": content, **flags, "special": special}


added = st.builds(as_object, contents, flags, st.booleans())
token = contents | st.builds(lambda one: {"__type": "AddedToken", **one}, added)
configs = st.fixed_dictionaries(
    {},
    optional={
        "bos_token": token | st.none(),
        "eos_token": token,
        "pad_token": token,
        "unk_token": token | st.none(),
        "image_token": contents,
        "extra_special_tokens": st.lists(contents, max_size=2)
        | st.dictionaries(st.just("boi_token"), contents),
        "additional_special_tokens": st.lists(contents, max_size=2),
        "added_tokens_decoder": st.dictionaries(st.integers(0, 900).map(str), added, max_size=3),
        "split_special_tokens": st.booleans(),
        "add_bos_token": st.booleans(),
    },
)
old_maps = st.fixed_dictionaries(
    {},
    optional={
        "eos_token": contents
        | st.builds(lambda content, flags: {"content": content, **flags}, contents, flags),
        "bos_token": contents,
        "additional_special_tokens": st.lists(contents, max_size=2),
    },
)


old_added = st.lists(contents, max_size=2, unique=True).map(
    lambda tokens: dict(zip(tokens, (306, 500), strict=False))
)
"""Under ids that `tokenizer.json` gives to nobody."""


def folder_with(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(configs, st.none() | old_maps, st.none() | old_added)
def test_ids_and_special_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    config: dict[str, Any],
    special_map: dict[str, Any] | None,
    added: dict[str, int] | None,
) -> None:
    folder = folder_with(
        tmp_path_factory.mktemp("model"),
        tokenizer_config=config, special_tokens_map=special_map, added_tokens=added,
    )  # fmt: skip
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = ChatTokenizer.load(folder)
    assert dict(ours.special_tokens) == theirs.special_tokens_map
    for special in (True, False):
        ids = theirs(TEXT, add_special_tokens=special)["input_ids"]
        assert ours.encode(TEXT, add_special_tokens=special) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.vocab_size == len(theirs)


CONFIG_TEMPLATES: list[Any] = [
    None,
    "in the config",
    [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "listed for tools"}],
    [{"name": "tool_use", "template": "listed for tools"}],
    {"default": "mapped", "rag": "mapped rag"},
]


@pytest.mark.parametrize("in_config", CONFIG_TEMPLATES)
@pytest.mark.parametrize("in_file", [None, "in a file"])
@pytest.mark.parametrize("in_folder", [(), ("rag",), ("tool_use", "rag"), ("default",)])
def test_templates_are_found_and_chosen(
    tmp_path: Path, in_config: Any, in_file: str | None, in_folder: tuple[str, ...]
) -> None:
    folder = folder_with(tmp_path, tokenizer_config={"chat_template": in_config, "eos_token": "<|im_end|>"})
    if in_file:
        (folder / "chat_template.jinja").write_text(in_file)
    for name in in_folder:
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"in the folder: {name}")
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = ChatTokenizer.load(folder)
    for wanted in (None, "default", "tool_use", "rag", "a whole template"):
        for tools in (None, [], [{"type": "function", "function": {"name": "clock"}}]):
            try:
                expected = theirs.apply_chat_template(
                    MESSAGES, tools=tools, chat_template=wanted, tokenize=False
                )
            except ValueError:
                expected = None
            try:
                found = ours.render_chat(
                    MESSAGES, tools=tools, chat_template=wanted, add_generation_prompt=False
                )
            except ChatTemplateError:
                found = None
            assert found == expected


def test_padding_and_truncation_of_the_file_touch_no_prompt(tmp_path: Path) -> None:
    folder = folder_with(tmp_path)
    tokenizer = byte_level_tokenizer().__class__.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64, pad_token="<|endoftext|>")
    tokenizer.save(str(folder / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = ChatTokenizer.load(folder)
    assert ours.encode(TEXT) == theirs(TEXT)["input_ids"]
    assert dict(ours.special_tokens) == theirs.special_tokens_map


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": {"1": {}}}, "added_tokens_decoder"),
        ("added_tokens", {"<a>": "1"}, "added_tokens.json"),
        ("special_tokens_map", [], "special_tokens_map.json"),
        ("tokenizer_config", {"chat_template": {"default": "{{"}}, "the chat template does not parse"),
        (
            "tokenizer_config",
            {"chat_template": {"rag": "{% generation %}"}},
            "the chat template 'rag' does not parse",
        ),
        ("tokenizer_config", {"chat_template": "{{ 1 | no_such_filter }}"}, "no_such_filter"),
    ],
)
def test_what_is_broken_is_said_in_one_line(tmp_path: Path, name: str, content: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        ChatTokenizer.load(folder_with(tmp_path, **{name: content}))
    assert "\n" not in str(caught.value)
