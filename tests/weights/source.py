"""Processes whose memory the tests read: real ones, forked from a server that has torch imported already."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from elastic_ep.models import qwen3_moe
from elastic_ep.models.decoder_config import DecoderConfig
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Weights, dummy_source
from elastic_ep.weights.peers import publish
from elastic_ep.weights.transfer import TransferPlane, apply_settings
from elastic_ep.wire.codec import decode, encode
from elastic_ep.wire.slot_messages import Region, StateAddress
from tests.kit.bound import tied
from tests.kit.processes import stop

_CONFIG = DecoderConfig(
    vocab_size=211,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    max_position_embeddings=512,
    norm_topk_prob=True,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    eos_token_ids=(3,),
)
TINY = qwen3_moe.spec(_CONFIG)
LONG_S = 20.0
BLOCK_BYTES = 128 << 20
PLACEMENT = launch_placement(2, TINY.moe_layers, TINY.moe.experts, 0, num_spare=2)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


def weights_of(rank: int) -> Weights:
    torch.set_num_threads(1)
    return Weights(TINY, PLACEMENT, rank, dummy_source(TINY, 0), torch.device("cpu"))


@dataclass
class Source:
    """A rank that serves its weights, and a block of `BLOCK_BYTES` that are all `block_value`."""

    process: multiprocessing.process.BaseProcess
    control: Connection
    address: StateAddress
    block: Region
    block_value: int = 1

    def next_block(self) -> None:
        """Count `block_value` up."""
        self._tell("block")
        self.block_value += 1

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        if number == signal.SIGSTOP:
            stop(self.process.pid)
            return
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join(LONG_S)

    def corrupt(self, layer: int, slot: int) -> None:
        """Flip a bit of the slot."""
        self._tell((layer, slot))

    def _tell(self, order: object) -> None:
        self.control.send(order)
        assert self.control.poll(LONG_S)
        assert self.control.recv() == "done"


@contextmanager
def source(rank: int = 0) -> Iterator[Source]:
    control, theirs = _context.Pipe()
    process = _context.Process(target=tied, args=(_serve, rank, theirs), daemon=True)
    process.start()
    try:
        assert control.poll(LONG_S), "the source does not start"
        address: StateAddress = decode(control.recv_bytes(), StateAddress)
        yield Source(process, control, address, Region("block", *json.loads(control.recv_bytes())))
    finally:
        process.kill()
        process.join(LONG_S)
        control.close()


def _serve(rank: int, control: Connection) -> None:
    apply_settings()
    weights = weights_of(rank)
    plane = TransferPlane()
    address = publish(plane, weights)
    block = torch.ones(BLOCK_BYTES, dtype=torch.uint8)
    plane.register([Region("block", block.data_ptr(), BLOCK_BYTES)])
    control.send_bytes(encode(address))
    control.send_bytes(json.dumps([block.data_ptr(), BLOCK_BYTES]).encode())
    while True:
        try:
            order = control.recv()
        except EOFError:
            os._exit(0)
        if order == "block":
            block += 1
        else:
            layer, slot = order
            weights.layers[layer]["down"][slot].view(torch.int32)[0, 0] ^= 1
        control.send("done")
