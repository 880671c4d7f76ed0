"""Networks as a set of addresses, in which one is found in logarithmic time.

A set holds sorted intervals that do not touch, as the bounds at which membership changes: an address is in the set
where an odd number of bounds is not above it. An IPv4 interval takes 16 bytes, an IPv6 one about 100. A set knows
numbers only: `hostport` reads addresses and networks, `rules` decides what a set is for.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from heapq import merge

from nodepass.config.hostport import Network

CHUNK = 1000  # intervals sorted in one call, for which a thread keeps the interpreter: 1 ms; 100,000 would take 0.1 s


class NetworkSet:
    """The addresses of some networks."""

    __slots__ = ("_bounds",)

    def __init__(self, networks: Iterable[Network]) -> None:
        intervals: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for version, first, last in networks:
            intervals[version].append((first, last))
        self._bounds: dict[int, Sequence[int]] = {4: array("Q", _bounds(intervals[4])), 6: _bounds(intervals[6])}

    def __contains__(self, address: tuple[int, int]) -> bool:
        """Whether it has an address, given as `hostport.parse_ip` returns it."""
        version, number = address
        return bisect_right(self._bounds[version], number) % 2 == 1


def _bounds(intervals: list[tuple[int, int]]) -> list[int]:
    """The first address of each interval and the one behind its last, of intervals that overlap or touch only once."""
    chunks = [sorted(intervals[start : start + CHUNK]) for start in range(0, len(intervals), CHUNK)]
    bounds: list[int] = []
    for first, last in merge(*chunks):
        if not bounds or first > bounds[-1]:
            bounds += (first, last + 1)
        elif last >= bounds[-1]:
            bounds[-1] = last + 1
    return bounds
