"""The settings, as one table.

A row of `Settings` is a setting: its name is the flag (`--udp-read-timeout`), the environment variable
(`UDP_READ_TIMEOUT`) and, unless it belongs to the whole process, the parameter of a URL (`?udp_read_timeout=`), which
sets it for one tunnel. Its kind says how a text becomes a value and what is allowed. `cli` makes the command line and
`--help` from the table, `urls` reads parameters with it; tests compare the manual page, the README and the units'
example with it. The process has one `Settings`, and each tunnel has its own, made by `for_tunnel`.

Nothing here reads the environment: `cli` does, and it passes it to what has variables of its own (`key_file`,
`systemd`, `log`, and `check` with its report). Apart from those, the health check and `nodepass top` are programs of
their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any

from nodepass.config.kinds import (
    ACCESS_LOG,
    AUTH_FILE,
    DAY,
    HEALTH_CHECK,
    LISTEN,
    MODE,
    OWNER,
    PORTS,
    PROXY,
    RATE,
    SOURCE,
    SWITCH,
    TRAFFIC_LIMIT,
    AccessPlace,
    Kind,
    Listen,
    Owner,
    Ports,
    Quota,
    Rate,
    Rule,
    TrafficLimit,
    choice,
    count,
    duration,
    networks,
    quota,
)
from nodepass.config.outbound import ProxyChoice, Source
from nodepass.errors import ConfigError


class Scope(Enum):
    """What can have a value of its own."""

    PROCESS = "process"
    PORT = "tunnel port"  # of a server: the tunnels that share the port have the same value
    TUNNEL = "tunnel"


@dataclass(frozen=True)
class Row:
    """A setting's kind, default, group, help, scope, and the only role of a tunnel that it has a meaning for, or ""."""

    kind: Kind
    default: str
    group: str
    help: str
    scope: Scope
    role: str


def setting(default: str, kind: Kind, group: str, text: str, *, scope: Scope = Scope.TUNNEL, role: str = "") -> Any:
    """One row of the table; the default is written in a user's syntax."""
    return field(default=kind.parse(default), metadata={"row": Row(kind, default, group, text, scope, role)})


@dataclass(frozen=True)
class Settings:
    """Every setting of a process or of one of its tunnels, checked. Durations are in seconds."""

    semaphore_limit: int = setting(
        "1024", count(1, 1_000_000, "sessions"), "limits", "concurrent sessions; at the limit, new visitors wait"
    )
    min_pool_capacity: int = setting(
        "16", count(1, 65536, "connections"), "pool", "idle data connections kept ready, at least"
    )
    max_pool_capacity: int = setting(
        "1024", count(1, 65536, "connections"), "pool", "idle data connections kept ready, at most"
    )
    pool_get_timeout: float = setting(
        "5s",
        duration(0.001, DAY),
        "pool",
        "server: how long a visitor waits for a data connection before it is closed",
        role="server",
    )
    data_port: Ports = setting(
        "0",
        PORTS,
        "pool",
        "server: port of the data connections; the first free one of a range; tunnel: the tunnel port",
        scope=Scope.PORT,
        role="server",
    )
    tcp: bool = setting(
        "on", SWITCH, "protocols", "off: a server does not open its target address for TCP, a client refuses sessions"
    )
    udp: bool = setting(
        "on", SWITCH, "protocols", "off: a server does not open its target address for UDP, a client refuses flows"
    )
    proxy_protocol: str = setting(
        "off",
        choice("off", "v1", "v2"),
        "visitors",
        "client: tell the target each visitor's address in a PROXY protocol header; v2 also in front of each datagram",
        role="client",
    )
    accept_proxy: Rule = setting(
        "none",
        networks("none", has_file=False),
        "visitors",
        "server: the proxies whose connections and datagrams begin with a PROXY protocol header, at each of its ports",
        role="server",
    )
    udp_data_buf_size: int = setting("8192", count(1, 65507, "bytes"), "UDP", "with a wire v1 peer: largest datagram")
    udp_read_timeout: float = setting(
        "5s", duration(0.001, DAY), "UDP", "with a wire v1 peer: how long the target may take to answer"
    )
    udp_session_timeout: float = setting(
        "60s", duration(0.01, DAY), "UDP", "a flow ends after this time without a datagram in either direction"
    )
    udp_lanes: int = setting(
        "4",
        count(1, 64, "connections"),
        "UDP",
        "server: data connections that carry all flows, opened on demand",
        role="server",
    )
    udp_answers: str = setting(
        "target",
        choice("target", "any"),
        "UDP",
        "client: target: only the target's port may answer; any: every port of its host, as TFTP needs",
        role="client",
    )
    allow: Rule = setting(
        "all",
        networks("all"),
        "visitors",
        "server: the only visitors that are served; @FILE has a network a line, read again at SIGHUP",
        role="server",
    )
    deny: Rule = setting(
        "none",
        networks("none"),
        "visitors",
        "server: visitors that are refused, also those that ALLOW has; @FILE as for ALLOW",
        role="server",
    )
    clients: int = setting(
        "1",
        count(1, 64, "clients"),
        "limits",
        "server: how many clients serve the tunnel at a time",
        role="server",
    )
    sessions_per_address: Quota = setting(
        "0",
        quota(is_rate=False),
        "visitors",
        "server: sessions and flows of one address at a time; more are refused; 0: no limit",
        role="server",
    )
    new_sessions_per_address: Quota = setting(
        "0",
        quota(is_rate=True),
        "visitors",
        "server: new sessions and flows of one address in a time; more are refused; 0: no limit",
        role="server",
    )
    rate_up: Rate = setting(
        "0",
        RATE,
        "traffic",
        "payload of the tunnel from visitors to the target, in bits per second, all sessions together; 0: no limit",
    )
    rate_down: Rate = setting(
        "0", RATE, "traffic", "payload of the tunnel from the target to visitors, as RATE_UP; 0: no limit"
    )
    traffic_limit: TrafficLimit = setting(
        "0",
        TRAFFIC_LIMIT,
        "traffic",
        "payload both ways in a day or month, counted in STATE_DIRECTORY; then new visitors are refused; 0: no limit",
    )
    keepalive: float = setting(
        "15s",
        duration(1, 7200),
        "timing",
        "TCP connections without traffic are probed after this time, and as often until an answer",
    )
    idle_timeout: float = setting(
        "0", duration(0, DAY), "timing", "a TCP session ends after this time without a byte either way; 0: no limit"
    )
    first_byte_timeout: float = setting(
        "0", duration(0, DAY), "timing", "a TCP session ends if its visitor sends nothing for this time; 0: no limit"
    )
    unix_mode: int = setting(
        "0660", MODE, "targets", "server: permissions of a Unix socket that is the target address", role="server"
    )
    unix_owner: Owner = setting(
        "process", OWNER, "targets", "server: user and group of a Unix socket that is the target address", role="server"
    )
    servers: str = setting(
        "one",
        choice("one", "all"),
        "targets",
        "client: all: connect to each address that a server's name has, as to a server of its own; one: to one of them",
        role="client",
    )
    spread: str = setting(
        "least",
        choice("least", "round", "first"),
        "targets",
        "which of several targets, or on a server clients, gets a session: of fewest sessions, in turn, or the first",
    )
    health_check: str = setting(
        "off",
        HEALTH_CHECK,
        "targets",
        "client: check the targets by connecting to each, or by an HTTP request for a path as well",
        role="client",
    )
    health_interval: float = setting(
        "2s",
        duration(0.01, DAY),
        "targets",
        "client: time between two checks of a target; 3 failures in a row: it is down, 2 successes: up",
        role="client",
    )
    tunnel_proxy: ProxyChoice = setting(
        "off",
        PROXY,
        "outbound",
        "client: the proxy between it and its servers; env: as HTTPS_PROXY, ALL_PROXY and NO_PROXY say",
        role="client",
    )
    tunnel_proxy_auth_file: str = setting(
        "none",
        AUTH_FILE,
        "outbound",
        "client: file with USER:PASSWORD for that proxy; read again when it has changed",
        role="client",
    )
    source_address: Source = setting(
        "off",
        SOURCE,
        "outbound",
        "client: where connections to its servers, or to the proxy, come from",
        role="client",
    )
    target_source_address: Source = setting(
        "off",
        SOURCE,
        "outbound",
        "client: where connections and datagrams to its targets come from",
        role="client",
    )
    handshake_timeout: float = setting(
        "5s",
        duration(0.001, DAY),
        "timing",
        "limit for each of: the control handshake, TLS, the id exchange, a dial",
        scope=Scope.PORT,
    )
    report_interval: float = setting(
        "5s",
        duration(0.01, DAY),
        "timing",
        "interval of heartbeats and statistics; the pool size is re-evaluated as often",
    )
    service_cooldown: float = setting(
        "5s", duration(0.01, DAY), "timing", "longest pause between two attempts to reach the server"
    )
    shutdown_timeout: float = setting(
        "5s",
        duration(0, DAY),
        "timing",
        "how long running sessions may take to finish at shutdown; the rest is cut",
        scope=Scope.PROCESS,
    )
    shutdown_delay: float = setting(
        "0",
        duration(0, DAY),
        "timing",
        "server: how long visitors are still served at shutdown before that, unready, so that a balancer notices",
        scope=Scope.PROCESS,
        role="server",
    )
    drain_timeout: float = setting(
        "1h",
        duration(0, 365 * DAY),
        "timing",
        "SIGUSR2: how long running sessions may stay in the old process; the rest is cut",
        scope=Scope.PROCESS,
    )
    start_timeout: float = setting(
        "0",
        duration(0, DAY),
        "timing",
        "client: limit for the first handshake, after which the program ends; 0: no limit",
        scope=Scope.PROCESS,
        role="client",
    )
    reload_interval: float = setting(
        "1h",
        duration(0.001, 365 * DAY),
        "timing",
        "server, tls=2: how often the certificate files are checked for changes",
        scope=Scope.PORT,
        role="server",
    )
    wire: str = setting(
        "auto",
        choice("auto", "1", "2"),
        "wire",
        "version of the wire: 2 refuses wire v1 peers; 1, on a client, expects one",
    )
    log_format: str = setting(
        "text",
        choice("text", "json"),
        "log",
        "text: lines for people; json: one object per line for programs",
        scope=Scope.PROCESS,
    )
    access_log: AccessPlace | None = setting(
        "off",
        ACCESS_LOG,
        "visitors",
        "a line for each session at its end, in a file, on a Unix datagram socket, or on standard output (-)",
    )
    metrics_listen: Listen | None = setting(
        "off",
        LISTEN,
        "metrics",
        "serve /metrics, /healthz and /readyz over HTTP; :PORT is for this machine only",
        scope=Scope.PROCESS,
    )

    @classmethod
    def from_texts(cls, texts: Mapping[str, tuple[str, str]]) -> Settings:
        """Settings from texts: name -> (the flag or variable, what it says).

        Raises ConfigError naming the flag or variable. Whether they are usable together is asked for each tunnel.
        """
        values: dict[str, Any] = {}
        for name, (place, text) in texts.items():
            kind = rows()[name].kind
            try:
                values[name] = kind.parse(text)
            except ValueError:
                raise ConfigError(f"{place}: {kind.show(text)} is not usable; allowed: {kind.allowed}") from None
        return cls(**values)

    def for_tunnel(self, overrides: Iterable[tuple[str, str]], place: str) -> Settings:
        """The settings of a tunnel whose URL has these, each of which is usable alone.

        Raises ConfigError, which begins with `place`, where they are not usable together. Not asked of the process's
        own: a URL may have the value that makes them fit.
        """
        settings = replace(self, **{name: rows()[name].kind.parse(text) for name, text in overrides})
        if contradiction := settings._find_contradiction():
            raise ConfigError(f"{place}: {contradiction}")
        return settings

    @property
    def protocols(self) -> tuple[str, ...]:
        """What is carried: tcp, udp, or both."""
        return tuple(name for name, is_on in (("tcp", self.tcp), ("udp", self.udp)) if is_on)

    @property
    def rates(self) -> dict[str, Rate]:
        """The limits of the tunnel's rate, by direction; of those that are set."""
        return {name: rate for name, rate in (("up", self.rate_up), ("down", self.rate_down)) if rate.bits}

    def _find_contradiction(self) -> str:
        """Which settings are usable alone, but not together; "" where all are."""
        if self.min_pool_capacity > self.max_pool_capacity:
            return (
                f"MIN_POOL_CAPACITY {self.min_pool_capacity} is above MAX_POOL_CAPACITY {self.max_pool_capacity};"
                " allowed: at most as much"
            )
        if self.servers == "all" and self.tunnel_proxy:
            words = f"SERVERS=all and TUNNEL_PROXY={self.tunnel_proxy} are set together: a proxy looks up the names"
            return f"{words}; allowed: one of them, or a URL with several servers"
        return "" if self.protocols else "TCP and UDP are both off; allowed: one of them"


def rows() -> dict[str, Row]:
    """The table: a setting's name -> its row."""
    return {each.name: each.metadata["row"] for each in fields(Settings)}
