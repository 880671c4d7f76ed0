"""Scripted servers that play with one process of ours: each script meets one connection of its server's client."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping

from tests.support.process import Environment
from tests.support.sockets import Address
from tests.support.tunnel import CALM
from tests.support.wire2.ours import OurClients
from tests.support.wire2.server_side import Listener, Script, ServerSide, Terms

NOWHERE = ("127.0.0.1", 9)
"""A target that a test does not need."""

Scripts = Mapping[str, tuple[Terms, str, Script | list[Script]]]
"""By label: what the server is, the query of the client's URL, and what the server does with a control connection, or
with one after the other."""


@contextlib.contextmanager
def played(scripts: Scripts, env: Environment) -> Iterator[OurClients]:
    """The clients after every script has met its one; a script that fails fails the test, with its label."""
    failures: list[str] = []

    def meet(label: str) -> None:
        one = scripts[label][2]
        for number, script in enumerate(one if isinstance(one, list) else [one]):
            try:
                with listeners[label].accept() as side:
                    script(side)
            except (OSError, AssertionError) as error:
                failures.append(f"{label}, script {number}: {error!r}")

    with contextlib.ExitStack() as stack:
        listeners = {label: stack.enter_context(Listener(terms)) for label, (terms, _, _) in scripts.items()}
        threads = [threading.Thread(target=meet, args=(label,), daemon=True) for label in scripts]
        for thread in threads:
            thread.start()
        servers = {label: (listeners[label].address, query) for label, (_, query, _) in scripts.items()}
        clients = stack.enter_context(OurClients(servers, env=env))
        for thread in threads:
            thread.join(40)
        assert not failures, failures
        yield clients
        assert clients.is_running
        assert not clients.find_crashes()


@contextlib.contextmanager
def attached(
    terms: Terms, query: str = "", env: Environment = CALM, target: Address = NOWHERE
) -> Iterator[tuple[ServerSide, Listener, OurClients]]:
    """A client of ours that has just been made an offer: the server's side of it, the data port, and the client."""
    with attached_each([""], terms, query, env, target) as (clients, ends):
        yield *ends[""], clients


@contextlib.contextmanager
def attached_each(
    labels: Iterable[str], terms: Terms, query: str = "", env: Environment = CALM, target: Address = NOWHERE
) -> Iterator[tuple[OurClients, dict[str, tuple[ServerSide, Listener]]]]:
    """A process with so many clients, each of which has just been made an offer by a server of its own."""
    keyed = {**env, "TUNNEL_KEY": terms.secret} if terms.secret else env
    with contextlib.ExitStack() as stack:
        tunnels = {label: stack.enter_context(Listener(terms)) for label in labels}
        where = {label: (tunnel.address, query) for label, tunnel in tunnels.items()}
        clients = stack.enter_context(OurClients(where, target, env=keyed))
        ends = {}
        for label, tunnel in tunnels.items():
            data = stack.enter_context(Listener(terms))
            side = stack.enter_context(tunnel.accept(data.address[1]))
            side.negotiate()
            ends[label] = side, data
        yield clients, ends
        assert not clients.find_crashes()
