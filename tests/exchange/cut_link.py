"""A link between two hosts that can be cut, or go silent, as often as a test likes."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from elastic_ep.host.carrier import Address


class CutLink:
    """Dial `address` to come to `target`, which is given later."""

    def __init__(self) -> None:
        self.target: Address | None = None
        self.passed = 0
        """Connections so far."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._silent: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address:
        host, port = self._listener.getsockname()[:2]
        return host, port

    def cut(self) -> None:
        """Both ends are told."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for one in (end for pair in pairs for end in pair):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def fall_silent(self) -> None:
        """Nobody is told: what is sent on the present connections is lost. New ones are as good as ever."""
        with self._lock:
            self._silent.update(end for pair in self._pairs for end in pair)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self.target is None:
                    raise ConnectionRefusedError("nothing lies behind it yet")
                far = socket.create_connection(self.target)
            except OSError:
                near.close()
                continue
            with self._lock:
                self.passed += 1
                self._pairs.append((near, far))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._forward, args=(source, sink), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        """Each thread closes the end that it reads."""
        try:
            while data := source.recv(1 << 16):
                if source not in self._silent:
                    sink.sendall(data)
        except OSError:
            pass
        finally:
            with suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)
            source.close()
