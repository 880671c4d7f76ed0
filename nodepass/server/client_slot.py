"""A slot: a place for a client of a tunnel on the server, which one client has at a time.

It keeps what belongs to that client: the control connection while there is one, the pool, and the deadlines of TCP
sessions. The slot and the listeners outlive the client, so sessions and visitors pass over a reconnect. It is filled by
`admission`, or by `promote` for a v1 client on trial, and emptied by `release`, and nowhere else. A tunnel has as many
slots as CLIENTS says; which of them a client gets, and which a visitor, is decided by `clients`, and which one a data
connection belongs to by `tunnel_port`.
"""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence

from gevent.event import AsyncResult, Event
from gevent.lock import Semaphore

from nodepass.errors import ClosedError, NoDataConnection, RefusedError
from nodepass.log import Limit
from nodepass.net.deadlines import Deadlines
from nodepass.net.sockets import Endpoint, Socket, acknowledged, format_without_zone
from nodepass.server.pool import Queue, ServerPool
from nodepass.server.udp_flows import VisitorFlows
from nodepass.tunnel.control import STOPPING, Agreement, Ending, ServerControl
from nodepass.tunnel.handshake import Candidate
from nodepass.tunnel.part import Common, Part
from nodepass.wire.auth import Key
from nodepass.wire.negotiation import BUSY, KEY_MISMATCH
from nodepass.wire.signals import BYES, LANE, RELOAD, REPLACED, SHUTDOWN, Launch


class Trial:
    """A v1 control connection without a place: it is the client only from its first data connection on.

    A v1 client never says anything, and neither does a scanner or a health check; only a client opens data connections.
    `control_listener` begins a trial and waits for its end, and `data_listener` brings the data connection.
    """

    def __init__(self, control: ServerControl, agreement: Agreement, replaces: ServerControl | None) -> None:
        """`replaces`: the client whose place it would take, which does not respond."""
        self.control = control
        self.agreement = agreement
        self.replaces = replaces
        self.began = time.monotonic()
        self._outcome: AsyncResult[bool] = AsyncResult()

    def __repr__(self) -> str:
        return f"<Trial {self.control.peer} {'ended' if self.is_over else 'waiting'}>"

    @property
    def is_over(self) -> bool:
        """Whether it has been decided."""
        return self._outcome.ready()

    def wait(self, timeout: float) -> bool:
        """Whether it is the client now; not where it says something, leaves, or opens nothing for `timeout` seconds."""
        stream = self.control.stream
        stream.watch(self.end, False)
        try:
            return bool(self._outcome.wait(timeout))  # None after the timeout
        finally:
            stream.unwatch()

    def end(self, is_client: bool) -> None:
        """Decide; the first decision counts."""
        if not self._outcome.ready():
            self._outcome.set(is_client)


Addresses = tuple[str, str] | tuple[()]  # a visitor's, and the one that it has connected to


class ClientSlot(Part):
    """One client's place; `control` is None while no client is connected."""

    def __init__(
        self,
        common: Common,
        keys: Sequence[Key],
        queue: Queue,
        flows: VisitorFlows,
        on_change: Callable[[], object],
        on_client: Callable[[], object],
    ) -> None:
        """`keys`: each of which a client may prove, none where the tunnel has no key; `queue`: of waiting sessions.

        `on_change` is called when a client has come or left, or serves sessions no more, or again; `on_client` when one
        is served.
        """
        super().__init__(common)
        self.on_client = on_client
        settings = common.settings
        self.keys = tuple(keys)
        self.control: ServerControl | None = None
        highest = max(1, settings.max_pool_capacity // settings.clients)  # so that all pools together keep to it
        lowest = min(settings.min_pool_capacity, highest)
        self.pool = ServerPool(self._log, self._stats, lowest, highest, queue)
        self.sessions = 0  # of TCP, that the clients in this slot serve
        self.turn = 0  # the number of its last launch, among those of the tunnel
        self._flows = flows
        self._on_change = on_change
        self.deadlines = Deadlines(settings.idle_timeout, settings.first_byte_timeout, data_is_near=False)
        self.trials: list[Trial] = []  # the youngest last
        self._admitting = Semaphore()
        self._left = Event()  # set while no client is connected
        self._left.set()
        self._is_stopping = False
        self._probed: ServerControl | None = None
        self._probing: AsyncResult[bool] | None = None  # whether that one responds
        self._leaving: ServerControl | None = None  # was told why, and may still have to end its side

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.control or 'free'}>"

    def stop(self, timeout: float) -> None:  # noqa: ARG002
        """Refuse clients from now on; the connected one stays."""
        self._is_stopping = True

    def close(self) -> None:
        super().close()
        self._is_stopping = True
        for trial in self.trials:
            trial.end(False)
        if self.control:
            self.release(self.control, STOPPING, SHUTDOWN)

    @property
    def version(self) -> int:
        """The wire's version that the client speaks, 0 while none is connected."""
        return self.control.version if self.control else 0

    @property
    def is_good(self) -> bool:
        """Whether a client is connected that answers, and whose target does."""
        return self.control is not None and self.control.target_answers and not self.control.is_doubted

    def serves(self, kind: int) -> bool:
        """Whether a client is connected that takes sessions of this kind."""
        return self.control is not None and self.control.serves(kind)

    @property
    def wants_addresses(self) -> bool:
        """Whether the connected client wants to know the visitors' addresses."""
        return self.agreement is not None and self.agreement.wants_addresses

    @property
    def client(self) -> str:
        """The address of the connected client, "" while none is."""
        return self.control.peer if self.control else ""

    @property
    def agreement(self) -> Agreement | None:
        """What was agreed with the connected client."""
        return self.control.agreement if self.control else None

    def is_client(self, peer: Endpoint) -> bool:
        """Whether a connection comes from the address of the connected client."""
        return self.control is not None and peer.has_host_of(self.control.endpoint)

    def agreement_with(self, peer: Endpoint) -> Agreement | None:
        """The agreement that a data connection belongs to; without a key it must come from the client's address."""
        agreement = self.agreement
        return agreement if agreement and (agreement.session or self.is_client(peer)) else None

    def trial_of(self, peer: Endpoint) -> Trial | None:
        """The youngest v1 client on trial from this address that the place is free for."""
        for trial in reversed(self.trials):
            if trial.control.endpoint.host == peer.host and self.control in (None, trial.replaces):
                return trial
        return None

    @property
    def since(self) -> float:
        """When its client has connected (time.monotonic()); endless while none is."""
        return self.control.since if self.control else math.inf

    def describe(self) -> str:
        """The client, its sessions and its pool, for an operator; one of several."""
        doubted = ", does not respond" if self.control and self.control.is_doubted else ""
        client = self.control.describe() if self.control else "none"
        return f"{client}{doubted}, {self.sessions} sessions, {self.pool}"

    def doubt(self) -> None:
        """Give its client no session from now on, while others can serve, until it answers a heartbeat sent now."""
        if self.control and not self.control.is_doubted:
            self.control.is_doubted = True
            self._on_change()
            self._group.spawn("ask a client that is doubted", self.control.ask)

    @contextlib.contextmanager
    def admission(self, candidate: Candidate) -> Iterator[None]:
        """Hold the slot for a client while it is sent the offer; then it is the connected client.

        The same client takes its own place again at once, another one only from a client that does not respond. Raises
        OSError, RefusedError among them.
        """
        control = candidate.control
        incumbent = self._find_place(candidate)
        with self._admitting:
            while self.control is not incumbent:
                incumbent = self._find_place(candidate)
            self._check_still_welcome(candidate)
            if acknowledged(control.sock) is None:
                raise ClosedError("disconnected while waiting for its turn")
            if self.control:
                self._replace(self.control, candidate)
                self._check_still_welcome(candidate)  # others have run while the lanes ended
            if self.control:
                raise RefusedError(BUSY, f"another client, {self.control.peer}, has taken the place meanwhile")
            yield
            self._take_in(control)

    @contextlib.contextmanager
    def trial(self, control: ServerControl, agreement: Agreement) -> Iterator[Trial]:
        """A v1 client that may become the connected client. Raises RefusedError where no place is free."""
        trial = Trial(control, agreement, self._find_place(Candidate(control, "", None)))
        self.trials.append(trial)
        try:
            yield trial
        except BaseException:
            self.release(control, STOPPING)  # it may be the client since this very moment
            raise
        finally:
            self.trials.remove(trial)
            trial.end(False)

    def promote(self, trial: Trial) -> bool:
        """Make a client on trial the connected client, unless the place has been taken meanwhile; whether it is now."""
        if self.control is trial.control:
            return True
        is_free = self.control in (None, trial.replaces)
        if self.control and self.control.shows_life_since(trial.began):
            is_free = False  # it was only slow to respond
        if self._is_stopping or self.keys or trial.is_over or not is_free:
            trial.end(False)
            return False
        if self.control:
            self._replace(self.control, Candidate(trial.control, "", None))
        if self.control or trial.is_over:  # others have run while the lanes ended
            trial.end(False)
            return False
        self._take_in(trial.control)
        trial.end(True)
        return True

    def _take_in(self, control: ServerControl) -> None:
        self.control = control
        self._left.clear()
        control.on_change = self._on_change
        self._on_change()

    def dismiss(self, timeout: float) -> None:
        """Tell the client that the server stops, and wait until it has left, so that no reset overtakes that."""
        if self.control and self.version > 1:
            self.control.finish(STOPPING, SHUTDOWN)
            self._left.wait(timeout)

    def hand_over(self) -> None:
        """Tell the client to connect again: another process accepts now. Its sessions and lanes go on here."""
        if self.control:
            self.release(self.control, Ending(RELOAD, "a new process takes over"), RELOAD)

    def _find_place(self, candidate: Candidate) -> ServerControl | None:
        """Return where a place is free or would be given up: the client that has it. Raises RefusedError."""
        while not self._is_stopping and (incumbent := self.control) and not self._is_same(incumbent, candidate):
            is_alive = self._probe(incumbent)
            if self.control is not incumbent:
                continue  # meanwhile it has left, or a client on trial has taken its place
            if is_alive:
                raise RefusedError(BUSY, f"another client, {incumbent.peer}, is connected and responding")
            break
        if self._is_stopping:
            raise RefusedError(SHUTDOWN, "the server is shutting down")
        return self.control

    def _check_still_welcome(self, candidate: Candidate) -> None:
        """Raise RefusedError where the server stops meanwhile, or does not have the proven key any more."""
        if self._is_stopping:
            raise RefusedError(SHUTDOWN, "the server is shutting down")
        if candidate.key not in (self.keys or (None,)):
            raise RefusedError(KEY_MISMATCH, "the tunnel's keys have changed since the client was challenged")

    def holds(self, candidate: Candidate) -> bool:
        """Whether the connected client itself has come again."""
        return self.control is not None and self._is_same(self.control, candidate)

    def responds(self) -> bool:
        """Whether a client is connected that responds to a heartbeat now."""
        return self.control is not None and self._probe(self.control)

    def _probe(self, incumbent: ServerControl) -> bool:
        """Whether the connected client responds; one probe serves all that ask meanwhile, so that no crowd queues."""
        patience = incumbent.patience
        probing = self._probing
        if self._probed is not incumbent or probing is None or probing.ready():
            self._probed, self._probing = incumbent, (probing := AsyncResult())
            self._group.spawn("probe the client", _answer, probing, incumbent, patience)
        probing.wait(2 * patience)  # the probe itself is late where the client reads nothing
        return bool(probing.value)

    def _is_same(self, incumbent: ServerControl, candidate: Candidate) -> bool:
        """Whether it is the connected client itself that has come again."""
        agreement = incumbent.agreement
        known = bool(agreement and agreement.client and agreement.client == candidate.client)
        return known and (candidate.key is not None or self.is_client(candidate.control.endpoint))

    def _replace(self, incumbent: ServerControl, candidate: Candidate) -> None:
        """Free the slot from the client that has it."""
        peer = candidate.control.peer
        if self._is_same(incumbent, candidate):
            words = "client %(client)s has connected again and takes its place back from %(incumbent)s"
            self._log.info("client.returned", words, Limit(), client=peer, incumbent=incumbent.peer)
            ending = Ending("returned", f"the same client has connected again from {peer}")
        else:
            words = "client %(client)s replaces %(incumbent)s, which does not respond"
            self._log.warning("client.replaced", words, Limit(), client=peer, incumbent=incumbent.peer)
            incumbent.vanished = True
            ending = Ending("silent", f"not responding; replaced by {peer}")
        self.release(incumbent, ending, REPLACED)

    def set_keys(self, keys: Sequence[Key]) -> bool:
        """Take other keys, and end a client that has proven one that is gone; whether that has happened."""
        self.keys = tuple(keys)
        agreement = self.agreement
        if not self.control or not agreement or agreement.key in (self.keys or (None,)):
            return False
        self.release(self.control, Ending(RELOAD, "its key has been removed"), RELOAD)
        self._flows.end_all(self)
        return True

    def release(self, control: ServerControl, ending: Ending, bye: str = "") -> None:
        """End a control connection, and free the slot if it is this client's: its sessions run on.

        With a `bye` (one of BYES) the client is told why. Its idle data connections are closed. Lanes of a client that
        has vanished are dead, too, and end; their flows begin again with the next client. Its sessions must show that
        they live. Lanes of a client that was replaced go on while it takes their datagrams.
        """
        if bye in BYES and control.version > 1:
            if self._leaving:
                self._leaving.close(ending)  # it has had its time: one that returns all the time holds two sockets
            self._leaving = control
            control.finish(ending, bye)
        else:
            control.close(ending)
        if self.control is control:
            self.control = None
            self._left.set()
            self.pool.flush("its client disconnected")
            self._on_change()
            if control.vanished:
                self._flows.end_all(self)
                self.deadlines.suspect_data_connections()
            else:
                self._flows.abandon(self)

    def send_launch(self, id: str, kind: int, visitor: Socket | None = None, known: Addresses = ()) -> bool:
        """Whether the client could be told to use a data connection, and the visitor's addresses if it wants them.

        Raises NoDataConnection where the connected client has no such sessions.
        """
        agreement = self.agreement
        if not self.control or not agreement:
            return False
        if kind == LANE and agreement.version < 2:
            raise NoDataConnection("the client now connected speaks wire v1, which has no lanes")
        addresses = known or _addresses(visitor) if visitor and agreement.wants_addresses else ()
        with contextlib.suppress(OSError):
            self.control.send(Launch(id, kind, *addresses))
            return True
        return False


def _answer(result: AsyncResult[bool], incumbent: ServerControl, patience: float) -> None:
    try:
        result.set(incumbent.shows_life(patience))
    finally:
        if not result.ready():
            result.set(False)


def _addresses(visitor: Socket) -> Addresses:
    """The visitor's address and the one that it connected to; none where it has left, or came by a Unix socket."""
    if visitor.family == socket.AF_UNIX:
        return ()
    try:
        return format_without_zone(visitor.getpeername()), format_without_zone(visitor.getsockname())
    except OSError:
        return ()
