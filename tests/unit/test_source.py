"""Where a client's connections and datagrams come from: SOURCE_ADDRESS and TARGET_SOURCE_ADDRESS."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
from gevent import socket

from nodepass.client.target import HostTarget
from nodepass.client.targets import Targets
from nodepass.config.outbound import parse_source
from nodepass.config.settings import Settings
from nodepass.config.urls import Address
from nodepass.log import Log
from nodepass.net.sockets import Endpoint, dial
from nodepass.net.udp import AnyPort, dial_udp
from nodepass.outbound.source import bind_of, find_missing
from nodepass.stats import Stats

HERE, ABSENT = "127.0.0.2", "192.0.2.7"


def listener(kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> Any:
    sock = socket.socket(family, kind)
    sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    return sock


def bind(text: str) -> Any:
    return bind_of(parse_source(text), "SOURCE_ADDRESS")


def test_a_connection_and_datagrams_come_from_the_address() -> None:
    with closing(listener()) as tcp, closing(listener(socket.SOCK_DGRAM)) as udp:
        to_tcp, to_udp = (Endpoint(socket.AF_INET, each.getsockname()) for each in (tcp, udp))
        with closing(dial([to_tcp], 10, bind=bind(HERE))) as sock:
            assert sock.getsockname()[0] == HERE
        with closing(dial_udp(to_udp, bind=bind(HERE))) as connected:
            assert connected.getsockname()[0] == HERE
        with closing(AnyPort(to_udp, bind(HERE))) as any_port:
            any_port.send(b"question")
            assert udp.recvfrom(100)[1][0] == HERE


def test_two_connections_from_one_address_share_its_ports() -> None:
    """Without IP_BIND_ADDRESS_NO_PORT each would take a port of its own for all destinations."""
    with closing(listener()) as tcp, closing(dial([Endpoint(socket.AF_INET, tcp.getsockname())], 10, bind=bind(HERE))):
        unconnected = socket.socket()
        with closing(unconnected):
            bind(HERE)(unconnected)
            assert unconnected.getsockname() == (HERE, 0)


def test_an_interface_reaches_only_what_is_behind_it() -> None:
    with closing(listener()) as tcp:
        dial([Endpoint(socket.AF_INET, tcp.getsockname())], 10, bind=bind("dev:lo")).close()
    with pytest.raises(
        OSError, match=r"SOURCE_ADDRESS=dev:nosuch0: (this machine has no such interface|not permitted)"
    ):
        dial([Endpoint(socket.AF_INET, ("127.0.0.1", 9))], 10, bind=bind("dev:nosuch0"))


def test_what_is_not_there_is_named_at_each_dial_and_at_the_start() -> None:
    words = f"SOURCE_ADDRESS={ABSENT}: this machine has no such address"
    with pytest.raises(OSError, match=words):
        dial([Endpoint(socket.AF_INET, ("127.0.0.1", 9))], 10, bind=bind(ABSENT))
    settings = Settings(source_address=parse_source(ABSENT), target_source_address=parse_source(HERE))
    assert [error.strerror for error in find_missing(settings)] == [words]


def test_only_addresses_of_the_same_family_are_tried() -> None:
    with closing(listener()) as tcp:
        other = Endpoint(socket.AF_INET6, ("::1", 9, 0, 0))
        same = Endpoint(socket.AF_INET, tcp.getsockname())
        dial([other, same], 10, bind=bind(HERE)).close()
        with pytest.raises(OSError, match="an address of IPv4 cannot connect to one of IPv6"):
            dial([other], 10, bind=bind(HERE))


def test_dials_to_targets_have_a_setting_of_their_own() -> None:
    with closing(listener()) as tcp:
        place = Address(*tcp.getsockname())
        settings = Settings(source_address=parse_source(ABSENT), target_source_address=parse_source(HERE))
        [target] = Targets([place], settings, Log("test"), Stats()).all
        assert isinstance(target, HostTarget)
        with closing(target.dial(10)) as sock:
            assert sock.getsockname()[0] == HERE
