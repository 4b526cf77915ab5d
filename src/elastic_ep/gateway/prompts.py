"""From what a request says to the model to tokens: templates, truncation, and whether there is room for an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from elastic_ep.gateway.bodies import Chat, Generating
from elastic_ep.gateway.conversation import FunctionCall, Message
from elastic_ep.gateway.errors import ApiError, prompt_too_long
from elastic_ep.gateway.fields import LONE_SURROGATE, bad_value, is_encodable, unsupported
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import CannotContinue, ChatTemplateError, ChatTokenizer, PromptTooLong
from elastic_ep.models.config_json import as_integer


class PromptReader:
    """Every method raises `ApiError`, and takes as long as the text is."""

    def __init__(self, settings: ApiSettings, text: ChatTokenizer) -> None:
        self._settings = settings
        self._text = text
        # Every token covers some bytes of the text; what normalisation shrinks away is covered by the 4.
        self._max_prompt_bytes = 4 * text.max_token_bytes * settings.max_model_len

    def conversation(self, values: Chat) -> tuple[str, tuple[int, ...]]:
        prompt = self._render(values)
        return prompt, tuple(self.encode(prompt, "messages", add_special_tokens=values.add_special_tokens))

    def encode(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text that may be far too long: that is seen without tokenising it."""
        if len(text) > self._max_prompt_bytes:
            raise self._too_long(len(text), param)
        try:
            return self._text.encode(text, add_special_tokens=add_special_tokens)
        # The tokenizers library raises bare Exception, for example for a character it has no token for.
        except Exception as error:
            raise bad_value(param, f"cannot be tokenised: {error}") from error

    def cut(self, prompt: tuple[int, ...], values: Generating, asked: int | None) -> tuple[int, ...]:
        """What 'truncate_prompt_tokens' leaves of a prompt to which `asked` tokens are to be generated."""
        keep = values.truncate_prompt_tokens
        if keep is None:
            return prompt
        if keep == 0:
            raise bad_value("truncate_prompt_tokens", "must be at least 1, or -1.")
        if keep < 0:
            keep = self.most(asked)
        return prompt[-keep:] if values.truncation_side == "left" else prompt[:keep]

    def most(self, asked: int | None) -> int:
        """Tokens of a prompt to which `asked` are to be generated, one at least."""
        return max(1, self._settings.max_model_len - (asked or 1))

    def room(self, prompt: tuple[int, ...], asked: int | None, param: str, *, default: int) -> int:
        """How many tokens may be generated: what was asked for, or `default` as far as the context goes."""
        longest = self._settings.max_model_len
        if not prompt:
            raise bad_value(param, "must not be empty: it has no tokens.")
        if len(prompt) >= longest:
            raise prompt_too_long(longest, str(len(prompt)), param)
        if asked is None:
            return min(default, longest - len(prompt))
        if len(prompt) + asked > longest:
            raise ApiError(
                f"This model's maximum context length is {longest} tokens. You asked for "
                f"{len(prompt) + asked} ({len(prompt)} in the {param}, {asked} to generate).",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return asked

    def check_known(self, prompt: tuple[int, ...], param: str) -> None:
        """Refuse tokens that the tokenizer has and the model has not: a rank has no embedding for them."""
        known = self._settings.vocab_size
        if max(prompt) < known:
            return
        token = next(token for token in prompt if token >= known)
        raise ApiError(
            f"'{param}' holds the token {self._text.token_name(token)!r}, whose id {token} the tokenizer knows and the "
            f"model does not: it has a vocabulary of {known}.",
            param=param,
            code="token_unknown_to_model",
        )

    def _render(self, values: Chat) -> str:
        template = values.chat_template or None
        documents = values.documents
        try:
            if documents and not self._text.template_uses("documents", template):
                raise unsupported(
                    "documents", "cannot be honoured here: the chat template does not show documents."
                )
            self._check_shown(values, template)
            prompt = self._text.render_chat(
                [_for_template(message) for message in values.messages],
                add_generation_prompt=values.begins_a_message,
                continue_final_message=values.continue_final_message,
                tools=values.tools or None,
                documents=documents,
                chat_template=template,
                variables=_variables(values),
                max_characters=self._max_prompt_bytes,
            )
        except PromptTooLong as error:
            raise self._too_long(error.characters, "messages") from error
        except CannotContinue as error:
            raise ApiError(str(error), param="continue_final_message", code="chat_template_error") from error
        except ChatTemplateError as error:
            param = "chat_template" if template else "messages"
            raise ApiError(str(error), param=param, code="chat_template_error") from error
        # What only the template knows can carry what `ChatTokenizer` keeps out of messages.
        if not is_encodable(prompt):
            told = {"chat_template_kwargs": values.chat_template_kwargs, "tools": values.tools}
            raise bad_value(next((name for name in told if told[name]), "messages"), LONE_SURROGATE)
        return prompt

    def _check_shown(self, values: Chat, template: str | None) -> None:
        """Raises `ApiError` and `ChatTemplateError` for what the chat template would leave out."""
        asked = values.tool_choice in (None, "auto", "none")
        if values.tools and asked and not self._text.template_uses("tools", template, with_tools=True):
            raise unsupported("tools", "cannot be honoured here: the chat template does not show tools.")
        effort = values.reasoning_effort
        if effort not in (None, "medium") and not self._text.template_uses("reasoning_effort", template):
            message = 'cannot be honoured here with a value other than "medium": the chat template does not look at it.'
            raise unsupported("reasoning_effort", message)
        for place, said in enumerate(values.messages):
            if said.get("tool_calls") and not self._text.template_mentions("tool_calls", template):
                name = f"messages[{place}].tool_calls"
                raise unsupported(name, "cannot be honoured here: the chat template does not show calls.")

    def _too_long(self, characters: int, param: str) -> ApiError:
        at_least = characters // self._text.max_token_bytes
        return prompt_too_long(self._settings.max_model_len, f"at least {at_least}", param)


def without_cut_tokens(body: dict[str, Any], longest: int) -> dict[str, Any]:
    """`body` with prompts of token ids as long as 'truncate_prompt_tokens' leaves them: the rest is not looked at.

    `longest`: what is left of one at most where as many are to be kept as fit. `PromptReader.cut` has the last word.
    """
    keep, prompt = as_integer(body.get("truncate_prompt_tokens")), body.get("prompt")
    if type(keep) is not int or not isinstance(prompt, list) or keep == 0 or keep < -1:
        return body
    keep = longest if keep < 0 else keep
    part = slice(None, keep) if body.get("truncation_side") == "right" else slice(-keep, None)
    if prompt and isinstance(prompt[0], list):
        cut = [one[part] if isinstance(one, list) else one for one in prompt]
    else:
        cut = prompt if prompt and isinstance(prompt[0], str) else prompt[part]
    return {**body, "prompt": cut}


def _for_template(message: Message) -> Mapping[str, Any]:
    """The arguments of calls as objects, which is what templates expect, as far as they are."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {
        **message,
        "tool_calls": [
            {"type": "function", **call, "function": _with_object(call["function"])} for call in calls
        ],
    }


def _with_object(call: FunctionCall) -> dict[str, Any]:
    arguments = call.get("arguments") or "{}"
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        parsed = None
    return {**call, "arguments": parsed if isinstance(parsed, dict) else arguments}


def _variables(values: Chat) -> dict[str, Any] | None:
    given, effort = values.chat_template_kwargs, values.reasoning_effort
    return given if effort is None else {"reasoning_effort": effort, **(given or {})}
