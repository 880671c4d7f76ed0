"""URLs that cannot run in one process: refused at the start, one line each.

Pure functions of the URLs, with their defaults filled in, the keys and the settings. Addresses are compared as they are
written; what only the kernel knows to be the same fails when it is listened on. Called by `cli` and `check`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TypeVar

from nodepass.config.settings import Scope, Settings, rows
from nodepass.config.urls import ClientURL, ServerURL, TunnelURL
from nodepass.daemon.key_file import Keys
from nodepass.errors import ConfigError

URL = ServerURL | ClientURL
U = TypeVar("U", bound=URL)
PORT_SETTINGS = [name for name, row in rows().items() if row.scope is Scope.PORT]


def refuse_conflicts(urls: Sequence[URL], keys: Keys, settings: Settings) -> None:
    """Raise ConfigError with the first conflict."""
    for conflict in find_conflicts(urls, keys, settings):
        raise ConfigError(conflict)


def find_conflicts(urls: Sequence[URL], keys: Keys, settings: Settings) -> Iterator[str]:
    """What is wrong with these URLs in one process, a sentence each."""
    for url in urls:
        names = keys.of(url).names
        if names is not None and url.tunnel_name not in names:
            yield f"{keys.place} has no key for {url.name}, {_name(url)}; allowed: a line for each tunnel"
    servers = [url for url in urls if isinstance(url, ServerURL)]
    clients = [url for url in urls if isinstance(url, ClientURL)]
    for one, other in _find_pairs(servers, keys, settings):
        yield from _compare_servers(one, other, keys, settings)
    for first, second in _find_pairs(clients, keys, settings):
        if (set(first.tunnels), first.targets) != (set(second.tunnels), second.targets):
            yield from _compare_keys(first, second, keys)


def _find_pairs(urls: Sequence[U], keys: Keys, settings: Settings) -> list[tuple[U, U]]:
    """The pairs that can conflict: of a thousand URLs there are half a million pairs, and hardly any of these."""
    groups: dict[object, list[int]] = {}  # their members have something in common that they must not have
    ports: dict[object, dict[object, int]] = {}  # by tunnel address, the first URL of each set of the port's settings
    for index, url in enumerate(urls):
        for secret in set(keys.of(url).secrets(url.tunnel_name)):
            groups.setdefault((url.tunnel_name, secret), []).append(index)
        if isinstance(url, ServerURL) and url.tunnel.port:
            groups.setdefault((url.tunnel_name, url.tunnel), []).append(index)
            own = url.settings(settings)
            of_port = url.tls, url.crt, url.key, *(repr(getattr(own, name)) for name in PORT_SETTINGS)
            ports.setdefault(url.tunnel, {}).setdefault(of_port, index)
    pairs = {pair for group in groups.values() for pair in combinations(group, 2)}
    pairs |= {pair for firsts in ports.values() for pair in combinations(firsts.values(), 2)}
    return [(urls[one], urls[other]) for one, other in sorted(pairs)]


def _compare_servers(one: ServerURL, other: ServerURL, keys: Keys, settings: Settings) -> Iterator[str]:
    if one.tunnel == other.tunnel and one.tunnel.port:
        if one.tunnel_name == other.tunnel_name:
            allowed = "allowed: different values of name="
            yield f"{_two(one, other)} have the same tunnel address and {_name(one)}; {allowed}"
            return
        for what in ("tls", "crt", "key"):
            mine, theirs = getattr(one, what), getattr(other, what)
            if mine != theirs:
                yield (
                    f"{_two(one, other)} have the same tunnel address, but {what}={mine} and {what}={theirs};"
                    " allowed: the same tls, crt and key"
                )
                return
        for name in PORT_SETTINGS:
            if getattr(one.settings(settings), name) != getattr(other.settings(settings), name):
                yield (
                    f"{_two(one, other)} have the same tunnel address, but not the same {name}, which is the tunnel"
                    f" port's; allowed: the same {name}"
                )
                return
    yield from _compare_keys(one, other, keys)


def _compare_keys(one: URL, other: URL, keys: Keys) -> Iterator[str]:
    mine, theirs = (set(keys.of(url).secrets(url.tunnel_name)) for url in (one, other))
    if mine & theirs and one.tunnel_name == other.tunnel_name:
        swapped = "so a man in the middle could swap them"
        yield f"{_two(one, other)} have the same key and {_name(one)}, {swapped}; allowed: different values of name="


def _two(one: TunnelURL, other: TunnelURL) -> str:
    return f"{one.name} (target {one.target_text}) and {other.name} (target {other.target_text})"


def _name(url: TunnelURL) -> str:
    return f"the name {url.tunnel_name!r}" if url.tunnel_name else "no name"
