"""A line between two network namespaces on which every packet is late: `python -m tests.support.delay_line`.

Each end is a TUN device. A process of its own reads what one of them sends and writes it to the other one some time
later, in order; nothing is lost. Loopback hides everything that takes a round trip, and not every kernel has netem.
"""

from __future__ import annotations

import collections
import fcntl
import os
import select
import struct
import subprocess
import sys
import time

from tests.support import v2_network
from tests.support.process import REPOSITORY
from tests.support.v2_network import CABLE, CLIENT, SERVER, Namespace, Network

DEVICE = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET = 65536
"""Bytes of the largest packet."""

QUEUE = 10_000
"""Packets that a device keeps for the process."""


def why_not() -> str:
    """Why there can be no such line here; empty where there can."""
    if reason := v2_network.why_not():
        return reason
    try:
        os.close(open_device())
    except OSError as error:
        return f"no TUN devices here: {error}"
    return ""


def open_device() -> int:
    """A new TUN device in this thread's namespace; it goes when this descriptor is closed."""
    device = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", CABLE.encode(), IFF_TUN | IFF_NO_PI))
    except OSError:
        os.close(device)
        raise
    return device


class DelayLine(Network):
    """A server's and a client's namespace with such a line between them; a context manager."""

    def __init__(self, round_trip: float) -> None:
        """round_trip: in seconds."""
        self._delay = round_trip / 2

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        super().close()

    def _plug_in(self) -> None:
        devices = [_plug_in(self.server, SERVER), _plug_in(self.client, CLIENT)]
        command = [
            "nice",
            "-n",
            "-10",
            sys.executable,
            "-m",
            "tests.support.delay_line",
            str(self._delay),
            *map(str, devices),
        ]
        self._process = subprocess.Popen(command, cwd=REPOSITORY, pass_fds=devices)
        for device in devices:
            os.close(device)


def _plug_in(namespace: Namespace, address: str) -> int:
    device = namespace.inside(open_device)
    namespace.ip("address", "add", f"{address}/24", "dev", CABLE)
    namespace.ip("link", "set", CABLE, "txqueuelen", str(QUEUE), "up")
    return device


def carry(delay: float, one: int, other: int) -> None:
    """Carry packets both ways, without end."""
    under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for device in select.select([one, other], [], [], wait)[0]:
            under_way.append((time.monotonic() + delay, other if device == one else one, os.read(device, PACKET)))
        while under_way and under_way[0][0] <= time.monotonic():
            _, device, packet = under_way.popleft()
            os.write(device, packet)


if __name__ == "__main__":
    carry(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
