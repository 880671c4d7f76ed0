"""Whether an address can be listened on, and who has it where it cannot: for `check`."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack

from nodepass.errors import ListenError
from nodepass.net.listen import close_all
from nodepass.net.sockets import resolve
from nodepass.net.unix import UnixListener, is_living
from nodepass.tools import procnet
from nodepass.tools.report import Report
from nodepass.urls import Address


def try_to_listen(
    report: Report,
    held: ExitStack,
    where: str,
    what: str,
    address: Address,
    listen: Callable[[], list[socket.socket]],
    kind: int = socket.SOCK_STREAM,
) -> None:
    """Listen until `held` is closed, and say how it went."""
    try:
        sockets = listen()
    except ListenError as error:
        cause = error.__context__
        number = cause.errno if isinstance(cause, OSError) else None
        # The kernel asks for the privilege before it looks whether the port is taken.
        if number not in (errno.EADDRINUSE, errno.EACCES) or not _explain(report, where, what, address, kind):
            hint = "; ports under 1024 need a privilege or a socket unit" if number == errno.EACCES else ""
            report.fail(where, f"{error}{hint}")
        return
    held.callback(close_all, sockets)
    report.ok(where, f"{what} {address}: can be listened on")


def _explain(report: Report, where: str, what: str, address: Address, kind: int) -> bool:
    """Say who holds the port; False where nobody does."""
    hosts = [str(each.sockaddr[0]) for each in resolve(address)] if address.host else []
    holders = procnet.holders(kind, hosts, address.port)
    if holders is None:
        return False
    text = f"{what} {address}: in use"
    strangers = [each for each in holders if not (each.is_nodepass or each.is_systemd)]
    if any(each.pid == os.getpid() for each in holders):
        report.fail(where, f"{text} by another address of this command")
    elif strangers:
        report.fail(where, f"{text} by {strangers[0]}")
    elif holders:
        running = [each for each in holders if each.is_nodepass]  # it shares a socket unit's ports with systemd
        who = "a running nodepass" if running else "systemd"
        report.warn(where, f"{text} by {who} ({(running or holders)[0]}): expected where this tunnel is set up")
    else:
        report.warn(where, f"{text}, by whom cannot be seen: expected where this tunnel or its socket unit runs")
    return True


def try_unix(report: Report, what: str, path: str) -> None:
    """Listen on a Unix socket for a moment, unless somebody does already, and say how it went."""
    if is_living(path):
        report.warn("metrics", f"{what} unix:{path}: somebody listens there: expected where this tunnel is set up")
        return
    try:
        UnixListener(path, what).close()
    except ListenError as error:
        report.fail("metrics", str(error))
    else:
        report.ok("metrics", f"{what} unix:{path}: can be listened on")
