"""A peer that fails costs nobody else's figures."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from pathlib import Path

import pytest

from bench import peers

SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        usage = {"completion_tokens": body["max_tokens"]}
        for event in ({"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, {"choices": [], "usage": usage}):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_a_failed_peer_is_named_and_the_next_one_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, out = tmp_path / "server.py", tmp_path / "result.json"
    script.write_text(SERVER)
    python = shlex.quote(sys.executable)
    given = [
        *("--peers-only", "--model", str(tmp_path), "--cases", "2:4:2", "--warm", "0", "--seconds", "0.2"),
        *("--port", str(free_port()), "--out", str(out)),
        *("--peer", "broken=echo no such flag; exit 3"),
        *("--peer", f"other={python} {script} {{port}}"),
    ]
    monkeypatch.setattr(sys, "argv", [peers.__file__, *given])
    with pytest.raises(SystemExit, match="failed: broken"):
        peers.main()
    result = json.loads(out.read_text())
    assert result["broken"].startswith("failed: ")
    assert "no such flag" in result["broken"]
    assert result["other"]["cases"][0]["tokens_per_s"] > 0
    assert (tmp_path / "result.broken.log").read_text() == "no such flag\n"
    assert out.with_suffix(".png").stat().st_size > 0
