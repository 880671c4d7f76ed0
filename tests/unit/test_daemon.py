"""The process and its parts: restarts after a crash, starting and stopping, with tunnels that do what a test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import gevent
import pytest
from gevent.event import Event

from nodepass.client.client import Client
from nodepass.config.settings import Settings, rows
from nodepass.config.urls import ClientURL, ServerURL, parse_url
from nodepass.daemon.access_output import AccessOutputs
from nodepass.daemon.daemon import Daemon
from nodepass.daemon.key_file import Keys
from nodepass.daemon.supervisor import Supervisor
from nodepass.daemon.systemd import ServiceManager
from nodepass.daemon.tunnels import make_tunnels, name_tunnels
from nodepass.errors import ListenError, StartError
from nodepass.log import Log
from nodepass.net.activation import Inherited
from nodepass.server import server
from nodepass.server.server import Server
from nodepass.stats import Stats
from nodepass.tasks import TaskGroup, WorkerPool
from nodepass.tunnel.interface import Tunnel, View
from nodepass.tunnel.part import Records
from nodepass.tunnel.security import security_of
from nodepass.wire.auth import Key
from tests.unit.records import recorded

NO_ACCESS = AccessOutputs(Stats(), {})
URLS = [parse_url(f"server://:{port}/:2?tls=0") for port in (1, 3)]
VIEW = View(
    "server", "", "", 0, None, 0, 0, 0, 1, 0, None, security_of(URLS[0], has_key=False), ("tcp", "udp"), {}, None, None
)


class Stub:
    """A tunnel that writes down how it is called, and crashes where it is told to."""

    control = None

    def __init__(self, name: str, stats: Stats, calls: list[str], crashes: list[str]) -> None:
        self.log, self.stats = Log(name), stats
        self.sessions = WorkerPool(self.log, stats, 1)
        self.ready = Event()
        self._calls, self._crashes = calls, crashes
        self._closed = Event()

    def _call(self, what: str) -> None:
        self._calls.append(f"{self.log.tunnel} {what}")
        if what in self._crashes:
            self._crashes.remove(what)
            raise ZeroDivisionError(what)

    def start(self) -> None:
        self._call("start")
        if "listen" in self._crashes:
            self._crashes.remove("listen")
            raise ListenError("the address is in use")

    def run(self) -> None:
        self._call("run")
        self._closed.wait()

    def stop(self, timeout: float) -> int:
        self._call(f"stop {timeout:g}")
        return 2

    def close(self) -> None:
        self._closed.set()
        self._call("close")

    def view(self) -> View:
        return VIEW

    def status(self) -> str:
        return "as always"

    def unhealthy_reason(self) -> str:
        return ""

    def reload(self) -> None: ...
    def describe(self) -> str:
        return ""


class Process:
    """A supervisor whose tunnels are stubs."""

    def __init__(self, *crashes: str) -> None:
        self.calls: list[str] = []
        self.crashes = list(crashes)
        self.stats, self.log = Stats(), Log("nodepass")
        self.tasks = TaskGroup(self.log, self.stats)
        self.supervisor = Supervisor(self._make, 0.01, self.tasks)

    def _make(self) -> Tunnel:
        self.calls.append("make")
        return cast(Tunnel, Stub("t", self.stats, self.calls, self.crashes))

    def wait_for(self, *calls: str) -> None:
        """Until the tunnel was called in this order, and not otherwise."""
        while len(self.calls) < len(calls):
            gevent.sleep(0.001)
        assert self.calls == list(calls)


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    with gevent.Timeout(10):
        yield


@pytest.fixture
def log() -> Iterator[list[Any]]:
    with recorded() as records:
        yield records


def events(log: list[Any]) -> list[str]:
    return [record.event for record in log]


AFTER_A_CRASH = ("make", "t start", "t run", "t close", "make", "t start", "t run")


def test_a_tunnel_that_has_begun_does_not_begin_again() -> None:
    process = Process()
    for _ in range(2):  # at once, so that it does not run yet
        process.supervisor.begin()
    for _ in range(3):
        gevent.sleep(0)
    assert process.calls == ["make", "t run"]
    process.supervisor.close()


def test_a_tunnel_that_crashed_is_closed_and_after_the_cooldown_there_is_another(log: list[Any]) -> None:
    process = Process("run")
    supervisor = process.supervisor
    supervisor.start()
    running = process.tasks.spawn("supervise", supervisor.run)
    process.wait_for(*AFTER_A_CRASH)
    assert events(log) == ["tunnel.crashed"]
    assert log[0].fields["pause"] == "10ms"
    assert process.stats.trouble["crashes"] == 1
    assert supervisor.watched().alive
    supervisor.stop(3)
    assert supervisor.watched().view.unready == "stopping"
    supervisor.close()
    running.join()
    assert process.calls[len(AFTER_A_CRASH) :] == ["t stop 3", "t close"]
    assert supervisor.cut == 2
    assert supervisor.watched().alive, "it ended because it was told to"


def test_a_crash_while_a_crashed_tunnel_is_closed_does_not_prevent_its_restart(log: list[Any]) -> None:
    process = Process("run", "close")
    process.supervisor.start()
    process.tasks.spawn("supervise", process.supervisor.run)
    process.wait_for(*AFTER_A_CRASH)
    assert events(log) == ["tunnel.crashed", "bug.caught"]
    process.tasks.kill()


@pytest.mark.parametrize(("trouble", "event"), [("listen", "tunnel.restart_failed"), ("start", "bug.caught")])
def test_a_restart_that_fails_is_tried_again(log: list[Any], trouble: str, event: str) -> None:
    process = Process("run")
    process.supervisor.start()
    process.crashes.append(trouble)
    process.tasks.spawn("supervise", process.supervisor.run)
    process.wait_for("make", "t start", "t run", "t close", "make", "t start", "make", "t start", "t run")
    assert events(log) == ["tunnel.crashed", event]
    process.tasks.kill()


def test_nothing_is_started_again_once_the_process_stops(log: list[Any]) -> None:
    process = Process("run")
    supervisor = process.supervisor
    supervisor._cooldown = 60
    supervisor.start()
    running = process.tasks.spawn("supervise", supervisor.run)
    process.wait_for("make", "t start", "t run", "t close")
    supervisor.stop(0)
    running.join()
    assert process.calls[4:] == ["t stop 0"]
    assert events(log) == ["tunnel.crashed"]


def test_a_supervisor_that_has_gone_is_seen() -> None:
    process = Process()
    running = process.tasks.spawn("supervise", process.supervisor.run)
    process.wait_for("make", "t run")
    assert process.supervisor.watched().alive
    running.kill()
    assert not process.supervisor.watched().alive


@pytest.fixture
def make_daemon(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Daemon, list[str]]]:
    """A daemon of two stubs, which crash where a test says, and what is called on them."""

    def make(*crashes: str, start_timeout: float = 0) -> tuple[Daemon, list[str]]:
        calls: list[str] = []
        left = list(crashes)

        def make_server(*arguments: Any) -> Stub:
            records = next(each for each in arguments if isinstance(each, Records))
            return Stub(records.log.tunnel, records.stats, calls, left)

        monkeypatch.setattr(server, "Server", make_server)
        settings = Settings(shutdown_timeout=4, service_cooldown=0.01, start_timeout=start_timeout)
        made = Daemon(URLS, settings, Keys(), ServiceManager(), Stats(), NO_ACCESS)
        return made, calls

    return make


MakeDaemon = Callable[..., tuple[Daemon, list[str]]]


def test_what_has_started_is_closed_where_a_later_part_cannot_start(make_daemon: MakeDaemon) -> None:
    process, calls = make_daemon()
    cast(Any, process._tunnels[1].tunnel)._crashes.append("listen")
    cast(Any, process._tunnels[0].tunnel)._crashes = []
    with pytest.raises(ListenError):
        process._start()
    assert calls == ["server:1 start", "server:3 start", "server:1 close"]


@pytest.mark.parametrize("crashes", [(), ("stop 4",), ("close",), ("stop 4", "close")], ids=" and ".join)
def test_every_part_is_stopped_and_closed_whatever_crashes(
    log: list[Any], make_daemon: MakeDaemon, crashes: tuple[str, ...]
) -> None:
    process, calls = make_daemon(*crashes)
    process._start()
    calls.clear()
    process._stop()
    assert sorted(calls[:2]) == ["server:1 stop 4", "server:3 stop 4"]
    assert sorted(calls[2:]) == ["server:1 close", "server:3 close"]
    assert process.bugs == len(crashes)
    assert events(log)[-1] == "process.stopped"
    (cut,) = [record.fields["sessions"] for record in log if record.event == "process.cut"]
    assert cut == (2 if "stop 4" in crashes else 4)


def test_a_start_that_takes_too_long_ends_the_process_with_what_is_not_ready(make_daemon: MakeDaemon) -> None:
    process, _ = make_daemon(start_timeout=0.01)
    process._start()
    process._wait_for_stop()
    assert isinstance(process._failure, StartError)
    assert "server:1: as always; server:3: as always" in str(process._failure)
    process._stop()


def test_tunnels_of_one_port_are_numbered() -> None:
    assert name_tunnels([URLS[0], URLS[1], URLS[0], URLS[0]]) == ["server:1", "server:3", "server:1#2", "server:1#3"]


# Tunnels of URLs


def make(*texts: str, keys: Keys | None = None) -> list[Any]:
    """The tunnels of these URLs, whose defaults are filled in."""
    urls: list[ServerURL | ClientURL] = [parse_url(text) for text in texts]
    return [make() for make in make_tunnels(urls, [Settings()] * len(urls), keys or Keys(), Inherited(), NO_ACCESS)]


def test_servers_of_one_address_share_a_tunnel_port_and_others_do_not() -> None:
    first, second, other, address = make(
        "server://:10101/:1?tls=0",
        "server://:10101/:2?tls=0&name=web",
        "server://:10102/:3?tls=0",
        "server://127.0.0.1:10101/:4?tls=0",
    )
    assert first._port is second._port
    assert len({each._port for each in (first, other, address)}) == 3
    assert [each._port.uses_sid for each in (first, other, address)] == [True, False, False]


def test_servers_whose_port_the_kernel_chooses_share_none() -> None:
    """Also where their URLs are the same."""
    first, second = make("server://127.0.0.1:0/127.0.0.1:0?tls=0", "server://127.0.0.1:0/127.0.0.1:0?tls=0")
    assert first._port is not second._port
    assert not first._port.uses_sid


def test_a_shared_port_has_the_proxies_of_all_its_tunnels_and_a_target_address_its_own() -> None:
    """A header comes before the name of the tunnel that a connection is for."""
    texts = (
        "server://:10101/:1?tls=0",
        "server://:10101/:2?tls=0&name=web&accept_proxy=192.0.2.2",
        "server://:10102/:3?tls=0&accept_proxy=none",
    )
    urls: list[ServerURL | ClientURL] = [parse_url(text) for text in texts]
    process = Settings(accept_proxy=rows()["accept_proxy"].kind.parse("192.0.2.1"))
    settings = [url.settings(process) for url in urls]
    first, web, alone = cast(
        list[Server], [make() for make in make_tunnels(urls, settings, Keys(), Inherited(), NO_ACCESS)]
    )
    assert first._port is web._port
    assert first._port.proxies
    assert [first._port.proxies.trusts(f"192.0.2.{number}") for number in (1, 2, 3)] == [True, True, False]
    assert [each._settings.accept_proxy.networks[0][1] & 255 for each in (first, web)] == [1, 2]
    assert alone._port.proxies is None


def test_a_tunnel_is_made_again_with_its_own_log_counters_and_port() -> None:
    urls = [
        cast(ServerURL, parse_url(f"server://:10101/:{port}?tls=0&name={name}")) for port, name in ((1, ""), (2, "web"))
    ]
    makers = make_tunnels(urls, [Settings()] * len(urls), Keys(), Inherited(), NO_ACCESS)
    first, again, other = cast(list[Server], [makers[0](), makers[0](), makers[1]()])
    assert first is not again
    assert (first.log, first.stats, first._port) == (again.log, again.stats, again._port)
    assert first._port is other._port
    assert other.stats is not first.stats
    assert [each.log.tunnel for each in (first, other)] == ["server:10101", "server:10101/web"]


def test_each_tunnel_has_the_keys_of_its_name() -> None:
    keys = Keys(by_name={"": ("one secret of a tunnel",), "web": ("one of web's secrets", "another of web's secrets")})
    first, web, client = make(
        "server://:10101/:1?tls=0",
        "server://:10101/:2?tls=0&name=web",
        "client://localhost:10101/localhost:1?name=web",
        keys=keys,
    )
    assert first._clients.keys == (Key("one secret of a tunnel"),)
    assert web._clients.keys == (Key("one of web's secrets", "web"), Key("another of web's secrets", "web"))
    assert isinstance(client, Client)


def test_a_client_calls_itself_the_same_after_a_crash_and_differently_from_every_other() -> None:
    urls = [cast(ClientURL, parse_url(f"client://localhost:10101/localhost:{port}?tls=0")) for port in (1, 2)]
    makers = make_tunnels(urls, [Settings()] * len(urls), Keys(), Inherited(), NO_ACCESS)
    first, again, other = (cast(Any, make())._servers for make in (makers[0], makers[0], makers[1]))
    assert first._terms.client == again._terms.client != other._terms.client
