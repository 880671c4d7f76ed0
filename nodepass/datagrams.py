"""UDP sessions of wire v1: one datagram there, one answer back, on a data connection of their own.

The wire has no length, so a datagram is what one read returns; a large one that arrives in pieces is waited for a
moment. One that is longer than allowed is dropped and said so, never cut.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable

import gevent

from nodepass.config import Settings, format_duration
from nodepass.crew import Crew
from nodepass.errors import NoDataConnection, ProtocolError
from nodepass.listen import Visitor, receive_datagram, send_datagram
from nodepass.log import Log
from nodepass.net import Stream, reason
from nodepass.protocol import UDP
from nodepass.stats import Stats

SPLIT_FROM = 1000  # bytes: a first read of at least so many may be the beginning of a datagram (Go's first TLS records)
REST_WITHIN = 0.005  # seconds for the next piece
DATAGRAMS_PER_TURN = 32  # received in a row, then their sessions get to run
ANSWER_GRACE = 1.0  # seconds beyond UDP_READ_TIMEOUT that the server waits, so that the client's verdict arrives first


def read_datagram(stream: Stream, largest: int, timeout: float) -> bytes:
    """The datagram that a peer wrote; empty where it closed without one.

    Raises TimeoutError after `timeout` seconds, ProtocolError where there are more than `largest` bytes.
    """
    buffer = memoryview(bytearray(largest + 1))
    with gevent.Timeout(timeout, TimeoutError(f"no datagram within {timeout:g}s")):
        size = received = stream.recv_into(buffer)
    while received and SPLIT_FROM <= size <= largest:
        received = 0
        with contextlib.suppress(TimeoutError), gevent.Timeout(REST_WITHIN, TimeoutError()):
            received = stream.recv_into(buffer[size:])
        size += received
    if size > largest:
        raise ProtocolError(f"a datagram of more than {largest} bytes (UDP_DATA_BUF_SIZE)")
    return bytes(buffer[:size])


def ask_target(sock: socket.socket, question: bytes, largest: int, timeout: float) -> bytes:
    """The target's one answer on a connected socket.

    Raises TimeoutError after `timeout` seconds, ConnectionRefusedError where nobody listens, ProtocolError where the
    answer is longer than `largest` bytes.
    """
    sock.settimeout(timeout)
    sock.send(question)
    try:
        answer = sock.recv(largest + 1)
    except TimeoutError:
        raise TimeoutError(f"the target gave no answer within {timeout:g}s") from None
    if len(answer) > largest:
        raise ProtocolError(f"an answer of more than {largest} bytes (UDP_DATA_BUF_SIZE)")
    return answer


class DatagramDoor:
    """The server's end: receives visitors' datagrams on one socket and serves each in a session of its own."""

    def __init__(
        self,
        sock: socket.socket,
        sessions: Crew,
        launch: Callable[[int, float], tuple[str, Stream]],
        settings: Settings,
        log: Log,
        stats: Stats,
    ) -> None:
        self._sock = sock
        self._sessions = sessions
        self._launch = launch
        self._settings = settings
        self._log = log
        self._stats = stats

    def run(self) -> None:
        """Receive until killed. No datagram waits here for another's session."""
        received = 0
        while True:
            try:
                payload, visitor = receive_datagram(self._sock)
            except OSError as error:
                self._log.limited(logging.WARNING, "receive", "cannot receive datagrams: %s", reason(error))
                gevent.sleep(0.01)
                continue
            if self._accepts(payload, visitor):
                self._sessions.spawn("serve datagram", self._serve, payload, visitor)
            received += 1
            if received % DATAGRAMS_PER_TURN == 0:
                gevent.sleep(0)

    def _accepts(self, payload: bytes, visitor: Visitor) -> bool:
        """Whether a datagram can be carried; one that cannot is counted and logged."""
        if not payload:
            because = "it is empty, which wire v1 cannot carry"
        elif len(payload) > self._settings.udp_data_buf_size:
            because = f"it is larger than UDP_DATA_BUF_SIZE ({self._settings.udp_data_buf_size})"
        elif self._sessions.full():
            because = "SEMAPHORE_LIMIT is reached"  # to wait would stall the datagrams of others
        else:
            return True
        self._drop(payload, visitor, because)
        return False

    def _drop(self, payload: bytes, visitor: Visitor, because: str) -> None:
        self._stats.trouble["datagrams_dropped"] += 1
        what = f"a datagram of {len(payload)} bytes from {visitor}"
        self._log.limited(logging.WARNING, f"datagram {because}", "dropped %s: %s", what, because)

    def _serve(self, question: bytes, visitor: Visitor) -> None:
        settings = self._settings
        try:
            id, data = self._launch(UDP, settings.pool_get_timeout)
        except NoDataConnection:
            self._drop(question, visitor, f"no data connection within {format_duration(settings.pool_get_timeout)}")
            return
        log = self._log.session(id)
        log.debug("visitor %s sent %d bytes", visitor, len(question))
        self._stats.udp_sessions += 1
        try:
            data.write(question)
            self._stats.bytes_up += len(question)
            answer = read_datagram(data, settings.udp_data_buf_size, settings.udp_read_timeout + ANSWER_GRACE)
            if answer:
                send_datagram(self._sock, answer, visitor)
                self._stats.bytes_down += len(answer)
            log.debug("answered visitor %s with %d bytes", visitor, len(answer))
        except OSError as error:
            self._stats.trouble["answers_dropped"] += 1
            self._log.limited(logging.WARNING, "answer", "no answer to visitor %s: %s", visitor, reason(error))
        finally:
            data.close()
