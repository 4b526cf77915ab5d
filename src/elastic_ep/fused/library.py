"""What `engine.cpp` was built to, and the structures that it shares with Python. Standard library only: the run process
decides for all ranks whether they use it.
"""

from __future__ import annotations

import ctypes
import hashlib
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent
_ADDRESS, _INTEGER, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_NEEDS = {
    "_v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "_v3": frozenset({"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}),
}
"""Builds, the best first, and the flags in /proc/cpuinfo that the processor has to have beside those of the next."""


def _fields(kinds: Mapping[type, str]) -> list[tuple[str, type]]:
    return [(name, kind) for kind, names in kinds.items() for name in names.split()]


class ExchangeState(ctypes.Structure):
    """`Exchange` in exchange.h."""

    _fields_ = (
        *_fields({_INTEGER: "ranks max_tokens hidden top_k slots me carried"}),
        *_fields({_ADDRESS: "words experts x boxes live reachable missed found rows firsts"}),
        *_fields({_INTEGER: "number operations waits tokens astray"}),
    )


class LayerState(ctypes.Structure):
    """`Layer` in engine.cpp."""

    _fields_ = tuple(
        _fields(
            {
                _ADDRESS: "input_norm qk_norm post_norm qkv out gate gate_up down cache physical load",
            }
        )
    )


class ModelState(ctypes.Structure):
    """`Model` in engine.cpp."""

    _fields_ = (
        *_fields(
            {
                _INTEGER: "layer_count hidden vocab heads kv_heads head_dim qk_norm experts top_k inner renormalise "
                "slots page_size pages halves max_tokens max_samples positions"
            }
        ),
        *_fields({_REAL: "eps clip"}),
        *_fields({_ADDRESS: "embed lm_head final_norm cosines sines layers"}),
        *_fields({_ADDRESS: "x h mixture weights chosen logits wide narrow line"}),
        *_fields({_INTEGER: "mixed"}),
    )


class BatchState(ctypes.Structure):
    """`Batch` in engine.cpp."""

    _fields_ = (
        *_fields({_INTEGER: "tokens chunks samples listed"}),
        *_fields({_ADDRESS: "ids starts lengths tables pages sampled"}),
    )


class Fused:
    """The library's functions. None of them holds the interpreter lock. They check a batch's and a token's numbers, and
    trust addresses and sizes: who makes a structure checks these.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if it is not there, or was built from other sources than these."""
        library = ctypes.CDLL(str(path))
        library.fused_sources.restype = ctypes.c_char_p
        if library.fused_sources().decode() != _digest():
            raise OSError(f"{path} was built from other sources: run make setup")
        model, batch, exchange = map(ctypes.POINTER, (ModelState, BatchState, ExchangeState))
        index = count = ctypes.c_int64

        def function(name: str, result: type | None, *arguments: type) -> ctypes._NamedFuncPointer:
            found = library[f"fused_{name}"]
            found.restype, found.argtypes = result, arguments
            return found

        self.forward = function("forward", _INTEGER, model, batch, exchange)
        self.begin = function("begin", _INTEGER, model, batch)
        self.attention = function("attention", None, model, batch, index)
        self.mixture = function("mixture", _INTEGER, model, exchange, index, count)
        self.logits = function("logits", None, model, batch)
        self.dispatch = function("dispatch", _INTEGER, exchange, _ADDRESS, _ADDRESS, count)
        self.fetch = function("fetch", None, exchange, _ADDRESS, count)
        self.combine = function("combine", None, exchange, _ADDRESS, count, _ADDRESS, _ADDRESS)


@cache
def load(build: str) -> Fused:
    """A build that `best_build` gave. Raises OSError."""
    return Fused(_path(build))


class Unavailable(RuntimeError):
    """There is no build for this machine. The message says why, and what to do."""


def usable_builds() -> list[str]:
    """What this processor can run, the best first, whether it is there or not."""
    flags, needs = _processor_flags(), frozenset[str]()
    usable: list[str] = []
    for build, more in reversed(_NEEDS.items()):
        needs |= more
        if needs <= flags:
            usable.insert(0, build)
    return usable


def best_build() -> str:
    """For this machine. Raises `Unavailable`."""
    usable = usable_builds()
    if not usable:
        raise Unavailable("the engine in C++ needs a processor with AVX2")
    built = next((build for build in usable if _path(build).exists()), None)
    if built is None:
        raise Unavailable(
            "the engine in C++ was not built: install a compiler (on Debian: apt-get install g++), then run make setup"
        )
    try:
        load(built)
    except OSError as error:
        raise Unavailable(f"the engine in C++ cannot be used: {error}") from error
    return built


def before_forks(directory: Path) -> None:
    """See host/fork_server.py: ranks have the build that there is now, whatever becomes of its file, as they have the
    Python that goes with it. No thread is started.
    """
    with suppress(Unavailable):
        best_build()


def _digest() -> str:
    """As in setup.py."""
    sources = sorted([*_FOLDER.glob("*.h"), *_FOLDER.glob("*.cpp")])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _path(build: str) -> Path:
    return _FOLDER / (build + str(sysconfig.get_config_var("EXT_SUFFIX")))


def _processor_flags() -> frozenset[str]:
    """Of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset())
