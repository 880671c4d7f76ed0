"""systemd's protocol: what it passes to the process at the start, and how the process notifies it.

The variables (sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3), systemd.exec(5)) are removed from the
environment, so that child code does not act on them. `notifier` decides what to send, `net.activation` which address a
passed socket is for. `cli` and `check` call `ServiceManager.take`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import repeat

from nodepass.errors import ConfigError
from nodepass.net.activation import PassedSocket

FIRST_SOCKET = 3  # the descriptor of the first passed socket (SD_LISTEN_FDS_START)
LONGEST_STATUS = 1000  # bytes; systemd ignores messages of more than 4096
SEND_WITHIN = 1.0  # seconds for systemd to take a message


@dataclass(frozen=True)
class ServiceManager:
    """What systemd passed to this process; without systemd everything is empty."""

    address: str = ""  # where to send notifications; empty: send none
    watchdog: float = 0.0  # seconds without a ping after which systemd kills the process; 0: never
    sockets: tuple[PassedSocket, ...] = ()
    runtime_directory: str = ""  # of this service alone, removed when it stops; empty: there is none
    state_directory: str = ""  # of this service alone, which is kept; empty: there is none

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> ServiceManager:
        """Read systemd's variables and remove them from the environment. Raises ConfigError."""
        address = environ.pop("NOTIFY_SOCKET", "")
        if address and (address[0] not in "/@" or len(address) == 1):
            allowed = "an absolute path, or an abstract name that begins with @"
            raise ConfigError(f"NOTIFY_SOCKET: {address!r} is not usable; allowed: {allowed}")
        directories = [environ.pop(f"{each}_DIRECTORY", "").partition(":")[0] for each in ("RUNTIME", "STATE")]
        return cls(address, _take_watchdog(environ), _take_sockets(environ), *directories)

    def notify(self, *lines: str) -> None:
        """Send assignments such as `READY=1`, if systemd wants them. Raises OSError."""
        if not self.address or not lines:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(SEND_WITHIN)
            # Only for a connected socket does the kernel signal when a full queue has room again.
            sock.connect("\0" + self.address[1:] if self.address[0] == "@" else self.address)
            sock.send("\n".join(lines).encode())


def status(text: str) -> str:
    """The assignment of a status line, cut to what systemd accepts."""
    encoded = " ".join(text.split()).encode(errors="backslashreplace")
    if len(encoded) > LONGEST_STATUS:
        return f"STATUS={encoded[:LONGEST_STATUS].decode(errors='ignore')}…"
    return f"STATUS={encoded.decode()}"


def reloading() -> tuple[str, str]:
    """The assignments that begin a reload; Type=notify-reload (systemd 253) needs its time."""
    return "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"


def extend_timeout(seconds: float) -> str:
    """The assignment that allows so many seconds, from now, for the current start or stop."""
    return f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}"


def _take_watchdog(environ: MutableMapping[str, str]) -> float:
    period, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not period or not _is_meant(pid, "WATCHDOG_PID"):
        return 0.0
    return _number("WATCHDOG_USEC", period, 1) / 1e6


def _take_sockets(environ: MutableMapping[str, str]) -> tuple[PassedSocket, ...]:
    pid, count, names = (environ.pop(f"LISTEN_{each}", "") for each in ("PID", "FDS", "FDNAMES"))
    if not pid or not count or not _is_meant(pid, "LISTEN_PID"):
        return ()
    named = names.split(":") if names else []
    number = _number("LISTEN_FDS", count, 0)
    if named and len(named) != number:
        raise ConfigError(f"LISTEN_FDNAMES: {names!r} does not match LISTEN_FDS={count}; allowed: one name for each")
    descriptors = range(FIRST_SOCKET, FIRST_SOCKET + number)  # a huge number fails at the first missing one
    named_as = named or repeat("unknown")  # as sd_listen_fds_with_names(3) calls it
    return tuple(_passed(name, descriptor) for descriptor, name in zip(descriptors, named_as, strict=False))


def _passed(name: str, descriptor: int) -> PassedSocket:
    try:
        os.set_inheritable(descriptor, False)
        return PassedSocket(name, socket.socket(fileno=descriptor))
    except OSError as error:
        what = f"LISTEN_FDS: descriptor {descriptor} ({name}) is not usable: {error.strerror}"
        raise ConfigError(f"{what}; allowed: sockets") from None


def _is_meant(pid: str, variable: str) -> bool:
    """Whether the variables are for this process; without a process id they are for any."""
    return not pid or _number(variable, pid, 1) == os.getpid()


def _number(variable: str, text: str, lowest: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20) or int(text) < lowest:  # systemd's are of 64 bits
        raise ConfigError(f"{variable}: {text!r} is not usable; allowed: a whole number from {lowest} on")
    return int(text)
