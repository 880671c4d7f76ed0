"""Keys that tests share: each takes tens of milliseconds to derive, in every process that collects the tests."""

from __future__ import annotations

from nodepass.wire.auth import Key

KEY, NEXT_KEY = Key("correct horse battery staple"), Key("another horse battery staple")
WEB_KEY = Key("correct horse battery staple", "web")
