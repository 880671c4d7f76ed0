"""Fixtures of the end-to-end tests, and the logs of the processes beside every failure."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Callable, Generator, Iterator

import pytest

from tests.support import process
from tests.support.certificates import Authority
from tests.support.shared_tunnels import ends_of, open_tunnels
from tests.support.tunnel import Pair, Side, Tunnel, open_tunnel

SIDES: tuple[tuple[Side, Side], ...] = (("ours", "ours"), ("v1", "ours"), ("ours", "v1"))
TLS_MODES = (0, 1, 2)
PAIRS = [Pair(server, client, tls) for server, client in SIDES for tls in TLS_MODES]
DIAGONAL = [Pair("ours", "ours", 0), Pair("v1", "ours", 1), Pair("ours", "v1", 2)]
"""Every side and every TLS mode once."""

every_pair = pytest.mark.parametrize("any_tunnel", PAIRS, indirect=True, ids=str, scope="session")
"""For the few tests that matter most; the others have the diagonal."""

TunnelFactory = Callable[..., Tunnel]


@pytest.fixture(scope="session", autouse=True)
def _many_descriptors() -> Iterator[None]:
    """Allow this process, and what it starts, as many sockets as the machine does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="session", autouse=True)
def _terminated_as_interrupted() -> Iterator[None]:
    """Leave every context, and so end every process, also when somebody terminates the tests."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The certificate authority that clients are told to trust."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    """Whatever a test enters here is left at its end, the last first."""
    with contextlib.ExitStack() as entered:
        yield entered


@pytest.fixture
def tunnel(stack: contextlib.ExitStack, authority: Authority) -> TunnelFactory:
    """Start tunnels: `tunnel(tls=1, server="v1", server_env={...})`."""

    def start(tls: int = 0, *, server: Side = "ours", client: Side = "ours", **envs: process.Environment) -> Tunnel:
        return stack.enter_context(open_tunnel(Pair(server, client, tls), authority, **envs))

    return start


@pytest.fixture(scope="session")
def kinds(authority: Authority) -> Iterator[dict[str, Tunnel]]:
    """A tunnel of every kind, shared by tests that leave it as they found it."""
    with open_tunnels({str(pair): ends_of(pair, authority) for pair in PAIRS}, authority) as shared:
        yield shared.tunnels


@pytest.fixture(scope="session", params=DIAGONAL, ids=str)
def any_tunnel(request: pytest.FixtureRequest, kinds: dict[str, Tunnel]) -> Tunnel:
    """A shared tunnel of each kind of the diagonal, or of every kind."""
    return kinds[str(request.param)]


@pytest.fixture(scope="session", params=PAIRS[: len(TLS_MODES)], ids=str)
def our_tunnel(request: pytest.FixtureRequest, kinds: dict[str, Tunnel]) -> Tunnel:
    """A shared tunnel with our program on both sides, in each TLS mode."""
    return kinds[str(request.param)]


def pytest_runtest_setup() -> None:
    """Forget the processes of earlier tests; of the shared ones, what they said until now."""
    process.runs[:] = [run for run in process.runs if run.is_running]
    for run in process.runs:
        run.show_from_here()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs beside a failure."""
    report = yield
    if report.failed:
        for run in process.runs:
            report.sections.append((f"log of {run!r}", run.text()))
    return report
