"""A man in the middle of a server and a client of ours: what each mode promises holds, and a log names the attack.

It listens at 127.0.0.2, which the client takes for its server. What a mode does not promise is tried as well: that the
attack succeeds there shows that it would be good enough elsewhere.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.support.certificates import Authority, Certificate
from tests.support.log import Entry, loud, one_of
from tests.support.process import Environment
from tests.support.sockets import Address, connect, is_silent, until
from tests.support.target import Target
from tests.support.tunnel import CALM, assert_connected
from tests.support.wire2 import lines
from tests.support.wire2.middle import HERE, Encounter, Forwarder, Handle, Middle
from tests.support.wire2.ours import OurClients, OurServers
from tests.support.wire2.proofs import SECRET
from tests.support.wire2.talk import Talk, dial
from tests.support.wire2.tls import client_context

ADOPTS = ""
"""The query of a client that demands nothing."""

PASSWORD = b"password=hunter2"
MODES = {"clear": 0, "tls": 1, "verified": 2}
KEYED_QUERIES = {label: f"tls={tls}&name={label}" for label, tls in MODES.items()}
QUERIES = {label: f"tls={tls}" for label, tls in MODES.items()}


@dataclass
class Lab:
    """Servers with and without a key in every TLS mode, and the certificates of the man in the middle."""

    unkeyed: OurServers
    keyed: OurServers
    authority: Authority
    forged: Certificate
    """For the right name, by an authority that is not trusted."""
    valid: Certificate
    """For the right name, by the right authority, and not the server's."""

    def servers(self, has_key: bool) -> OurServers:
        return self.keyed if has_key else self.unkeyed

    def env(self, has_key: bool) -> Environment:
        """The client's environment; its authority is the one of the server's certificate."""
        trust = {**CALM, "SSL_CERT_FILE": str(self.authority.crt), "SERVICE_COOLDOWN": "200ms"}
        return {**trust, "TUNNEL_KEY": SECRET} if has_key else trust


@pytest.fixture(scope="module")
def lab(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    nobody = Authority(tmp_path_factory.mktemp("nobody"), "nobody's authority")
    certificate = authority.issue(HERE)
    env = {**CALM, "HANDSHAKE_TIMEOUT": "2s"}
    with (
        OurServers(QUERIES, certificate, env=env) as unkeyed,
        OurServers(KEYED_QUERIES, certificate, env={**env, "TUNNEL_KEY": SECRET}) as keyed,
    ):
        yield Lab(unkeyed, keyed, authority, nobody.issue(HERE), authority.issue(HERE))
        assert not unkeyed.find_crashes() + keyed.find_crashes()


@dataclass
class Scene:
    """One mode: the man in the middle of a tunnel, and the client that takes it for its server."""

    label: str
    has_key: bool
    server: OurServers
    middle: Middle
    client: OurClients
    target: Target
    mark: int

    @property
    def port(self) -> int:
        """The tunnel port, its own and the server's."""
        return self.middle.address[1]

    @property
    def mode(self) -> str:
        """What the mode is called, here and among the client's tunnels."""
        return self.label + " with a key" * self.has_key

    def wait(self, event: str = "", **fields: object) -> Entry:
        """The client's first such event."""
        return self.client.wait_in(self.mode, event, **fields)  # type: ignore[arg-type]

    def find(self, event: str = "", **fields: object) -> list[Entry]:
        """The client's events so far."""
        return self.client.find_in(self.mode, event, **fields)  # type: ignore[arg-type]

    def wait_at_server(self, event: str, **fields: object) -> Entry:
        """The server's first such event in this test."""
        return self.server.wait_in(self.label, event, after=self.mark, **fields)  # type: ignore[arg-type]

    @property
    def visitors(self) -> Address:
        return self.server[self.label].visitors

    def assert_refused(self) -> None:
        """Check that the client believed nothing of it: no server, no data connection, no session."""
        assert not self.find("server.connected"), self.mode
        assert self.middle.met[self.server[self.label].data[1]] == 0, f"{self.mode}: a data connection was dialled"
        assert PASSWORD not in self.middle.seen
        assert not self.client.find_crashes()

    def assert_works(self) -> None:
        """Check that the tunnel carries a password."""
        self.wait("server.connected")
        with connect(self.visitors) as visitor, self.target.accept() as service:
            assert_connected(visitor, service)
            visitor.sendall(PASSWORD)
            assert service.recv(100) == PASSWORD


@contextlib.contextmanager
def scenes(
    lab: Lab,
    modes: Sequence[str],
    control: Handle = Encounter.forward,
    data: Handle = Encounter.forward,
    *,
    query: str | None = None,
) -> Iterator[list[Scene]]:
    """The same man in the middle in each of these modes, such as `verified with a key`, all at the same time.

    query: the client's demand, where it is not the server's mode.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for has_key in {mode.endswith("with a key") for mode in modes}:
            labels = [mode.split()[0] for mode in modes if mode.endswith("with a key") == has_key]
            found += meet(lab, labels, has_key, (control, data), query, stack)
        yield found


def meet(
    lab: Lab,
    labels: list[str],
    has_key: bool,
    handles: tuple[Handle, Handle],
    query: str | None,
    stack: contextlib.ExitStack,
) -> list[Scene]:
    """The scenes with a key or without one: one process is the client of all."""
    server = lab.servers(has_key)
    mark = server.mark()
    targets = {label: stack.enter_context(Target()) for label in labels}
    middles = {
        label: stack.enter_context(Middle(server[label].tunnel[1], server[label].data[1], *handles)) for label in labels
    }
    mode = " with a key" * has_key
    queries = {label: f"tls={MODES[label]}" if query is None else query for label in labels}
    if has_key:
        queries = {label: f"{each}&name={label}" for label, each in queries.items()}
    client = OurClients(
        {label + mode: (middles[label].address, queries[label]) for label in labels},
        {label + mode: targets[label].address for label in labels},
        env=lab.env(has_key),
    )
    stack.enter_context(client)
    return [Scene(label, has_key, server, middles[label], client, targets[label], mark) for label in labels]


@contextlib.contextmanager
def scene(
    lab: Lab,
    mode: str,
    control: Handle = Encounter.forward,
    data: Handle = Encounter.forward,
    *,
    query: str | None = None,
) -> Iterator[Scene]:
    """The man in the middle in one mode."""
    with scenes(lab, [mode], control, data, query=query) as (only,):
        yield only


class Turns:
    """Does one thing after the other, the next at each connection of a client: one process tries them all."""

    def __init__(self, handles: Iterable[Handle]) -> None:
        self._handles = list(handles)
        self._numbers: dict[int, Iterator[int]] = defaultdict(count)

    def __call__(self, meeting: Encounter) -> None:
        self._handles[next(self._numbers[meeting.port]) % len(self._handles)](meeting)

    def assert_refused(self, stage: Scene) -> None:
        """Check that the client has come again after each, and has believed none."""
        until(lambda: stage.middle.met[stage.port] > len(self._handles))
        stage.assert_refused()


WITH_TLS = ("tls", "tls with a key", "verified", "verified with a key")
KEYED_TLS = ("tls with a key", "verified with a key")
EVERY = ("clear", "clear with a key", *WITH_TLS)


def test_a_forwarder_that_changes_nothing_is_no_attack(lab: Lab) -> None:
    """So what the tests below see comes from what it changes."""
    with scenes(lab, EVERY) as stages:
        for stage in stages:
            stage.assert_works()
            assert (PASSWORD in stage.middle.seen) == (stage.label == "clear")


# 1: TLS stripped


def answer(line: str) -> Handle:
    """Be a server that has no certificate: a line in the clear, whatever the client has sent."""

    def handle(meeting: Encounter) -> None:
        meeting.near.first_byte()
        meeting.near.say(line)
        meeting.near.end()
        meeting.near.rest()

    return handle


REFUSED = one_of("no_tls", "key_mismatch", "version", "protocol")


@pytest.mark.programs
def test_an_offer_in_the_clear_is_refused_where_tls_is_demanded(lab: Lab) -> None:
    turns = Turns(map(answer, ("//9?v=2&hb=5000#0", "//9?v=2&hb=5000#2", "//9#0")))
    with scenes(lab, WITH_TLS, turns) as stages:
        for stage in stages:
            stage.wait("server.rejected", level="error", reason=REFUSED)
            turns.assert_refused(stage)
            for entry in stage.find("server.rejected"):
                assert re.search("(?i)clear|v1|key|tls", entry["error"]), entry


def strip_tls(meeting: Encounter) -> None:
    """Swallow `//tls`: speak TLS with the server, and in the clear with the client, whose offer then says 0."""
    meeting.far.become_client(client_context())
    meeting.edit_lines(to_client=lambda line: re.sub(rb"(\?v=2.*)#[12]$", rb"\1#0", line))


def strip_data_tls(meeting: Encounter) -> None:
    """Likewise on a data connection."""
    meeting.far.become_client(client_context())
    meeting.forward()


def test_a_stripped_line_that_asks_for_tls_ends_where_tls_is_demanded(lab: Lab) -> None:
    """The client has begun with TLS: there is nothing to strip."""
    with scenes(lab, WITH_TLS, strip_tls, strip_data_tls) as stages:
        for stage in stages:
            stage.wait(level=loud, server=re.compile(HERE))
            stage.assert_refused()


@pytest.mark.programs
def test_without_a_demand_tls_can_be_stripped_and_the_client_says_so_at_its_start(lab: Lab) -> None:
    """An adopted mode protects from eavesdropping only."""
    with scenes(lab, ("tls", "verified"), strip_tls, strip_data_tls, query=ADOPTS) as stages:
        for stage in stages:
            stage.assert_works()
            assert PASSWORD in stage.middle.seen
            assert stage.find("tunnel.security", level="warn", security=re.compile("on the path can be the server"))


# TLS ended in the middle, and 5: with a certificate that is good for the name


def end_tls(certificate: Callable[[Lab], Certificate], then: Handle) -> Callable[[Lab], Handle]:
    """Be a TLS server for the client and a TLS client for the server."""

    def of(lab: Lab) -> Handle:
        def handle(meeting: Encounter) -> None:
            meeting.end_tls(certificate(lab))
            then(meeting)

        return handle

    return of


def forged(lab: Lab) -> Certificate:
    return lab.forged


def valid(lab: Lab) -> Certificate:
    return lab.valid


@pytest.mark.programs
def test_with_tls_1_and_no_key_everything_can_be_read_and_both_ends_have_said_so(lab: Lab) -> None:
    """That it is let through shows that it is good enough for the tests below."""
    handle = end_tls(forged, Encounter.forward)(lab)
    with scene(lab, "tls", handle, handle) as stage:
        stage.assert_works()
        assert PASSWORD in stage.middle.seen
        for find in (stage.find, stage.server.find):
            assert find("tunnel.security", security=re.compile("only against passive eavesdropping"))


@pytest.mark.parametrize("certificate", [pytest.param(forged, marks=pytest.mark.programs), valid])
def test_with_a_key_ending_tls_in_the_middle_is_refused_with_any_certificate(
    lab: Lab, certificate: Callable[[Lab], Certificate]
) -> None:
    """What both ends prove has the channel in it, and each of its two ends has another one."""
    handle = end_tls(certificate, Encounter.forward)(lab)
    with scenes(lab, KEYED_TLS, handle, handle) as stages:
        for stage in stages:
            if stage.label == "verified" and certificate is forged:
                stage.wait(level=loud, server=re.compile(HERE), error=re.compile("(?i)certificate"))
            else:
                entry = stage.wait("server.rejected", level="error", reason="key_mismatch")
                assert "man in the middle" in entry["error"], entry
                stage.wait_at_server("client.rejected", level="warn", reason="key_mismatch")
            stage.assert_refused()


@pytest.mark.programs
def test_with_tls_2_and_no_key_a_forged_certificate_is_refused(lab: Lab) -> None:
    handle = end_tls(forged, Encounter.forward)(lab)
    with scene(lab, "verified", handle, handle) as stage:
        stage.wait(level=loud, server=re.compile(HERE), error=re.compile("(?i)certificate"))
        stage.assert_refused()


@pytest.mark.programs
def test_with_an_adopted_tls_2_a_forged_certificate_is_refused_when_the_offer_is_read(lab: Lab) -> None:

    def ask_for_tls(meeting: Encounter) -> None:
        meeting.near.read_line()
        meeting.near.say("//tls")
        meeting.end_tls(lab.forged)
        meeting.forward()

    with scene(lab, "verified", ask_for_tls, query=ADOPTS) as stage:
        stage.wait(level=loud, server=re.compile(HERE), error=re.compile("(?i)certificate"))
        stage.assert_refused()


@pytest.mark.programs
def test_an_offer_of_2_that_was_changed_to_1_is_refused_where_2_is_demanded(lab: Lab) -> None:
    """The certificate is good for the name; an offer of 1 would have the client look at no other one."""

    def lower(meeting: Encounter) -> None:
        meeting.end_tls(lab.valid)
        meeting.edit_lines(to_client=lambda line: re.sub(rb"#2$", b"#1", line))

    with scene(lab, "verified", lower) as stage:
        stage.wait("server.rejected", level="error", reason="no_tls")
        stage.assert_refused()


@pytest.mark.programs
@pytest.mark.parametrize("certificate", [forged, valid])
def test_ending_tls_on_data_connections_alone_is_refused(lab: Lab, certificate: Callable[[Lab], Certificate]) -> None:
    """A certificate that is good for the name is all that tls=2 looks at; a key looks at the channel."""
    modes = KEYED_TLS if certificate is valid else (*KEYED_TLS, "verified")
    with scenes(lab, modes, data=end_tls(certificate, Encounter.forward)(lab)) as stages:
        for stage in stages:
            stage.wait("server.connected")
            stage.wait("data.dial_failed", level=loud)
            with connect(stage.visitors) as visitor:
                visitor.sendall(PASSWORD)
                with pytest.raises(TimeoutError):
                    stage.target.accept(timeout=0.1)
            assert PASSWORD not in stage.middle.seen


# 2: tunnels under one key swapped


@pytest.mark.programs
@pytest.mark.parametrize("has_key", [False, True], ids=["names", "one key"])
def test_two_tunnels_cannot_be_swapped(lab: Lab, has_key: bool, tmp_path: Path) -> None:
    """Each client is led to the other one's server."""
    queries = {"public": "tls=1&name=public", "admin": "tls=1&name=admin"}
    swapped = {"public": "admin", "admin": "public"}
    env = {**CALM, "TUNNEL_KEY": SECRET} if has_key else CALM
    with OurServers(queries, env=env) as servers, contextlib.ExitStack() as stack:
        ways = {
            label: stack.enter_context(Forwarder(servers[other].tunnel, (HERE, 0))) for label, other in swapped.items()
        }
        where = {label: (way.address, queries[label]) for label, way in ways.items()}
        clients = stack.enter_context(OurClients(where, env=lab.env(has_key)))
        reason = "key_mismatch" if has_key else "unknown_name"
        for label, other in swapped.items():
            clients.wait_in(label, "server.rejected", level="error", reason=reason)
            entry = servers.wait_for("client.rejected", level="warn", error=re.compile(label))
            assert entry, other
        assert not clients.find("server.connected")
        assert not servers.find("client.connected"), tmp_path


# 3: a key without TLS


@pytest.mark.programs
def test_a_key_without_tls_does_not_protect_data_connections_and_both_ends_have_said_so(lab: Lab) -> None:
    """The proofs pass through; nothing behind them is authenticated."""
    with scene(lab, "clear with a key") as stage:
        stage.assert_works()
        assert PASSWORD in stage.middle.seen
        for find in (stage.find, stage.server.find):
            assert find("tunnel.security", security=re.compile("tls 0"))


OFFER_EDITS: dict[str, tuple[bytes, bytes]] = {
    "another heartbeat": (rb"hb=\d+", b"hb=60000"),
    "one port": (rb"&mac=", b"&mux=1&mac="),
    "a sid": (rb"&mac=", b"&sid=" + b"0" * 32 + b"&mac="),
    "another port": (rb"^//\d+", b"//9"),
    "a parameter of the future": (rb"&mac=", b"&x=y&mac="),
    "no proof": (rb"&mac=[0-9a-f]{64}", b""),
}


def test_with_a_key_no_word_of_an_offer_can_be_changed(lab: Lab) -> None:
    def changing(edit: tuple[bytes, bytes]) -> Handle:
        change = lambda line: re.sub(*edit, line) if b"?v=2&hb=" in line else line  # noqa: E731
        return lambda meeting: meeting.edit_lines(to_client=change)

    assert_refused_for_the_key(lab, Turns(map(changing, OFFER_EDITS.values())))


def assert_refused_for_the_key(lab: Lab, turns: Turns) -> None:
    """Check that the client refuses each turn, and for this reason alone."""
    with scene(lab, "clear with a key", turns) as stage:
        stage.wait("server.rejected", level="error", reason="key_mismatch")
        turns.assert_refused(stage)
        assert {entry["reason"] for entry in stage.find("server.rejected")} == {"key_mismatch"}
        assert not stage.find("server.unreachable")


HELLO_EDITS: dict[str, tuple[bytes, bytes]] = {
    "another name": (rb"name=\w+", b"name=tls"),
    "another client": (rb"client=\w+", b"client=" + b"0" * 16),
    "another nonce": (rb"nonce=\w+", b"nonce=" + b"0" * 32),
    "a parameter of the future": (rb"$", b"&x=y"),
}


@pytest.mark.programs
def test_with_a_key_no_word_of_a_hello_can_be_changed(lab: Lab) -> None:
    def changing(edit: tuple[bytes, bytes]) -> Handle:
        change = lambda line: re.sub(*edit, line) if line.startswith(b"//hello") else line  # noqa: E731
        return lambda meeting: meeting.edit_lines(to_server=change)

    assert_refused_for_the_key(lab, Turns(map(changing, HELLO_EDITS.values())))


@pytest.mark.programs
def test_with_a_key_no_word_of_a_challenge_can_be_changed(lab: Lab) -> None:
    def change(line: bytes) -> bytes:
        return re.sub(rb"nonce=.*", b"nonce=" + b"0" * 32, line) if line.startswith(b"//challenge") else line

    with scene(lab, "clear with a key", lambda meeting: meeting.edit_lines(to_client=change)) as stage:
        stage.wait("server.rejected", level="error", reason="key_mismatch")
        stage.wait_at_server("client.rejected", level="warn", reason="key_mismatch")
        stage.assert_refused()


# 4: signals after the offer


LAUNCH = re.compile(rb"^(//[0-9a-f]{8})#1$")


@pytest.mark.programs
def test_a_launch_cannot_be_changed_into_another_kind(lab: Lab) -> None:
    """It does not get as far as the first launch: it cannot end TLS."""

    def change(meeting: Encounter) -> None:
        meeting.end_tls(lab.forged)
        meeting.edit_lines(to_client=lambda line: LAUNCH.sub(rb"\1#3", line))

    with scenes(lab, ("verified", *KEYED_TLS), change) as stages:
        for stage in stages:
            stage.wait(level=loud, server=re.compile(HERE))
            stage.assert_refused()


@pytest.mark.programs
def test_where_launches_stand_in_the_clear_a_single_datagram_is_none_of_v2(lab: Lab) -> None:
    """A key without TLS does not authenticate signals; yet a TCP visitor's bytes never come out as one datagram."""
    edit = lambda line: LAUNCH.sub(rb"\1#2", line)  # noqa: E731
    with scene(lab, "clear with a key", lambda meeting: meeting.edit_lines(to_client=edit)) as stage:
        stage.wait("server.connected")
        with connect(stage.visitors) as visitor:
            visitor.sendall(PASSWORD)
            stage.wait("signal.unknown", level="warn")
            stage.target.udp.settimeout(0.3)
            with pytest.raises(TimeoutError):
                stage.target.udp.recv(100)


class Flip:
    """Flips one bit of what the server sends once it has been armed: a launch or a heartbeat, encrypted."""

    def __init__(self) -> None:
        self.armed = threading.Event()
        self.done = threading.Event()

    def __call__(self, data: bytes) -> bytes:
        if not self.armed.is_set() or self.done.is_set():
            return data
        self.done.set()
        return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.programs
def test_a_bit_of_a_signal_flipped_inside_tls_ends_the_control_connection(lab: Lab) -> None:
    flips: dict[int, Flip] = defaultdict(Flip)
    with scenes(lab, WITH_TLS, lambda meeting: meeting.forward_edited(to_client=flips[meeting.port])) as stages:
        for stage in stages:
            stage.assert_works()
            flips[stage.port].armed.set()
            with connect(stage.visitors):
                lost = stage.wait("server.disconnected")
                assert lost["reason"] in ("failed", "tls", "protocol"), lost
                assert re.search("(?i)tls|record|mac", lost["error"]), lost


# Replay, reflection, downgrade


@pytest.mark.programs
def test_a_recorded_client_cannot_be_replayed_to_the_server(lab: Lab) -> None:
    said: list[bytes] = []

    def record(line: bytes) -> bytes:
        said.append(line)
        return line

    with scene(lab, "clear with a key", lambda meeting: meeting.edit_lines(to_server=record)) as stage:
        stage.wait("server.connected")
        with dial(stage.server["clear"].tunnel) as replay:
            replay.say(said[0])
            assert replay.read_line().startswith(b"//challenge")
            replay.say(said[1])
            assert replay.rejection() == "key-mismatch"
        stage.wait_at_server("client.rejected", level="warn", reason="key_mismatch")
        assert not stage.find("server.disconnected")


@pytest.mark.programs
def test_a_recorded_server_cannot_be_replayed_to_the_client(lab: Lab) -> None:
    """The first connection is recorded, and every later one hears the same again."""
    recorded: dict[int, list[bytes]] = defaultdict(list)

    def record(meeting: Encounter) -> None:
        said = recorded[meeting.port]
        if said:
            meeting.near.first_byte()
            with contextlib.suppress(OSError):
                for piece in said:
                    meeting.near.write(piece)
                meeting.near.rest()
            return

        def keep(data: bytes) -> bytes:
            said.append(data)
            return data

        meeting.forward_edited(to_client=keep)

    with scenes(lab, ("clear with a key", *WITH_TLS), record) as stages:
        for stage in stages:
            stage.wait("server.connected")
            mark = stage.client.mark()
            stage.server.find()
            for sock in list(stage.middle.workers._sockets):
                with contextlib.suppress(OSError):
                    if sock.getsockname()[1] == stage.middle.address[1] and sock.getpeername():
                        sock.shutdown(2)
            stage.wait("server.disconnected", after=mark)
            stage.wait(level=loud, after=mark, server=re.compile(HERE))
            assert not stage.find("server.connected", after=mark)


def reflect(meeting: Encounter) -> None:
    """Say to the client whatever it says."""
    with contextlib.suppress(OSError):
        while data := meeting.near.recv(65536):
            meeting.near.write(data)


@pytest.mark.programs
def test_a_client_is_not_a_server_for_itself(lab: Lab) -> None:
    with scenes(lab, EVERY, reflect) as stages:
        for stage in stages:
            stage.wait(level=loud, server=re.compile(HERE))
            stage.assert_refused()


def test_with_a_key_neither_end_can_be_brought_to_wire_v1(lab: Lab) -> None:
    """The attack is a v1 server for the client, and a silent client for the server."""

    def downgrade(meeting: Encounter) -> None:
        tls = next(MODES[label] for label in MODES if lab.keyed[label].tunnel[1] == meeting.port)
        meeting.near.say(f"//9#{tls}")
        assert meeting.far.read_line() == b"//error?reason=key-required"

    with scenes(lab, ("clear with a key", *KEYED_TLS), downgrade) as stages:
        for stage in stages:
            stage.wait("server.rejected", level="error", reason=one_of("key_mismatch", "version"))
            stage.wait_at_server("client.rejected", level="warn", reason="key_required")
            stage.assert_refused()


@pytest.mark.programs
@pytest.mark.parametrize(("label", "query"), [("clear", "wire=2"), ("tls", "wire=2&tls=1"), ("verified", "tls=2")])
def test_without_a_key_a_client_that_demands_v2_or_tls_2_is_not_brought_to_wire_v1(
    lab: Lab, label: str, query: str
) -> None:
    def downgrade(meeting: Encounter) -> None:
        meeting.near.say(meeting.far.read_line())  # of a silent connection: the v1 line
        meeting.forward()

    with scene(lab, label, downgrade, query=query) as stage:
        stage.wait("server.rejected", level="error", reason=one_of("version", "no_tls"))
        assert not stage.find("server.connected")


# Injection


def inject_behind(sent: bytes) -> Handle:
    """Put a byte behind the client's hello in the clear, in the same piece."""

    def handle(meeting: Encounter) -> None:
        meeting.far.write(meeting.near.read_line() + b"\n" + sent)
        meeting.forward()

    return handle


@pytest.mark.programs
def test_bytes_injected_behind_the_hello_end_the_connection(lab: Lab) -> None:
    turns = Turns(map(inject_behind, (b"/", lines.make_hello() + b"\n", b"\x16\x03\x01")))
    with scenes(lab, ("tls", "verified"), turns, query=ADOPTS) as stages:
        for stage in stages:
            stage.wait(level=loud, server=re.compile(HERE))
            stage.wait_at_server("client.handshake_failed", error=re.compile("(?i)behind|after|more|clear"))
            turns.assert_refused(stage)


@pytest.mark.programs
def test_bytes_injected_behind_the_line_that_asks_for_tls_end_the_connection(lab: Lab) -> None:
    def injecting(sent: bytes) -> Handle:
        def inject(meeting: Encounter) -> None:
            meeting.far.say(meeting.near.read_line())
            meeting.near.write(meeting.far.read_line() + b"\n" + sent)
            meeting.forward()

        return inject

    turns = Turns(map(injecting, (b"/", b"//9?v=2&hb=5000#1\n", b"\x16\x03\x03")))
    with scenes(lab, ("tls", "verified"), turns, query=ADOPTS) as stages:
        for stage in stages:
            stage.wait(level=loud, server=re.compile(HERE), reason="protocol")
            turns.assert_refused(stage)
            for entry in stage.find(level=loud, server=re.compile(HERE)):
                assert re.search("(?i)behind|after|more|clear", entry["error"]), entry


@pytest.mark.programs
def test_an_end_of_tcp_is_told_from_the_server_s_own(lab: Lab) -> None:
    """It can end TCP, but not say that the server has ended TLS."""
    met: dict[int, Talk] = {}

    def keep(meeting: Encounter) -> None:
        met[meeting.port] = meeting.near
        meeting.forward()

    with scenes(lab, WITH_TLS, keep) as stages:
        for stage in stages:
            stage.wait("server.connected")
            met[stage.port].sock.shutdown(2)
            lost = stage.wait("server.disconnected", reason="failed")
            assert re.search("(?i)close_notify|tls|cut", lost["error"]), lost


@pytest.mark.programs
def test_a_stranger_s_bytes_on_a_session_s_port_are_silent(lab: Lab) -> None:
    """Nothing of them comes out at a visitor of a keyed tunnel."""
    with scene(lab, "tls with a key") as stage:
        stage.assert_works()
        with connect(stage.visitors) as visitor, stage.target.accept(), dial(stage.server["tls"].data) as stranger:
            stranger.write(PASSWORD)
            stranger.rest()
            assert is_silent(visitor, 0.05)
