"""Accepts data connections and prepares each for its pool: TLS, whose it is, an id, and the proofs of the key.

In the usual case (a data port of its own, one tunnel, no TLS, no key) eight bytes are written at the accept, and no
greenlet is needed; nor is one where without TLS and key a line says whose the connection is. Else each is prepared in a
greenlet of its own, so that a silent peer holds up no other. Which client one belongs to is decided by `tunnel_port`.
`control_listener` hands over those that come to the tunnel port.
"""

from __future__ import annotations

import logging
import os
from socket import socket

import gevent

from nodepass.errors import ProtocolError, RefusedError, reason
from nodepass.log import Limit
from nodepass.net.listen import accept_forever
from nodepass.net.sockets import Endpoint, Socket, peek_bytes
from nodepass.net.stream import Stream, TCPStream, recv_exactly
from nodepass.server.client_slot import ClientSlot
from nodepass.server.opening import SILENCE_OF_V1_DATA, Opening
from nodepass.server.pending import PendingConnections
from nodepass.server.tunnel_port import Membership, TunnelPort
from nodepass.stats import failure
from nodepass.tunnel.part import Common, Part
from nodepass.wire.auth import PROOF_LENGTH, same
from nodepass.wire.lines import MAX_OPENING
from nodepass.wire.negotiation import DataHello, parse_first
from nodepass.wire.signals import ID_LENGTH

# Most often the last ones of a client that has just left, which is no reason for a warning.
LEFT_OVER = ("no_client", "unknown_sid")


class DataListener(Part):
    """Fills the pools of a port's tunnels with what their clients dial."""

    def __init__(self, common: Common, port: TunnelPort) -> None:
        super().__init__(common)
        self._port = port
        self._pending = PendingConnections("data", self._log, self._stats)

    def start(self) -> None:
        for listener in self._port.data:
            self._start_loop("accept data connections", self._accept, listener)

    def end_accepting(self) -> None:
        self._end_loops()

    def close(self) -> None:
        super().close()
        self._pending.close()

    def take(self, opening: Opening, sock: Socket, peer: Endpoint, pending: PendingConnections) -> None:
        """Prepare a connection that came to the tunnel port and has said what it is; its pool owns it from then on."""
        self._prepare_within(opening, peer, pending.time_left(sock, self._settings.handshake_timeout))

    def _accept(self, listener: socket) -> None:
        """Accept until the listener is closed."""
        for sock, peer in accept_forever(listener, self._log):
            if self._port.proxies and self._port.proxies.trusts(peer.host):
                self._pending.accept(sock, peer, self._read_header, silence=self._settings.handshake_timeout)
            else:
                self._take_new(sock, peer)

    def _read_header(self, sock: Socket, proxy: Endpoint) -> None:
        """Take a proxy's connection for that of the peer in its header."""
        if peer := self._port.read_header(sock, proxy, self._pending, self._stats.data_failures):
            self._take_new(sock, peer)

    def _take_new(self, sock: Socket, peer: Endpoint) -> None:
        """Serve or reject a connection that has said nothing yet."""
        slot = self._port.only_slot
        if slot and not self._port.certificate:
            self._admit_at_once(sock, peer, slot)
        elif self.take_at_once(sock, peer):
            return  # most clients are here: their line comes with the connection
        elif not self._port.expects(peer):
            self._reject_other(TCPStream(sock), peer)
        elif slot and slot.pool.full:
            self._reject(TCPStream(sock), peer, "pool_full", "the pool is full")
        else:
            may_be_v1 = not self._port.certificate and self._port.find_v1(peer) is not None
            silence = 0.0 if may_be_v1 else self._settings.handshake_timeout
            if not self._pending.turn_away(sock, self._port.data, self._settings.handshake_timeout):
                self._pending.accept(sock, peer, self._serve, may_be_v1, silence=silence, shortcut=self.take_at_once)

    def take_at_once(self, sock: Socket, peer: Endpoint) -> bool:
        """Whether the first bytes of a connection were a line that eight bytes answer, so that it is in its pool now.

        Without TLS and key it needs no greenlet. Whatever else it is, or is wrong with it, is found out in one.
        """
        if self._port.certificate or not (said := peek_bytes(sock, MAX_OPENING)).endswith(b"\n"):
            return False
        try:
            hello = parse_first(said[:-1])
        except ProtocolError:
            return False
        member = self._port.find_sid(hello.sid) if isinstance(hello, DataHello) else None
        if not member or member.agreement.session or not member.slot.is_client(peer) or member.slot.pool.full:
            return False
        try:
            sock.recv(len(said))
        except OSError:
            return False
        self._add(sock, peer, member)
        return True

    def _admit_at_once(self, sock: Socket, peer: Endpoint, slot: ClientSlot) -> None:
        """Without TLS and for one tunnel it is plain whose connection it is, and the server speaks first."""
        member = self._port.membership(slot, peer)
        if not member:
            self._reject_other(TCPStream(sock), peer)
        elif slot.pool.full:
            self._reject(TCPStream(sock), peer, "pool_full", "the pool is full")
        elif member.agreement.session:
            self._pending.accept(sock, peer, self._serve_keyed, member)
        else:
            self._add(sock, peer, member)

    def _add(self, sock: Socket, peer: Endpoint, member: Membership) -> None:
        """Eight bytes into a new connection need neither a wait nor a greenlet."""
        id, stream = _new_id(member.slot), TCPStream(sock)
        try:
            if stream.send(id.encode()):
                raise TimeoutError("it takes no bytes")
        except OSError as error:
            self._reject(stream, peer, failure(error), reason(error), member)
        else:
            self._give(id, stream, peer, member)

    def _serve_keyed(self, sock: Socket, peer: Endpoint, member: Membership) -> None:
        """As `_admit_at_once`, with a key."""
        opening = Opening(sock, None)
        self._prepare_within(opening, peer, self._pending.time_left(sock, self._settings.handshake_timeout), member)

    def _serve(self, sock: Socket, peer: Endpoint, may_be_v1: bool) -> None:
        """Find out what a connection is, and prepare it; `may_be_v1`: a v1 client may have opened it, without TLS."""
        opening, timeout = Opening(sock, self._port.certificate), self._settings.handshake_timeout
        try:
            with gevent.Timeout(self._pending.time_left(sock, timeout), _late(timeout)):
                if may_be_v1:
                    opening.wait(SILENCE_OF_V1_DATA)
                opening.read(has_line=self._port.uses_sid)
                if opening.is_silent and not may_be_v1:
                    raise _late(timeout)
        except OSError as error:
            why = "tls" if isinstance(error, RefusedError) else failure(error)  # such a peer is told nothing here
            self._reject(opening.stream, peer, why, reason(error))
        except BaseException:
            opening.stream.close()
            raise
        else:
            self._prepare_within(opening, peer, self._pending.time_left(sock, timeout))

    def _prepare_within(
        self, opening: Opening, peer: Endpoint, seconds: float, member: Membership | None = None
    ) -> None:
        """Write the id, exchange the proofs of the key, and give the connection to the pool."""
        stream = opening.stream
        try:
            with gevent.Timeout(seconds, _late(self._settings.handshake_timeout)):
                member = member or self._find_member(opening, peer)
                id = self._prepare(stream, member)
        except RefusedError as error:
            self._reject(stream, peer, error.reason, str(error), member)
        except OSError as error:
            self._reject(stream, peer, failure(error), reason(error), member)
        except BaseException:
            stream.close()
            raise
        else:
            self._give(id, stream, peer, member)

    def _find_member(self, opening: Opening, peer: Endpoint) -> Membership:
        """Whose connection it is. Raises RefusedError, with one of DATA_FAILURES, where it is no client's."""
        if isinstance(opening.said, DataHello):
            member = self._port.find_sid(opening.said.sid)
            if not member:
                raise RefusedError("unknown_sid", "its sid is not a connected client's")
            if not member.agreement.session and not member.slot.is_client(peer):
                raise RefusedError("wrong_address", "not from the connected client's address")
        elif opening.said:
            raise ProtocolError("a hello at the data port")
        elif opening.version == 1:
            member = self._port.find_v1(peer) if opening.secured == bool(self._port.certificate) else None
        else:
            slot = self._port.only_slot
            agreement = slot.agreement_with(peer) if slot else None
            member = Membership(slot, agreement) if slot and agreement and agreement.version == 2 else None
        if not member:
            raise RefusedError("no_client", "no client is connected that it could belong to")
        if member.slot.pool.full:
            raise RefusedError("pool_full", "the pool is full")
        return member

    def _prepare(self, stream: Stream, member: Membership) -> str:
        """The id of a connection that is ready. Raises OSError."""
        id, session = _new_id(member.slot), member.agreement.session
        if not session:
            stream.write(id.encode())
            return id
        channel = stream.exporter()
        stream.write(id.encode() + session.id_proof(id, channel))
        verify_proof(recv_exactly(stream, PROOF_LENGTH), session.data_proof(id, channel))
        return id

    def _give(self, id: str, stream: Stream, peer: Endpoint, member: Membership) -> None:
        """To the pool, unless the client has changed or others have filled the pool meanwhile."""
        if not member.holds():
            self._reject(stream, peer, "no_client", "its client has left meanwhile", member)
        elif member.slot.pool.full:
            self._reject(stream, peer, "pool_full", "the pool is full", member)
        else:
            member.slot.pool.add(id, stream)

    def _reject_other(self, stream: Stream, peer: Endpoint) -> None:
        if any(slot.control for slot in self._port.slots):
            self._reject(stream, peer, "wrong_address", "not from the connected client's address")
        else:
            self._reject(stream, peer, "no_client", "no client is connected")

    def _reject(self, stream: Stream, peer: Endpoint, why: str, because: str, member: Membership | None = None) -> None:
        """Close it, counted and logged with the tunnel that it is for, as far as that is known."""
        common = member.slot.common if member else self.common
        common.stats.data_failures[why] += 1
        level = logging.DEBUG if why in LEFT_OVER else logging.WARNING
        words = "rejected data connection from %(peer)s: %(error)s"
        common.log.log(level, "data.rejected", words, Limit(why), peer=peer, reason=why, error=because)
        stream.close()


def _new_id(slot: ClientSlot) -> str:
    while (id := os.urandom(ID_LENGTH // 2).hex()) in slot.pool:
        pass
    return id


def _late(seconds: float) -> TimeoutError:
    return TimeoutError(f"not ready within {seconds:g}s")


def verify_proof(proof: bytes, expected: bytes) -> None:
    """Raise ProtocolError where a data connection's proof of the key is wrong."""
    if not same(proof, expected):
        raise ProtocolError("wrong proof of the key")
