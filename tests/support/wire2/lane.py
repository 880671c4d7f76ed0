"""Lanes of wire v2: frames on a data connection, and the client's side of a lane."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

from tests.support.sockets import Address, abort
from tests.support.v1_stream import Stream, receive_exactly
from tests.support.workers import WorkerPool

LANE = 3
"""The kind of a launch that opens a lane."""

LARGEST = 65507
"""Bytes of the largest datagram that UDP over IPv4 has."""

ANNOUNCEMENT = 0xFFFF
"""The length of a frame that is no datagram: a flow's addresses follow."""

_HEADER = struct.Struct(">IH")
_SIZE = struct.Struct(">H")


def make_frame(flow: int, payload: bytes) -> bytes:
    """One datagram of a flow as it stands on a lane."""
    return _HEADER.pack(flow, len(payload)) + payload


def make_announcement(flow: int, text: str) -> bytes:
    """The addresses of a flow as they stand on a lane."""
    data = text.encode()
    return _HEADER.pack(flow, ANNOUNCEMENT) + _SIZE.pack(len(data)) + data


class Lane:
    """One end of a lane: any thread may send, one receives. `announced` has the addresses of flows."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.announced: dict[int, str] = {}
        self._sending = threading.Lock()

    def send(self, flow: int, payload: bytes) -> None:
        """Write one datagram."""
        self.write(make_frame(flow, payload))

    def write(self, frames: bytes) -> None:
        """Write bytes as they are."""
        with self._sending:
            self.stream.send(frames)

    def receive(self) -> tuple[int, bytes]:
        """The flow and the payload of the next datagram; ConnectionError at the end of the lane."""
        while True:
            flow, length = _HEADER.unpack(receive_exactly(self.stream, _HEADER.size))
            if length != ANNOUNCEMENT:
                return flow, receive_exactly(self.stream, length)
            (size,) = _SIZE.unpack(receive_exactly(self.stream, _SIZE.size))
            assert flow not in self.announced, "a flow is announced once, before its first datagram"
            self.announced[flow] = receive_exactly(self.stream, size).decode()


class TargetFlows:
    """The client's side of one lane: a UDP socket, connected to the target, and a thread for every flow."""

    def __init__(self, lane: Lane, target: Address, timeout: float, workers: WorkerPool) -> None:
        """timeout: seconds without traffic after which a flow ends."""
        self._lane = lane
        self._target = target
        self._timeout = timeout
        self._workers = workers
        self._sockets: dict[int, socket.socket] = {}
        self._used: dict[int, float] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Pass datagrams on until the lane ends."""
        try:
            while True:
                flow, payload = self._lane.receive()
                with contextlib.suppress(ConnectionRefusedError):  # about an earlier datagram
                    self._open(flow).send(payload)
        finally:
            with self._lock:
                for sock in self._sockets.values():
                    abort(sock)

    def _open(self, flow: int) -> socket.socket:
        with self._lock:
            self._used[flow] = time.monotonic()
            if flow not in self._sockets:
                sock = self._workers.own(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                sock.connect(self._target)
                sock.settimeout(self._timeout)
                self._sockets[flow] = sock
                self._workers.spawn(lambda: self._answer(flow, sock))
            return self._sockets[flow]

    def _answer(self, flow: int, sock: socket.socket) -> None:
        while not self._has_ended(flow):
            try:
                payload = sock.recv(LARGEST)
            except (TimeoutError, ConnectionRefusedError):
                continue
            self._used[flow] = time.monotonic()
            if not payload and self._workers.is_closed:
                return
            self._lane.send(flow, payload)

    def _has_ended(self, flow: int) -> bool:
        with self._lock:
            if not self._workers.is_closed and time.monotonic() - self._used[flow] < self._timeout:
                return False
            abort(self._sockets.pop(flow))
            return True
