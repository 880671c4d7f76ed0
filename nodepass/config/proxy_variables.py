"""The variables that many programs take proxies from: HTTPS_PROXY, ALL_PROXY and NO_PROXY, also in small letters.

For TUNNEL_PROXY=env. They are read as others read them: small letters first, HTTPS_PROXY before ALL_PROXY, and NO_PROXY
names what is reached without one: names with everything below them, addresses, networks, each also with a port, or `*`.
This machine is never reached through a proxy that they name, because that proxy would reach itself.

The environment is read once, by `take`. It also takes the user and password out of TUNNEL_PROXY, so that they are in no
setting. What a tunnel uses is decided by `with_passages`. Called by `cli` and `check`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from urllib.parse import unquote, urlsplit

from nodepass.config.hostport import normal_host, parse_ip, parse_network, split_host_port
from nodepass.config.outbound import (
    Credentials,
    Login,
    Passage,
    Proxy,
    hide_user,
    make_proxy,
    parse_credentials,
    parse_proxy,
)
from nodepass.config.settings import Settings
from nodepass.config.urls import Address, ClientURL, ServerURL
from nodepass.errors import ConfigError, Notice

URL = ServerURL | ClientURL

_OWN = "TUNNEL_PROXY"
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")  # the first that is set counts
_EXEMPT = ("no_proxy", "NO_PROXY")
_PORTS = {"http": 80, "https": 443, "socks5h": 1080}  # where a URL has none
_SCHEMES = {"socks5": "socks5h"}  # names are the proxy's to resolve, whatever other programs do with this scheme
_HERE = ("localhost", "127.0.0.0/8", "::1")


@dataclass(frozen=True)
class ProxyVariables:
    """What the environment says of proxies, as texts until a tunnel asks for it."""

    name: str = ""  # of the variable that has the proxy
    url: str = field(default="", repr=False)
    exempt: str = ""
    own: str = ""  # TUNNEL_PROXY, if it has a user, without that,
    own_user: str = field(default="", repr=False)  # and this is the user and the password, escaped
    folder: str = ""  # of systemd's credentials

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> ProxyVariables:
        """Read the environment, and take a user and password out of TUNNEL_PROXY."""
        values = {name: environ.get(name, "").strip() for name in (*_PROXIES, *_EXEMPT, _OWN)}
        name = next((each for each in _PROXIES if values[each]), "")
        exempt = next((values[each] for each in _EXEMPT if values[each]), "")
        scheme, separator, rest = values[_OWN].partition("://")
        user, at, place = rest.rpartition("@")
        own = f"{scheme}{separator}{place}" if at else ""
        if own:
            environ[_OWN] = own
        return cls(name, values.get(name, ""), exempt, own, user, environ.get("CREDENTIALS_DIRECTORY", ""))

    def find(self, address: Address) -> tuple[Proxy, Credentials | None] | None:
        """The proxy for a server with TUNNEL_PROXY=env, None without. Raises ConfigError."""
        if not self.url or _is_exempt(address, [*_HERE, *self.exempt.split(",")]):
            return None
        return _parse(self.name, self.url)

    def find_own(self, proxy: Proxy) -> tuple[Proxy, Credentials | None]:
        """A proxy that a setting has, with the user and password that TUNNEL_PROXY had for it. Raises ConfigError."""
        try:
            is_own = parse_proxy(self.own).proxy == proxy
        except ValueError:  # there is none, or a flag replaces it
            is_own = False
        return proxy, _parse_user(self.own_user, _OWN) if is_own else None


def with_passages(url: URL, common: Settings, variables: ProxyVariables) -> URL:
    """The URL with the proxies that its servers, if it is a client's, are reached through.

    Raises ConfigError where a variable, or the file with the user and password, is not usable.
    """
    if not isinstance(url, ClientURL):
        return url
    settings, passages = url.settings(common), dict[Address, Passage]()
    choice, file = settings.tunnel_proxy, settings.tunnel_proxy_auth_file
    for address in url.tunnels if choice else ():
        found = variables.find_own(choice.proxy) if choice.proxy else variables.find(address)
        if found:
            login = Login(file, folder=variables.folder) if file else Login(fixed=found[1])
            login.credentials()
            passages[address] = Passage(found[0], login)
    return replace(url, passages=passages)


def find_exposed(urls: Iterable[URL]) -> Iterator[Notice]:
    """A notice for each file with a user and password that group or others may read."""
    logins = [each.login for url in urls if isinstance(url, ClientURL) for each in url.passages.values()]
    for warning in dict.fromkeys(filter(None, (each.warning for each in logins))):
        yield Notice("proxy_auth_readable", warning)


def _parse(name: str, text: str) -> tuple[Proxy, Credentials | None]:
    """The proxy that a variable has, its user and password. Raises ConfigError, which shows neither."""
    allowed = "http://HOST:PORT, https://HOST:PORT or socks5h://HOST:PORT, also with USER:PASSWORD@"
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        scheme = _SCHEMES.get(parts.scheme, parts.scheme)
        default = _PORTS[scheme]
        user, at, place = parts.netloc.rpartition("@")
        has_port = ":" in place.rpartition("]")[2]
        host, port = split_host_port(place if has_port else f"{place}:{default}", 1)
        proxy = make_proxy(scheme, host, port)
    except (ValueError, KeyError):
        raise ConfigError(f"{name}: {hide_user(text)!r} is not usable; allowed: {allowed}") from None
    return proxy, _parse_user(user, name) if at else None


def _parse_user(text: str, name: str) -> Credentials:
    """The user and password in front of the host of a URL. Raises ConfigError."""
    user, _, password = text.partition(":")
    if ":" in unquote(user):
        raise ConfigError(f"{name}: the user has a colon in it; allowed: one without")
    return parse_credentials(f"{unquote(user)}:{unquote(password)}", f"{name}: its user and password")


def _is_exempt(address: Address, rules: list[str]) -> bool:
    """Whether one of the rules of NO_PROXY has this server; one that is not understood has none."""
    host = (address.host or "localhost").partition("%")[0].removesuffix(".")
    return any(_matches(rule.strip(), host, address.port) for rule in rules if rule.strip())


def _matches(rule: str, host: str, port: int) -> bool:
    if rule == "*":
        return True
    try:
        _, first, last = network = parse_network(rule.strip("[]"))
        version, number = parse_ip(host)
    except ValueError:
        return _matches_name(rule, host, port)
    return version == network[0] and first <= number <= last


def _matches_name(rule: str, host: str, port: int) -> bool:
    """A name, or an address with a port."""
    try:
        if ":" in rule:
            rule, wanted = split_host_port(rule, 1)
            if wanted != port:
                return False
        rule = normal_host(rule.removeprefix("*").removeprefix(".")).removesuffix(".")
    except ValueError:
        return False
    is_name = not host.rpartition(".")[2].isdigit() and ":" not in host
    return bool(rule) and (host == rule or (is_name and host.endswith(f".{rule}")))
