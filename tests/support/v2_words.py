"""What a log line has to say, in whatever words, for a reader to know what to change."""

from __future__ import annotations

LOUD = r"\b(WARN|ERROR)\b.*"
KEY_REQUIRED = LOUD + r"(requires? a key|needs? a key|key (is )?required|(no|without a|has no|sent no) (tunnel )?key)"
KEY_MISMATCH = LOUD + r"key.*(match|wrong|differ|not the same)"
ANY_KEY = LOUD + r"\bkey"
UNPROVEN = LOUD + r"\b(key|challenge|proof|mac)\b"
BUSY = LOUD + r"(another client|busy)"
VERSION = LOUD + r"version"
SHUTTING_DOWN = LOUD + r"(shutting down|shut down|stopping)"
PINNED = LOUD + r"(certificate|fingerprint)"
DROPPED = LOUD + r"dropped"
"""Patterns for `Nodepass.wait_for` and `find`, which read upper and lower case alike."""
