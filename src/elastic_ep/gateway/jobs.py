"""From a request body to a `Job`: prompts as tokens, sampling parameters, everything checked."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import structlog

from elastic_ep.gateway.bodies import (
    Chat,
    Generating,
    StreamOptions,
    chat_body,
    completion_body,
    detokenize_body,
    tokenize_body,
)
from elastic_ep.gateway.conversation import ChatPrompt, FunctionCall, Message
from elastic_ep.gateway.errors import ApiError, prompt_too_long, unknown_model
from elastic_ep.gateway.fields import LONE_SURROGATE, Body, bad_value, is_encodable, read, unsupported
from elastic_ep.gateway.guided import GrammarReader, certain_arguments, certain_calls
from elastic_ep.gateway.messages.body import RENAMED as MESSAGES_NAMES
from elastic_ep.gateway.messages.body import Model, count_body, messages_body
from elastic_ep.gateway.messages.body import as_chat as messages_as_chat
from elastic_ep.gateway.parsers.base import Tool
from elastic_ep.gateway.parsers.registry import NAMED, REQUIRED, MessageForm, begins_within
from elastic_ep.gateway.responses.body import RENAMED as RESPONSES_NAMES
from elastic_ep.gateway.responses.body import About, Named, head, items_of, responses_body
from elastic_ep.gateway.responses.body import as_chat as responses_as_chat
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import CannotContinue, ChatTemplateError, ChatTokenizer, PromptTooLong
from elastic_ep.guided.grammars import BadGrammar
from elastic_ep.machines.requests.prefixes import beginnings
from elastic_ep.models.config_json import shown
from elastic_ep.wire.messages import Grammar, SamplingParams

log = structlog.get_logger()
# Below this the division by the temperature leaves one candidate anyway, or overflows: greedy, as in vLLM.
_GREEDY_BELOW = 1e-5
_COMPLETION_MAX_TOKENS = 16
_MOST_UNKNOWN = 20
_NO_OPTIONS = StreamOptions.model_construct()


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt of a job. `echo` is the text to show before the generated one; `beginnings` are hashes of its own."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    echo: str = ""
    beginnings: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What is shown of the generated tokens. `stop` counts from the token after the `min_tokens`-th on."""

    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Of the client's own."""
    min_tokens: int = 0
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    token_ids: bool = False
    prompt_token_ids: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    form: MessageForm | None = None
    """How the text is told into reasoning, content and calls; None: it is content."""


@dataclass(frozen=True, slots=True)
class Job:
    """A valid request: `n` choices for each part; choice j of part i has index i * n + j."""

    parts: tuple[Part, ...]
    n: int
    stream: bool
    output: Output
    request_id: str | None = None
    """What the client calls it."""
    unknown: tuple[str, ...] = ()
    """Fields that were ignored because nobody knows them, the first of them."""
    about: object = None
    """What an endpoint needs of its request besides. Picklable."""


@dataclass(frozen=True, slots=True)
class Previous:
    """Instead of a job: the request goes on with this response, whose conversation it cannot be read without."""

    id: str


def prepare(settings: ApiSettings) -> None:
    """HAZARD: to make the models takes tens of milliseconds: call it before an event loop runs. They are kept."""
    for make in (
        completion_body,
        chat_body,
        tokenize_body,
        detokenize_body,
        responses_body,
        messages_body,
        count_body,
    ):
        make(settings)


class JobReader:
    """Makes jobs from bodies. Every method raises `ApiError`, and takes as long as the body is: see `reading.py`."""

    def __init__(self, settings: ApiSettings, text: ChatTokenizer) -> None:
        self._settings = settings
        self._text = text
        self._grammars = GrammarReader(settings, text)
        self._completion_body = completion_body(settings)
        self._chat_body = chat_body(settings)
        self._responses_body = responses_body(settings)
        self._messages_body = messages_body(settings)
        self._count_body = count_body(settings)
        # Every token covers some bytes of the text; what normalisation shrinks away is covered by the 4.
        self._max_prompt_bytes = 4 * text.max_token_bytes * settings.max_model_len

    def completion(self, body: dict[str, Any]) -> Job:
        values = read(self._completion_body, _without_cut_tokens(body))
        self._check_model(values.model)
        logprobs = values.logprobs
        if values.echo and logprobs is not None:
            raise unsupported(
                "echo", "cannot be honoured with 'logprobs': prompts have no log-probabilities here."
            )
        if values.best_of not in (None, values.n):
            raise unsupported("best_of", "cannot be honoured here with a value other than n.")
        prompts = values.prompt
        self._check_choices(len(prompts), values.n)
        grammar = self._grammar(values)
        default = min(_COMPLETION_MAX_TOKENS, self._settings.defaults.max_tokens or _COMPLETION_MAX_TOKENS)
        parts = []
        for prompt in prompts:
            if isinstance(prompt, str):
                special = values.add_special_tokens
                encoded = tuple(self.encode(prompt, "prompt", add_special_tokens=special))
            else:
                encoded = tuple(prompt)
            ids = self._cut(encoded, values, values.max_tokens)
            limit = self._max_tokens(ids, values.max_tokens, "prompt", default=default)
            self._check_known(ids, "prompt")
            echo = ""
            if values.echo:
                echo = prompt if isinstance(prompt, str) and ids == encoded else self._text.decode(ids)
            parts.append(self._part(ids, self._sampling(values, limit, logprobs, grammar), values, echo))
        return _job(values, tuple(parts), logprobs)

    def responses(self, body: dict[str, Any], before: str | None) -> Job | Previous:
        """`before`: the conversation that it goes on with, if it does."""
        values = read(self._responses_body, body)
        if values.store and "store" in values.model_fields_set and not self._settings.responses_store_bytes:
            raise unsupported(
                "store", "cannot be honoured here: this server keeps none (--responses-store-mib)."
            )
        if values.previous_response_id is not None and before is None:
            return Previous(values.previous_response_id)
        earlier = json.loads(before) if before else []
        asked = items_of(values.input)
        items = [*earlier, *asked]
        job = self._as_chat(responses_as_chat(body, values, items, len(earlier)), RESPONSES_NAMES)
        about = About(
            head(values, self._settings),
            json.dumps(items),
            tuple(Named.of(item, place) for place, item in enumerate(asked)),
            values.store,
            values.background,
        )
        return replace(job, about=about, unknown=_names(values))

    def messages(self, body: dict[str, Any]) -> Job:
        values = read(self._messages_body, body)
        job = self._as_chat(messages_as_chat(body, values, self._model), MESSAGES_NAMES)
        return replace(job, unknown=_names(values))

    def count(self, body: dict[str, Any]) -> int:
        """Tokens of the prompt that a body of /v1/messages makes."""
        values = read(self._count_body, body)
        with _renamed(MESSAGES_NAMES):
            chat = read(self._chat_body, messages_as_chat(body, values, self._model))
            self._check_model(chat.model)
            return len(self._prompt(chat)[1])

    def chat_tokens(self, body: dict[str, Any]) -> tuple[int, ...]:
        """Of the prompt that the fields of a conversation in `body` make."""
        asked = {name: body[name] for name in (*ChatPrompt.model_fields, "model") if name in body}
        values = read(self._chat_body, asked)
        self._check_model(values.model)
        return self._prompt(values)[1]

    @property
    def _model(self) -> Model:
        text = self._text
        told = [
            text.has_chat_template and text.template_uses(name)
            for name in ("enable_thinking", "thinking_budget")
        ]
        return Model(*told, reasons=self._settings.reasoning_parser is not None)

    def _as_chat(self, body: dict[str, Any], names: Mapping[str, str]) -> Job:
        """The job of a conversation that another endpoint asked for; faults are told by that one's `names`."""
        with _renamed(names):
            return self.chat(body)

    def chat(self, body: dict[str, Any]) -> Job:
        values = read(self._chat_body, body)
        self._check_model(values.model)
        if values.top_logprobs and not values.logprobs:
            raise bad_value("top_logprobs", "needs 'logprobs' to be true.")
        logprobs = values.top_logprobs if values.logprobs else None
        self._check_choices(1, values.n)
        prompt, encoded = self._prompt(values)
        asked = values.max_completion_tokens
        asked = values.max_tokens if asked is None else asked
        ids = self._cut(encoded, values, asked)
        default = self._settings.defaults.max_tokens or self._settings.max_model_len
        limit = self._max_tokens(ids, asked, "messages", default=default)
        self._check_known(ids, "messages")
        grammar = self._grammar(values)
        form = self._form(values, prompt, grammar)
        if form is not None and form.calls in (NAMED, REQUIRED):
            grammar = self._certain(values, form, grammar)
        part = self._part(ids, self._sampling(values, limit, logprobs, grammar), values)
        return _job(values, (part,), logprobs, form)

    def _prompt(self, values: Chat) -> tuple[str, tuple[int, ...]]:
        prompt = self._render(values)
        return prompt, tuple(self.encode(prompt, "messages", add_special_tokens=values.add_special_tokens))

    def _certain(self, values: Chat, form: MessageForm, given: Grammar | None) -> Grammar:
        """That makes the call certain that the client asks for."""
        if given is not None:
            raise unsupported("tool_choice", "cannot be honoured with a grammar: a text follows one.")
        functions = [tool["function"] for tool in values.tools]
        try:
            if form.calls == NAMED:
                name = form.tools[0].name
                made = certain_arguments(next(one for one in functions if one["name"] == name))
            else:
                made = certain_calls(functions, several=values.parallel_tool_calls)
        except BadGrammar as error:
            raise bad_value("tools", f"cannot be followed: {error}.") from error
        return self._alone(values, self._grammars.checked(made, "tools"))

    def _form(self, values: Chat, prompt: str, grammar: Grammar | None) -> MessageForm | None:
        """How the answer to `prompt` is read. What follows a grammar is content, as it was asked for."""
        reasoning = self._settings.reasoning_parser if values.separate_reasoning else None
        thinking = False
        if reasoning is not None and not values.continue_final_message:
            thinking = begins_within(prompt, reasoning)
        calls, tools = self._calls(values)
        if grammar is not None and calls not in (NAMED, REQUIRED):
            return None
        if reasoning is None and calls is None:
            return None
        return MessageForm(
            reasoning, thinking, values.include_reasoning, calls, tools, several=values.parallel_tool_calls
        )

    def _calls(self, values: Chat) -> tuple[str | None, tuple[Tool, ...]]:
        """By which format calls are read from the answer, and of which tools."""
        choice = values.tool_choice or "auto"
        tools = tuple(Tool.of(tool["function"]) for tool in values.tools)
        if isinstance(choice, dict):
            name = choice["function"]["name"]
            named = tuple(tool for tool in tools if tool.name == name)
            if not named:
                raise bad_value("tool_choice", f"names {shown(name)}, which is none of the tools.")
            return NAMED, named[:1]
        if choice == "required":
            if not tools:
                raise bad_value("tool_choice", "needs 'tools' to be required.")
            return REQUIRED, tools
        if choice == "none" or not tools:
            return None, ()
        if self._settings.tool_call_parser is None:
            raise unsupported(
                "tool_choice" if values.tool_choice else "tools",
                "cannot be honoured here where the model has the choice: the server has to be started with "
                "--enable-auto-tool-choice and --tool-call-parser.",
            )
        return self._settings.tool_call_parser, tools

    def _part(
        self, prompt: tuple[int, ...], params: SamplingParams, values: Generating, echo: str = ""
    ) -> Part:
        page_size = self._settings.shared_page_size
        return Part(
            prompt, params, _seed(values.seed), echo, beginnings(prompt, page_size) if page_size else ()
        )

    def _cut(self, prompt: tuple[int, ...], values: Generating, asked: int | None) -> tuple[int, ...]:
        """What 'truncate_prompt_tokens' leaves of a prompt to which `asked` tokens are to be generated."""
        keep = values.truncate_prompt_tokens
        if keep is None:
            return prompt
        if keep == 0:
            raise bad_value("truncate_prompt_tokens", "must be at least 1, or -1.")
        if keep < 0:
            keep = max(1, self._settings.max_model_len - (asked or 1))
        return prompt[-keep:] if values.truncation_side == "left" else prompt[:keep]

    def encode(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text that may be far too long: that is seen without tokenising it."""
        if len(text) > self._max_prompt_bytes:
            raise self._too_long(len(text), param)
        try:
            return self._text.encode(text, add_special_tokens=add_special_tokens)
        # The tokenizers library raises bare Exception, for example for a character it has no token for.
        except Exception as error:
            raise bad_value(param, f"cannot be tokenised: {error}") from error

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

    def _check_known(self, prompt: tuple[int, ...], param: str) -> None:
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

    def _check_model(self, name: str | None) -> None:
        if name is not None and not self._settings.knows(name):
            raise unknown_model(name)

    def _check_choices(self, prompts: int, n: int) -> None:
        if prompts * n > self._settings.max_choices:
            most = self._settings.max_choices
            raise bad_value("n", f"times the number of prompts must be at most {most}, not {prompts * n}.")

    def _max_tokens(self, prompt: tuple[int, ...], asked: int | None, param: str, *, default: int) -> int:
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

    def _grammar(self, values: Generating) -> Grammar | None:
        grammar = self._grammars.read(values)
        return None if grammar is None else self._alone(values, grammar)

    def _alone(self, values: Generating, grammar: Grammar) -> Grammar:
        """`grammar`, beside which nothing else says what may come."""
        for name in ("ignore_eos", "allowed_token_ids"):
            if getattr(values, name):
                raise unsupported(
                    name,
                    "cannot be honoured with a grammar, which says by itself what may come and what ends.",
                )
        return grammar

    def _sampling(
        self, values: Generating, max_tokens: int, logprobs: int | None, grammar: Grammar | None
    ) -> SamplingParams:
        temperature = values.temperature
        ends = () if values.ignore_eos else self._settings.eos_token_ids
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
            top_p=values.top_p,
            top_k=max(values.top_k, 0),
            min_p=values.min_p,
            repetition_penalty=values.repetition_penalty,
            presence_penalty=values.presence_penalty,
            frequency_penalty=values.frequency_penalty,
            ignore_eos=values.ignore_eos,
            stop_token_ids=(*values.stop_token_ids, *ends),
            logprobs=logprobs,
            min_tokens=values.min_tokens,
            logit_bias=values.logit_bias,
            allowed_token_ids=tuple(values.allowed_token_ids),
            grammar=grammar,
        )


def _seed(given: int | None) -> int:
    return random.getrandbits(63) if given is None else given & (2**63 - 1)


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


def _job(
    values: Generating, parts: tuple[Part, ...], logprobs: int | None, form: MessageForm | None = None
) -> Job:
    options = values.stream_options or _NO_OPTIONS
    if (options.include_usage or options.continuous_usage_stats) and not values.stream:
        raise bad_value("stream_options", "is only allowed when 'stream' is true.")
    token_ids = values.return_token_ids
    return Job(
        parts=parts,
        n=values.n,
        stream=values.stream,
        output=Output(
            stop=tuple(values.stop),
            stop_token_ids=tuple(values.stop_token_ids),
            min_tokens=values.min_tokens,
            include_stop=values.include_stop_str_in_output or values.no_stop_trim,
            skip_special_tokens=values.skip_special_tokens and not (form and form.shows_special),
            logprobs=logprobs,
            token_ids=token_ids,
            prompt_token_ids=token_ids or (isinstance(values, Chat) and values.return_prompt_token_ids),
            include_usage=options.include_usage,
            continuous_usage=options.continuous_usage_stats,
            form=form,
        ),
        request_id=values.request_id or values.rid,
        unknown=_unknown(values),
    )


def _without_cut_tokens(body: dict[str, Any]) -> dict[str, Any]:
    """`body` with prompts of token ids as long as 'truncate_prompt_tokens' leaves them: the rest is not looked at."""
    keep, prompt = body.get("truncate_prompt_tokens"), body.get("prompt")
    if type(keep) is not int or keep < 1 or not isinstance(prompt, list):
        return body
    part = slice(None, keep) if body.get("truncation_side") == "right" else slice(-keep, None)
    if prompt and isinstance(prompt[0], list):
        cut = [one[part] if isinstance(one, list) else one for one in prompt]
    else:
        cut = prompt if prompt and isinstance(prompt[0], str) else prompt[part]
    return {**body, "prompt": cut}


@contextmanager
def _renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Faults by other names of the fields."""
    try:
        yield
    except ApiError as error:
        root = re.split(r"[.\[]", error.param or "")[0]
        if root not in names:
            raise
        message = error.message.replace(f"'{error.param}'", f"'{names[root]}'")
        message = message.replace(f"Your {error.param} ", f"Your {names[root]} ")
        raise ApiError(message, status=error.status, param=names[root], code=error.code) from None


def _names(values: Body) -> tuple[str, ...]:
    return tuple(name[:100] for name in [*(values.model_extra or ())][:_MOST_UNKNOWN])


def _unknown(values: Generating) -> tuple[str, ...]:
    names = [*(values.model_extra or ())]
    if values.stream_options is not None:
        names += [f"stream_options.{name}" for name in values.stream_options.model_extra or ()]
    return tuple(name[:100] for name in names[:_MOST_UNKNOWN])


class UnknownNames:
    """A line in the log for each field that was ignored because nobody knows it, once."""

    _MOST = 200

    def __init__(self) -> None:
        self._said: set[str] = set()

    def note(self, path: str, names: Iterable[str]) -> None:
        for name in names:
            if len(self._said) < self._MOST and name not in self._said:
                self._said.add(name)
                log.warning("unknown request field ignored", field=shown(name), path=path)
