"""`python -m nodepass.metrics.healthcheck`: a container's health check of the process beside it.

Requests /healthz at METRICS_LISTEN and exits with 0 on a 200, else with 1 and one line that says why. It starts every
few seconds, so it imports little: the standard library's sockets, and `hostport`, which imports nothing.
"""

from __future__ import annotations

import os
import socket
import sys

from nodepass.config.hostport import split_host_port

TIMEOUT = 4.0  # seconds: a process that needs longer is unhealthy
_LOOPBACK = {"": "localhost", "0.0.0.0": "127.0.0.1", "::": "::1"}


def connect(listen: str) -> socket.socket:
    """Connect to `host:port`, `[IPv6]:port`, `:port` or `unix:/path`. Raises OSError, ValueError."""
    if listen.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(TIMEOUT)
        sock.connect(listen.removeprefix("unix:"))
        return sock
    host, port = split_host_port(listen)
    return socket.create_connection((_LOOPBACK.get(host, host), port), TIMEOUT)


def ask(listen: str) -> str:
    """The status line of the response. Raises OSError, ValueError."""
    with connect(listen) as sock:
        sock.sendall(b"GET /healthz HTTP/1.0\r\nHost: localhost\r\n\r\n")
        with sock.makefile("rb") as answer:
            return answer.readline(200).decode("latin-1").strip()


def main() -> int:
    """The exit status."""
    listen = os.environ.get("METRICS_LISTEN", "").strip() or "off"
    if listen == "off":
        sys.stderr.write("METRICS_LISTEN is off: no endpoint to check\n")
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
