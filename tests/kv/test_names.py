"""A page's name stands for the model and all tokens up to the page's end."""

from __future__ import annotations

import struct
from hashlib import blake2b

from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.kv.names import NAME_BYTES, PageName, extend, root

TOKENS = st.lists(st.integers(0, 2), max_size=24)
PAGE_SIZES = st.integers(1, 5)
ROOT = root("a model")


def names_of(tokens: list[int], page_size: int, parent: PageName = ROOT) -> list[PageName]:
    names: list[PageName] = []
    extend(names, parent, tokens, page_size)
    return names


@given(TOKENS, PAGE_SIZES)
def test_each_full_page_has_the_name_that_its_parent_and_its_tokens_give(
    tokens: list[int], page_size: int
) -> None:
    parent, expected = ROOT, []
    for start in range(0, len(tokens) - page_size + 1, page_size):
        page = struct.pack(f"<{page_size}i", *tokens[start : start + page_size])
        parent = blake2b(parent + page, digest_size=NAME_BYTES).digest()
        expected.append(parent)
    assert names_of(tokens, page_size) == expected


@given(TOKENS, TOKENS, PAGE_SIZES)
def test_as_many_names_are_the_same_as_full_pages_are(
    one: list[int], other: list[int], page_size: int
) -> None:
    same = next(n for n in range(len(one), -1, -1) if one[:n] == other[:n])
    pairs = zip(names_of(one, page_size), names_of(other, page_size), strict=False)
    assert [a == b for a, b in pairs].count(True) == same // page_size


@given(TOKENS, st.lists(st.integers(0, 24)), PAGE_SIZES)
def test_a_chain_that_grows_is_the_chain_of_the_whole(
    tokens: list[int], cuts: list[int], page_size: int
) -> None:
    names: list[PageName] = []
    for cut in [*sorted(cuts), len(tokens)]:
        extend(names, ROOT, tokens[:cut], page_size)
    assert names == names_of(tokens, page_size)


def test_another_model_gives_other_names() -> None:
    assert names_of([1, 2], 2, root("a model")) != names_of([1, 2], 2, root("another"))
    assert len(root("a model")) == NAME_BYTES
