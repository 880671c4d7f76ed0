"""A v1 client on trial: it has got its line, and is the client only from its first data connection on.

A v1 client never says anything, and neither does a scanner or a health check; only a client opens data connections.
`control_listener` begins a trial and waits for its end; `data_listener` brings the data connection; `client_slot` has
the trials of its tunnel.
"""

from __future__ import annotations

import time

from gevent.event import AsyncResult

from nodepass.tunnel.control import Agreement, ServerControl


class Trial:
    """One v1 control connection without a place."""

    def __init__(self, control: ServerControl, agreement: Agreement, replaces: ServerControl | None) -> None:
        """`replaces`: the client whose place it would take, which does not respond."""
        self.control = control
        self.agreement = agreement
        self.replaces = replaces
        self.began = time.monotonic()
        self._outcome: AsyncResult[bool] = AsyncResult()

    def __repr__(self) -> str:
        return f"<Trial {self.control.peer} {'ended' if self.is_over else 'waiting'}>"

    @property
    def is_over(self) -> bool:
        """Whether it has been decided."""
        return self._outcome.ready()

    def wait(self, timeout: float) -> bool:
        """Whether it is the client now; not where it says something, leaves, or opens nothing for `timeout` seconds."""
        stream = self.control.stream
        stream.watch(self.end, False)
        try:
            return bool(self._outcome.wait(timeout))  # None after the timeout
        finally:
            stream.unwatch()

    def end(self, is_client: bool) -> None:
        """Decide; the first decision counts."""
        if not self._outcome.ready():
            self._outcome.set(is_client)
