"""Whether a rank fits onto its GPU: told before anything is loaded, with the flag that would help."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from elastic_ep.config import CannotRun, EngineLimits
from elastic_ep.engine.ops_cuda import draws
from elastic_ep.engine.ops_cuda.inputs import TILE_ROWS
from elastic_ep.engine.ops_cuda.kernels.latent_attention import LATENT_CUT, sequences_at_once
from elastic_ep.engine.ops_cuda.kernels.paged_attention import CUT, part_bytes
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.models.spec import Dense, LatentAttention, ModelSpec, Moe
from elastic_ep.placement import Placement

_ITEM = 2
"""Bytes of a bfloat16."""
_WIDE_ITEM = 4
"""Bytes of a float32."""
_WORKING_BYTES = 256 << 20
"""For libraries, graphs and everything small."""
_CONTEXT_BYTES = 768 << 20
"""What a process has on a device without torch knowing: context, loaded kernels, the exchange's small things."""
MOST_PAGES = 1 << 20
_LOOK_S = 0.01


class NotEnoughMemory(CannotRun):
    """The text says how much is missing and which flag lowers the need."""


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes of one rank."""

    weights: int
    kv_page: int
    kv_pages: int
    exchange: int
    working: int

    @property
    def kv(self) -> int:
        return self.kv_page * self.kv_pages

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.exchange + self.working

    def __str__(self) -> str:
        return (
            f"{_gib(self.total)} (weights {_gib(self.weights)}, KV cache {_gib(self.kv)}, exchange "
            f"{_gib(self.exchange)}, work {_gib(self.working)})"
        )


def needs_of(
    spec: ModelSpec,
    limits: EngineLimits,
    placement: Placement,
    shape: ExchangeShape,
    exchange_bytes: int,
    *,
    copies_rows: bool,
    widened: bool = False,
) -> Needs:
    """`exchange_bytes` is the size of the exchange's own buffer; `copies_rows`: what dispatch returns is no part of it.
    `widened`: all are numbers, however the checkpoint has them.

    What is at work in a layer is as large in every step, for the exchange may deliver every peer's tokens to every
    slot: what dispatch returns, which the experts' results replace, and what lies between their two products. It is
    there twice: the graphs have a memory pool of their own, and some steps are eager. So are attention's parts. Then the
    logits, which all steps share, and what drawing tokens from them takes. All else is taken to fit into
    `_WORKING_BYTES`.
    """
    slots = spec.moe_layers * placement.slots_per_rank
    rows = placement.slots_per_rank * shape.num_ranks * shape.max_tokens
    expert = spec.expert_elements * _ITEM if widened else spec.expert_bytes(_ITEM)
    dense = spec.dense_elements * _ITEM if widened else spec.dense_nbytes(_ITEM)
    return Needs(
        weights=dense + slots * expert,
        kv_page=spec.kv_page_bytes("cuda", limits.page_size),
        kv_pages=limits.cache_pages,
        exchange=exchange_bytes,
        working=2 * shape.max_tokens * 3 * _widest(spec) * _ITEM
        + 2 * rows * (spec.hidden_size * copies_rows + spec.moe.inner) * _ITEM
        + 2 * shape.max_tokens * _latent_widths(spec) * _ITEM
        + 2 * _parts(spec, limits)
        + _outputs(limits) * spec.vocab_size * _WIDE_ITEM
        + draws.WORKING_BYTES
        + _WORKING_BYTES,
    )


def _widest(spec: ModelSpec) -> int:
    """Width of the widest FFN that every rank has for itself."""
    ffns = [layer.ffn for layer in spec.layers]
    shared = [ffn.shared.inner for ffn in ffns if isinstance(ffn, Moe) and ffn.shared]
    return max([ffn.inner for ffn in ffns if isinstance(ffn, Dense)] + shared, default=0)


def _latent_widths(spec: ModelSpec) -> int:
    """Numbers of a row of what latent attention has at work: queries before and after they are turned, and results."""
    kind = spec.attention
    if not isinstance(kind, LatentAttention):
        return 0
    return kind.heads * (kind.nope + kind.rope + kind.kv_elements + kind.kv_rank + kind.value)


def _parts(spec: ModelSpec, limits: EngineLimits) -> int:
    """Bytes of what the parts of the longest contexts come to, before they are merged (kernels/decode_attention.py,
    kernels/latent_attention.py)."""
    kind, sequences = spec.attention, _outputs(limits)
    longest = limits.sequence_pages * limits.page_size
    if isinstance(kind, LatentAttention):
        splits = -(-longest // LATENT_CUT.split)
        at_once = min(sequences, sequences_at_once(kind.heads, kind.kv_rank, splits))
        return at_once * part_bytes(kind.heads, kind.kv_rank, splits)
    splits = -(-longest // CUT[torch.bfloat16].split)
    return sequences * part_bytes(kind.heads, kind.head_dim, splits)


def _outputs(limits: EngineLimits) -> int:
    """Rows of logits."""
    return -(-limits.max_num_seqs // TILE_ROWS) * TILE_ROWS


def check_memory(needs: Needs, free: int, limits: EngineLimits, placement: Placement) -> None:
    """Raises NotEnoughMemory if `free` bytes are too few, those included that the rank has already."""
    missing = needs.total - free
    if missing > 0:
        raise NotEnoughMemory(
            f"not enough GPU memory: a rank needs {needs}, there are {_gib(free)} for it, {_gib(missing)} are missing; "
            f"{_remedy(needs, missing, limits, placement)}"
        )


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank may take of its device: `utilization` is for all `ranks` on it, and they share alike."""

    utilization: float
    ranks: int
    returns_early: bool = False
    """One that returns loads while its predecessor's memory is still held (host/device_guard.py): there is room left."""


def pages_within(share: Share, needs: Needs, *, total: int, free: int, own: int, later: int) -> int:
    """Pages of KV cache that a rank makes, the null page not counted; negative if what it has is too much already.

    `total` and `free` are its device's bytes, `own` what it has of them, `later` what it will need besides the cache.
    What it has is reckoned, not seen: what is seen has its neighbours in it. So a rank that returns comes to as many
    pages as before, or to fewer, if less is free.
    """
    allowed = share.utilization * total
    if share.returns_early:
        allowed = min(allowed, total - (needs.total - needs.kv))
    room = min(int(allowed / share.ranks) - own, free) - later
    return min(room // needs.kv_page - 1, MOST_PAGES)


def needed_by_graphs(step: int) -> int:
    """At most: in their memory pool what a step has at work, `step`; and draws."""
    return step + draws.WORKING_BYTES + _WORKING_BYTES


@dataclass(frozen=True, slots=True)
class Budget:
    """What a rank needs on its device, and what could be lowered."""

    needs: Needs
    limits: EngineLimits
    placement: Placement
    device: torch.device
    share: Share | None = None
    """None: the KV cache has `limits.num_pages`, else what the share has room for, `limits.num_pages` at least."""
    patience_s: float = 0.0
    """How long a predecessor's memory may take to be free."""

    def check(self) -> None:
        """Before anything is allocated. Raises NotEnoughMemory."""
        check_memory(self.needs, self._free_when(self.needs.total), self.limits, self.placement)

    def pages(self, later: int) -> int:
        """How many the KV cache has, when all else is there but `later` bytes. Raises NotEnoughMemory."""
        if self.share is None:
            return self.limits.num_pages
        own = torch.cuda.memory_reserved(self.device) + self.needs.exchange + _CONTEXT_BYTES
        total = torch.cuda.mem_get_info(self.device)[1]
        facts = {"total": total, "own": own, "later": later}
        wanted = pages_within(self.share, self.needs, free=total, **facts)
        free = self._free_when((wanted + 1) * self.needs.kv_page + later)
        pages = pages_within(self.share, self.needs, free=free, **facts)
        if pages < self.limits.num_pages:
            raise NotEnoughMemory(self._too_few(max(0, pages), own, later, total, free))
        return pages

    def _free_when(self, wanted: int) -> int:
        """Bytes that are free; it waits until they are `wanted`, but not for ever."""
        deadline = time.monotonic() + self.patience_s
        while (free := int(torch.cuda.mem_get_info(self.device)[0])) < wanted and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return free

    def _too_few(self, pages: int, own: int, later: int, total: int, free: int) -> str:
        assert self.share is not None
        size, utilization, longest = self.limits.page_size, self.share.utilization, self.limits.max_model_len
        return (
            f"not enough GPU memory: a rank has {_gib(own)}, its steps need {_gib(later)} more, and what is left of "
            f"{utilization:g} x {_gib(total)} for {self.share.ranks} on this GPU ({_gib(free)} are free) holds "
            f"{pages * size} tokens of KV cache, but a sequence may have {longest}: raise --gpu-memory-utilization, or "
            "lower --max-model-len, --max-num-batched-tokens or --ep-num-redundant-experts"
        )

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Once the exchange has its buffer: if the device runs out of memory within, it is NotEnoughMemory."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            free = torch.cuda.mem_get_info(self.device)[0]
            ours = torch.cuda.memory_reserved(self.device) + self.needs.exchange
            # Another process may have taken it meanwhile.
            check_memory(self.needs, free + ours, self.limits, self.placement)
            cache = f"--num-gpu-blocks-override (now {self.limits.num_pages})"
            if self.share is not None:
                cache = f"--gpu-memory-utilization (now {self.share.utilization:g})"
            raise NotEnoughMemory(
                f"not enough GPU memory: a rank needs more than {self.needs}; lower {cache} or "
                f"--max-num-batched-tokens; {str(error).splitlines()[0]}"
            ) from error


def _remedy(needs: Needs, missing: int, limits: EngineLimits, placement: Placement) -> str:
    pages = limits.num_pages - -(-missing // needs.kv_page)
    if pages * limits.page_size >= limits.max_model_len:
        return f"--num-gpu-blocks-override {pages} would do"
    if placement.num_ranks * placement.slots_per_rank > placement.num_experts:
        return "lower --ep-num-redundant-experts, or give it more --ranks on more GPUs"
    return "lower --max-num-batched-tokens, or give it more --ranks on more GPUs"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
