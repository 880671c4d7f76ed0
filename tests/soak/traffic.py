"""Visitors: what they do all the time, and what became of it."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import count

from tests.soak.conversation import PATIENCE, Conversation, End
from tests.soak.datagrams import Count, Flow
from tests.soak.pairs import Pair
from tests.soak.sessions import Session, outcome, wrongs
from tests.support.scope import Closes
from tests.support.sockets import connect, datagram_socket

VISITORS = 4
"""Threads of each pair that have one session after the other."""

FLOWS = 2
"""Threads of each pair that have one flow after the other."""

BURSTS = 40
"""Of a flow, at most."""

PAUSE = 0.02
"""Seconds between sessions and bursts of one visitor: so many make a load that this machine can bear."""

ARRIVES_WITHIN = 10.0
"""Seconds for a session to begin at the target after its visitor's end, while it is quiet."""

ANSWERS_WITHIN = {True: 10.0, False: 0.5}
"""Seconds for a datagram's answers, while it is quiet and while it is not."""

_numbers = count(1)


class Tally:
    """What has happened so far, for all pairs; safe to use from every thread."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.sessions: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.datagrams: Counter[str] = Counter()
        self._lock = threading.Lock()

    def find(self, *what: str) -> None:
        """Something that must not be. It is said at once."""
        with self._lock:
            self.findings += what
        for each in what:
            print(f"FOUND: {each}", flush=True)

    def count(self, how: str, ends: list[End]) -> None:
        with self._lock:
            self.sessions[how] += 1
            self.bytes["received"] += sum(end.received for end in ends)

    def count_datagrams(self, done: Count, is_quiet: bool) -> None:
        with self._lock:
            self.datagrams["answered"] += done.answered
            self.datagrams["lost while quiet" if is_quiet else "lost to faults"] += done.lost


def visit(pair: Pair, session: Session, patience: float = PATIENCE) -> End:
    """Play the visitor of a session; the end that he has seen."""
    end = End(session.visitors_part())
    try:
        sock = pair.place.at_server(lambda: connect(pair.address, patience))
    except OSError:
        end.heard = "reset"
        end.digest = end.part.hears.digest(0)
        return end
    if session.manner == "visitor says nothing":
        sock.close()
        end.has_left = end.said_end = True
        end.digest = end.part.hears.digest(0)
        return end
    Conversation(sock, end, lambda: False, patience).run(session.encode())
    return end


class Traffic(Closes):
    """One pair's visitors during one phase."""

    def __init__(self, pair: Pair, tally: Tally, seed: str, is_quiet: bool) -> None:
        self._pair = pair
        self._tally = tally
        self._seed = f"{seed} {pair.name} {'quiet' if is_quiet else 'rough'}"
        self._is_quiet = is_quiet
        self._stopping = threading.Event()
        self._unjudged: list[tuple[Session, End]] = []
        works: list[Callable[[random.Random], None]] = [self._have_sessions for _ in range(VISITORS)]
        works += [self._have_flows for _ in range(FLOWS)]
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, random.Random(f"{self._seed} {number}")), daemon=True)
            for number, work in enumerate(works)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def close(self) -> None:
        """Let what has begun come to its end, and judge what could not be judged before."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        for session, visitor in self._unjudged:
            self._judge(session, visitor, self._pair.service.end_of(session.number, 0))
        self._tally.find(*self._pair.service.wrongs)
        self._pair.service.wrongs.clear()

    def _guarded(self, work: Callable[[random.Random], None], rng: random.Random) -> None:
        try:
            while not self._stopping.wait(PAUSE):
                work(rng)
        except Exception as error:  # noqa: BLE001  # a thread's failure is the run's
            self._tally.find(f"{self._seed}: {work.__name__} failed: {error!r}")

    def _have_sessions(self, rng: random.Random) -> None:
        session = Session.random(next(_numbers), rng)
        visitor = visit(self._pair, session)
        patience = ARRIVES_WITHIN if self._is_quiet and session.is_whole else 0.2
        target = self._pair.service.end_of(session.number, patience)
        if target is None and not self._is_quiet:
            self._unjudged.append((session, visitor))
        else:
            self._judge(session, visitor, target)

    def _judge(self, session: Session, visitor: End, target: End | None) -> None:
        how = outcome(session, visitor, target)
        self._tally.count(how, [visitor, target] if target else [visitor])
        where = f"{self._seed} ({self._pair.shape}), after «{self._pair.trouble}»"
        self._tally.find(*(f"{where}: {each}" for each in wrongs(session, visitor, target)))
        if self._is_quiet and session.is_whole and how != "complete":
            self._tally.find(f"{self._seed}: {session} is {how} though nothing is wrong: {visitor} {target}")

    def _have_flows(self, rng: random.Random) -> None:
        with self._pair.place.at_server(lambda: datagram_socket(self._pair.place.host)) as sock:
            flow = Flow(next(_numbers), sock, self._pair.address)
            for _ in range(rng.randint(1, BURSTS)):
                done = flow.burst(rng, ANSWERS_WITHIN[self._is_quiet])
                self._tally.count_datagrams(done, self._is_quiet)
                if done.wrong:
                    self._tally.find(f"{self._seed}: {done.wrong}")
                if done.lost and self._is_quiet:
                    self._tally.find(
                        f"{self._seed}: {done.lost} of {done.asked} datagrams lost though nothing is wrong"
                    )
                if self._stopping.wait(PAUSE):
                    return


def works(pair: Pair) -> bool:
    """Whether a session and a datagram come through now."""
    session = Session(next(_numbers), 1000, 1000)
    visitor = visit(pair, session, patience=2.0)
    if visitor.heard != "end" or visitor.received != session.down:
        return False
    pair.service.end_of(session.number, 1.0)
    with pair.place.at_server(lambda: datagram_socket(pair.place.host)) as sock:
        flow, began = Flow(next(_numbers), sock, pair.address), time.monotonic()
        while time.monotonic() - began < 2.0:
            done = flow.burst(random.Random(1), 0.5)
            if done.asked and not done.lost:
                return True
    return False
