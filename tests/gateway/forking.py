"""As a script: a process without threads forks the one that reads large bodies, and has it read a grammar. What it saw is
printed as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any

import anyio

from elastic_ep.gateway import text_process, text_worker
from elastic_ep.gateway.job import Job
from elastic_ep.gateway.text_worker import Begun, TextWorker, WorkerSetup
from tests.gateway.conftest import settings
from tests.gateway.fakes import sample_text

SCHEMA = {"type": "object", "properties": {"apples": {"type": "integer"}}}
BODY = {
    "messages": [{"role": "user", "content": "How many?"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
}


def main() -> None:
    of_others = os.pipe()  # which a child that kept it would hold open
    text = sample_text()
    begun = text_process.fork(settings(), text)
    assert begun is not None, "this process has no threads"
    seen = anyio.run(use, begun)
    seen["pipe closed"] = closed(*of_others)
    held = threading.Event()
    thread = threading.Thread(target=held.wait)
    thread.start()
    seen["beside a thread"] = text_process.fork(settings(), text) is not None
    held.set()
    thread.join()
    json.dump(seen, sys.stdout)


async def use(begun: Begun) -> dict[str, Any]:
    started: list[int] = []
    text_worker._spawn = lambda *fds: started.append(1)  # type: ignore[assignment]
    worker = TextWorker(WorkerSetup(settings(), sample_text), begun)
    found = await worker.read("chat", json.dumps(BODY).encode())
    assert isinstance(found, Job)
    files = {int(name) for name in os.listdir(f"/proc/{begun.child.pid}/fd")} - {0, 1, 2}
    pid = worker.pid
    await worker.close()
    return {
        "same process": pid == begun.child.pid,
        "started": len(started),
        "guided": found.parts[0].params.grammar is not None,
        "files": len(files),
        "gone": begun.child.poll() is not None,
    }


def closed(read_end: int, write_end: int) -> bool:
    os.close(write_end)
    os.set_blocking(read_end, False)
    return os.read(read_end, 1) == b""


if __name__ == "__main__":
    main()
