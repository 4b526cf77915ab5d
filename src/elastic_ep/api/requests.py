"""From a request body to a `Job`: prompts as tokens, sampling parameters, everything checked."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from elastic_ep.api.bodies import chat_fields, completion_fields
from elastic_ep.api.errors import ApiError, prompt_too_long, unknown_model
from elastic_ep.api.fields import String, bad_value, read_fields
from elastic_ep.api.settings import ApiSettings
from elastic_ep.messages import SamplingParams
from elastic_ep.text import ChatTemplateError, Text

# Below this the division by the temperature leaves one candidate anyway, or overflows: greedy, as in vLLM.
_GREEDY_BELOW = 1e-5
_COMPLETION_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Part:
    """One prompt of a job. `echo` is the text to show before the generated one."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    echo: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """A valid request: `n` choices for each part; choice j of part i has index i * n + j."""

    parts: tuple[Part, ...]
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: int | None


class JobReader:
    """Makes jobs from bodies. Every method raises `ApiError`, and takes as long as the body is: see `reading.py`."""

    def __init__(self, settings: ApiSettings, text: Text) -> None:
        self._settings = settings
        self._text = text
        self._completion_fields = completion_fields(settings)
        self._chat_fields = chat_fields(settings)
        # Every token covers some bytes of the text; what normalisation shrinks away is covered by the 4.
        self._max_prompt_bytes = 4 * text.max_token_bytes * settings.max_model_len

    def completion(self, body: dict[str, Any]) -> Job:
        values = read_fields(body, self._completion_fields)
        self._check_model(values["model"])
        logprobs = values["logprobs"]
        if values["echo"] and logprobs is not None:
            raise ApiError(
                "'echo' with 'logprobs' is not supported: prompts have no logprobs here.",
                param="echo",
                code="unsupported_parameter",
            )
        prompts = values["prompt"]
        self._check_choices(len(prompts), values["n"])
        parts = []
        for prompt in prompts:
            ids = tuple(self.encode(prompt, "prompt") if isinstance(prompt, str) else prompt)
            limit = self._max_tokens(ids, values["max_tokens"], "prompt", default=_COMPLETION_MAX_TOKENS)
            shown = prompt if isinstance(prompt, str) else self._text.decode(prompt) if values["echo"] else ""
            echo = shown if values["echo"] else ""
            parts.append(Part(ids, _sampling(values, limit, logprobs), _seed(values["seed"]), echo))
        return _job(values, tuple(parts), logprobs)

    def chat(self, body: dict[str, Any]) -> Job:
        values = read_fields(body, self._chat_fields)
        self._check_model(values["model"])
        if values["top_logprobs"] is not None and not values["logprobs"]:
            raise bad_value("top_logprobs", "needs 'logprobs' to be true.")
        logprobs = (values["top_logprobs"] or 0) if values["logprobs"] else None
        self._check_choices(1, values["n"])
        prompt = self._render(values)
        ids = tuple(self.encode(prompt, "messages", add_special_tokens=False))
        asked = values["max_completion_tokens"]
        asked = values["max_tokens"] if asked is None else asked
        limit = self._max_tokens(ids, asked, "messages", default=self._settings.max_model_len)
        part = Part(ids, _sampling(values, limit, logprobs), _seed(values["seed"]))
        return _job(values, (part,), logprobs)

    def encode(self, text: str, param: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text that may be far too long: that is seen without tokenising it."""
        if len(text) > self._max_prompt_bytes:
            at_least = len(text) // self._text.max_token_bytes
            raise prompt_too_long(self._settings.max_model_len, f"at least {at_least}", param)
        try:
            return self._text.encode(text, add_special_tokens=add_special_tokens)
        # The tokenizers library raises bare Exception, for example for a character it has no token for.
        except Exception as error:
            raise bad_value(param, f"cannot be tokenised: {error}") from error

    def _render(self, values: dict[str, Any]) -> str:
        messages = [
            {name: value for name, value in message.items() if value is not None}
            for message in values["messages"]
        ]
        try:
            prompt = self._text.render_chat(
                messages,
                add_generation_prompt=values["add_generation_prompt"],
                variables=values["chat_template_kwargs"],
            )
        except ChatTemplateError as error:
            raise ApiError(str(error), param="messages", code="chat_template_error") from error
        # Variables of the template can carry what `String` keeps out of messages.
        return String().read(prompt, "chat_template_kwargs")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.model_name:
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


def _seed(given: int | None) -> int:
    return random.getrandbits(63) if given is None else given & (2**63 - 1)


def _sampling(values: dict[str, Any], max_tokens: int, logprobs: int | None) -> SamplingParams:
    temperature = values["temperature"]
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_p=values["top_p"],
        top_k=max(values["top_k"], 0),
        min_p=values["min_p"],
        repetition_penalty=values["repetition_penalty"],
        presence_penalty=values["presence_penalty"],
        frequency_penalty=values["frequency_penalty"],
        ignore_eos=values["ignore_eos"],
        stop_token_ids=values["stop_token_ids"],
        logprobs=logprobs,
    )


def _job(values: dict[str, Any], parts: tuple[Part, ...], logprobs: int | None) -> Job:
    options = values["stream_options"]
    if options is not None and not values["stream"]:
        raise bad_value("stream_options", "is only allowed when 'stream' is true.")
    return Job(
        parts=parts,
        n=values["n"],
        stop=values["stop"],
        stream=values["stream"],
        include_usage=options is not None and options["include_usage"],
        logprobs=logprobs,
    )
