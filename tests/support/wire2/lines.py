"""Lines of wire v2, byte for byte: taken apart, put together, and what must never be in one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

LONGEST = 512
"""Bytes of a line up to the offer, its end included."""

LONGEST_SIGNAL = 4096
"""Bytes of a signal after the offer, its end included."""

MAC = re.compile(rb"&mac=([0-9a-f]{64})(?=#)")
"""A server's proof where it stands in an offer."""

_LINE = re.compile(rb"//([^?#]*)(?:\?([^#]*))?(?:#(.*))?")


@dataclass(frozen=True)
class Line:
    """One line without its end. Of a parameter that is there twice the first one counts."""

    raw: bytes
    host: str
    pairs: tuple[tuple[str, str], ...]
    fragment: str

    @property
    def names(self) -> list[str]:
        """The names of the parameters in the order in which they came."""
        return [name for name, _ in self.pairs]

    @property
    def parameters(self) -> dict[str, str]:
        """The values of the parameters by name."""
        return dict(reversed(self.pairs))

    @property
    def without_mac(self) -> bytes:
        """O, where this is an offer: the line without its 69 bytes of proof."""
        return MAC.sub(b"", self.raw)


def parse(raw: bytes, longest: int = LONGEST) -> Line:
    """A line as a signal of v2; AssertionError where one byte of it should not be."""
    assert len(raw) < longest, f"over {longest} bytes: {raw!r}"
    assert all(0x21 <= byte <= 0x7E for byte in raw), f"a byte that no line has: {raw!r}"
    match = _LINE.fullmatch(raw)
    assert match, f"not a line of v2: {raw!r}"
    host, query, fragment = ((group or b"").decode() for group in match.groups())
    pairs = tuple((name, value) for name, _, value in (each.partition("=") for each in query.split("&") if each))
    return Line(raw, host, pairs, fragment)


def make(host: str, parameters: Iterable[tuple[str, object]] = (), fragment: object = "") -> bytes:
    """Put a line together; parameters that are None are left out."""
    query = "&".join(f"{name}={value}" for name, value in parameters if value is not None)
    line = f"//{host}" + (f"?{query}" if query else "") + (f"#{fragment}" if fragment != "" else "")
    return line.encode()


def with_mac(offer: bytes, mac: str) -> bytes:
    """An offer with a proof where it belongs."""
    terms, mark, tls = offer.partition(b"#")
    return terms + b"&mac=" + mac.encode() + mark + tls


def make_nonce() -> str:
    """A fresh nonce, or sid: 16 random bytes in hex."""
    return secrets.token_hex(16)


def make_client() -> str:
    """What a client is called for its life: 8 random bytes in hex."""
    return secrets.token_hex(8)


def make_hello(
    nonce: str | None = None,
    client: str | None = None,
    name: str | None = "",
    *,
    wants: bool = False,
    version: object = 2,
) -> bytes:
    """A hello, right unless told otherwise. `wants`: launches with addresses."""
    parameters = (
        ("v", version),
        ("nonce", make_nonce() if nonce is None else nonce),
        ("client", make_client() if client is None else client),
        ("name", name),
        ("want", "from" if wants else None),
    )
    return make("hello", parameters)


def make_offer(port: int, tls: int, *, hb: object = 5000, sid: str | None = None, mux: bool = False) -> bytes:
    """An offer without its proof. `hb`: milliseconds between two heartbeats."""
    return make(str(port), (("v", 2), ("hb", hb), ("sid", sid), ("mux", 1 if mux else None)), tls)
