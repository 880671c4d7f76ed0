"""The new process's end of a handover: what it takes over, and when it may begin.

It is told what the old process has, says when it could serve, and waits until the old one has stopped to accept. What
can fail fails before that, and then the old process goes on. `sender` is the other end; `accession` does what is said
here.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from nodepass.errors import StartError, reason
from nodepass.handover.channel import MALFORMED, OTHER_VERSION, Channel, Message
from nodepass.handover.program import take_descriptor
from nodepass.net.activation import Inherited, PassedSocket
from nodepass.tunnel.interface import LISTENER_ROLES
from nodepass.tunnel.traffic_file import Counts


@dataclass
class Legacy:
    """What the old process passes: its listeners, and by the order of the URLs what its tunnels have."""

    process: int = 0  # its id
    sockets: list[PassedSocket] = field(default_factory=list)
    unix: dict[str, socket.socket] = field(default_factory=dict)  # listeners, by path
    locks: dict[str, int] = field(default_factory=dict)  # descriptors, by the path of the file
    clients: list[str] = field(default_factory=list)  # what each calls itself; "" for a server

    def as_inherited(self) -> Inherited:
        """The listeners, which are found by their address then. Raises ConfigError."""
        return Inherited(self.sockets, LISTENER_ROLES, self.unix, "the process before")


NO_LEGACY = Legacy()


class Takeover:
    """`legacy` is what there is to take.

    Then `wait_to_connect`, `report_ready`, `wait_for_turn`, and `additions` until the other process ends.
    """

    def __init__(self, channel: Channel) -> None:
        """Raises StartError."""
        self._channel = channel
        try:
            channel.send({"process": os.getpid()})
            self.legacy = self._receive()
        except OSError as error:
            raise StartError(f"cannot take over from the process before: {reason(error)}") from None
        except MALFORMED:
            raise StartError(f"cannot take over from the process before: {OTHER_VERSION}") from None

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Takeover | None:
        """None where this process does not take over from another one. Raises StartError."""
        descriptor = take_descriptor(environ)
        if descriptor is None:
            return None
        os.set_inheritable(descriptor, False)
        return cls(Channel(socket.socket(fileno=descriptor)))

    def wait_to_connect(self) -> list[int]:
        """Say that only clients' connections are missing, and return when those may be made. Raises StartError.

        How many servers each tunnel's client is connected to, in the order of the URLs.
        """
        self._say({"prepared": True})
        return [int(each) for each in self._receive_any("connect")["connect"]]

    def report_ready(self) -> None:
        """Say that this process could serve now. Raises StartError."""
        self._say({"ready": True})

    def report_failure(self, text: str) -> None:
        """Say why it never will."""
        with contextlib.suppress(OSError):  # the old process has ended or given up
            self._channel.send({"failed": text})
        self._channel.close()

    def wait_for_turn(self) -> dict[str, Counts]:
        """Return when the old process has stopped to accept. Raises StartError where it goes on instead.

        The counts of traffic, by the file that has them.
        """
        counts: dict[str, Counts] = {}
        while "begin" not in (message := self._receive_any("counts", "begin")):
            counts.update(message["counts"])
        return counts

    def _receive_any(self, *words: str) -> Message:
        try:
            message, _ = self._channel.receive()
        except OSError as error:
            raise StartError(f"the process before goes on: {reason(error)}") from None
        if not any(word in message for word in words):
            raise StartError(f"the process before said something else than {words[-1]}")
        return message

    def additions(self) -> Iterator[dict[str, int]]:
        """What the old process's sessions move, until they have ended: bytes by the file of TRAFFIC_LIMIT."""
        while True:
            try:
                message, _ = self._channel.receive()
            except OSError:
                self._channel.close()
                return
            yield {str(path): int(count) for path, count in message.get("traffic", {}).items()}

    def _say(self, message: dict[str, object]) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise StartError(f"the process before goes on: {reason(error)}") from None

    def _receive(self) -> Legacy:
        legacy = Legacy()
        while True:
            message, descriptors = self._channel.receive()
            if "legacy" in message:
                legacy.process, legacy.clients = message["legacy"]["process"], message["legacy"]["clients"]
                return legacy
            for item, descriptor in zip(message["items"], descriptors, strict=True):
                _add(legacy, item, descriptor)


def _add(legacy: Legacy, item: dict[str, Any], descriptor: int) -> None:
    """Keep a descriptor as what it is."""
    if "lock" in item:
        legacy.locks[item["lock"]] = descriptor
        return
    sock = socket.socket(fileno=descriptor)
    if sock.family == socket.AF_UNIX:
        legacy.unix[sock.getsockname()] = sock
    else:
        legacy.sockets.append(PassedSocket(item["role"], sock))
