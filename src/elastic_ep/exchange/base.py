"""The exchange contract: hidden states to experts and back, every MoE layer.

An implementation never raises because a peer died and never waits for a masked peer, so a step always
completes. Whether its result may be used is told by `end_step`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from elastic_ep.wire.messages import Member

if TYPE_CHECKING:  # the run process lays out the windows and never imports torch
    import torch

NO_EXPERT = -1
"""In `physical_experts`: this (token, k) goes nowhere and contributes exactly zero."""


@dataclass(frozen=True, slots=True)
class ExchangeShape:
    """What all members must agree on.

    `max_tokens` per rank and step, `hidden` elements a token, `top_k` experts a token, `slots_per_rank`
    physical experts a rank.
    """

    num_ranks: int
    max_tokens: int
    hidden: int
    top_k: int
    slots_per_rank: int
    operations_per_step: int
    """Two (dispatch, combine) for every MoE layer."""


@dataclass(frozen=True, slots=True)
class Format:
    """The tensors that an exchange takes and gives, as it declares. Indices are int64, weights float32 everywhere."""

    device: torch.device
    """Where all of them are. An exchange that is not on the host is a `DeviceExchange`, and does not look into them."""
    rows: torch.dtype
    """Of x, `Received.packed`, y and what `combine` returns."""
    counts: torch.dtype
    tile: int | None
    """The capacity C is the least multiple of it that holds every slot's rows, at least one; None: it is always
    num_ranks * max_tokens."""
    ordered: bool
    """Whether a slot's rows come in the order of (source rank, token, k), or in any, which may differ from run to run."""
    zero_tail: bool
    """Whether the rows of `Received.packed` from a slot's count on are zero, or undefined."""
    parts: int = 1
    """A slot's rows lie in so many parts of C / parts rows each, and every part has a count."""


@dataclass(frozen=True, slots=True)
class Received:
    """Inputs of this rank's local slots.

    `packed` [slots_per_rank, C, hidden] and `counts`, how many rows each slot has [slots_per_rank], or each part of
    each slot [slots_per_rank, parts]: all as `Format` says. `packed` may be a view that the next `dispatch` overwrites.
    """

    packed: torch.Tensor
    counts: torch.Tensor


class Exchange(Protocol):
    """One rank's end of the exchange. Forward thread only, except where said."""

    @property
    def format(self) -> Format:
        """Never changes. Any thread."""
        ...

    @property
    def waiting_for(self) -> int | None:
        """The rank whose data the forward thread is waiting for. Any thread."""
        ...

    @property
    def operations(self) -> int:
        """Operations completed so far. Any thread."""
        ...

    def connect(self, member: Member) -> None:
        """Get ready for `member`, which stays inactive. Control loop; may be slow; idempotent."""
        ...

    def activate(self, member: Member) -> None:
        """From the next step on `member` takes part. At a boundary only. No effect on a masked incarnation."""
        ...

    def mask(self, member: Member) -> None:
        """Stop sending to and waiting for this incarnation, for ever. Any thread, any time; ends a wait on it."""
        ...

    def begin_step(self, step: int) -> None:
        """Operation numbers of this step follow from `step`."""
        ...

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        """Send x [T, hidden] to physical_experts [T, top_k]; 0 <= T <= max_tokens.

        A token names no expert twice, as a gate never does.
        """
        ...

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Send back y (shaped like `Received.packed`); returns sum over k of weights[:, k] * y_k, [T, hidden].

        Rows of y from a slot's count on do not matter. weights [T, top_k]. Summed in top-k order, in float32, at the
        source, so that the result does not depend on placement. A (token, k) whose owner is masked contributes zero.
        """
        ...

    def end_step(self) -> frozenset[int]:
        """The active ranks whose contribution this step may miss; if any, the step is poisoned.

        These are the ranks masked since `begin_step`, and every masked or inactive rank that a token of this
        step was sent to. A rank masked between two steps, and sent nothing, poisons nothing.

        A step without all its operations (an aborted or empty one) must still perform them.
        """
        ...

    def close(self) -> None:
        """Release resources. Idempotent."""
        ...


class Work(NamedTuple):
    """What a rank computes in a step."""

    prompt_tokens: int
    decodes: int


class DeviceExchange(Exchange, Protocol):
    """An exchange whose operations run on a device in the order they were queued, so that a step may be captured."""

    def route_to(self, ranks: Collection[int]) -> None:
        """The ranks that tokens go to from the next step on: one of them that is not active poisons each step."""
        ...

    def meet(self, work: Work) -> None:
        """Return when all who take part have begun this step. To be called once in it, before its first operation.

        `work` is what this rank will compute in it, for the others to know.

        It is not part of `begin_step` so that the host may prepare the step meanwhile.
        """
        ...

    def work(self) -> Work:
        """Of the step that has ended last: the most tokens of prompts that a rank has computed, all ranks' decodes."""
        ...

    def read_masks(self) -> None:
        """Queue what `end_step` needs to know, so that one wait serves it and all that was queued before."""
        ...


def check_rows(exchange: Exchange, computed: torch.dtype) -> None:
    """Raise ValueError unless `exchange` carries rows as they are `computed`."""
    if exchange.format.rows is not computed:
        raise ValueError(
            f"the exchange carries rows of {exchange.format.rows}, but the weights are {computed}"
        )
