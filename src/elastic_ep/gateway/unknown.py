"""Fields of requests that nobody knows: they are ignored, and said once."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from elastic_ep.gateway.bodies import Generating
from elastic_ep.gateway.fields import Body
from elastic_ep.models.config_json import shown

log = structlog.get_logger()
_MOST_UNKNOWN = 20


def names(values: Body) -> tuple[str, ...]:
    return tuple(name[:100] for name in [*(values.model_extra or ())][:_MOST_UNKNOWN])


def unknown(values: Generating) -> tuple[str, ...]:
    names = [*(values.model_extra or ())]
    if values.stream_options is not None:
        names += [f"stream_options.{name}" for name in values.stream_options.model_extra or ()]
    return tuple(name[:100] for name in names[:_MOST_UNKNOWN])


class UnknownNames:
    """A line in the log for each field that was ignored because nobody knows it, once."""

    _MOST = 200

    def __init__(self) -> None:
        self._said: set[str] = set()

    def note(self, path: str, names: Iterable[str]) -> None:
        for name in names:
            if len(self._said) < self._MOST and name not in self._said:
                self._said.add(name)
                log.warning("unknown request field ignored", field=shown(name), path=path)
