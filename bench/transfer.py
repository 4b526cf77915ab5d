"""Weights from a peer: how fast, against Mooncake's TransferEngine bare, and against the checkpoint.

Two processes on this machine. `--experts`: everything that a rank holds, expert by expert, verified and written to its
slots, against the same bytes read by TransferEngine alone, in the same run: with its blocking call (one call an
expert), and with reads submitted ahead as the verified pull does it (`bare_ahead`). All take turns every 24 MB;
`undisturbed` is how fast one turn in twenty is, on a machine with other work. `--joiner`: all weights of a
joining rank from a peer, from a checkpoint in the page cache, and from one that is not.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tests.kit.page_cache import drop_from_cache
from tests.kit.served import ROOT, write_result

from bench.kit.bare_transfer import DEADLINE_S, LAYERS, measure_size, model, peer
from bench.kit.command_line import command_line, source_tree
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import Placement, launch_placement
from elastic_ep.weights.bank import Weights, blank_weights, dummy_source, load_weights
from elastic_ep.weights.disk_cache import cached_share
from elastic_ep.weights.peers import ExpertPull, pull_dense, pull_experts
from elastic_ep.weights.transfer import TransferPlane, apply_settings, available
from elastic_ep.wire.slot_messages import StateAddress

EXPERT_SHAPES = {"0.2 MiB": (128, 136), "2 MiB": (512, 344), "16 MiB": (2048, 688)}
"""Hidden size, expert width: float32, three matrices."""


def measure_experts(total_bytes: int, rounds: int, old: Path | None) -> dict[str, Any]:
    return {
        name: measure_size(*shape, total_bytes=total_bytes, rounds=rounds, old=old)
        for name, shape in EXPERT_SHAPES.items()
    }


def write_checkpoint(folder: Path, config: ModelSpec) -> int:
    """Random bfloat16 weights; their bytes."""
    tensors = {
        piece.tensor: torch.empty(piece.shape, dtype=torch.bfloat16).uniform_(-1, 1)
        for piece in config.pieces()
    }
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def loaded(folder: Path, config: ModelSpec, placement: Placement) -> Weights:
    """From the checkpoint, which is not kept open: pages that are mapped cannot be dropped."""
    weights = load_weights(folder, config, placement, 0)
    weights.source = dummy_source(config, 0)
    gc.collect()
    return weights


def measure_joiner(rounds: int) -> dict[str, Any]:
    config = model(1024, 512, experts=128, vocabulary=32000)
    placement = launch_placement(8, LAYERS, config.moe.experts, 32)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as name:
        folder = Path(name)
        checkpoint_bytes = write_checkpoint(folder, config)
        plane = TransferPlane()
        seconds: dict[str, list[float]] = {"peer": [], "disk_warm": [], "disk_cold": []}
        shares: dict[str, list[float]] = {"disk_warm": [], "disk_cold": []}
        with peer(loaded, folder, config, placement) as (address, sums, dense):
            reference = loaded(folder, config, placement)
            for _ in range(rounds):
                began = time.perf_counter()
                weights = joined(plane, config, placement, address, sums, dense)
                seconds["peer"].append(time.perf_counter() - began)
                assert torch.equal(weights.layers[-1]["down"], reference.layers[-1]["down"])
                assert torch.equal(weights.lm_head, reference.lm_head)
                del weights
                for how in ("disk_cold", "disk_warm"):  # the cold read warms the cache
                    if how == "disk_cold":
                        drop_from_cache(folder)
                    shares[how].append(round(cached_share(folder), 3))
                    began = time.perf_counter()
                    loaded(folder, config, placement)
                    seconds[how].append(time.perf_counter() - began)
            rank_bytes = sum(t.nbytes for t in reference.dense().values()) + sum(
                layer["gate_up"].nbytes + layer["down"].nbytes for layer in reference.layers
            )
    medians = {how: round(statistics.median(values), 3) for how, values in seconds.items()}
    print(f"joiner, {rank_bytes / 1e9:.2f} GB in memory: {medians} s")
    return {
        "checkpoint_bytes": checkpoint_bytes,
        "rank_bytes": rank_bytes,
        "seconds": medians,
        "seconds_all_rounds": {how: [round(s, 3) for s in values] for how, values in seconds.items()},
        "cached_share_before": shares,
    }


def joined(
    plane: TransferPlane,
    config: ModelSpec,
    placement: Placement,
    address: StateAddress,
    sums: list[list[int]],
    dense: int,
) -> Weights:
    weights = blank_weights(config, placement.slots_per_rank, dummy_source(config, 0))
    pull_dense(plane, weights, address, dense, DEADLINE_S)
    orders = (
        ExpertPull(address, slot, layer, slot, sums[layer][slot])
        for layer in range(LAYERS)
        for slot in range(placement.slots_per_rank)
    )
    assert all(got.failure is None for got in pull_experts(plane, weights, orders, DEADLINE_S))
    return weights


def main() -> None:
    parser = command_line(__doc__, "transfer")
    parser.add_argument("--experts", action="store_true", help="only the experts")
    parser.add_argument("--joiner", action="store_true", help="only the joiner")
    parser.add_argument("--gib", type=float, default=2.0, help="bytes a size, in GiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--old", type=source_tree, metavar="CHECKOUT", help="its pulls of experts take turns")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    apply_settings()
    reason = available()
    if reason is not None:
        raise SystemExit(reason)
    load_s = time.perf_counter() - began
    began = time.perf_counter()
    TransferPlane()
    result: dict[str, Any] = {
        "library_load_s": round(load_s, 3),
        "start_s": round(time.perf_counter() - began, 4),
    }
    both = options.experts == options.joiner
    if options.experts or both:
        result["experts"] = measure_experts(int(options.gib * 2**30), options.rounds, options.old)
    if options.joiner or both:
        result["joiner"] = measure_joiner(options.rounds)
    write_result(options.out, result)


if __name__ == "__main__":
    main()
