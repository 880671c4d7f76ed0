"""The command line: from arguments and environment to settings and URLs, and from errors to exit statuses.

0: stopped by a signal. 1: the start failed (an address cannot be listened on, no server within START_TIMEOUT).
2: bad input. 3: stopped by a signal, after a bug. With 1 and 2, one line says why. `__main__` calls `main`; `daemon`
and `check` do the work.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn

import configargparse

from nodepass import __version__, log
from nodepass.config.environment import find_typos, find_unusable_cas, refuse_service_link, tidy
from nodepass.config.outbound import hide_user
from nodepass.config.proxy_variables import ProxyVariables, find_exposed, with_passages
from nodepass.config.settings import Scope, Settings, rows
from nodepass.config.urls import LOG_LEVELS, ClientURL, ServerURL, parse_url, with_defaults
from nodepass.daemon.access_output import AccessOutputs
from nodepass.daemon.conflicts import refuse_conflicts
from nodepass.daemon.daemon import Daemon
from nodepass.daemon.key_file import Keys, generate
from nodepass.daemon.limits import forbid_core_dumps
from nodepass.daemon.log_output import LogOutput
from nodepass.daemon.systemd import ServiceManager
from nodepass.errors import ConfigError, ListenError, NodepassError, Notice, StartError
from nodepass.handover.receiver import Takeover
from nodepass.stats import Stats

BUGS = 3  # exit status

DESCRIPTION = """\
A TCP/UDP reverse tunnel. Each URL is one tunnel:

  server://TUNNEL_HOST:PORT/TARGET_HOST:PORT?name=NAME&tls=0|1|2&crt=FILE&key=FILE&log=LEVEL
  client://TUNNEL_HOST:PORT,.../TARGET_HOST:PORT,...?name=NAME&tls=0|1|2&log=LEVEL

The server runs where visitors can reach it. It listens on its tunnel address for its client and on its target address
for visitors, TCP and UDP. The client runs next to the service. It connects to the tunnel address of each of its
servers and, for every visitor, to one of its target addresses. LEVEL is debug, info, warn, error or fatal. A setting
in a URL, in small letters, is for that tunnel only and overrides flag and variable: ...?min_pool_capacity=64&wire=2.
A setting of the whole process, marked below, cannot stand in a URL; neither can a key, but tunnel_key_file=FILE can.

`nodepass top ENDPOINT` shows a running process that has METRICS_LISTEN set; see nodepass top --help.
"""
PROCESS_MARK = " (whole process)"
EPILOG = (
    "Quote a URL with '&' or '?' in it. A flag overrides its environment variable, and an empty variable is not set."
    " Durations: 500ms, 5s, 1h30m."
)


class Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # ConfigArgParse has no types
    """Reports an error in one line."""

    def parse_strictly(self, arguments: list[str]) -> argparse.Namespace:
        """As `parse_args`, and the error of an unknown flag says which one may be meant."""
        parsed: tuple[argparse.Namespace, list[str]] = self.parse_known_args(arguments)
        namespace, unknown = parsed
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            wrong = unknown[0].partition("=")[0]
            close = difflib.get_close_matches(wrong.lower().replace("_", "-"), flags, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(map(hide_user, unknown))}{hint}")
        return namespace

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"nodepass: {message}\n")
        sys.exit(2)


def make_parser() -> Parser:
    """The parser of the command line; its settings are those of the table in `config.settings`."""
    parser = Parser(
        prog="nodepass",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=configargparse.RawDescriptionHelpFormatter,
        add_config_file_help=False,
        add_env_var_help=False,
        allow_abbrev=False,
    )
    parser.add("--version", action="version", version=f"nodepass {__version__}")
    parser.add("--generate-key", action="store_true", help="print a new key for TUNNEL_KEY_FILE and exit")
    help_text = (
        "dry-run: report one finding per line (ok, warn, fail) and exit: 0 nothing failed, 1 failed, 2 bad input"
    )
    parser.add("--check", action="store_true", help=help_text)
    help_text = "a tunnel, see above; default: the URLs in NODEPASS_URL, separated by spaces"
    parser.add("urls", metavar="URL", nargs="*", help=help_text)
    groups = {row.group: parser.add_argument_group(row.group) for row in rows().values()}
    for name, row in rows().items():
        groups[row.group].add_argument(
            _flag(name),
            env_var=name.upper(),
            metavar=row.kind.unit.upper(),
            help=f"{row.help}; default {row.default} [{name.upper()}]{PROCESS_MARK * (row.scope is Scope.PROCESS)}",
        )
    key = parser.add_argument_group(
        "key", "The key itself may be in the environment variable TUNNEL_KEY, but never on the command line."
    )
    help_text = "file with the key that both ends share; default: no key [TUNNEL_KEY_FILE]"
    key.add_argument("--tunnel-key-file", env_var="TUNNEL_KEY_FILE", metavar="FILE", help=help_text)
    help_text = "file with a line for each tunnel, its name and its key; default: none [TUNNEL_KEYS_FILE]"
    key.add_argument("--tunnel-keys-file", env_var="TUNNEL_KEYS_FILE", metavar="FILE", help=help_text)
    return parser


def read_settings(parser: Parser, namespace: argparse.Namespace) -> Settings:
    """The settings from flags and environment. Raises ConfigError naming the flag or variable."""
    from_environment = parser.get_source_to_settings_dict().get("environment_variables", {})
    texts: dict[str, tuple[str, str]] = {}
    for name in rows():
        if (text := getattr(namespace, name)) is not None:
            variable, flag = name.upper(), _flag(name)
            texts[name] = flag, text
            if variable in from_environment:
                refuse_service_link(variable, text, flag)
                texts[name] = variable, text
    return Settings.from_texts(texts)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(arguments: Sequence[str]) -> int:
    """Run the program; its exit status."""
    gc.freeze()  # what is imported is not collected at the exit: a fifth of the time of a run that only says something
    gc.enable()
    tidy(os.environ)
    variables = ProxyVariables.take(os.environ)
    parser = make_parser()
    namespace = parser.parse_strictly(list(arguments))
    if namespace.generate_key and namespace.urls:
        parser.error("--generate-key takes no URL")
    if namespace.generate_key:
        sys.stdout.write(f"{generate()}\n")
        return 0
    texts = namespace.urls or os.environ.get("NODEPASS_URL", "").split()
    if not texts:
        parser.print_usage(sys.stderr)
        sys.stderr.write("nodepass: no URL given and NODEPASS_URL is not set; see nodepass --help\n")
        return 2
    find_keys = partial(Keys.find, namespace.tunnel_key_file, namespace.tunnel_keys_file, os.environ)
    if namespace.check:
        from nodepass.tools import check

        return check.run(texts, lambda: read_settings(parser, namespace), find_keys, variables, os.environ)
    takeover = None
    try:
        takeover = Takeover.take(os.environ)
        return _serve(texts, read_settings(parser, namespace), find_keys, variables, takeover)
    except (ConfigError, ListenError, StartError) as error:
        text = f"{error}{_name_holder(error)}"
        sys.stderr.write(f"nodepass: {text}\n")
        if takeover:
            takeover.report_failure(text)
        return 2 if isinstance(error, ConfigError) else 1


def _name_holder(error: NodepassError) -> str:
    """Which process has the port, for the end of the line."""
    if not isinstance(error, ListenError):
        return ""
    from nodepass.tools.check_ports import name_holder

    return name_holder(error)


def _serve(
    texts: Sequence[str],
    settings: Settings,
    find_keys: Callable[[], Keys],
    variables: ProxyVariables,
    takeover: Takeover | None,
) -> int:
    """Serve the tunnels of these URLs until a signal; the exit status. Raises ConfigError, ListenError, StartError.

    `takeover`: from another process, if there is one.
    """
    parsed = [parse_url(text) for text in texts]
    forbid_core_dumps()
    manager = ServiceManager.take(os.environ)
    keys = find_keys()
    urls = [with_defaults(url, keys.of(url).has(url.tunnel_name), settings) for url in parsed]
    urls = [with_passages(url, settings, variables) for url in urls]
    refuse_conflicts(urls, keys, settings)
    stats = Stats()
    LogOutput.replace_stderr(stats)
    has_client = any(isinstance(url, ClientURL) for url in urls)
    cas = find_unusable_cas(os.environ) if has_client else ()
    _start_log(urls, settings, [*keys.notices, *find_exposed(urls), *find_typos(os.environ), *cas])
    for url in urls:
        keys.of(url).keys_for(url.tunnel_name)  # derived now, so that no tunnel has to wait for it
    daemon = Daemon(urls, settings, keys, manager, stats, AccessOutputs(stats, os.environ), takeover)
    gc.collect()
    gc.freeze()  # what exists now is never collected; saves 1 % of the time of short sessions
    daemon.run()
    return BUGS if daemon.bugs else 0


def _start_log(urls: Sequence[ServerURL | ClientURL], settings: Settings, warnings: Sequence[Notice]) -> None:
    """Log from now on, at the level of the most verbose URL, and log the warnings about keys and variables."""
    log.set_up(min((url.log for url in urls), key=LOG_LEVELS.index), os.environ, style=settings.log_format)
    for each in warnings:
        log.Log("nodepass").warning("config.warning", "%(warning)s", reason=each.reason, warning=each.words)
