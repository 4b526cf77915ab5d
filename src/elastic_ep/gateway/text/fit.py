"""Where a tokenizer and a model disagree: found at start, said in a line each, and dealt with request by request."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.gateway.text.content_form import ContentForm
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class TextFit:
    """`eos_token_ids`: those that the tokenizer knows and the model's configuration does not. `notices` are lines."""

    eos_token_ids: tuple[int, ...]
    notices: tuple[str, ...]


def fit(text: ChatTokenizer, model: ModelSpec) -> TextFit:
    ends, said = _ends(text, model)
    return TextFit(ends, (*said, *_unknown_tokens(text, model), *_templates(text)))


def _ends(text: ChatTokenizer, model: ModelSpec) -> tuple[tuple[int, ...], tuple[str, ...]]:
    name = text.special_tokens.get("eos_token")
    if name is None:
        if model.eos_token_ids:
            return (), ()
        return (), ("no token is known to end a text: requests run to max_tokens unless they give 'stop'",)
    token = text.token_id(name)
    if token is None or token in model.eos_token_ids:
        return (), ()
    if token >= model.vocab_size:
        return (), (f"the tokenizer's eos_token {name!r} (id {token}) is not in the model's vocabulary",)
    known = ", ".join(map(str, model.eos_token_ids)) or "none"
    return (token,), (
        f"the tokenizer's eos_token {name!r} (id {token}) is not among the model's eos_token_id ({known}): it ends a "
        "text, too",
    )


def _unknown_tokens(text: ChatTokenizer, model: ModelSpec) -> tuple[str, ...]:
    unknown = text.tokens_from(model.vocab_size)
    if not unknown:
        return ()
    more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return (
        f"the tokenizer has {text.token_name(unknown[0])!r} (id {unknown[0]}){more}, and the model a vocabulary of "
        f"{model.vocab_size}: requests with such tokens get 400",
    )


def _templates(text: ChatTokenizer) -> tuple[str, ...]:
    return tuple(
        f"the {name} chat template gets the content of messages as a list of parts: --chat-template-content-format "
        "string gives it strings"
        for name, form in text.content_forms.items()
        if form is ContentForm.PARTS
    )
