"""Who may talk to the sockets of the run process over TCP: whoever has the group's key. All others are counted.

A socket's Unix endpoints are open to whoever may enter the run's private directory; what is bound here needs CURVE, and
a client's public key must be the one that follows from the group's key. Options of a ZeroMQ socket hold for what is bound
after they are set: so `bind` comes last.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog
import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from elastic_ep.wire.drain import Drain, make_socket
from elastic_ep.wire.group_key import GroupKey

_ZAP = "inproc://zeromq.zap.01"
_DOMAIN = b"elastic_ep"
_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_CURVE_KEY = 6
"""Which part of a request by ZAP (RFC 27) is the client's key."""
log = structlog.get_logger()


class Guard:
    """Of all sockets of `context`. On the running event loop. `refused`: connections that were not let in, each of which
    `on_refused` hears of."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        key: GroupKey,
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self.refused = 0
        self._on_refused = on_refused
        self.key = key
        self._context = context
        self._keys = key.controller
        self._known = z85.decode(key.others.public)
        self._zap = make_socket(context, zmq.REP)
        self._zap.bind(_ZAP)
        self._drains = [Drain(self._zap, self._on_request)]
        self._drains[0].start()

    def bind(
        self,
        socket: zmq.Socket[bytes],
        address: str,
        port: int,
        on_closed: Callable[[int], None] = lambda _fd: None,
    ) -> int:
        """The port, chosen by the system if `port` is 0. `on_closed` hears the descriptor of a connection that ended.

        Raises `zmq.ZMQError`.
        """
        monitor = socket.get_monitor_socket(_FAILED | zmq.EVENT_DISCONNECTED)

        def on_event(parts: list[bytes]) -> None:
            event = parse_monitor_message(parts)
            if event["event"] & _FAILED:
                self.refused += 1
                self._on_refused()
                if (
                    self.refused & (self.refused - 1) == 0
                ):  # 1, 2, 4, ...: who is refused tries again and again
                    log.warning(
                        "a connection without the group's key is refused", so_far=self.refused, port=bound
                    )
            else:
                on_closed(event["value"])

        socket.curve_server = True
        socket.curve_secretkey = self._keys.secret
        socket.zap_domain = _DOMAIN
        socket.ipv6 = ":" in address
        socket.bind(_endpoint(address, port or "*"))
        bound = int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        drain = Drain(monitor, on_event)
        drain.start()
        self._drains.append(drain)
        return bound

    def close(self) -> None:
        """Before the context."""
        for drain in self._drains:
            drain.close()

    def _on_request(self, parts: list[bytes]) -> None:
        version, number = parts[:2]
        known = len(parts) > _CURVE_KEY and parts[_CURVE_KEY] == self._known
        status, text = (b"200", b"") if known else (b"400", b"another key")
        self._zap.send_multipart([version, number, status, text, b"", b""], zmq.NOBLOCK)
        self._drains[0].after_send()


def with_key(socket: zmq.Socket[bytes], key: GroupKey) -> None:
    """What `socket` dials from now on must be the run process of the group with this key."""
    pair = key.others
    socket.curve_serverkey = key.controller.public
    socket.curve_publickey = pair.public
    socket.curve_secretkey = pair.secret


def dial(socket: zmq.Socket[bytes], address: str, port: int) -> None:
    socket.ipv6 = ":" in address
    socket.connect(_endpoint(address, port))


def _endpoint(address: str, port: int | str) -> str:
    return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
