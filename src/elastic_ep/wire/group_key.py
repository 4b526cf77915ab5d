"""The key that all hosts of a group share, in a private file, and what is made of it.

Over TCP everything between processes of a group is encrypted and authenticated (CURVE), with two pairs of keys that
follow from this one secret: one for the run process, one for all who dial it.
"""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

_SECRET_BYTES = 32


class BadKey(ValueError):
    """The file has no key, or others may read it. The message is one line that says what to do."""


@dataclass(frozen=True, slots=True)
class Pair:
    """In Z85, as ZeroMQ takes them."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class GroupKey:
    secret: bytes = field(repr=False)

    @classmethod
    def of_file(cls, path: Path) -> GroupKey:
        """Raises `BadKey`."""
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                text = file.read(4096)
        except OSError as error:
            raise BadKey(
                f"{path}: {error.strerror}: copy the key file of the group's first host here"
            ) from error
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise BadKey(f"{path} can be read by others than its owner: chmod 600 it")
        try:
            secret = bytes.fromhex(text.decode("ascii").strip())
        except ValueError:
            secret = b""
        if len(secret) != _SECRET_BYTES:
            raise BadKey(
                f"{path} holds no key: {_SECRET_BYTES} bytes in hexadecimal, as the first host writes them"
            )
        return cls(secret)

    @classmethod
    def of_or_into_file(cls, path: Path) -> GroupKey:
        """A new one if there is no such file, which is made then, for its owner alone. Raises `BadKey`."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return cls.of_file(path)
        except OSError as error:
            raise BadKey(f"{path} cannot be made: {error.strerror}") from error
        key = cls(secrets.token_bytes(_SECRET_BYTES))
        with open(fd, "w") as file:
            file.write(key.secret.hex() + "\n")
        return key

    @property
    def controller(self) -> Pair:
        return self._pair(b"controller")

    @property
    def others(self) -> Pair:
        """Hosts that join, and their ranks."""
        return self._pair(b"others")

    @property
    def carriers(self) -> bytes:
        """What carriers prove to each other that they know."""
        return self._made(b"carriers")

    def _pair(self, purpose: bytes) -> Pair:
        secret = z85.encode(self._made(purpose))
        return Pair(zmq.curve_public(secret), secret)

    def _made(self, purpose: bytes) -> bytes:
        return hmac.digest(self.secret, b"elastic_ep " + purpose, "sha256")
