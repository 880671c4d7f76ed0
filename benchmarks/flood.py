"""One bulk stream as a process of its own, for the scene that looks at others beside it: `python -m benchmarks.flood`.

It writes zeros as fast as it can, which the echo swallows, until it is ended.
"""

from __future__ import annotations

import socket
import sys

from benchmarks.processes import LOOPBACK

BLOCK = bytes(256 * 1024)


def flood(port: int) -> None:
    """Keep one connection busy until the other end closes it."""
    with socket.create_connection((LOOPBACK, port)) as stream:
        while True:
            stream.sendall(BLOCK)


if __name__ == "__main__":
    flood(int(sys.argv[1]))
