"""What the process asks of a tunnel, and how one is made from its URL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from nodepass.client.client import Client
from nodepass.config import Settings
from nodepass.daemon.notifier import Observed
from nodepass.log import Log
from nodepass.net.activation import Share
from nodepass.server.server import Server
from nodepass.stats import Stats, View
from nodepass.tasks import WorkerPool
from nodepass.tunnel.control import Control
from nodepass.urls import ClientURL, ServerURL
from nodepass.wire.auth import Key


class Tunnel(Observed, Protocol):
    """What the process asks of a tunnel, in this order: start, run, stop_accepting, close."""

    stats: Stats
    sessions: WorkerPool

    @property
    def control(self) -> Control | None:
        """The control connection to its peer, while there is one."""

    def start(self) -> None:
        """Open what must be there at start. Raises ListenError."""

    def run(self) -> None:
        """Serve until closed; raises what crashed it."""

    def stop_accepting(self) -> None:
        """Take no new sessions; running ones go on."""

    def close(self) -> None:
        """End everything at once."""

    def reload(self) -> None:
        """Look at files again."""

    def describe(self) -> str:
        """One line for an operator."""

    def view(self) -> View:
        """What the metrics show of it at this moment."""


def make_tunnel(
    url: ServerURL | ClientURL, settings: Settings, key: Key | None, log: Log, stats: Stats, share: Share
) -> Tunnel:
    """The tunnel that a URL describes. Raises ConfigError where its certificate is not usable."""
    if isinstance(url, ServerURL):
        return Server(url, settings, key, log, stats, share)
    return Client(url, settings, key, log, stats)


def name_tunnels(urls: Sequence[ServerURL | ClientURL]) -> list[str]:
    """The log's names of the tunnels: `server:10101`, numbered where two would be the same."""
    names: list[str] = []
    for url in urls:
        same = sum(name.partition("#")[0] == url.name for name in names)
        names.append(f"{url.name}#{same + 1}" if same else url.name)
    return names
