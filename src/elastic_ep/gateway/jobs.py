"""From a request body to a `Job`: prompts as tokens, sampling parameters, everything checked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from elastic_ep.gateway.answer_form import certain, certain_parts, message_form
from elastic_ep.gateway.bodies import Chat, Completion, Generating, StreamOptions
from elastic_ep.gateway.conversation import ChatPrompt
from elastic_ep.gateway.errors import ApiError, unknown_model
from elastic_ep.gateway.fields import bad_value, read, unsupported
from elastic_ep.gateway.guided import GrammarReader, KnownGrammars, is_tagged
from elastic_ep.gateway.job import Job, Output, Part, Previous
from elastic_ep.gateway.messages.body import RENAMED as MESSAGES_NAMES
from elastic_ep.gateway.messages.body import Model
from elastic_ep.gateway.messages.body import as_chat as messages_as_chat
from elastic_ep.gateway.parsers.registry import NAMED, REQUIRED, MessageForm
from elastic_ep.gateway.prepared import prepare
from elastic_ep.gateway.prompts import PromptReader, without_cut_tokens
from elastic_ep.gateway.responses.body import RENAMED as RESPONSES_NAMES
from elastic_ep.gateway.responses.body import About, Named, head, items_of
from elastic_ep.gateway.responses.body import as_chat as responses_as_chat
from elastic_ep.gateway.sampling import alone, bad_words, giving, sampling, seed
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.unknown import names, unknown
from elastic_ep.machines.requests.prefixes import beginnings
from elastic_ep.wire.messages import Grammar, SamplingParams

_COMPLETION_MAX_TOKENS = 16
_NO_OPTIONS = StreamOptions.model_construct()


class JobReader:
    """Makes jobs from bodies. Every method raises `ApiError`, and takes as long as the body is: see `reading.py`."""

    def __init__(
        self, settings: ApiSettings, text: ChatTokenizer, known: KnownGrammars | None = None
    ) -> None:
        self._settings = settings
        self._text = text
        self._bodies = prepare(settings)
        self._grammars = GrammarReader(settings, text, known)
        self.prompts = PromptReader(settings, text)

    def warm_up(self) -> None:
        """What the first grammar would wait for otherwise."""
        self._grammars.warm_up()

    def completion(self, body: dict[str, Any]) -> Job:
        values = read(self._bodies.completion, without_cut_tokens(body, self.prompts.most(None)))
        self.check_model(values.model)
        logprobs = values.logprobs
        if values.best_of not in (None, values.n):
            raise unsupported("best_of", "cannot be honoured here with a value other than n.")
        prompts = values.prompt
        self._check_choices(len(prompts), values.n)
        grammar = self._grammar(values)
        words = self._bad_words(values)
        default = min(_COMPLETION_MAX_TOKENS, self._settings.defaults.max_tokens or _COMPLETION_MAX_TOKENS)
        parts = []
        for prompt in prompts:
            if isinstance(prompt, str):
                special = values.add_special_tokens
                encoded = tuple(self.prompts.encode(prompt, "prompt", add_special_tokens=special))
            else:
                encoded = tuple(prompt)
            ids = self.prompts.cut(encoded, values, values.max_tokens)
            limit = self.prompts.room(ids, values.max_tokens, "prompt", default=default)
            self.prompts.check_known(ids, "prompt")
            echo = ""
            if values.echo:
                echo = prompt if isinstance(prompt, str) and ids == encoded else self._text.decode(ids)
            params = sampling(self._settings, values, limit, logprobs, grammar, words)
            parts.append(self._part(ids, params, values, echo, logprobs if values.echo else None))
        return _job(values, tuple(parts), logprobs)

    def responses(self, body: dict[str, Any], before: str | None) -> Job | Previous:
        """`before`: the conversation that it goes on with, if it does."""
        values = read(self._bodies.responses, body)
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
        return replace(job, about=about, unknown=names(values))

    def messages(self, body: dict[str, Any]) -> Job:
        values = read(self._bodies.messages, body)
        job = self._as_chat(messages_as_chat(body, values, self._model), MESSAGES_NAMES)
        return replace(job, unknown=names(values))

    def count(self, body: dict[str, Any]) -> int:
        """Tokens of the prompt that a body of /v1/messages makes."""
        values = read(self._bodies.count, body)
        with _renamed(MESSAGES_NAMES):
            chat = read(self._bodies.chat, messages_as_chat(body, values, self._model))
            self.check_model(chat.model)
            return len(self.prompts.conversation(chat)[1])

    def chat_tokens(self, body: dict[str, Any]) -> tuple[int, ...]:
        """Of the prompt that the fields of a conversation in `body` make."""
        asked = {name: body[name] for name in (*ChatPrompt.model_fields, "model") if name in body}
        values = read(self._bodies.chat, asked)
        self.check_model(values.model)
        return self.prompts.conversation(values)[1]

    @property
    def _model(self) -> Model:
        text = self._text
        template = text.has_chat_template
        return Model(
            thinks_if_told=template and text.template_uses("enable_thinking"),
            knows_budget=template and text.template_uses("thinking_budget"),
            reasons=self._settings.reasoning_parser is not None,
        )

    def _as_chat(self, body: dict[str, Any], names: Mapping[str, str]) -> Job:
        """The job of a conversation that another endpoint asked for; faults are told by that one's `names`."""
        with _renamed(names):
            return self.chat(body)

    def chat(self, body: dict[str, Any]) -> Job:
        values = read(self._bodies.chat, body)
        self.check_model(values.model)
        if values.top_logprobs and not values.logprobs:
            raise bad_value("top_logprobs", "needs 'logprobs' to be true.")
        logprobs = values.top_logprobs if values.logprobs else None
        self._check_choices(1, values.n)
        prompt, encoded = self.prompts.conversation(values)
        asked = values.max_completion_tokens
        asked = values.max_tokens if asked is None else asked
        ids = self.prompts.cut(encoded, values, asked)
        default = self._settings.defaults.max_tokens or self._settings.max_model_len
        limit = self.prompts.room(ids, asked, "messages", default=default)
        self.prompts.check_known(ids, "messages")
        grammar = self._grammar(values)
        guided = grammar is not None and not is_tagged(values)
        form = message_form(self._settings, values, prompt, guided=guided)
        if form is not None and form.calls in (NAMED, REQUIRED):
            grammar = self._certain(values, form, grammar)
        words = self._bad_words(values)
        part = self._part(ids, sampling(self._settings, values, limit, logprobs, grammar, words), values)
        return _job(values, (part,), logprobs, form)

    def _certain(self, values: Chat, form: MessageForm, given: Grammar | None) -> Grammar:
        """That makes the call certain that the client asks for."""
        if given is not None:
            raise unsupported("tool_choice", "cannot be honoured with a grammar: a text follows one.")
        try:
            return alone(values, self._grammars.checked(certain(values, form), "tools"))
        except ApiError:
            for param, part in certain_parts(values, form):
                self._grammars.checked(part, param)
            raise

    def _part(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        values: Generating,
        echo: str = "",
        echoed: int | None = None,
    ) -> Part:
        """`echoed`: alternatives beside the log-probability of each token of the prompt; None: it has none."""
        limit, page_size = params.max_tokens, self._settings.shared_page_size
        scored = max((one for one in (values.prompt_logprobs, echoed) if one is not None), default=None)
        params = giving(params, prompt, scored)
        special = echoed is not None and self._text.decode(prompt, skip_special_tokens=False) == echo
        part = Part(prompt, params, seed(values.seed), limit, echo, special)
        return replace(part, beginnings=beginnings(part.begun, page_size)) if page_size else part

    def check_model(self, name: str | None) -> None:
        if name is not None and not self._settings.knows(name):
            raise unknown_model(name)

    def _check_choices(self, prompts: int, n: int) -> None:
        if prompts * n > self._settings.max_choices:
            most = self._settings.max_choices
            raise bad_value("n", f"times the number of prompts must be at most {most}, not {prompts * n}.")

    def _bad_words(self, values: Generating) -> tuple[tuple[int, ...], ...]:
        return bad_words(self.prompts, values.bad_words, self._settings.vocab_size)

    def _grammar(self, values: Generating) -> Grammar | None:
        grammar = self._grammars.read(values)
        return None if grammar is None else alone(values, grammar)


def _job(
    values: Generating, parts: tuple[Part, ...], logprobs: int | None, form: MessageForm | None = None
) -> Job:
    options = values.stream_options or _NO_OPTIONS
    if (options.include_usage or options.continuous_usage_stats) and not values.stream:
        raise bad_value("stream_options", "is only allowed when 'stream' is true.")
    if values.prompt_logprobs is not None and values.stream:
        raise bad_value("prompt_logprobs", "is only told when 'stream' is false.")
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
            prompt_logprobs=values.prompt_logprobs,
            echo_logprobs=isinstance(values, Completion) and values.echo and logprobs is not None,
            token_ids=token_ids,
            prompt_token_ids=token_ids or (isinstance(values, Chat) and values.return_prompt_token_ids),
            include_usage=options.include_usage,
            continuous_usage=options.continuous_usage_stats,
            form=form,
        ),
        request_id=values.request_id or values.rid,
        unknown=unknown(values),
    )


@contextmanager
def _renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Faults by other names of the fields."""
    try:
        yield
    except ApiError as error:
        param = _place(error.param or "", names)
        if param == error.param or not param:
            raise
        message = error.message.replace(f"'{error.param}'", f"'{param}'")
        message = message.replace(f"Your {error.param} ", f"Your {param} ")
        raise ApiError(message, status=error.status, param=param, code=error.code) from None


_SCHEMA = "response_format.json_schema.schema"
_FUNCTION = re.compile(r"(tools\[\d+\])\.function(\.parameters)?(.*)", re.DOTALL)


def _place(param: str, names: Mapping[str, str]) -> str:
    """Where a client gave what `param` of a conversation was made of; else its field."""
    if param.startswith(_SCHEMA):
        return f"{names['response_format']}.schema{param.removeprefix(_SCHEMA)}"
    if tool := _FUNCTION.fullmatch(param):
        parameters = tool[2] and "." + names.get("parameters", "parameters")
        return f"{tool[1]}{parameters or ''}{tool[3]}"
    return names.get(re.split(r"[.\[]", param)[0], param)
