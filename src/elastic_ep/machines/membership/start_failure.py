"""Start failures that are alike: the same reason from every rank is no accident, and to try again is of no use."""

from __future__ import annotations

import re
from collections.abc import Iterable

_HEX_WORD = re.compile(r"\b(?:0[xX][0-9a-fA-F]+|(?=[a-fA-F]*\d)[0-9a-fA-F]+)\b")
_NUMBER = re.compile(r"\d+(?:[.:,]\d+)*")


def normalised(reason: str) -> str:
    """`reason` without what differs from rank to rank and from launch to launch: numbers, addresses, times, space."""
    return " ".join(_NUMBER.sub("#", _HEX_WORD.sub("#", reason)).split())


def alike(reasons: Iterable[str]) -> bool:
    """Whether all `reasons` say the same, and say something. False for none."""
    kinds = {normalised(reason) for reason in reasons}
    return len(kinds) == 1 and "" not in kinds
