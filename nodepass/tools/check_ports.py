"""The part of `nodepass --check` about ports: whether an address can be listened on, and which process holds it if not.

The kernel's tables of sockets (proc(5), /proc/self/net) say which socket has a port, /proc/PID/fd which process has the
socket, as far as this user may see. `check_client` uses the tables to find a running client.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from nodepass.config.kinds import Owner
from nodepass.config.urls import Address, ClientURL, ServerURL, parse_url
from nodepass.errors import ConfigError, ListenError
from nodepass.net.listen import close_all
from nodepass.net.sockets import Endpoint, plain_host, resolve
from nodepass.net.unix import MODE, PROCESS, UnixListener, is_living
from nodepass.tools.report import Report

RUN = "/run/"  # where systemd makes runtime directories
# States in /proc/self/net; the last is that of a bound UDP socket.
_ESTABLISHED, _LISTEN, _UNCONNECTED = "01", "0A", "07"
_LOCAL, _REMOTE, _STATE, _INODE = 1, 2, 3, 9  # columns
_WILDCARDS = ("0.0.0.0", "::")
_TABLES: dict[int, tuple[tuple[str, int], ...]] = {
    socket.SOCK_STREAM: (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)),
    socket.SOCK_DGRAM: (("udp", socket.AF_INET), ("udp6", socket.AF_INET6)),
}

_SocketAddress = tuple[str, int]  # an IPv4-mapped host is written as IPv4


def try_to_listen(
    report: Report,
    held: ExitStack,
    urls: Sequence[ServerURL | ClientURL],
    where: str,
    what: str,
    address: Address,
    listen: Callable[[], list[socket.socket]],
) -> None:
    """Listen until `held` is closed, and report the result; `urls`: all of this command."""
    try:
        sockets = listen()
    except ListenError as error:
        holders = _holders_of(error)
        if holders is None:
            report.fail(where, str(error))
        else:
            _report_use(report, where, f"{what} {address}: in use", holders, urls)
        return
    held.callback(close_all, sockets)
    report.ok(where, f"{what} {address}: can be listened on")


def name_holder(error: ListenError) -> str:
    """For the end of the error's line: which process has the port; "" where none has it."""
    holders = _holders_of(error)
    if holders is None:
        return ""
    return f"; in use by {holders[0]}" if holders else "; the process that has it belongs to another user"


def _holders_of(error: ListenError) -> list[Holder] | None:
    """The visible processes that hold the port of this error; None if none holds it."""
    # The kernel checks the privilege before it checks whether the port is in use.
    if not error.port or error.errno not in (errno.EADDRINUSE, errno.EACCES):
        return None
    hosts = [str(each.sockaddr[0]) for each in resolve(Address(error.host, error.port))] if error.host else []
    return find_holders(error.kind, hosts, error.port)


def _report_use(
    report: Report, where: str, text: str, holders: Sequence[Holder], urls: Sequence[ServerURL | ClientURL]
) -> None:
    """Report which process holds a port: the service that is checked may run already, another one is in the way."""
    foreign = [each for each in holders if not (each.is_nodepass or each.is_systemd)]
    running = [each for each in holders if each.is_nodepass]  # systemd holds a socket unit's ports as well
    if any(each.pid == os.getpid() for each in holders):
        report.fail(where, f"{text} by another address of this command")
    elif foreign:
        report.fail(where, f"{text} by {foreign[0]}")
    elif running and not running[0].may_serve(urls):
        report.fail(where, f"{text} by a running nodepass ({running[0]}), which has another URL")
    elif holders:
        name = "a running nodepass" if running else "systemd"
        report.warn(where, f"{text} by {name} ({(running or holders)[0]}): expected if it runs this tunnel")
    else:
        words = "by a process that cannot be seen: expected if this tunnel or its socket unit is running"
        report.warn(where, f"{text} {words}")


def try_unix(report: Report, subject: str, what: str, path: str, mode: int = MODE, owner: Owner = PROCESS) -> None:
    """Listen on a Unix socket for a moment, unless a process already does, and report the result."""
    if is_living(path):
        report.warn(subject, f"{what} unix:{path}: a process listens there: expected if it runs this tunnel")
        return
    try:
        UnixListener(path, what, mode, owner).close()
    except ListenError as error:
        directory = os.path.dirname(path)
        if directory.startswith(RUN) and not os.path.exists(directory):
            words = f"{directory} does not exist; expected if the unit's RuntimeDirectory= makes it"
            report.warn(subject, f"{what} unix:{path}: {words}")
        else:
            report.fail(subject, str(error))
    else:
        report.ok(subject, f"{what} unix:{path}: can be listened on")


@dataclass(frozen=True)
class Holder:
    """A process that has a socket open."""

    pid: int
    command: list[str]
    url_variable: str = ""  # its NODEPASS_URL, where that can be seen

    @property
    def is_nodepass(self) -> bool:
        """Whether it is this program, by its command line: `nodepass …`, `python …/nodepass …` or `-m nodepass`."""
        return "nodepass" in map(os.path.basename, self.command[:4])

    @property
    def is_systemd(self) -> bool:
        """Whether it is systemd, which passes sockets to units."""
        return self.pid == 1 or os.path.basename(self.command[0]) == "systemd"

    def may_serve(self, urls: Iterable[ServerURL | ClientURL]) -> bool:
        """Whether one of its URLs is one of these, apart from settings; also where its URLs cannot be seen."""
        texts = [each for each in self.command if "://" in each] or self.url_variable.split()
        return not texts or any(_is_same(text, url) for text in texts for url in urls)

    def __str__(self) -> str:
        return f"{os.path.basename(self.command[0])}, process {self.pid}"


def _is_same(text: str, url: ServerURL | ClientURL) -> bool:
    """Whether a URL's text is that of this tunnel: its role, its addresses, its name."""
    try:
        other = parse_url(text)
    except ConfigError:
        return False
    mine, theirs = ((type(each), each.tunnel, each.targets, each.tunnel_name) for each in (url, other))
    return mine == theirs


def is_connected(endpoints: Iterable[Endpoint]) -> bool:
    """Whether a process of this machine has a TCP connection to one of these."""
    wanted = {(plain_host(each.sockaddr), each.sockaddr[1]) for each in endpoints}
    return any(row.state == _ESTABLISHED and row.remote in wanted for row in _rows(socket.SOCK_STREAM))


def find_holders(kind: int, hosts: Iterable[str], port: int) -> list[Holder] | None:
    """The processes that hold a port on one of these hosts (none: on any), as far as visible; None if none does."""
    state = _LISTEN if kind == socket.SOCK_STREAM else _UNCONNECTED
    wanted = set(hosts)
    inodes = {
        row.inode
        for row in _rows(kind)
        if row.state == state and row.local[1] == port and (not wanted or row.local[0] in {*wanted, *_WILDCARDS})
    }
    return list(_with_sockets(inodes)) if inodes else None


@dataclass(frozen=True)
class _Row:
    local: _SocketAddress
    remote: _SocketAddress
    state: str
    inode: str


def _rows(kind: int) -> Iterator[_Row]:
    for table, family in _TABLES[kind]:
        with contextlib.suppress(OSError), open(f"/proc/self/net/{table}") as file:
            next(file)
            for line in file:
                columns = line.split()
                yield _Row(
                    _address(family, columns[_LOCAL]),
                    _address(family, columns[_REMOTE]),
                    columns[_STATE],
                    columns[_INODE],
                )


def _address(family: int, text: str) -> _SocketAddress:
    """Parse an address of the kernel's tables: words of 32 bits in the machine's byte order, and a port."""
    host, port = text.split(":")
    words = (int(host[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(host), 8))
    return plain_host((socket.inet_ntop(family, b"".join(words)),)), int(port, 16)


def _with_sockets(inodes: set[str]) -> Iterator[Holder]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # another user's process, or gone
            folder = f"/proc/{pid}/fd"
            if any(_link(f"{folder}/{name}") in wanted for name in os.listdir(folder)):
                yield Holder(int(pid), _strings(pid, "cmdline"), _variable(pid, "NODEPASS_URL"))


def _strings(pid: str, file: str) -> list[str]:
    with open(f"/proc/{pid}/{file}", errors="replace") as opened:
        return opened.read().rstrip("\0").split("\0")


def _variable(pid: str, name: str) -> str:
    with contextlib.suppress(OSError):
        return next((text.partition("=")[2] for text in _strings(pid, "environ") if text.startswith(f"{name}=")), "")
    return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
