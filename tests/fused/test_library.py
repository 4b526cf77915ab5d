"""Which build of the engine in C++ ranks compute with, and what is said if there is none."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from elastic_ep.config import ServeConfig
from elastic_ep.fused import library
from elastic_ep.fused.library import Unavailable, best_build, usable_builds
from elastic_ep.host import fork_server
from elastic_ep.plan import make_plan
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.serve import _PRELOAD
from tests.kit.fused import needs_fused

V3 = {"abm", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"}
V4 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("flags", "builds"),
    [(set(), []), (V4, []), (V3 - {"fma"}, []), (V3, ["_v3"]), (V3 | V4, ["_v4", "_v3"])],
)
def test_a_processor_runs_what_it_has_the_instructions_for(
    flags: set[str], builds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset(flags))
    assert usable_builds() == builds


def test_a_processor_without_avx2_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset[str]())
    with pytest.raises(Unavailable, match="AVX2"):
        best_build()


def test_what_was_not_built_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset(V3))
    monkeypatch.setattr(library, "_path", tmp_path.joinpath)
    with pytest.raises(Unavailable, match=r"apt-get install g\+\+.*make setup"):
        best_build()


@needs_fused()
def test_what_was_built_from_other_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_digest", lambda: "another")
    library.load.cache_clear()
    with pytest.raises(Unavailable, match="make setup"):
        best_build()


@needs_fused()
def test_a_rank_that_is_forked_later_has_the_build_of_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever the fork server has imported goes with it, and is not read again either."""
    monkeypatch.setattr(fork_server, "gc", mock.Mock())
    build = best_build()
    library.load.cache_clear()
    fork_server.preload(_PRELOAD["cpu"], tmp_path)
    monkeypatch.setattr(library, "_path", tmp_path.joinpath)
    monkeypatch.setattr(library, "_digest", lambda: "another")
    assert library.load(build).forward


@needs_fused()
def test_all_ranks_are_told_the_same_build(tmp_path: Path) -> None:
    plan = make_plan(ServeConfig(model=str(BUNDLED_MODEL), device="cpu"))
    told = plan.rank_config(tmp_path)
    assert (told.fused, told.halves) == (best_build(), True)  # the bundled model is in bfloat16
    assert not any("plain torch" in notice for notice in plan.notices)


def test_without_a_build_all_ranks_compute_in_torch_and_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset[str]())
    plan = make_plan(ServeConfig(model=str(BUNDLED_MODEL), device="cpu"))
    told = plan.rank_config(tmp_path)
    assert (told.fused, told.halves) == ("", False)
    assert sum("plain torch" in notice and "AVX2" in notice for notice in plan.notices) == 1
