"""The scripted v2 peers of `support` against the test vector of the wire and against each other: what other tests
measure the program with is itself good.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from OpenSSL import SSL

from tests.support.certificates import Authority
from tests.support.sockets import datagram_socket, until
from tests.support.table import each_row
from tests.support.target import Target
from tests.support.tunnel import Tunnel, assert_arrives, assert_half_closes_pass
from tests.support.wire2 import lines
from tests.support.wire2.client import V2Client
from tests.support.wire2.client_side import ClientSide
from tests.support.wire2.lane import LARGEST, Lane, make_announcement, make_frame
from tests.support.wire2.proofs import SECRET, Agreement, stretch
from tests.support.wire2.server import V2Server
from tests.support.wire2.server_side import Listener, Script, ServerSide, Terms
from tests.support.wire2.talk import EndedError, Rejected
from tests.support.wire2.tls import InTheClearError, client_context

VECTOR = Agreement(
    SECRET,
    "web",
    b"//hello?v=2&nonce=000102030405060708090a0b0c0d0e0f&client=0011223344556677&name=web&want=from",
    b"//challenge?nonce=f0e0d0c0b0a090807060504030201000",
    bytes(range(0x20, 0x40)).hex(),
    b"//10101?v=2&hb=5000&sid=00112233445566778899aabbccddeeff&mux=1#1",
)
DATA_CHANNEL = bytes(range(0x40, 0x60)).hex()


def test_the_peers_compute_the_test_vector() -> None:
    assert stretch(SECRET, "web").hex() == "b464f9db88965abb82b271ae7b7987b3daee0e4f4ea4e655e72ed89d5445956e"
    assert VECTOR.client_proof() == "5572dd7349a8421780c3d14cd38cffc4d8cb13119b36d032878e36b4602ce066"
    assert VECTOR.server_proof() == "a41fe8d28884785ddac92f540be9fe08effa5cc7cf7be5531e2865767431b8b4"
    assert VECTOR.session_key().hex() == "2f64196637a699b36f860923fa7a5517e0cc81cd71632d76eb6d81c6ed71baba"
    id_proof, data_proof = (prove(b"deadbeef", DATA_CHANNEL) for prove in (VECTOR.id_proof, VECTOR.data_proof))
    assert id_proof.hex() == "34d2d74d30df9d4a9fca531cee0f268b2f99ea001c1b96a000a0f30102b3b65b"
    assert data_proof.hex() == "e0847ecf7bc3be8bc2ffd52bd23efc7b82f43ddae137f4d2cf0a7b2dd96905f5"


def test_the_lines_of_the_test_vector_can_be_made_and_taken_apart() -> None:
    hello = lines.make_hello("000102030405060708090a0b0c0d0e0f", "0011223344556677", "web", wants=True)
    assert hello == VECTOR.hello
    offer = lines.make_offer(10101, 1, sid="00112233445566778899aabbccddeeff", mux=True)
    assert offer == VECTOR.offer
    whole = lines.parse(lines.with_mac(offer, "ab" * 32))
    assert whole.names == ["v", "hb", "sid", "mux", "mac"]
    assert (whole.host, whole.fragment, whole.parameters["mac"]) == ("10101", "1", "ab" * 32)
    assert whole.without_mac == offer
    assert lines.parse(b"//x?a=1&a=2&b").parameters == {"a": "1", "b": ""}


@each_row("raw", [b"//x y", b"//x\r", b"//\xc3\xa9", b"x", b"/x", b"//" + b"x" * 510])
def test_what_is_no_line_is_not_taken_apart(raw: bytes) -> None:
    with pytest.raises(AssertionError):
        lines.parse(raw)


def test_frames_and_announcements_are_in_network_order() -> None:
    assert make_frame(1, b"") == bytes.fromhex("00000001 0000")
    assert make_frame(0x01020304, b"xyz") == bytes.fromhex("01020304 0003") + b"xyz"
    assert make_announcement(2, "from=a") == bytes.fromhex("00000002 ffff 0006") + b"from=a"


KINDS: dict[str, tuple[Terms, int]] = {
    "plain": (Terms(), 0),
    "key in the clear": (Terms(secret=SECRET), 0),
    "asked for TLS": (Terms(1), 0),
    "TLS first, key, name": (Terms(1, secret=SECRET, name="web"), 1),
    "verified": (Terms(2), 2),
    "one port": (Terms(mux=True), 0),
    "one port, TLS, key": (Terms(1, secret=SECRET, mux=True), 1),
    "sid, verified, key": (Terms(2, secret=SECRET, has_sid=True), 2),
}


@contextlib.contextmanager
def peers_of(terms: Terms, demand: int, authority: Authority, pool: int = 4) -> Iterator[Tunnel]:
    """A tunnel of two v2 peers."""
    with (
        Target() as target,
        V2Server(
            terms.tls,
            authority.local,
            secret=terms.secret,
            name=terms.name,
            has_sid=terms.has_sid,
            mux=terms.mux,
        ) as server,
        V2Client(
            server.tunnel_address,
            target.address,
            secret=terms.secret,
            name=terms.name,
            demand=demand,
            cafile=authority.crt if terms.tls == 2 else None,
            wants=terms.mux,
            pool=pool,
        ) as client,
    ):
        client.wait_until_full()
        yield Tunnel(server, client, target)


@pytest.fixture(scope="module", params=KINDS)
def peers(request: pytest.FixtureRequest, authority: Authority) -> Iterator[Tunnel]:
    """A tunnel of two v2 peers of every kind."""
    with peers_of(*KINDS[request.param], authority) as tunnel:
        yield tunnel


def test_v2_peers_carry_more_sessions_than_their_pool_holds(peers: Tunnel) -> None:
    for _ in range(8):
        peers.assert_works()


def test_v2_peers_pass_a_half_close(peers: Tunnel) -> None:
    with peers.session() as (visitor, service):
        assert_half_closes_pass(visitor, service)


def test_v2_peers_carry_a_megabyte_unharmed(peers: Tunnel) -> None:
    with peers.session() as (visitor, service):
        assert_arrives(bytes(range(256)) * (4 << 10), visitor, service)


def test_v2_peers_carry_datagrams_of_any_size(peers: Tunnel) -> None:
    for size in (1, 5000, LARGEST):
        question, answer = b"q" * size, b"a" * size
        assert peers.exchange(question, answer) == (question, answer)
    assert peers.exchange(b"", b"") == (b"", b"")


def test_v2_peers_answer_heartbeats(peers: Tunnel) -> None:
    server = peers.server
    assert isinstance(server, V2Server)
    before = server.answers
    until(lambda: server.answers > before)


def test_a_v2_server_tells_addresses_to_a_client_that_wants_them(authority: Authority) -> None:
    with peers_of(Terms(mux=True), 0, authority) as tunnel:
        with tunnel.session() as (visitor, _):
            host, port = visitor.getsockname()
        assert isinstance(tunnel.client, V2Client)
        (launch,) = tunnel.client.launches
        assert launch.parameters["from"] == f"{host}:{port}"


def test_a_flow_may_be_announced() -> None:
    left, right = socket.socketpair()
    with left, right:
        lane = Lane(_Pair(left))
        right.sendall(make_announcement(3, "from=127.0.0.1:1&to=127.0.0.1:2") + make_frame(3, b"x"))
        assert lane.receive() == (3, b"x")
        assert lane.announced == {3: "from=127.0.0.1:1&to=127.0.0.1:2"}


class _Pair:
    """As much of a stream as a lane reads."""

    def __init__(self, sock: socket.socket) -> None:
        self.recv, self.send = sock.recv, sock.sendall
        self.end = self.abort = lambda: None
        self.is_readable = self.is_ended = lambda: False


def test_a_second_v2_client_is_rejected_as_busy(authority: Authority) -> None:
    with peers_of(Terms(), 0, authority) as tunnel, datagram_socket():
        address = tunnel.v1_server.tunnel_address
        with ClientSide(address) as second, pytest.raises(Rejected, match="busy"):
            second.connect()


# Led by hand: every lie is found out by the other side


Play = Callable[[ClientSide], None]


@contextlib.contextmanager
def stage(terms: Terms, script: Script, raises: str = "") -> Iterator[ClientSide]:
    """A led client whose server follows a script in a thread; what the script raises is raised here.

    raises: what a ConnectionError says that the script has to raise.
    """
    raised: list[BaseException] = []

    def play() -> None:
        try:
            with listener.accept() as side:
                script(side)
        except (OSError, AssertionError) as error:
            raised.append(error)

    with Listener(terms) as listener:
        thread = threading.Thread(target=play)
        thread.start()
        try:
            demand = 1 if terms.secret and terms.tls else 0
            with ClientSide(listener.address, secret=terms.secret, name=terms.name, demand=demand) as client:
                yield client
        finally:
            thread.join(10)
    if raises:
        with pytest.raises(ConnectionError, match=raises):
            raise raised.pop()
    for error in raised:
        raise error


CHANGES: dict[str, Callable[[ServerSide], bytes]] = {
    "another port": lambda side: lines.make_offer(side.port + 1, side.terms.tls),
    "another heartbeat": lambda side: lines.make_offer(side.port, side.terms.tls, hb=60000),
    "a sid": lambda side: lines.make_offer(side.port, side.terms.tls, sid="0" * 32),
    "one port": lambda side: lines.make_offer(side.port, side.terms.tls, mux=True),
}


@each_row("change", CHANGES)
@each_row("tls", [0, 1])
def test_an_offer_that_is_not_what_was_proven_is_found_out(authority: Authority, change: str, tls: int) -> None:
    def lie(side: ServerSide) -> None:
        side.hear_hello()
        side.challenge()
        side.hear_auth()
        right = replace(side.agreement, offer=side.make_offer())
        side.offer(CHANGES[change](side), right.server_proof())
        side.talk.rest()

    with stage(Terms(tls, authority.local, SECRET), lie) as client, pytest.raises(Rejected, match="proof is wrong"):
        client.connect()


def lie_about(**changes: str) -> Play:
    """A client whose proof is of something else."""

    def play(client: ClientSide) -> None:
        client.begin()
        client.hear_challenge()
        client.authenticate(replace(client.agreement, **changes).client_proof())  # type: ignore[arg-type]
        assert client.talk.rejection() == "key-mismatch"

    return play


@pytest.mark.parametrize("changes", [{"secret": "x" * 22}, {"name": "db"}, {"channel": "00" * 32}], ids=str)
def test_a_client_s_proof_of_something_else_is_found_out(authority: Authority, changes: dict[str, str]) -> None:
    terms = Terms(1, authority.local, SECRET, "web")
    with stage(terms, ServerSide.negotiate, raises="key-mismatch") as client:
        lie_about(**changes)(client)


def test_a_name_that_the_server_does_not_have_is_found_out() -> None:
    with stage(Terms(name="web"), ServerSide.negotiate, raises="unknown-name") as client:
        client.name = "db"
        with pytest.raises(Rejected, match="unknown-name"):
            client.connect()


def test_a_wrong_id_proof_is_found_out_by_the_client(authority: Authority) -> None:
    with Listener() as data:

        def lie(side: ServerSide) -> None:
            side.port = data.address[1]
            side.negotiate()
            talk = side.begin_data(data.accept_socket())
            side.give_id(talk, proof=side.agreement.id_proof(b"00000000", talk.channel))
            with pytest.raises(EndedError):
                side.check_proof(talk, b"00000000")

        with stage(Terms(1, authority.local, SECRET), lie) as client:
            client.connect()
            with pytest.raises(Rejected, match="id's proof"):
                client.open_data()


@pytest.mark.parametrize("tls", [0, 1])
def test_a_wrong_data_proof_is_found_out_by_the_server(authority: Authority, tls: int) -> None:
    with Listener() as data:

        def serve(side: ServerSide) -> None:
            side.port = data.address[1]
            side.negotiate()
            assert side.admit(data.accept_socket())
            with pytest.raises(Rejected, match="data connection"):
                side.admit(data.accept_socket())

        with stage(Terms(tls, authority.local, SECRET), serve) as client:
            client.connect()
            client.open_data()
            client.open_data(lambda identity, _: client.agreement.data_proof(identity, "00" * 32))


def test_a_client_s_resumed_data_connection_has_an_exporter_of_its_own(authority: Authority) -> None:
    with Listener() as data:

        def serve(side: ServerSide) -> None:
            side.port = data.address[1]
            side.negotiate()
            side.beat()
            for _ in range(2):
                side.admit(data.accept_socket())[1].send(b"x")

        with stage(Terms(1, authority.local, SECRET), serve) as client:
            client.connect()
            client.take_beat(client.talk.hear())  # and with it the tickets
            session = client.talk.secure.session()
            assert not client.talk.secure.is_resumed
            _, resumed = client.open_data(session=session)
            assert resumed.secure.is_resumed
            assert resumed.receive_exactly(1) == b"x"
            _, other = client.open_data()
            assert not other.secure.is_resumed
            assert other.receive_exactly(1) == b"x"
            assert len({client.talk.channel, resumed.channel, other.channel}) == 3


def test_a_clear_answer_to_a_client_hello_is_left_to_be_read() -> None:
    with stage(Terms(), ServerSide.negotiate, raises="no-tls") as client:
        client.dial()
        with pytest.raises(InTheClearError):
            client.secure()
        assert client.talk.rejection() == "no-tls"


def test_tls_with_another_protocol_gets_the_alert(authority: Authority) -> None:
    with stage(Terms(1, authority.local), ServerSide.negotiate, raises="no TLS") as client:
        client.dial()
        with pytest.raises(ConnectionError, match="no application protocol"):
            client.secure(client_context(alpn=(b"h2",)))


def test_tls_without_a_protocol_is_closed(authority: Authority) -> None:
    with stage(Terms(1, authority.local), ServerSide.negotiate, raises="without the protocol") as client:
        client.dial()
        client.secure(client_context(alpn=()))
        assert not client.talk.rest()


def test_tls_1_2_is_rejected_by_name(authority: Authority) -> None:
    with stage(Terms(1, authority.local), ServerSide.negotiate, raises="version") as client:
        client.dial()
        client.secure(client_context(highest=SSL.TLS1_2_VERSION))
        assert client.talk.rejection() == "version"


def test_a_byte_behind_the_line_that_asks_for_tls_is_found_out(authority: Authority) -> None:
    def inject(side: ServerSide) -> None:
        side.talk.hear()
        side.talk.write(b"//tls\n/")

    with stage(Terms(1, authority.local), inject) as client:
        client.begin()
        with pytest.raises(AssertionError, match="behind a line"):
            client.negotiate()
