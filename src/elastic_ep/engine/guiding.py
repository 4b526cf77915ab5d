"""Requests whose text follows a grammar: from the grammar, which is compiled beside the steps, to a mask in each step."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future

from elastic_ep.engine.scheduler import Sequence
from elastic_ep.guided.masks import Asked, MaskMaker
from elastic_ep.guided.text import ANY, GuidedText, Words
from elastic_ep.wire.messages import Assign

REASON_CHARACTERS = 300
"""Of what a client is told."""


class Guiding:
    """Forward thread only. `maker` None: no request has a grammar. `memory` (rows, words) is where masks are put."""

    def __init__(self, maker: MaskMaker | None, memory: Callable[[int, int], Words]) -> None:
        self.opening: list[tuple[Sequence, Future[GuidedText]]] = []
        """Those whose grammar is being compiled: they wait for that before anything else."""
        self._maker = maker
        self._memory = memory
        self._masks: Words | None = None
        """Of this step: a row for each of its targets. They are being computed until `masks`."""

    @property
    def can(self) -> bool:
        return self._maker is not None

    def close(self) -> None:
        """Ends the thread that computes masks."""
        if self._maker is not None:
            self._maker.close()

    def open(self, sequence: Sequence, assign: Assign) -> bool:
        """Whether it has to wait for its grammar, and does so now."""
        grammar = assign.params.grammar
        if grammar is None or self._maker is None:
            return False
        emitted = assign.emitted[sequence.given :]
        self.opening.append((sequence, self._maker.open(grammar, emitted, sequence.stops)))
        return True

    def cancel(self, request_id: int) -> None:
        self.opening = [one for one in self.opening if one[0].request_id != request_id]

    def begin_opened(self, begin: Callable[[Sequence], None]) -> list[tuple[int, str]]:
        """Those whose grammars are compiled by now begin. The others that will not be, with the reasons."""
        lost: list[tuple[int, str]] = []
        if not self.opening:
            return lost
        opening, self.opening = self.opening, []
        for sequence, opened in opening:
            if not opened.done():
                self.opening.append((sequence, opened))
                continue
            try:
                sequence.guided = opened.result()
                begin(sequence)
            except Exception as error:
                lost.append((sequence.request_id, str(error)[:REASON_CHARACTERS]))
        return lost

    def start(self, targets: Seq[Sequence]) -> None:
        """Beside the step: all tokens that they depend on are known."""
        self._masks = None
        if self._maker is None or all(target.guided is None for target in targets):
            return
        self._masks = masks = self._memory(len(targets), self._maker.words)
        asked = []
        for row, target in enumerate(targets):
            if target.guided is None:
                masks[row] = ANY
            else:
                asked.append(Asked(target.guided, target.tokens, target.prompt_len, row))
        self._maker.start(asked, masks)

    def masks(self) -> Words | None:
        """A row for each of the step's targets; None if all may go on as they like. Raises TimeoutError."""
        if self._masks is not None and self._maker is not None:
            self._maker.wait()
        return self._masks
