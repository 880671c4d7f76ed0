"""Settings in URLs: two tunnels of one process, each with its own."""

from __future__ import annotations

import contextlib
import signal
import socket

import pytest

from tests.support.process import Nodepass
from tests.support.sockets import connect, datagram_socket, free_port, parse_address
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, assert_connected, exchange

HOST = "127.0.0.1"
OWN = {"web": "udp=off&min_pool_capacity=3&max_pool_capacity=3", "game": "tcp=off&report_interval=4s"}
CAPACITIES = {"web": 3, "game": 2}
PROTOCOLS = {"web": "tcp", "game": "udp"}
CROWD = {**CALM, "MIN_POOL_CAPACITY": "2", "MAX_POOL_CAPACITY": "6"}


def test_each_tunnel_of_a_process_has_the_settings_of_its_url() -> None:
    with contextlib.ExitStack() as stack:
        port = free_port()
        urls = [f"server://{HOST}:{port}/{HOST}:0?name={name}&{own}&log=debug" for name, own in OWN.items()]
        server = stack.enter_context(Nodepass(*urls, env={**CROWD, "MIN_POOL_CAPCITY": "9", "UDP_LANES": ""}))
        opened = {name: server.wait_for("server.listening", tunnel=f"server:{port}/{name}") for name in OWN}
        assert len(server.find("config.warning", reason="unknown_variable")) == 1
        assert {name: entry["protocols"] for name, entry in opened.items()} == PROTOCOLS
        visitors = {name: parse_address(entry["target_address"]) for name, entry in opened.items()}
        with socket.socket(type=socket.SOCK_DGRAM) as udp:
            udp.bind(visitors["web"])  # not opened by the server
        with pytest.raises(ConnectionRefusedError):
            connect(visitors["game"])

        target = stack.enter_context(Target())
        urls = [f"client://{HOST}:{port}/{HOST}:{target.address[1]}?name={name}&{own}" for name, own in OWN.items()]
        client = stack.enter_context(Nodepass(*urls, env=CROWD))
        for name in OWN:
            server.wait_for("client.connected", tunnel=f"server:{port}/{name}")
        visitor = stack.enter_context(connect(visitors["web"]))
        assert_connected(visitor, stack.enter_context(target.accept()))
        asking = stack.enter_context(datagram_socket())
        asking.sendto(b"question", visitors["game"])
        assert target.udp.recvfrom(64)[0] == b"question"

        for process, role in ((server, "server"), (client, "client")):
            process.send(signal.SIGUSR1)
            reports = {
                name: process.wait_for("tunnel.report", tunnel=f"{role}:{port}/{name}", level="info") for name in OWN
            }
            assert {name: report["pool_capacity"] for name, report in reports.items()} == CAPACITIES
            assert all(f"{PROTOCOLS[name]} only" in report.line for name, report in reports.items())


def test_visitors_of_a_client_without_tcp_are_reset_at_once_and_cost_no_data_connection() -> None:
    with contextlib.ExitStack() as stack:
        target, server = stack.enter_context(Target()), stack.enter_context(OurServer())
        client = stack.enter_context(OurClient(server.tunnel_address, target.address, query="tcp=off", env=CALM))
        server.wait_for_client()
        server.wait_for("pool.added")
        for _ in range(5):
            with pytest.raises(ConnectionResetError), connect(server.visitor_address) as visitor:
                visitor.recv(1)
        assert server.wait_for("visitor.unserved")["reason"] == "tcp_off"
        assert exchange(server.visitor_address, target, b"question", b"answer") == (b"question", b"answer")
        assert [entry["kind"] for entry in client.find("launch.received")] == ["lane"]
