"""Visitors on another machine: rules, service and access log have their real addresses, of IPv4 and IPv6."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

import pytest

from tests.e2e.test_proxy_protocol import NGINX
from tests.support.programs import running_nginx
from tests.support.sockets import PATIENCE, Address, format_address, free_port, has_ipv6, is_over, receive_all, until
from tests.support.tunnel import OurClient, OurServer
from tests.support.v2_network import CABLE, SERVER, Network

SERVER_V6 = "2001:db8::1"
VISITORS = {SERVER: ("192.0.2.2", "192.0.2.66"), SERVER_V6: ("2001:db8::2", "2001:db8::66")}
"""By the address that they connect to: one that is served, and one that is in DENY."""

RULES = "allow=192.0.2.0/25,2001:db8::/64&deny=192.0.2.64/26,2001:db8::60/124"
STRANGERS = {SERVER: "192.0.2.130", SERVER_V6: "2001:db8:0:1::2"}
"""Addresses that are in no list, so that ALLOW refuses them."""


def addressed(network: Network) -> None:
    """Give both ends of the cable all addresses, those of IPv6 at once."""
    network.server.ip("address", "add", f"{SERVER_V6}/32", "dev", CABLE, "nodad")
    for address in (*VISITORS[SERVER][1:], STRANGERS[SERVER]):
        network.client.ip("address", "add", f"{address}/24", "dev", CABLE)
    for address in (*VISITORS[SERVER_V6], STRANGERS[SERVER_V6]):
        network.client.ip("address", "add", f"{address}/32", "dev", CABLE, "nodad")


def visit(network: Network, address: Address, source: str) -> socket.socket:
    """A connection from the other machine."""
    return network.client.inside(lambda: socket.create_connection(address, PATIENCE, (source, 0)))


def visit_in_vain(network: Network, address: Address, source: str) -> str:
    """A connection from the other machine that is refused, perhaps before it knows that it is one; its address."""

    def come() -> str:
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        with socket.socket(family) as visitor:
            visitor.settimeout(PATIENCE)
            visitor.bind((source, 0))
            with contextlib.suppress(ConnectionResetError):
                visitor.connect(address)
                assert is_over(visitor)
            return format_address(visitor.getsockname()[:2])

    return network.client.inside(come)


@pytest.mark.programs("network namespaces", "nginx")
@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_visitors_on_another_machine_are_judged_and_told_by_their_addresses(
    stack: contextlib.ExitStack, tmp_path: Path
) -> None:
    """One socket of the server is for both families; IPv4 is not seen as IPv6."""
    log, port = tmp_path / "access.log", free_port()
    network = stack.enter_context(Network())
    addressed(network)

    def start() -> tuple[OurServer, OurClient]:
        nginx = stack.enter_context(running_nginx(tmp_path, port, NGINX.format(port=port)))
        server = stack.enter_context(OurServer(1, target="[::]:0", query=f"{RULES}&access_log={log}"))
        client = OurClient(server.tunnel_address, nginx, query="tls=1&proxy_protocol=v2")
        return server, stack.enter_context(client)

    server, client = network.server.inside(start)
    client.wait_until_connected()
    outcomes = {}
    for host, (served, denied) in VISITORS.items():
        address = (host, server.visitor_address[1])
        with visit(network, address, served) as visitor:
            visitor.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            answer = receive_all(visitor).rpartition(b"\r\n\r\n")[2].decode()
            assert answer == f"{served} {visitor.getsockname()[1]} {address[1]}"
            outcomes[format_address(visitor.getsockname()[:2])] = ("completed", format_address(address))
        for source, reason in ((denied, "denied"), (STRANGERS[host], "not_allowed")):
            shown = visit_in_vain(network, address, source)
            server.wait_for("visitor.refused", visitor=shown, reason=reason)
            outcomes[shown] = (reason, format_address(address))
    until(lambda: len(log.read_text().splitlines()) == len(outcomes))
    lines = map(json.loads, log.read_text().splitlines())
    assert {line["visitor"]: (line["outcome"], line["local"]) for line in lines} == outcomes
