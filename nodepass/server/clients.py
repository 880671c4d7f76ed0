"""The clients of one tunnel: which of them gets which slot, and which of them a visitor's session.

CLIENTS says how many slots there are. A new client gets its own slot again, a free one, or that of a client that does
not respond. A session goes to a client whose target answers and that has an idle data connection; SPREAD says to which
of several. Where none has one, it waits for the first that comes. `client_slot` has what belongs to one client;
`visitor_listener`, `datagram_listener` and the flows of UDP launch sessions here; `control_listener` admits clients.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import gevent
from gevent.event import Event

from nodepass.errors import NoDataConnection, NoTarget, RefusedError
from nodepass.net.sockets import Socket
from nodepass.net.stream import Stream
from nodepass.server.client_slot import Addresses, ClientSlot
from nodepass.server.pool import Found, Queue
from nodepass.server.udp_flows import VisitorFlows
from nodepass.tunnel.control import ServerControl
from nodepass.tunnel.handshake import Candidate
from nodepass.tunnel.part import Common, Part
from nodepass.wire.auth import Key, unknown_key
from nodepass.wire.negotiation import BUSY
from nodepass.wire.signals import KIND_NAMES, TCP

Refusal = tuple[str, str]  # why no client can serve a session: a token, and the same in words

# What SPREAD compares, in C, because each session asks it of each client; `first` has its order already.
_ORDERS = {"least": attrgetter("sessions", "turn"), "round": attrgetter("turn")}

LOOK_EVERY = 1.0  # seconds between two looks for clients that leave a heartbeat unanswered, where there are several


class Launched(NamedTuple):
    """A session's data connection, which is the caller's; the client in this slot has been told to use it."""

    id: str
    stream: Stream
    slot: ClientSlot


class Clients(Part):
    """The slots of a tunnel, and the sessions that wait for its clients."""

    def __init__(
        self, common: Common, name: str = "", keys: Sequence[Key] = (), on_client: Callable[[], object] = int
    ) -> None:
        """`name`: of the tunnel; `keys`: each of which a client may prove, none where the tunnel has no key.

        `on_client` is called when a client is served.
        """
        super().__init__(common)
        self.name = name
        self.on_change: Callable[[], object] = int  # called when a client has come or left, or serves other sessions
        self.keys = tuple(keys)
        self.flows = VisitorFlows(common, self.launch)
        self._queue = Queue()
        self.slots = [
            ClientSlot(common, self.keys, self._queue, self.flows, self._update, on_client)
            for _ in range(self._settings.clients)
        ]
        self.flows.slots = self.slots
        self._by_pool = {slot.pool: slot for slot in self.slots}
        self._connected = Event()
        self._serving: dict[int, list[ClientSlot]] = {kind: [] for kind in KIND_NAMES}  # by kind of session
        self._order = _ORDERS.get(self._settings.spread)
        self._in_vain: dict[int, Refusal] = {}  # by kind of session: why none is launched
        self._launches = 0
        if len(self.slots) > 1:
            for slot in self.slots:
                slot.pool.on_lost = slot.doubt

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} {self.slots}>"

    # Clients

    @property
    def connected(self) -> list[ClientSlot]:
        """The slots that have a client."""
        return [slot for slot in self.slots if slot.control]

    @property
    def controls(self) -> list[ServerControl]:
        """The control connections of the connected clients."""
        return [slot.control for slot in self.slots if slot.control]

    @property
    def newest(self) -> ServerControl | None:
        """The control connection of the client that has connected last; None while none is connected."""
        return max(self.controls, key=lambda control: control.since, default=None)

    @property
    def sessions(self) -> int:
        """How many TCP sessions there are that have a data connection."""
        return sum(slot.sessions for slot in self.slots)

    def describe(self) -> str:
        """The clients and their pools, for an operator."""
        if len(self.slots) == 1:
            [slot] = self.slots
            return f"client {slot.control.describe() if slot.control else 'none'}, {slot.pool}"
        each = "; ".join(slot.describe() for slot in self.connected) or "none"
        return f"{len(self.connected)} of {len(self.slots)} clients: {each}"

    @property
    def version(self) -> int:
        """The wire's version that the connected clients speak, 0 while none is connected; v1 only where it is alone."""
        return max(slot.version for slot in self.slots)

    def wait_for_client(self, timeout: float) -> bool:
        """Whether a client is connected now or within `timeout` seconds."""
        return bool(self._connected.wait(timeout))

    def start(self) -> None:
        if len(self.slots) > 1:
            self._start_loop("watch clients", self._watch)

    def stop(self, timeout: float) -> None:
        """Refuse clients from now on; the connected ones stay."""
        for slot in self.slots:
            slot.stop(timeout)

    def close(self) -> None:
        super().close()
        for slot in self.slots:
            slot.close()

    def hand_over(self) -> None:
        """As `ClientSlot.hand_over`, for all; other clients are refused."""
        self.stop(0.0)
        for slot in self.slots:
            slot.hand_over()

    def dismiss(self, timeout: float) -> None:
        """Tell the clients that the server stops, and wait until they have left, so that no reset overtakes that."""
        gevent.joinall([self._group.spawn("dismiss a client", slot.dismiss, timeout) for slot in self.connected])

    def set_keys(self, keys: Sequence[Key]) -> list[ClientSlot]:
        """Take other keys, and end each client that has proven one that is gone; the slots that these had.

        A tunnel that had keys and has none any more is closed to everyone, and not open.
        """
        self.keys = tuple(keys) or ((unknown_key(),) if self.keys else ())
        return [slot for slot in self.slots if slot.set_keys(self.keys)]

    @contextlib.contextmanager
    def admission(self, candidate: Candidate) -> Iterator[ClientSlot]:
        """Hold a slot for a client while it is sent the offer; then it is connected. Raises OSError, as a slot does."""
        with contextlib.ExitStack() as held:
            yield self._enter(held, candidate)

    def _enter(self, held: contextlib.ExitStack, candidate: Candidate) -> ClientSlot:
        while True:
            slot = self._find_place(candidate)
            try:
                held.enter_context(slot.admission(candidate))
            except RefusedError as error:
                if error.reason != BUSY or all(each.control for each in self.slots):
                    raise
            else:
                return slot

    def _find_place(self, candidate: Candidate) -> ClientSlot:
        """The slot that this client may have; where all others respond, any: it refuses the client."""
        if len(self.slots) == 1:
            return self.slots[0]
        for slot in self.slots:
            if slot.holds(candidate):
                return slot
        for slot in self.slots:
            if not slot.control:
                return slot
        silent: list[ClientSlot] = []

        def ask(slot: ClientSlot) -> None:
            if not slot.responds():
                silent.append(slot)

        gevent.joinall([self._group.spawn("ask a client", ask, slot) for slot in self.slots])
        return (silent or self.slots)[0]

    # Sessions

    def launch(self, kind: int, timeout: float, visitor: Socket | None = None, known: Addresses = ()) -> Launched:
        """A data connection that its client has been told to use for a session.

        A client that wants them is told the visitor's addresses, which the socket has unless they are `known`. If a
        client goes away meanwhile, a connection of another or the next one serves as well. Raises NoDataConnection, at
        once (NoTarget) where no client can serve this kind.
        """
        deadline = time.monotonic() + timeout
        while True:
            if refusal := self._in_vain.get(kind):
                raise NoTarget(*refusal)
            slot, (id, stream) = self._take(kind, max(0.0, deadline - time.monotonic()))
            try:
                # It may have been closed by `release` before this greenlet ran: the next client knows no such id.
                if stream.sock.fileno() >= 0 and slot.send_launch(id, kind, visitor, known):
                    self._launches += 1
                    slot.turn = self._launches
                    return Launched(id, stream, slot)
            except BaseException:
                stream.close()
                raise
            stream.close()
            if time.monotonic() >= deadline:
                raise NoDataConnection("the client disconnected")

    def _take(self, kind: int, timeout: float) -> tuple[ClientSlot, Found]:
        """A data connection, and the slot that it belongs to. Raises NoDataConnection after `timeout` seconds."""
        waits = self._stats.pool_waits
        for slot in self._in_order(kind) if len(self.slots) > 1 else self.slots:
            if found := slot.pool.take(kind):
                waits.observe(0.0)
                return slot, found
            slot.pool.note_empty()
        self._stats.found_empty += 1
        began = time.monotonic()
        try:
            pool, found = self._queue.wait(kind, timeout)
        except NoTarget:
            raise
        except NoDataConnection:
            for slot in self.slots:
                slot.pool.note_unserved()
            raise
        finally:
            waits.observe(time.monotonic() - began)
        return self._by_pool[pool], found

    def _in_order(self, kind: int) -> list[ClientSlot]:
        """The slots that serve sessions of this kind now, the preferred one first."""
        slots = self._serving[kind]
        if not self._order:
            return slots
        if self._settings.spread == "least" and self.flows.has_lanes:
            flows = self.flows.count_by_slot()
            return sorted(slots, key=lambda slot: (slot.sessions + flows.get(slot, 0), slot.turn))
        return sorted(slots, key=self._order)

    def _update(self) -> None:
        """A client has come or left, or whether it can serve has changed."""
        connected = self.connected
        if connected:
            self._connected.set()
        else:
            self._connected.clear()
        self._in_vain = {kind: refusal for kind in KIND_NAMES if (refusal := self._find_refusal(kind))}
        for kind, (token, words) in self._in_vain.items():
            self._queue.refuse(kind, partial(NoTarget, token, words))
        self._serving = {kind: self._find_serving(kind) for kind in KIND_NAMES}
        self._queue.withheld = {
            kind: {slot.pool for slot in connected if slot not in serving} for kind, serving in self._serving.items()
        }
        self.on_change()
        for slot in connected:
            slot.pool.serve_waiting()

    def _find_serving(self, kind: int) -> list[ClientSlot]:
        """The slots of the clients that are good and can serve sessions of this kind, else of those that can.

        The one that has been connected longest is first.
        """
        able = sorted((slot for slot in self.slots if slot.serves(kind)), key=lambda slot: slot.since)
        return [slot for slot in able if slot.is_good] or able

    def _find_refusal(self, kind: int) -> Refusal | None:
        """Why no client can serve a session of this kind, as they say."""
        controls = self.controls
        able = [each for each in controls if each.serves(kind)]
        if controls and not able:
            protocol = "tcp" if kind == TCP else "udp"
            return f"{protocol}_off", f"{protocol.upper()}=off on the client"
        if kind == TCP and able and not any(each.target_answers for each in able):
            return "target_down", "the client's target does not answer"
        return None

    def _watch(self) -> None:
        while True:
            gevent.sleep(LOOK_EVERY)
            for slot in self.connected:
                if slot.control and slot.control.is_late:
                    slot.doubt()
