"""Configuration: frozen dataclasses, validated once, at the edge. Standard library only."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import StrEnum
from typing import Any

from elastic_ep.kv.shelf_file import ShelfLayout
from elastic_ep.placement import Placement
from elastic_ep.timing import USUAL, Timing
from elastic_ep.wire.codec import decode, encode
from elastic_ep.wire.control_address import ControlAddress
from elastic_ep.wire.slot_messages import PeerWeights

PAGE_SIZE = 16
"""Tokens in a page of KV cache."""
MOST_MODEL_LEN = 1 << 20
CALL_PARSERS = (
    "hermes", "qwen3", "qwen", "qwen25", "qwen3_coder", "qwen3_xml", "mistral", "deepseek_v3", "deepseekv3",
    "deepseek_v31", "deepseekv31", "glm45", "glm47", "glm", "kimi_k2", "minimax_m2", "minimax-m2", "openai",
    "harmony", "gpt-oss",
)  # fmt: skip
"""By the names that vLLM and SGLang have for them."""
REASONING_PARSERS = (
    "qwen3", "glm45", "deepseek_v3", "deepseek-v3", "deepseek_r1", "deepseek-r1", "openai_gptoss", "gpt-oss",
    "kimi_k2", "minimax_m2", "minimax",
)  # fmt: skip
DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")
QUANTIZATIONS = ("auto", "none", "fp8", "mxfp4", "compressed-tensors")
ALL2ALL_BACKENDS = ("peer-memory", "mooncake")
OWN_PATHS = frozenset({
    "v1", "page", "live", "health", "health_generate", "ping", "load", "server_info", "get_server_info", "model_info",
    "get_model_info", "tokenizer_info", "metrics", "version", "openapi.json", "rebalance", "tokenize", "detokenize",
    "scale_elastic_ep", "is_scaling_elastic_ep",
})  # fmt: skip
"""How the HTTP API's paths begin."""
LOG_LEVELS = ("debug", "info", "warning", "error")
MOST_RANKS = 64
LOCAL_ADDRESS = "127.0.0.1"
MOST_PORT = 65535 - 3
"""Of those that hosts join at: the three after it are used, too."""
PRELOAD = ("torch", "elastic_ep.rank.process", "elastic_ep.guided.shared", "elastic_ep.fused.library")
"""What the fork server imports for all ranks. Nothing of it may touch a device or start a thread."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Sizes of one rank's engine, all per rank. `num_pages` pages of `page_size` tokens of KV cache.

    A rank that sizes its KV cache itself replaces `num_pages`, and is told the least that will do: one sequence's.
    """

    max_model_len: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 64
    page_size: int = PAGE_SIZE
    num_pages: int = 1024
    prompt_stretch: float = 8.0
    """See engine/prompt_pace.py."""

    @property
    def cache_pages(self) -> int:
        """That there is memory for: one more, where padding is written to and read from."""
        return self.num_pages + 1

    @property
    def sequence_pages(self) -> int:
        """Of the longest sequence."""
        return -(-self.max_model_len // self.page_size)


class EventLogMode(StrEnum):
    """What of its clients' text a run writes down: none and no event either, none but all events, all."""

    OFF = "off"
    IDS = "ids"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class RankLog:
    """Where ranks log their machines' events: each incarnation in `folder`, at most `max_bytes` (0: without a limit)."""

    folder: str
    mode: EventLogMode
    max_bytes: int


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
    prefix_caching: bool = True
    """Requests share pages. Without, a request has its own of before alone, when it comes back."""
    shelf: ShelfLayout | None = None
    """Of pages in host memory; None: there are none."""
    fused: str = ""
    """On a processor: the build of `elastic_ep.fused` that all ranks compute with; "": plain torch. Their bits differ,
    and a stream that moves must go on with the same ones."""
    halves: bool = False
    """Whether that keeps the weights in bfloat16, as the checkpoint has them."""
    rounding: str = ""
    """To what the weights are rounded, whatever holds them: "", bfloat16 or float16."""
    widened: bool = False
    """On a GPU: experts of a quantised checkpoint are numbers from the start, not computed from their codes."""
    all2all_backend: str = ALL2ALL_BACKENDS[0]
    """What carries rows between GPUs."""
    gpu_memory_utilization: float | None = None
    """Of its GPU's memory, for all ranks on it: what a rank's share has left is KV cache. None: it is not sized so."""
    host_address: str = LOCAL_ADDRESS
    """Of this machine, that ranks of other hosts dial to read weights out of this one's memory."""
    control: ControlAddress | None = None
    """None: in `directory`."""
    peers: PeerWeights | None = None
    """Who has weights to give; None before anybody has."""
    log: LogConfig = LogConfig()
    event_log: RankLog | None = None

    def to_json(self) -> str:
        return encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> RankConfig:
        """Raises MalformedMessage."""
        return decode(text.encode(), cls)


class CannotRun(RuntimeError):
    """This machine cannot run a rank. The message is one line that says what is missing and what to do."""


class ConfigError(ValueError):
    """A setting is wrong. The message is one line that says what to do."""


def why(error: Exception) -> str:
    """In one line, without the name of the file that it is about, which whoever tells it has said."""
    said = error.strerror if isinstance(error, OSError) else None
    return said or " ".join(str(error).split())


@dataclass(frozen=True, slots=True)
class Flag:
    """How a setting is given on the command line, and which values it may have. A switch takes none; one of `two` has a
    --no- form too."""

    help: str
    name: str = ""
    """If it is not the field's."""
    other_name: str = ""
    within: tuple[float, float] | None = None
    choices: tuple[str, ...] = ()
    repeated: bool = False
    several: bool = False
    """Values behind one name."""
    two: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises `ConfigError`. None is what was not given."""
        if value is None:
            return
        if self.within is not None and not self.within[0] <= value <= self.within[1]:
            least, most = self.within
            raise ConfigError(f"{name} {value} is out of range: give a value from {least} to {most}")
        if self.choices and value not in self.choices:
            raise ConfigError(f"{name} {value} is not known: give one of {', '.join(self.choices)}")


def _root_path_fault(root: str) -> str | None:
    """HAZARD: the API's keys are asked for by path: one that is the server's own and the proxy's must not be."""
    parts = root.removesuffix("/").split("/")[1:]
    plain = re.fullmatch(r"(/[A-Za-z0-9._~-]+)+/?", root) and not {".", ".."}.intersection(parts)
    if not plain:
        return "is not such a path: give one as /some/where, of letters, digits and . _ ~ -"
    if parts[0] in OWN_PATHS:
        return f"begins as paths of the server do: give one that does not begin with /{parts[0]}"
    return None


def address_of(flag: str, given: str) -> tuple[str, int]:
    """A numeric address and a port. Raises `ConfigError`."""
    host, colon, port = given.rpartition(":")
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
        if not colon or not port.isascii() or not port.isdecimal() or int(port) > MOST_PORT:
            raise ValueError(f"{port!r} is no port from 0 to {MOST_PORT}")
        if address.is_unspecified:
            raise ValueError(f"{address} is no address that others can dial")
    except ValueError as error:
        raise ConfigError(f"{flag} {given}: give ADDRESS:PORT, an IP address and a port ({error})") from error
    return str(address), int(port)


def flag_name(setting: Field[Any]) -> str:
    return setting.metadata["flag"].name or "--" + setting.name.replace("_", "-")


def _flag(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"flag": Flag(help, **more)})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """The command line of `python -m elastic_ep.run`: a field is a flag. Raises `ConfigError`."""

    # fmt: off
    ranks: int = _flag(USUAL.ranks, f"rank processes, 1 to {MOST_RANKS}", within=(1, MOST_RANKS))
    hosts: int = _flag(1, "machines that ranks are on: this one, and others that join (see docs/hosts.md)",
        within=(1, MOST_RANKS))
    max_hosts: int | None = _flag(None,
        "the group's capacity: hosts beyond --hosts that join make it grow up to so many; --hosts if not given",
        within=(1, MOST_RANKS))
    ranks_per_host: int | None = _flag(None, "with --hosts, instead of --ranks: ranks on each of them",
        within=(1, MOST_RANKS))
    hosts_address: str | None = _flag(None,
        "ADDRESS:PORT of this machine where others join, in a private network; the next three ports are used, too")
    ray: str | None = _flag(None,
        "ADDRESS of a Ray cluster, or auto: it starts an agent on each of the other hosts, and anew where one is lost")
    ray_agents: int | None = _flag(None,
        "agents that Ray starts, each on a node of its own (--hosts less one); more are spares, or what it grows by",
        within=(1, MOST_RANKS))
    key_file: str | None = _flag(None, "the key that all hosts share, made here if there is no such file")
    model: str = _flag(MISSING, "folder with a checkpoint in Hugging Face layout; the bundled one if not given",
        other_name="--model-path")
    device: str = _flag("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    mps: bool = _flag(False, "a private MPS daemon, for several ranks on one GPU")
    host: str = _flag("127.0.0.1", "where to listen")
    port: int = _flag(8000, "0 picks a free one", within=(0, 65535))
    served_model_name: tuple[str, ...] = _flag((),
        "names in the API, answers have the first; the folder's name if not given", several=True)
    ssl_keyfile: str | None = _flag(None, "HTTPS with this key, in PEM; needs --ssl-certfile")
    ssl_certfile: str | None = _flag(None, "and this certificate")
    ssl_ca_certs: str | None = _flag(None, "who may have signed clients' certificates")
    ssl_cert_reqs: int = _flag(0, "clients' certificates: 0 none is needed, 1 it may be shown, 2 it must be",
        within=(0, 2))
    api_key: tuple[str, ...] = _flag((), "clients must send it; may be given several times", repeated=True)
    admin_key: str | None = _flag(None,
        "who relaunches, verifies or rebalances, by the page or by HTTP, must send it; else the page only shows")
    admin_key_file: str | None = _flag(None, "a file with the admin key, which ps does not show")
    allowed_origins: tuple[str, ...] = _flag(("*",), "whose web pages may call, as a JSON list")
    allowed_methods: tuple[str, ...] = _flag(("*",), "by which methods")
    allowed_headers: tuple[str, ...] = _flag(("*",), "with which headers")
    allow_credentials: bool = _flag(False, "and with cookies")
    root_path: str | None = _flag(None, "below which a proxy shows this server, whether or not the proxy takes it off")
    max_model_len: int | None = _flag(None, "prompt plus generated tokens; the model's own if not given",
        within=(2, MOST_MODEL_LEN))
    max_num_seqs: int | None = _flag(None, "sequences that a rank runs at once (16, on a GPU 256)", within=(1, 4096))
    max_num_batched_tokens: int | None = _flag(None, "tokens that a rank computes in one step (64, on a GPU 4352)",
        within=(1, 65536))
    prompt_stretch: float | None = _flag(None,
        "on a GPU, how many times as long as a step of decodes alone one with prompts beside them may take (8)",
        within=(1, 1000))
    all2all_backend: str = _flag(ALL2ALL_BACKENDS[0],
        "what carries tokens between GPUs: each other's memory, or Mooncake EP", choices=ALL2ALL_BACKENDS)
    gpu_memory_utilization: float | None = _flag(None,
        "share of a GPU's memory for all ranks on it (0.9); what weights and steps leave of it is KV cache",
        within=(0.01, 1))
    num_pages: int | None = _flag(None,
        f"KV cache pages ({PAGE_SIZE} tokens) a rank; what memory has room for if not given",
        name="--num-gpu-blocks-override", within=(1, 1 << 24))
    enable_prefix_caching: bool = _flag(True, "prompts that begin alike share pages of KV cache", two=True)
    kv_shelf_gib: float | None = _flag(None,
        "GiB of the machine's memory for copies of KV cache, which outlive their rank (a tenth of it); 0: none",
        within=(0, 1 << 20))
    max_queued: int = _flag(1024, "requests that may wait; more get 429", within=(1, 1_000_000))
    request_timeout_s: float = _flag(600.0, "seconds after which a request that is not complete fails",
        name="--request-timeout", within=(0.1, 1_000_000))
    ep_num_redundant_experts: int | None = _flag(None, "extra expert copies; if not given as many as experts (1 rank: 0)",
        within=(0, 1 << 16))
    enable_eplb: bool = _flag(False, "rebalance experts by load; keeps a slot of each rank spare")
    eplb_rebalance_num_iterations: int = _flag(1000, "steps between two rebalances, with --enable-eplb",
        within=(1, 1 << 31))
    load_format: str = _flag("auto", "dummy: random weights", choices=("auto", "dummy"))
    dtype: str = _flag("auto",
        "what the weights are rounded to; auto: they stay as they are, on a GPU they are bfloat16", choices=DTYPES)
    quantization: str = _flag("auto",
        "how the checkpoint is quantised: its config.json says so, and must not say otherwise", other_name="-q",
        choices=QUANTIZATIONS)
    tokenizer: str | None = _flag(None, "folder with the tokenizer and its chat template; the model's if not given",
        other_name="--tokenizer-path")
    generation_config: str = _flag("auto",
        "folder with generation_config.json; auto: the model's; vllm: none, so defaults are as in OpenAI's API")
    chat_template: str | None = _flag(None,
        "a file with a chat template, or the template; the model folder's if not given")
    chat_template_content_format: str = _flag("auto",
        "messages' content for the template: strings, lists of parts (openai), or as it wants them (auto)",
        choices=("auto", "string", "openai"))
    trust_request_chat_template: bool = _flag(False, "let requests bring a chat template of their own")
    tool_call_parser: str | None = _flag(None, "how calls of tools are read from what the model writes",
        choices=CALL_PARSERS)
    enable_auto_tool_choice: bool = _flag(False, "as --tool-call-parser says; it is enough to give that")
    reasoning_parser: str | None = _flag(None, "how reasoning is told from the answer", choices=REASONING_PARSERS)
    responses_store_mib: int = _flag(64, "MiB of memory for responses that /v1/responses keeps; 0: none",
        within=(0, 1 << 20))
    relaunch_limit: int = _flag(USUAL.relaunch_limit,
        "early deaths in a row after which a rank waits 10 s and more for its next launch; 0: none returns",
        within=(0, 1_000_000))
    hang_deadline_s: float = _flag(USUAL.hang_deadline_ms / 1000, "seconds until a hang is dealt with",
        name="--hang-deadline", within=(0.2, 3600))
    stop_deadline_s: float = _flag(USUAL.stop_deadline_ms / 1000, "seconds a graceful stop may take",
        name="--stop-deadline", within=(0, 3600))
    fault_tolerance: bool = _flag(True,
        "no death watch, no heartbeats, no hang detection, no event log: to measure what they cost",
        name="--disable-fault-tolerance")
    log_dir: str = _flag("runs", "where each run's event log goes")
    event_log: EventLogMode | None = _flag(None,  # noqa: RUF009  # it makes a field, like all others
        "ids (if not given): all events without text and tokens; full: prompts and answers too; off: none",
        choices=tuple(EventLogMode))
    event_log_max_mb: int = _flag(1024,
        "what a run's event log may take on the disk; its oldest part is deleted. 0: no limit", within=(0, 1 << 30))
    otlp_traces_endpoint: str | None = _flag(None,
        "URL to which a span of each request goes, by OTLP over HTTP; needs the extra otel")
    log_level: str = _flag(LogConfig().level, "of the lines on stderr, of all processes",
        choices=LOG_LEVELS)
    log_format: str = _flag(LogConfig().format, "json: one object a line", choices=("console", "json"))
    seed: int = _flag(0, "of random weights, with --load-format dummy")
    # fmt: on

    def __post_init__(self) -> None:
        for setting in fields(self):
            setting.metadata["flag"].check(flag_name(setting), getattr(self, setting.name))
        self._check_hosts()
        if not all(self.api_key):
            raise ConfigError("--api-key is empty: give a key, or leave the flag out if none is needed")
        if self.admin_key == "":
            raise ConfigError(
                "--admin-key is empty: give a key, or leave the flag out if the page is only to show"
            )
        if self.admin_key is not None and self.admin_key_file is not None:
            raise ConfigError("the admin key is given twice, by --admin-key and by --admin-key-file")
        if not self.fault_tolerance and self.event_log not in (None, EventLogMode.OFF):
            raise ConfigError(
                f"--event-log {self.event_log}: there is no event log with --disable-fault-tolerance: leave one out"
            )
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("--ssl-keyfile and --ssl-certfile belong together: give both, or none")
        if self.ssl_keyfile is None and (self.ssl_ca_certs is not None or self.ssl_cert_reqs):
            raise ConfigError("--ssl-ca-certs and --ssl-cert-reqs need --ssl-keyfile and --ssl-certfile")
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            raise ConfigError(
                "--ssl-cert-reqs needs --ssl-ca-certs: who may have signed clients' certificates"
            )
        if not all(self.served_model_name):
            raise ConfigError("--served-model-name is empty: give a name, or leave the flag out")
        if self.root_path and (fault := _root_path_fault(self.root_path)):
            raise ConfigError(f"--root-path {self.root_path} {fault}")
        if self.enable_auto_tool_choice and self.tool_call_parser is None:
            raise ConfigError("--enable-auto-tool-choice needs --tool-call-parser: how calls are read")
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        if seqs is not None and tokens is not None and tokens < seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {tokens} is less than --max-num-seqs {seqs}: raise the first or lower "
                "the second"
            )

    def _check_hosts(self) -> None:
        if self.hosts == self.capacity_hosts == 1:
            for name, value in (
                ("--ranks-per-host", self.ranks_per_host),
                ("--hosts-address", self.hosts_address),
                ("--key-file", self.key_file),
                ("--ray", self.ray),
                ("--ray-agents", self.ray_agents),
            ):
                if value is not None:
                    raise ConfigError(f"{name} is for several hosts: give --hosts, or leave it out")
            return
        if self.capacity_hosts < self.hosts:
            raise ConfigError(
                f"--max-hosts {self.max_hosts} is less than --hosts {self.hosts}: raise it, or leave it out"
            )
        most = f"--max-hosts {self.max_hosts}" if self.max_hosts else f"--hosts {self.hosts}"
        if self.ranks_per_host is None or self.ranks_per_host * self.capacity_hosts > MOST_RANKS:
            raise ConfigError(f"{most} needs --ranks-per-host, for at most {MOST_RANKS} ranks on all of them")
        if self.ranks not in (USUAL.ranks, self.ranks_per_host * self.hosts):
            raise ConfigError(f"--ranks {self.ranks}: with --hosts give --ranks-per-host alone")
        # The number of ranks follows; nothing else of this class is derived.
        object.__setattr__(self, "ranks", self.ranks_per_host * self.hosts)
        if self.hosts_address is None or self.key_file is None:
            raise ConfigError(
                f"{most} needs --hosts-address ADDRESS:PORT, where the others join, and --key-file"
            )
        address_of("--hosts-address", self.hosts_address)
        if self.ray_agents is not None and self.ray is None:
            raise ConfigError("--ray-agents needs --ray: without it, start agents by hand")
        if self.ray_agents is not None and self.ray_agents < self.hosts - 1:
            raise ConfigError(
                f"--ray-agents {self.ray_agents}: --hosts {self.hosts} needs {self.hosts - 1} beside this one"
            )
        if not self.fault_tolerance:
            raise ConfigError("--disable-fault-tolerance is for one host: leave it out, or --hosts")
        if self.mps:
            raise ConfigError("--mps is for ranks that share a GPU of one host: leave it out, or --hosts")

    @property
    def joined_at(self) -> tuple[str, int]:
        """Address and port. Raises `ConfigError`."""
        return address_of("--hosts-address", self.hosts_address or "")

    @property
    def agents_on_ray(self) -> int:
        return 0 if self.ray is None else self.ray_agents or self.hosts - 1

    @property
    def capacity_hosts(self) -> int:
        """Hosts that the group may have."""
        return self.hosts if self.max_hosts is None else self.max_hosts

    @property
    def capacity(self) -> int:
        """Ranks that the group may have, and that what they share is sized for. It begins with `ranks`."""
        return self.ranks if self.ranks_per_host is None else self.ranks_per_host * self.capacity_hosts

    @property
    def host_of_rank(self) -> tuple[int, ...]:
        """The number of the host of each rank that there may be; nothing: there is one host."""
        if self.ranks_per_host is None:
            return ()
        return tuple(rank // self.ranks_per_host for rank in range(self.capacity))

    @property
    def timing(self) -> Timing:
        return Timing(
            hang_deadline_ms=round(self.hang_deadline_s * 1000),
            stop_deadline_ms=round(self.stop_deadline_s * 1000),
            ranks=self.capacity,
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
