"""Fields that OpenAI, vLLM or SGLang know and this server does not honour, each with the values that ask for nothing.

Any other value is refused: an answer that ignores what was asked for is wrong without a word. A field that becomes
honoured moves to `bodies.py`.
"""

from __future__ import annotations

from typing import Any

from elastic_ep.gateway.fields import Refused

_OLD_TOOLS = "the format before 'tools': give those"
_MEDIA = "it takes and gives text alone"
_REASONING = "how long a model reasons is its own affair"
_PLACEMENT = "which rank serves a request is the router's decision"
_LOGPROBS = "no tokens can be chosen for log-probabilities: see 'logprobs'"
_INSIDE = "what happens inside the model is not reported"


def _refused(why: str, **neutral: Any) -> dict[str, Refused]:
    """Of each name, what its value may be nevertheless: a tuple of values, or one; () is null alone."""
    return {
        name: Refused(values if isinstance(values, tuple) else (values,), why)
        for name, values in neutral.items()
    }


_GRAMMARS = {
    **_refused("llguidance is what there is", guided_decoding_backend=("", "auto", "guidance", "llguidance")),
}
_SAMPLING = {
    **_refused(
        "tokens are drawn one by one", use_beam_search=False, length_penalty=1.0, early_stopping=False
    ),
    **_refused(
        "no code of a client is run", logits_processors=([],), custom_logit_processor="", custom_params={}
    ),
    **_refused("output is not marked", watermarking=False),
    **_refused("a stop is a string or a token here: give 'stop'", stop_regex=("", [])),
    **_refused("nothing ends a text that repeats itself", repetition_detection={}),
    **_refused("this server has the model's own weights alone", lora_path=("", [])),
    **_refused("call it 'max_tokens'", max_new_tokens=()),
    **_refused("call it 'min_tokens'", min_new_tokens=0),
    **_refused("call it 'seed'", sampling_seed=()),
}
_REPORTS = {
    **_refused(_LOGPROBS, logprob_token_ids=([],)),
    **_refused("tokens are told as text", return_tokens_as_token_ids=False, return_token_offsets=False),
    **_refused("generated tokens are answered as text: see 'return_token_ids'", detokenize=True),
    **_refused(
        _INSIDE,
        return_hidden_states=False, return_routed_experts=False, routed_experts_start_len=0,
        routed_experts_prompt_start=0, return_cached_tokens_details=False, return_meta_info=False,
    ),
    **_refused("a chunk is sent as soon as there is text", stream_interval=1),
    **_refused("no spaces are put between special tokens", spaces_between_special_tokens=(True, False)),
}  # fmt: skip
_ROUTING = {
    **_refused("requests are served in the order in which they came", priority=0),
    **_refused(
        _PLACEMENT,
        routed_dp_rank=(), data_parallel_rank=(), disagg_prefill_dp_rank=(), bootstrap_host=(), bootstrap_port=(),
        bootstrap_room=(), kv_transfer_params={}, ec_transfer_params={},
    ),
    **_refused("no such extension is installed", vllm_xargs={}, session_params={}, custom_labels={}, ngram_corpus_id=""),
}  # fmt: skip

EVERYWHERE = {
    **_GRAMMARS,
    **_SAMPLING,
    **_REPORTS,
    **_ROUTING,
    **_refused(_MEDIA, mm_processor_kwargs={}, media_io_kwargs={}, images_config={}, return_mm_kwargs=True),
    **_refused(_REASONING, thinking_token_budget=-1),
}
"""For both generating endpoints."""

COMPLETIONS = {
    **_refused("text after a gap is not taken into account", suffix=""),
    **_refused("prompts are text or token ids", prompt_embeds=()),
    **_refused("it is a field of /v1/chat/completions: here it is 'max_tokens'", max_completion_tokens=()),
    **_refused("it is a field of /v1/chat/completions: here it is 'logprobs'", top_logprobs=0),
    **_refused(
        "it is a field of /v1/chat/completions",
        messages=([],), tools=([],), tool_choice="none", functions=([],), function_call="none", documents=([],),
        chat_template="", chat_template_kwargs={}, add_generation_prompt=True, continue_final_message=False,
        reasoning_effort="medium",
    ),
}  # fmt: skip

CHAT_TEMPLATE = _refused("the server has to be started with --trust-request-chat-template", chat_template="")
"""For conversations, unless the operator allows it."""

REASONING_PARSER = _refused(
    "the server has to be started with --reasoning-parser",
    include_reasoning=True, separate_reasoning=(True, False),
)  # fmt: skip
"""For conversations, unless the operator says how reasoning is told from the rest of the text."""

CHAT = {
    **_refused(_OLD_TOOLS, functions=([],), function_call=("none", "auto")),
    **_refused("answers are not kept", store=False),
    **_refused("one tier serves all", service_tier=("auto", "default")),
    **_refused("texts are not rated", moderation=()),
    **_refused("output is computed, not compared with a guess", prediction=()),
    **_refused("it does not search", web_search_options=()),
    **_refused("how long an answer gets is the model's affair", verbosity="medium"),
    **_refused(
        _MEDIA,
        audio=(), modalities=(["text"], []), max_dynamic_patch=(), min_dynamic_patch=(), use_audio_in_video=False,
    ),
    **_refused(
        _REASONING, reasoning={},
    ),
    **_refused(
        "reasoning is sent as soon as there is some", stream_reasoning=True,
    ),
    **_refused("the answer is a message of its own: see 'continue_final_message'", echo=False),
    **_refused("messages are the prompt: token ids go to /v1/completions", input_ids=([],), prompt=("", [])),
    **_refused("only some models know tasks", task=()),
    **_refused("render the prompt with the model's own tools", return_prompt_text=False),
    **_refused("it is a field of /v1/completions", suffix="", best_of=1),
}  # fmt: skip

STRUCTURED_OUTPUTS = {
    **_refused("say so in the schema", disable_additional_properties=False),
}

RESPONSES = {
    **_refused("the server keeps responses, see 'previous_response_id'", conversation=(), prompt=()),
    **_refused("a conversation is never cut", truncation="disabled", context_management=([],)),
    **_refused("tools are called by the client", max_tool_calls=()),
    **_refused("one tier serves all", service_tier=("auto", "default")),
    **_refused("texts are not rated", moderation=()),
    **_refused("it is a field of vendors' services", access_programs=(), background_options=()),
    **_refused(_MEDIA, image=()),
    **_refused("give it as 'input', or see 'previous_response_id'", previous_input_messages=([],)),
    **_refused("'output' holds what was generated", enable_response_messages=False),
}  # fmt: skip
RESPONSES_REASONING = _refused("reasoning is told whole: see 'summary'", generate_summary=())
RESPONSES_TEXT = _refused("how long an answer gets is the model's affair", verbosity="medium")

MESSAGES = {
    **_refused("one tier serves all", service_tier=("auto", "standard_only"), speed="standard"),
    **_refused("tools are called by the client", container=(), mcp_servers=([],)),
    **_refused("a conversation is never cut", context_management={}),
    **_refused("it is a field of the vendor's service", inference_geo=(), workspace_id=(), diagnostics=()),
    **_refused("see 'output_config.format'", output_format={}),
    **_refused("see 'stop_sequences'", stop=([], "")),
}  # fmt: skip
MESSAGES_OUTPUT = _refused("it is a field of the vendor's service", task_budget=())
MESSAGES_TOOL = {
    **_refused("all tools are shown to the model", defer_loading=False),
    **_refused("tools are called by the model alone", allowed_callers=(["direct"], [])),
    **_refused("chat templates know no examples: say them in the description", input_examples=([],)),
}

STREAM_OPTIONS = _refused("chunks are not padded", include_obfuscation=False)
