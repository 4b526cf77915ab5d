"""How tokens are drawn, as a request wants it."""

from __future__ import annotations

import random
from dataclasses import replace

from elastic_ep.gateway.bodies import Generating
from elastic_ep.gateway.fields import bad_value, unsupported
from elastic_ep.gateway.prompts import PromptReader
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.wire.messages import Grammar, SamplingParams

# Below this the division by the temperature leaves one candidate anyway, or overflows: greedy, as in vLLM.
_GREEDY_BELOW = 1e-5


def sampling(
    settings: ApiSettings,
    values: Generating,
    max_tokens: int,
    logprobs: int | None,
    grammar: Grammar | None,
    bad_words: tuple[tuple[int, ...], ...],
) -> SamplingParams:
    """Raises `ApiError`."""
    if values.min_tokens > max_tokens:
        raise bad_value(
            "min_tokens", f"must be at most the {max_tokens} tokens that may be generated: see 'max_tokens'."
        )
    temperature = values.temperature
    ends = () if values.ignore_eos else settings.eos_token_ids
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
        bad_words=bad_words,
    )


def bad_words(prompts: PromptReader, words: list[str], vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Of each the tokens at a text's beginning, and those behind a blank if they are as many, as vLLM has it.

    Raises `ApiError`. HAZARD: some milliseconds for many: once a request, not once a prompt.
    """
    found: list[tuple[int, ...]] = []
    for place, word in enumerate(words):
        param = f"bad_words[{place}]"
        plain = tuple(prompts.encode(word.lstrip(), param, add_special_tokens=False))
        behind = tuple(prompts.encode(f" {word.lstrip()}", param, add_special_tokens=False))
        if not plain or max(*plain, *behind) >= vocab_size:
            raise bad_value(param, "has no tokens, or some that the model does not know.")
        found.append(plain)
        if len(behind) == len(plain) and behind[0] != plain[0]:
            found.append(behind)
    return tuple(dict.fromkeys(found))


def alone(values: Generating, grammar: Grammar) -> Grammar:
    """`grammar`, beside which nothing else says what may come. Raises `ApiError`."""
    for name in ("ignore_eos", "allowed_token_ids", "bad_words"):
        if getattr(values, name):
            raise unsupported(
                name,
                "cannot be honoured with a grammar, which says by itself what may come and what ends.",
            )
    return grammar


def seed(given: int | None) -> int:
    return random.getrandbits(63) if given is None else given & (2**63 - 1)


def giving(params: SamplingParams, prompt: tuple[int, ...], scored: int | None) -> SamplingParams:
    """So that the tokens of `prompt` but the first are put out with `scored` alternatives each; None: they are not.

    An engine puts out at least one token: where none is to be generated it is the last of the prompt, if that is not the
    first as well.
    """
    wanted = params.max_tokens
    given = prompt[1:] if scored is not None else prompt[1:][-1:] if not wanted else ()
    return replace(params, max_tokens=max(1, len(given) + wanted), given=given, given_logprobs=scored or 0)
