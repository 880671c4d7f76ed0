"""Sockets that systemd opened and passed: which of them is meant by which address of a URL.

They belong to systemd, which keeps them open while the process restarts, so that whoever connects meanwhile waits in
the kernel's queue. What is given out here is a duplicate, for its taker to close; the original stays for a tunnel that
starts anew. How sockets are used is the business of `listen`, which asks; `cli` makes the one collection.
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nodepass.errors import ConfigError
from nodepass.net.sockets import Endpoint, format_sockaddr, plain_host
from nodepass.urls import Address

TUNNEL, DATA, TARGET = ROLES = ("tunnel", "data", "target")
KINDS: dict[int, str] = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}


@dataclass(frozen=True)
class PassedSocket:
    """A socket that systemd opened, under the name that FileDescriptorName= gave it; else that is its unit's."""

    name: str
    sock: socket.socket


class Inherited:
    """The sockets that were passed to the process, none where there is no socket unit."""

    def __init__(self, sockets: Sequence[PassedSocket] = ()) -> None:
        self._sockets = sockets
        self._owners: dict[PassedSocket, Owner] = {}
        for each in sockets:
            _check(each)

    def share(self) -> Share:
        """What one tunnel may take from; what it has taken once is for it alone, also when it starts anew."""
        return Share(self._sockets, self._owners)

    def refuse_unused(self) -> None:
        """Raise ConfigError where a socket fits no URL: whoever connects to it would wait for ever."""
        if unused := _unused(self._sockets, self._owners):
            allowed = "the tunnel, data and target addresses of the server URLs"
            raise ConfigError(f"systemd passed {unused}, which fits no URL; allowed: {allowed}")


class Share:
    """One tunnel's way to the sockets; by itself it has none to give."""

    def __init__(self, sockets: Sequence[PassedSocket] = (), owners: dict[PassedSocket, Owner] | None = None) -> None:
        self._sockets = sockets
        self._owners = {} if owners is None else owners

    def ports(self, role: str, kind: int) -> set[int]:
        """The ports on which something was passed for a role."""
        return {_port(each) for each in self._sockets if _may_be(each, role, kind)}

    def take(self, role: str, kind: int, address: Address, endpoints: Sequence[Endpoint]) -> list[socket.socket]:
        """Duplicates of the sockets of a kind that are bound to an address, whose endpoints these are.

        An address without a host takes whatever listens on its port. Port 0 takes the port of the first socket that is
        named after the role. A socket that is named after another role is left alone.
        """
        fitting: list[PassedSocket] = []
        port, me = address.port, (self, role)
        for each in self._sockets:
            if self._owners.get(each, me) != me or not _may_be(each, role, kind):
                continue
            if not port and each.name == role:
                port = _port(each)
            at_host = not address.host or any(_is_at(each.sock, endpoint) for endpoint in endpoints)
            if port and _port(each) == port and at_host:
                fitting.append(each)
        self._owners.update(dict.fromkeys(fitting, me))
        return [each.sock.dup() for each in fitting]

    def hint(self) -> str:
        """For the end of a line about an address that nothing can listen on: what was passed in vain."""
        unused = _unused(self._sockets, self._owners)
        return f"; systemd passed {unused}, which is not that address" if unused else ""


Owner = tuple[Share, str]  # and for which role
NOTHING = Share()  # for who cannot be passed anything


def missing_endpoints(
    address: Address, endpoints: Sequence[Endpoint], taken: Sequence[socket.socket]
) -> list[Endpoint]:
    """The endpoints of an address that the sockets taken for it leave to be opened."""
    if not address.host:
        return [] if taken else list(endpoints)
    return [each for each in endpoints if not any(_is_at(sock, each) for sock in taken)]


def _may_be(passed: PassedSocket, role: str, kind: int) -> bool:
    return passed.sock.type == kind and (passed.name == role or passed.name not in ROLES)


def _unused(sockets: Sequence[PassedSocket], owners: Collection[PassedSocket]) -> str:
    return ", ".join(_describe(each) for each in sockets if each not in owners)


def _check(passed: PassedSocket) -> None:
    sock = passed.sock
    listens = sock.type == socket.SOCK_DGRAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type not in KINDS or not listens:
        allowed = "TCP sockets that listen (Accept=no) and UDP sockets"
        raise ConfigError(f"systemd passed {_describe(passed)}, which is not usable; allowed: {allowed}")


def _describe(passed: PassedSocket) -> str:
    sock = passed.sock
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type in KINDS:
        return f"{format_sockaddr(sock.getsockname())} ({KINDS[sock.type]}, {passed.name})"
    return f"{sock.getsockname()!r} ({sock.family.name}, {passed.name})"


def _port(passed: PassedSocket) -> int:
    return int(passed.sock.getsockname()[1])


def _is_at(sock: socket.socket, endpoint: Endpoint) -> bool:
    """Whether it is bound to this very host: a socket of all addresses is not for a URL that names one."""
    return sock.family == endpoint.family and plain_host(sock.getsockname()) == plain_host(endpoint.sockaddr)
