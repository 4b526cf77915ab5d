"""torch without what ranks on a processor never use: to import the rest takes as long again, and is most of a start.

For the fork server, before all else that uses torch. What is put off is there as a module that imports itself when an
attribute of it is asked for, so nothing is missing; it only comes later. `whole_torch` brings all of it in.

HAZARD: the names are modules that torch 2.13 can be imported without, in its own order. Any other version is
imported whole.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from types import ModuleType
from typing import Any

KNOWN = "2.13."
PUT_OFF = (
    "torch._meta_registrations",
    "torch._native",
    "torch.compiler",
    "torch.distributions",
    "torch.export",
    "torch.fx.passes",
    "torch.masked",
    "torch.nested",
    "torch.nn.attention",
    "torch.nn.intrinsic",
    "torch.optim",
    "torch.package.analyze",
    "torch.profiler",
    "torch.testing",
    "torch.utils.data",
)


class Later(ModuleType):
    """A module that is imported when it is used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module, by whoever looks through them
            raise AttributeError(name)
        return getattr(self.bring_in(), name)

    def bring_in(self) -> ModuleType:
        name = self.__name__
        if sys.modules.get(name) is self:
            del sys.modules[name]
            self.__dict__.update(importlib.import_module(name).__dict__)
        return sys.modules[name]


class _Nothing(Loader):
    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Later(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in PUT_OFF:
            return None
        found = PathFinder.find_spec(fullname, path, target)
        if found is None:
            return None
        places = found.submodule_search_locations
        later = ModuleSpec(fullname, _Nothing(), origin=found.origin, is_package=places is not None)
        later.submodule_search_locations = places
        return later


def put_off() -> list[str]:
    """What has not been imported yet."""
    return [name for name in PUT_OFF if isinstance(sys.modules.get(name), Later)]


def bring_in() -> None:
    for name in put_off():
        module = sys.modules[name]
        assert isinstance(module, Later), "as `put_off` says"
        module.bring_in()


def _import() -> None:
    finder = _Finder()
    if version("torch").startswith(KNOWN):
        sys.meta_path.insert(0, finder)
    try:
        importlib.import_module("torch")
        importlib.import_module("torch._prims.rng_prims")  # without which there is no `torch.Generator`
    finally:
        with suppress(ValueError):
            sys.meta_path.remove(finder)


_import()
