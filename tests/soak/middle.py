"""Somebody in the middle who forwards, and resets what he carries when told to: a router that loses its memory."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import threading
from collections.abc import Mapping

from tests.support.scope import Closes
from tests.support.sockets import Address, reset

CHUNK = 1 << 17
"""Bytes read at a time, and held for a slow reader at most."""


class Half:
    """One direction."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.held = b""
        self.is_over = False

    def pull(self) -> None:
        """Move what is there; the end of the stream is passed on."""
        data = self.source.recv(CHUNK)
        if data:
            self.held = data
            self.push()
        else:
            self.is_over = True
            self.sink.shutdown(socket.SHUT_WR)

    def push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.held = self.held[self.sink.send(self.held) :]


class Carried:
    """One connection."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.sockets = near, far
        self.halves = Half(near, far), Half(far, near)

    @property
    def is_over(self) -> bool:
        return all(half.is_over for half in self.halves)

    def interest(self, sock: socket.socket) -> int:
        """What is to be waited for on one of its sockets."""
        reads = any(half.source is sock and not half.held and not half.is_over for half in self.halves)
        writes = any(half.sink is sock and half.held for half in self.halves)
        return selectors.EVENT_READ * reads | selectors.EVENT_WRITE * writes

    def move(self, sock: socket.socket, events: int) -> None:
        """Do what has become possible. Raises OSError."""
        for half in self.halves:
            if half.sink is sock and half.held and events & selectors.EVENT_WRITE:
                half.push()
            if half.source is sock and not half.held and not half.is_over and events & selectors.EVENT_READ:
                half.pull()


class Middle(Closes):
    """Forwards from some addresses to others; a context manager."""

    def __init__(self, ways: Mapping[Address, Address]) -> None:
        self._ways = ways
        self._selector = selectors.DefaultSelector()
        self._carried: set[Carried] = set()
        self._wanted: list[float] = []  # shares of the connections to reset
        self._rng = random.Random(1)
        self._waking, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Middle:
        self._listeners = {socket.create_server(near, backlog=256): far for near, far in self._ways.items()}
        for sock in (*self._listeners, self._woken):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread.start()
        return self

    def close(self) -> None:
        self._waking.close()
        self._thread.join()
        for carried in list(self._carried):
            self._end(carried)
        for sock in (*self._listeners, self._woken):
            sock.close()
        self._selector.close()

    def reset(self, share: float) -> None:
        """Reset about this share of the connections."""
        self._wanted.append(share)
        self._waking.send(b"!")

    def _run(self) -> None:
        while True:
            for key, events in self._selector.select():
                if key.fileobj is self._woken:
                    if not self._woken.recv(100):
                        return
                elif key.data is None:
                    self._accept(key.fileobj)  # type: ignore[arg-type]  # a socket, always
                elif key.data in self._carried:
                    self._move(key.data, key.fileobj, events)  # type: ignore[arg-type]  # likewise
            while self._wanted:
                share = self._wanted.pop()
                for carried in [each for each in self._carried if self._rng.random() < share]:
                    self._end(carried)

    def _accept(self, listener: socket.socket) -> None:
        near, _ = listener.accept()
        try:
            far = socket.create_connection(self._ways[listener.getsockname()])
        except OSError:
            reset(near)
            return
        carried = Carried(near, far)
        self._carried.add(carried)
        for sock in carried.sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, carried)

    def _move(self, carried: Carried, sock: socket.socket, events: int) -> None:
        try:
            carried.move(sock, events)
        except BlockingIOError:
            return
        except OSError:
            self._end(carried)
            return
        if carried.is_over:
            self._forget(carried)
            for each in carried.sockets:
                each.close()
            return
        for each in carried.sockets:
            self._watch(carried, each)

    def _watch(self, carried: Carried, sock: socket.socket) -> None:
        wanted = carried.interest(sock)
        known = sock in self._selector.get_map()
        if wanted and known:
            self._selector.modify(sock, wanted, carried)
        elif wanted:
            self._selector.register(sock, wanted, carried)
        elif known:
            self._selector.unregister(sock)

    def _forget(self, carried: Carried) -> None:
        self._carried.discard(carried)
        for sock in carried.sockets:
            if sock in self._selector.get_map():
                self._selector.unregister(sock)

    def _end(self, carried: Carried) -> None:
        self._forget(carried)
        for sock in carried.sockets:
            reset(sock)
