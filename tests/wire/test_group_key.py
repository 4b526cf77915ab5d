"""The key of a group: a file that is its owner's alone, and what follows from it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from elastic_ep.wire.group_key import BadKey, GroupKey


def test_the_first_start_makes_a_private_file_and_all_others_have_the_same_key(tmp_path: Path) -> None:
    file = tmp_path / "key"
    made = GroupKey.of_or_into_file(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert GroupKey.of_or_into_file(file) == GroupKey.of_file(file) == made
    assert GroupKey.of_or_into_file(tmp_path / "another") != made


def test_keys_of_different_purposes_differ_and_none_is_shown() -> None:
    key, other = GroupKey(bytes(32)), GroupKey(bytes(31) + b"\1")
    made = [
        pair
        for one in (key, other)
        for pair in (one.controller.secret, one.controller.public, one.others.secret, one.others.public)
    ]
    assert len({*made, key.carriers, other.carriers}) == 10
    shown = repr((key, key.controller))
    assert "secret" not in shown.replace("GroupKey", "")


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (None, 0o600, "No such file"),
        (b"", 0o600, "holds no key"),
        (b"00" * 31, 0o600, "holds no key"),
        (b"zz" * 32, 0o600, "holds no key"),
        (b"\xff" * 64, 0o600, "holds no key"),
        (b"00" * 32 + b"\n", 0o640, "chmod 600"),
        (b"00" * 32 + b"\n", 0o604, "chmod 600"),
    ],
)
def test_what_is_no_key_or_others_can_read_is_refused(
    tmp_path: Path, content: bytes | None, mode: int, why: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)
        file.chmod(mode)
    with pytest.raises(BadKey, match=why):
        GroupKey.of_file(file)
    if content is not None:
        with pytest.raises(BadKey, match=why):
            GroupKey.of_or_into_file(file)


def test_a_file_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadKey, match="cannot be made"):
        GroupKey.of_or_into_file(tmp_path / "nowhere" / "key")
