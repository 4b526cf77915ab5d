"""Carries hidden states, results and step words between the hosts of a group over TCP: one connection a pair of hosts.

What is said and why it is right stands in `exchange/mirror.py`; here are the connections. The host with the larger number
dials. Both say who they are, which incarnation of their host, and prove that they know the group's key; then each says
which operations of the other's ranks it has seen, and the other goes on from there. So a connection that broke costs the
time to make a new one, and nothing is lost by it, as ranks wait for what they need.

A connection replaces the one before it with the same host, and bytes that still come on the old one are not taken. A host
that was given up is not talked to again before its next incarnation (`fence`).

Nobody is declared dead here: a cut link is silence, which this process answers by dialling again; who is masked is for
those to say who know more.

HAZARD: what follows the proof is neither encrypted nor signed. The network between hosts must be a private one.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader

import structlog

from elastic_ep.exchange.mirror import HEADER, BadFrame, Incoming, Mirror, Outgoing
from elastic_ep.exchange.step_barrier import LINE_BYTES, StepLines

_HELLO = struct.Struct("<4s16siq16s")
"""Magic, digest of what both must agree on, host, its incarnation, nonce."""
_MAGIC = b"eeC1"
_PROOF_BYTES = 32
_KNOWN = struct.Struct("<q")
_FRAME, _STEPS, _BEAT = b"F", b"S", b"B"
_LINE_HEAD = struct.Struct("<i")
_HANDSHAKE_S = 2.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 0.5
"""Between two tries to dial."""
_GLANCE_S = 0.001
"""Looks for step words are so far apart."""
_MOST_STRANGERS = 16
"""Handshakes under way at once."""

Address = tuple[str, int]
log = structlog.get_logger()


class Refused(ConnectionError):
    """The other end is not of this group, or is a host that was given up."""


@dataclass(frozen=True)
class CarrierConfig:
    """`hosts[rank]`; this is host `own` in its `incarnation`. All hosts of a group have the same `hosts` and `key`.

    Nothing heard for `silence_s`: the connection is given up, and made again. Every `beat_s` something is said.
    """

    hosts: tuple[int, ...]
    own: int
    incarnation: int
    key: bytes
    listen: Address = ("127.0.0.1", 0)
    beat_s: float = 0.1
    silence_s: float = 0.5


@dataclass
class Counts:
    """Since the start."""

    sent: int = 0
    taken: int = 0
    dropped: int = 0
    """Frames that came too late."""
    refused: int = 0
    """Connections of strangers, and of hosts that were given up."""
    broken: int = 0
    """Connections that ended: closed, silent, or with bytes that are no frame."""


@dataclass
class _Peer:
    """Another host. `lock` is held while something of it is written into the windows, and to change what is below."""

    host: int
    address: Address | None = None
    fenced: int = 0
    """Its incarnations up to this one are given up."""
    newest: int = 0
    connection: _Connection | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Carrier:
    """Threads beside `windows` and `steps` of this host, either of which may be missing. All methods: any thread."""

    def __init__(
        self,
        config: CarrierConfig,
        windows: Mirror | None = None,
        steps: StepLines | None = None,
        listener: socket.socket | None = None,
        on_links: Callable[[], None] = lambda: None,
    ) -> None:
        """`listener` instead of one at `config.listen`; it is this object's. `on_links`: `links` may have changed. It is
        called on any thread, and must not wait."""
        if config.own not in config.hosts:
            raise ValueError(f"host {config.own} has no rank")
        if not config.key:
            raise ValueError("a carrier needs the group's key")
        self.config = config
        self.counts = Counts()
        self._windows = windows
        self._steps = steps
        self._on_links = on_links
        self._peers = {host: _Peer(host) for host in set(config.hosts) - {config.own}}
        self._strangers = threading.Semaphore(_MOST_STRANGERS)
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._listener = listener or socket.create_server(config.listen)
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    @property
    def address(self) -> Address:
        """That other hosts dial; the port is chosen by the system if none was given."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    def reach(self, host: int, address: Address) -> None:
        """Where to dial `host`, from now on. Only hosts with a smaller number are dialled: the others dial."""
        peer = self._peers[host]
        with self._changed:
            first, peer.address = peer.address is None, address
            self._changed.notify_all()
        if first and host < self.config.own:
            self._start(partial(self._dial, peer))

    def fence(self, host: int, incarnation: int) -> None:
        """When this returns, nothing of this incarnation of `host` is taken any more, nor of those before it."""
        peer = self._peers[host]
        with peer.lock:
            peer.fenced = max(peer.fenced, incarnation)
            if peer.connection is not None and peer.connection.incarnation <= peer.fenced:
                peer.connection.end()
                peer.connection = None

    @property
    def links(self) -> tuple[int, ...]:
        """The hosts that it is connected with."""
        return tuple(host for host in sorted(self._peers) if self.connected(host))

    def connected(self, host: int) -> bool:
        connection = self._peers[host].connection
        return connection is not None and not connection.ended.is_set()

    def close(self) -> None:
        """No thread is left when it returns. Idempotent."""
        self._closed.set()
        with self._changed:
            self._changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self._peers.values():
            with peer.lock:
                if peer.connection is not None:
                    peer.connection.end()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_HANDSHAKE_S + self.config.silence_s)

    # Connections

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="carrier", daemon=True)
        self._threads = [one for one in self._threads if one.is_alive()] + [thread]
        thread.start()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                stream, _ = self._listener.accept()
            except OSError:
                if self._closed.wait(_FIRST_PAUSE_S):
                    return
                continue
            if not self._strangers.acquire(blocking=False):
                self.counts.refused += 1
                stream.close()
                continue
            self._start(partial(self._meet_stranger, stream))

    def _meet_stranger(self, stream: socket.socket) -> None:
        try:
            connection = self._introduce(stream, None)
        except OSError as error:
            self._refuse(stream, error)
            return
        finally:
            self._strangers.release()
        self._serve(connection)

    def _dial(self, peer: _Peer) -> None:
        pause = _FIRST_PAUSE_S
        while not self._closed.is_set():
            assert peer.address is not None
            try:
                stream = socket.create_connection(peer.address, timeout=_HANDSHAKE_S)
            except OSError:
                stream = None
            if stream is not None:
                try:
                    connection = self._introduce(stream, peer.host)
                except OSError as error:
                    self._refuse(stream, error)
                else:
                    began = time.monotonic()
                    self._serve(connection)
                    # One that ends sooner may be one that the other end refuses.
                    if time.monotonic() - began > _LONGEST_PAUSE_S:
                        pause = _FIRST_PAUSE_S
            with self._changed:
                self._changed.wait_for(self._closed.is_set, pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _refuse(self, stream: socket.socket, error: OSError) -> None:
        stream.close()
        if isinstance(error, Refused):
            self.counts.refused += 1
            log.warning("the carrier refuses a connection", why=str(error))

    def _introduce(self, stream: socket.socket, dialled: int | None) -> _Connection:
        """Who is there? Raises OSError, `Refused` if it is nobody to talk to."""
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.settimeout(_HANDSHAKE_S)
        reader = stream.makefile("rb")
        try:
            peer, incarnation = self._recognized(stream, reader, dialled)
            return self._take(stream, reader, peer, incarnation)
        except BaseException:
            reader.close()
            raise

    def _recognized(
        self, stream: socket.socket, reader: BufferedReader, dialled: int | None
    ) -> tuple[_Peer, int]:
        mine = _HELLO.pack(
            _MAGIC, self._agreed(), self.config.own, self.config.incarnation, secrets.token_bytes(16)
        )
        stream.sendall(mine)
        theirs = _exactly(reader, _HELLO.size)
        magic, agreed, host, incarnation, _ = _HELLO.unpack(theirs)
        if magic != _MAGIC:
            raise Refused("what dials is no carrier, or one of another version")
        stream.sendall(self._proof(mine, theirs))
        if not hmac.compare_digest(_exactly(reader, _PROOF_BYTES), self._proof(theirs, mine)):
            raise Refused("the other end has another key")
        if agreed != self._agreed():
            raise Refused(
                f"host {host} has other shapes or other hosts: start it with the same configuration"
            )
        if host not in self._peers or (dialled is not None and host != dialled):
            raise Refused(f"host {host} answers, which is not the one that is wanted")
        return self._peers[host], incarnation

    def _take(
        self, stream: socket.socket, reader: BufferedReader, peer: _Peer, incarnation: int
    ) -> _Connection:
        connection = _Connection(stream, reader, peer, incarnation)
        with peer.lock:
            if incarnation <= peer.fenced or incarnation < peer.newest:
                raise Refused(f"host {peer.host} was given up in its incarnation {incarnation}")
            if self._closed.is_set():
                raise Refused("this carrier is closed")
            peer.newest = incarnation
            if peer.connection is not None:
                peer.connection.end()
            peer.connection = connection
            stream.settimeout(self.config.silence_s)
            if self._windows is not None:
                connection.incoming = self._windows.from_host(peer.host)
                known = connection.incoming.known()
                stream.sendall(b"".join(_KNOWN.pack(known[rank]) for rank in sorted(known)))
        return connection

    def _agreed(self) -> bytes:
        shape = None if self._windows is None else self._windows.shape
        return hashlib.sha256(repr((shape, self.config.hosts)).encode()).digest()[:16]

    def _proof(self, whose: bytes, other: bytes) -> bytes:
        return hmac.digest(self.config.key, b"elastic_ep carrier" + whose + other, "sha256")

    # What goes over them

    def _serve(self, connection: _Connection) -> None:
        """Until it ends."""
        self._on_links()
        try:
            outgoing = self._outgoing(connection)
            sender = threading.Thread(
                target=self._send, args=(connection, outgoing), name="carrier", daemon=True
            )
            sender.start()
            try:
                self._receive(connection)
            finally:
                connection.end()
                sender.join()
        except (OSError, BadFrame) as error:
            if not self._closed.is_set():
                log.warning("a carrier's connection ends", host=connection.peer.host, why=str(error))
        finally:
            connection.end()
            connection.reader.close()
            connection.stream.close()
            self.counts.broken += 1
            self._on_links()

    def _outgoing(self, connection: _Connection) -> Outgoing | None:
        if self._windows is None:
            return None
        outgoing = self._windows.towards(connection.peer.host)
        for rank in sorted(outgoing.heard):
            (outgoing.heard[rank],) = _KNOWN.unpack(_exactly(connection.reader, _KNOWN.size))
        return outgoing

    def _send(self, connection: _Connection, outgoing: Outgoing | None) -> None:
        """Frames as they come up, else now and then a sign of life."""
        mine = [rank for rank, host in enumerate(self.config.hosts) if host == self.config.own]
        said = dict.fromkeys(mine, b"")
        spoke = time.monotonic()
        try:
            while not connection.ended.is_set():
                knocks = self._windows.bell.knocks() if self._windows else 0
                parts: list[bytes] = []
                for frame in outgoing.frames() if outgoing else ():
                    parts += (_FRAME, frame)
                    self.counts.sent += 1
                for rank in mine if self._steps else ():
                    assert self._steps is not None
                    if (line := self._steps.read(rank)) != said[rank]:
                        said[rank] = line
                        parts += (_STEPS, _LINE_HEAD.pack(rank), line)
                now = time.monotonic()
                if not parts and now - spoke >= self.config.beat_s:
                    parts = [_BEAT]
                if parts:
                    connection.stream.sendall(b"".join(parts))
                    spoke = now
                elif self._windows is None:
                    time.sleep(_GLANCE_S)
                else:
                    self._windows.bell.await_knock(knocks)
        except OSError:
            connection.end()

    def _receive(self, connection: _Connection) -> None:
        while not connection.ended.is_set():
            kind = _exactly(connection.reader, 1)
            if kind == _FRAME and connection.incoming is not None:
                self._take_frame(connection, connection.incoming)
            elif kind == _STEPS and self._steps is not None:
                (rank,) = _LINE_HEAD.unpack(_exactly(connection.reader, _LINE_HEAD.size))
                line = _exactly(connection.reader, LINE_BYTES)
                if not 0 <= rank < len(self.config.hosts) or self.config.hosts[rank] != connection.peer.host:
                    raise BadFrame(f"the step of rank {rank}, which is not on that host")
                with connection.peer.lock:
                    if connection.is_current:
                        self._steps.write(rank, line)
            elif kind != _BEAT:
                raise BadFrame("bytes that are no frame")

    def _take_frame(self, connection: _Connection, incoming: Incoming) -> None:
        head = _exactly(connection.reader, HEADER.size)
        header = incoming.header(head)
        body = _exactly(connection.reader, incoming.body_bytes(header))
        with connection.peer.lock:
            if connection.is_current:
                before = incoming.dropped
                incoming.apply(head, header, body)
                self.counts.taken += 1
                self.counts.dropped += incoming.dropped - before


class _Connection:
    """With one incarnation of a host."""

    def __init__(self, stream: socket.socket, reader: BufferedReader, peer: _Peer, incarnation: int) -> None:
        self.stream = stream
        self.reader = reader
        self.peer = peer
        self.incarnation = incarnation
        self.incoming: Incoming | None = None
        self.ended = threading.Event()

    @property
    def is_current(self) -> bool:
        """To be asked with the peer's lock held."""
        return self.peer.connection is self and not self.ended.is_set()

    def end(self) -> None:
        """Any thread, at any time. Who reads or writes is told."""
        self.ended.set()
        with suppress(OSError):
            self.stream.shutdown(socket.SHUT_RDWR)


def _exactly(reader: BufferedReader, count: int) -> bytes:
    """Raises ConnectionError if the other end has closed, TimeoutError if it is silent."""
    data = reader.read(count)
    if data is None or len(data) < count:
        raise ConnectionError("closed by the other end")
    return data
