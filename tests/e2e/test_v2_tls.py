"""TLS of wire v2 beyond the handshake: what binds a connection to it, its end, and sessions that are resumed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import pytest
from OpenSSL import SSL
from OpenSSL._util import lib

from tests.support.certificates import Authority, Certificate
from tests.support.log import loud
from tests.support.process import Environment
from tests.support.sockets import until
from tests.support.tunnel import CALM, OurServer
from tests.support.wire2 import client_hello
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.ours import OurClients, OurServers
from tests.support.wire2.proofs import SECRET
from tests.support.wire2.server_side import Listener, ServerSide, Terms
from tests.support.wire2.stage import attached
from tests.support.wire2.talk import Talk
from tests.support.wire2.tls import make_server_context

KEYED: Environment = {**CALM, "TUNNEL_KEY": SECRET}
DIALS = 6
"""Data connections looked at for each control connection: more than are dialled at once."""


# Our server


@pytest.fixture(scope="module")
def servers(authority: Authority) -> Iterator[OurServers]:
    queries = {"a": "tls=1&name=a", "b": "tls=1&name=b"}
    with OurServers(queries, authority.local, env=KEYED) as running:
        yield running
        assert not running.find_crashes()


@contextlib.contextmanager
def led(servers: OurServers, label: str) -> Iterator[ClientSide]:
    with ClientSide(servers[label].tunnel, secret=SECRET, name=label, demand=1, identity="0" * 16) as client:
        client.connect()
        yield client


def session_of(talk: Talk) -> SSL.Session:
    """What may be resumed, once the tickets behind the handshake have come."""
    with contextlib.suppress(TimeoutError):
        talk.hear(timeout=0.1)
    session = talk.secure.session()
    assert session
    return session


def test_an_end_without_close_notify_is_a_lost_connection(servers: OurServers) -> None:
    with led(servers, "a") as client:
        mark = servers.mark()
        client.talk.sock.shutdown(2)
        lost = servers.wait_in("a", "client.disconnected", after=mark, reason="failed")
        assert re.search("(?i)close.notify|cut|TLS", lost["error"])
    with led(servers, "a") as client:
        mark = servers.mark()
        client.talk.end()
        servers.wait_in("a", "client.disconnected", after=mark, reason="closed")


def test_a_data_connection_may_resume_and_has_an_exporter_of_its_own(servers: OurServers) -> None:
    with led(servers, "a") as client:
        session = session_of(client.talk)
        _, resumed = client.open_data(session=session)
        assert resumed.channel != client.talk.channel
        assert resumed.is_silent(0.05), "the right proof was refused"
        _, wrong = client.open_data(
            lambda identity, _: client.prove(identity, client.talk.channel),
            session=session,
        )
        assert wrong.rest() == b""


@pytest.mark.parametrize("other", ["b", "a"], ids=["another tunnel", "an earlier control connection"])
def test_a_session_of_something_else_proves_nothing(servers: OurServers, other: str) -> None:
    """It may be resumed or not: what counts are the proofs, which are bound to each connection's own exporter."""
    with led(servers, "a") as earlier:
        session, agreed = session_of(earlier.talk), earlier.agreement
        if other == "b":
            earlier.open_data()
    with led(servers, "b") as client:
        client.agreement = agreed
        with pytest.raises(ConnectionError):
            client.open_data(session=session)
    with ClientSide(servers["b"].tunnel, secret=SECRET, name="b") as client:
        client.dial()
        client.secure(session=session)
        client.say_hello()
        client.hear_challenge()
        client.authenticate(agreed.client_proof())
        assert client.talk.rejection() == "key-mismatch"


def test_every_handshake_has_its_own_exporter(servers: OurServers) -> None:
    channels = set()
    for _ in range(3):
        with led(servers, "a") as client:
            channels.add(client.talk.channel)
            channels.update(client.open_data()[1].channel for _ in range(2))
    assert len(channels) == 9


def test_early_data_is_not_offered_by_our_server(servers: OurServers) -> None:
    """A ticket that allowed it would say so."""
    with led(servers, "a") as client:
        session = session_of(client.talk)
        assert max_early_data(session) == 0


def max_early_data(session: SSL.Session) -> int:
    """Bytes of early data that a ticket allows."""
    return int(lib.SSL_SESSION_get_max_early_data(session._session))


# Our client


def dials(side: ServerSide, data: Listener) -> Iterator[tuple[client_hello.ClientHello, Talk]]:
    """Data connections of our client: what each shows on the path, and the connection once it is admitted.

    What is left of an earlier control connection's ends before that.
    """
    while True:
        sock = data.accept_socket()
        try:
            shown = client_hello.peek(sock)
            _, talk = side.admit(sock)
        except ConnectionError:
            continue
        yield shown, talk


def fresh(certificate: Certificate, terms: Terms) -> Terms:
    """The same terms with a TLS context of its own, so that it resumes its own sessions only."""
    return Terms(terms.tls, certificate, terms.secret, terms.name, terms.hb, context=make_server_context(certificate))


@pytest.mark.parametrize(
    ("tls", "secret"), [(1, SECRET), pytest.param(2, "", marks=pytest.mark.programs)], ids=["with a key", "verified"]
)
def test_our_client_resumes_sessions_of_its_own_control_connection_only(
    authority: Authority, tls: int, secret: str
) -> None:
    """Each control connection of this server can resume its own sessions only: whatever else is offered shows up as
    an offer that was not taken.
    """
    env: Environment = {**CALM, "SSL_CERT_FILE": str(authority.crt), **({"TUNNEL_KEY": secret} if secret else {})}
    terms = Terms(tls, authority.local, secret)
    with (
        Listener(terms) as tunnel,
        Listener(terms) as data,
        OurClients({"": (tunnel.address, f"tls={tls}")}, env=env) as clients,
    ):
        resumed = 0
        for _ in range(3):
            tunnel.terms = fresh(authority.local, terms)
            sock = tunnel.accept_socket()
            assert not client_hello.peek(sock).offers_session, "the control connection was not a full handshake"
            with ServerSide(sock, data.address[1], tunnel.terms) as side:
                side.negotiate()
                side.beat()
                side.hear_answer()
                for shown, talk in (pair for pair, _ in zip(dials(side, data), range(DIALS), strict=False)):
                    assert not shown.has_early_data
                    assert shown.psk_modes in (b"", client_hello.PSK_WITH_KEY_EXCHANGE)
                    assert shown.offers_session == talk.secure.is_resumed, "it offered a session of something else"
                    resumed += shown.offers_session
            while data.has_more():
                data.accept_socket().close()
        clients.wait_for("server.disconnected")
        assert resumed, "nothing was resumed: this test sees nothing"
        assert not clients.find_crashes()


@pytest.mark.programs
def test_our_client_with_two_tunnels_never_takes_a_session_of_the_other(authority: Authority) -> None:
    terms = {label: fresh(authority.local, Terms(1, secret=SECRET, name=label)) for label in ("a", "b")}
    with contextlib.ExitStack() as stack:
        tunnels = {label: stack.enter_context(Listener(each)) for label, each in terms.items()}
        data = {label: stack.enter_context(Listener(each)) for label, each in terms.items()}
        where = {label: (tunnels[label].address, f"name={label}") for label in terms}
        stack.enter_context(OurClients(where, env=KEYED))
        sides = {label: stack.enter_context(tunnels[label].accept(data[label].address[1])) for label in terms}
        for side in sides.values():
            side.negotiate()
            side.beat()
            side.hear_answer()
        for label, side in sides.items():
            for shown, talk in (pair for pair, _ in zip(dials(side, data[label]), range(DIALS), strict=False)):
                assert shown.offers_session == talk.secure.is_resumed, "it offered a session of the other tunnel"


@pytest.mark.programs
def test_an_unverified_session_is_never_resumed_where_verification_is_demanded(authority: Authority) -> None:
    """A resumed handshake verifies nothing: the data connection below would pass with any certificate."""
    env: Environment = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    wrong = authority.issue("elsewhere.example")
    with attached(Terms(2, authority.local), "tls=2", env) as (side, data, clients):
        side.terms = fresh(wrong, side.terms)
        for _ in range(3):
            with pytest.raises(ConnectionError):
                side.admit(data.accept_socket())
        clients.wait_for("data.dial_failed", level="error", check="name")


@pytest.mark.programs
def test_a_certificate_that_does_not_verify_is_refused_with_tls_2(authority: Authority) -> None:
    """Demanded, in the handshake; adopted, when the offer is read: nothing is dialled before."""
    env: Environment = {**CALM, "SSL_CERT_FILE": str(authority.crt)}
    wrong = authority.issue("elsewhere.example")
    terms = Terms(2, wrong)
    with (
        Listener(terms) as demanded,
        Listener(terms) as adopted,
        Listener() as data,
        OurClients({"d": (demanded.address, "tls=2"), "a": (adopted.address, "")}, env=env) as clients,
    ):
        with demanded.accept() as side, pytest.raises(ConnectionError):
            side.negotiate()
        with adopted.accept(data.address[1]) as side:
            side.negotiate()
            with contextlib.suppress(ConnectionError):
                assert side.talk.rest() == b"//bye?reason=certificate\n"
        for label in ("d", "a"):
            entry = clients.wait_in(label, level=loud, server=lambda _: True)
            assert re.search("(?i)certificate|name|valid for", entry["error"]), entry
        assert not clients.find("server.connected")
        assert not data.has_more()


@pytest.mark.programs
def test_any_certificate_is_taken_with_tls_1(authority: Authority) -> None:
    with attached(Terms(1, authority.issue("elsewhere.example")), "tls=1") as (side, data, clients):
        side.admit(data.accept_socket())
        clients.wait_for("server.connected", tls=1)


def test_our_two_ends_resume_and_go_on(authority: Authority) -> None:
    """Which sessions are resumed is for the tests above; here it must only harm nothing."""
    with OurServer(1, authority.local, env=CALM) as server:
        where = {"": (server.tunnel_address, "tls=1")}
        with OurClients(where, env=CALM) as clients:
            clients.wait_for("server.connected", wire=2)
            until(lambda: len(server.find("pool.added")) >= DIALS)
            assert not clients.find("data.dial_failed")
