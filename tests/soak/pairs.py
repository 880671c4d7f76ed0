"""A server and a client that run for the whole soak, though not always as the same processes; and their service."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tests.soak.middle import Middle
from tests.soak.places import Here
from tests.soak.service import Service
from tests.support.certificates import LOCAL_NAMES, Authority, Certificate
from tests.support.log import Entry, loud
from tests.support.process import Nodepass
from tests.support.scope import Closes
from tests.support.sockets import Address, free_port
from tests.support.tunnel import OurClient, OurServer
from tests.support.v2_network import SERVER
from tests.support.v2_tunnel import SECRET

Role = Literal["server", "client"]

MIDDLE = "127.0.0.2"
"""Where somebody in the middle listens, on the ports that the server has elsewhere."""

NAMES = (*LOCAL_NAMES, MIDDLE, SERVER)
"""What the servers' certificates are made out to."""

REPORT_INTERVAL = 1.0
"""Seconds between heartbeats; three missing ones are the end of a control connection."""

ENVIRONMENT = {
    "REPORT_INTERVAL": f"{REPORT_INTERVAL:g}s",
    "SERVICE_COOLDOWN": "1s",
    "UDP_SESSION_TIMEOUT": "2s",
    "SHUTDOWN_TIMEOUT": "1s",
    "MAX_POOL_CAPACITY": "64",  # so that the most memory that its connections take is taken during the warm-up
    "PYTHONPATH": str(Path(__file__).parent / "inside"),
}


class Explained:
    """Events of this name, with these fields, that need no other reason than the fault that was."""

    def __init__(self, event: str, **fields: object) -> None:
        self._event, self._fields = event, fields

    def matches(self, entry: Entry) -> bool:
        """Whether this is such an event."""
        return entry.matches(self._event, self._fields)


ALWAYS = Explained("tunnel.security")
"""What each run with a key and without TLS warns of at its start."""


@dataclass(frozen=True)
class Shape:
    """How a tunnel is set up."""

    tls: int
    is_keyed: bool
    one_port: bool

    def __str__(self) -> str:
        return f"tls {self.tls}{', key' * self.is_keyed}{', one port' * self.one_port}"


SHAPES = [Shape(tls, key, one) for tls in (0, 1, 2) for key in (False, True) for one in (False, True)]


@dataclass(frozen=True)
class Sample:
    """The memory of an idle process."""

    moment: float  # time.monotonic()
    resident: int  # KiB that it has to itself, as the kernel counts
    heap: int  # KiB in use of what malloc has
    blocks: int  # in use of what Python has


@dataclass(eq=False)
class Run:
    """One process, from its start to its end."""

    pair: str
    role: Role
    shape: Shape
    process: Nodepass
    read: int = 0  # lines of its log that have been looked at
    memory: list[Sample] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What it has in common with others that should need as much."""
        return f"{self.pair}'s {self.role} ({self.shape})"

    def unexpected(self, explained: Sequence[Explained] = ()) -> list[str]:
        """The lines since the last look that are odd and not explained: warnings or worse, and what is no event."""
        entries = self.process.entries[self.read :]
        self.read += len(entries)
        odd = [entry for entry in entries if not entry.data or loud(entry["level"])]
        known = (*explained, ALWAYS)
        return [f"{self.kind}: {entry}" for entry in odd if not any(each.matches(entry) for each in known)]


class Pair(Closes):
    """A tunnel with its service; a context manager."""

    def __init__(self, name: str, place: Here, shape: Shape, authority: Authority, has_middle: bool = False) -> None:
        self.name = name
        self.place = place
        self.shape = shape
        self.runs: list[Run] = []
        self.current: dict[Role, Run] = {}
        self.middle: Middle | None = None
        self.trouble = "nothing"  # the fault that is or was last
        self._authority = authority
        self._certificate = authority.issue(*NAMES)
        first = free_port(4)
        self._tunnel, self._data, self._target = first, first + 1, first + 2
        self.service = Service(("127.0.0.1", first + 3))
        self._has_middle = has_middle
        self._stack = contextlib.ExitStack()

    @property
    def address(self) -> Address:
        """Where visitors go, by TCP and UDP."""
        return self.place.host, self._target

    def __enter__(self) -> Pair:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.place)
            stack.callback(self.service.stop)
            stack.callback(self._kill)
            self.place.at_client(self.service.start)
            if self._has_middle:
                ports = (self._tunnel, self._data)
                self.middle = Middle({(MIDDLE, port): (self.place.host, port) for port in ports})
                stack.enter_context(self.middle)
            self.start("server")
            self.start("client")
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        self._stack.close()

    def _kill(self) -> None:
        for run in self.current.values():
            run.process.kill()

    def start(self, role: Role) -> None:
        """Start a new process; the server is waited for until it listens."""
        make, where = (self._server, self.place.at_server) if role == "server" else (self._client, self.place.at_client)
        process = where(lambda: make().__enter__())
        self.current[role] = run = Run(self.name, role, self.shape, process)
        self.runs.append(run)

    def process(self, role: Role) -> Nodepass:
        """The process that plays this role now."""
        return self.current[role].process

    def reshape(self, rng: random.Random) -> None:
        """Be set up in another way from the next start on."""
        self.shape = rng.choice([shape for shape in SHAPES if shape != self.shape])

    def renew_certificate(self) -> Certificate:
        """Put a new certificate into the server's files."""
        renewed = self._authority.issue(*NAMES)
        self._certificate.overwrite(renewed)
        return renewed

    def unexpected(self, explained: Sequence[Explained] = ()) -> list[str]:
        """The lines of all logs since the last look that need a reason and have none."""
        return [line for run in self.runs for line in run.unexpected(explained)]

    def _environment(self) -> dict[str, str]:
        return {**ENVIRONMENT, "TUNNEL_KEY": SECRET} if self.shape.is_keyed else dict(ENVIRONMENT)

    def _server(self) -> Nodepass:
        host = self.place.host
        return OurServer(
            self.shape.tls,
            self._certificate,
            tunnel=f"{host}:{self._tunnel}",
            target=f"{host}:{self._target}",
            log="info",
            env={**self._environment(), "DATA_PORT": "tunnel" if self.shape.one_port else str(self._data)},
        )

    def _client(self) -> Nodepass:
        return OurClient(
            (MIDDLE if self._has_middle else self.place.host, self._tunnel),
            self.service.address,
            log="info",
            query=f"tls={self.shape.tls}",
            env={**self._environment(), "SSL_CERT_FILE": str(self._authority.crt)},
        )
