"""The kinds of values that settings have: how a text becomes a value, and what is allowed.

A `Kind` is what a row of the table in `settings` has. Its `parse` raises a ValueError, whose text no user sees: the
error of a setting says what is allowed. Durations are in seconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nodepass.config.hostport import Network, normal_host, parse_network, split_host_port
from nodepass.config.outbound import LONGEST_INTERFACE, hide_user, parse_auth_file, parse_proxy, parse_source

# The syntax of Go's time.ParseDuration without a sign, as NodePass has it.
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)"
_DURATION = re.compile(f"(?:{_PART})+", re.ASCII)
LONGEST_PATH = 107  # bytes in sockaddr_un, without the NUL
_ACCOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}", re.ASCII)  # a user or a group, by its name or number
_HIGHEST_ID = 2**32 - 2  # of a user or a group
DAY = 86400.0


@dataclass(frozen=True)
class Kind:
    """How a text becomes a value: `parse` raises ValueError; `allowed` tells the user what it accepts.

    `show` gives a text that is not usable as errors repeat it.
    """

    unit: str
    allowed: str
    parse: Callable[[str], Any]
    show: Callable[[str], str] = repr


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
    """ALLOW, DENY or ACCEPT_PROXY: networks, or the file that has one a line; with neither, there is no such rule."""

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
class Owner:
    """The user and the group of a file, as names or numbers; an empty one is that of the process."""

    user: str = ""
    group: str = ""


@dataclass(frozen=True)
class Quota:
    """How many sessions one address may have: at a time, or new ones within `seconds`. 0: no limit.

    `prefixes`: of IPv4 and of IPv6; addresses that share one count as the same.
    """

    most: int = 0
    seconds: float = 0.0
    prefixes: tuple[int, int] = (32, 64)


@dataclass(frozen=True)
class Rate:
    """RATE_UP or RATE_DOWN: payload bits per second, and how a user writes that. 0: no limit."""

    bits: int = 0
    text: str = "0"

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TrafficLimit:
    """TRAFFIC_LIMIT: payload bytes in each day or month, and how a user writes that. 0: no limit."""

    bytes: int = 0
    unit: str = ""  # day or month
    text: str = "0"

    def __bool__(self) -> bool:
        return bool(self.bytes)

    def __str__(self) -> str:
        return self.text


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
        if len(path.encode()) > LONGEST_PATH or "\0" in path:
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
    if not path.startswith("/") or "\0" in path or (is_socket and len(path.encode()) > LONGEST_PATH):
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


def networks(absent: str, has_file: bool = True) -> Kind:
    """Networks, or with `has_file` a file of them; the word `absent` says that there is no such rule."""

    def parse(text: str) -> Rule:
        if text == absent:
            return Rule()
        if has_file and text.startswith("@"):
            if not text[1:].strip() or "\0" in text:
                raise ValueError("not a path")
            return Rule(file=text[1:])
        return Rule(tuple(parse_network(each.strip()) for each in text.split(",")))

    allowed = f"{absent}, addresses and networks separated by commas, such as 192.0.2.0/24,2001:db8::1"
    if has_file:
        allowed += ", or @FILE"
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


_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([kKMG]?)", re.ASCII)
_MULTIPLES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}
LOWEST_RATE, HIGHEST_RATE = 8_000, 100_000_000_000  # bits per second


def parse_rate(text: str) -> Rate:
    """Bits per second with a decimal multiple, `500k`, `10M`, `2.5G`, or 0. Raises ValueError."""
    if text == "0":
        return Rate()
    match = _RATE.fullmatch(text)
    bits = round(float(match[1]) * _MULTIPLES[match[2]]) if match else 0
    if not LOWEST_RATE <= bits <= HIGHEST_RATE:
        raise ValueError("not a rate")
    return Rate(bits, text)


_TRAFFIC = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([kMGTP])B/(day|month)", re.ASCII)
_BYTES = {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
MOST_TRAFFIC = 10**18  # bytes


def parse_traffic_limit(text: str) -> TrafficLimit:
    """Bytes with a decimal multiple in a day or a month, `1TB/month`, `500MB/day`, or 0. Raises ValueError."""
    if text == "0":
        return TrafficLimit()
    match = _TRAFFIC.fullmatch(text)
    size = round(float(match[1]) * _BYTES[match[2]]) if match else 0
    if not match or not 1 <= size <= MOST_TRAFFIC:
        raise ValueError("not a limit on traffic")
    return TrafficLimit(size, match[3], text)


def parse_switch(text: str) -> bool:
    """`on` or `off`. Raises ValueError."""
    if text not in ("on", "off"):
        raise ValueError("not on or off")
    return text == "on"


def parse_mode(text: str) -> int:
    """The permissions of a file, in octal: `0660`, `666`. Raises ValueError."""
    if not re.fullmatch("0?[0-7]{3}", text, re.ASCII):
        raise ValueError("not a mode")
    return int(text, 8)


def parse_owner(text: str) -> Owner:
    """`process`, `user:group`, `user:` or `:group`. Raises ValueError."""
    if text == "process":
        return Owner()
    user, colon, group = text.partition(":")
    if not colon or not (user or group) or not all(_is_account(each) for each in (user, group) if each):
        raise ValueError("not a user or a group")
    return Owner(user, group)


def _is_account(text: str) -> bool:
    return bool(_ACCOUNT.fullmatch(text)) and not (text.isdigit() and int(text) > _HIGHEST_ID)


def parse_health_check(text: str) -> str:
    """`off`, `tcp`, or `http:/path`. Raises ValueError."""
    path = text.removeprefix("http:")
    is_path = path != text and path.startswith("/") and all("!" <= each <= "~" and each != "#" for each in path)
    if not (text in ("off", "tcp") or (is_path and len(path) <= 1024)):
        raise ValueError("not a check")
    return text


RATE = Kind("bit/s", "0 (no limit), or 8k to 100G bits per second, such as 500k, 10M or 2.5G", parse_rate)
TRAFFIC_LIMIT = Kind(
    "bytes/period", "0 (no limit), or kB, MB, GB, TB or PB per day or month, such as 1TB/month", parse_traffic_limit
)
SWITCH = Kind("word", "on or off", parse_switch)
PORTS = Kind(
    "port", "0 (the kernel chooses), a port from 1 to 65535, a range such as 20000-20099, or tunnel", parse_ports
)
LISTEN = Kind(
    "address",
    f"HOST:PORT, [IPv6]:PORT, :PORT (this machine only), unix:/PATH of at most {LONGEST_PATH} bytes, or off",
    parse_listen,
)

ACCESS_LOG = Kind(
    "place",
    f"off, - (standard output), /FILE, or unix:/PATH of a datagram socket, of at most {LONGEST_PATH} bytes",
    parse_access_log,
)

HEALTH_CHECK = Kind("check", "off, tcp, or http:/PATH, as it stands in a request", parse_health_check)

MODE = Kind("octal", "an octal mode of three digits, such as 0660", parse_mode)
OWNER = Kind("user", "process (its own user and group), USER:GROUP, USER: or :GROUP, as names or numbers", parse_owner)

PROXY = Kind(
    "proxy",
    "off, env, or http://HOST:PORT, https://HOST:PORT or socks5h://HOST:PORT; its user and password stand in"
    " TUNNEL_PROXY_AUTH_FILE or in the environment, never in a flag or URL, which other users of the machine can see",
    parse_proxy,
    lambda text: repr(hide_user(text)),
)
AUTH_FILE = Kind(
    "file",
    "none, or the absolute path of a file",
    parse_auth_file,
    lambda text: repr("…" if ":" in text else text),  # it may be what should stand in the file
)
SOURCE = Kind(
    "source",
    f"off, an address of this machine, or dev:NAME, an interface's name of at most {LONGEST_INTERFACE} bytes",
    parse_source,
)
