"""Bugs put into the running program: none is silent, and none takes more with it than it has to.

One in a session ends that session; one in a loop has its tunnel start again after SERVICE_COOLDOWN; the other tunnels
of the process run on; the log has the traceback, the statistics count it, and the exit status is 3.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import with_bug
from tests.support.log import Entry
from tests.support.process import Environment, Nodepass
from tests.support.scrape import WATCHED, get, metrics_of, reach
from tests.support.sockets import connect, datagram_socket, format_address, free_port, until
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, assert_connected

COOLDOWN = 0.5
"""Seconds."""

SETTINGS: Environment = {"SERVICE_COOLDOWN": f"{COOLDOWN:g}s", "REPORT_INTERVAL": "500ms"}

SELDOM: Environment = {**SETTINGS, "REPORT_INTERVAL": "1h"}

BUG = 3
"""Exit status."""

Act = Callable[[OurServer, Target], None]


def broken(where: str, after: int = 0, times: int = 1) -> tuple[str, ...]:
    """The program with a bug."""
    return sys.executable, str(Path(with_bug.__file__)), where, str(after), str(times)


def visit(server: OurServer, _target: Target) -> None:
    """Come and go as a visitor, whether served or not."""
    with contextlib.suppress(OSError), connect(server.visitor_address, 1) as visitor:
        visitor.sendall(b"hello")
        visitor.settimeout(0.1)
        visitor.recv(1)


def stay_for_a_moment(server: OurServer, target: Target) -> None:
    """Be served, and leave."""
    with contextlib.suppress(OSError), connect(server.visitor_address, 1), target.accept(1):
        pass


def ask(server: OurServer, target: Target) -> None:
    """Send a datagram and have it answered, if it arrives."""
    with contextlib.suppress(OSError), datagram_socket(timeout=0.5) as visitor:
        visitor.sendto(b"hello", server.visitor_address)
        target.udp.settimeout(0.5)
        target.udp.sendto(b"answer", target.udp.recvfrom(100)[1])
        visitor.recv(100)


def hang_up(run: OurServer, _target: Target) -> None:
    run.send(signal.SIGHUP)


def dump(run: OurServer, _target: Target) -> None:
    run.send(signal.SIGUSR1)


def wait(_run: OurServer, _target: Target) -> None:
    time.sleep(0.05)  # nothing need be done: it comes by itself


IN_A_SESSION: dict[str, tuple[str, Act]] = {
    "serving a visitor": ("nodepass.server.visitor_listener:VisitorListener._serve", visit),
    "relaying, from the start": ("nodepass.net.pump:Pump.run", visit),
    "relaying, at the end of a stream": ("nodepass.net.pump:Pump.end", visit),
    "greeting a client": ("nodepass.server.control_listener:ControlListener._shake_hands", wait),
    "watching an idle connection on the client": ("nodepass.client.pool:ClientPool._become_early", visit),
    "opening a lane": ("nodepass.server.udp_flows:VisitorFlows._run", ask),
    "serving a launch": ("nodepass.client.launches:Launches._serve_tcp", visit),
    "making a data connection": ("nodepass.client.data_dialer:Route.make", wait),
    "hearing the target's datagrams": ("nodepass.client.udp_flows:TargetFlows._pass_back", ask),
    "looking at the certificate when asked": ("nodepass.server.server:Server.reload", hang_up),
    "a timer of the event loop": ("nodepass.tasks:WorkerPool._release_surplus", stay_for_a_moment),
}

WHEN_ASKED: dict[str, tuple[str, Act]] = {
    "describing the tunnel": ("nodepass.client.client:Client.describe", dump),
}
"""What a loop does as well, with each report."""

IN_A_LOOP: dict[str, tuple[str, str, Act]] = {
    "accepting visitors": ("server", "nodepass.server.visitor_listener:VisitorListener._wait_at_limit", visit),
    "accepting clients": ("server", "nodepass.server.pending:PendingConnections.accept", wait),
    "accepting data connections": ("server", "nodepass.server.data_listener:DataListener._admit_at_once", wait),
    "receiving datagrams": ("server", "nodepass.server.datagram_listener:DatagramListener._begin", ask),
    "heartbeats": ("server", "nodepass.tunnel.control:ServerControl._beat_once", wait),
    "the server's report": ("server", "nodepass.server.pool:ServerPool.end_interval", wait),
    "the client's report": ("client", "nodepass.client.pool:ClientPool.end_interval", wait),
    "connecting": ("client", "nodepass.client.connector:Connector._connect", wait),
    "reading signals": ("client", "nodepass.client.pool:ClientPool.reserve", visit),
    "filling the pool": ("client", "nodepass.client.pool:ClientPool.should_pause", wait),
    "dispatching launches": ("client", "nodepass.client.connection:Connection._dispatch", wait),
    "ending silent flows": ("client", "nodepass.tunnel.flows:FlowTable.sweep_forever", wait),
}

ALWAYS = ("accepting visitors", "connecting")
"""A loop of either side, which `make test` breaks; the others are left to `make programs`."""


def start(stack: contextlib.ExitStack, where: str, env: Environment = SETTINGS) -> tuple[OurServer, Target]:
    """One process with both ends of a tunnel and the bug; its ports stay when an end starts again."""
    port = free_port(2)
    target = stack.enter_context(Target())
    both = OurServer(log="info", tunnel=f"127.0.0.1:{port}", target=f"127.0.0.1:{port + 1}", env=env)
    both.arguments += (f"client://127.0.0.1:{port}/{format_address(target.address)}?log=info",)
    both.program = broken(where)
    return stack.enter_context(both), target


def find_bug(run: Nodepass, where: str) -> list[Entry]:
    """The lines with a traceback of the bug that was put in there."""
    return run.find(traceback=re.compile(rf"Bug: put into {re.escape(where)}"))


def is_served(target: Target, server: OurServer) -> bool:
    """Whether a visitor reaches the target."""
    try:
        with connect(server.visitor_address, 1) as visitor, target.accept(1) as service:
            assert_connected(visitor, service)
    except (OSError, AssertionError):
        return False
    return True


@pytest.mark.parametrize(
    "bugs",
    [IN_A_SESSION, pytest.param(WHEN_ASKED, marks=pytest.mark.programs)],
    ids=["in a session", "when asked"],
)
def test_a_bug_in_a_session_ends_that_session_with_a_traceback_in_the_log(
    stack: contextlib.ExitStack, bugs: dict[str, tuple[str, Act]]
) -> None:
    """One process survives them all, one after the other."""
    run, target = start(
        stack, ",".join(where for where, _ in bugs.values()), SELDOM if bugs is WHEN_ASKED else SETTINGS
    )
    run.wait_for_client()
    for name, (where, act) in bugs.items():
        until(lambda act=act, where=where: act(run, target) or find_bug(run, where), what=f"no traceback of {name}")
        assert len(find_bug(run, where)) == 1, name
    target.drain()
    until(lambda: is_served(target, run), what="serves nobody afterwards")
    assert len(run.find_crashes()) == len(bugs)
    assert not run.find("tunnel.crashed")
    mark = run.mark()
    run.send(signal.SIGUSR1)
    run.wait_for("process.bugs", after=mark, bugs=len(bugs))
    assert run.stop() == BUG


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.programs) for name in IN_A_LOOP]
)
def test_a_bug_in_a_loop_has_its_tunnel_start_again_after_the_cooldown(stack: contextlib.ExitStack, name: str) -> None:
    side, where, act = IN_A_LOOP[name]
    run, target = start(stack, where)
    until(lambda: act(run, target) or run.find("tunnel.crashed"), what="no tunnel that starts again")
    assert find_bug(run, where)
    crash = run.find("tunnel.crashed")[0]
    mark = run.entries.index(crash)
    again = run.wait_for("server.listening" if side == "server" else "server.connected", after=mark)
    assert again.moment - crash.moment >= COOLDOWN, "a bug at every start would be a busy loop"
    target.drain()
    until(lambda: is_served(target, run), what="serves nobody afterwards")
    run.send(signal.SIGUSR1)
    run.wait_for("tunnel.report", after=mark, counters=lambda counters: counters["trouble"].get("crashes") == 1)
    assert run.stop() == BUG


@pytest.mark.programs
def test_a_bug_in_one_tunnel_is_not_noticed_by_the_others_of_its_process(stack: contextlib.ExitStack) -> None:
    first = free_port(4)
    urls = [f"server://127.0.0.1:{port}/127.0.0.1:{port + 1}?tls=0&log=info" for port in (first, first + 2)]
    env = {**CALM, "SERVICE_COOLDOWN": "100ms"}
    server = Nodepass(*urls, env=env)
    server.program = broken(
        "nodepass.server.visitor_listener:VisitorListener._wait_at_limit", after=3
    )  # a look before each accept
    stack.enter_context(server)
    server.wait_for("server.listening", tunnel=f"server:{first + 2}")
    target = stack.enter_context(Target())
    for port in (first, first + 2):
        stack.enter_context(OurClient(("127.0.0.1", port), target.address, env=env)).wait_until_connected()
    with connect(("127.0.0.1", first + 3)) as visitor, target.accept() as service:
        assert_connected(visitor, service)
        connect(("127.0.0.1", first + 1)).close()
        server.wait_for("tunnel.crashed", tunnel=f"server:{first}")
        mark = server.mark()
        assert_connected(visitor, service)
        server.wait_for("server.listening", after=mark, tunnel=f"server:{first}")
        server.wait_for("client.connected", after=mark, tunnel=f"server:{first}")
        assert_connected(visitor, service)
    for event in ("bug.caught", "tunnel.crashed", "client.disconnected"):
        assert not server.find(event, tunnel=f"server:{first + 2}")
    assert server.stop() == BUG


def test_a_bug_while_the_process_stops_does_not_keep_it_from_stopping() -> None:
    server = OurServer()
    where = "nodepass.server.visitor_listener:VisitorListener.stop"
    server.program = broken(where)
    with server:
        assert server.stop() == BUG
    assert find_bug(server, where)
    assert server.find("process.stopped")


@pytest.mark.programs
def test_a_bug_where_the_metrics_endpoint_accepts_does_not_make_it_deaf() -> None:
    server = OurServer(env=WATCHED)
    where = "nodepass.metrics.http:HTTPServer._admit"
    server.program = broken(where)
    with server:
        with reach(metrics_of(server)) as sock, contextlib.suppress(ConnectionError):
            sock.recv(1)
        until(lambda: find_bug(server, where), what="no traceback in the log")
        assert get(metrics_of(server), "/healthz").status == 200
        assert server.stop() == BUG
