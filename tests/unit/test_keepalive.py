"""Keepalive probes are for connections that last."""

from __future__ import annotations

import gevent
import pytest
from gevent import socket

from nodepass.net import sockets
from nodepass.net.sockets import KEEPALIVE, Endpoint, Socket, dial

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
        lasting, short = dial([endpoint], 10), dial([endpoint], 10)
        assert probes(lasting) is None
        short.close()
        with gevent.Timeout(10):
            while sockets.keepalive_timer.active:  # it ends when there is nothing to look at any more
                gevent.sleep(0.01)
        assert probes(lasting) == KEEPALIVE
        assert not sockets._dialled
        lasting.close()
