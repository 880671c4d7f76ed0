"""What is told to systemd of tunnels that ail, and sockets of systemd's that outlive a tunnel."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import gevent
import pytest
from gevent.event import Event

from nodepass.config.settings import Settings
from nodepass.config.urls import Address, ServerURL
from nodepass.daemon.notifier import SECOND_LOOK, Notifier
from nodepass.daemon.systemd import ServiceManager, status
from nodepass.errors import StartError
from nodepass.log import Log
from nodepass.net.activation import Inherited, PassedSocket, Share
from nodepass.net.listen import close_all, port_of
from nodepass.net.sockets import format_sockaddr
from nodepass.server.server import Server
from nodepass.server.tunnel_port import TunnelPort
from nodepass.stats import Stats
from nodepass.tunnel.interface import LISTENER_ROLES, Observed
from nodepass.tunnel.part import Records
from nodepass.visitors.rules import Rules
from tests.support.sockets import connect
from tests.support.target import bind_pair

UNIT = "nodepass@web.socket"


def make_notifier(manager: ServiceManager, tunnels: Sequence[Observed]) -> Notifier:
    def fail(error: StartError) -> None:
        raise error

    return Notifier(manager, tunnels, Settings(report_interval=0.01), Log("test"), Stats(), fail)


class Tunnel:
    """A tunnel in whatever state a test wants."""

    def __init__(self) -> None:
        self.log = Log("tunnel")
        self.ready = Event()
        self.ready.set()
        self.ill = ""

    def status(self) -> str:
        return "as always"

    def unhealthy_reason(self) -> str:
        return self.ill


class Heard(ServiceManager):
    """A service manager that writes down what it is told."""

    lines: list[str]

    @classmethod
    def listening(cls) -> Heard:
        made = cls("/nowhere")
        object.__setattr__(made, "lines", [])
        return made

    def notify(self, *lines: str) -> None:
        self.lines.extend(lines)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_the_watchdog_hears_nothing_while_one_tunnel_ails_and_again_when_it_is_well(stack: ExitStack) -> None:
    manager, tunnels = Heard.listening(), [Tunnel(), Tunnel()]
    notifier = make_notifier(manager, tunnels)
    stack.callback(notifier.close)
    notifier.start()

    def hears_the_watchdog(within: float = 10) -> bool:
        manager.lines.clear()
        with gevent.Timeout(within, False):
            while "WATCHDOG=1" not in manager.lines:
                gevent.sleep(0.01)
            return True
        return False

    assert hears_the_watchdog()
    tunnels[1].ill = "a broken leg"
    assert not hears_the_watchdog(3 * SECOND_LOOK)
    tunnels[1].ill = ""
    assert hears_the_watchdog()
    tunnels[0].ill = "a cold"
    notifier.stop(1)  # a drain is not cut short for that
    assert hears_the_watchdog()


def test_a_process_that_stood_still_reads_what_has_arrived_before_it_judges(stack: ExitStack) -> None:
    manager, tunnel = Heard.listening(), Tunnel()
    notifier = make_notifier(manager, [tunnel])
    looks = iter(["nothing heard"])
    tunnel.unhealthy_reason = lambda: next(looks, "")  # type: ignore[method-assign]
    stack.callback(notifier.close)
    notifier.start()
    with gevent.Timeout(10):
        while not manager.lines:
            gevent.sleep(0.01)
    assert manager.lines[:2] == ["READY=1", "WATCHDOG=1"]


def test_a_tunnel_that_starts_anew_takes_the_same_sockets_and_closing_it_leaves_them_open(stack: ExitStack) -> None:
    passed = [stack.enter_context(each) for _ in range(2) for each in bind_pair("127.0.0.1")]
    tunnel, _, target, datagrams = passed
    inherited = Inherited([PassedSocket(UNIT, each) for each in (tunnel, target, datagrams)], LISTENER_ROLES)
    url = ServerURL(*(Address("127.0.0.1", port_of([each])) for each in (tunnel, target)))
    share, log, stats = inherited.share(), Log("test"), Stats()
    port = TunnelPort([url], Settings(), log, stats, share)
    for _ in range(3):
        server = Server(url, port, Settings(), tuple, Records(log, stats), share, Rules(Settings(), url.name))
        server.start()
        assert not inherited.unused()
        server.close()
        with connect(target.getsockname()):
            pass


def test_a_socket_for_what_is_off_is_left_over_and_refused_by_name(stack: ExitStack) -> None:
    passed = [stack.enter_context(each) for _ in range(2) for each in bind_pair("127.0.0.1")]
    tunnel, _, target, datagrams = passed
    inherited = Inherited([PassedSocket(UNIT, each) for each in (tunnel, target, datagrams)], LISTENER_ROLES)
    url = ServerURL(*(Address("127.0.0.1", port_of([each])) for each in (tunnel, target)))
    share, log, stats, settings = inherited.share(), Log("test"), Stats(), Settings(udp=False)
    port = TunnelPort([url], settings, log, stats, share)
    server = Server(url, port, settings, tuple, Records(log, stats), share, Rules(settings, url.name))
    server.start()
    stack.callback(server.close)
    assert inherited.unused() == f"{format_sockaddr(datagrams.getsockname())} (udp, {UNIT})"


def test_what_one_tunnel_has_taken_is_for_no_other_and_for_no_other_purpose(stack: ExitStack) -> None:
    sock = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    inherited = Inherited([PassedSocket(UNIT, sock)], LISTENER_ROLES)
    mine, other = inherited.share(), inherited.share()
    address = Address("", port_of([sock]))

    def takes(share: Share, role: str) -> bool:
        taken = share.of(role).take(socket.SOCK_STREAM, address, [])
        close_all(taken)
        return bool(taken)

    assert takes(mine, "tunnel")
    assert takes(mine, "tunnel")
    assert not takes(mine, "target")
    assert not takes(other, "tunnel")


def test_a_status_is_one_line_of_whole_characters() -> None:
    assert status("one\ntwo\udc80") == "STATUS=one two\\udc80"
    cut = status("«" * 3000)
    assert cut == "STATUS=" + "«" * 500 + "…"
