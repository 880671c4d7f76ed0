"""fail2ban's own service bans visitors by a tunnel's unit, set up as docs/visitors.md says."""

from __future__ import annotations

import contextlib
import shutil
import socket

import pytest

from tests.support.box import BootError, Box, Unit
from tests.support.fail2ban import CONTRIB
from tests.support.process import REPOSITORY
from tests.support.sockets import PATIENCE, is_refused, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, assert_connected

SCANNER, OTHER = "127.0.0.9", "127.0.0.8"
VISITORS = ("127.0.0.1", 8443)

LOGS = """\
[Service]
LogsDirectory=nodepass/%i
LogsDirectoryMode=0750
"""

LOCAL = """
[DEFAULT]
ignoreself = false
[sshd]
enabled = false
"""
"""What the machine of a test needs: visitors that are on it, and no log of an SSH server."""


def documented(after: str) -> list[str]:
    """The commands of the next block in the section about fail2ban."""
    section = (REPOSITORY / "docs" / "visitors.md").read_text().partition("### fail2ban")[2]
    lines = section.partition(after)[2].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("    "))
    block = lines[first:]
    return [line.strip() for line in block[: block.index("")]]


def visit(box: Box, source: str) -> socket.socket:
    return box.inside(lambda: socket.create_connection(VISITORS, PATIENCE, (source, 0)))


@pytest.mark.programs("a box", "fail2ban-server")
def test_fail2ban_bans_by_the_unit_as_the_document_says(stack: contextlib.ExitStack) -> None:
    try:
        box = stack.enter_context(Box())
    except BootError as error:
        pytest.skip(f"systemd does not boot here: {error}")
    shutil.copytree(CONTRIB, box.root / "root/contrib/fail2ban")
    box.write("/etc/fail2ban/jail.d/here.local", LOCAL)
    settings = {**CALM, "ACCESS_LOG": "/var/log/nodepass/web/access.log"}
    server = stack.enter_context(Unit(box, "web", "server://127.0.0.1:10101/127.0.0.1:8443?tls=0", settings))
    failed = stack.enter_context(Unit(box, "broken", "server://nothing"))
    box.systemctl("start", failed.name, check=False)
    server.drop_in(LOGS)
    server.start()
    for command in [*documented("can be forged."), *documented("is not.")]:
        box.run("sh", "-ec", f"cd /root; {command}")
    target = stack.enter_context(box.inside(Target))
    client = OurClient(("127.0.0.1", 10101), target.address)
    box.inside(lambda: stack.enter_context(client))
    client.wait_until_connected()
    until(lambda: "nodepass" in box.run("fail2ban-client", "status", check=False))
    for _ in range(20):
        with visit(box, SCANNER), target.accept():
            pass  # neither says anything
    server.wait_for("rules.reloaded")
    assert f"{SCANNER} # banned" in box.run("cat", "/etc/nodepass.deny")
    assert is_refused(lambda: visit(box, SCANNER))
    with visit(box, OTHER) as visitor, target.accept() as service:
        assert_connected(visitor, service)
    assert box.run("fail2ban-client", "unban", SCANNER).strip() == "1"
    until(lambda: len([entry for entry in server.journal() if entry.matches("rules.reloaded", {})]) == 2)
    with visit(box, SCANNER) as visitor, target.accept() as service:
        assert_connected(visitor, service)
    assert " ERROR " not in box.run("cat", "/var/log/fail2ban.log")
    assert box.run("cat", "/etc/nodepass.deny") == ""
