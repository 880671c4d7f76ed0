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

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, NamedTuple

from nodepass.errors import ConfigError
from nodepass.hostport import Network, normal_host, parse_network, split_host_port

# The syntax of Go's time.ParseDuration without a sign, as NodePass has it.
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(f"(?:{_PART})+", re.ASCII)
_LONGEST_PATH = 107  # bytes in sockaddr_un, without the NUL
DAY = 86400.0


@dataclass(frozen=True)
class Kind:
    """How a text becomes a value: `parse` raises ValueError; `allowed` tells the user what it accepts."""

    unit: str
    allowed: str
    parse: Callable[[str], Any]


class Notice(NamedTuple):
    """A warning for the user, as a token and in words."""

    reason: str
    words: str


@dataclass(frozen=True)
class Ports:
    """An inclusive range of ports to try in order; 0 to 0 lets the kernel choose. `tunnel`: the tunnel port itself."""

    first: int
    last: int
    tunnel: bool = False


@dataclass(frozen=True)
class Listen:
    """The metrics endpoint's address: a host, which may be empty, and a port, or the path of a Unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""


@dataclass(frozen=True)
class Rule:
    """ALLOW or DENY: networks, or the file that has one a line; with neither, there is no such rule."""

    networks: tuple[Network, ...] = ()
    file: str = ""

    def __bool__(self) -> bool:
        return bool(self.networks or self.file)


@dataclass(frozen=True)
class AccessPlace:
    """Where an access log goes: a file, a Unix datagram socket, or without a path standard output."""

    path: str = ""
    is_socket: bool = False

    def __str__(self) -> str:
        return f"{'unix:' * self.is_socket}{self.path}" or "-"


@dataclass(frozen=True)
class Quota:
    """How many sessions one address may have: at a time, or new ones within `seconds`. 0: no limit.

    `prefixes`: of IPv4 and of IPv6; addresses that share one count as the same.
    """

    most: int = 0
    seconds: float = 0.0
    prefixes: tuple[int, int] = (32, 64)


def parse_duration(text: str) -> float:
    """Seconds in a duration in Go's syntax: `500ms`, `1h30m`, `5s`, `0`. Raises ValueError."""
    if text == "0":
        return 0.0
    if not _DURATION.fullmatch(text):
        raise ValueError("not a duration")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_PART, text, re.ASCII))


def format_duration(seconds: float) -> str:
    """A duration in Go's syntax, to the millisecond, in its shortest form: 90.0 is `1m30s`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(round(seconds, 3), 60)
    hours, minutes = divmod(int(minutes), 60)
    parts = (f"{hours}h" if hours else "", f"{minutes}m" if minutes else "", f"{rest:g}s" if rest else "")
    return "".join(parts)


def parse_ports(text: str) -> Ports:
    """One port or a range of them: `0`, `20000`, `20000-20099`, `tunnel`. Raises ValueError."""
    if text == "tunnel":
        return Ports(0, 0, tunnel=True)
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text, re.ASCII)
    if not match:
        raise ValueError("not a port")
    ports = Ports(int(match[1]), int(match[2] or match[1]))
    if not (ports.first <= ports.last <= 65535) or (ports.first == 0 and ports.last != 0):
        raise ValueError("not a range of ports")
    return ports


def parse_listen(text: str) -> Listen | None:
    """`host:port`, `[IPv6]:port`, `:port`, `unix:/path`, or `off`, which is None. Raises ValueError."""
    if text == "off":
        return None
    if text.startswith("unix:/"):
        path = text.removeprefix("unix:")
        if len(path.encode()) > _LONGEST_PATH or "\0" in path:
            raise ValueError("not a path of a socket")
        return Listen(path=path)
    host, port = split_host_port(text)
    return Listen(normal_host(host), port)


def parse_access_log(text: str) -> AccessPlace | None:
    """`off`, which is None, `-`, `/path` or `unix:/path`. Raises ValueError."""
    if text == "off":
        return None
    if text == "-":
        return AccessPlace()
    is_socket = text.startswith("unix:")
    path = text.removeprefix("unix:")
    if not path.startswith("/") or "\0" in path or (is_socket and len(path.encode()) > _LONGEST_PATH):
        raise ValueError("not an absolute path")
    return AccessPlace(path, is_socket)


def count(lowest: int, highest: int, unit: str) -> Kind:
    """A whole number between two bounds."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not lowest <= int(text) <= highest:
            raise ValueError("out of range")
        return int(text)

    return Kind(unit, f"a whole number from {lowest} to {highest}", parse)


def duration(lowest: float, highest: float) -> Kind:
    """A duration between two bounds, in seconds."""

    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if not lowest <= seconds <= highest:
            raise ValueError("out of range")
        return seconds

    bounds = f"{format_duration(lowest)} to {format_duration(highest)}"
    return Kind("duration", f"a duration from {bounds}, such as 500ms, 5s or 1h30m", parse)


def choice(*values: str) -> Kind:
    """One of these words."""

    def parse(text: str) -> str:
        if text not in values:
            raise ValueError("not one of them")
        return text

    return Kind("word", " or ".join(values), parse)


def networks(absent: str) -> Kind:
    """Networks of visitors, or a file of them; the word `absent` says that there is no such rule."""

    def parse(text: str) -> Rule:
        if text == absent:
            return Rule()
        if text.startswith("@"):
            if not text[1:].strip() or "\0" in text:
                raise ValueError("not a path")
            return Rule(file=text[1:])
        return Rule(tuple(parse_network(each.strip()) for each in text.split(",")))

    allowed = f"{absent}, addresses and networks separated by commas, such as 192.0.2.0/24,2001:db8::1, or @FILE"
    return Kind("networks", allowed, parse)


def quota(is_rate: bool) -> Kind:
    """A number of sessions, in a time if it is a rate, and the prefixes that count as one address."""
    time = r"/(\w[\w.]*)" if is_rate else "()"
    pattern = re.compile(rf"(\d{{1,7}}){time}(?:,/(\d{{1,3}}))?(?:,/(\d{{1,3}}))?", re.ASCII)
    in_time = duration(0.01, DAY)

    def parse(text: str) -> Quota:
        if text == "0":
            return Quota()
        match = pattern.fullmatch(text)
        if not match:
            raise ValueError("not a quota")
        most, lengths = int(match[1]), (int(match[3] or 32), int(match[4] or 64))
        if not (1 <= most <= 1_000_000 and lengths[0] <= 32 and lengths[1] <= 128):
            raise ValueError("out of range")
        return Quota(most, in_time.parse(match[2]) if is_rate else 0.0, lengths)

    example = "20/10s" if is_rate else "20"
    allowed = f"0 (no limit), or as {example}, or as {example},/24,/56 with prefixes that count as one address"
    return Kind("rate" if is_rate else "sessions", allowed, parse)


def parse_switch(text: str) -> bool:
    """`on` or `off`. Raises ValueError."""
    if text not in ("on", "off"):
        raise ValueError("not on or off")
    return text == "on"


SWITCH = Kind("word", "on or off", parse_switch)
PORTS = Kind(
    "port", "0 (the kernel chooses), a port from 1 to 65535, a range such as 20000-20099, or tunnel", parse_ports
)
LISTEN = Kind(
    "address",
    f"HOST:PORT, [IPv6]:PORT, :PORT (this machine only), unix:/PATH of at most {_LONGEST_PATH} bytes, or off",
    parse_listen,
)

ACCESS_LOG = Kind(
    "place",
    f"off, - (standard output), /FILE, or unix:/PATH of a datagram socket, of at most {_LONGEST_PATH} bytes",
    parse_access_log,
)


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
                raise ConfigError(f"{place}: {text!r} is not usable; allowed: {kind.allowed}") from None
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

    def _find_contradiction(self) -> str:
        """Which settings are usable alone, but not together; "" where all are."""
        if self.min_pool_capacity > self.max_pool_capacity:
            return (
                f"MIN_POOL_CAPACITY {self.min_pool_capacity} is above MAX_POOL_CAPACITY {self.max_pool_capacity};"
                " allowed: at most as much"
            )
        return "" if self.protocols else "TCP and UDP are both off; allowed: one of them"


def rows() -> dict[str, Row]:
    """The table: a setting's name -> its row."""
    return {each.name: each.metadata["row"] for each in fields(Settings)}
