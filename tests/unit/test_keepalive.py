"""Keepalive probes are for connections that last."""

from __future__ import annotations

import gevent
import pytest
from gevent import socket

from nodepass.client.data_dialer import Route
from nodepass.client.target import HostTarget
from nodepass.config.settings import Settings
from nodepass.config.urls import Address
from nodepass.log import Log
from nodepass.net import sockets
from nodepass.net.sockets import KEEPALIVE, PROBES, Endpoint, Socket, dial
from nodepass.outbound.ways import Direct
from nodepass.stats import Stats
from nodepass.tunnel.control import Agreement, ClientControl
from nodepass.wire.negotiation import Offer
from tests.support.table import each_row
from tests.unit.streams import tcp_pair

OPTIONS = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)


def probes(sock: Socket) -> tuple[int, ...] | None:
    """What the kernel has been told, None while it sends no probes."""
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return None
    return tuple(sock.getsockopt(socket.IPPROTO_TCP, option) for option in OPTIONS)


def test_a_dialled_connection_that_lasts_is_probed_and_one_that_was_closed_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sockets.keepalive_timer, "period", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = Endpoint(socket.AF_INET, listener.getsockname())
        lasting, short = dial([endpoint], 10, 20.0), dial([endpoint], 10, 20.0)
        assert probes(lasting) is None
        short.close()
        with gevent.Timeout(10):
            while sockets.keepalive_timer.active:  # it ends when there is nothing to look at any more
                gevent.sleep(0.01)
        assert probes(lasting) == (20, 20, PROBES)
        assert not sockets._dialled
        lasting.close()


def test_a_client_probes_targets_and_data_connections_as_its_setting_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets.keepalive_timer, "period", 0.01)
    with socket.socket() as listener:  # gevent's, so that the dials run meanwhile
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        host, port = listener.getsockname()
        target = HostTarget(Address(host, port), Log("test"), 7.0)
        way = Direct([Endpoint(socket.AF_INET, (host, port))], None)
        route = Route(way, host, 10.0, 7.0, Agreement(Offer(port, 0)), None)
        dialling = gevent.spawn(route.make)
        accepted, _ = listener.accept()
        accepted.sendall(b"00000001")
        _, data = dialling.get(timeout=10)
        for sock in (target.dial(10), data.sock):
            with gevent.Timeout(10):
                while not probes(sock):
                    gevent.sleep(0.01)
            assert probes(sock) == (7, 7, PROBES)
            sock.close()
        accepted.close()


def test_the_default_of_the_setting_is_that_of_listeners_whose_connections_are_no_sessions() -> None:
    assert Settings().keepalive == KEEPALIVE


@each_row(
    ("interval", "heartbeat", "keepalive", "expected"),
    [
        (5.0, 5000, 15.0, (5, 5, 2)),
        (5.0, 60_000, 15.0, (15, 15, 11)),
        (60.0, 60_000, 7200.0, (60, 60, 2)),
        (60.0, 60_000, 1.0, (1, 1, 127)),
    ],
)
def test_a_control_connection_with_rare_heartbeats_is_probed_between_them_and_ends_no_earlier(
    interval: float, heartbeat: int, keepalive: float, expected: tuple[int, ...]
) -> None:
    with tcp_pair() as (stream, _):
        control = ClientControl(stream, interval, Log("client"), Stats(), keepalive)
        control.agree(Agreement(Offer(1, 0, heartbeat)))
        assert probes(stream.sock) == expected
        bound = stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert bound == 3 * heartbeat
