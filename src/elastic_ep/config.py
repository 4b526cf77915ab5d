"""Configuration: frozen dataclasses, validated once, at the edge. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from elastic_ep.placement import Placement
from elastic_ep.timing import Timing
from elastic_ep.wire.codec import decode, encode
from elastic_ep.wire.slot_messages import PeerWeights

PAGE_SIZE = 16
"""Tokens in a page of KV cache."""
MOST_MODEL_LEN = 1 << 20


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of one rank's engine, all per rank. `num_pages` pages of `page_size` tokens of KV cache."""

    max_model_len: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    page_size: int = PAGE_SIZE
    num_pages: int = 1024


class EventLogMode(StrEnum):
    """What of its clients' text a run writes down: none and no event either, none but all events, all."""

    OFF = "off"
    IDS = "ids"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """What every process of a run writes to stderr: from which level on, and how."""

    level: str = "info"
    format: str = "console"


@dataclass(frozen=True, slots=True)
class RankConfig:
    """All that one launch of a rank needs to know; travels through the fork server as JSON."""

    rank: int
    incarnation: int
    directory: str
    """Where the control plane's sockets are."""
    model: str
    load_format: str
    device: str
    seed: int
    limits: EngineLimits
    timing: Timing
    placement: Placement
    """As it is at this launch: the rank loads its row."""
    peers: PeerWeights | None = None
    """Who has weights to give; None before anybody has."""
    log: LogConfig = LogConfig()

    def to_json(self) -> str:
        return encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> RankConfig:
        """Raises MalformedMessage."""
        return decode(text.encode(), cls)


CONTENT_FORMATS = ("auto", "string", "openai")
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("console", "json")


class CannotRun(RuntimeError):
    """This machine cannot run a rank. The message is one line that says what is missing and what to do."""


class ConfigError(ValueError):
    """A setting is wrong. The message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """The command line of `python -m elastic_ep.run`. Raises `ConfigError`."""

    ranks: int
    model: str
    device: str = "auto"
    mps: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_key: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ("*",)
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    num_pages: int | None = None
    max_queued: int = 1024
    request_timeout_s: float = 600.0
    ep_num_redundant_experts: int | None = None
    enable_eplb: bool = False
    eplb_rebalance_num_iterations: int = 1000
    load_format: str = "auto"
    chat_template: str | None = None
    """A file or a template; None: the model folder's."""
    chat_template_content_format: str = "auto"
    trust_request_chat_template: bool = False
    relaunch_limit: int = 10
    hang_deadline_s: float = 1.0
    stop_deadline_s: float = 30.0
    fault_tolerance: bool = True
    log_dir: str = "runs"
    event_log: EventLogMode | None = None
    """None: `IDS`; without fault tolerance `OFF`."""
    event_log_max_mb: int = 1024
    """0: no limit."""
    log_level: str = "info"
    log_format: str = "console"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_range("--ranks", self.ranks, 1, 64)
        _check_range("--port", self.port, 0, 65535)
        if not all(self.api_key):
            raise ConfigError("--api-key is empty: give a key, or leave the flag out if none is needed")
        _check_range("--max-queued", self.max_queued, 1, 1_000_000)
        _check_range("--request-timeout", self.request_timeout_s, 0.1, 1_000_000)
        _check_range("--relaunch-limit", self.relaunch_limit, 0, 1_000_000)
        _check_range("--eplb-rebalance-num-iterations", self.eplb_rebalance_num_iterations, 1, 1 << 31)
        _check_range("--hang-deadline", self.hang_deadline_s, 0.2, 3600)
        _check_range("--stop-deadline", self.stop_deadline_s, 0, 3600)
        if self.max_model_len is not None:
            _check_range("--max-model-len", self.max_model_len, 2, MOST_MODEL_LEN)
        if self.num_pages is not None:
            _check_range("--num-gpu-blocks-override", self.num_pages, 1, 1 << 24)
        if self.ep_num_redundant_experts is not None:
            _check_range("--ep-num-redundant-experts", self.ep_num_redundant_experts, 0, 1 << 16)
        _check_range("--event-log-max-mb", self.event_log_max_mb, 0, 1 << 30)
        if not self.fault_tolerance and self.event_log not in (None, EventLogMode.OFF):
            raise ConfigError(
                f"--event-log {self.event_log}: there is no event log with --disable-fault-tolerance: leave one out"
            )
        _check_choice("--chat-template-content-format", self.chat_template_content_format, CONTENT_FORMATS)
        _check_choice("--log-level", self.log_level, LOG_LEVELS)
        _check_choice("--log-format", self.log_format, LOG_FORMATS)
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is not None:
            _check_range("--max-num-seqs", seqs, 1, 4096)
        if tokens is not None:
            _check_range("--max-num-batched-tokens", tokens, 1, 65536)
        if seqs is not None and tokens is not None and tokens < seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {tokens} is less than --max-num-seqs {seqs}: raise the first or lower "
                "the second"
            )

    @property
    def timing(self) -> Timing:
        return Timing(
            hang_deadline_ms=round(self.hang_deadline_s * 1000),
            stop_deadline_ms=round(self.stop_deadline_s * 1000),
            ranks=self.ranks,
            fault_tolerance=self.fault_tolerance,
            mps=self.mps,
            relaunch_limit=self.relaunch_limit,
        )

    @property
    def event_log_mode(self) -> EventLogMode:
        if self.event_log is not None:
            return self.event_log
        return EventLogMode.IDS if self.fault_tolerance else EventLogMode.OFF

    @property
    def log(self) -> LogConfig:
        return LogConfig(self.log_level, self.log_format)


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{flag} {value} is not known: give one of {', '.join(choices)}")


def _check_range(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{flag} {value} is out of range: give a value from {low} to {high}")
