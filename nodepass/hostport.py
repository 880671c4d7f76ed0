"""The one reader of `host:port` as a user writes it: for URLs, METRICS_LISTEN, `nodepass top` and the health check.

What an empty host means, and what else may stand in its place (a scheme, a path, `off`), is the business of the caller.
Nothing is imported at the top, because the health check is a process of its own every few seconds.
"""

from __future__ import annotations

_IPV6 = frozenset("0123456789ABCDEFabcdef:.")
_ESCAPED = _IPV6 | frozenset("GHIJKLMNOPQRSTUVWXYZghijklmnopqrstuvwxyz_-%")  # in a URL, which may name a zone


def split_host_port(text: str, lowest_port: int = 0, in_url: bool = False) -> tuple[str, int]:
    """The host, which may be empty, and the port of `HOST:PORT`, `[IPv6]:PORT` or `:PORT`.

    `in_url`: percent escapes in the host are decoded, and an IPv6 address may have a zone. Raises ValueError.
    """
    in_brackets = text.startswith("[")
    host, _, port = text[1:].partition("]:") if in_brackets else text.partition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and lowest_port <= int(port) <= 65535):
        raise ValueError(f"the port must be a number from {lowest_port} to 65535")
    allowed = _ESCAPED if in_url else _IPV6
    if not allowed.issuperset(host) if in_brackets else any(each in "[]/" or each <= " " for each in host):
        raise ValueError("the host has a character that is not allowed")
    if in_url:
        from urllib.parse import unquote

        host = unquote(host)
        if "\0" in host:
            raise ValueError("the host has a NUL in it")
    if in_brackets:
        from ipaddress import IPv6Address

        IPv6Address(host)  # raises a ValueError
    return host, int(port)
