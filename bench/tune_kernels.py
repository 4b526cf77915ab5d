"""Which tiles, stages and variants of the GPU kernels are fastest here: one bounded run, a table, a ranking.

Everything is compiled first, by as many processes as there are processors; then each candidate is checked beside the
float64 reference and against the bits of the first one, and timed as kernels.py times. Candidates come best guess first;
what `--seconds` leaves no time for is left out. At last the best tiles of the experts' two products are tried together.

    python -m bench.tune_kernels --seconds 150 --out bench/results/tune_kernels.json

`--rehearse`, with TRITON_INTERPRET=1, goes through the same motions without a GPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
import triton
from tests.kit.bound import tied

from bench.kit import tune_candidates
from bench.kit.command_line import command_line
from bench.kit.kernel_timing import BF16, measure_limits, times
from bench.kit.tune_candidates import Config, Decode, describe
from bench.kit.tune_cases import MOST_ERROR, Case, DecodeCase, compile_on_nothing, expert_cases
from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan, plan_for

Row = dict[str, Any]
Job = tuple[Case, Config]
ROWS = (1, 4, 16, 64)
EXPECTED = {"few": 1, "many": 1000}
"""Rows a slot, for which `plan_for` says what there is now."""


def main() -> None:
    options = _options()
    tuner = _Rehearsal(options) if options.rehearse else _Tuner(options)
    with tuner.pool:
        tuner.first_pass()
        for group in EXPECTED:
            tuner.combine(group)
        tuner.pool.shutdown(cancel_futures=True)
    tuner.report()


def _options() -> argparse.Namespace:
    parser = command_line(__doc__, "tune_kernels")
    parser.add_argument("--seconds", type=float, default=150, help="for all, the compiler included")
    parser.add_argument("--rounds", type=int, default=7, help="replays whose median counts")
    parser.add_argument("--only", choices=("decode", "few", "many"), help="one group of cases")
    parser.add_argument("--rehearse", action="store_true")
    return parser.parse_args()


class _Tuner:
    device = "cuda"
    slots: tuple[int, ...] = (32, 128)
    most_error = MOST_ERROR

    def __init__(self, options: argparse.Namespace) -> None:
        self._begun = time.monotonic()
        self._options = options
        self._deadline = self._begun + options.seconds
        spawn = multiprocessing.get_context("spawn")
        workers = max(1, min(14, (os.cpu_count() or 1) - 2))
        self.pool = ProcessPoolExecutor(workers, spawn, tied, (torch.set_default_device, self.device))
        self._compiled: dict[tuple[Config, int], Future[str]] = {}
        self.rows: list[Row] = []
        self._limits: dict[str, float] = {}
        self._bad: set[tuple[Config, int]] = set()

    def first_pass(self) -> None:
        candidates = self.candidates()
        slots = {group: (0,) if group == "decode" else self.slots for group in candidates}
        self.compile((c, n) for group, configs in candidates.items() for c in configs for n in slots[group])
        torch.manual_seed(0)
        torch.set_default_device(self.device)
        cases = [case for case in self.cases() if case.group in candidates]
        self._cases = cases
        self.finish_compiling(0.45)
        self._limits = self.limits()
        turns = [
            (place, case, config) for case in cases for place, config in enumerate(candidates[case.group])
        ]
        turns.sort(key=lambda one: one[0])
        self.measure((case, config) for _, case, config in turns)

    def candidates(self) -> dict[str, list[Config]]:
        found: dict[str, list[Config]] = {"decode": list(tune_candidates.decode())}
        found |= {group: list(tune_candidates.experts(rows)) for group, rows in EXPECTED.items()}
        return {group: found[group] for group in found if self._options.only in (None, group)}

    def cases(self) -> list[Case]:
        cases: list[Case] = [DecodeCase(32, 4096), DecodeCase(1, 4096), DecodeCase(64, 1024)]
        return cases + expert_cases(32, ROWS, 4096) + expert_cases(128, ROWS, 4096)

    def limits(self) -> dict[str, float]:
        return measure_limits(20)

    def combine(self, group: str) -> None:
        """The best of both products together, on every case of the group."""
        best = [config for _, config in self.ranking(group) if isinstance(config, Plan)]
        plans = tune_candidates.combined(best, plan_for(EXPECTED[group], BF16))
        cases = [case for case in self._cases if case.group == group]
        self.compile([(plan, slots) for plan in plans for slots in sorted({case.slots for case in cases})])
        self.finish_compiling(1.0)
        self.measure((case, plan) for plan in plans for case in cases)

    def compile(self, wanted: Iterable[tuple[Config, int]]) -> None:
        for config, slots in wanted:
            key = _as_compiled(config), slots
            if key not in self._compiled:
                self._compiled[key] = self.pool.submit(_compile, *key)

    def finish_compiling(self, share: float) -> None:
        """Waits, for at most `share` of the whole time: measurements want the device to themselves."""
        until = self._begun + share * self._options.seconds
        for (config, slots), future in self._compiled.items():
            try:
                error = future.result(max(0.0, until - time.monotonic()))
            except TimeoutError:
                future.cancel()
                error = "no time to compile"
            except Exception as broken:  # a worker has died: nothing more can be compiled ahead
                error = repr(broken)[:120]
            if error and (config, slots) not in self._bad:
                self._bad.add((config, slots))
                print(f"  left out: {describe(config)}, {slots} slots: {error}")
        print(f"compiled {len(self._compiled)} after {time.monotonic() - self._begun:.0f} s", flush=True)

    def measure(self, jobs: Iterable[Job]) -> None:
        known = {(row["case"], row["config"]) for row in self.rows}
        for case, config in jobs:
            if time.monotonic() > self._deadline:
                print("  no time for the rest")
                break
            if (case.name, describe(config)) in known or (_as_compiled(config), case.slots) in self._bad:
                continue
            self.rows.append(self._row(case, config))
            if "device_lost" in self.rows[-1]:
                print(f"  the device is lost to this process: {describe(config)}")
                self._deadline = 0.0
        self._write()

    def _row(self, case: Case, config: Config) -> Row:
        row: Row = {
            "case": case.name,
            "group": case.group,
            "config": describe(config),
            "choice": asdict(config),
        }
        try:
            error, same = case.errors(config)
            us = self.time(case, config)
        except Exception as failure:  # of whatever kind: the next candidate may be sound
            row |= {"sound": False, "failure": f"{type(failure).__name__}: {str(failure)[:200]}"}
            return row | self._device_lost()
        sound = same and error <= self.most_error and math.isfinite(us)
        row |= {"us": round(us, 2), "error": error, "same_bits": same, "sound": sound, "object": config}
        row["copy_share"] = round(case.moved / us / 1e6 / self._limits["copy_tb_s"], 3)
        if case.flops:
            row["bf16_share"] = round(case.flops / us / 1e6 / self._limits["bf16_tflops"], 3)
        return row

    def _device_lost(self) -> dict[str, bool]:
        """Some errors stay: nothing that comes after them is measured."""
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:
            return {"device_lost": True}
        return {}

    def time(self, case: Case, config: Config) -> float:
        return times({"it": lambda: case.run(config)}, self._options.rounds, repeat=16)["it"]

    def ranking(self, group: str) -> list[tuple[float, Config]]:
        """Configurations measured on all cases of the group: geometric mean of the time over each case's best."""
        sound = [row for row in self.rows if row["group"] == group and row["sound"]]
        best: dict[str, float] = {}
        for row in sound:
            best[row["case"]] = min(row["us"], best.get(row["case"], math.inf))
        ratios: dict[Config, list[float]] = {}
        for row in sound:
            ratios.setdefault(row["object"], []).append(math.log(row["us"] / best[row["case"]]))
        means = [(math.exp(sum(r) / len(r)), c) for c, r in ratios.items() if len(r) == len(best)]
        return sorted(means, key=lambda one: one[0])

    def report(self) -> None:
        for case in dict.fromkeys(row["case"] for row in self.rows):
            _print_case(case, [row for row in self.rows if row["case"] == case])
        for group in dict.fromkeys(row["group"] for row in self.rows):
            print(f"\n{group}: time over the best of each case, geometric mean")
            for ratio, config in self.ranking(group)[:5]:
                print(f"  {ratio:.3f}  {describe(config)}")
        print(f"\n{len(self.rows)} rows in {time.monotonic() - self._begun:.0f} s; {self._options.out}")

    def _write(self) -> None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        versions = {"gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}
        ranked = {
            group: [
                {"ratio": round(ratio, 4), "config": describe(c)} for ratio, c in self.ranking(group)[:10]
            ]
            for group in dict.fromkeys(row["group"] for row in self.rows)
        }
        rows = [{key: value for key, value in row.items() if key != "object"} for row in self.rows]
        result = versions | {"limits": self._limits, "ranking": ranked, "rows": rows}
        self._options.out.parent.mkdir(parents=True, exist_ok=True)
        self._options.out.write_text(json.dumps(result, indent=1) + "\n")


class _Rehearsal(_Tuner):
    """Small cases and few candidates in the interpreter."""

    device = "cpu"
    slots = (2,)
    most_error = 2 * MOST_ERROR  # the interpreter cuts off where the GPU rounds

    def candidates(self) -> dict[str, list[Config]]:
        return {group: configs[::9] for group, configs in super().candidates().items()}

    def cases(self) -> list[Case]:
        many = expert_cases(2, (), 24)[-1:]
        return [DecodeCase(2, 80), DecodeCase(1, 304), *expert_cases(2, (1,), 0)[:1], *many]

    def limits(self) -> dict[str, float]:
        return {"copy_tb_s": 1.0, "bf16_tflops": 1.0}

    def time(self, case: Case, config: Config) -> float:
        start = time.perf_counter()
        case.run(config)
        return (time.perf_counter() - start) * 1e6


def _compile(config: Config, slots: int) -> str:
    """Into the compiler's cache on disk, which all processes share; says what went wrong, if anything."""
    try:
        compile_on_nothing(config, slots)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # of whatever kind: it is reported, and the candidate left out
        return f"{type(error).__name__}: {str(error)[:120]}"
    return ""


def _as_compiled(config: Config) -> Config:
    """Without what only the launch depends on."""
    if isinstance(config, Decode):
        return config
    gate_up, down = (replace(tiles, per_processor=1) for tiles in (config.gate_up, config.down))
    return replace(config, gate_up=gate_up, down=down)


def _print_case(case: str, rows: Sequence[Row]) -> None:
    """The three fastest, what there is now (the first), and all that failed."""
    sound = sorted((row for row in rows if row["sound"]), key=lambda row: float(row["us"]))
    now = [rows[0]] if rows[0] in sound[3:] else []
    print(f"\n{case}")
    for row in sound[:3] + now:
        share = f"copy {row['copy_share']:.1%}"
        share += f" bf16 {row['bf16_share']:.1%}" if "bf16_share" in row else ""
        print(f"  {row['us']:9.2f} us  {share}  {row['config']}" + "  <- now" * (row is rows[0]))
    for row in rows:
        if not row["sound"]:
            why = (
                row.get("failure")
                or f"error {row['error']:.1e}, same bits: {row['same_bits']}, {row['us']} us"
            )
            print(f"  unsound: {row['config']}: {why}")


if __name__ == "__main__":
    main()
