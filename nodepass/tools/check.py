"""`nodepass --check`: performs every step of a start once, reports the result of each, and exits.

Prints one finding per line on standard output: `ok`, `warn` or `fail`, the subject, and the result. The exit status is
0 if nothing failed, 1 if an address or a peer failed, which may pass later, and 2 on bad input. `check_client` has what
concerns a client and its server, `check_ports` what concerns ports. Called by `cli`; nothing of the daemon runs.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, TextIO

from nodepass import log
from nodepass.config.environment import find_typos, find_unusable_cas
from nodepass.config.kinds import AccessPlace, Listen
from nodepass.config.proxy_variables import ProxyVariables, find_exposed, with_passages
from nodepass.config.settings import Settings
from nodepass.config.urls import Address, ClientURL, ServerURL, UnixPath, may_need_tls, parse_url, with_defaults
from nodepass.daemon.access_output import find_trouble
from nodepass.daemon.conflicts import find_conflicts
from nodepass.daemon.key_file import Keys
from nodepass.daemon.limits import survey
from nodepass.daemon.systemd import ServiceManager
from nodepass.errors import ConfigError
from nodepass.installed import how_to_add
from nodepass.net.activation import Inherited, Share
from nodepass.net.listen import listen_in_range, listen_tcp, listen_udp
from nodepass.tools.check_client import check_client
from nodepass.tools.check_ports import try_to_listen, try_unix
from nodepass.tools.report import BAD_INPUT, Report
from nodepass.tunnel.interface import DATA, LISTENER_ROLES, TARGET, TUNNEL
from nodepass.tunnel.security import Security, describe, find_weakness, security_of
from nodepass.visitors.rules import Rules

if TYPE_CHECKING:
    from nodepass.tls.certificates import Identity

URL = ServerURL | ClientURL
EXPIRES_SOON = 14.0  # days
LOGS = "/var/log/"  # where systemd makes directories for logs
_OTHERS = stat.S_IROTH | stat.S_IWOTH


def run(
    texts: Sequence[str],
    read_settings: Callable[[], Settings],
    find_keys: Callable[[], Keys],
    variables: ProxyVariables,
    environ: MutableMapping[str, str],
    stream: TextIO | None = None,
) -> int:
    """Check the tunnels of these URLs; the exit status. `variables`: what the environment says of proxies."""
    log.set_up("fatal", environ)
    report = Report(stream or sys.stdout, environ)
    urls = [url for text in texts if (url := _parse(text, report))]
    settings = _settings(read_settings, environ, report)
    if any(isinstance(url, ClientURL) for url in urls):
        for notice in find_unusable_cas(environ):
            report.warn("settings", notice.words)
    keys = _keys(find_keys, urls, report)
    manager = _find_manager(environ, report)
    if settings is None or keys is None or report.status == BAD_INPUT:
        return report.status
    urls = _with_defaults(urls, settings, keys, variables, report)
    if report.status == BAD_INPUT:
        return report.status
    _limits([url.settings(settings) for url in urls], urls, report)
    _access_logs([url.settings(settings) for url in urls], report)
    for url in urls:
        _traffic(url, url.settings(settings), manager.state_directory, report)
    inherited = Inherited(manager.sockets, LISTENER_ROLES)
    servers = [url for url in urls if isinstance(url, ServerURL)]
    with ExitStack() as held:  # until all are checked: two URLs may have the same port
        if settings.metrics_listen:
            _metrics(settings.metrics_listen, urls, report, held)
        ports: dict[Address, ServerURL] = {}  # tunnel ports, and the URL that has opened each
        for url in servers:
            first = ports.setdefault(url.tunnel, url) if url.tunnel.port else url
            listen = partial(try_to_listen, report, held, urls, url.name)
            _Server(url, url.settings(settings), report, inherited.share(), listen).check(first)
    for url in urls:
        if isinstance(url, ClientURL):
            key = next(iter(keys.of(url).keys_for(url.tunnel_name)), None)
            check_client(url, url.settings(settings), key, report, {each.tunnel.port for each in servers})
    return report.status


def _parse(text: str, report: Report) -> URL | None:
    try:
        url = parse_url(text)
    except ConfigError as error:
        report.bad("url", str(error))
        return None
    report.ok(url.name, f"url: tunnel address {url.tunnel_text}, target address {url.target_text}")
    return url


def _settings(read_settings: Callable[[], Settings], environ: Mapping[str, str], report: Report) -> Settings | None:
    for typo in find_typos(environ):
        report.warn("settings", typo.words)
    try:
        settings = read_settings()
    except ConfigError as error:
        report.bad("settings", str(error))
        return None
    report.ok("settings", "all values are valid")
    return settings


def _keys(find_keys: Callable[[], Keys], urls: Sequence[URL], report: Report) -> Keys | None:
    try:
        keys = find_keys()
    except ConfigError as error:
        report.bad("key", str(error))
        return None
    for warning in keys.notices:
        report.warn("key", warning.words)
    if keys.place:
        names = "one for all tunnels" if keys.names is None else f"of {len(keys.names)} tunnels"
        report.ok("key", f"{keys.place}: {names}")
    elif not urls or not all(url.tunnel_key_file for url in urls):
        report.ok("key", "none: any host that reaches the tunnel port can become the client")
    return keys


def _with_defaults(
    urls: Sequence[URL], settings: Settings, keys: Keys, variables: ProxyVariables, report: Report
) -> list[URL]:
    """The URLs as the program takes them, and what is wrong with them in one process."""
    resolved: list[URL] = []
    for url in urls:
        try:
            own = keys.of(url)
            has_key = own.has(url.tunnel_name)
            resolved.append(with_passages(with_defaults(url, has_key, settings), settings, variables))
        except ConfigError as error:
            report.bad(url.name, str(error))
            continue
        for warning in own.notices if url.tunnel_key_file else ():
            report.warn(url.name, warning.words)
        _security(security_of(resolved[-1], has_key), url.name, report)
    for notice in find_exposed(resolved):
        report.warn("settings", notice.words)
    for conflict in find_conflicts(resolved, keys, settings):
        report.bad("url", conflict)
    return resolved


def _security(security: Security, name: str, report: Report) -> None:
    """What protects the tunnel; a warning where it is weak, unless a client's URL leaves it to the server by tls=0."""
    adopts_quietly = security.role == "client" and security.is_chosen and not (security.demand or security.has_key)
    is_weak = bool(find_weakness(security)) and not adopts_quietly
    (report.warn if is_weak else report.ok)(name, f"security: {describe(security)}")


def _mode(path: str) -> str:
    try:
        return f"{stat.S_IMODE(os.stat(path).st_mode):04o}"
    except OSError:
        return "unknown"


def _find_manager(environ: MutableMapping[str, str], report: Report) -> ServiceManager:
    """What systemd has passed, if a unit starts the check."""
    try:
        return ServiceManager.take(environ)
    except ConfigError as error:
        report.bad("systemd", str(error))
        return ServiceManager()


def _limits(settings: Sequence[Settings], urls: Sequence[URL], report: Report) -> None:
    limits = survey(settings, may_need_tls(urls))
    report.ok("limits", limits.line.removeprefix("limits: "))
    for warning in limits.warnings:
        report.warn("limits", warning.words)


def _metrics(listen: Listen, urls: Sequence[URL], report: Report, held: ExitStack) -> None:
    try:
        from nodepass.metrics.endpoint import LOOPBACK, WHAT
    except ModuleNotFoundError as error:
        report.bad("settings", f"METRICS_LISTEN: {error}; {how_to_add(error)}")
        return
    if listen.path:
        try_unix(report, "metrics", WHAT, listen.path)
    else:
        address = Address(listen.host or LOOPBACK, listen.port)
        try_to_listen(report, held, urls, "metrics", WHAT, address, lambda: listen_tcp(address, WHAT))


def _access_logs(settings: Sequence[Settings], report: Report) -> None:
    """Whether their places can be written to, each once."""
    for place in filter(None, dict.fromkeys(each.access_log for each in settings)):
        _access_log(place, report)


def _access_log(place: AccessPlace, report: Report) -> None:
    text, trouble = f"ACCESS_LOG={place}", find_trouble(place)
    if not trouble:
        report.ok("settings", f"{text}: can be written to")
    elif place.is_socket:
        report.warn("settings", f"{text}: {trouble}; lines wait for it")
    elif place.path.startswith(LOGS) and not os.path.isdir(os.path.dirname(place.path)):
        report.warn("settings", f"{text}: {trouble}; expected if the unit's LogsDirectory= makes it")
    else:
        report.fail("settings", f"{text}: {trouble}")


def _traffic(url: URL, settings: Settings, directory: str, report: Report) -> None:
    """Whether there is a place for the count of TRAFFIC_LIMIT. Nothing is made there: it could get another owner."""
    limit = settings.traffic_limit
    if not limit:
        return
    text = f"TRAFFIC_LIMIT={limit}"
    if not directory:
        words = "STATE_DIRECTORY is not set; expected if the unit's StateDirectory= sets it"
        report.warn(url.name, f"{text}: {words}")
    elif os.path.isdir(directory) and os.access(directory, os.W_OK | os.X_OK):
        report.ok(url.name, f"{text}: counted in {directory}")
    else:
        report.bad(url.name, f"{text}: {directory} is not a directory in which this user may write")


class _Server:
    """One server URL: its lists of visitors, its certificate and its addresses."""

    def __init__(
        self, url: ServerURL, settings: Settings, report: Report, share: Share, listen: Callable[..., None]
    ) -> None:
        """`listen`: `try_to_listen` for this URL."""
        self._url = url
        self._settings = settings
        self._report = report
        self._share = share
        self._listen = listen

    def check(self, first: ServerURL) -> None:
        """Load the certificate and listen on every address, but on a tunnel port only for the first URL that has it."""
        url = self._url
        self._check_rules()
        if url is first:
            self._check_port()
        else:
            self._report.ok(url.name, f"tunnel address {url.tunnel}: shared with {first.name}")
        if isinstance(url.target, UnixPath):
            mode, owner = self._settings.unix_mode, self._settings.unix_owner
            try_unix(self._report, url.name, "target address", url.target.path, mode, owner)
        else:
            self._check_target(url.target)

    def _check_target(self, target: Address) -> None:
        tcp, udp, share = "target address (tcp)", "target address (udp)", self._share.of(TARGET)
        if self._settings.tcp:
            self._listen(tcp, target, lambda: listen_tcp(target, tcp, share))
        if self._settings.udp:
            self._listen(udp, target, lambda: listen_udp(target, udp, share))

    def _check_rules(self) -> None:
        settings = self._settings
        if given := " and ".join(name for name, rule in (("ALLOW", settings.allow), ("DENY", settings.deny)) if rule):
            try:
                Rules(settings, self._url.name)
            except ConfigError as error:
                self._report.bad(self._url.name, str(error))
            else:
                self._report.ok(self._url.name, f"visitors: limited by {given}")

    def _check_port(self) -> None:
        """What all tunnels of the port share."""
        url, ports, share = self._url, self._settings.data_port, self._share
        if url.tls == 2:
            self._check_certificate()
        self._listen("tunnel address", url.tunnel, lambda: listen_tcp(url.tunnel, "tunnel address", share.of(TUNNEL)))
        if not ports.tunnel:
            host = url.tunnel.host
            data = Address(host, ports.last)
            self._listen("data port", data, lambda: listen_in_range(host, ports, "data port", share.of(DATA)))

    def _check_certificate(self) -> None:
        from nodepass.tls.certificates import load_pair
        from nodepass.tls.contexts import server_context

        url = self._url
        try:
            identity = load_pair(url.crt, url.key)
            server_context(identity.chain, identity.key)
        except ConfigError as error:
            self._report.bad(url.name, str(error))
            return
        self._judge(identity)
        if os.stat(url.key).st_mode & _OTHERS:
            self._report.warn(
                url.name, f"key={url.key}: mode {_mode(url.key)}, readable by others; run chmod 600 {url.key}"
            )

    def _judge(self, identity: Identity) -> None:
        """Whether clients accept it: its names and its validity."""
        from nodepass.tls.verify import shown_names

        place, days = f"crt={self._url.crt}", identity.lifetime.total_seconds() / 86400
        names = shown_names(identity.names)
        text = f"{place}: matches its key, valid for {names or 'no name'}, {days:.1f} days left"
        if days <= 0:
            self._report.fail(self._url.name, f"{place}: expired {-days:.1f} days ago, clients reject it")
        elif identity.is_early:
            self._report.fail(self._url.name, f"{place}: not valid yet, clients reject it")
        elif not names or days < EXPIRES_SOON:
            self._report.warn(self._url.name, text)
        else:
            self._report.ok(self._url.name, text)
