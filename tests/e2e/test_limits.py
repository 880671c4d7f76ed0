"""What the limits on memory and open files allow is said at start, and kept to."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nodepass.config import Settings
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


def test_a_limit_on_open_files_lowers_the_settings_and_the_tunnel_still_serves(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(Limited(env={}).limited(n=100))
    needed = 2 * 1024 + 1024 + limits.OWN + 100 // 4  # the last is for who has not shown who it is
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


def test_a_limit_on_address_space_is_told(stack: contextlib.ExitStack) -> None:
    server = stack.enter_context(Limited(env={}).limited(v=512 << 10))
    assert server.find("process.limits", memory_of="address space", memory_sessions=lambda sessions: sessions > 0)


@pytest.mark.parametrize(("tls", "fitting"), [(False, 2816), (True, 512)])
def test_more_sessions_than_fit_into_memory_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, tls: bool, fitting: int
) -> None:
    monkeypatch.setattr(limits, "memory_limits", lambda: [limits.Memory("cgroup", SMALL)])
    monkeypatch.setattr(limits, "raise_descriptor_limit", lambda: 1 << 20)
    assert not limits.survey(Settings(semaphore_limit=fitting), 1, tls).warnings
    survey = limits.survey(Settings(semaphore_limit=fitting + 1024), 1, tls)
    (warning,) = survey.warnings
    assert (warning.reason, warning.available, warning.semaphore_limit) == ("memory", SMALL, fitting)
    assert warning.needed == SMALL + 1024 * limits.MEMORY_PER_SESSION[tls]
    assert survey.settings.semaphore_limit == fitting + 1024


def test_settings_are_lowered_in_proportion_but_leave_a_pool() -> None:
    settings = Settings(semaphore_limit=1000, min_pool_capacity=64, max_pool_capacity=2000)
    assert limits.fit_descriptors(settings, 2, 8000 + limits.OWN) == settings
    half = limits.fit_descriptors(settings, 2, 4000 + limits.OWN)
    assert (half.semaphore_limit, half.min_pool_capacity, half.max_pool_capacity) == (500, 64, 1000)
    many = limits.fit_descriptors(Settings(semaphore_limit=1_000_000), 1, 1000 + limits.OWN)
    assert (many.semaphore_limit, many.min_pool_capacity, many.max_pool_capacity) == (492, 16, 16)
    least = limits.fit_descriptors(settings, 2, 3)
    assert (least.semaphore_limit, least.min_pool_capacity, least.max_pool_capacity) == (1, 1, 1)


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "100", "a/b/memory.max": "max"}, [100]),
        ("0::/a/b\n", {"a/memory.max": "100", "a/b/memory.max": "50"}, [50, 100]),
        ("0::/on/the/host\n", {"memory.max": "70"}, [70]),
        ("0::/a\n", {"unified/a/memory.max": "30"}, [30]),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "60"}, [60]),
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, []),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "60"}, []),
    ],
)
def test_the_limits_of_every_cgroup_above_count(
    tmp_path: Path, membership: str, files: dict[str, str], expected: list[int]
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    root = tmp_path / "fs"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert list(limits._cgroup_limits(root, tmp_path / "cgroup")) == expected
