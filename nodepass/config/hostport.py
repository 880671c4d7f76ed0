"""The one reader of `host:port` as a user writes it: for URLs, METRICS_LISTEN, `nodepass top` and the health check.

Also of addresses and networks as numbers, for rules about visitors.

What an empty host means, and what else may stand in its place (a scheme, a path, `off`), is the business of the caller.
`normal_host` gives a host the form in which it is looked up, and `certified_host` that in which TLS names it.
Nothing is imported at the top, because the health check is a process of its own every few seconds.
"""

from __future__ import annotations

IP = tuple[int, int]  # 4 or 6, and the address as a number
Network = tuple[int, int, int]  # 4 or 6, its first and its last address as numbers
_IPV6 = frozenset("0123456789ABCDEFabcdef:.")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")  # an underscore is in many names of containers
_AMBIGUOUS = frozenset("\u00df\u03c2\u200c\u200d")  # IDNA 2003 and 2008 make different names of these
_ESCAPED = _IPV6 | frozenset("GHIJKLMNOPQRSTUVWXYZghijklmnopqrstuvwxyz_-%")  # in a URL, which may name a zone


def split_host_port(text: str, lowest_port: int = 0, in_url: bool = False) -> tuple[str, int]:
    """The host, which may be empty, and the port of `HOST:PORT`, `[IPv6]:PORT` or `:PORT`.

    `in_url`: percent escapes in the host are decoded, and an IPv6 address may have a zone. Raises ValueError.
    """
    in_brackets = text.startswith("[")
    host, _, port = text[1:].partition("]:") if in_brackets else text.partition(":")
    if ":" in port and _IPV6.issuperset(text):
        host, _, port = text.rpartition(":")
        example = f"[{host}]:{port}" if host and port and _IPV6.issuperset(host) and port.isdigit() else "[::1]:10101"
        raise ValueError(f"an IPv6 address must be in brackets, as in {example}")
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


def normal_host(host: str) -> str:
    """One form for all ways to write a host: an address as the kernel writes it, a name in lower-case ASCII.

    An IPv6 address keeps its zone, and a name its final dot, with which the resolver tries no search domains. Raises
    ValueError, whose text says what is wrong.
    """
    if ":" in host:
        return _normal_ipv6(host)
    name = (host if host.isascii() else _international(host)).lower()
    bare = name.removesuffix(".")
    last = bare.rpartition(".")[2]
    if last.isdigit() or last.startswith("0x"):  # no top-level domain is like that
        return _normal_ipv4(bare)
    if name and (len(bare) > 253 or not all(0 < len(each) < 64 and _NAME.issuperset(each) for each in bare.split("."))):
        raise ValueError(f"{host!r} is not a host name")
    return name


def certified_host(host: str) -> str:
    """What a certificate and SNI call a normal host: without the final dot of a name and the zone of an address."""
    return host.partition("%")[0].removesuffix(".")


def parse_ip(text: str) -> IP:
    """4 or 6, and an address as a number: IPv4-mapped IPv6 is IPv4, and a zone is left out. Raises ValueError."""
    import socket

    try:
        if ":" not in text:
            return 4, int.from_bytes(socket.inet_pton(socket.AF_INET, text), "big")
        number = int.from_bytes(socket.inet_pton(socket.AF_INET6, text.partition("%")[0]), "big")
    except (OSError, ValueError):
        raise ValueError("it is not an IP address") from None
    return (4, number & 0xFFFFFFFF) if number >> 32 == 0xFFFF else (6, number)


def parse_network(text: str) -> Network:
    """A network such as 192.0.2.0/24, or one address. Raises ValueError, whose text says what is wrong."""
    host, slash, prefix = text.partition("/")
    if "%" in host:
        raise ValueError("a network has no zone")
    version, first = parse_ip(host)
    width = length = 128 if ":" in host else 32
    if slash:
        if not (prefix.isascii() and prefix.isdigit() and len(prefix) <= 3 and int(prefix) <= width):
            raise ValueError(f"the prefix must be a number from 0 to {width}")
        length = int(prefix)
    if version == 4 and width == 128:  # IPv4-mapped: its first 96 bits are those of all such addresses
        width, length = 32, length - 96
    rest = (1 << (width - max(length, 0))) - 1
    if length < 0 or first & rest:
        raise ValueError("it has bits beyond its prefix")
    return version, first, first | rest


def _normal_ipv6(host: str) -> str:
    from ipaddress import IPv6Address

    address = IPv6Address(host)
    return str(address.ipv4_mapped or address)


def _normal_ipv4(host: str) -> str:
    """Also from 127.1 or 0x7f.1, which the resolver takes for addresses."""
    import socket

    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        raise ValueError(f"{host!r} is not an IPv4 address") from None


def _international(name: str) -> str:
    if not _AMBIGUOUS.isdisjoint(name):
        raise ValueError(f"the name {name!r} has two ASCII forms: write the one that is meant, xn--...")
    try:
        return name.encode("idna").decode()
    except UnicodeError:
        raise ValueError(f"{name!r} is not an international domain name") from None
