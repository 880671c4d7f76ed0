"""fail2ban with the files of contrib bans visitors by the tunnel itself: it writes the file of DENY=@FILE."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest

from tests.e2e.test_accept_proxy import ACCEPT, proxy_connection
from tests.e2e.test_visitors import assert_refused, assert_served, visit
from tests.support.fail2ban import Jail
from tests.support.sockets import is_refused, until
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel

SCANNER, OTHER = "127.0.0.9", "127.0.0.2"
SCANNER_V6 = "2001:db8::9"
HEADER_V6 = f"PROXY TCP6 {SCANNER_V6} 2001:db8::1 51000 443\r\n".encode()
RETRIES = 3

LOCAL = """
[nodepass]
action = nodepass-deny[file={deny}, reload_command="kill -HUP {pid}"]
logpath = {log}
maxretry = {retries}
ignoreself = false
"""


def visit_from(tunnel: Tunnel, source: str) -> socket.socket:
    """A connection of an address; that of IPv6 is one that a proxy tells."""
    if source == SCANNER_V6:
        return proxy_connection(tunnel.visitor_address, HEADER_V6)
    return visit(tunnel, source)


@pytest.mark.programs("fail2ban-server", "fail2ban-client", "flock")
def test_a_jail_bans_and_unbans_by_the_file_of_deny(stack: contextlib.ExitStack, tmp_path: Path) -> None:
    """Other lines stay, also a last one without an end. A stop lifts the bans, and the next start restores them."""
    deny, log = tmp_path / "deny", tmp_path / "access.log"
    others = ["198.51.100.7 # fail2ban has not banned this", f"{SCANNER}0"]
    deny.write_text("\n".join(others))
    target = stack.enter_context(Target())
    server = stack.enter_context(OurServer(query=f"deny=@{deny}&access_log={log}&{ACCEPT}"))
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    jail = Jail(tmp_path, LOCAL.format(deny=deny, log=log, pid=server.pid, retries=RETRIES))
    lines = [*others, *(f"{source} # banned by fail2ban, jail nodepass" for source in (SCANNER, SCANNER_V6))]

    with jail.running():
        assert_served(tunnel, SCANNER)
        for source in (SCANNER, SCANNER_V6):
            mark = server.mark()
            for _ in range(RETRIES):
                with visit_from(tunnel, source), target.accept():
                    pass  # neither says anything
            server.wait_for("rules.reloaded", after=mark)
        assert deny.read_text().splitlines() == lines
        assert_refused(tunnel, SCANNER, "denied")
        assert is_refused(lambda: visit_from(tunnel, SCANNER_V6))
        server.wait_for("visitor.refused", visitor=f"[{SCANNER_V6}]:51000", reason="denied")
        assert_served(tunnel, OTHER)

        mark = server.mark()
        assert jail.ask("set", "nodepass", "unbanip", SCANNER) == "1"
        server.wait_for("rules.reloaded", after=mark)
        assert_served(tunnel, SCANNER)
        mark = server.mark()
    assert deny.read_text().splitlines() == others
    server.wait_for("rules.reloaded", after=mark)

    deny.write_text("\n".join([*others, lines[2], ""]))
    with jail.running():
        until(lambda: deny.read_text().splitlines() == [*others, lines[3]])
    assert deny.read_text().splitlines() == others
