"""Sockets that were passed to the process: which of them belongs to which address.

systemd opened them, or the process from which this one takes over. systemd keeps its own open while the process
restarts, so that connections made meanwhile wait in the kernel's queue. What is given out is a duplicate, which its
taker closes; the original stays for the next start of a tunnel.
`listen` asks for them and knows how a socket is used. `daemon` and `check` make the one collection of their process and
name the roles, which are plain names here: a unit may name a socket after a role (FileDescriptorName=).
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from nodepass.config.urls import Address
from nodepass.errors import ConfigError
from nodepass.net.sockets import Endpoint, format_sockaddr, plain_host

KINDS: dict[int, str] = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}
NO_UNIX: Mapping[str, socket.socket] = {}


@dataclass(frozen=True)
class PassedSocket:
    """A passed socket, and its name: that of FileDescriptorName=, or else of its unit; or its role."""

    name: str
    sock: socket.socket


class Inherited:
    """The sockets passed to the process, none where there is no socket unit."""

    def __init__(
        self,
        sockets: Sequence[PassedSocket] = (),
        roles: Collection[str] = (),
        unix: Mapping[str, socket.socket] = NO_UNIX,
        source: str = "systemd",
    ) -> None:
        """`roles`: the names that reserve a socket for one role; `unix`: Unix listeners by path; `source`: whose.

        Raises ConfigError where a socket is not usable.
        """
        self.source = source
        self.unix = unix
        self._sockets = sockets
        self._roles = roles
        self._owners: dict[PassedSocket, Owner] = {}
        for each in sockets:
            self._check(each)

    def share(self) -> Share:
        """A new share. A socket that one share has taken is not given to another one."""
        return Share(self)

    def unused(self) -> str:
        """The sockets that no share has taken, for the user; empty where there are none."""
        return ", ".join(_describe(each) for each in self._sockets if each not in self._owners)

    def close(self) -> None:
        """Close the originals: another process listens from now on, and none must when it has ended."""
        for sock in (*(each.sock for each in self._sockets), *self.unix.values()):
            sock.close()

    def _check(self, passed: PassedSocket) -> None:
        sock = passed.sock
        listens = sock.type == socket.SOCK_DGRAM or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type not in KINDS or not listens:
            allowed = "TCP sockets that listen (Accept=no) and UDP sockets"
            raise ConfigError(f"{self.source} passed {_describe(passed)}, which is not usable; allowed: {allowed}")

    def candidates(self, owner: Owner, role: str, kind: int) -> list[PassedSocket]:
        """Sockets of a kind that the owner may take: its own and free ones that are not named after another role."""
        return [
            each
            for each in self._sockets
            if each.sock.type == kind
            and (each.name == role or each.name not in self._roles)
            and self._owners.get(each, owner) == owner
        ]

    def assign(self, sockets: Sequence[PassedSocket], owner: Owner) -> None:
        """Have these sockets belong to an owner from now on."""
        self._owners.update(dict.fromkeys(sockets, owner))


class Share:
    """The passed sockets of one tunnel, which stay its own when it starts again."""

    def __init__(self, inherited: Inherited, tunnel: object = None, role: str = "") -> None:
        self._inherited = inherited
        self._tunnel = tunnel or self
        self._role = role

    def of(self, role: str) -> Share:
        """The same tunnel's sockets for one role."""
        return Share(self._inherited, self._tunnel, role)

    def ports(self, kind: int) -> set[int]:
        """The ports of the sockets of a kind that could be taken."""
        return {_port(each) for each in self._candidates(kind)}

    def take(self, kind: int, address: Address, endpoints: Sequence[Endpoint]) -> list[socket.socket]:
        """Take the sockets of a kind that are bound to an address; `endpoints` are those of the address.

        An address without a host takes every socket on its port. Port 0 takes the port of the first socket that is
        named after the role. Returns duplicates.
        """
        fitting: list[PassedSocket] = []
        port = address.port
        for each in self._candidates(kind):
            if not port and each.name == self._role:
                port = _port(each)
            at_host = not address.host or any(_is_at(each.sock, endpoint) for endpoint in endpoints)
            if port and _port(each) == port and at_host:
                fitting.append(each)
        self._inherited.assign(fitting, self._owner)
        return [each.sock.dup() for each in fitting]

    def hint(self) -> str:
        """For the end of an error about an address that nothing can listen on: the sockets that are left over."""
        unused = self._inherited.unused()
        return f"; {self._inherited.source} passed {unused}, which is not that address" if unused else ""

    def take_unix(self, path: str) -> socket.socket | None:
        """A duplicate of the listener at a path, which its taker closes; None where none was passed."""
        sock = self._inherited.unix.get(path)
        return sock.dup() if sock else None

    @property
    def _owner(self) -> Owner:
        return self._tunnel, self._role

    def _candidates(self, kind: int) -> list[PassedSocket]:
        return self._inherited.candidates(self._owner, self._role, kind)


Owner = tuple[object, str]  # a tunnel and a role
NOTHING = Inherited().share()  # where no sockets are passed


def missing_endpoints(
    address: Address, endpoints: Sequence[Endpoint], taken: Sequence[socket.socket]
) -> list[Endpoint]:
    """The endpoints of an address that the sockets taken for it leave to open."""
    if not address.host:
        return [] if taken else list(endpoints)
    return [each for each in endpoints if not any(_is_at(sock, each) for sock in taken)]


def _describe(passed: PassedSocket) -> str:
    sock = passed.sock
    if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type in KINDS:
        return f"{format_sockaddr(sock.getsockname())} ({KINDS[sock.type]}, {passed.name})"
    return f"{sock.getsockname()!r} ({sock.family.name}, {passed.name})"


def _port(passed: PassedSocket) -> int:
    return int(passed.sock.getsockname()[1])


def _is_at(sock: socket.socket, endpoint: Endpoint) -> bool:
    """Whether a socket is bound to this very host: one that is bound to all hosts is not for a URL that names one."""
    return sock.family == endpoint.family and plain_host(sock.getsockname()) == plain_host(endpoint.sockaddr)
