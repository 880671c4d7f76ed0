"""The command line: from arguments and environment to settings and URLs, and from errors to exit statuses.

0: stopped by a signal. 1: it could not start (an address cannot be listened on, no server within START_TIMEOUT).
2: bad input. 3: stopped by a signal, and there was a bug on the way. 1 and 2 are said in one line.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import configargparse

from nodepass import __version__, log
from nodepass.config import Notice, Settings, rows
from nodepass.daemon.daemon import Daemon
from nodepass.daemon.key_file import find_secret, generate
from nodepass.daemon.systemd import ServiceManager
from nodepass.errors import ConfigError, ListenError, StartError
from nodepass.urls import LOG_LEVELS, ClientURL, ServerURL, parse_url

if TYPE_CHECKING:
    from nodepass.wire.auth import Key

BUGS = 3  # exit status

DESCRIPTION = """\
A TCP/UDP reverse tunnel. Each URL is one tunnel:

  server://TUNNEL_HOST:PORT/TARGET_HOST:PORT?log=LEVEL&tls=0|1|2&crt=FILE&key=FILE
  client://TUNNEL_HOST:PORT/TARGET_HOST:PORT?log=LEVEL

The server runs where visitors can reach it: it listens on its tunnel address for its client and on its target
address for visitors, TCP and UDP. The client runs next to the service: it connects to the server's tunnel address
and, for every visitor, to its target address. LEVEL is debug, info, warn, error or fatal.

`nodepass top ENDPOINT` shows a running process that has METRICS_LISTEN set; see nodepass top --help.
"""
EPILOG = "Quote a URL that has a '&' or a '?'. A flag wins over its environment variable. Durations: 500ms, 5s, 1h30m."


class Parser(configargparse.ArgumentParser):  # type: ignore[misc]  # ConfigArgParse has no types
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"nodepass: {message}\n")
        sys.exit(2)


def make_parser() -> Parser:
    """The parser that the table of settings describes."""
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
    parser.add("--generate-key", action="store_true", help="print a fresh key for TUNNEL_KEY_FILE, and exit")
    help_text = (
        "say how a start would go, a line a finding (ok, warn, fail), and exit: 0 nothing failed, 1 failed, 2 bad input"
    )
    parser.add("--check", action="store_true", help=help_text)
    help_text = "a tunnel, see above; without any, those in NODEPASS_URL, separated by spaces"
    parser.add("urls", metavar="URL", nargs="*", help=help_text)
    groups = {row.group: parser.add_argument_group(row.group) for row in rows().values()}
    for name, row in rows().items():
        groups[row.group].add_argument(
            _flag(name),
            env_var=name.upper(),
            metavar=row.kind.unit.upper(),
            help=f"{row.help}; default {row.default} [{name.upper()}]",
        )
    key = parser.add_argument_group("key", "TUNNEL_KEY in the environment may hold the key itself; a flag could not.")
    help_text = "file with the key that both ends share; none means no key [TUNNEL_KEY_FILE]"
    key.add_argument("--tunnel-key-file", env_var="TUNNEL_KEY_FILE", metavar="FILE", help=help_text)
    return parser


def read_settings(parser: Parser, namespace: argparse.Namespace) -> Settings:
    """The settings of flags and environment. Raises ConfigError naming what is wrong."""
    from_environment = parser.get_source_to_settings_dict().get("environment_variables", {})
    texts = {
        name: (name.upper() if name.upper() in from_environment else _flag(name), text)
        for name in rows()
        if (text := getattr(namespace, name)) is not None
    }
    return Settings.from_texts(texts)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def main(arguments: Sequence[str]) -> int:
    """Run the program; its exit status."""
    parser = make_parser()
    namespace = parser.parse_args(list(arguments))
    if namespace.generate_key and namespace.urls:
        parser.error("--generate-key prints a key and takes no URL")
    if namespace.generate_key:
        sys.stdout.write(f"{generate()}\n")
        return 0
    texts = namespace.urls or os.environ.get("NODEPASS_URL", "").split()
    if not texts:
        parser.print_usage(sys.stderr)
        sys.stderr.write("nodepass: no URL given, nor NODEPASS_URL set; see nodepass --help\n")
        return 2
    if namespace.check:
        from nodepass.tools import check

        return check.run(texts, lambda: read_settings(parser, namespace), namespace.tunnel_key_file, os.environ)
    try:
        settings = read_settings(parser, namespace)
        urls = [parse_url(text) for text in texts]
        manager = ServiceManager.take(os.environ)
        key = _start(urls, settings, namespace.tunnel_key_file)
        gc.freeze()  # what is there now stays; 1 % of the time of short sessions
        daemon = Daemon(urls, settings, key, manager)
        daemon.run()
    except ConfigError as error:
        sys.stderr.write(f"nodepass: {error}\n")
        return 2
    except (ListenError, StartError) as error:
        sys.stderr.write(f"nodepass: {error}\n")
        return 1
    log.finish()
    return BUGS if daemon.bugs else 0


def _start(urls: Sequence[ServerURL | ClientURL], settings: Settings, key_file: str | None) -> Key | None:
    """Begin to log, at the level of the most verbose URL, say what is to be warned of, and make the key."""
    text, warnings = find_secret(key_file, os.environ)
    log.set_up(min((url.log for url in urls), key=LOG_LEVELS.index), os.environ, style=settings.log_format)
    for warning in warnings:
        _warn("nodepass", warning)
    for url in urls:
        for warning in url.warnings:
            _warn(url.name, warning)
    if text is None:
        return None
    from nodepass.wire.auth import Key

    return Key(text)


def _warn(tunnel: str, notice: Notice) -> None:
    log.Log(tunnel).warning("config.warning", "%(warning)s", reason=notice.reason, warning=notice.words)
