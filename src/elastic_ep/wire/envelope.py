"""Every message between processes has the version of the protocol in front of its body."""

from __future__ import annotations

from elastic_ep.wire.codec import MalformedMessage

VERSION = b"1"
"""Of what the messages in this folder say; all processes of a run have the same."""


def check_version(theirs: bytes) -> None:
    """Raises `MalformedMessage` for another version than this one."""
    if theirs != VERSION:
        ours = VERSION.decode()
        raise MalformedMessage(
            f"version {theirs[:20]!r} of the protocol is unknown: this process speaks {ours}"
        )
