"""What a client's connections leave this machine through, and from: a proxy, its user and password, a source address.

Values, and how a user writes them: TUNNEL_PROXY, TUNNEL_PROXY_AUTH_FILE, SOURCE_ADDRESS and TARGET_SOURCE_ADDRESS. What
the environment says of proxies is read in `proxy_variables`; the room `outbound` connects. A user and password are in
no setting and in no text of this program: `Credentials` shows neither, and `hide_user` takes them out of what a user
has written in the wrong place.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field

from nodepass.config.files import FileState, read_secret, state_of
from nodepass.config.hostport import normal_host, split_host_port
from nodepass.errors import ConfigError

SCHEMES = ("http", "https", "socks5h")
LONGEST_PART = 255  # bytes of a user, and of a password, in SOCKS5
LARGEST_FILE = 4096  # bytes
INTERFACE = "dev:"  # in front of an interface's name
LONGEST_INTERFACE = 15  # bytes of its name
_USER = re.compile(r"(^\w+://|^).*(?=@|%40)", re.DOTALL)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Proxy:
    """A proxy: the protocol that it is spoken to in, one of SCHEMES, and where it is."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


@dataclass(frozen=True)
class ProxyChoice:
    """TUNNEL_PROXY: a proxy, what the environment says, or neither."""

    proxy: Proxy | None = None
    is_environment: bool = False

    def __bool__(self) -> bool:
        return bool(self.proxy or self.is_environment)

    def __str__(self) -> str:
        return "env" if self.is_environment else str(self.proxy or "off")


@dataclass(frozen=True)
class Source:
    """An address of this machine, or one of its interfaces, that connections come from; neither: routing chooses."""

    address: str = ""
    interface: str = ""

    def __bool__(self) -> bool:
        return bool(self.address or self.interface)

    def __str__(self) -> str:
        return f"{INTERFACE}{self.interface}" if self.interface else self.address or "off"


@dataclass(frozen=True, repr=False)
class Credentials:
    """The user and the password for a proxy."""

    user: str
    password: str

    def __repr__(self) -> str:
        return "<Credentials>"


@dataclass
class Login:
    """Where the user and password for a proxy come from: a file, which is read again when it has changed, or fixed."""

    file: str = ""
    fixed: Credentials | None = None
    folder: str = ""  # of systemd's credentials, which may be readable by a group
    warning: str = ""  # where the file is readable by group or others
    _state: FileState = field(default=(), repr=False)

    def credentials(self) -> Credentials | None:
        """What they are now. Raises ConfigError where the file is not usable."""
        if self.file and (not self._state or self._state != state_of(self.file)):
            place = f"TUNNEL_PROXY_AUTH_FILE={self.file}"
            state = state_of(self.file)
            text, self.warning = read_secret(self.file, place, LARGEST_FILE, self.folder)
            self.fixed, self._state = parse_credentials(text, place), state
        return self.fixed


@dataclass(frozen=True)
class Passage:
    """The proxy that connections to a server go through, and the user and password for it."""

    proxy: Proxy
    login: Login


def parse_proxy(text: str) -> ProxyChoice:
    """`off`, `env`, or the URL of a proxy, with a port and without a user. Raises ValueError."""
    if text in ("off", "env"):
        return ProxyChoice(is_environment=text == "env")
    scheme, separator, place = text.partition("://")
    if scheme.lower() not in SCHEMES or not separator:
        raise ValueError("not a scheme of a proxy")
    return ProxyChoice(make_proxy(scheme.lower(), *split_host_port(place.removesuffix("/"), 1)))


def make_proxy(scheme: str, host: str, port: int) -> Proxy:
    """A proxy at this place, which needs a host. Raises ValueError."""
    host = normal_host(host)
    if not host:
        raise ValueError("a proxy has a host")
    return Proxy(scheme, host, port)


def parse_credentials(text: str, place: str) -> Credentials:
    """The user and password of `USER:PASSWORD`, one line. Raises ConfigError, which repeats nothing of it."""
    user, colon, password = text.strip("\r\n").partition(":")
    if not colon or not user or _UNPRINTABLE.search(user + password):
        raise ConfigError(f"{place}: not a user and a password; allowed: one line, USER:PASSWORD")
    try:
        longest = max(len(each.encode()) for each in (user, password))
    except UnicodeEncodeError:
        raise ConfigError(f"{place}: not UTF-8 text") from None
    if longest > LONGEST_PART:
        raise ConfigError(f"{place}: the user or the password has over {LONGEST_PART} bytes; allowed: at most as many")
    return Credentials(user, password)


def hide_user(text: str) -> str:
    """The text of a URL, or of what should be one, without what it has in front of an @."""
    return _USER.sub(r"\1…", text)


def parse_auth_file(text: str) -> str:
    """The absolute path of a file; `none` is "". Raises ValueError."""
    if text == "none":
        return ""
    if not text.startswith("/") or "\0" in text:
        raise ValueError("not an absolute path")
    return text


def parse_source(text: str) -> Source:
    """`off`, an address, or `dev:` and the name of an interface. Raises ValueError."""
    if text == "off":
        return Source()
    if text.startswith(INTERFACE):
        name = text.removeprefix(INTERFACE)
        if not re.fullmatch(r"[!-~]+", name) or len(name) > LONGEST_INTERFACE or "/" in name or name in (".", ".."):
            raise ValueError("not the name of an interface")
        return Source(interface=name)
    address = ipaddress.ip_address(text)
    mapped = getattr(address, "ipv4_mapped", None)
    if address.is_unspecified or getattr(address, "scope_id", None):
        raise ValueError("not one address")
    return Source(address=str(mapped or address))
