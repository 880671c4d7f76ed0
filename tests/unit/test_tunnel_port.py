"""A tunnel port: when it is open, for whom it is served, and what it knows about connections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
from gevent import socket

from nodepass.config.kinds import Ports
from nodepass.config.urls import Address, ServerURL
from nodepass.errors import ConfigError, ListenError
from nodepass.net.activation import NOTHING
from nodepass.net.sockets import Endpoint
from nodepass.server import tunnel_port as module
from nodepass.server.clients import Clients
from nodepass.server.control_listener import ControlListener
from nodepass.server.data_listener import DataListener
from nodepass.server.server import make_port_parts
from nodepass.server.tunnel_port import TunnelPort
from nodepass.tasks import TaskGroup
from nodepass.tunnel.control import STOPPING, Agreement
from nodepass.tunnel.part import Common, Loop, Part
from nodepass.wire.auth import Key
from nodepass.wire.negotiation import Hello, Offer, parse_opening
from tests.unit.controls import V1, V2, read_line, until
from tests.unit.keys import KEY
from tests.unit.servers import PATIENT, OpenPort, a_server_room, make_common, occupy, server_url


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    with a_server_room(monkeypatch) as stack:
        yield stack


class Ready:
    """A tunnel port that is not open yet, and slots that may join."""

    def __init__(self, stack: ExitStack, *urls: ServerURL, number: int = 1, **settings: object) -> None:
        self.common = make_common(stack, data_port=Ports(0, 0), **settings)
        common = self.common
        self.port = TunnelPort(urls or [server_url()], common.settings, common.log, common.stats, NOTHING)
        self.slots = [Clients(common, f"{each}") for each in range(number)]
        self.crashes: list[Exception] = []
        for slot in self.slots:
            stack.callback(self.port.leave, slot)

    def join(self, slot: Clients) -> None:
        self.port.join(slot, self.crashes.append)

    @property
    def address(self) -> tuple[str, int]:
        name: tuple[str, int] = self.port.tunnel[0].getsockname()
        return name


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def is_open(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, PATIENT).close()
    except ConnectionRefusedError:
        return False
    return True


# Open and closed


def test_a_port_is_open_from_the_first_tunnel_to_the_last(stack: ExitStack) -> None:
    ready = Ready(stack, number=2)
    first, second = ready.slots
    ready.join(first)
    address, data = ready.address, ready.port.data[0].getsockname()
    ready.join(second)
    assert ready.address == address
    assert ready.port.slots == [*first.slots, *second.slots]
    ready.port.leave(first)
    ready.port.leave(first)
    assert is_open(address)
    assert is_open(data)
    ready.port.leave(second)
    assert not is_open(address)
    assert not is_open(data)


def test_a_port_that_was_closed_is_opened_again_and_served(stack: ExitStack) -> None:
    """At the same address, where the kernel has not chosen it."""
    number = free_port()
    ready = Ready(stack, server_url(port=number))
    [slot] = ready.slots
    for _ in range(2):
        ready.join(slot)
        assert ready.address == ("127.0.0.1", number)
        ready.port.run(make_port_parts)
        peer = stack.enter_context(socket.create_connection(ready.address, PATIENT))
        peer.sendall(b"//hello?v=3\n")
        assert read_line(peer) == b"//error?reason=version\n"
        ready.port.leave(slot)
        assert not is_open(("127.0.0.1", number))


@pytest.mark.parametrize("taken", ["tunnel", "data"])
def test_a_port_that_cannot_open_leaves_nothing_open_and_nobody_joined(stack: ExitStack, taken: str) -> None:
    other = stack.enter_context(closing(socket.socket()))
    other.bind(("127.0.0.1", 0))
    other.listen()
    occupied, number = other.getsockname()[1], free_port()
    tunnel, data = (occupied, number) if taken == "tunnel" else (number, occupied)
    ready = Ready(stack, server_url(port=tunnel))
    ready.port._settings = make_common(stack, data_port=Ports(data, data)).settings
    with pytest.raises(ListenError, match=f"{taken} (address|port)"):
        ready.join(ready.slots[0])
    assert not ready.port.slots
    assert not is_open(("127.0.0.1", number))


def test_its_parts_are_made_once(stack: ExitStack) -> None:
    """By whichever tunnel runs first."""
    ready, made = Ready(stack, number=2), []

    def make(_common: Common, port: TunnelPort) -> list[Part]:
        made.append(port)
        return [Part(_common)]

    for slot in ready.slots:
        ready.join(slot)
        ready.port.run(make)
    assert made == [ready.port]


@pytest.mark.parametrize("tls", [0, 1])
def test_its_parts_serve_both_of_its_ports_and_watch_its_certificate(stack: ExitStack, tls: int) -> None:
    port = OpenPort(stack, tls=tls).port
    assert [type(part) for part in port._parts] == [ControlListener, DataListener, *[Loop] * tls]
    assert not port.find_ended()
    assert repr(port) == "<TunnelPort 127.0.0.1:0, 1 tunnels>"


def test_a_certificate_that_is_not_usable_is_refused(stack: ExitStack, tmp_path: Path) -> None:
    common = make_common(stack)
    url = ServerURL(Address("127.0.0.1", 0), Address("127.0.0.1", 0), tls=2, crt=str(tmp_path / "crt"), key="key")
    with pytest.raises(ConfigError, match="crt="):
        TunnelPort([url], common.settings, common.log, common.stats, NOTHING)


# Crashes


def test_a_crash_of_one_of_its_loops_fails_every_tunnel(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels={"": [], "web": []})

    def crash() -> None:
        raise ZeroDivisionError

    port.control_listener._start_loop("crash", crash)
    until(lambda: len(port.crashes) == 2)
    assert all(isinstance(crash, ZeroDivisionError) for crash in port.crashes)
    assert "crash" in port.port.find_ended()


def test_a_tunnel_that_comes_back_after_a_crash_does_not_wait_for_the_others(stack: ExitStack) -> None:
    """What they joined is dead; it is opened again, and they may still leave what they joined."""
    port = OpenPort(stack, tunnels={"": [], "web": []})
    first, late = port.tunnels
    port.port._fail(ZeroDivisionError())
    port.port.leave(first)
    old = port.port.tunnel[0]
    port.port.join(first, port.crashes.append)
    port.port.run(make_port_parts)
    assert old.fileno() < 0
    port.port.leave(late)
    peer = port.connect(b"//hello?v=3\n")
    assert read_line(peer) == b"//error?reason=version\n"


def test_the_loops_of_a_port_are_not_those_of_its_tunnels(stack: ExitStack) -> None:
    """A tunnel's crash ends that tunnel's loops only."""
    port = OpenPort(stack, tunnels={"": [], "web": []})
    groups = {part._group for part in port.port._parts}
    assert port.common.loops not in groups
    assert len(groups) == 1
    assert isinstance(groups.pop(), TaskGroup)


# What a connection is for


@pytest.mark.parametrize(
    ("tunnels", "wire", "served"),
    [
        ({"": []}, "auto", ""),
        ({"": []}, "2", None),
        ({"": [KEY]}, "2", None),
        ({"": [KEY]}, "auto", None),
        ({"web": []}, "auto", None),
        ({"web": [], "": []}, "auto", ""),
        ({"web": [], "": [KEY]}, "auto", None),
        ({"web": [KEY], "": []}, "auto", ""),
    ],
)
def test_v1_clients_are_served_by_the_tunnel_without_a_name_and_a_key(
    stack: ExitStack, tunnels: dict[str, list[Key]], wire: str, served: str | None
) -> None:
    port = OpenPort(stack, tunnels=tunnels, wire=wire)
    slot = port.port.v1_slot
    assert [clients.name for clients in port.tunnels if slot in clients.slots] == ([] if served is None else [served])


def test_v1_clients_are_not_served_where_a_tunnel_has_several(stack: ExitStack) -> None:
    """They could not be told apart."""
    port = OpenPort(stack, clients=2)
    assert port.port.v1_slot is None


def test_an_unknown_tunnel_has_a_key_that_nobody_knows(stack: ExitStack) -> None:
    first, second = (OpenPort(stack, KEY) for _ in range(2))
    assert list(first.port.keys_of(first.tunnels[0])) == [KEY]
    [key] = first.port.keys_of(None)
    assert key not in (KEY, *second.port.keys_of(None))


def test_a_v1_client_is_offered_what_v1_has(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels={"": [], "web": []}, tls=1)
    number = port.port.data[0].getsockname()[1]
    assert port.port.offer(1) == Offer(number, 1)
    assert port.port.offer(2).version == 2


def test_at_one_port_the_tunnel_port_is_offered(stack: ExitStack) -> None:
    port = OpenPort(stack, mux=True)
    assert not port.port.data
    assert port.port.offer(2).data_port == port.port.tunnel[0].getsockname()[1]


def test_each_tunnel_of_a_port_offers_its_own_heartbeat(stack: ExitStack) -> None:
    port = OpenPort(stack, tunnels={"": [], "web": []}, report_interval=3.0)
    web = port.tunnels[1]
    web.common = replace(web.common, settings=replace(web.common.settings, report_interval=4.0))
    for name, heartbeat in (("", 3000), ("web", 4000)):
        client = port.connect(Hello("0" * 32, "1" * 16, name).encode())
        offer = parse_opening(read_line(client)[:-1])
        assert isinstance(offer, Offer)
        assert offer.heartbeat == heartbeat


HERE, ELSEWHERE = (Endpoint(socket.AF_INET, (host, 4711)) for host in ("127.0.0.1", "127.0.0.2"))


def test_data_connections_are_expected_from_the_addresses_of_clients(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = OpenPort(stack, tunnels={"": [], "web": []})
    assert not port.port.expects(HERE)
    _, control = occupy(stack, port.slots[1])
    assert port.port.expects(HERE)
    assert not port.port.expects(ELSEWHERE)
    port.try_v1(monkeypatch, "127.0.0.2")
    assert port.port.expects(ELSEWHERE)
    port.slots[1].release(control, STOPPING)
    assert not port.port.expects(HERE)


def test_what_a_data_connection_belongs_to_is_gone_with_its_client(stack: ExitStack) -> None:
    port = OpenPort(stack)
    _, control = occupy(stack, port.slot)
    member = port.port.membership(port.slot, HERE)
    assert member
    assert member.holds()
    port.slot.release(control, STOPPING)
    assert not member.holds()
    occupy(stack, port.slot, V1)
    assert not member.holds()
    assert port.port.membership(port.slot, ELSEWHERE) is None


def test_only_a_sid_that_was_offered_is_found(stack: ExitStack) -> None:
    """An offer without one has an empty sid, which is nobody's."""
    port = OpenPort(stack, tunnels={"": [], "web": []})
    occupy(stack, port.slot, V2)
    occupy(stack, port.slots[1], Agreement(Offer(1, 0, 5000, "1" * 32)))
    found = port.port.find_sid("1" * 32)
    assert found
    assert found.slot is port.slots[1]
    assert port.port.find_sid("2" * 32) is None
    assert port.port.find_sid("") is None


def test_a_sid_is_forgotten_with_its_client_or_its_tunnel_and_asked_of_no_other(stack: ExitStack) -> None:
    """Each client that comes brings a new one: with thousands of tunnels, a look at all of them would take longest."""
    port = OpenPort(stack, tunnels={"": [], "web": []})
    (first, second), sids = port.slots, [number * 32 for number in "123"]
    _, control = occupy(stack, first, Agreement(Offer(1, 0, 5000, sids[0])))
    occupy(stack, second, Agreement(Offer(1, 0, 5000, sids[1])))
    first.release(control, STOPPING)
    occupy(stack, first, Agreement(Offer(1, 0, 5000, sids[2])))
    assert [bool(port.port.find_sid(sid)) for sid in sids] == [False, True, True]
    port.port.leave(port.tunnels[1])
    port.tunnels[1].close()
    assert [bool(port.port.find_sid(sid)) for sid in sids] == [False, False, True]
    assert (list(port.port._by_sid), port.port._sids) == ([sids[2]], {port.tunnels[0]: [sids[2]]})


# Late hellos


def at(number: int) -> Endpoint:
    return Endpoint(socket.AF_INET, (f"192.0.2.{number}", 4711))


def test_an_address_whose_hello_was_late_is_remembered_for_ten_minutes(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, now = OpenPort(stack).port, [1000.0]
    with monkeypatch.context() as patched:
        patched.setattr(module.time, "monotonic", lambda: now[0])
        assert not port.was_late(at(1))
        port.remember_late_hello(at(1))
        assert port.was_late(at(1).with_port(4712))
        assert not port.was_late(at(2))
        now[0] += 599
        assert port.was_late(at(1))
        now[0] += 2
        assert not port.was_late(at(1))


def test_no_more_than_256_late_addresses_are_remembered_the_oldest_goes_first(
    stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module.LATE_HELLOS == 256
    monkeypatch.setattr(module, "LATE_HELLOS", 3)
    port = OpenPort(stack).port
    for number in (1, 2, 3, 1, 4):
        port.remember_late_hello(at(number))
    assert [port.was_late(at(number)) for number in (1, 2, 3, 4)] == [True, False, True, True]
