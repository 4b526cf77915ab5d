"""What is said at start, and done, where a tokenizer and a model disagree; and the flags about chat templates."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from elastic_ep.config import ConfigError, ServeConfig
from elastic_ep.gateway.text.fit import TextFit, fit
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.models.registry import load_spec
from elastic_ep.plan import make_plan
from elastic_ep.run import BUNDLED_MODEL, parse

MODEL = load_spec(BUNDLED_MODEL)
TOKENIZER = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json"))
END = TOKENIZER.token_to_id("<|end|>")
ASKED = [{"role": "user", "content": "Anna"}]


def fitted(tokenizer: Tokenizer = TOKENIZER, eos: str | None = "<|end|>", **model: Any) -> TextFit:
    special = {} if eos is None else {"eos_token": eos}
    return fit(ChatTokenizer(tokenizer, None, special), replace(MODEL, **model))


def test_what_agrees_says_nothing() -> None:
    assert fitted() == TextFit((), ())
    assert fitted(eos=None) == TextFit((), ())
    assert fitted(eos_token_ids=(5, END)) == TextFit((), ())


@pytest.mark.parametrize("known", [(), (5,), (5, 6)])
def test_the_tokenizers_end_of_turn_ends_a_text_and_is_said(known: tuple[int, ...]) -> None:
    found = fitted(eos_token_ids=known)
    assert found.eos_token_ids == (END,)
    (notice,) = found.notices
    assert "<|end|>" in notice
    assert f"id {END}" in notice


def test_nothing_that_ends_a_text_is_said() -> None:
    found = fitted(eos=None, eos_token_ids=())
    assert found.eos_token_ids == ()
    assert "max_tokens" in found.notices[0]


@pytest.mark.parametrize("more", [1, 3])
def test_tokens_that_the_model_has_not_are_said_with_both_numbers(more: int) -> None:
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken(f"<|new{place}|>") for place in range(more)])
    found = fitted(tokenizer, eos="<|new0|>", vocab_size=size)
    assert found.eos_token_ids == (), "nobody can generate it"
    (end, tokens) = found.notices
    assert "<|new0|>" in end
    for part in ("<|new0|>", f"id {size}", f"vocabulary of {size}", "400"):
        assert part in tokens
    assert ("2 more" in tokens) == (more == 3)
    assert fitted(tokenizer, vocab_size=size + more) == TextFit((), ()), "a padded vocabulary is no fault"


def copy_of_the_model(tmp_path: Path, **config: Any) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def configured(*flags: str) -> ServeConfig:
    return parse(["--device", "cpu", *flags])


def test_the_flags_for_templates(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    )
    plan = make_plan(configured("--chat-template", str(tmp_path / "mine.jinja")))
    assert plan.text.render_chat(ASKED) == "Anna"
    assert "--chat-template-content-format" in plan.text_fit.notices[0]
    plan = make_plan(configured("--chat-template", "{{ messages[0].content is string }}"))
    assert plan.text.render_chat(ASKED) == "True"
    given = "{{ messages[0].content is string }}"
    plan = make_plan(configured("--chat-template", given, "--chat-template-content-format", "openai"))
    assert plan.text.render_chat(ASKED) == "False"
    loaded = pickle.loads(pickle.dumps(plan.load_text))()
    assert loaded.render_chat(ASKED) == "False", "the process that reads large bodies has the same"


@pytest.mark.parametrize("given", ["no-such-file", "{% if %}", "/", ""])
def test_a_template_that_cannot_be_used_is_refused_in_one_line(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(configured("--chat-template", given))
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_template_that_does_not_parse_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = copy_of_the_model(tmp_path)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}\n{{ message.content }}\n{% endif %}"
    )
    with pytest.raises(ConfigError, match=r"does not parse.*line 3") as caught:
        make_plan(configured("--model", str(folder)))
    assert "\n" not in str(caught.value)
