"""A man in the middle between a server and a client of ours, which does with each connection what a test says.

It is reached at 127.0.0.2 on the ports that the server has at 127.0.0.1, like an attacker that has taken over the
server's address. An error on its side ends that connection and nothing else.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TypeVar

from OpenSSL import SSL

from tests.support.certificates import Certificate
from tests.support.scope import Closes
from tests.support.sockets import Address, connect
from tests.support.v1_stream import Stream
from tests.support.v1_stream import relay as relay_streams
from tests.support.wire2.talk import Talk
from tests.support.wire2.tls import client_context, server_context
from tests.support.workers import WorkerPool

HERE = "127.0.0.2"

Edit = Callable[[bytes], bytes]
"""What becomes of a line without its end, or of a piece of a stream, on its way."""


def unchanged(line: bytes) -> bytes:
    """Nothing becomes of it."""
    return line


class Encounter:
    """One connection of the client, and another one to the server; nothing has been read of either."""

    def __init__(self, near: Talk, dial: Callable[[], Talk], spy: Callable[[bytes], None]) -> None:
        self.near = near
        self._dial = dial
        self._spy = spy
        self._far: Talk | None = None

    @property
    def port(self) -> int:
        """The port at which they met."""
        return int(self.near.sock.getsockname()[1])

    @property
    def far(self) -> Talk:
        """The connection to the server, made when it is first asked for."""
        if self._far is None:
            self._far = self._dial()
        return self._far

    def end_tls(self, certificate: Certificate, context: SSL.Context | None = None) -> None:
        """Be the server for the client, with this certificate, and a client for the server."""
        self.far.become_client(context or client_context())
        self.near.become_server(server_context(certificate))

    def forward(self) -> None:
        """Carry bytes both ways, and note them."""
        relay_streams(Noted(self.near, self._spy), Noted(self.far, self._spy))

    def forward_edited(self, to_client: Edit = unchanged, to_server: Edit = unchanged) -> None:
        """Carry bytes both ways, each piece edited as it is read."""
        relay_streams(Noted(self.near, self._spy, to_server), Noted(self.far, self._spy, to_client))

    def edit_lines(self, to_client: Edit = unchanged, to_server: Edit = unchanged) -> None:
        """Carry lines both ways, edited."""
        back = threading.Thread(target=carry_lines, args=(self.near, self.far, to_server), daemon=True)
        back.start()
        carry_lines(self.far, self.near, to_client)
        back.join()


def carry_lines(source: Talk, sink: Talk, edit: Edit) -> None:
    """Carry lines one way to the end, which ends both ways."""
    try:
        while True:
            sink.say(edit(source.read_line(None)))
    except OSError:
        source.abort()
        sink.abort()


class Noted:
    """A stream whose reader is overheard."""

    def __init__(self, stream: Stream, note: Callable[[bytes], None], edit: Edit = unchanged) -> None:
        self._stream = stream
        self._note = note
        self._edit = edit
        self.end, self.send, self.abort = stream.end, stream.send, stream.abort
        self.is_readable, self.is_ended = stream.is_readable, stream.is_ended

    def recv(self, size: int) -> bytes:
        data = self._stream.recv(size)
        self._note(data)
        return self._edit(data) if data else data


Running = TypeVar("Running", bound="Forwarder")

Handle = Callable[[Encounter], None]


class Middle(Closes):
    """The man in the middle; a context manager. `seen` is what passed, `met` counts the connections to either port."""

    def __init__(
        self,
        tunnel_port: int,
        data_port: int,
        control: Handle = Encounter.forward,
        data: Handle = Encounter.forward,
    ) -> None:
        """control, data: what becomes of the connections to either port."""
        self._handlers = {tunnel_port: control, data_port: data}
        self.address: Address = (HERE, tunnel_port)
        self.workers = WorkerPool()
        self.seen = bytearray()
        self.met: dict[int, int] = dict.fromkeys(self._handlers, 0)

    def __enter__(self) -> Middle:
        for port, handle in self._handlers.items():
            listener = self.workers.own(socket.create_server((HERE, port), backlog=256))
            self.workers.spawn(lambda listener=listener, handle=handle: self._accept(listener, handle))  # type: ignore[misc]
        return self

    def close(self) -> None:
        self.workers.close()

    def _accept(self, listener: socket.socket, handle: Handle) -> None:
        while not self.workers.is_closed:
            sock = self.workers.own(listener.accept()[0])
            self.workers.spawn(lambda sock=sock: self._meet(sock, handle))  # type: ignore[misc]

    def _meet(self, sock: socket.socket, handle: Handle) -> None:
        port = sock.getsockname()[1]
        self.met[port] += 1
        made = [near := Talk(sock)]

        def dial() -> Talk:
            far = self.workers.own(connect(("127.0.0.1", port)))
            far.settimeout(None)
            made.append(Talk(far))
            return made[-1]

        try:
            handle(Encounter(near, dial, self.seen.extend))
        finally:
            for talk in made:
                talk.abort()


class Forwarder(Closes):
    """A port that leads to another address, as a container's mapped port does; a context manager.

    `near` are its connections with the client.
    """

    def __init__(self, behind: Address, listen: Address = ("127.0.0.1", 0)) -> None:
        self._behind = behind
        self._listen = listen
        self.near: list[socket.socket] = []
        self.workers = WorkerPool()

    def __enter__(self: Running) -> Running:
        listener = self.workers.own(socket.create_server(self._listen, backlog=256))
        self.address: Address = listener.getsockname()
        self.workers.spawn(lambda: self._accept(listener))
        return self

    def close(self) -> None:
        self.workers.close()

    def _accept(self, listener: socket.socket) -> None:
        while not self.workers.is_closed:
            sock = self.workers.own(listener.accept()[0])
            self.near.append(sock)
            self.workers.spawn(lambda sock=sock: self.forward(sock))  # type: ignore[misc]

    def forward(self, near: socket.socket) -> None:
        """Carry bytes both ways."""
        far = self.workers.own(connect(self._behind))
        far.settimeout(None)
        relay_streams(Talk(near), Talk(far))
