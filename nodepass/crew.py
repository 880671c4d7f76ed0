"""Crews: named greenlets that belong together, with a limit on their number, and whose crash reaches their owner."""

from __future__ import annotations

from collections.abc import Callable

from gevent import Greenlet
from gevent.pool import Pool

from nodepass.log import Log


class Crew:
    """The greenlets of one purpose.

    A place is taken by `spawn` and given back when the greenlet has ended, however it ended, even killed before it
    first ran: gevent's Pool does it from a link. A crash is logged with its traceback and handed to `on_crash`.
    """

    def __init__(
        self, log: Log, limit: int | None = None, on_crash: Callable[[Exception], object] | None = None
    ) -> None:
        self._log = log
        self._pool = Pool(limit)
        self._on_crash = on_crash

    def __len__(self) -> int:
        return len(self._pool)

    def wait_for_place(self) -> None:
        """Return when `spawn` would not have to wait."""
        self._pool.wait_available()

    def full(self) -> bool:
        """Whether `spawn` would have to wait now."""
        return bool(self._pool.full())

    def spawn(self, name: str, work: Callable[..., object], *args: object) -> Greenlet[..., None]:
        """Run `work(*args)` in a greenlet of this name; waits while the crew is at its limit."""
        greenlet: Greenlet[..., None] = Greenlet(self._guarded, name, work, *args)
        greenlet.name = name
        self._pool.start(greenlet)  # type: ignore[arg-type]  # the stubs want no parameters
        return greenlet

    def _guarded(self, name: str, work: Callable[..., object], *args: object) -> None:
        try:
            work(*args)
        except Exception as error:  # noqa: BLE001  # whatever it is, its owner must hear of it
            self._log.exception("%s crashed, this is a bug", name)
            if self._on_crash:
                self._on_crash(error)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for all to end by themselves, at most `timeout` seconds; whether they did."""
        return bool(self._pool.join(timeout))

    def kill(self) -> int:
        """End all that still run, wait until they have, and say how many they were."""
        running = len(self._pool)
        self._pool.kill()
        return running
