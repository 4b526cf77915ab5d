"""Triton's interpreter, in a process that runs nothing else: quicker, and with a product as devices have it.

A plugin for pytest. Where another Triton has not the parts that are exchanged here, pytest does not start.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter


def _patched_once() -> None:
    """The language's functions become the interpreter's; it would look for them all at every call of a function of a
    kernel, which is a third of its time.
    """
    patch = triton_interpreter._patch_lang
    seen: set[ModuleType] = set()
    nothing = triton_interpreter._LangPatchScope()

    def once(fn: Any) -> Any:
        new = {value for value in fn.__globals__.values() if isinstance(value, ModuleType)} - seen
        if new:
            seen.update(new)
            patch(fn)
        return nothing

    triton_interpreter._patch_lang = once


def _dot(_builder: object, a: Any, b: Any, d: Any, _precision: object, _imprecise: object) -> Any:
    """A row of the product does not know its tile: BLAS sums in an order that depends on the row's place."""
    rows, columns = np.ascontiguousarray(a.data), np.ascontiguousarray(b.data)
    product = np.einsum("...mk,...kn->...mn", rows, columns, dtype=d.data.dtype)
    return triton_interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _dtypes_remembered() -> None:
    find = triton_interpreter._get_np_dtype
    of_scalar = functools.cache(find)

    def remembered(of: Any) -> Any:
        return of_scalar(of) if type(of) is tl.dtype else find(of)

    triton_interpreter._get_np_dtype = remembered


def pytest_configure() -> None:
    builder = triton_interpreter.interpreter_builder
    # Each sum and product of integers would be computed in 64 bits, too.
    builder.options = replace(builder.options, sanitize_overflow=False)
    _patched_once()
    _dtypes_remembered()
    triton_interpreter.InterpreterBuilder.create_dot = _dot
