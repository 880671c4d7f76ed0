"""The ways from a visitor to a target that are compared, each started afresh for every measurement."""

from __future__ import annotations

import contextlib
import functools
import getpass
import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import LOOPBACK, MeasurementError, Processes, free_port, is_listening, wait_until
from benchmarks.targets import ROOT, find_program, require_program

KEYGEN_TIMEOUT = 20.0  # seconds
PRIVILEGE_SEPARATION = Path("/run/sshd")  # an empty folder that sshd wants when root starts it

HAPROXY_CONFIG = """\
global
    nbthread 1
    maxconn 8000
defaults
    mode tcp
    timeout connect 5s
    timeout client 60s
    timeout server 60s
listen hop
    bind {host}:{port} backlog 8192
    server next {host}:{next}
"""

SSHD_CONFIG = """\
Port {port}
ListenAddress {host}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PidFile none
LogLevel ERROR
"""

SSH_OPTIONS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "ExitOnForwardFailure=yes",
    "LogLevel=ERROR",
)


@dataclass(frozen=True)
class Leg:
    """One tunnel to be made: who connects to `visitor_port` shall reach `target_port`, both on loopback."""

    visitor_port: int
    target_port: int


@dataclass(frozen=True)
class System:
    """One way through: its name on the command line, its title in the report, what it can, how it starts.

    `start` gets the processes to start into, the legs, and environment variables for programs that take
    NodePass's settings.
    """

    name: str
    title: str
    start: Callable[[Processes, Sequence[Leg], Mapping[str, str]], None]
    programs: tuple[str, ...] = ()
    datagrams: bool = False
    many_tunnels: bool = False
    direct: bool = False

    def missing(self) -> str | None:
        """Return the name of a program that this system needs and that is not there."""
        return next((program for program in self.programs if find_program(program) is None), None)


def start_nothing(_processes: Processes, _legs: Sequence[Leg], _environment: Mapping[str, str]) -> None:
    """The visitor talks to the target itself."""


def start_haproxy_twice(processes: Processes, legs: Sequence[Leg], _environment: Mapping[str, str]) -> None:
    """Two haproxy in a row, one thread each: what two hops cost in C."""
    (leg,) = legs
    between = free_port()
    for name, port, following in (("near", leg.visitor_port, between), ("far", between, leg.target_port)):
        config = processes.folder / f"{name}.cfg"
        config.write_text(HAPROXY_CONFIG.format(host=LOOPBACK, port=port, next=following))
        processes.start(f"haproxy-{name}", [require_program("haproxy"), "-db", "-f", config])


def start_ssh(processes: Processes, legs: Sequence[Leg], _environment: Mapping[str, str]) -> None:
    """`ssh -R` to an sshd of our own, with keys made for this one measurement."""
    (leg,) = legs
    folder = processes.folder
    for name in ("host", "user"):
        command = [require_program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True, capture_output=True, timeout=KEYGEN_TIMEOUT)
    port = free_port()
    config = folder / "sshd_config"
    config.write_text(SSHD_CONFIG.format(port=port, host=LOOPBACK, folder=folder))
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            PRIVILEGE_SEPARATION.mkdir(mode=0o755)
    processes.start("sshd", [require_program("sshd"), "-D", "-e", "-f", config])
    wait_until(lambda: is_listening(port), "sshd", processes)
    options = [word for option in SSH_OPTIONS for word in ("-o", option)]
    forward = f"{LOOPBACK}:{leg.visitor_port}:{LOOPBACK}:{leg.target_port}"
    command = [require_program("ssh"), "-F", "none", *options, "-N"]
    command += ["-i", str(folder / "user"), "-p", str(port), "-R", forward, f"{getpass.getuser()}@{LOOPBACK}"]
    processes.start("ssh", command)


def start_rathole(processes: Processes, legs: Sequence[Leg], _environment: Mapping[str, str]) -> None:
    """rathole with plain TCP between its ends."""
    port = free_port()
    server = [f'[server]\nbind_addr = "{LOOPBACK}:{port}"\ndefault_token = "benchmark"']
    client = [f'[client]\nremote_addr = "{LOOPBACK}:{port}"\ndefault_token = "benchmark"']
    for number, leg in enumerate(legs):
        for kind in ("tcp", "udp"):
            head = f'services.{kind}{number}]\ntype = "{kind}"'
            server.append(f'[server.{head}\nbind_addr = "{LOOPBACK}:{leg.visitor_port}"')
            client.append(f'[client.{head}\nlocal_addr = "{LOOPBACK}:{leg.target_port}"')
    for name, sections in (("server", server), ("client", client)):
        config = processes.folder / f"{name}.toml"
        config.write_text("\n".join(sections) + "\n")
        processes.start(f"rathole-{name}", [require_program("rathole"), f"--{name}", config])


def start_nodepass(
    processes: Processes,
    legs: Sequence[Leg],
    environment: Mapping[str, str],
    *,
    command: Sequence[str],
    tls: int,
) -> None:
    """A server and a client of a program that takes NodePass's URLs; all legs in these two processes."""
    servers, clients = [], []
    for leg in legs:
        port = free_port()
        servers.append(f"server://{LOOPBACK}:{port}/{LOOPBACK}:{leg.visitor_port}?log=error&tls={tls}")
        clients.append(f"client://{LOOPBACK}:{port}/{LOOPBACK}:{leg.target_port}?log=error")
    processes.start("server", [*command, *servers], environment)
    # The port of the last leg: a client that comes before its server would have to try again.
    wait_until(lambda: is_listening(port), "the server", processes)
    processes.start("client", [*command, *clients], environment)


def nodepass_systems(name: str, title: str, command: Sequence[str], many_tunnels: bool) -> list[System]:
    """Return a NodePass-compatible program as two systems, without and with TLS."""
    return [
        System(
            name if tls == 0 else f"{name}-tls",
            f"{title}, tls={tls}",
            functools.partial(start_nodepass, command=command, tls=tls),
            programs=(command[0],),
            datagrams=True,
            many_tunnels=many_tunnels,
        )
        for tls in (0, 1)
    ]


def parse_peer(text: str) -> list[System]:
    """Return the systems of `--peer NAME=COMMAND`; ValueError if it is not of that form."""
    name, equals, command = text.partition("=")
    words = shlex.split(command)
    if not (name and equals and words):
        raise ValueError(f"{text!r} is not NAME=COMMAND")
    return nodepass_systems(name, name, words, many_tunnels=False)


def all_systems(peers: Sequence[System]) -> list[System]:
    """Return every system in the order of the report."""
    return [
        System("direct", "direct", start_nothing, datagrams=True, direct=True),
        System("haproxy", "haproxy ×2", start_haproxy_twice, programs=("haproxy",)),
        System("ssh", "ssh -R", start_ssh, programs=("ssh", "sshd", "ssh-keygen")),
        System("rathole", "rathole", start_rathole, programs=("rathole",), datagrams=True, many_tunnels=True),
        *peers,
        *nodepass_systems("nodepass", "nodepass", [str(ROOT / "bin" / "nodepass")], many_tunnels=True),
    ]


def open_system(
    system: System, processes: Processes, targets: Sequence[int], environment: Mapping[str, str]
) -> list[int]:
    """Start a system that leads to each of the target ports; returns the ports for visitors."""
    if system.direct:
        return list(targets)
    missing = system.missing()
    if missing is not None:
        raise MeasurementError(f"{missing} is not installed")
    legs = [Leg(free_port(), target) for target in targets]
    system.start(processes, legs, environment)
    return [leg.visitor_port for leg in legs]
