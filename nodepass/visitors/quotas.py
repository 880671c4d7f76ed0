"""How much of one address is served: sessions at a time, and new ones in a time.

What counts as one address is a network of the length that the setting has: by default one IPv4 address, and a /64 of
IPv6, which one machine has all of. Nothing here knows what a session is; `policy` takes and releases.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from nodepass.config.hostport import IP
from nodepass.config.kinds import Quota

MOST_TIMES = 32768  # networks whose times a rate keeps: 7 MB; of more, the one that came least recently is forgotten
EXPIRED_AT_ONCE = 2  # expired networks that a new session removes, so that they go faster than others come


def key_of(address: IP, quota: Quota) -> int:
    """The network that an address counts for, as a number, which is negative for IPv6."""
    version, number = address
    return number >> (32 - quota.prefixes[0]) if version == 4 else ~(number >> (128 - quota.prefixes[1]))


class Concurrency:
    """At most so many sessions of one network at a time; memory for the networks that have some."""

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def take(self, address: IP) -> bool:
        """Whether a session may begin; then it counts until it is released."""
        key = key_of(address, self._quota)
        count = self._open.get(key, 0)
        if count >= self._quota.most:
            return False
        self._open[key] = count + 1
        return True

    def release(self, address: IP) -> None:
        key = key_of(address, self._quota)
        self._open[key] -= 1
        if not self._open[key]:
            del self._open[key]


class Rate:
    """A token bucket for each network: so many sessions at once, and as many again within the quota's time.

    It is kept as the time at which the bucket will be full again, the network that came last at the end.
    """

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._step = quota.seconds / quota.most  # in which one session becomes possible again
        self._full: OrderedDict[int, float] = OrderedDict()  # time.monotonic(); the first of a dict is slow to find

    def __len__(self) -> int:
        return len(self._full)

    def take(self, address: IP) -> bool:
        """Whether a session may begin now; one that may not does not count."""
        now = time.monotonic()
        self._expire(now)
        key = key_of(address, self._quota)
        full = max(now, self._full.pop(key, now))
        is_free = full - now < self._quota.seconds - self._step / 2  # half a step: the sums are not exact
        self._full[key] = full + self._step if is_free else full
        if len(self._full) > MOST_TIMES:
            self._full.popitem(last=False)
        return is_free

    def _expire(self, now: float) -> None:
        for _ in range(EXPIRED_AT_ONCE):
            oldest = next(iter(self._full), None)
            if oldest is None or self._full[oldest] > now:
                return
            del self._full[oldest]
