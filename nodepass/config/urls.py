"""The URLs that describe a tunnel, parsed into frozen dataclasses.

`server://<tunnel_addr>/<target_addr>?name=&tls=&crt=&key=&log=` and `client://<tunnel_addr>,.../<target_addr>,...?name=
&tls=&log=`. A target address may be `unix:/path`. Both may have settings of the table in `settings`, in small letters,
for this tunnel only. Nothing is opened or resolved here. `parse_url` knows the text alone; what is not given there
depends on the settings and on whether the tunnel has a key, so `with_defaults` fills it in before anything uses the
URL. A `ConfigError` says in one line what is wrong and what is allowed.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from nodepass.config.hostport import normal_host, split_host_port
from nodepass.config.kinds import LONGEST_PATH
from nodepass.config.outbound import Passage
from nodepass.config.settings import Scope, Settings, rows
from nodepass.errors import ConfigError

LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")
ROLES = ("server", "client")  # a URL's scheme
# Parameters that are no settings, and the only role that they have a meaning for, or "".
_PARAMETERS = {"name": "", "tls": "", "crt": "server", "key": "server", "log": "", "tunnel_key_file": ""}
_OF_PROCESS = ("tunnel_keys_file",)  # beside the settings of that scope
_SECRET = re.compile(r"[?&]tunnel[_-]?key=", re.IGNORECASE)
# Errors show neither the value of a parameter whose name suggests a secret, such as a mistyped one, nor a user part.
_HIDDEN = re.compile(
    r"((?:key|pass|secret|token|psk|auth(?!_file=))[^=&]*=)[^&]*"
    r"|(auth_file=)[^&]*(?::|%3A)[^&]*|(proxy=)[^&]*(?=@|%40)|(/)[^/?]*(?=@)",
    re.IGNORECASE,
)
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a tunnel
NAMELESS = "-"  # stands for the empty name where a word is needed
_FORM = "server://HOST:PORT/HOST:PORT?tls=0|1|2 or client://HOST:PORT/HOST:PORT"
_NETWORK_PLACE = re.compile(r"[^:/?#]*://([^/?#]*)")  # what follows the scheme, up to the path
_UNIX = "unix:"  # in front of a path
_UNESCAPED = "/:+="  # in a path, beside letters, digits and _.-~; not the comma, which separates targets
TARGETS = 64  # of a client, at most
SERVERS = 16  # of a client, at most: each has a pool
_ALLOWED = "allowed: auto or 2"


@dataclass(frozen=True)
class Address:
    """A normal host, which may be empty (all addresses to listen on, this machine to connect to), and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UnixPath:
    """A Unix stream socket, by its absolute path. As text it is what a URL has, without blanks and commas."""

    path: str

    def __str__(self) -> str:
        return _UNIX + quote(os.fsencode(self.path), _UNESCAPED)


Place = Address | UnixPath  # of a target


@dataclass(frozen=True)
class TunnelURL:
    """What both kinds of URL have."""

    tunnel: Address  # a client's first one
    target: Place  # likewise
    log: str = "info"
    tunnel_name: str = field(default="", kw_only=True)  # tells the tunnels of one key or one tunnel port apart
    wire: str = field(default="auto", kw_only=True)  # auto, 1 or 2, from `with_defaults` on
    tunnel_key_file: str = field(default="", kw_only=True)  # for this tunnel, instead of the process's keys
    overrides: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)  # settings of this tunnel, as texts

    @property
    def role(self) -> str:
        """One of ROLES."""
        return "server" if isinstance(self, ServerURL) else "client"

    @property
    def targets(self) -> tuple[Place, ...]:
        """The target addresses, as in the URL: one, or on a client several."""
        return (self.target, *self.others) if isinstance(self, ClientURL) else (self.target,)

    @property
    def tunnels(self) -> tuple[Address, ...]:
        """The tunnel addresses, as in the URL: one, or on a client several."""
        return (self.tunnel, *self.other_tunnels) if isinstance(self, ClientURL) else (self.tunnel,)

    @property
    def tunnel_text(self) -> str:
        """All of them, as a URL has them."""
        return ",".join(map(str, self.tunnels))

    @property
    def target_text(self) -> str:
        """All of them, as a URL has them."""
        return ",".join(map(str, self.targets))

    @property
    def name(self) -> str:
        """The tunnel's name in the log: `server:10101/web`, or `server:10101` where the URL has no name."""
        return f"{self.role}:{self.tunnel.port}{'/' * bool(self.tunnel_name)}{self.tunnel_name}"

    def settings(self, common: Settings) -> Settings:
        """This tunnel's settings, given those of its process. Raises ConfigError."""
        return common.for_tunnel(self.overrides, f"the settings of {self.name}")


@dataclass(frozen=True)
class ServerURL(TunnelURL):
    """A server: listens on `tunnel` for its client and on `target` for visitors; `tls` is 0, 1 or 2."""

    tls: int = 0
    crt: str = ""
    key: str = ""
    is_tls_given: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class ClientURL(TunnelURL):
    """A client: connects to the servers at `tunnel` and `other_tunnels` and, for every session, to a service.

    That is at `target`, or at one of `others`.
    """

    others: tuple[Place, ...] = field(default=(), kw_only=True)
    other_tunnels: tuple[Address, ...] = field(default=(), kw_only=True)
    tls: int | None = field(default=None, kw_only=True)  # the least that is accepted; None: not given
    # The proxies in front of its servers, which `with_passages` of `proxy_variables` fills in.
    passages: Mapping[Address, Passage] = field(default_factory=dict, hash=False, kw_only=True)

    @property
    def demand(self) -> int:
        """The least TLS mode that is accepted: 1 or 2, or 0: the client adopts the server's."""
        return self.tls or 0

    @property
    def adopts_quietly(self) -> bool:
        """Whether the URL says that the server decides: no warning then."""
        return self.tls == 0


def may_need_tls(urls: Sequence[ServerURL | ClientURL]) -> bool:
    """Whether one of them may need TLS; a client learns that from its server."""
    return any(isinstance(url, ClientURL) or url.tls for url in urls)


def parse_url(text: str) -> ServerURL | ClientURL:
    """The tunnel that a URL describes. Raises ConfigError."""
    if _SECRET.search(text):
        # The text is not repeated: it has a secret.
        raise ConfigError(
            "URL …?tunnel_key=…: a key is not allowed in a URL, because every user of the machine can see it in the"
            " process list; allowed: tunnel_key_file=FILE"
        )
    shown = _HIDDEN.sub(r"\1\2\3\4…", text)
    plain, others = _take_out_others(text)
    try:
        parts = urlsplit(plain)
    except ValueError as error:
        raise ConfigError(f"URL {shown!r}: {error}; allowed: {_FORM}") from None
    scheme = parts.scheme
    if scheme not in ROLES or not text.lower().startswith(f"{scheme}://"):
        raise ConfigError(f"URL {shown!r}: the scheme must be server:// or client://; allowed: {_FORM}")
    target_texts = parts.path.removeprefix("/").split(",")
    if any("@" in each for each in (parts.netloc, *others, *target_texts) if not each.startswith(_UNIX)):
        raise ConfigError(
            f"URL {scheme}://…@…: a user part is not allowed, because a key would show in the process list; use"
            f" TUNNEL_KEY_FILE; allowed: {_FORM}"
        )
    if "#" in text:
        raise ConfigError(f"URL {shown!r}: a fragment (#) is not allowed; allowed: {_FORM}")
    lowest_port = 0 if scheme == "server" else 1
    tunnels = _parse_tunnels(shown, scheme, [parts.netloc, *others], lowest_port)
    targets = _parse_targets(shown, scheme, target_texts, lowest_port)
    return _parse_parameters(shown, scheme, tunnels, targets, _parse_query(shown, scheme, parts.query))


def _take_out_others(text: str) -> tuple[str, list[str]]:
    """The URL with its first tunnel address only, which urlsplit could not tell from the others, and those."""
    place = _NETWORK_PLACE.match(text)
    first, *others = place[1].split(",") if place else ("",)
    return (text[: place.start(1)] + first + text[place.end(1) :], others) if place and others else (text, [])


def _parse_parameters(
    text: str, scheme: str, tunnels: Sequence[Address], targets: Sequence[Place], given: dict[str, str]
) -> ServerURL | ClientURL:
    """The URL of these parts, with the values of its parameters. Raises ConfigError."""
    log = _one_of(text, "log", given.get("log", "info"), LOG_LEVELS)
    tls = int(_one_of(text, "tls", given["tls"], ("0", "1", "2"))) if "tls" in given else None
    if given.get("tunnel_key_file") == "":
        raise ConfigError(f"URL {text!r}: tunnel_key_file='' is not usable; allowed: a file")
    common: dict[str, Any] = {
        "tunnel_name": _parse_name(text, given.get("name", "")),
        "tunnel_key_file": given.get("tunnel_key_file", ""),
        "overrides": tuple((name, _check_setting(text, name, given[name])) for name in rows() if name in given),
    }
    (tunnel, *other_tunnels), (target, *others) = tunnels, targets
    if scheme == "client":
        common |= {"others": tuple(others), "other_tunnels": tuple(other_tunnels)}
        return ClientURL(tunnel, target, log, tls=tls, **common)
    _check_files(text, tls, given)
    crt, key = given.get("crt", ""), given.get("key", "")
    return ServerURL(tunnel, target, log, tls=tls or 0, crt=crt, key=key, is_tls_given=tls is not None, **common)


def with_defaults(url: ServerURL | ClientURL, has_key: bool, settings: Settings) -> ServerURL | ClientURL:
    """The URL with everything that it leaves open: TLS and the wire's version. Raises ConfigError.

    With a key, both ends use TLS unless the URL says tls=0, and a wire v1 peer, which cannot have the key, is refused.
    """
    own = url.settings(settings)
    _check_datagrams(url, own)
    wire = own.wire
    place = f"wire={wire}" if "wire" in dict(url.overrides) else f"WIRE={wire}"
    if wire == "1" and isinstance(url, ServerURL):
        raise ConfigError(f"{place} is not usable for {url.name}, because a server serves wire v2 always; {_ALLOWED}")
    if wire == "1" and has_key:
        raise ConfigError(f"{place} is not usable for {url.name}, which has a key: wire v1 has no keys; {_ALLOWED}")
    wire = "2" if has_key else wire
    if isinstance(url, ClientURL):
        tls = 1 if url.tls is None and has_key else url.tls
        return replace(url, wire=wire, tls=tls)
    return replace(url, wire=wire, tls=url.tls if url.is_tls_given else int(has_key))


def _parse_address(url: str, what: str, text: str, lowest_port: int, also: str = "") -> Address:
    """`also`: what else is allowed in its place. Raises ConfigError."""
    try:
        host, port = split_host_port(text, lowest_port, in_url=True)
        return Address(normal_host(host), port)
    except ValueError as error:
        allowed = f"HOST:PORT, [IPv6]:PORT or :PORT with a port from {lowest_port} to 65535{also}"
        raise ConfigError(f"URL {url!r}: the {what} {text!r} is not usable: {error}; allowed: {allowed}") from None


def _parse_tunnels(url: str, scheme: str, parts: Sequence[str], lowest_port: int) -> list[Address]:
    """The tunnel addresses: one of a server, one or several of a client, each once. Raises ConfigError."""
    if scheme == "server" and len(parts) > 1:
        words = f"a server listens on one tunnel address, and {','.join(parts)!r} has {len(parts)}"
        raise ConfigError(f"URL {url!r}: {words}; allowed: one here, several on the client")
    if len(parts) > SERVERS:
        raise ConfigError(f"URL {url!r}: it has {len(parts)} servers; allowed: at most {SERVERS}")
    addresses = [_parse_address(url, "tunnel address", each, lowest_port) for each in parts]
    _refuse_twice(url, "server", addresses)
    return addresses


def _refuse_twice(url: str, what: str, places: Sequence[Place]) -> None:
    if twice := [each for number, each in enumerate(places) if each in places[:number]]:
        raise ConfigError(f"URL {url!r}: the {what} {twice[0]} is given twice; allowed: each {what} once")


def _parse_targets(url: str, scheme: str, parts: Sequence[str], lowest_port: int) -> list[Place]:
    """The target addresses: one of a server, one or several of a client, each once. Raises ConfigError."""
    if scheme == "server" and len(parts) > 1:
        words = f"a server listens on one target address, and {','.join(parts)!r} has {len(parts)}"
        raise ConfigError(f"URL {url!r}: {words}; allowed: one here, several on the client")
    if len(parts) > TARGETS:
        raise ConfigError(f"URL {url!r}: it has {len(parts)} targets; allowed: at most {TARGETS}")
    places = [_parse_target(url, each, lowest_port) for each in parts]
    _refuse_twice(url, "target", places)
    return places


def _parse_target(url: str, text: str, lowest_port: int) -> Place:
    if not text.startswith(_UNIX):
        return _parse_address(url, "target address", text, lowest_port, also=", or unix:/PATH")
    path = unquote_to_bytes(os.fsencode(text.removeprefix(_UNIX)))
    # An @ that is not escaped is refused here, too, so that no password can stand before it.
    is_usable = path.startswith(b"/") and not path.endswith(b"/") and b"\0" not in path and "@" not in text
    if not is_usable or len(path) > LONGEST_PATH:
        allowed = (
            f"unix:/PATH, an absolute path of at most {LONGEST_PATH} bytes, in which a comma is %2C and an @ is %40"
        )
        raise ConfigError(f"URL {url!r}: the target address {text!r} is not usable; allowed: {allowed}")
    return UnixPath(os.fsdecode(path))


def _check_datagrams(url: ServerURL | ClientURL, settings: Settings) -> None:
    """Raise ConfigError where UDP is on and no target address can have it."""
    if settings.udp and not any(isinstance(each, Address) for each in url.targets):
        also = ", or a HOST:PORT among the targets" if isinstance(url, ClientURL) else ""
        words = f"{url.target_text} is not usable for {url.name}: a Unix socket carries no datagrams"
        raise ConfigError(f"{words}; allowed: udp=off{also}")


def _parse_query(url: str, scheme: str, query: str) -> dict[str, str]:
    """The texts of the parameters, each of which this kind of URL may have, by name."""
    given: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        # Not parse_qsl: it reads a plus sign as a space, and file names have plus signs.
        name, _, value = part.partition("=")
        _check_parameter(url, scheme, name)
        if name in given:
            raise ConfigError(f"URL {url!r}: parameter {name!r} is given twice; allowed: once")
        given[name] = unquote(value)
        if "\0" in given[name]:
            raise ConfigError(f"URL {url!r}: {name} contains a NUL; allowed: text without")
    return given


def _check_parameter(url: str, scheme: str, name: str) -> None:
    """Raise ConfigError unless this kind of URL may have a parameter of this name."""
    row = rows().get(name)
    if row is None and name not in (*_PARAMETERS, *_OF_PROCESS):
        known = [*_PARAMETERS, *rows()]
        close = difflib.get_close_matches(name.lower().replace("-", "_"), known, 1, 0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        allowed = f"{', '.join(_PARAMETERS)}, and settings in small letters, see nodepass --help"
        raise ConfigError(f"URL {url!r}: unknown parameter {name!r}{hint} (allowed: {allowed})")
    if name in _OF_PROCESS or (row and row.scope is Scope.PROCESS):
        words = f"{name} is for the whole process and not for one tunnel"
        raise ConfigError(f"URL {url!r}: {words}; allowed: as the variable {name.upper()} or the flag")
    role = row.role if row else _PARAMETERS[name]
    if role not in ("", scheme):
        raise ConfigError(f"URL {url!r}: {name} has no meaning on a {scheme}; allowed: on a {role}")


def _check_setting(url: str, name: str, text: str) -> str:
    """The text of a setting. Raises ConfigError where it is not usable."""
    kind = rows()[name].kind
    try:
        kind.parse(text)
    except ValueError:
        raise ConfigError(f"URL {url!r}: {name}={kind.show(text)} is not usable; allowed: {kind.allowed}") from None
    return text


def _one_of(url: str, name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(f"URL {url!r}: {name}={value!r} is not usable; allowed: {', '.join(allowed)}")
    return value


def _parse_name(url: str, name: str) -> str:
    if name and (name == NAMELESS or not NAME.fullmatch(name)):
        allowed = f"at most 64 of A-Z a-z 0-9 . _ -, and not {NAMELESS} alone"
        raise ConfigError(f"URL {url!r}: name={name!r} is not usable; allowed: {allowed}")
    return name


def _check_files(url: str, tls: int | None, given: dict[str, str]) -> None:
    """Raise ConfigError unless there are a certificate and its key with tls=2, and only then."""
    for name in ("crt", "key"):
        if tls == 2 and not given.get(name):
            cut = "a shell ends the URL at an '&' that is not quoted: nodepass 'server://…?tls=2&crt=FILE&key=FILE'"
            raise ConfigError(f"URL {url!r}: tls=2 needs {name}=FILE (PEM); it is missing; {cut}")
        if tls != 2 and name in given:
            raise ConfigError(f"URL {url!r}: {name} is given without tls=2; allowed: with tls=2 only")
