"""What the launcher tests' ranks do. The "windows" are the write end of a pipe here: a rank says hello into it."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time

from elastic_ep.host.fork_messages import SharedFiles

PR_GET_NAME = 16


def main(config_json: str, files: SharedFiles, life_fd: int) -> int:
    config = json.loads(config_json)
    if config["do"] == "raise":
        raise RuntimeError("this rank is broken on purpose")
    if config["do"] == "leave":
        sys.exit(7)
    _say_hello(files, life_fd, len(config.get("padding", "")))
    if config["do"] == "return":
        return int(config["status"])
    while True:
        signal.pause()


def slow_start(config_json: str, files: SharedFiles, life_fd: int) -> int:
    """Never says hello."""
    while True:
        signal.pause()


def _say_hello(files: SharedFiles, life_fd: int, padding: int) -> None:
    name = ctypes.create_string_buffer(16)
    ctypes.CDLL(None).prctl(PR_GET_NAME, name, 0, 0, 0)
    facts = {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "nice": os.nice(0),
        "name": name.value.decode(),
        "threads": len(os.listdir("/proc/self/task")),
        "sockets": sum(_target(fd).startswith("socket:") for fd in os.listdir("/proc/self/fd")),
        "torch": "torch" in sys.modules,
        "torch_threads": sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None,
        "padding": padding,
        "life": os.fstat(life_fd).st_size == 0,
        "at_ns": time.monotonic_ns(),
    }
    os.write(files.windows, json.dumps(facts).encode() + b"\n")


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""
