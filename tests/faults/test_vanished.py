"""A peer that vanishes while bytes are in flight to it: its session ends at both ends, and those that live go on."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from tests.faults.test_dead_link import QUICK, SLOW, Place, place
from tests.support import with_bounds
from tests.support.process import Environment
from tests.support.sockets import connect
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, assert_connected
from tests.support.v2_network import SERVER

__all__ = ["place"]

SHORT, LONG = "2", "3600"
"""Seconds without an acknowledgement that a test waits for, and those that it does not."""

pytestmark = pytest.mark.programs("network namespaces")


def bounded(in_flight: str, suspected: str) -> tuple[str, ...]:
    """The program with these bounds; behind a shut window a session may wait."""
    return sys.executable, str(Path(with_bounds.__file__)), in_flight, LONG, suspected


def start(place: Place, env: Environment, program: tuple[str, ...]) -> tuple[OurServer, OurClient, Target]:
    """A tunnel over the cable, connected."""

    def make_server() -> OurServer:
        server = OurServer(tunnel=f"{SERVER}:0", env=env)  # visitors come by loopback, which is not pulled
        server.program = program
        return server

    server, target = place.on_server(make_server), place.on_client(Target)

    def make_client() -> OurClient:
        client = OurClient(server.tunnel_address, target.address, env=env)
        client.program = program
        return client

    client = place.on_client(make_client)
    client.wait_until_connected()
    return server, client, target


def open_session(place: Place, server: OurServer, target: Target) -> tuple[socket.socket, socket.socket]:
    """A visitor on the server's machine and its service on the client's, which have talked."""
    visitor = place.network.server.inside(lambda: connect(server.visitor_address))
    service = target.accept()
    assert_connected(visitor, service)
    return visitor, service


def assert_both_are_reset(visitor: socket.socket, service: socket.socket) -> None:
    """Check that both ends of a session are reset, once each has sent what will never arrive."""
    visitor.sendall(b"are you there?")
    service.sendall(b"are you?")
    for end in (visitor, service):
        with pytest.raises(ConnectionResetError):
            end.recv(1)


def test_sessions_with_bytes_in_flight_end_when_nothing_is_acknowledged(place: Place) -> None:
    server, client, target = start(place, SLOW, bounded(SHORT, LONG))
    visitor, service = open_session(place, server, target)
    with visitor, service:
        place.network.pull()
        assert_both_are_reset(visitor, service)
    for run in (server, client):
        run.wait_for("session.closed", outcome="vanished")


def test_when_the_other_end_has_vanished_its_sessions_end_and_idle_ones_survive(place: Place) -> None:
    server, client, target = start(place, QUICK, bounded(LONG, SHORT))
    (visitor, service), (idle, idle_service) = (open_session(place, server, target) for _ in range(2))
    marks = server.mark(), client.mark()
    with visitor, service, idle, idle_service:
        place.network.pull()
        assert_both_are_reset(visitor, service)
        for run, mark in ((server, marks[0]), (client, marks[1])):
            run.wait_for("session.closed", after=mark, outcome="vanished")
        place.network.mend()
        client.wait_until_connected(after=marks[1])
        assert_connected(idle, idle_service)
