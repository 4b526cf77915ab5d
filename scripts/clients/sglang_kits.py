"""SGLang's own kits, unchanged, against a server of this repository. The package `sglang` is enough, without its needs.


What is tried is told as in `tried.py`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import unittest
from pathlib import Path
from typing import Any

URL = os.environ["SUITE_URL"]
KITS = {
    "basic_api_contract": "BasicAPIContractMixin", "basic_decode_correctness": "BasicDecodeCorrectnessMixin",
    "matched_stop": "MatchedStopMixin", "json_constrained": "JSONConstrainedMixin",
    "regex_constrained": "RegexConstrainedMixin", "abort_timeout": "AbortAllMixin",
}  # fmt: skip


def mixin(kit: str, name: str) -> Any:
    """Loaded by its file: the package itself imports torch and kernels."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).parent / "test" / "kits" / f"{kit}_kit.py"
    found = importlib.util.spec_from_file_location(kit, file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return getattr(module, name)


class Running:
    """A process that has not ended, as far as a kit looks."""

    def poll(self) -> None:
        return None


def main() -> None:
    failed = False
    for kit, name in KITS.items():
        about = {"base_url": URL, "process": Running(), "model": "default"}
        case = type(kit, (mixin(kit, name), unittest.TestCase), about)
        for test in unittest.defaultTestLoader.getTestCaseNames(case):
            result = unittest.TestResult()
            case(test).run(result)
            faults = [text for _, text in (*result.failures, *result.errors)]
            failed |= bool(faults)
            told = {"client": f"SGLang kit {kit}", "tried": test, "result": "failed" if faults else "passed"}
            print("\n" + json.dumps({**told, "detail": "".join(faults)[-1500:]}), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
