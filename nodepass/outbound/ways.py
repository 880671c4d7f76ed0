"""The ways to a server: directly, to the endpoints that are known of it, or through a proxy, which looks its name up.

A `Way` makes connections of both kinds. A control connection is dialled by it, and data connections by what `settle`
returns, at the port that the server offers: without a proxy, at the address that the control connection has reached.
What is returned is a socket of the kernel in any case. The steps of a dial through a proxy have one deadline together.
The client's `servers` makes the ways, `connector` and `data_dialer` dial; dials to targets never take a proxy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import gevent

from nodepass.config.hostport import certified_host
from nodepass.config.outbound import Passage
from nodepass.config.urls import Address
from nodepass.errors import ConfigError, ProxyError, reason
from nodepass.net.sockets import LOCAL, Bind, Endpoint, Socket, dial
from nodepass.net.stream import Stream, TCPStream
from nodepass.outbound import http_connect, socks5
from nodepass.outbound.bridge import open_bridge

_CONNECT = {"http": http_connect.connect, "https": http_connect.connect, "socks5h": socks5.connect}


class Way(Protocol):
    """How connections to one server are made; as text, where they lead."""

    has_proxy: bool

    def dial(self, timeout: float, keepalive: float = 0.0) -> Socket:
        """A connection within `timeout` seconds; with `keepalive`, in seconds, it gets probes. Raises OSError."""

    def settle(self, sock: Socket) -> Way:
        """The way that this connection has taken."""

    def with_port(self, port: int) -> Way:
        """The same way, to another port."""


@dataclass(frozen=True)
class Direct:
    """Without a proxy, to the first of these endpoints that answers."""

    endpoints: Sequence[Endpoint]
    bind: Bind | None  # where it comes from
    has_proxy = False

    def __str__(self) -> str:
        return ", ".join(map(str, self.endpoints))

    def dial(self, timeout: float, keepalive: float = 0.0) -> Socket:
        return dial(self.endpoints, timeout, keepalive, self.bind)

    def settle(self, sock: Socket) -> Direct:
        return replace(self, endpoints=[Endpoint(sock.family, sock.getpeername())])

    def with_port(self, port: int) -> Direct:
        return replace(self, endpoints=[each.with_port(port) for each in self.endpoints])


@dataclass(frozen=True)
class Proxied:
    """Through a proxy.

    `find`: the proxy's endpoints, within so many seconds. `spawn`: as of `open_bridge`.
    """

    address: Address
    passage: Passage
    bind: Bind | None
    find: Callable[[float], Sequence[Endpoint]]
    spawn: Callable[..., object]
    has_proxy = True

    def __str__(self) -> str:
        return f"{self.address} through {self.passage.proxy}"

    def settle(self, sock: Socket) -> Proxied:  # noqa: ARG002  # only the proxy knows which address it has reached
        return self

    def with_port(self, port: int) -> Proxied:
        return replace(self, address=replace(self.address, port=port))

    def dial(self, timeout: float, keepalive: float = 0.0) -> Socket:
        """As `Way.dial`; what fails before the server can be spoken to is a ProxyError."""
        name = f"the proxy {self.passage.proxy}"
        with gevent.Timeout(timeout) as late:
            try:
                return self._dial(timeout, keepalive)
            except ProxyError as error:
                raise ProxyError(f"{name} {error}", error.code) from None
            except gevent.Timeout as passed:
                if passed is not late:
                    raise
                raise ProxyError(f"{name} does not answer within {timeout:g}s", "timeout") from None

    def _dial(self, timeout: float, keepalive: float) -> Socket:
        try:
            sock = dial(self.find(timeout), timeout, keepalive, self.bind)
        except OSError as error:
            raise ProxyError(f"cannot be reached: {reason(error)}", "unreachable") from None
        with contextlib.ExitStack() as failed:
            failed.callback(sock.close)
            connected = self._connect(sock, timeout)
            failed.pop_all()
        return connected

    def _connect(self, sock: Socket, timeout: float) -> Socket:
        """The socket that leads to the server, once the proxy has connected. Raises ProxyError."""
        scheme = self.passage.proxy.scheme
        try:
            stream: Stream = self._encrypted(sock) if scheme == "https" else TCPStream(sock)
            host, port = certified_host(self.address.host or LOCAL), self.address.port
            _CONNECT[scheme](stream, host, port, self.passage.login.credentials())
            return sock if stream.plain else open_bridge(stream, self.spawn, timeout)
        except ProxyError:
            raise
        except (OSError, ConfigError) as error:
            raise ProxyError(f"gives no connection: {reason(error)}", "failed") from None

    def _encrypted(self, sock: Socket) -> Stream:
        from nodepass.tls.stream import connect_tls
        from nodepass.tls.verify import Expected, Verify

        return connect_tls(sock, Expected(certified_host(self.passage.proxy.host), Verify.ENFORCE), v2=False)
