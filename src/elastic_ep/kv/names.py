"""Names of full pages: a chain of hashes, each over its parent's name and the page's tokens.

A page's name tells all tokens up to its end, and so what is in it. Names are made of clients' text, and whoever has them
can try texts against them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

PageName = bytes
NAME_BYTES = 16
NO_PAGE = PageName(NAME_BYTES)
"""What a chain begins with that belongs to no model."""


def root(model: str) -> PageName:
    """What the chains of a model's pages begin with; `model` tells it from all others that keys could be taken for."""
    return blake2b(model.encode(), digest_size=NAME_BYTES).digest()


def extend(names: list[PageName], root: PageName, tokens: Sequence[int], page_size: int) -> None:
    """Append the names of those full pages of `tokens` that come after the ones named already."""
    parent = names[-1] if names else root
    for start in range(len(names) * page_size, len(tokens) - page_size + 1, page_size):
        page = array("i", tokens[start : start + page_size]).tobytes()
        parent = blake2b(parent + page, digest_size=NAME_BYTES).digest()
        names.append(parent)
