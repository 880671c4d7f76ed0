"""`python -m nodepass.metrics.healthcheck`: asks the process beside it whether it is well; a container's health check.

It asks METRICS_LISTEN's /healthz and exits 0 at a 200, else 1 with one line that says why. Standard library only, and
nothing of the package: it is started every few seconds.
"""

from __future__ import annotations

import os
import socket
import sys

TIMEOUT = 4.0  # seconds: a process that needs longer for this is not well
_LOOPBACK = {"": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}


def connect(listen: str) -> socket.socket:
    """A connection to `host:port`, `[IPv6]:port`, `:port` or `unix:/path`. Raises OSError, ValueError."""
    if listen.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(listen.removeprefix("unix:"))
        return sock
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    return socket.create_connection((_LOOPBACK.get(host, host), int(port)), TIMEOUT)


def ask(listen: str) -> str:
    """The status line of the answer. Raises OSError, ValueError."""
    with connect(listen) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
        with sock.makefile("rb") as answer:
            return answer.readline(200).decode("latin-1").strip()


def main() -> int:
    """The exit status."""
    listen = os.environ.get("METRICS_LISTEN", "off")
    if listen == "off":
        sys.stderr.write("METRICS_LISTEN is off: there is nothing to ask\n")
        return 1
    try:
        status = ask(listen)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"METRICS_LISTEN={listen}: {error}\n")
        return 1
    sys.stdout.write(f"{status}\n")
    return 0 if status.split()[1:2] == ["200"] else 1


if __name__ == "__main__":
    sys.exit(main())
