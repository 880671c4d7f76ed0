"""Our program with several tunnels in one process, so that many cases of a test share one start.

Every URL has a label; a tunnel's events are found by it. Servers get tunnel ports of their own, or share one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.certificates import Certificate
from tests.support.log import Entry
from tests.support.process import Environment, Nodepass
from tests.support.sockets import PATIENCE, Address, format_address, free_port, parse_address
from tests.support.tunnel import CALM

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Where a server of ours listens, and what its tunnel is called in the log."""

    tunnel: Address
    data: Address
    visitors: Address
    log_name: str

    @property
    def tunnel_address(self) -> Address:
        """`tunnel`, in the words of a server that is alone in its process."""
        return self.tunnel

    @property
    def visitor_address(self) -> Address:
        """`visitors`, likewise."""
        return self.visitors


def log_name(role: str, port: int, query: str) -> str:
    """What a tunnel is called in the log."""
    name = dict(part.partition("=")[::2] for part in query.split("&")).get("name", "")
    return f"{role}:{port}/{name}" if name else f"{role}:{port}"


def with_files(query: str, certificate: Certificate | None) -> str:
    """A query with the files that tls=2 needs, unless it names them."""
    if "tls=2" not in query or "crt=" in query:
        return query
    assert certificate is not None, "tls=2 needs a certificate"
    return f"{query}&crt={certificate.crt}&key={certificate.key}"


class Tunnels(Nodepass):
    """One process with a tunnel for each label."""

    role = ""
    log_names: dict[str, str]

    def find_in(self, label: str, event: str = "", *, after: int = 0, **fields: Any) -> list[Entry]:
        """The events so far of the tunnel with this label."""
        return self.find(event, after=after, tunnel=self.log_names[label], **fields)

    def wait_in(
        self, label: str, event: str = "", *, after: int = 0, timeout: float = PATIENCE, **fields: Any
    ) -> Entry:
        """The first such event of the tunnel with this label."""
        return self.wait_for(event, after=after, timeout=timeout, tunnel=self.log_names[label], **fields)


class OurServers(Tunnels):
    """Servers by their URL's query; entering waits until all of them listen."""

    def __init__(
        self,
        queries: Mapping[str, str],
        certificate: Certificate | None = None,
        *,
        env: Environment | None = None,
        shares_port: bool = False,
    ) -> None:
        """queries: `tls=1&name=web` by label. shares_port: all of them have one tunnel port."""
        first = free_port(1 if shares_port else len(queries))
        self._ports = {label: first if shares_port else first + at for at, label in enumerate(queries)}
        self.log_names = {label: log_name("server", self._ports[label], query) for label, query in queries.items()}
        urls = [
            f"server://{HOST}:{self._ports[label]}/{HOST}:0?{with_files(query, certificate)}&log=debug"
            for label, query in queries.items()
        ]
        super().__init__(*urls, env=CALM if env is None else env)

    def __enter__(self) -> OurServers:
        super().__enter__()
        try:
            self.places = {label: self._place(label) for label in self.log_names}
        except BaseException:
            self.kill()
            raise
        return self

    def __getitem__(self, label: str) -> Place:
        return self.places[label]

    def _place(self, label: str) -> Place:
        entry = self.wait_in(label, "server.listening")
        return Place(
            (HOST, self._ports[label]),
            parse_address(entry["data_address"]),
            parse_address(entry["target_address"]),
            self.log_names[label],
        )


class Member:
    """One server of a process of ours, in the words of a server that has its process to itself."""

    def __init__(self, servers: OurServers, label: str, name: str = "") -> None:
        self._servers, self._label, self.name = servers, label, name
        place = servers[label]
        self.tunnel_address, self.data_address, self.visitor_address = place.tunnel, place.data, place.visitors

    def mark(self) -> int:
        """A place in the log."""
        return self._servers.mark()

    def find(self, event: str = "", **wanted: Any) -> list[Entry]:
        """The events of this server so far."""
        return self._servers.find_in(self._label, event, **wanted)

    def wait_for(self, event: str = "", **wanted: Any) -> Entry:
        """The first such event of this server."""
        return self._servers.wait_in(self._label, event, **wanted)


@contextlib.contextmanager
def spare_servers(count: int, query: str, *, env: Environment, is_keyed: bool) -> Iterator[Iterator[Member]]:
    """So many servers in one process, one after the other; with a key each has a name of its own."""
    names = {str(number): f"t{number}" if is_keyed else "" for number in range(count)}
    with OurServers({label: f"{query}&name={name}" for label, name in names.items()}, env=env) as servers:
        yield (Member(servers, label, name) for label, name in names.items())
        assert not servers.find_crashes()


class OurClients(Tunnels):
    """Clients by the address of their server and their URL's query."""

    def __init__(
        self,
        servers: Mapping[str, tuple[Address, str]],
        target: Address | Mapping[str, Address] = (HOST, 9),
        *,
        env: Environment | None = None,
    ) -> None:
        """servers: the address and `tls=1&name=web` by label. target: of all, or by label."""
        self.log_names = {label: log_name("client", where[1], query) for label, (where, query) in servers.items()}
        targets = target if isinstance(target, Mapping) else dict.fromkeys(servers, target)
        urls = [
            f"client://{format_address(where)}/{format_address(targets[label])}?log=debug" + f"&{query}" * bool(query)
            for label, (where, query) in servers.items()
        ]
        super().__init__(*urls, env=CALM if env is None else env)
