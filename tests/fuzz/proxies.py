"""What a proxy answers, before the server behind it can be heard."""

from __future__ import annotations

import re
from typing import Any, cast

from nodepass.config.outbound import Credentials
from nodepass.errors import ProxyError
from nodepass.outbound import http_connect, socks5
from tests.fuzz.scripted import ScriptedSocket, ScriptedStream, assert_plain
from tests.fuzz.scripts import LONG, Script, pieces

SECRET = "opensesame"
SIZES = {1: 4, 4: 16}


def check_proxy_answer(data: bytes) -> None:
    """A proxy's answer is read to its end and not one byte further, however it arrives, or refused in a plain line."""
    script = Script(data)
    kind, sizes = script.number(), script.sizes()
    arriving = pieces(script.rest().replace(LONG, b"x" * 1000), sizes)
    sock = ScriptedSocket(lambda: next(arriving, b""))
    connect = socks5.connect if kind & 1 else http_connect.connect
    credentials = Credentials("user", SECRET) if kind & 2 else None
    try:
        connect(ScriptedStream(cast(Any, sock)), "server.example", 10101, credentials)
    except OSError as error:
        _assert_refused(error)
    else:
        (_assert_socks if kind & 1 else _assert_http)(sock.heard, credentials)
    assert len(sock.heard) <= http_connect.LARGEST_HEAD


def _assert_refused(error: OSError) -> None:
    assert_plain(error)
    assert SECRET not in str(error)
    assert not isinstance(error, ProxyError) or error.code.isalnum() or not error.code


def _assert_http(heard: bytes, _: Credentials | None) -> None:
    *interim, final = heard.removesuffix(b"\r\n\r\n").split(b"\r\n\r\n")
    assert heard.endswith(b"\r\n\r\n")
    assert all(re.match(rb"HTTP/1\.[01] 1\d\d[ \r]", head + b"\r") for head in interim)
    assert re.match(rb"HTTP/1\.[01] 2\d\d[ \r]", final + b"\r")


def _assert_socks(heard: bytes, credentials: Credentials | None) -> None:
    method, rest = heard[1], heard[2:]
    assert heard[0] == 5
    assert method in ((0, 2) if credentials else (0,))
    if method == 2:
        assert rest[:2] == b"\x01\x00"
        rest = rest[2:]
    assert rest[:2] == b"\x05\x00"
    assert len(rest) == 6 + (SIZES[rest[3]] if rest[3] in SIZES else 1 + rest[4])
