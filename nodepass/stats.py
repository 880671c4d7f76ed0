"""Counters of one tunnel, and the one snapshot that the log and an operator's dump print.

Plain attributes, so that counting costs an addition. `up` is from the visitor to the target, `down` the way back.
"""

from __future__ import annotations

from collections import Counter


class Stats:
    """What a tunnel has done since it started. Bytes are payload: no framing, no TLS."""

    def __init__(self) -> None:
        self.tcp_sessions = 0
        self.udp_sessions = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.connects = 0  # control connections that got through their handshake
        self.data_connections = 0  # data connections that entered the pool
        self.found_empty = 0  # sessions that had to wait for a data connection
        self.trouble: Counter[str] = Counter()  # what was dropped, refused or failed, by reason

    def snapshot(self) -> dict[str, int]:
        """Every counter under its name; a reason's has its reason in it."""
        counts = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        return counts | dict(sorted(self.trouble.items()))

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.snapshot().items())
