"""What the limits on memory and open files allow is said at start, and kept to."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from nodepass.daemon import limits
from tests.support import cgroup
from tests.support.sockets import receive_exactly
from tests.support.target import Target
from tests.support.tunnel import OurClient, OurServer, Tunnel, assert_connected

SMALL = 64 << 20
HELD = 500
BULK = 256 << 10


class Limited(OurServer):
    """A server whose resource limits are set before it begins."""

    def limited(self, **limits: int) -> Limited:
        """The letters are those of the shell's `ulimit`."""
        options = "".join(f"ulimit -{letter} {value}; " for letter, value in limits.items())
        self.prefix = ("/bin/sh", "-c", f'{options}exec "$0" "$@"')
        return self


@pytest.mark.programs("memory cgroups")
@pytest.mark.parametrize("tls", [0, 1])
def test_in_64_mib_a_server_holds_500_sessions_that_have_carried_much_both_ways(
    stack: contextlib.ExitStack, tls: int
) -> None:
    group = stack.enter_context(cgroup.memory_cgroup(SMALL))
    target = stack.enter_context(Target())
    server = OurServer(tls, env={"POOL_GET_TIMEOUT": "60s"}, log="info")
    server.prefix = group.prefix
    stack.enter_context(server)
    assert server.find("process.limits", memory=SMALL, memory_of="cgroup")
    client = stack.enter_context(OurClient(server.tunnel_address, target.address, env={}, log="info"))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    up, down = os.urandom(BULK), os.urandom(BULK)
    held = []
    with ThreadPoolExecutor(2) as senders:
        for _ in range(HELD):
            visitor, service = stack.enter_context(tunnel.session())
            sending = [senders.submit(visitor.sendall, up), senders.submit(service.sendall, down)]
            assert receive_exactly(service, BULK) == up
            assert receive_exactly(visitor, BULK) == down
            for each in sending:
                each.result()
            held.append((visitor, service))
    for visitor, service in held:
        assert_connected(visitor, service)
    assert group.kills == 0
    assert server.is_running
    print(f"tls={tls}: peak {group.peak / (1 << 20):.1f} MiB")


@pytest.mark.programs
def test_a_limit_on_open_files_lowers_the_settings_and_the_tunnel_still_serves(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(Limited(env={}).limited(n=100))
    needed = 2 * 1024 + 1024 + limits.OWN + 100 // 4  # the last is for pending connections
    server.wait_for("process.limits_exceeded", level="warn", reason="open_files", needed=needed, available=100)
    server.wait_for("process.limits", files=100, sessions=14)
    target = stack.enter_context(Target())
    client = stack.enter_context(OurClient(server.tunnel_address, target.address))
    client.wait_until_connected()
    tunnel = Tunnel(server, client, target)
    opened = [stack.enter_context(tunnel.session()) for _ in range(14)]
    for visitor, service in opened:
        assert_connected(visitor, service)
    assert not server.find(error=re.compile(re.escape(os.strerror(errno.EMFILE))))


@pytest.mark.programs
def test_a_limit_on_address_space_is_told(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(Limited(env={}).limited(v=512 << 10))
    assert server.find("process.limits", memory_of="address space", memory_sessions=lambda sessions: sessions > 0)
