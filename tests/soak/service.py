"""The service behind a tunnel: plays the target's end of every session, and answers datagrams."""

from __future__ import annotations

import contextlib
import socket
import threading

from tests.soak.conversation import Conversation, End
from tests.soak.datagrams import answers_to
from tests.soak.sessions import HEADER, Session
from tests.support.sockets import Address, abort, receive_exactly

HEADER_WITHIN = 60.0
"""Seconds for a visitor's first bytes to arrive."""


class Service:
    """A TCP listener and a UDP socket on one fixed address, which can stop and start again."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.wrongs: list[str] = []
        self._ends: dict[int, tuple[End, threading.Event]] = {}
        self._changed = threading.Condition()
        self._epoch = 0
        self._sockets: list[socket.socket] = []

    def start(self) -> None:
        """Listen, and serve in threads."""
        listener = socket.create_server(self.address, backlog=256)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(self.address)
        self._sockets = [listener, datagrams]
        for work, sock in ((self._accept, listener), (self._answer, datagrams)):
            threading.Thread(target=work, args=(sock, self._epoch), daemon=True).start()

    def stop(self) -> None:
        """Close everything, as a killed service would: its sessions are reset."""
        self._epoch += 1
        for sock in self._sockets:
            abort(sock)
        self._sockets = []

    def end_of(self, number: int, timeout: float) -> End | None:
        """The target's end of a session once it is over; None if it has not even begun in time."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._ends, timeout)
            known = self._ends.get(number)
        if known is None:
            return None
        known[1].wait(2 * HEADER_WITHIN)
        with self._changed:
            del self._ends[number]
        return known[0]

    def _accept(self, listener: socket.socket, epoch: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=self._serve, args=(sock, epoch), daemon=True).start()

    def _serve(self, sock: socket.socket, epoch: int) -> None:
        sock.settimeout(HEADER_WITHIN)
        try:
            session = Session.decode(receive_exactly(sock, HEADER.size))
        except (OSError, AssertionError) as error:
            sock.close()
            if isinstance(error, AssertionError) and "after 0 of" not in str(error):
                self.wrongs.append(f"a header was cut and looked whole: {error}")
            return
        end, over = End(session.targets_part()), threading.Event()
        with self._changed:
            if session.number in self._ends:
                self.wrongs.append(f"session {session} arrived twice")
            self._ends[session.number] = end, over
            self._changed.notify_all()
        try:
            Conversation(sock, end, lambda: self._epoch != epoch).run()
        finally:
            over.set()

    def _answer(self, sock: socket.socket, epoch: int) -> None:
        with contextlib.suppress(OSError):
            while True:
                question, peer = sock.recvfrom(1 << 16)
                if self._epoch != epoch:
                    return  # it is the shutdown that this thread has been woken by
                try:
                    answers = answers_to(question)
                except AssertionError as error:
                    self.wrongs.append(str(error))
                    continue
                for answer in answers:
                    sock.sendto(answer, peer)
