"""Whatever a model folder's JSON files hold: it starts and serves, or one line says at start what is wrong where."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elastic_ep.config import ConfigError, EngineLimits, ServeConfig
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.jobs import JobReader
from elastic_ep.gateway.settings import ApiSettings, SamplingDefaults
from elastic_ep.plan import ServePlan, make_plan
from elastic_ep.wire.codec import decode, encode
from elastic_ep.wire.messages import Assign
from tests.engine.solo import drain, solo_runner
from tests.models.folders import CONFIG, write_json, write_texts

FEW_TOKENS = 3
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 2, 3, 4, 8, 16, 20, 32, 64, 640, -1, 0.5, 1.5, 2**31, 10**40, 1e300, 5e-324])
    | st.sampled_from([0.0, 1.0, 2.0, 16.0, 20.0, -1.0, 1e-7, float("nan"), float("inf"), -float("inf")])
    | st.sampled_from(["", "x", "1", "true", "float16", "silu", "default", "{{ 1 / 0 }}", "{% bad", "\ud800"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "content"]), inner, max_size=2)
    ),
    max_leaves=4,
)
FIELDS = {
    "config.json": [
        *CONFIG, "tie_word_embeddings", "norm_topk_prob", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters",
        "num_local_experts", "dtype", "torch_dtype", "quantization_config", "layer_types", "partial_rotary_factor",
        "hidden_act", "decoder_sparse_step", "mlp_only_layers", "attention_bias", "use_sliding_window", "bos_token_id",
    ],
    "generation_config.json": [
        "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample", "max_new_tokens", "max_length",
        "eos_token_id", "pad_token_id",
    ],
    "tokenizer_config.json": [
        "chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "model_max_length", "add_bos_token",
    ],
}  # fmt: skip
INTEGERS = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "max_position_embeddings",
]  # fmt: skip
NUMBERS = ["rms_norm_eps", "rope_theta"]
BOOLEANS = ["tie_word_embeddings", "norm_topk_prob"]
PLACES = [(file, field) for file, fields in FIELDS.items() for field in fields]


def plan_of(folder: Path) -> ServePlan:
    return make_plan(ServeConfig(ranks=1, model=str(folder), device="cpu", load_format="dummy"))


def serves(plan: ServePlan) -> None:
    """A completion and a chat of defaults go through all that a request goes through."""
    reader = JobReader(
        ApiSettings("tiny", plan.limits.max_model_len, plan.model.vocab_size, "0", defaults=plan.defaults),
        plan.text,
    )
    tokens = min(FEW_TOKENS, plan.limits.max_model_len - 1)
    jobs = [reader.completion({"prompt": [1 % plan.model.vocab_size], "max_tokens": tokens})]
    # A template may refuse every message, and a small model may lack the tokens of every text: both are said.
    with suppress(ApiError):
        jobs.append(reader.chat({"messages": [{"role": "user", "content": "A"}], "max_tokens": FEW_TOKENS}))
    length = min(plan.limits.max_model_len, 128)
    runner = solo_runner(plan.model, limits=EngineLimits(max_model_len=length, num_pages=16))
    for number, job in enumerate(jobs):
        part = job.parts[0]
        assign = Assign(number, part.prompt, (), part.params, part.seed, 0)
        runner.add(decode(encode(assign), Assign))
    made = drain(runner)
    assert set(made) == set(range(len(jobs)))
    assert all(tokens[-1].finish in ("stop", "length") for tokens in made.values())


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PLACES), VALUES)
@example(("config.json", "max_position_embeddings"), 1)
@example(("config.json", "max_position_embeddings"), 2)
def test_any_value_of_any_field_serves_or_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str, str], value: Any
) -> None:
    file, field = place
    folder = tmp_path_factory.mktemp("model")
    write_texts(folder)
    known = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    if field == "chat_template":
        (folder / "chat_template.jinja").unlink()
    write_json(folder / file, known | {field: value})
    try:
        plan = plan_of(folder)
    except ConfigError as error:
        said = str(error)
        assert said.isprintable()
        assert said.count(str(folder)) == 1
        assert len(said) < 600
        return
    if sum(parameter.elements for parameter in plan.model.dense) < 10_000_000:
        serves(plan)


def defaults(folder: Path, **fields: Any) -> SamplingDefaults:
    write_json(folder / "generation_config.json", fields)
    return SamplingDefaults.from_folder(folder)


def test_what_the_generation_config_means(tmp_path: Path) -> None:
    assert defaults(tmp_path, top_k=20.0).top_k == 20
    assert type(defaults(tmp_path, top_k=20.0).top_k) is int
    assert type(defaults(tmp_path, temperature=1).temperature) is float
    assert defaults(tmp_path, temperature=None, top_k=None, top_p=None) == SamplingDefaults()
    assert defaults(tmp_path, temperature=0).temperature == 0.0
    greedy = defaults(tmp_path, do_sample=False, temperature=0.7, top_k=5, repetition_penalty=1.1)
    assert greedy == SamplingDefaults(temperature=0.0, repetition_penalty=1.1)
    assert defaults(tmp_path, do_sample=True, temperature=0.7).temperature == 0.7
    assert defaults(tmp_path, max_new_tokens=7.0).max_tokens == 7


WRONG: list[tuple[str, Any]] = [
    ("top_k", 20.5), ("top_k", "20"), ("top_k", True), ("top_k", -2), ("top_k", 2**40), ("top_k", [20]),
    ("temperature", -1), ("temperature", 1e400), ("temperature", "warm"), ("temperature", 7), ("temperature", True),
    ("top_p", 0), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0), ("do_sample", "false"), ("do_sample", 0),
    ("max_new_tokens", 0), ("max_new_tokens", 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_generation_config_out_of_range_names_file_field_and_value(
    tmp_path: Path, name: str, value: Any
) -> None:
    write_texts(tmp_path)
    write_json(tmp_path / "generation_config.json", {name: value})
    with pytest.raises(ConfigError) as raised:
        plan_of(tmp_path)
    for part in ("generation_config.json", name, repr(value)):
        assert part in str(raised.value)


def test_how_long_an_answer_gets_that_nobody_bounded(tmp_path: Path) -> None:
    """`max_new_tokens` is a default: what a request says counts, and so does the context."""
    write_texts(tmp_path)
    write_json(tmp_path / "generation_config.json", {"max_new_tokens": 9})
    plan = plan_of(tmp_path)
    settings = ApiSettings("tiny", 20, plan.model.vocab_size, "0", defaults=plan.defaults)
    reader = JobReader(settings, plan.text)

    def most(**body: Any) -> int:
        return reader.completion({"prompt": [1], **body}).parts[0].params.max_tokens

    assert most() == 9
    assert most(max_tokens=12) == 12
    assert most(prompt=[1] * 15) == 5
    chat = {"messages": [{"role": "user", "content": "A"}]}
    assert reader.chat(chat).parts[0].params.max_tokens == 9


@pytest.mark.parametrize("token", [640, -1, 2**40, 1.5, "0", True, [0, 640], {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_token_that_ends_texts_must_exist(tmp_path: Path, file: str, token: Any) -> None:
    write_texts(tmp_path)
    write_json(tmp_path / file, (CONFIG if file == "config.json" else {}) | {"eos_token_id": token})
    with pytest.raises(ConfigError, match="eos_token_id"):
        plan_of(tmp_path)


@pytest.mark.parametrize(
    ("token", "read"), [(3, (3,)), (3.0, (3,)), ([3, 4.0], (3, 4)), (None, (0,)), ([], ())]
)
def test_tokens_that_end_texts(tmp_path: Path, token: Any, read: tuple[int, ...]) -> None:
    write_texts(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": token})
    assert plan_of(tmp_path).model.eos_token_ids == read


NO_BOOLEANS: list[Any] = [0, 1, "true", [], {}]
CONFIG_WRONG: list[tuple[str, Any]] = [
    *((name, wrong) for name in INTEGERS for wrong in (0, -1, 1.5, "8", True, [8], 2**31, 10**400, float("inf"))),
    *((name, wrong) for name in NUMBERS for wrong in (0, -1, "1", True, [1], 10**400, 1e400, float("nan"), 1e-300)),
    *((name, wrong) for name in BOOLEANS for wrong in NO_BOOLEANS),
    ("rope_parameters", 7), ("rope_scaling", [1]), ("rope_parameters", {"rope_theta": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), CONFIG_WRONG, ids=lambda value: str(value)[:20])
def test_a_config_out_of_range_names_file_and_field(tmp_path: Path, name: str, value: Any) -> None:
    write_texts(tmp_path, CONFIG | {name: value})
    with pytest.raises(ConfigError) as raised:
        plan_of(tmp_path)
    said = str(raised.value)
    assert f"config.json: {name}" in said
    assert len(said) < 400


@pytest.mark.parametrize("name", [name for name in INTEGERS if name in CONFIG])
def test_an_integer_may_be_written_as_a_float_and_may_not_be_missing(tmp_path: Path, name: str) -> None:
    write_texts(tmp_path, CONFIG)
    plan = plan_of(tmp_path)
    write_texts(tmp_path, CONFIG | {name: float(CONFIG[name])})
    assert plan_of(tmp_path).model == plan.model
    write_texts(tmp_path, CONFIG | {name: None})
    if name in ("head_dim", "num_key_value_heads"):
        plan_of(tmp_path)
    else:
        with pytest.raises(ConfigError, match=f"{name} is missing"):
            plan_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"7", b"null", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_a_file_that_is_no_json_object(tmp_path: Path, name: str, content: bytes) -> None:
    write_texts(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=name):
        plan_of(tmp_path)


UNHONOURED: list[tuple[str, Any, Any]] = [
    ("num_beams", 4, 1), ("no_repeat_ngram_size", 3, 0), ("typical_p", 0.5, 1.0), ("stop_strings", ["x"], []),
    ("min_new_tokens", 5, 0), ("max_length", 4096, 20), ("guidance_scale", 1.5, None), ("bad_words_ids", [[1]], []),
    ("sequence_bias", {"1": "\n" * 500}, {}), ("early_stopping", True, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "neutral"), UNHONOURED)
def test_what_a_generation_config_asks_for_in_vain_is_said_at_start(
    tmp_path: Path, name: str, value: Any, neutral: Any
) -> None:
    write_texts(tmp_path)
    write_json(
        tmp_path / "generation_config.json", {name: neutral, "temperature": 0.5, "transformers_version": "5"}
    )
    before = plan_of(tmp_path).notices
    write_json(tmp_path / "generation_config.json", {name: value, "temperature": 0.5})
    more = plan_of(tmp_path).notices
    assert [line for line in before if name in line] == []
    (line,) = set(more) - set(before)
    assert line.startswith(f"generation_config.json: {name} is ")
    assert line.isprintable()
