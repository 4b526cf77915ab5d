"""Experts pulled from a peer process, verified, beside TransferEngine bare."""

from __future__ import annotations

import importlib
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tests.kit.bound import tied
from tests.kit.one_pull import pull_expert

from elastic_ep.models import qwen3_moe
from elastic_ep.models.decoder_config import DecoderConfig
from elastic_ep.models.spec import ModelSpec
from elastic_ep.weights.bank import Weights, blank_weights, dummy_source
from elastic_ep.weights.layout import slot_region
from elastic_ep.weights.peers import ExpertPull, Pulled, publish, pull_experts
from elastic_ep.weights.transfer import TransferPlane, apply_settings
from elastic_ep.wire.codec import decode, encode
from elastic_ep.wire.slot_messages import StateAddress

DEADLINE_S = 60.0
AHEAD = 4
TURN_BYTES = 24 << 20
"""The ways take turns after so many bytes: what else the machine does is then the same for all."""
UNDISTURBED = 0.05
"""Of the turns of a way, so many are looked at: the fastest, as other work on the machine only adds to the rest."""
LAYERS = 4


def model(hidden: int, width: int, experts: int = 8, vocabulary: int = 256) -> ModelSpec:
    config = DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=hidden // 8,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=width,
        max_position_embeddings=512,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        eos_token_ids=(3,),
    )
    return qwen3_moe.spec(config)


# The peer


@contextmanager
def peer(
    make: Callable[..., Weights], *arguments: Any
) -> Iterator[tuple[StateAddress, list[list[int]], int]]:
    """A process that serves `make(*arguments)`: its address, its slots' checksums by layer, that of what is dense."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=tied, args=(serve, theirs, make, arguments), daemon=True)
    process.start()
    try:
        address: StateAddress = decode(ours.recv_bytes(), StateAddress)
        sums, dense = json.loads(ours.recv_bytes())
        yield address, sums, dense
    finally:
        process.kill()
        process.join()


def serve(control: Connection, make: Callable[..., Weights], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    apply_settings()
    weights = make(*arguments)
    plane = TransferPlane()
    control.send_bytes(encode(publish(plane, weights)))
    sums = [[weights.checksum(layer, slot) for slot in range(slots_of(weights))] for layer in range(LAYERS)]
    control.send_bytes(json.dumps([sums, weights.dense_checksum()]).encode())
    control.poll(None)


def random_weights(config: ModelSpec, slots: int) -> Weights:
    weights = blank_weights(config, slots, dummy_source(config, 0))
    for layer in weights.layers:
        for part in config.moe.parts:
            layer[part.name].uniform_(-1, 1)
    return weights


def slots_of(weights: Weights) -> int:
    return len(weights.layers[0]["gate_up"])


class Bare:
    """TransferEngine as its documentation shows it: into the very places where the experts belong."""

    def __init__(self, weights: Weights, address: StateAddress) -> None:
        self._engine = importlib.import_module("mooncake.engine").TransferEngine()
        assert self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        self._session = address.session
        self._orders: list[tuple[list[int], list[int], list[int]]] = []
        sizes = {name: weights.layers[0][name][0].nbytes for name in ("gate_up", "down")}
        for index, layer in enumerate(weights.layers):
            for slot in range(slots_of(weights)):
                parts = slot_region(address, index, slot, sizes)
                local = [layer[name][slot].data_ptr() for name in sizes]
                self._orders.append((local, [place for place, _ in parts], list(sizes.values())))

    def blocking(self, some: slice) -> None:
        for local, remote, sizes in self._orders[some]:
            assert self._engine.batch_transfer_sync_read(self._session, local, remote, sizes) == 0

    def ahead(self, some: slice) -> None:
        under_way: deque[int] = deque()
        for local, remote, sizes in self._orders[some]:
            for one in zip(local, remote, sizes, strict=True):
                place, source, nbytes = one
                under_way.append(
                    self._engine.batch_transfer_async_read(self._session, [place], [source], [nbytes])
                )
            while len(under_way) > 2 * AHEAD:
                self._finish(under_way.popleft())
        while under_way:
            self._finish(under_way.popleft())

    def _finish(self, batch: int) -> None:
        while (state := self._engine.transfer_check_status(batch)) == 0:
            time.sleep(5e-5)
        assert state == 1


def pulls_of(checkout: Path) -> Callable[..., Iterator[Pulled]]:
    """`pull_experts` of another commit, over this one's `TransferPlane`."""
    spec = importlib.util.spec_from_file_location("old_peers", checkout / "src/elastic_ep/weights/peers.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pull_experts  # type: ignore[no-any-return]


def measure_size(
    hidden: int, width: int, *, total_bytes: int, rounds: int, old: Path | None = None
) -> dict[str, Any]:
    config = model(hidden, width)
    nbytes = 3 * hidden * width * 4
    slots = -(-total_bytes // (nbytes * LAYERS))
    weights = blank_weights(config, slots, dummy_source(config, 0))
    plane = TransferPlane()
    with peer(random_weights, config, slots) as (address, sums, _):
        bare = Bare(weights, address)
        orders = [
            ExpertPull(address, slot, layer, slot, sums[layer][slot])
            for layer in range(LAYERS)
            for slot in range(slots)
        ]

        def verified(some: slice, pull: Callable[..., Iterator[Pulled]] = pull_experts) -> None:
            assert all(got.failure is None for got in pull(plane, weights, orders[some], DEADLINE_S))

        def one_by_one(some: slice) -> None:
            for o in orders[some]:
                pull_expert(plane, weights, address, o.source_slot, o.layer, o.slot, o.checksum, DEADLINE_S)

        ways: dict[str, Callable[[slice], None]] = {
            "bare_blocking": bare.blocking,
            "bare_ahead": bare.ahead,
            "verified": verified,
            "verified_one_by_one": one_by_one,
        }
        if old is not None:
            ways["verified_old"] = partial(verified, pull=pulls_of(old))
        rates: dict[str, list[float]] = {name: [] for name in ways}
        turns: dict[str, list[float]] = {name: [] for name in ways}
        whole = nbytes * len(orders)
        each = max(1, TURN_BYTES // nbytes)
        for _ in range(rounds + 1):  # the first warms up
            seconds = dict.fromkeys(ways, 0.0)
            for start in range(0, len(orders), each):
                count = len(orders[start : start + each])
                for name, way in ways.items():
                    began = time.perf_counter()
                    way(slice(start, start + each))
                    took = time.perf_counter() - began
                    seconds[name] += took
                    turns[name].append(nbytes * count / took / 1e9)
            for name in ways:
                rates[name].append(whole / seconds[name] / 1e9)
        assert weights.checksum(LAYERS - 1, slots - 1) == sums[-1][-1]
    medians = {name: round(statistics.median(values[1:]), 3) for name, values in rates.items()}
    fastest = {
        name: round(sorted(values)[-1 - int(UNDISTURBED * len(values))], 3) for name, values in turns.items()
    }
    print(f"{nbytes / 2**20:.2f} MiB: {medians} GB/s, undisturbed {fastest}")
    return {
        "expert_bytes": nbytes,
        "total_bytes": whole,
        "gb_per_s": medians,
        "gb_per_s_undisturbed": fastest,
        "gb_per_s_all_rounds": {name: [round(r, 3) for r in values[1:]] for name, values in rates.items()},
        "undisturbed_share_of_bare_blocking": {
            name: round(rate / fastest["bare_blocking"], 3) for name, rate in fastest.items()
        },
        "verified_share_of_bare_blocking": round(medians["verified"] / medians["bare_blocking"], 3),
        "verified_share_of_bare_ahead": round(medians["verified"] / medians["bare_ahead"], 3),
    }


# A joiner
