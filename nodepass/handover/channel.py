"""What two processes say to each other while one takes over from the other: messages, and descriptors with them.

A message is one packet with a JSON object. Both ends belong to one user and one program, perhaps of two versions: a
message that cannot be read ends the handover. `sender` and `receiver` know what is said.
"""

from __future__ import annotations

import array
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from nodepass.errors import ClosedError, ProtocolError

LARGEST = 128 * 1024  # bytes of a message
MOST_DESCRIPTORS = 200  # with one message; the kernel takes 253

Message = dict[str, Any]
MALFORMED = (AttributeError, KeyError, TypeError, ValueError)  # what reading a message raises that means something else
OTHER_VERSION = "it is a version of the program with other messages"


def make_pair() -> tuple[Channel, socket.socket]:
    """One end as a channel, and the other one for a new process."""
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(mine), its


class Channel:
    """One end. All errors are OSError."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def send(self, message: Mapping[str, object], descriptors: Sequence[int] = ()) -> None:
        """Send a message, and duplicates of at most MOST_DESCRIPTORS descriptors with it."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self._sock.sendmsg([json.dumps(message).encode()], ancillary)

    def receive(self) -> tuple[Message, list[int]]:
        """The next message, and the descriptors that came with it, which are the caller's."""
        space = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
        data, ancillary, flags, _ = self._sock.recvmsg(LARGEST, space, socket.MSG_CMSG_CLOEXEC)
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % descriptors.itemsize])
        if flags & socket.MSG_CTRUNC:
            raise ProtocolError("too few free descriptors for those that are passed")
        if not data:
            raise ClosedError("it has ended or given up, as the lines before say")
        try:
            message = json.loads(data)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise ProtocolError("the other process sent no message of a handover")
        return message, list(descriptors)

    def close(self) -> None:
        """End it; the other end notices."""
        self._sock.close()
