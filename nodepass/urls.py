"""The URLs that describe a tunnel, parsed into frozen dataclasses.

`server://<tunnel_addr>/<target_addr>?log=&tls=&crt=&key=` and `client://<tunnel_addr>/<target_addr>?log=`. Nothing is
opened or resolved here. A `ConfigError` says in one line what is wrong and what is allowed.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from nodepass.config import Notice
from nodepass.errors import ConfigError
from nodepass.hostport import split_host_port

LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")
_PARAMETERS = {"server": ("log", "tls", "crt", "key"), "client": ("log", "tls")}
_FORM = "server://HOST:PORT/HOST:PORT?tls=0|1|2 or client://HOST:PORT/HOST:PORT"


@dataclass(frozen=True)
class Address:
    """A host, which may be empty (all addresses to listen on, this machine to connect to), and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class TunnelURL:
    """What both kinds of URL have. `name` is the tunnel's name in the log."""

    tunnel: Address
    target: Address
    log: str = "info"
    warnings: tuple[Notice, ...] = ()


@dataclass(frozen=True)
class ServerURL(TunnelURL):
    """A server: listens on `tunnel` for its client and on `target` for visitors; `tls` is 0, 1 or 2."""

    tls: int = 0
    crt: str = ""
    key: str = ""

    @property
    def name(self) -> str:
        return f"server:{self.tunnel.port}"


@dataclass(frozen=True)
class ClientURL(TunnelURL):
    """A client: connects to the server at `tunnel` and, for every session, to the service at `target`."""

    @property
    def name(self) -> str:
        return f"client:{self.tunnel.port}"


def may_need_tls(urls: Sequence[ServerURL | ClientURL]) -> bool:
    """Whether one of them may need TLS; a client learns that from its server."""
    return any(isinstance(url, ClientURL) or url.tls for url in urls)


def parse_url(text: str) -> ServerURL | ClientURL:
    """The tunnel that a URL describes. Raises ConfigError."""
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise ConfigError(f"URL {text!r}: {error}; allowed: {_FORM}") from None
    scheme = parts.scheme
    if scheme not in _PARAMETERS or not text.lower().startswith(f"{scheme}://"):
        raise ConfigError(f"URL {text!r}: the scheme must be server:// or client://; allowed: {_FORM}")
    if "@" in parts.netloc:
        # The text is not repeated: the part before the @ may be a secret.
        raise ConfigError(
            f"URL {scheme}://…@…: a user part is not allowed, because a key would show in the process list; use"
            f" TUNNEL_KEY_FILE; allowed: {_FORM}"
        )
    if "#" in text:
        raise ConfigError(f"URL {text!r}: a fragment (#) is not allowed; allowed: {_FORM}")
    listens = scheme == "server"
    tunnel = _parse_address(text, "tunnel address", parts.netloc, 0 if listens else 1)
    target = _parse_address(text, "target address", parts.path.removeprefix("/"), 0 if listens else 1)
    given = _parse_query(text, scheme, parts.query)
    log = _one_of(text, "log", given.get("log", "info"), LOG_LEVELS)
    if not listens:
        ignored = (Notice("tls_ignored", "tls on a client URL is ignored: the client adopts the server's choice"),)
        return ClientURL(tunnel, target, log, ignored if "tls" in given else ())
    tls, warnings = _parse_tls(text, given)
    return ServerURL(tunnel, target, log, warnings, tls, given.get("crt", ""), given.get("key", ""))


def _parse_address(url: str, what: str, text: str, lowest_port: int) -> Address:
    try:
        return Address(*split_host_port(text, lowest_port, in_url=True))
    except ValueError:
        allowed = f"HOST:PORT, [IPv6]:PORT or :PORT with a port from {lowest_port} to 65535"
        raise ConfigError(f"URL {url!r}: the {what} {text!r} is not usable; allowed: {allowed}") from None


def _parse_query(url: str, scheme: str, query: str) -> dict[str, str]:
    known = _PARAMETERS[scheme]
    given: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        # Not parse_qsl: it reads a plus sign as a space, and file names have plus signs.
        name, _, value = part.partition("=")
        if name not in known:
            close = difflib.get_close_matches(name.lower(), known, 1, 0.3)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(
                f"URL {url!r}: unknown parameter {name!r}{hint} (allowed on a {scheme}: {', '.join(known)})"
            )
        if name in given:
            raise ConfigError(f"URL {url!r}: parameter {name!r} is given twice; allowed: once")
        given[name] = unquote(value)
        if "\0" in given[name]:
            raise ConfigError(f"URL {url!r}: {name} contains a NUL; allowed: text without")
    return given


def _one_of(url: str, name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ConfigError(f"URL {url!r}: {name}={value!r} is not usable; allowed: {', '.join(allowed)}")
    return value


def _parse_tls(url: str, given: dict[str, str]) -> tuple[int, tuple[Notice, ...]]:
    tls = int(_one_of(url, "tls", given.get("tls", "0"), ("0", "1", "2")))
    for name in ("crt", "key"):
        if tls == 2 and not given.get(name):
            raise ConfigError(f"URL {url!r}: tls=2 needs {name}=FILE (PEM); it is missing")
        if tls != 2 and name in given:
            raise ConfigError(f"URL {url!r}: {name} is given with tls={tls}; allowed: with tls=2 only")
    words = (
        "tls is not given: data connections are not encrypted (tls=0); set tls=0 to silence this, or tls=1 to encrypt"
    )
    return tls, () if "tls" in given else (Notice("tls_unset", words),)
