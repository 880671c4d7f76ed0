"""The URLs that describe a tunnel, parsed into frozen dataclasses.

`server://<tunnel_addr>/<target_addr>?name=&tls=&crt=&key=&wire=&log=` and
`client://<tunnel_addr>/<target_addr>?name=&tls=&wire=&log=`. Nothing is opened or resolved here. `parse_url` knows the
text alone; what is not given there depends on the settings and on whether the tunnel has a key, so `with_defaults`
fills it in before anything uses the URL. A `ConfigError` says in one line what is wrong and what is allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import unquote, urlsplit

from nodepass.config import Settings
from nodepass.errors import ConfigError
from nodepass.hostport import normal_host, split_host_port

LOG_LEVELS = ("debug", "info", "warn", "error", "fatal")
_PARAMETERS = {"server": ("name", "tls", "crt", "key", "wire", "log"), "client": ("name", "tls", "wire", "log")}
_WIRES = {"server": ("auto", "2"), "client": ("auto", "1", "2")}
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a tunnel
NAMELESS = "-"  # stands for the empty name where a word is needed
_FORM = "server://HOST:PORT/HOST:PORT?tls=0|1|2 or client://HOST:PORT/HOST:PORT"
_ALLOWED = "allowed: auto or 2"


@dataclass(frozen=True)
class Address:
    """A normal host, which may be empty (all addresses to listen on, this machine to connect to), and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class TunnelURL:
    """What both kinds of URL have."""

    tunnel: Address
    target: Address
    log: str = "info"
    tunnel_name: str = field(default="", kw_only=True)  # tells the tunnels of one key or one tunnel port apart
    wire: str | None = field(default=None, kw_only=True)  # auto, 1 or 2; None: as the setting WIRE says

    @property
    def name(self) -> str:
        """The tunnel's name in the log: `server:10101/web`, or `server:10101` where the URL has no name."""
        role = "server" if isinstance(self, ServerURL) else "client"
        return f"{role}:{self.tunnel.port}{'/' * bool(self.tunnel_name)}{self.tunnel_name}"


@dataclass(frozen=True)
class ServerURL(TunnelURL):
    """A server: listens on `tunnel` for its client and on `target` for visitors; `tls` is 0, 1 or 2."""

    tls: int = 0
    crt: str = ""
    key: str = ""
    is_tls_given: bool = field(default=False, kw_only=True)


@dataclass(frozen=True)
class ClientURL(TunnelURL):
    """A client: connects to the server at `tunnel` and, for every session, to the service at `target`."""

    tls: int | None = field(default=None, kw_only=True)  # the least that is accepted; None: not given

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
    name = _parse_name(text, given.get("name", ""))
    wire = _one_of(text, "wire", given["wire"], _WIRES[scheme]) if "wire" in given else None
    tls = int(_one_of(text, "tls", given["tls"], ("0", "1", "2"))) if "tls" in given else None
    if not listens:
        return ClientURL(tunnel, target, log, tls=tls, tunnel_name=name, wire=wire)
    _check_files(text, tls, given)
    return ServerURL(
        tunnel,
        target,
        log,
        tls=tls or 0,
        crt=given.get("crt", ""),
        key=given.get("key", ""),
        is_tls_given=tls is not None,
        tunnel_name=name,
        wire=wire,
    )


def with_defaults(url: ServerURL | ClientURL, has_key: bool, settings: Settings) -> ServerURL | ClientURL:
    """The URL with everything that it leaves open: TLS and the wire's version. Raises ConfigError.

    With a key, both ends use TLS unless the URL says tls=0, and a wire v1 peer, which cannot have the key, is refused.
    """
    wire = url.wire or settings.wire
    if wire == "1" and isinstance(url, ServerURL):
        raise ConfigError(f"WIRE: '1' is not usable for {url.name}, because a server serves wire v2 always; {_ALLOWED}")
    if wire == "1" and has_key:
        raise ConfigError(f"wire=1 is not usable for {url.name}, which has a key: wire v1 has no keys; {_ALLOWED}")
    wire = "2" if has_key else wire
    if isinstance(url, ClientURL):
        tls = 1 if url.tls is None and has_key else url.tls
        return replace(url, wire=wire, tls=tls)
    return replace(url, wire=wire, tls=url.tls if url.is_tls_given else int(has_key))


def _parse_address(url: str, what: str, text: str, lowest_port: int) -> Address:
    try:
        host, port = split_host_port(text, lowest_port, in_url=True)
        return Address(normal_host(host), port)
    except ValueError as error:
        allowed = f"HOST:PORT, [IPv6]:PORT or :PORT with a port from {lowest_port} to 65535"
        raise ConfigError(f"URL {url!r}: the {what} {text!r} is not usable: {error}; allowed: {allowed}") from None


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


def _parse_name(url: str, name: str) -> str:
    if name and (name == NAMELESS or not NAME.fullmatch(name)):
        allowed = f"at most 64 of A-Z a-z 0-9 . _ -, and not {NAMELESS} alone"
        raise ConfigError(f"URL {url!r}: name={name!r} is not usable; allowed: {allowed}")
    return name


def _check_files(url: str, tls: int | None, given: dict[str, str]) -> None:
    """Raise ConfigError unless there are a certificate and its key with tls=2, and only then."""
    for name in ("crt", "key"):
        if tls == 2 and not given.get(name):
            raise ConfigError(f"URL {url!r}: tls=2 needs {name}=FILE (PEM); it is missing")
        if tls != 2 and name in given:
            raise ConfigError(f"URL {url!r}: {name} is given without tls=2; allowed: with tls=2 only")
