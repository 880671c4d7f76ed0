"""Whether a target is up, and what is done to find out: the health checks, and the watch over one that has failed.

`HealthChecks` has a loop for each target: with HEALTH_CHECK a check every HEALTH_INTERVAL, without it a dial now and
then while a target has failed. What a result means is decided by `target.Health`, and what follows by `targets`.
`nodepass --check` makes the same `HealthCheck`.
"""

from __future__ import annotations

import errno
import re
import time
from contextlib import closing

import gevent

from nodepass.client.target import Target
from nodepass.client.targets import Targets
from nodepass.config.settings import Settings
from nodepass.errors import ClosedError, ProtocolError
from nodepass.net.sockets import Socket
from nodepass.net.stream import TCPStream
from nodepass.tunnel.part import Common, Part
from nodepass.wire.lines import printable
from nodepass.wire.proxy_protocol import ProxyHeaders

RETRY = 1.0  # seconds between dials of a target that has failed, at most
HTTP = "http:"  # in front of a path, in HEALTH_CHECK
LONGEST_STATUS = 512  # bytes of an answer in which its status must be
_STATUS = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r\n]")
_HEALTHY = (b"2", b"3")  # first digits of a status


class HealthCheck:
    """What HEALTH_CHECK does with a new connection to a target."""

    def __init__(self, settings: Settings, name: str) -> None:
        """`name`: of the tunnel."""
        check = settings.health_check
        self._path = check.removeprefix(HTTP) if check.startswith(HTTP) else ""
        # As a check of haproxy has it: with no address, so that no service takes the check for a visitor.
        self._header = ProxyHeaders(settings.proxy_protocol, name).of_connection("", "") if check != "off" else b""

    def run(self, sock: Socket, host: str, timeout: float) -> None:
        """Ask for the path, if there is one, and close. `host` is the target's. Raises OSError."""
        late = TimeoutError(errno.ETIMEDOUT, "no answer to the check in time")
        with closing(TCPStream(sock)) as stream, gevent.Timeout(timeout, late):
            if self._header:
                stream.write(self._header)
            if self._path:
                stream.write(request(self._path, host))
                read_status(stream)


class HealthChecks(Part):
    """The loops that find out which targets are up."""

    def __init__(self, common: Common, targets: Targets, name: str = "") -> None:
        """`name`: of the tunnel."""
        super().__init__(common)
        self._targets = targets
        self._check = HealthCheck(common.settings, name)

    def start(self) -> None:
        settings = self._settings
        if settings.health_check != "off":
            work = self._check_forever
        elif settings.tcp:
            work = self._watch
        else:
            return
        for each in self._targets.all:
            self._start_loop(f"watch the target {each}", work, each)

    def _check_forever(self, target: Target) -> None:
        interval = self._settings.health_interval
        while True:
            began = time.monotonic()
            self._examine(target, min(interval, self._settings.handshake_timeout), "check")
            gevent.sleep(max(0.0, began + interval - time.monotonic()))

    def _watch(self, target: Target) -> None:
        """After a failed dial, dial again at once, and then until it succeeds. Never returns.

        Else only a visitor would find out that the target is back, and an end that is unready may get none.
        """
        pause = min(self._settings.report_interval, RETRY)
        while True:
            target.failed.wait()
            while target.failed.is_set() and not self._examine(target, self._settings.handshake_timeout, "dial"):
                gevent.sleep(pause)

    def _examine(self, target: Target, timeout: float, what: str) -> bool:
        """Check a target once, within `timeout` seconds; whether it is healthy."""
        began = time.monotonic()
        try:
            sock = target.dial(timeout)
            self._check.run(sock, target.host, max(0.001, began + timeout - time.monotonic()))
        except OSError as error:
            self._targets.note_failure(target, error, what)
            return False
        self._targets.note_success(target)
        return True


def request(path: str, host: str) -> bytes:
    """A request of HTTP/1.1, after whose answer the service closes the connection."""
    fields = f"Host: {host}\r\nUser-Agent: nodepass-health-check\r\nConnection: close\r\n"
    return f"GET {path} HTTP/1.1\r\n{fields}\r\n".encode()


def read_status(stream: TCPStream) -> None:
    """Read the status of an answer. Raises OSError unless it is 2xx or 3xx."""
    answer, buffer = b"", memoryview(bytearray(LONGEST_STATUS))
    while len(answer) < LONGEST_STATUS and not _STATUS.match(answer):
        received = stream.recv_into(buffer)
        if not received:
            raise ClosedError("closed without a status of HTTP")
        answer += buffer[:received]
    status = _STATUS.match(answer)
    if not status:
        raise ProtocolError(f"not an answer of HTTP/1.1: {printable(answer[:40])}")
    if status[1][:1] not in _HEALTHY:
        raise ProtocolError(f"HTTP status {status[1].decode()}")
