"""The proxies in front of a server (ACCEPT_PROXY): what they pass on begins with a header of the PROXY protocol.

It decides which peers are proxies, and reads a header exactly, so that what follows, TLS for example, is still in the
socket. From then on, the connection or the datagram is that of the peer in its header. From all other peers none is
looked for, and one that they send is data. `visitor_listener`, `datagram_listener` and `tunnel_port` ask it; what a
refused connection means to them is not known here. A server without ACCEPT_PROXY has no `Proxies`.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from gevent.socket import wait_read

from nodepass.config.hostport import parse_ip
from nodepass.config.kinds import Rule, format_duration
from nodepass.errors import ProxyHeaderError, reason
from nodepass.log import Limit, Log
from nodepass.net.sockets import Endpoint, Socket, reset_on_close
from nodepass.net.udp import ProxiedAddress, ReplyAddress
from nodepass.tunnel.part import Common
from nodepass.visitors.network_set import NetworkSet
from nodepass.wire.proxy_protocol import LARGEST, Ends, IPAddress, find_length, parse_header, split_datagram

HEADER_TIMEOUT = 5.0  # seconds for a header of a visitor where FIRST_BYTE_TIMEOUT is off
RARELY = 60.0  # seconds between two lines about the same mistake, which each connection repeats


class Visitor(NamedTuple):
    """Whose a proxy's connection is, and the address that this visitor has connected to; None: the connection's."""

    peer: Endpoint
    local: Endpoint | None


class Proxies:
    """The proxies in front of one place: a target address, or a tunnel port with its data port."""

    def __init__(self, rule: Rule, seconds: float, place: str, log: Log) -> None:
        """`seconds`: in which a connection's header must arrive; `place`: its name in the log."""
        self.seconds = seconds
        self._networks = NetworkSet(rule.networks)
        self._place = place
        self._log = log

    @classmethod
    def at_target(cls, common: Common) -> Proxies | None:
        """Those in front of a tunnel's target address, if it has any."""
        settings = common.settings
        seconds = settings.first_byte_timeout or HEADER_TIMEOUT
        return cls(settings.accept_proxy, seconds, "target address", common.log) if settings.accept_proxy else None

    def trusts(self, host: str) -> bool:
        """Whether this peer, as the kernel writes its address, is a proxy."""
        return parse_ip(host) in self._networks

    def read(self, sock: Socket, proxy: Endpoint, began: float) -> Visitor:
        """Read the header of a connection that began then (time.monotonic()), and nothing behind it.

        Raises ProxyHeaderError.
        """
        ends = parse_header(self._read(sock, began + self.seconds))
        if ends:
            return Visitor(_endpoint(ends.source), _endpoint(ends.destination))
        return Visitor(proxy, None)

    def unwrap(self, datagram: bytes, proxy: ReplyAddress) -> tuple[bytes, ReplyAddress]:
        """The payload of a proxy's datagram, and its visitor; the answer goes to the proxy.

        Raises ProxyHeaderError.
        """
        ends, payload = split_datagram(datagram)
        return payload, _proxied(ends, proxy) if ends else proxy

    def refuse(self, proxy: object, error: ProxyHeaderError, counter: Counter[str]) -> None:
        """Count by its reason that a connection or a datagram is refused, and log it."""
        counter[error.reason] += 1
        words = "refused proxy %(proxy)s at the %(place)s: %(error)s (ACCEPT_PROXY)"
        place, why = self._place, error.reason
        limit = Limit(f"{place}, {why}", RARELY, 1)
        self._log.warning("proxy.refused", words, limit, proxy=proxy, place=place, reason=why, error=error)

    def _read(self, sock: Socket, deadline: float) -> bytes:
        """Take what belongs to the header out of the socket as it arrives, so that a wait is for more of it."""
        header = b""
        try:
            while True:
                try:
                    arrived = sock.recv(LARGEST, socket.MSG_PEEK)
                except BlockingIOError:
                    wait_read(sock.fileno(), max(0.001, deadline - time.monotonic()), self._late())
                    continue
                if not arrived:
                    raise ProxyHeaderError("header_missing", "closed before the end of its header")
                length = find_length(header + arrived)
                header += sock.recv(length - len(header) if length else len(arrived))
                if len(header) == length:
                    return header
        except ProxyHeaderError:
            raise
        except OSError as error:
            raise ProxyHeaderError("header_missing", f"before the end of its header: {reason(error)}") from None

    def _late(self) -> ProxyHeaderError:
        return ProxyHeaderError("header_late", f"no whole header within {format_duration(self.seconds)}")


def all_networks(rules: Iterable[Rule]) -> Rule:
    """The networks of several tunnels together, as their common port has them."""
    return Rule(tuple(network for rule in rules for network in rule.networks))


def reset(sock: Socket) -> None:
    """Close a refused connection with a reset, so that its proxy does not take it for an empty answer."""
    try:
        reset_on_close(sock, True)
    finally:
        sock.close()


def _endpoint(end: tuple[IPAddress, int]) -> Endpoint:
    """In the kernel's text, which Python takes ten times as long to make of an IPv6 address."""
    address, port = end
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    rest = () if address.version == 4 else (0, 0)
    return Endpoint(family, (socket.inet_ntop(family, address.packed), port, *rest))


def _proxied(ends: Ends, proxy: ReplyAddress) -> ProxiedAddress:
    source, destination = _endpoint(ends.source), _endpoint(ends.destination)
    return ProxiedAddress(source.sockaddr, (), destination=destination.sockaddr, via=proxy)
