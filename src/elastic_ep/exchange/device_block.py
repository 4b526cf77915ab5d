"""Device memory that the kernels of other processes on this host reach: one block a rank, by CUDA's own handles.

Through the driver, as torch shares only what its allocator has, together with all that lies beside it.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch

HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1


class DriverError(RuntimeError):
    """What the driver said."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _checked(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'').decode() or status}")


class Block:
    """`size` bytes of the current device, all zero. `close` gives them back."""

    def __init__(self, size: int) -> None:
        self.size = size
        torch.cuda.current_stream().synchronize()  # makes the context, if nothing has made it
        self._context = ctypes.c_void_p()
        _checked("cuCtxGetCurrent", ctypes.byref(self._context))
        address = ctypes.c_uint64()
        _checked("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self.address = int(address.value)
        _checked("cuMemsetD8_v2", address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
        torch.cuda.synchronize()

    def handle(self) -> bytes:
        """For `map` in another process of this host."""
        handle = _Handle()
        _checked("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(self.address))
        return bytes(handle)

    def tensor(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A view of the block, which must outlive it."""
        return torch.as_tensor(
            _Array(self.address + offset, shape, _TYPES[dtype]), device=torch.device("cuda")
        ).view(dtype)

    def map(self, handle: bytes) -> int:
        """The address of another process's block here. Any thread. Raises DriverError."""
        self._enter()
        copy = _Handle.from_buffer_copy(handle)
        address = ctypes.c_uint64()
        _checked("cuIpcOpenMemHandle_v2", ctypes.byref(address), copy, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return int(address.value)

    def unmap(self, address: int) -> None:
        """HAZARD: no kernel may be using it."""
        self._enter()
        _checked("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _enter(self) -> None:
        """A thread on which torch has only chosen a device has no context yet, of which the driver asks."""
        _checked("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        if self.address:
            self._enter()
            address, self.address = self.address, 0
            _checked("cuMemFree_v2", ctypes.c_uint64(address))


_TYPES = {torch.bfloat16: "<i2", torch.int64: "<i8"}


class _Array:
    def __init__(self, address: int, shape: tuple[int, ...], kind: str) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": kind,
            "data": (address, False),
            "version": 3,
            "strides": None,
        }
