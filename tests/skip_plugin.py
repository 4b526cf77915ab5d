"""`--strict-skips`: where everything that the tests need should be installed, a test that lacks something fails."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest

_OF_THE_MACHINE = re.compile(
    r"CUDA device|no MPS|interpreter|this file system|system call|came with Linux|what is on the device"
    r"|processor with AVX2|no Chromium|network namespaces"
)
"""Reasons to skip that no package does away with: another machine, or another run of the same test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips", action="store_true", help="fail tests that are skipped for want of a dependency"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("strict_skips"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not _OF_THE_MACHINE.search(reason):
            report.outcome = "failed"
            report.longrepr = f"with --strict-skips a test must not be skipped for this: {reason}"
    return report
