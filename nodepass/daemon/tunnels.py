"""How the tunnel of each URL is made, again after a crash: what it has of its own, and what servers of one port share.

Called by `daemon` once, whose supervisors make the tunnels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from nodepass.config.kinds import TrafficLimit
from nodepass.config.settings import Settings
from nodepass.config.urls import ClientURL, ServerURL
from nodepass.daemon.access_output import AccessOutputs
from nodepass.daemon.key_file import Keys
from nodepass.errors import ConfigError
from nodepass.handover.receiver import NO_LEGACY, Legacy
from nodepass.log import Log
from nodepass.net.activation import Inherited
from nodepass.stats import Stats
from nodepass.tunnel.interface import Tunnel
from nodepass.tunnel.part import Records
from nodepass.tunnel.traffic import Meter
from nodepass.tunnel.traffic_file import TrafficFile
from nodepass.wire.auth import new_client_id

if TYPE_CHECKING:
    from nodepass.net.activation import Share
    from nodepass.server.tunnel_port import TunnelPort

Servers = Sequence[tuple[ServerURL, Settings]]


def make_tunnels(
    urls: Sequence[ServerURL | ClientURL],
    settings: Sequence[Settings],
    keys: Keys,
    inherited: Inherited,
    access: AccessOutputs,
    state_directory: str = "",
    legacy: Legacy = NO_LEGACY,
) -> list[Callable[[], Tunnel]]:
    """How to make the tunnel of each URL, again after a crash.

    Raises ConfigError where a file is not usable, StartError where another process uses it.

    `settings`: of each tunnel; `legacy`: what another process passes. A tunnel's records and its rules about visitors
    outlive it, and so does the tunnel port that servers share.
    """
    makers: list[Callable[[], Tunnel]] = []
    ports: dict[object, TunnelPort] = {}
    servers = [(url, own) for url, own in zip(urls, settings, strict=True) if isinstance(url, ServerURL)]
    ids = (each or new_client_id() for each in legacy.clients or ("",) * len(urls))
    for url, own, name, id in zip(urls, settings, name_tunnels(urls), ids, strict=True):
        log, stats, tunnel_keys = Log(name), Stats(), partial(keys.of(url).keys_for, url.tunnel_name)
        meter = _make_meter(url, own.traffic_limit, state_directory, log, stats, legacy)
        records = Records(log, stats, access.writer(own.access_log), meter)
        if isinstance(url, ClientURL):
            from nodepass.client.client import Client  # here, because most processes are one end only

            makers.append(partial(Client, url, id, tunnel_keys, own, records))
            continue
        from nodepass.server.server import Server
        from nodepass.visitors.rules import Rules

        share = inherited.share()
        address: object = url.tunnel if url.tunnel.port else object()  # a port that the kernel chooses is not shared
        if address not in ports:
            sharing = [each for each in servers if each[0].tunnel == url.tunnel] if url.tunnel.port else [(url, own)]
            ports[address] = _make_port(sharing, records, share)
        rules = Rules(own, url.name)
        makers.append(partial(Server, url, ports[address], own, tunnel_keys, records, share, rules))
    return makers


def _make_port(sharing: Servers, records: Records, share: Share) -> TunnelPort:
    """The tunnel port of the servers that share it, with the records of the first. Raises ConfigError."""
    from nodepass.server.tunnel_port import TunnelPort
    from nodepass.visitors.proxies import all_networks

    _, first = sharing[0]
    settings = replace(first, accept_proxy=all_networks(each.accept_proxy for _, each in sharing))
    urls, has_several = [url for url, _ in sharing], any(each.clients > 1 for _, each in sharing)
    return TunnelPort(urls, settings, records.log, records.stats, share, has_several_clients=has_several)


def _make_meter(
    url: ServerURL | ClientURL, limit: TrafficLimit, directory: str, log: Log, stats: Stats, legacy: Legacy
) -> Meter | None:
    """What counts the traffic of a tunnel, None without a limit. Raises ConfigError, StartError."""
    if not limit:
        return None
    if not directory:
        allowed = "allowed: the directory that keeps the count, as StateDirectory= of a systemd unit sets it"
        raise ConfigError(f"{url.name}: TRAFFIC_LIMIT={limit} needs STATE_DIRECTORY, which is not set; {allowed}")
    tunnel = f"{url.role}-{url.tunnel_name or url.tunnel.port}"
    return Meter(limit, TrafficFile(directory, tunnel, log, legacy.locks), log, stats)


def name_tunnels(urls: Sequence[ServerURL | ClientURL]) -> list[str]:
    """The tunnels' names in the log: `server:10101`, numbered where two would be the same."""
    seen: Counter[str] = Counter()
    names: list[str] = []
    for url in urls:
        seen[url.name] += 1
        names.append(f"{url.name}#{seen[url.name]}" if seen[url.name] > 1 else url.name)
    return names
