"""A tunnel that is connected and cannot serve: both ends are unready, say why once, and say when it is over."""

from __future__ import annotations

import contextlib
import re
import socket
from functools import partial

from tests.support.process import Nodepass
from tests.support.scrape import get, metrics_of
from tests.support.sockets import connect, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer
from tests.support.wire2.middle import Forwarder

LOOKS = {**CALM, "REPORT_INTERVAL": "500ms", "METRICS_LISTEN": "127.0.0.1:0"}


def readiness(run: Nodepass, status: int, reason: str) -> bool:
    """Whether /readyz of a run answers so now."""
    response = get(metrics_of(run), "/readyz")
    return response.status == status and response.body.rstrip().endswith(f": {reason}")


def test_both_ends_are_unready_and_say_why_while_a_visitor_would_not_be_served() -> None:
    """First the data port cannot be reached, and then the target."""
    with (
        Target() as target,
        OurServer(tunnel="127.0.0.2:0", env=LOOKS) as server,
        Forwarder(server.tunnel_address, ("127.0.0.3", 0)) as way,
        OurClient(way.address, target.address, env=LOOKS) as client,
    ):
        port = server.data_address[1]
        said = client.wait_for("data.missing", address=f"127.0.0.3:{port}", reason="unreachable")["message"]
        assert "Connection refused; is the data port reachable? DATA_PORT=tunnel on the server needs one port" in said
        said = server.wait_for("data.missing", port=port)["message"]
        assert f"The firewall must let TCP port {port} through; DATA_PORT=tunnel needs one port only" in said
        for end in (server, client):
            until(partial(readiness, end, 503, "no data connections"))
        with Forwarder(server.data_address, ("127.0.0.3", port)):
            for end in (server, client):
                end.wait_for("data.restored")
                until(partial(readiness, end, 200, "ready"))
            target.close()
            with contextlib.suppress(ConnectionResetError), connect(server.visitor_address) as visitor:
                visitor.recv(1)
            client.wait_for("target.unreachable", error=re.compile("Connection refused"))
            server.wait_for("client.target_unreachable")
            until(partial(readiness, server, 503, "the client's target does not answer"))
            until(partial(readiness, client, 503, "the target does not answer"))
            with socket.create_server(target.address):
                client.wait_for("target.up")
                server.wait_for("client.target_reachable")
                for end in (server, client):
                    until(partial(readiness, end, 200, "ready"))
        for end in (server, client):
            assert len(end.find("data.missing")) == len(end.find("data.restored")) == 1
