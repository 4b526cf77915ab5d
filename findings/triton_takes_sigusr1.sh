#!/usr/bin/env bash
# Triton 3.7.1 (triton-lang/triton, PyPI), x86-64 Linux, no GPU needed.
#
# Expected: a process that has a handler for SIGUSR1 (a dump of all stacks of a server that hangs, say) keeps it while it
# compiles a kernel.
# Seen: the first compilation replaces it, and the one of SIGINT, SIGHUP, SIGTERM and SIGUSR2. A SIGUSR1 then does nothing at
# all: neither the process's handler runs, nor does the signal end the process. An ignored SIGINT is shown as caught. The
# first of the other signals puts all old handlers back. Who did it is LLVM, which cleans temporary files up at a signal and
# takes SIGUSR1 as a question for its state. Importing triton alone changes nothing.
# What helps: another signal, or signal.signal once more after the first kernel.
#
# Output:
#   before: SIGUSR1 handled 1 time
#   after a kernel was compiled: SIGUSR1 handled 0 times
#   SIGINT ignored: before True, after False
#   set again: SIGUSR1 handled 1 time
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.7.1
cat >"$folder/try.py" <<'PY'
import os
import signal

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i) * 2)


calls = []


def handle():
    signal.signal(signal.SIGUSR1, lambda *_: calls.append(1))


def handled():
    calls.clear()
    os.kill(os.getpid(), signal.SIGUSR1)
    return f"SIGUSR1 handled {len(calls)} time" + ("" if len(calls) == 1 else "s")


def ignores_sigint():
    with open("/proc/self/status") as status:
        ignored = next(line.split()[1] for line in status if line.startswith("SigIgn"))
    return bool(int(ignored, 16) >> (signal.SIGINT - 1) & 1)


handle()
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("before:", handled())
before = ignores_sigint()
signature = {"x": "*fp32", "y": "*fp32", "N": "constexpr"}
triton.compile(ASTSource(double, signature, {(2,): 128}), target=GPUTarget("cuda", 90, 32))
print("after a kernel was compiled:", handled())
print(f"SIGINT ignored: before {before}, after {ignores_sigint()}")
handle()
print("set again:", handled())
PY
cat >"$folder/expected" <<'OUT'
before: SIGUSR1 handled 1 time
after a kernel was compiled: SIGUSR1 handled 0 times
SIGINT ignored: before True, after False
set again: SIGUSR1 handled 1 time
OUT
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"
