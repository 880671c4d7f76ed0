"""Names that a test can move, and a name server that a test can silence. Both need root."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from tests.support.process import PROGRAM
from tests.support.scope import Closes
from tests.support.tunnel import OurClient

_BIND = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
_HEADER = 12  # bytes of a DNS message before its question
_TYPE_A = b"\0\1"


class ClientWithNames(OurClient):
    """A client whose machine has a file of its own in place of /etc/hosts, or of /etc/resolv.conf."""

    def __init__(self, file: Path, *arguments: object, place: str = "/etc/hosts", **more: object) -> None:
        super().__init__(*arguments, **more)  # type: ignore[arg-type]
        self.program = ("unshare", "--mount", "sh", "-c", _BIND, "sh", str(file), place, str(PROGRAM))


class NameServer(Closes):
    """Answers every question at 127.0.0.1:53 with 127.0.0.1, unless it is `silent`. Entered inside a namespace."""

    def __init__(self) -> None:
        self.silent = False
        self.asked = 0
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self) -> NameServer:
        self._sock.bind(("127.0.0.1", 53))
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def close(self) -> None:
        self._sock.close()

    def _serve(self) -> None:
        while True:
            try:
                query, asker = self._sock.recvfrom(512)
            except OSError:
                return
            self.asked += 1
            if not self.silent:
                self._sock.sendto(_answer(query), asker)


def _answer(query: bytes) -> bytes:
    """127.0.0.1 to a question for IPv4 addresses, and nothing to others."""
    end = query.index(b"\0", _HEADER) + 1
    has_address = query[end : end + 2] == _TYPE_A
    counts = b"\0\1" + (b"\0\1" if has_address else b"\0\0") + bytes(4)
    record = b"\xc0\x0c" + _TYPE_A + b"\0\1" + bytes(4) + b"\0\4" + bytes((127, 0, 0, 1))  # lives for 0 s
    return query[:2] + b"\x81\x80" + counts + query[_HEADER : end + 4] + (record if has_address else b"")
