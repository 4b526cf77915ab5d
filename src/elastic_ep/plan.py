"""What the command line and the checkpoint amount to: checked once, before a process is started. No torch."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from elastic_ep.config import (
    ALL2ALL_BACKENDS,
    LOCAL_ADDRESS,
    MOST_MODEL_LEN,
    ConfigError,
    EngineLimits,
    RankConfig,
    ServeConfig,
    why,
)
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.mooncake_needs import EXPERTS_MULTIPLE
from elastic_ep.fused.library import Unavailable, best_build
from elastic_ep.gateway.settings import SamplingDefaults, unhonoured
from elastic_ep.gateway.text.chat_template import ChatTemplates
from elastic_ep.gateway.text.content_form import ContentForm
from elastic_ep.gateway.text.fit import TextFit, fit
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.tls import server_context
from elastic_ep.host.devices import choose_device
from elastic_ep.host.mps import find_program
from elastic_ep.kv.shelf_file import ShelfLayout
from elastic_ep.machine_memory import available_memory, total_memory
from elastic_ep.models.config_json import CheckpointError
from elastic_ep.models.known import CUDA, FUSED, unknown
from elastic_ep.models.registry import load_spec
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import Placement, grown, launch_placement
from elastic_ep.precision import Precision, precision
from elastic_ep.weights.checkpoint import validate_checkpoint

MACHINE_SHARE = 0.1
"""Of the memory that is available: for the KV caches of all ranks on a processor, unless the command line says how many
pages. A page takes memory when it is first used."""
SHELF_SHARE = 0.1
"""Of the machine's memory, for the shelf, unless the command line says how much."""
MEMORY_UTILIZATION = 0.9
"""Of a GPU, for the ranks on it, unless the command line says how much. vLLM's."""
_SEQUENCES = {"cpu": 16, "cuda": 256}
"""That a rank runs at once, unless the command line says how many. On a GPU one costs a step what 64 cost: so survivors
have seats for a lost rank's requests, too."""
_TOKENS = {"cpu": 64, "cuda": 4096 + 256}
"""Of a step, likewise. On a GPU a prompt of 4096 fits into one beside a decode in each seat. So many are computed while
nobody decodes, else what leaves decodes their pace (see engine/prompt_pace.py)."""
_TOKENS_SHARED = 512
"""Of ranks that share a GPU: the exchange's buffers and the experts' working memory grow with it, in each of them."""


@dataclass(frozen=True)
class ServePlan:
    """Everything that the command line and the checkpoint amount to."""

    config: ServeConfig
    folder: Path
    model: ModelSpec
    load_text: Callable[[], ChatTokenizer]
    """Picklable: the process that reads large bodies loads its own."""
    text: ChatTokenizer
    defaults: SamplingDefaults
    """For requests that do not say."""
    text_fit: TextFit
    left_out: tuple[str, ...]
    """Of the model folder, what is not honoured, and of the machine, what is missing: a line each."""
    limits: EngineLimits
    placement: Placement
    redundant: int
    device: str
    names: tuple[str, ...]
    """That clients may call the model by, at least one."""
    tls: ssl.SSLContext | None
    shelf: ShelfLayout | None
    fused: str
    """As in `RankConfig`."""
    precision: Precision

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def notices(self) -> tuple[str, ...]:
        """What an operator should know of the model folder and the machine before it serves: a line each."""
        return (*self.text_fit.notices, *self.left_out)

    @property
    def shape(self) -> ExchangeShape:
        return self.model.exchange_shape(self.limits.max_num_batched_tokens, self.placement)

    @property
    def memory_utilization(self) -> float | None:
        """Of a GPU, if ranks size their KV cache by it."""
        if self.config.num_pages is not None or self.device == "cpu":
            return None
        return self.config.gpu_memory_utilization or MEMORY_UTILIZATION

    @property
    def cache_flag(self) -> str:
        """Which flag the size of the KV cache is a matter of."""
        return "--gpu-memory-utilization" if self.memory_utilization else "--num-gpu-blocks-override"

    def rank_config(self, directory: Path) -> RankConfig:
        """Of the first launch of the first rank. `directory` is the run's, private."""
        return RankConfig(
            rank=0,
            incarnation=1,
            directory=str(directory),
            model=str(self.folder.resolve()),
            load_format=self.config.load_format,
            device=self.device,
            seed=self.config.seed,
            limits=self.limits,
            shelf=self.shelf,
            prefix_caching=self.config.enable_prefix_caching,
            fused=self.fused,
            halves=self.precision.halves,
            rounding=self.precision.rounding,
            widened=self.precision.widened,
            timing=self.config.timing,
            placement=self.placement,
            all2all_backend=self.config.all2all_backend,
            gpu_memory_utilization=self.memory_utilization,
            host_address=self.config.joined_at[0] if self.config.capacity_hosts > 1 else LOCAL_ADDRESS,
            log=self.config.log,
        )


def make_plan(config: ServeConfig) -> ServePlan:
    """Check all that can be checked before a process is started. Raises `ConfigError`."""
    folder = Path(config.model)
    try:
        model = load_spec(folder)
        dtypes = set[str]()
        if config.load_format == "auto":
            dtypes = {entry.dtype for entry in validate_checkpoint(folder, model).values()}
        load_text = partial(
            ChatTokenizer.load,
            Path(config.tokenizer or folder),
            _chat_template(config),
            _content_form(config),
        )
        text = _loaded(config, load_text)
        defaults, left_out = _sampling_defaults(config, folder)
    except ConfigError:
        raise
    except (CheckpointError, ValueError, OSError) as error:
        raise ConfigError(_folder_fault("--model", folder, error)) from error
    device = choose_device(config.device, config.all2all_backend, model.hidden_size)
    if device == "cuda" and (what := unknown(model, CUDA)):
        raise ConfigError(f"--device cuda: its kernels do not know this model's {what}: give --device cpu")
    if device == "cpu" and config.gpu_memory_utilization is not None:
        raise ConfigError(
            "--gpu-memory-utilization: the ranks run on the CPU: how large a KV cache is says --num-gpu-blocks-override"
        )
    if device == "cpu" and config.prompt_stretch is not None:
        raise ConfigError(
            "--prompt-stretch: the ranks run on the CPU: how much a step computes says --max-num-batched-tokens"
        )
    if device == "cpu" and config.all2all_backend != ALL2ALL_BACKENDS[0]:
        raise ConfigError(
            f"--all2all-backend {config.all2all_backend}: the ranks run on the CPU, through shared memory: leave it out"
        )
    if config.mps:
        if device != "cuda":
            raise ConfigError("--mps needs --device cuda: it shares a GPU among ranks")
        find_program()
    fused, notices = _fused_build(device, model)
    numbers = precision(config, model, dtypes, device, fused=bool(fused))
    redundant = _redundant(config, model)
    limits = engine_limits(config, model, device)
    return ServePlan(
        config=config,
        folder=folder,
        model=model,
        load_text=load_text,
        text=text,
        defaults=defaults,
        text_fit=fit(text, model),
        left_out=(*left_out, *notices, *numbers.notices),
        fused=fused,
        precision=numbers,
        limits=limits,
        shelf=shelf_layout(config, model.kv_page_bytes(device, limits.page_size)),
        placement=first_placement(config, model, redundant, device),
        redundant=redundant,
        device=device,
        names=config.served_model_name
        or ("elastic-ep-math" if folder.parent.name == "assets" else folder.resolve().name,),
        tls=_tls(config),
    )


def _fused_build(device: str, model: ModelSpec) -> tuple[str, tuple[str, ...]]:
    """What ranks on a processor compute with, and what is to be said of it."""
    if device != "cpu":
        return "", ()
    try:
        if what := unknown(model, FUSED):
            raise Unavailable(f"the engine in C++ does not know this model's {what}")
        return best_build(), ()
    except Unavailable as reason:
        return "", (f"ranks compute in plain torch, which is several times slower: {reason}",)


def _loaded(config: ServeConfig, load: Callable[[], ChatTokenizer]) -> ChatTokenizer:
    """Raises ValueError and OSError if it is the model's folder, else `ConfigError`."""
    try:
        return load()
    except (ValueError, OSError) as error:
        if config.tokenizer is None:
            raise
        raise ConfigError(_folder_fault("--tokenizer", Path(config.tokenizer), error)) from error


def _folder_fault(flag: str, folder: Path, error: Exception) -> str:
    """One line that names the folder once, whatever names and values of its files are in it."""
    said = "".join(one if one.isprintable() else " " for one in str(error))
    return f"{flag}: {said}" if str(folder) in said else f"{flag} {folder}: {said}"


def _sampling_defaults(config: ServeConfig, folder: Path) -> tuple[SamplingDefaults, tuple[str, ...]]:
    """And a line for each wish that is not honoured. Raises `CheckpointError`."""
    given = config.generation_config
    if given == "vllm":
        return SamplingDefaults(), ()
    where = folder if given == "auto" else Path(given)
    if given != "auto" and not (where / "generation_config.json").is_file():
        raise ConfigError(
            f"--generation-config {given}: no folder with a generation_config.json: give one, auto or vllm"
        )
    return SamplingDefaults.from_folder(where), unhonoured(where)


def _tls(config: ServeConfig) -> ssl.SSLContext | None:
    key, certificate = config.ssl_keyfile, config.ssl_certfile
    if key is None or certificate is None:
        return None
    try:
        return server_context(key, certificate, config.ssl_ca_certs, config.ssl_cert_reqs)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _chat_template(config: ServeConfig) -> str | None:
    """What --chat-template says: a file, or a template on the command line. Raises `ConfigError`."""
    given = config.chat_template
    if given is None:
        return None
    source = given
    if not any(mark in given for mark in "{}\n"):
        try:
            source = Path(given).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--chat-template {given!r}: {why(error)}: give a file, or a template in Jinja's syntax"
            ) from error
    try:
        ChatTemplates(source)
    except ValueError as error:
        raise ConfigError(f"--chat-template: {why(error)}") from error
    return source


def _content_form(config: ServeConfig) -> ContentForm | None:
    """None: as each template wants it."""
    given = config.chat_template_content_format
    return None if given == "auto" else ContentForm(given)


def _redundant(config: ServeConfig, model: ModelSpec) -> int:
    """Copies beyond one of each expert. A single rank cannot hold two of one, and empty slots take as much memory."""
    if config.ep_num_redundant_experts is not None:
        return config.ep_num_redundant_experts
    return model.moe.experts if config.ranks > 1 else 0


def first_placement(config: ServeConfig, model: ModelSpec, redundant: int, device: str) -> Placement:
    """With a spare slot on every rank for rebalancing, and with one where Mooncake's even number of experts takes it."""
    spare = int(config.enable_eplb)
    slots = -(-(model.moe.experts + redundant) // config.ranks) + spare
    mooncake = device == "cuda" and config.all2all_backend == "mooncake"
    if mooncake and config.ranks * slots % EXPERTS_MULTIPLE:
        spare += 1
    hosts = config.host_of_rank
    first = launch_placement(
        config.ranks,
        model.moe_layers,
        model.moe.experts,
        redundant,
        num_spare=spare,
        hosts=hosts[: config.ranks],
    )
    return grown(first, hosts, num_spare=spare) if hosts else first


def engine_limits(config: ServeConfig, model: ModelSpec, device: str) -> EngineLimits:
    max_model_len = config.max_model_len or model.max_position_embeddings
    if max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the model's {model.max_position_embeddings} positions"
        )
    if max_model_len > MOST_MODEL_LEN:
        raise ConfigError(
            f"the model has {max_model_len} positions: give --max-model-len, at most {MOST_MODEL_LEN}"
        )
    limits = EngineLimits(max_model_len, *_step_size(config, device))
    if config.prompt_stretch is not None:
        limits = replace(limits, prompt_stretch=config.prompt_stretch)
    one_sequence = limits.sequence_pages
    if config.num_pages is None:
        return replace(
            limits, num_pages=one_sequence if device == "cuda" else _cpu_pages(config, model, limits)
        )
    num_pages = config.num_pages
    if num_pages < one_sequence:
        raise ConfigError(
            f"--num-gpu-blocks-override {num_pages} cannot hold one sequence of {max_model_len} tokens: give at least "
            f"{one_sequence} or lower --max-model-len"
        )
    return replace(limits, num_pages=num_pages)


def _cpu_pages(config: ServeConfig, model: ModelSpec, limits: EngineLimits) -> int:
    """As many as memory has room for, not more than all sequences need. Raises `ConfigError` if that is less than one."""
    available, page = available_memory(), model.kv_page_bytes("cpu", limits.page_size)
    one_sequence = limits.sequence_pages
    if one_sequence * page * config.ranks > available:
        raise ConfigError(
            f"a KV cache for one sequence of {limits.max_model_len} tokens takes {one_sequence * page / 2**30:.2f} GiB "
            f"on each of {config.ranks} ranks, but {available / 2**30:.2f} GiB of memory are available: lower "
            "--max-model-len or --ranks"
        )
    affordable = int(available * MACHINE_SHARE) // (page * config.ranks)
    return min(limits.max_num_seqs * one_sequence, max(one_sequence, affordable))


def shelf_layout(config: ServeConfig, page_bytes: int) -> ShelfLayout | None:
    """None: there is no shelf, as it was turned off, or as there is too little memory for one. Raises `ConfigError`."""
    asked, available = config.kv_shelf_gib, available_memory()
    if asked is None:
        size = min(int(total_memory() * SHELF_SHARE), available // 2) if config.fault_tolerance else 0
        return ShelfLayout.fit(config.capacity, page_bytes, size)
    if asked * 2**30 > available:
        raise ConfigError(
            f"--kv-shelf-gib {asked:g}: only {available / 2**30:.1f} GiB of memory are available: give less, or 0"
        )
    layout = ShelfLayout.fit(config.capacity, page_bytes, int(asked * 2**30))
    if asked and layout is None:
        least = ShelfLayout(config.capacity, 1, page_bytes).total / 2**30
        raise ConfigError(
            f"--kv-shelf-gib {asked:g} has no room for a page of each rank: give at least {2 * least:.2g}, or 0"
        )
    return layout


def _step_size(config: ServeConfig, device: str) -> tuple[int, int]:
    """Sequences and tokens: what is not given suits what is."""
    sequences, tokens = config.max_num_seqs, config.max_num_batched_tokens
    usual = _TOKENS_SHARED if config.mps else _TOKENS[device]
    if sequences is None:
        sequences = min(_SEQUENCES[device], tokens or usual)
    return sequences, tokens or max(usual, sequences)
