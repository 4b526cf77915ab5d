"""What a rank on a GPU would find out after its fork, and every rank anew: the fork server imports this for all of them.

HAZARD: nothing here may touch a device or start a thread.
"""

from __future__ import annotations

import importlib
from contextlib import suppress

from triton.runtime import cache

_PUT_OFF = ("triton.compiler.code_generator", "triton.experimental.gluon.language")
"""What Triton imports when it first looks for a compiled kernel; its versions differ in that."""


def _hash_triton() -> None:
    """A third of a second, as it reads all of Triton; kept for the process and its forks."""
    key = getattr(cache, "triton_key", None)  # not for the public: another version may have it elsewhere
    if key is not None:
        key()


for _name in _PUT_OFF:
    with suppress(ImportError):
        importlib.import_module(_name)
_hash_triton()
