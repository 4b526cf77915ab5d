"""What a rank cannot compute is refused before it is scheduled, with a reason. No tensors."""

from __future__ import annotations

import math

from elastic_ep.wire.messages import Assign, SamplingParams


def refusal(assign: Assign, vocab_size: int, max_model_len: int, *, guides: bool) -> str:
    """Why the request cannot be run; empty if it can. `guides` says whether there are masks for those with a grammar."""
    known = len(assign.prompt) + len(assign.emitted)
    if not assign.prompt:
        return "its prompt has no tokens"
    if known >= max_model_len:
        return f"it has {known} tokens, and of at most {max_model_len} one must be left to generate"
    if len(assign.emitted) >= assign.params.max_tokens:
        return f"all of its {assign.params.max_tokens} tokens were generated already"
    given = assign.params.given
    if len(assign.prompt) + len(given) >= max_model_len or len(given) > assign.params.max_tokens:
        return f"{len(given)} tokens are given, more than it may have"
    if assign.emitted[: len(given)] != given[: len(assign.emitted)]:
        return "it has put out other tokens than those that are given"
    for name, tokens in (("prompt", (*assign.prompt, *given)), ("output", assign.emitted)):
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < vocab_size)
            return f"token {wrong} of its {name} is none of the model's {vocab_size}"
    words = assign.params.bad_words
    if not all(words) or any(not 0 <= token < vocab_size for word in words for token in word):
        return "a word that it may not have has no tokens, or some that are none of the model's"
    if assign.params.grammar is not None and not guides:
        return "it has a grammar, and this rank does not know the vocabulary that it is followed with"
    return _senseless(assign.params)


def _senseless(params: SamplingParams) -> str:
    """Which sampling parameter no distribution can be made with; empty if none."""
    names = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    for name in names:
        if not math.isfinite(getattr(params, name)):
            return f"{name} is {getattr(params, name)}"
    if params.temperature < 0:
        return f"temperature is {params.temperature}, which is negative"
    if params.repetition_penalty <= 0:
        return f"repetition_penalty is {params.repetition_penalty}, and must be positive"
    if params.logprobs is not None and params.logprobs < 0:
        return f"logprobs is {params.logprobs}, which is negative"
    if params.given_logprobs < 0:
        return f"given_logprobs is {params.given_logprobs}, which is negative"
    return ""
