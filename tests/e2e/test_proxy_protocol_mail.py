"""The PROXY protocol to mail servers, which speak first: their logs have the visitor's address."""

from __future__ import annotations

import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.e2e.test_proxy_protocol import HOSTS
from tests.support.process import scrubbed
from tests.support.programs import installed, running, tunnel_to
from tests.support.sockets import PATIENCE, Address, free_port, parse_address, receive_all, until

VISITORS = {"127.0.0.1": "127.0.0.9", "::1": "::1"}
"""Where visitors come from, by the host that they connect to."""

POSTFIX = "/usr/lib/postfix/sbin"
POSTFIX_MAIN = """
compatibility_level = 3.6
queue_directory = {root}/queue
data_directory = {root}/data
command_directory = /usr/sbin
daemon_directory = {sbin}
maillog_file = {root}/log
maillog_file_prefixes = {root}
myhostname = mail.test
mydestination =
local_recipient_maps =
alias_maps =
proxy_read_maps =
smtpd_peername_lookup = no
smtpd_relay_restrictions = reject
smtpd_upstream_proxy_protocol = haproxy
"""
POSTFIX_SERVICES = """
127.0.0.1:{port} inet n - n - - smtpd
postlog unix-dgram n - n - 1 postlogd
proxymap unix - - n - - proxymap
anvil unix - - n - 1 anvil
"""

DOVECOT = """
base_dir = {root}/run
state_dir = {root}/run
log_path = {root}/log
protocols = imap
listen = 127.0.0.1
ssl = no
haproxy_trusted_networks = 127.0.0.1
passdb {{
  driver = static
}}
service imap-login {{
  chroot =
  inet_listener imap {{
    port = {port}
    haproxy = yes
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
"""


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory that the servers' own users may read, other than pytest's."""
    with tempfile.TemporaryDirectory(prefix="nodepass-mail-") as made:
        path = Path(made)
        path.chmod(0o755)
        yield path


def running_postfix(root: Path, port: int) -> AbstractContextManager[Address]:
    """Postfix with an SMTP server that requires headers."""
    for name in ("etc", "queue", "data"):
        (root / name).mkdir()
    (root / "etc" / "main.cf").write_text(POSTFIX_MAIN.format(root=root, sbin=POSTFIX))
    (root / "etc" / "master.cf").write_text(POSTFIX_SERVICES.format(port=port))
    subprocess.run(["chown", "postfix", str(root / "data")], check=True)
    command = [installed("postfix"), "-c", str(root / "etc"), "check"]
    subprocess.run(command, env=scrubbed(), check=True, timeout=60)
    return running(port, f"{POSTFIX}/master", "-d", "-c", str(root / "etc"))


def running_dovecot(root: Path, port: int) -> AbstractContextManager[Address]:
    """Dovecot with an IMAP server that requires headers."""
    (root / "dovecot.conf").write_text(DOVECOT.format(root=root, port=port))
    return running(port, "dovecot", "-F", "-c", str(root / "dovecot.conf"))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    ("start", "says", "logged"),
    [
        pytest.param(
            running_postfix,
            b"QUIT\r\n",
            ": connect from unknown[{}]",
            marks=pytest.mark.programs("postfix"),
            id="Postfix",
        ),
        pytest.param(running_dovecot, b"a LOGOUT\r\n", "rip={},", marks=pytest.mark.programs("dovecot"), id="Dovecot"),
    ],
)
def test_a_mail_server_logs_the_visitors_address(
    root: Path, start: Callable[[Path, int], AbstractContextManager[Address]], says: bytes, logged: str, host: str
) -> None:
    visits = logged.format(VISITORS[host])
    with start(root, free_port()) as service:
        for number, version in enumerate(("v1", "v2"), 1):
            with (
                tunnel_to(service, 1, host, PROXY_PROTOCOL=version) as visitors,
                socket.create_connection(parse_address(visitors), PATIENCE, (VISITORS[host], 0)) as visitor,
            ):
                assert visitor.recv(3) in (b"220", b"* O"), "it speaks first"
                visitor.sendall(says)
                receive_all(visitor)
                until(lambda number=number: (root / "log").read_text().count(visits) == number)
