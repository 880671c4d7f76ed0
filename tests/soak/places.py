"""Where a pair lives: on this machine, or on two machines with a cable between them that can be pulled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tests.support.scope import Closes
from tests.support.v2_network import SERVER, Network

T = TypeVar("T")


class Here(Closes):
    """One machine for both ends."""

    host = "127.0.0.1"
    """Where the server listens."""

    def close(self) -> None:
        """Nothing to take away."""

    def at_server(self, make: Callable[[], T]) -> T:
        """Do something where the server and the visitors are."""
        return make()

    def at_client(self, make: Callable[[], T]) -> T:
        """Do something where the client and the service are."""
        return make()


class Apart(Here):
    """A machine for each end."""

    host = SERVER

    def __enter__(self) -> Apart:
        self.network = Network().__enter__()
        return self

    def close(self) -> None:
        self.network.close()

    def at_server(self, make: Callable[[], T]) -> T:
        return self.network.server.inside(make)

    def at_client(self, make: Callable[[], T]) -> T:
        return self.network.client.inside(make)
