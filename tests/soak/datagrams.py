"""Flows of numbered datagrams: each is checked where it arrives and answered with as many as it asks for."""

from __future__ import annotations

import random
import socket
import struct
import time
from dataclasses import dataclass

from tests.soak.content import Content
from tests.soak.sessions import log_uniform
from tests.support.sockets import Address

HEAD = struct.Struct(">IIBHB")
"""Flow, number, answers that are asked for, bytes of content, which answer this is (0: the question)."""

LARGEST = 8_000
"""Bytes of content; the kernel takes a few such datagrams for each socket whatever its settings."""

BURST = 4
"""Questions that are asked before the first answer is awaited, at most."""


def make(flow: int, number: int, answers: int, size: int, which: int) -> bytes:
    """One datagram."""
    return HEAD.pack(flow, number, answers, size, which) + Content(hash((flow, number, which))).part(0, size)


def check(datagram: bytes) -> tuple[int, int, int, int, int]:
    """Its head; AssertionError where it is not what was sent."""
    if len(datagram) < HEAD.size:
        raise AssertionError(f"a datagram of {len(datagram)} bytes has no head")
    head = HEAD.unpack_from(datagram)
    if datagram != make(*head):
        raise AssertionError(f"a datagram of {len(datagram)} bytes is not the one that was sent: head {head}")
    return head


def answers_to(question: bytes) -> list[bytes]:
    """What a service answers. AssertionError where the question is not what was sent."""
    flow, number, answers, size, _ = check(question)
    return [make(flow, number, answers, size, which + 1) for which in range(answers)]


@dataclass
class Count:
    """What became of some datagrams' answers."""

    asked: int = 0
    answered: int = 0
    wrong: str = ""

    @property
    def lost(self) -> int:
        return self.asked - self.answered


class Flow:
    """One visitor's socket."""

    def __init__(self, flow: int, sock: socket.socket, address: Address) -> None:
        self._flow = flow
        self._sock = sock
        self._address = address
        self._number = 0

    def burst(self, rng: random.Random, patience: float) -> Count:
        """Ask a few questions at once, and await every answer to them for so long."""
        awaited: list[tuple[int, int]] = []
        last = self._number
        for _ in range(rng.randint(1, BURST)):
            self._number += 1
            answers = rng.choice((0, 1, 1, 1, 2))
            question = make(self._flow, self._number, answers, log_uniform(rng, LARGEST), 0)
            self._sock.sendto(question, self._address)
            awaited += [(self._number, which + 1) for which in range(answers)]
        count = Count(asked=len(awaited))
        deadline = time.monotonic() + patience
        while count.lost and not count.wrong and (left := deadline - time.monotonic()) > 0:
            self._sock.settimeout(left)
            try:
                answer = self._sock.recv(1 << 16)
            except TimeoutError:
                break
            count.wrong = self._wrong(answer, awaited, last) or count.wrong
            count.answered = count.asked - len(awaited)
        return count

    def _wrong(self, answer: bytes, awaited: list[tuple[int, int]], last: int) -> str:
        """What is wrong with an answer; nothing where it was awaited, which is noted, or comes late."""
        try:
            flow, number, _, _, which = check(answer)
        except AssertionError as error:
            return str(error)
        if flow != self._flow or number > self._number:
            return f"flow {self._flow} got a datagram of flow {flow}, number {number}"
        if number <= last:
            return ""
        if (number, which) not in awaited:
            return f"flow {flow} got answer {which} to {number} twice"
        awaited.remove((number, which))
        return ""
