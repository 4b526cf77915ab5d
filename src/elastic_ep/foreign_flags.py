"""Flags that vLLM and SGLang have and this program has not: the equivalent, or the reason, in a line.

A flag that asks for what is the case anyway is taken out and said; what cannot be honoured is refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from elastic_ep.config import ConfigError


@dataclass(frozen=True, slots=True)
class Foreign:
    """`says` goes behind the flag's name. With a value among `already` it asks for what is so anyway.

    A `switch` takes no value: `on` says that it is already so.
    """

    says: str
    already: tuple[str, ...] = ()
    switch: bool = False
    on: bool = False


def _table() -> dict[str, Foreign]:
    table: dict[str, Foreign] = {}
    for says, names in _EQUIVALENT.items():
        table |= {name: Foreign(f"does not exist here: give {says}") for name in names.split()}
    for says, names in _SWITCHED_ON.items():
        table |= {name: Foreign(says, switch=True, on=True) for name in names.split()}
    for says, names in _SWITCHES.items():
        table |= {name: Foreign(says, switch=True) for name in names.split()}
    for says, entries in _VALUES.items():
        for entry in entries.split():
            name, _, already = entry.partition("=")
            table[name] = Foreign(says, tuple(already.split(",")) if already else ())
    return table


_EQUIVALENT = {
    "--ranks": (
        "--data-parallel-size --dp-size --dp -dp --expert-parallel-size --ep-size --ep --data-parallel-size-local -dpl"
    ),
    "--model": "--hf-model",
    "--max-model-len": "--context-length --max-seq-len",
    "--max-num-seqs, which is of each rank": "--max-running-requests",
    "--max-num-batched-tokens": "--chunked-prefill-size --max-prefill-tokens",
    "--max-queued": "--max-queued-requests",
    "--no-enable-prefix-caching": "--disable-radix-cache --disable-prefix-caching",
    "--num-gpu-blocks-override, which is a number of pages of 16 tokens, of each rank": (
        "--kv-cache-memory-bytes --max-total-tokens"
    ),
    "--all2all-backend": "--moe-a2a-backend",
    "--gpu-memory-utilization": "--mem-fraction-static",
    "--seed": "--random-seed",
    "--ep-num-redundant-experts": "--num-redundant-experts --eplb-config",
    "--hang-deadline, in seconds": "--watchdog-timeout --soft-watchdog-timeout --elastic-ep-rejoin-timeout",
    "--log-level": "--log-level-http --uvicorn-log-level --verbosity",
    "--stop-deadline, in seconds": "--shutdown-timeout",
    "--log-dir": "--crash-dump-folder",
    "--admin-key": "--admin-api-key",
    "--root-path": "--fastapi-root-path",
}
_SWITCHED_ON = {
    "experts are always spread over the ranks": "--enable-expert-parallel -ep --enable-ep-moe",
    "each rank always serves its own share of the requests": "--enable-dp-attention",
    "a lost rank is always survived": "--enable-elastic-ep --enable-fault-tolerance --enable-elastic-expert-backup",
    "no code of a model folder is ever run": "--trust-remote-code --no-trust-remote-code",
    "prompts are always computed in chunks": "--enable-chunked-prefill --enable-mixed-chunk",
    "pages are kept in host memory unless --kv-shelf-gib is 0": "--enable-hierarchical-cache",
    "usage always tells cached_tokens": "--enable-cache-report --enable-prompt-tokens-details",
    "requests are not logged": "--disable-log-requests --no-enable-log-requests --no-log-requests",
    "statistics are served at /metrics, not logged": "--disable-log-stats --enable-metrics",
    "every answer has an X-Request-Id": "--enable-request-id-headers",
    "there is no all-reduce": "--disable-custom-all-reduce",
    "requests are read in a process of their own where they are long": "--disable-frontend-multiprocessing",
    "it starts without warming up": "--skip-server-warmup",
    "a sequence's numbers never depend on its batch": "--enable-deterministic-inference",
    "it is always so": "--async-scheduling --disable-hybrid-kv-cache-manager --enable-tokenizer-batch-encode",
}
_SWITCHES = {
    "cannot be honoured: prompts are always computed in chunks": (
        "--no-enable-chunked-prefill --disable-chunked-prefill"
    ),
    "cannot be honoured: experts are always spread over the ranks": "--no-enable-expert-parallel",
    "cannot be honoured: the steps of a GPU are always CUDA graphs, those of a CPU never": (
        "--enforce-eager --disable-cuda-graph --enable-torch-compile --disable-cuda-graph-padding"
    ),
    "cannot be honoured: requests are not logged, their event log is in --log-dir": (
        "--enable-log-requests --log-requests"
    ),
    "cannot be honoured: this server has the model's own weights alone": "--enable-lora",
    "cannot be honoured: a model needs its tokenizer": "--skip-tokenizer-init",
    "cannot be honoured: only text is generated": (
        "--is-embedding --enable-multimodal --enable-prompt-embeds --enable-mm-embeds --language-model-only"
    ),
    "cannot be honoured: it is not implemented": (
        "--enable-sleep-mode --enable-two-batch-overlap --enable-dbo "
        "--enable-single-batch-overlap "
        "--enable-memory-saver --disable-overlap-schedule --enable-return-routed-experts "
        "--enable-nan-detection --enable-server-load-tracking --enable-dp-lm-head --headless --disable-fastapi-docs "
        "--enable-return-hidden-states --return-tokens-as-token-ids --data-parallel-hybrid-lb "
        "--data-parallel-external-lb --enable-ssl-refresh --enable-p2p-check --disable-sliding-window "
        "--enable-flashinfer-autotune --enable-layerwise-nvtx-tracing --show-hidden-metrics-for-version"
    ),
}
_SPLIT = "cannot be honoured: no layer is split among ranks; give --ranks, and each serves its own share of the requests"
_ONE_MACHINE = "cannot be honoured: all ranks are on one machine"
_NUMBERS = "cannot be honoured: the KV cache is in float32 on a CPU, in bfloat16 on a GPU, and has no scales"
_VALUES = {
    _SPLIT: (
        "--tensor-parallel-size=1 --tp-size=1 --tp=1 -tp=1 --pipeline-parallel-size=1 --pp-size=1 --pp=1 -pp=1 "
        "--decode-context-parallel-size=1 -dcp=1 --prefill-context-parallel-size=1 -pcp=1 --attn-cp-size=1 "
        "--moe-dp-size=1 --moe-dense-tp-size=1 --attn-dp-size"
    ),
    _ONE_MACHINE: (
        "--nnodes=1 -n=1 --node-rank=0 -r=0 --data-parallel-address -dpa --data-parallel-rpc-port -dpp "
        "--data-parallel-rank -dpn --data-parallel-start-rank -dpr --data-parallel-backend=mp -dpb=mp --master-addr "
        "--master-port --dist-init-addr --nccl-init-addr --dist-timeout --distributed-executor-backend=mp,uni "
        "--api-server-count=1 -asc=1 --kv-transfer-config --ec-transfer-config --disaggregation-mode=null "
        "--disaggregation-transfer-backend --disaggregation-bootstrap-port --disaggregation-ib-device"
    ),
    _NUMBERS: "--kv-cache-dtype=auto --calculate-kv-scales --quantization-param-path",
    "cannot be honoured: the tokenizer is the model folder's": (
        "--tokenizer-mode=auto,hf --tokenizer-revision --tokenizer-worker-num=1"
    ),
    "cannot be honoured: put it into the model folder, as chat_template.jinja": (
        "--completion-template --default-chat-template-kwargs --response-role=assistant"
    ),
    "cannot be honoured: edit the model folder's generation_config.json": (
        "--override-generation-config --preferred-sampling-params --sampling-defaults=model"
    ),
    "cannot be honoured: edit the model folder's config.json": (
        "--hf-overrides --json-model-override-args --rope-scaling --rope-theta --config-format=auto,hf "
        "--hf-config-path --model-impl=auto"
    ),
    "cannot be honoured: nothing is downloaded, give a folder with --model": (
        "--revision --code-revision --download-dir --hf-token --use-tqdm-on-load --safetensors-load-strategy "
        "--model-loader-extra-config={} --ignore-patterns"
    ),
    "cannot be honoured: no code of others is run: give --tool-call-parser": "--tool-parser-plugin --tool-server",
    "cannot be honoured: how long a model reasons is its own affair": "--reasoning-config",
    "cannot be honoured: that an output follows a grammar is seen to by llguidance": (
        "--guided-decoding-backend=auto,guidance --structured-outputs-config --grammar-backend=llguidance"
    ),
    "cannot be honoured: tokens are not guessed ahead": (
        "--speculative-config --speculative-algorithm --speculative-algo --speculative-num-steps "
        "--speculative-draft-model-path --speculative-eagle-topk --speculative-num-draft-tokens --spec-method"
    ),
    "cannot be honoured: this server has the model's own weights alone": (
        "--lora-modules --lora-paths --max-loras --max-lora-rank --max-loras-per-batch --lora-backend"
    ),
    "cannot be honoured: pages of the KV cache have 16 tokens": "--block-size=16 --page-size=16",
    "cannot be honoured: host memory for KV cache is what --kv-shelf-gib says": (
        "--swap-space=0 --cpu-offload-gb=0 --kv-offloading-size=0 --hicache-ratio --hicache-size"
    ),
    "cannot be honoured: requests are served in the order in which they came": (
        "--scheduling-policy=fcfs --schedule-policy=fcfs --schedule-conservativeness --load-balance-method=auto "
        "--enable-priority-scheduling"
    ),
    "cannot be honoured: experts' tokens go through memory, the host's or that of GPUs, or through Mooncake EP": (
        "--elastic-ep-backend=mooncake --deepep-mode --mooncake-ib-device "
        "--elastic-ep-join-mode=recover --expert-placement-strategy"
    ),
    "cannot be honoured: the kernels are this program's own": (
        "--attention-backend --attention-config --moe-runner-backend --moe-backend --sampling-backend "
        "--fp8-gemm-backend --prefill-attention-backend --decode-attention-backend --linear-backend --kernel-config"
    ),
    "cannot be honoured: which CUDA graphs are captured follows from --max-num-seqs": (
        "--compilation-config -cc -O --optimization-level --cuda-graph-sizes --cuda-graph-max-bs --cuda-graph-bs "
        "--max-cudagraph-capture-size --cudagraph-capture-sizes --max-seq-len-to-capture"
    ),
    "cannot be honoured: give it to a proxy in front": "--uds --middleware --fd --ssl-ciphers",
    "cannot be honoured: a chunk is sent as soon as there is text": "--stream-interval=1 --num-continuous-decode-steps=1",
    "cannot be honoured: at most 20 alternatives of a token are told": "--max-logprobs=20",
    "cannot be honoured: only text is generated": (
        "--task=generate,auto --runner=generate,auto --convert=none,auto --limit-mm-per-prompt --pooler-config "
        "--mm-processor-kwargs --media-io-kwargs --allowed-local-media-path --mm-attention-backend"
    ),
    "cannot be honoured: it is not implemented": (
        "--collect-detailed-traces --logits-processors --logits-processor-pattern "
        "--worker-extension-cls --worker-cls=auto --scheduler-cls --additional-config --log-config-file "
        "--max-log-len --log-requests-level --decode-log-interval --file-storage-path "
        "--weight-transfer-config --profiler-config --warmups --base-gpu-id=0 --gpu-id-step=1 "
        "--max-num-partial-prefills=1 --max-long-partial-prefills --long-prefill-token-threshold=0 --eplb-algorithm "
        "--init-expert-location=trivial --ep-dispatch-algorithm --expert-distribution-recorder-mode "
        "--eplb-rebalance-layers-per-chunk --eplb-min-rebalancing-utilization-threshold"
    ),
}

FOREIGN = _table()


def take_out(arguments: Iterable[str], own: frozenset[str]) -> tuple[list[str], list[str]]:
    """The arguments without foreign flags, names spelt with dashes; and a line for each that was taken out.

    Raises `ConfigError` for the first that cannot be honoured. `own`: the flags that exist here.
    """
    kept: list[str] = []
    lines: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            return [*kept, argument, *rest], lines
        given, equals, value = argument.partition("=")
        name = _known_name(given)
        if name in own:
            kept.append(name + equals + value)
            continue
        foreign = FOREIGN.get(name)
        if foreign is None:
            kept.append(argument)
            continue
        lines.append(_judge(given, foreign, value if equals else None, rest))
    return kept, lines


def _known_name(given: str) -> str:
    """vLLM takes `--max_model_len` for `--max-model-len`, and `--some-config.part` for a part of its value."""
    if re.fullmatch(r"-O\d", given):
        return "-O"
    return given.split(".")[0].replace("_", "-") if given.startswith("-") else given


def _judge(name: str, foreign: Foreign, value: str | None, rest: Iterator[str]) -> str:
    if not foreign.switch and value is None and foreign.already:
        value = next(rest, None)
    if foreign.on and value is None:
        return f"{name}: {foreign.says}"
    if value is not None and value in foreign.already:
        return f"{name} {value}: it is so anyway"
    raise ConfigError(f"{name} {foreign.says}")
