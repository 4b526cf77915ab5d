"""Every mistake on the command line is one line and status 2. Flags of vLLM and SGLang are known, and what they ask."""

from __future__ import annotations

import re
import shlex
import tomllib
from contextlib import suppress
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from elastic_ep import serve
from elastic_ep.command_line import Help, own_flags
from elastic_ep.config import ConfigError, ServeConfig, flag_name
from elastic_ep.foreign_flags import FOREIGN
from elastic_ep.plan import make_plan
from elastic_ep.run import BUNDLED_MODEL, USAGE_ERROR, command, main, make_parser, parse

REFUSED = """
    --tensor-parallel-size 2 | -tp 4 | --tp 8 | --tp-size=2 | --pipeline-parallel-size 2 | -pp 2 | --pp-size 2
    --data-parallel-size 8 | -dp 8 | --dp 8 | --dp-size 4 | --ep-size 8 | --ep 8 | --expert-parallel-size 8
    --mem-fraction-static 0.88 | --kv-cache-memory-bytes 1G | --max-total-tokens 1000
    --dtype float64 | --quantization gguf | -q awq | --kv-cache-dtype fp8 | --enforce-eager
    --disable-cuda-graph | --disable-radix-cache | --disable-prefix-caching | --max-running-requests 64
    --context-length 4096 | --enable-sleep-mode
    --chunked-prefill-size 512 | --random-seed 1 | --watchdog-timeout 30 | --completion-template x.jinja
    --tool-call-parser no_such | --enable-auto-tool-choice | --reasoning-parser no_such | --speculative-config {}
    --speculative-algorithm EAGLE | --enable-lora | --lora-paths a=b | --block-size 32 | --page-size 64 | --nnodes 2
    --node-rank 1 | --dist-init-addr h:1 | --distributed-executor-backend ray | --api-server-count 4
    --scheduling-policy priority | --schedule-policy lpm | --attention-backend flashinfer | --moe-a2a-backend deepep
    --all2all-backend naive | --compilation-config {"mode":3} | --compilation-config.mode 3 | -O3 | -cc {}
    --ssl-keyfile key | --ssl-certfile cert | --ssl-cert-reqs 2 | --fastapi-root-path /x | --uds /tmp/s | --middleware m
    --skip-tokenizer-init | --revision main | --download-dir /d | --hf-token t | --hf-overrides {}
    --json-model-override-args {} | --override-generation-config {} | --task embed
    --is-embedding | --runner pooling | --limit-mm-per-prompt {} | --swap-space 4 | --cpu-offload-gb 8
    --kv-transfer-config {} | --disaggregation-mode prefill | --stream-interval 8 | --max-logprobs 50
    --guided-decoding-backend xgrammar | --grammar-backend xgrammar | --grammar-backend none
    --structured-outputs-config {}
    --log-requests | --enable-log-requests | --collect-detailed-traces x | --eplb-config {} | --num-redundant-experts 4
    --max-queued-requests 5 | --served-model-name
"""
"""As users of vLLM 0.33 and SGLang 0.5.23 write them; nobody's table but this test's."""
ACCEPTED = """
    --enable-expert-parallel | -ep | --enable-ep-moe | --trust-remote-code | --enable-chunked-prefill
    --enable-prompt-tokens-details | --enable-cache-report | --enable-dp-attention | --tensor-parallel-size 1
    -tp 1 | --tp=1 | --pipeline-parallel-size=1 | --kv-cache-dtype auto | --enable-request-id-headers
    --disable-log-requests | --disable-log-stats | --enable-metrics | --block-size 16 | --page-size 16 | --nnodes 1
    --distributed-executor-backend mp | --scheduling-policy fcfs | --task generate
    --max-logprobs 20 | --swap-space 0 | --enable-elastic-ep | --disable-custom-all-reduce
    --elastic-ep-backend mooncake | --guided-decoding-backend auto | --grammar-backend llguidance
"""
"""What they ask for is the case anyway."""


def lines(table: str) -> list[str]:
    return [part.strip() for line in table.splitlines() for part in line.split("|") if part.strip()]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command; the one line that it says. Nothing may be started."""

    def nothing(*_arguments: Any) -> int:
        raise AssertionError("started")

    monkeypatch.setattr(serve, "serve", nothing)

    def run(arguments: list[str]) -> str:
        assert main(arguments) == USAGE_ERROR
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return run


@pytest.mark.parametrize("written", lines(REFUSED))
def test_a_flag_that_does_not_exist_here_is_one_line(refused: Any, written: str) -> None:
    name = re.split(r"[ =]", written)[0]
    assert name in refused(["--ranks", "4", *written.split(" ", 1)])
    assert name in refused([*written.split(" ", 1), "--ranks", "4"])


@pytest.mark.parametrize("written", lines(ACCEPTED))
def test_a_flag_that_asks_for_what_is_so_is_said_and_taken_out(written: str) -> None:
    with capture_logs() as said:
        config = parse(["--ranks", "4", *shlex.split(written), "--port", "0"])
    assert config == replace(parse(["--ranks", "4"]), port=0)
    assert len(said) == 1
    assert re.split(r"[ =]", written)[0] in said[0]["event"]


def test_what_is_accepted_is_quiet_if_another_flag_is_wrong(refused: Any) -> None:
    assert "--ports" in refused(["--trust-remote-code", "--ports", "1"])


def test_no_flag_of_ours_is_foreign() -> None:
    assert not own_flags(make_parser()) & set(FOREIGN)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["--ranks", "--model", "--port", "--tp", "--bogus", "-x", "--", "1", "x", "", "--seed=a", "--ran"]
        )
        | st.text(max_size=8).filter(lambda text: text not in ("-h", "--help")),
        max_size=4,
    )
)
def test_any_arguments_are_a_configuration_or_one_error(arguments: list[str]) -> None:
    with suppress(ConfigError):
        assert 1 <= parse(arguments).ranks <= 64


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("--rank", "--ranks"),
        ("--max-num-seq=4", "--max-num-seqs"),
        ("--maxmodel-len", "--max-model-len"),
        ("--disable-fault-tolerence", "--disable-fault-tolerance"),
        ("--enable-expert-paralel", "--enable-expert-parallel"),
    ],
)
def test_a_misspelt_flag_is_told_the_nearest(refused: Any, written: str, meant: str) -> None:
    assert f"is {meant} meant?" in refused([written])


@pytest.mark.parametrize("arguments", [["--bogus-flag"], ["-x"], ["a", "b"], ["--zzz", "1"]])
def test_what_is_nothing_is_told_so(refused: Any, arguments: list[str]) -> None:
    assert "see --help" in refused(arguments)


def test_prefix_caching_is_on_and_can_be_turned_on_and_off() -> None:
    assert [
        parse([*map(str, given)]).enable_prefix_caching
        for given in (
            [],
            ["--enable-prefix-caching"],
            ["--no-enable-prefix-caching"],
            ["--no_enable_prefix_caching"],
        )
    ] == [True, True, False, False]


def test_flags_may_be_written_with_underscores() -> None:
    assert parse(["--max_num_seqs", "3", "--max_num_batched_tokens=9"]) == parse(
        ["--max-num-seqs", "3", "--max-num-batched-tokens", "9"]
    )


def test_the_model_may_be_given_in_three_ways(refused: Any) -> None:
    assert parse([]).model == str(BUNDLED_MODEL)
    assert parse(["/m"]) == parse(["--model", "/m"]) == parse(["--model-path", "/m"])
    assert parse(["--ranks", "2", "/m"]).model == "/m"
    assert "twice" in refused(["/m", "--model", "/n"])


def test_the_help_shows_defaults_where_there_are_any() -> None:
    """What it shows can be given, and changes nothing; a switch has none."""
    formatter = Help("")
    for action in make_parser()._actions:
        name = action.option_strings[0] if action.option_strings else ""
        if name in ("", "-h"):
            continue
        shown = re.search(r"\(default: (.+)\)", formatter._expand_help(action))
        if action.nargs == 0:
            assert shown is None, name
        elif shown is not None:
            assert parse([name, shown[1]]) == parse([]), name
        else:
            assert action.default in (None, []), name


def named(rule: str) -> list[Any]:
    """The fields whose flags have this rule."""
    return [
        pytest.param(each, id=each.name)
        for each in fields(ServeConfig)
        if getattr(each.metadata["flag"], rule)
    ]


@pytest.mark.parametrize("setting", named("within"))
def test_a_number_out_of_range_names_its_flag_and_the_range(refused: Any, setting: Field[Any]) -> None:
    name, (least, most) = flag_name(setting), setting.metadata["flag"].within
    whole = "float" not in str(setting.type)
    for wrong in (least - 1, most + 1, *(() if whole else ("nan", "inf"))):
        assert f"give a value from {least} to {most}" in refused([name, str(wrong)])
    for right in (least, most):
        with suppress(ConfigError):  # together with another, perhaps
            assert getattr(parse([name, str(right)]), setting.name) == right
    assert "invalid" in refused([name, "x"])


@pytest.mark.parametrize("setting", named("choices"))
def test_a_word_that_is_none_of_a_flags_is_told_those(refused: Any, setting: Field[Any]) -> None:
    name, choices = flag_name(setting), setting.metadata["flag"].choices
    said = refused([name, "nonsense"])
    assert name in said
    assert all(choice in said for choice in choices)
    for choice in choices:
        assert getattr(parse([name, choice]), setting.name) == choice
    given: dict[str, Any] = {setting.name: "nonsense"}
    with pytest.raises(ConfigError, match=f"{name} nonsense"):
        replace(parse([]), **given)


def test_help_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    assert "(default: 8000)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["--allowed-origins", "--allowed-methods", "--allowed-headers"])
def test_lists_are_json(refused: Any, name: str) -> None:
    field = name.removeprefix("--").replace("-", "_")
    assert getattr(parse([name, '["a", "b"]']), field) == ("a", "b")
    assert getattr(parse([name, "[]"]), field) == ()
    for wrong in ("*", "a", '"a"', "[1]", "{}", "[" * 50_000):
        assert name in refused([name, wrong])


def test_an_empty_key_would_let_everybody_in(refused: Any) -> None:
    assert "--api-key" in refused(["--api-key", ""])
    assert "--api-key" in refused(["--api-key", "a", "--api-key="])


def test_several_names() -> None:
    assert parse(["--served-model-name", "a", "b", "--ranks", "2"]).served_model_name == ("a", "b")
    assert parse(["--served-model-name=a"]).served_model_name == ("a",)
    assert parse([]).served_model_name == ()


FILED = """
model: /filed
ranks: 2
served_model_name: [a, b]
api-key: [x, y]
allowed-origins: ["https://a"]
enable-prefix-caching: false
mps: true
allow-credentials: false
max-model-len: null
trust-remote-code: true
"""


def test_flags_out_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(FILED)
    config = parse(["--config", str(file), "--port", "0"])
    assert (config.model, config.ranks, config.port) == ("/filed", 2, 0)
    assert (config.served_model_name, config.api_key) == (("a", "b"), ("x", "y"))
    assert (config.allowed_origins, config.enable_prefix_caching) == (("https://a",), False)
    assert (config.mps, config.allow_credentials, config.max_model_len) == (True, False, None)
    given = [
        "/given",
        "--config",
        str(file),
        "--ranks=4",
        "--served-model-name",
        "c",
        "--enable-prefix-caching",
    ]
    config = parse(given)
    assert (config.model, config.ranks, config.served_model_name) == ("/given", 4, ("c",))
    assert config.enable_prefix_caching
    assert parse(["--config", str(file), "--api-key", "z"]).api_key == ("z",)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("- a", "names of flags"),
        ("a: [", "--config"),
        ("1: 2", "names of flags"),
        ("no-such-flag: 1", "--no-such-flag"),
        ("rank: 1", "is --ranks meant?"),
        ("ranks: 100", "--ranks"),
        ("ranks: [1]", "--ranks"),
        ("tensor-parallel-size: 2", "--tensor-parallel-size"),
        ("no-such-flag: null", "--no-such-flag"),
        ("no-such-flag: false", "--no-such-flag"),
        ("port: false", "--port"),
        ("config: other.yaml", "--config is for the command line"),
        ("help: true", "--help is for the command line"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(refused: Any, tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text(content)
    assert told in refused(["--config", str(file)])


@pytest.mark.parametrize("flag", ["--config", "--admin-key-file", "--chat-template", "--tokenizer"])
def test_a_file_that_is_missing_is_named_once_and_so_is_its_flag(tmp_path: Path, flag: str) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ConfigError) as raised:  # noqa: PT012
        config = parse([flag, missing, "--device", "cpu"])
        serve._admin_key(config)
        make_plan(config)
    said = str(raised.value)
    assert said.count(missing) == 1
    assert said.startswith(flag)


def test_the_console_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert command([]) == USAGE_ERROR
    assert "elastic-ep serve MODEL" in capfd.readouterr().err
    assert command(["--help"]) == 0
    assert "elastic-ep serve MODEL" in capfd.readouterr().out
    assert command(["serve", "/model", "--no-such-flag"]) == USAGE_ERROR
    assert "--no-such-flag" in capfd.readouterr().err
    script = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert script == {"elastic-ep": f"{command.__module__}:{command.__name__}"}


@pytest.mark.parametrize(
    "given",
    [
        ["--ssl-keyfile", "k"],
        ["--ssl-ca-certs", "c"],
        ["--ssl-keyfile=k", "--ssl-certfile=c", "--ssl-cert-reqs=2"],
    ],
)
def test_flags_for_https_belong_together(refused: Any, given: list[str]) -> None:
    assert "--ssl-" in refused(given)
