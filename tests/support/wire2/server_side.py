"""A server of wire v2 that a test leads step by step, for one connection at a time.

Each step is right by itself; a test that wants one wrong passes other bytes, or writes them on `talk`.
"""

from __future__ import annotations

import re
import secrets
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from OpenSSL import SSL

from tests.support.certificates import Certificate
from tests.support.scope import Closes
from tests.support.sockets import PATIENCE, Address, abort
from tests.support.wire2 import lines
from tests.support.wire2.lines import LONGEST, Line
from tests.support.wire2.proofs import PROOF, Agreement
from tests.support.wire2.talk import Rejected, Talk
from tests.support.wire2.tls import server_context

HELLO = re.compile(
    rb"//hello\?v=2&nonce=[0-9a-f]{32}&client=[0-9a-f]{16}&name=[A-Za-z0-9._-]{0,64}(&want=from)?",
)
DATA = re.compile(rb"//data\?sid=[0-9a-f]{32}")


@dataclass(frozen=True)
class Terms:
    """What a server is, and what it offers."""

    tls: int = 0
    certificate: Certificate | None = None
    secret: str = ""
    name: str = ""
    hb: int = 5000
    """Milliseconds between two heartbeats, as they are offered."""
    has_sid: bool = False
    mux: bool = False
    context: SSL.Context | None = None
    """How TLS is done, where it is not as every server with this certificate does it."""

    @property
    def tls_context(self) -> SSL.Context:
        """How TLS is done."""
        assert self.certificate
        return self.context or server_context(self.certificate)


def make_id() -> bytes:
    """The id of a data connection: 8 hex digits."""
    return secrets.token_hex(4).encode()


class ServerSide(Closes):
    """The server's end of one connection, control or data; a context manager that closes it."""

    hello: Line

    def __init__(self, sock: socket.socket, port: int, terms: Terms) -> None:
        """port: the data port that is offered."""
        self.talk = Talk(sock)
        self.terms = terms
        self.port = port
        self.sid = lines.make_nonce() if terms.has_sid or terms.mux else None
        self.agreement = Agreement(terms.secret, terms.name)

    def close(self) -> None:
        self.talk.abort()

    # The negotiation, one step at a time

    def secure(self) -> None:
        """Go on inside TLS 1.3 with the protocol of v2."""
        self.talk.become_server(self.terms.tls_context)
        if not self.talk.secure.alpn:
            raise ConnectionError("TLS without the protocol of v2")
        if self.talk.secure.version != "TLSv1.3":
            self.reject("version")

    def hear_first_line(self) -> Line:
        """The hello, or the line of a data connection; inside TLS, which is asked for, where the terms say so."""
        if self.talk.first_byte() == b"\x16":
            if not self.terms.tls:
                self.reject("no-tls")
            self.secure()
        line = self.talk.hear(longest=LONGEST)
        if line.host == "hello" and self.terms.tls and not self.talk.channel:
            self.talk.say("//tls")
            self.secure()
            line = self.talk.hear(longest=LONGEST)
        return line

    def take_hello(self, line: Line) -> None:
        """Check that a line is a hello to the letter, and keep it."""
        assert HELLO.fullmatch(line.raw), line.raw
        self.hello = line
        self.agreement = replace(self.agreement, hello=line.raw, channel=self.talk.channel)

    def hear_hello(self) -> Line:
        """Everything up to the hello that counts."""
        self.take_hello(self.hear_first_line())
        return self.hello

    def reject(self, token: str) -> None:
        """Say why there will be no offer, and end. Always raises Rejected."""
        self.talk.say(f"//error?reason={token}")
        self.talk.end()
        self.talk.is_ended_by_peer(1)
        raise Rejected(token)

    def challenge(self, line: bytes | None = None) -> None:
        """Ask for a proof."""
        line = line or lines.make("challenge", [("nonce", lines.make_nonce())])
        self.agreement = replace(self.agreement, challenge=line)
        self.talk.say(line)

    def hear_auth(self) -> None:
        """The proof has to come now; raises Rejected, having said so, where it is wrong."""
        line = self.talk.hear(longest=LONGEST)
        assert re.fullmatch(rb"//auth\?mac=[0-9a-f]{64}", line.raw), line.raw
        name = self.hello.parameters["name"]
        if name != self.terms.name or line.parameters["mac"] != self.agreement.client_proof():
            self.reject("key-mismatch")

    def make_offer(self) -> bytes:
        """The right offer, without its proof."""
        terms = self.terms
        return lines.make_offer(self.port, terms.tls, hb=terms.hb, sid=self.sid, mux=terms.mux)

    def offer(self, terms: bytes | None = None, mac: str | None = None) -> None:
        """Offer, rightly unless told otherwise: these terms with their right proof, or with another one."""
        terms = terms or self.make_offer()
        self.agreement = replace(self.agreement, offer=terms)
        if self.terms.secret:
            self.talk.say(lines.with_mac(terms, self.agreement.server_proof() if mac is None else mac))
        else:
            self.talk.say(terms)

    def negotiate(self, hello: Line | None = None) -> None:
        """The whole negotiation; `hello`: it has been heard already."""
        self.take_hello(hello or self.hear_first_line())
        if self.terms.secret:
            self.challenge()
            self.hear_auth()
        elif self.hello.parameters["name"] != self.terms.name:
            self.reject("unknown-name")
        self.offer()

    # Connected

    def beat(self, idle: int = 0) -> None:
        """Send a heartbeat."""
        self.talk.say(f"//beat?idle={idle}")

    def hear_answer(self, timeout: float = PATIENCE) -> bool:
        """The answer to a heartbeat has to come now: whether a target answers."""
        line = self.talk.hear(timeout)
        assert line.raw in (b"//beat?ok=0", b"//beat?ok=1"), line.raw
        return line.parameters["ok"] == "1"

    def launch(self, identity: bytes, kind: int, visitor: str | None = None, local: str | None = None) -> None:
        """Start a session on a data connection; the addresses are said where the client wants them."""
        wanted = kind == 1 and "want" in self.hello.names
        addresses = (("from", visitor), ("to", local)) if wanted else ()
        self.talk.say(lines.make(identity.decode(), addresses, kind))

    # Data connections

    def begin_data(self, sock: socket.socket) -> Talk:
        """A data connection of this client up to its line, where the offer has a sid; right behind TLS where not."""
        talk = Talk(sock)
        if self.terms.tls:
            talk.become_server(self.terms.tls_context)
            assert talk.secure.alpn, "TLS without the protocol of v2"
        if self.sid:
            line = talk.hear(longest=LONGEST)
            assert DATA.fullmatch(line.raw), line.raw
            self.check_sid(line)
        return talk

    def check_sid(self, line: Line) -> None:
        """Raise Rejected where a data connection belongs to something else."""
        if line.parameters.get("sid") != self.sid:
            raise Rejected(f"not our sid: {line.raw!r}")

    def give_id(self, talk: Talk, identity: bytes | None = None, proof: bytes | None = None) -> bytes:
        """Write the id of a data connection, with the right proof where there is a key."""
        identity = identity or make_id()
        if self.terms.secret:
            proof = self.agreement.id_proof(identity, talk.channel) if proof is None else proof
        talk.write(identity + (proof or b""))
        return identity

    def check_proof(self, talk: Talk, identity: bytes) -> None:
        """The client's proof of a data connection has to come now, where there is a key."""
        if not self.terms.secret:
            return
        if talk.receive_exactly(PROOF) != self.agreement.data_proof(identity, talk.channel):
            raise Rejected("the proof of a data connection is wrong")

    def admit(self, sock: socket.socket) -> tuple[bytes, Talk]:
        """Do all of it for a data connection; its id and the connection."""
        talk = self.begin_data(sock)
        identity = self.give_id(talk)
        self.check_proof(talk, identity)
        return identity, talk


@dataclass
class Listener(Closes):
    """A port of the loopback address that a test accepts connections on; a context manager."""

    terms: Terms = Terms()
    host: str = "127.0.0.1"
    accepted: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Listener:
        self._listener = socket.create_server((self.host, 0))
        self._listener.settimeout(PATIENCE)
        self.address: Address = self._listener.getsockname()
        return self

    def close(self) -> None:
        for sock in (self._listener, *self.accepted):
            abort(sock)

    def accept_socket(self, timeout: float = PATIENCE) -> socket.socket:
        """The next connection. Raises TimeoutError."""
        self._listener.settimeout(timeout)
        sock, _ = self._listener.accept()
        sock.settimeout(PATIENCE)
        self.accepted.append(sock)
        return sock

    def has_more(self) -> bool:
        """Whether a connection waits to be accepted."""
        return bool(select.select([self._listener], [], [], 0)[0])

    def accept(self, port: int = 9) -> ServerSide:
        """The server's side of the next connection; `port`: the data port that is offered."""
        return ServerSide(self.accept_socket(), port, self.terms)


Script = Callable[[ServerSide], None]
"""What a server does with a control connection."""
