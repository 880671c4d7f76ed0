"""Accepts connections to the tunnel port, and serves each that becomes the control connection of a client.

Each pending connection has a greenlet of its own once it has spoken, or may be wire v1. It finds out what the
connection is (`opening`), shakes hands, and stays with the client that is admitted until it is gone. Data connections
are handed to `data_listener`. Which tunnel a client is for is decided by `tunnel_port`, which client is admitted by
`clients`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from socket import socket

import gevent

from nodepass.errors import CertificateRefusedError, OtherProtocolError, ProtocolError, RefusedError, reason
from nodepass.log import Limit, Log
from nodepass.net.listen import accept_forever
from nodepass.net.sockets import Endpoint, Socket, peek_byte
from nodepass.net.stream import Stream, close_gently
from nodepass.server.client_slot import ClientSlot
from nodepass.server.data_listener import DataListener
from nodepass.server.opening import SILENCE_OF_V1_DATA, Opening
from nodepass.server.pending import PendingConnections
from nodepass.server.tunnel_port import TunnelPort
from nodepass.stats import failure
from nodepass.tunnel.control import STOPPING, Agreement, ServerControl
from nodepass.tunnel.handshake import Candidate, accept_client
from nodepass.tunnel.part import Common, Part
from nodepass.wire.negotiation import BUSY, KEY_REQUIRED, SLASH, TLS_HANDSHAKE, VERSION, DataHello, Hello, Refusal
from nodepass.wire.signals import CERTIFICATE

# Seconds of silence after which a connection is one of wire v1.
SILENCE = 0.25
SILENCE_AFTER_LATE_HELLO = 2.0  # where one from the same address was taken for v1 too early

RARELY = 600.0  # seconds between two lines about the same mistake, which is repeated until it is corrected

_CHECK = "a check (nodepass --check)"
_SPOKEN = (SLASH, TLS_HANDSHAKE)  # first bytes of wire v2


class ControlListener(Part):
    """Accepts for all tunnels of a port."""

    def __init__(self, common: Common, port: TunnelPort, data_listener: DataListener) -> None:
        super().__init__(common)
        self._port = port
        self._data_listener = data_listener
        self._pending = PendingConnections("tunnel", self._log, self._stats)

    def start(self) -> None:
        for listener in self._port.tunnel:
            self._start_loop("accept clients", self._accept, listener)

    def end_accepting(self) -> None:
        self._end_loops()

    def close(self) -> None:
        super().close()
        self._pending.close()

    def _accept(self, listener: socket) -> None:
        """Accept until the listener is closed."""
        for sock, peer in accept_forever(listener, self._log):
            if self._port.proxies and self._port.proxies.trusts(peer.host):
                self._pending.accept(sock, peer, self._read_header, silence=self._settings.handshake_timeout)
            else:
                self._take(sock, peer)

    def _read_header(self, sock: Socket, proxy: Endpoint) -> None:
        """Take a proxy's connection for that of the peer in its header."""
        if peer := self._port.read_header(sock, proxy, self._pending, self._stats.control_failures):
            self._take(sock, peer)

    def _take(self, sock: Socket, peer: Endpoint) -> None:
        shortcut = self._data_listener.take_at_once if self._port.mux else None
        if shortcut and shortcut(sock, peer):
            return
        if not self._pending.turn_away(sock, self._port.tunnel, self._settings.handshake_timeout):
            self._pending.accept(sock, peer, self._serve, silence=self._patience(peer), shortcut=shortcut)

    def _patience(self, peer: Endpoint) -> float:
        """Seconds for which a connection may be silent before its greenlet begins."""
        if self._may_be_v1_data(peer):
            return 0.0
        if not self._port.v1_slot:
            return self._settings.handshake_timeout
        patience = SILENCE_AFTER_LATE_HELLO if self._port.was_late(peer) else SILENCE
        return min(patience, self._settings.handshake_timeout)

    def _may_be_v1_data(self, peer: Endpoint) -> bool:
        """Whether silence is a v1 client's data connection."""
        return self._port.mux and not self._port.certificate and self._port.find_v1(peer) is not None

    def _serve(self, sock: Socket, peer: Endpoint) -> None:
        """One connection, until it is handed over or ends."""
        opening = Opening(sock, self._port.certificate)
        try:
            self._open(opening, sock, peer)
        except RefusedError as error:
            self._reject(opening, peer, error)
        except OSError as error:
            common = self._common_of(opening)
            common.stats.control_failures[failure(error)] += 1
            _report_failure(common.log, error, peer)
            opening.stream.close()
        except BaseException:
            opening.stream.close()
            raise

    def _open(self, opening: Opening, sock: Socket, peer: Endpoint) -> None:
        """Find out what a connection is, and serve it. Raises OSError, RefusedError among them."""
        with self._deadline(sock) as deadline:
            if self._may_be_v1_data(peer):
                opening.wait(SILENCE_OF_V1_DATA)
            opening.read()
            if isinstance(opening.said, Hello):
                self._shake_hands(opening, sock, peer, opening.said, deadline)
                return
        if isinstance(opening.said, DataHello) or (self._port.mux and opening.secured) or self._may_be_v1_data(peer):
            self._data_listener.take(opening, sock, peer, self._pending)
        elif opening.secured:
            raise ProtocolError("TLS without ALPN, and no v1 client sends its data connections here")
        elif slot := self._port.v1_slot:
            self._try_v1(opening, sock, slot, peer)
        else:
            timeout = self._settings.handshake_timeout
            raise RefusedError(KEY_REQUIRED, f"no hello within {timeout:.3g}s (wire v1, or a silent peer)")

    @contextlib.contextmanager
    def _deadline(self, sock: Socket) -> Iterator[gevent.Timeout]:
        """HANDSHAKE_TIMEOUT, from the accept on; a client that must prove a key and does not is refused."""
        timeout = self._settings.handshake_timeout
        left = self._pending.time_left(sock, timeout)
        with gevent.Timeout(left) as deadline:
            try:
                yield deadline
            except gevent.Timeout as late:
                if late is not deadline:
                    raise
                if self._port.v1_slot:
                    raise TimeoutError(f"no handshake within {timeout:.3g}s") from None
                raise RefusedError(KEY_REQUIRED, f"no handshake within {timeout:.3g}s") from None

    def _shake_hands(
        self, opening: Opening, sock: Socket, peer: Endpoint, hello: Hello, deadline: gevent.Timeout
    ) -> None:
        """A v2 client: admit it, and stay with it. Raises OSError, RefusedError among them."""
        if hello.version != "2":
            raise RefusedError(VERSION, f"unsupported wire version {hello.version[:8]!r}; this server supports 1 and 2")
        clients = self._port.find(hello)
        control = self._control(opening.stream, peer, clients)
        slot = None

        @contextlib.contextmanager
        def admission(candidate: Candidate) -> Iterator[None]:
            nonlocal slot
            assert clients, "an unknown tunnel's key cannot be proven"
            try:
                with clients.admission(candidate) as slot:
                    deadline.close()  # the place is free now, so what is left is not to be cut in two
                    yield
            except gevent.Timeout as late:
                if late is not deadline:
                    raise
                raise RefusedError(BUSY, "it is still being found out whether another client is alive") from None

        keys = self._port.keys_of(clients)
        try:
            accept_client(control, hello, opening.line, keys, self._port.offer(2, clients), admission)
        except RefusedError as error:
            if clients:
                raise
            raise RefusedError(error.reason, f"there is no tunnel {hello.name!r} at this port") from None
        assert slot
        self._pending.release(sock)
        self._stay_with(control, slot)

    def _common_of(self, opening: Opening) -> Common:
        """That of the tunnel that a client has asked for, else the port's."""
        clients = self._port.named(opening.said.name) if isinstance(opening.said, Hello) else None
        return clients.common if clients else self.common

    def _control(self, stream: Stream, peer: Endpoint, part: Part | None) -> ServerControl:
        """On a tunnel's connection; `part`: of that tunnel."""
        common = part.common if part else self.common
        settings = common.settings
        control = ServerControl(stream, settings.report_interval, common.log, common.stats, settings.keepalive)
        control.set_peer(peer)
        return control

    def _try_v1(self, opening: Opening, sock: Socket, slot: ClientSlot, peer: Endpoint) -> None:
        """A v1 client: it gets its line, and is the client from its first data connection on."""
        control = self._control(opening.stream, peer, slot)
        left = self._pending.time_left(sock, self._settings.handshake_timeout)
        offer = self._port.offer(1, slot)
        with slot.trial(control, control.agree(Agreement(offer))) as trial:
            control.send(offer)
            is_client = trial.wait(left)
        if is_client:
            self._pending.release(sock)
            self._stay_with(control, slot)
            return
        first = peek_byte(sock)
        if first in _SPOKEN:
            self._port.remember_late_hello(peer)
        did = "opened no data connection" if first is None else "left" if first < 0 else "began to speak"
        slot.common.stats.control_failures["silent"] += 1
        words = "control handshake failed: %(error)s"
        error = f"it was silent, as clients of wire v1 are, and then {did}"
        slot.common.log.debug("client.handshake_failed", words, reason="silent", error=error, client=peer)
        close_gently(control.stream)  # a reset, which unread bytes cause, does not pass every proxy

    def _stay_with(self, control: ServerControl, slot: ClientSlot) -> None:
        """Serve the client that is connected now until it is gone."""
        log, stats = slot.common.log, slot.common.stats
        stats.reconnects += bool(stats.connects)
        stats.connects += 1
        is_check = bool(control.agreement and control.agreement.is_check)
        words = "client connected from %(client)s: wire v%(wire)d" + f", {_CHECK}" * is_check
        log.info("client.connected", words, Limit(), client=control.peer, wire=control.version)
        slot.on_client()
        beat = slot.common.loops.spawn("send heartbeats", control.beat, slot.pool.__len__)
        try:
            if control.version > 1:
                control.wait_until_ended()
            elif control.wait_for_byte() in _SPOKEN:
                self._port.remember_late_hello(control.endpoint)
        finally:
            beat.kill(block=False)
            slot.release(control, STOPPING)
            ending = control.ending
            words = "client disconnected: %(error)s (%(client)s)"
            why, because = ending.reason, ending.words
            log.info("client.disconnected", words, Limit(), client=control.peer, reason=why, error=because)
            if why == CERTIFICATE:
                _report_certificate(log, control.peer, because)
            control.close(ending)

    def _reject(self, opening: Opening, peer: Endpoint, error: RefusedError) -> None:
        """Count, log and tell the peer why, where it can read that."""
        common = self._common_of(opening)
        common.stats.control_failures[why := failure(error)] += 1
        if error.reason == BUSY and isinstance(opening.said, Hello) and opening.said.is_check:
            words = f"%(client)s is {_CHECK}: %(error)s"
            common.log.info("client.checked", words, Limit(), client=peer, error=error)
        else:
            words = "rejected client %(client)s: %(error)s"
            common.log.warning("client.rejected", words, Limit(), client=peer, reason=why, error=error)
        stream = opening.stream
        try:
            with contextlib.suppress(OSError):  # it has been counted already
                if opening.may_be_told:
                    stream.write(Refusal(error.reason).encode())
                    close_gently(stream)
        finally:
            stream.close()


def _report_failure(log: Log, error: OSError, peer: Endpoint) -> None:
    """Log a failed handshake: at debug, unless the operator can do something about it."""
    if isinstance(error, OtherProtocolError):
        limit = Limit(error.protocol, RARELY, 1)
        log.warning("client.other_protocol", "%(client)s: %(error)s", limit, client=peer, error=error)
    elif isinstance(error, CertificateRefusedError):
        _report_certificate(log, peer, str(error))
    else:
        words = "control handshake failed: %(error)s"
        log.debug("client.handshake_failed", words, reason=failure(error), error=reason(error), client=peer)


def _report_certificate(log: Log, peer: object, error: str) -> None:
    words = "%(client)s: %(error)s"
    log.warning("client.certificate_refused", words, Limit(seconds=RARELY, burst=1), client=peer, error=error)
