"""`nodepass --check`, started: a server's addresses, and which process has one that is taken."""

from __future__ import annotations

import contextlib
import re
import socket
from pathlib import Path

import pytest

from tests.support.checks import check_of, found, trouble
from tests.support.sockets import format_address, free_port, has_ipv6
from tests.support.tunnel import OurServer

URL = "server://127.0.0.1:0/127.0.0.1:0?tls=1"


def test_a_server_that_could_start_passes_without_a_warning() -> None:
    done = check_of("server://127.0.0.1:0/127.0.0.1:0?tls=1")
    assert (done.code, trouble(done)) == (0, [])
    for what in ("tunnel address", "data port", r"target address \(tcp\)", r"target address \(udp\)"):
        assert found(done, "ok", f"{what} 127.0.0.1:0: can be listened on")
    assert found(done, "ok", r"limits: [\d,]+ open files allow")


def test_a_port_that_a_stranger_holds_fails_and_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = format_address(holder.getsockname())
        done = check_of(f"server://{address}/127.0.0.1:0?tls=1")
    assert done.code == 1
    assert found(done, "fail", rf"tunnel address {address}: in use by \S+, process \d+")
    assert len(trouble(done)) == 1


@pytest.mark.programs
def test_a_udp_port_in_use_is_told_apart_from_tcp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("127.0.0.1", free_port()))
        address = format_address(holder.getsockname())
        done = check_of(f"server://127.0.0.1:0/{address}?tls=1")
    assert done.code == 1
    assert found(done, "fail", rf"target address \(udp\) {address}: in use by")
    assert found(done, "ok", rf"target address \(tcp\) {address}")


@pytest.mark.programs
def test_ports_that_the_same_running_tunnel_holds_are_a_warning(stack: contextlib.ExitStack) -> None:
    port = free_port(2)
    tunnel, target = f"127.0.0.1:{port}", f"127.0.0.1:{port + 1}"
    server = stack.enter_context(OurServer(tunnel=tunnel, target=target))
    done = check_of(f"server://{tunnel}/{target}?tls=1", DATA_PORT=str(server.data_address[1]))
    assert done.code == 0
    assert len(trouble(done)) == 4
    for line in trouble(done):
        assert re.match(rf"warn .*: in use by a running nodepass \(\S+, process {server.pid}\): expected", line)


@pytest.mark.programs
@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6 loopback address")
def test_an_ipv6_port_in_use_is_found() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as holder:
        port = holder.getsockname()[1]
        done = check_of(f"server://[::1]:{port}/127.0.0.1:0?tls=1")
    assert done.code == 1
    assert found(done, "fail", rf"tunnel address \[::1\]:{port}: in use by \S+, process")


@pytest.mark.programs
def test_a_unix_socket_for_metrics_is_tried_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    done = check_of(URL, METRICS_LISTEN=f"unix:{path}")
    assert (done.code, trouble(done), path.exists()) == (0, [], False)
    with OurServer(env={"METRICS_LISTEN": f"unix:{path}"}):
        done = check_of(URL, METRICS_LISTEN=f"unix:{path}")
    assert done.code == 0
    assert found(done, "warn", f"METRICS_LISTEN unix:{path}: a process listens there")
    done = check_of(URL, METRICS_LISTEN=f"unix:{tmp_path}/none/metrics")
    assert done.code == 1
    assert found(done, "fail", f"METRICS_LISTEN unix:{tmp_path}/none/metrics: No such file")
