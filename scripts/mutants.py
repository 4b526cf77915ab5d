"""Do the tests notice? Changes a sample of places in the code, one at a time, and runs the tests that should go red.

`make mutants`; `make mutants ARGS="--number 60 machines/"` for the modules whose path holds a word. cosmic-ray makes the
changes and keeps the results: what was done for the same code, sample and seed is not done again. Works on a copy of the
tree in `.mutants/`. Prints every survivor with its diff, and the score: survivors that `mutants.toml` shows to change
nothing count as noticed. The exit status is 1 if the score is below `--least`, 2 if tests are red without a change.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import hashlib
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test, mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkItem, WorkResult

ROOT = Path(__file__).resolve().parent.parent
SCRATCH = ROOT / ".mutants"
TREE = SCRATCH / "tree"
SOURCE = Path("src/elastic_ep")

OPERATORS = (
    "own/RemoveStatement", "core/AddNot", "core/ReplaceComparisonOperator_*", "core/ReplaceBinaryOperator_Add_Sub",
    "core/ReplaceBinaryOperator_Sub_Add", "core/ReplaceBinaryOperator_Mul_Add", "core/ReplaceBinaryOperator_*Div_Mul",
    "core/ReplaceBinaryOperator_Mod_Add", "core/ReplaceBinaryOperator_BitOr_BitAnd",
    "core/ReplaceBinaryOperator_BitAnd_BitOr", "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue",
    "core/ReplaceAndWithOr", "core/ReplaceOrWithAnd", "core/ReplaceBreakWithContinue",
    "core/ReplaceContinueWithBreak", "core/ReplaceUnaryOperator_Delete_*", "core/NumberReplacer",
    "core/ExceptionReplacer", "core/ZeroIterationForLoop",
)  # fmt: skip
IDENTITY = tuple(
    f"core/ReplaceComparisonOperator_{pair}" for pair in ("Eq_Is", "NotEq_IsNot", "Is_Eq", "IsNot_NotEq")
)
"""The same for what is compared here, or a matter of style."""


class RemoveStatement(Operator):  # type: ignore[misc]  # cosmic-ray has no types
    """`pass` instead of a call, or of an assignment to an attribute or an item: an effect that is not performed."""

    _CALL = r"(?!log\.)(await )?[\w.]+(\[.*\])?(\.\w+)*\("
    _ASSIGNMENT = r"(self\.\w+[\w.\[\]]*|[\w.]+\[.+\]) [-+|&]?= "
    _SIMPLE = re.compile(f"{_CALL}|{_ASSIGNMENT}", re.DOTALL)

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "simple_stmt" and self._SIMPLE.match(node.get_code(include_prefix=False)):
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        from cosmic_ray.ast import get_ast

        line = get_ast("pass\n").children[0]
        line.get_first_leaf().prefix = node.get_first_leaf().prefix
        return line

    @classmethod
    def examples(cls) -> Sequence[Any]:
        return ()


class Chosen:
    """Those of a provider's operators that `OPERATORS` names."""

    def __init__(self, provider: str, operators: Mapping[str, type[Operator]]) -> None:
        names = [
            name for name in operators if any(fnmatch.fnmatch(f"{provider}/{name}", p) for p in OPERATORS)
        ]
        self._operators = {name: operators[name] for name in names}

    def __iter__(self) -> Iterator[str]:
        return iter(self._operators)

    def __getitem__(self, name: str) -> type[Operator]:
        return self._operators[name]


def choose_operators() -> None:
    providers = cosmic_ray.plugins.OPERATOR_PROVIDERS
    providers["core"] = Chosen("core", providers["core"])
    providers["own"] = Chosen("own", {"RemoveStatement": RemoveStatement})


@dataclass(frozen=True)
class Settings:
    """`mutants.toml`. `tests`: by module (a pattern below src/elastic_ep), the tests to run, the fastest first."""

    tests: dict[str, list[str]]
    equivalent: list[dict[str, Any]]

    @staticmethod
    def load(quick: bool) -> Settings:
        read = tomllib.loads((ROOT / "scripts/mutants.toml").read_text())
        tests: dict[str, list[str]] = read["tests"]
        if quick:
            tests = {module: [t for t in names if "/e2e/" not in t] for module, names in tests.items()}
        return Settings({m: names for m, names in tests.items() if names}, read.get("equivalent", []))

    def tests_of(self, module: Path) -> list[str]:
        name = str(module.relative_to(SOURCE))
        return next(tests for pattern, tests in self.tests.items() if fnmatch.fnmatch(name, pattern))

    def reason(self, module: Path, diff: str) -> str | None:
        """Why this change changes nothing, if that is known."""
        lines = diff.splitlines()
        gone = [line[1:].strip() for line in lines if re.match(r"-(?!--)", line)]
        new = [line[1:].strip() for line in lines if re.match(r"\+(?!\+\+)", line)]
        for known in self.equivalent:
            if known["module"] == str(module.relative_to(SOURCE)) and (known["is"], known["was"]) == (
                new,
                gone,
            ):
                return str(known["reason"])
        return None


def copy_tree() -> str:
    """A fresh copy of all that git knows or would take; its name."""
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    shutil.rmtree(TREE, ignore_errors=True)
    digest = hashlib.sha256()
    for name in sorted(filter(None, names)):
        file = ROOT / name
        if file.is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, TREE / name)
            if name.endswith((".py", ".toml")) and not name.startswith("scripts/"):
                digest.update(name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def modules_of(settings: Settings, words: Sequence[str]) -> list[Path]:
    found = []
    for file in sorted((TREE / SOURCE).rglob("*.py")):
        name = str(file.relative_to(TREE / SOURCE))
        if any(fnmatch.fnmatch(name, pattern) for pattern in settings.tests) and (
            not words or any(word in name for word in words)
        ):
            found.append(SOURCE / name)
    return found


def sample(modules: Iterable[Path], number: int, seed: int) -> list[MutationSpec]:
    """Places first, then one of the changes that each allows: a place does not count more for having many."""
    with use_db(":memory:") as everything:
        init(list(modules), everything, {})
        specs = [item.mutations[0] for item in everything.work_items]
    by_place: dict[Any, list[MutationSpec]] = defaultdict(list)
    for spec in specs:
        family = spec.operator_name.split("_")[0]
        by_place[str(spec.module_path), spec.start_pos, spec.end_pos, family].append(spec)
    choose = random.Random(seed)
    chosen: list[MutationSpec] = []
    places = sorted(by_place)
    choose.shuffle(places)
    for place in places:
        options = sorted(by_place[place], key=lambda spec: (spec.operator_name, spec.occurrence))
        spec = choose.choice(options)
        if len(chosen) < number and is_felt(spec):
            chosen.append(spec)
    return chosen


def is_felt(spec: MutationSpec) -> bool:
    """Not in a declaration, nor in a machine's `check`, nor a constant that is chosen and not derived."""
    before = spec.module_path.read_text()
    constant = spec.operator_name in (
        "core/NumberReplacer",
        "core/ReplaceTrueWithFalse",
        "core/ReplaceFalseWithTrue",
    )
    if constant and not in_a_function(before, spec.start_pos[0]):
        return False
    if re.match("_?check", spec.definition_name or "") or spec.operator_name in IDENTITY:
        return False
    operator = cosmic_ray.plugins.get_operator(spec.operator_name)(**spec.operator_args)
    after = mutate_code(before, operator, spec.occurrence)
    try:
        return after is not None and bare(before) != bare(after)
    except SyntaxError:
        return False


def in_a_function(code: str, line: int) -> bool:
    functions = [
        n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return any(f.body[0].lineno <= line <= (f.end_lineno or 0) for f in functions)


def bare(code: str) -> str:
    """The program without what only describes it: annotations, decorators of classes, unions of types."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Constant(None)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.ClassDef):
            node.decorator_list = []
    top = [
        node for node in tree.body if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp))
    ]
    return ast.dump(ast.Module(top, []))


def command(tests: Sequence[str]) -> str:
    words = ["-q", "-x", "-m", "not gpu", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    bound = [sys.executable, "tests/kit/bound.py", f"parent:{os.getpid()}"]
    return shlex.join([*bound, sys.executable, "-m", "pytest", *words, *tests])


def check_unchanged(settings: Settings, specs: Sequence[MutationSpec], workers: int) -> None:
    """Only tests that are green without a change can tell anything."""
    suites = {tuple(settings.tests_of(spec.module_path)) for spec in specs}
    with ThreadPoolExecutor(workers) as pool:
        for tests, done in zip(suites, pool.map(unchanged, suites), strict=True):
            print(f"without a change: {' '.join(tests)}", flush=True)
            if done.returncode:
                print(done.stdout[-4000:], done.stderr[-1000:], sep="\n")
                print("mutants: these tests are red as it is", file=sys.stderr)
                sys.exit(2)


def unchanged(tests: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(shlex.split(command(tests)), capture_output=True, text=True, check=False)


def settle_in() -> None:
    """Each worker changes a copy of its own."""
    own = SCRATCH / f"tree-{os.getpid()}"
    shutil.copytree(TREE, own)
    os.chdir(own)
    os.environ["PYTHONPATH"] = str(own / "src")
    choose_operators()


def try_one(item: WorkItem, tests: Sequence[str], limit_s: float) -> tuple[WorkResult, float]:
    began = time.monotonic()
    return mutate_and_test(item.mutations, command(tests), limit_s), time.monotonic() - began


def run(settings: Settings, db: WorkDB, limit_s: float, workers: int) -> None:
    pending = sorted(db.pending_work_items, key=lambda item: item.job_id)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), settle_in) as pool:
        trying = {}
        for item in pending:
            tests = settings.tests_of(item.mutations[0].module_path)
            trying[pool.submit(try_one, item, tests, limit_s)] = item
        for number, done in enumerate(as_completed(trying), start=1):
            item, (result, took) = trying[done], done.result()
            db.set_result(item.job_id, result)
            (spec,) = item.mutations
            print(
                f"{number}/{len(pending)} {spec.module_path}:{spec.start_pos[0]} {spec.operator_name}: "
                f"{result.test_outcome} after {took:.0f} s", flush=True,
            )  # fmt: skip
    for tree in SCRATCH.glob("tree-*"):
        shutil.rmtree(tree, ignore_errors=True)


def report(settings: Settings, results: Sequence[tuple[MutationSpec, WorkResult]], least: float) -> int:
    survived = [(spec, result) for spec, result in results if result.test_outcome is TestOutcome.SURVIVED]
    equivalent = 0
    for spec, result in survived:
        reason = settings.reason(spec.module_path, result.diff or "")
        equivalent += reason is not None
        print(f"\n{spec.module_path}:{spec.start_pos[0]} ({spec.definition_name}) {spec.operator_name}")
        print(f"changes nothing: {reason}" if reason else result.diff)
    noticed = len(results) - len(survived)
    score = (noticed + equivalent) / max(1, len(results))
    print(f"\n{len(results)} changes: {noticed} noticed, {equivalent} change nothing, "
          f"{len(survived) - equivalent} unseen; {score:.1%}")  # fmt: skip
    return int(score < least)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only modules whose path holds one of them")
    parser.add_argument("--number", type=int, default=200, help="how many changes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=600.0, help="seconds for one change (default: %(default)s)"
    )
    parser.add_argument("--least", type=float, default=0.95, help="the score to reach (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="how many at a time (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="without tests that start servers: a lower bound"
    )
    options = parser.parse_args()
    choose_operators()
    settings = Settings.load(options.quick)
    key = hashlib.sha256(
        f"{copy_tree()} {options.number} {options.seed} {options.quick} {options.words}".encode()
    ).hexdigest()
    os.chdir(TREE)
    os.environ["PYTHONPATH"] = str(TREE / "src")
    with use_db(SCRATCH / f"{key[:12]}.sqlite") as db:
        if not db.num_work_items:
            specs = sample(modules_of(settings, options.words), options.number, options.seed)
            check_unchanged(settings, specs, options.workers)
            db.add_work_items(WorkItem.single(f"{n:05}", spec) for n, spec in enumerate(specs))
        run(settings, db, options.limit, options.workers)
        found = [(item.mutations[0], result) for item, result in db.completed_work_items]
    return report(settings, found, options.least)


if __name__ == "__main__":
    sys.exit(main())
