"""Proxies of other packages between a client and its server, each with a user and a password or without.

They listen on `host` and connect to everything, and end with the test. Their files stand where the users that they run
as can read them.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from tests.support.certificates import Certificate
from tests.support.programs import installed, running
from tests.support.sockets import Address

USER, PASSWORD = "joe", "open-sesame"

SQUID = """
pid_filename none
pinger_enable off
netdb_filename none
cache deny all
access_log none
cache_log /dev/null
cache_store_log none
mime_table /usr/share/squid/mime.conf
max_filedescriptors 4096
shutdown_lifetime 0 seconds
visible_hostname proxy.example
coredump_dir /
"""

NCSA = "/usr/lib/squid/basic_ncsa_auth"


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A directory that every user can read."""
    with tempfile.TemporaryDirectory(prefix="nodepass-proxy-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def hashed(scheme: str) -> str:
    """The password, as files of users have it."""
    command = [installed("openssl"), "passwd", scheme, PASSWORD]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def squid(
    port: int, has_login: bool, host: str = "127.0.0.1", listen: str = "", more: str = "", scheme: str = "http"
) -> Iterator[Address]:
    """squid; `listen`: parameters of its port, `more`: of its configuration."""
    with directory() as path:
        login = ""
        if has_login:
            (path / "users").write_text(f"{USER}:{hashed('-apr1')}\n")
            login = f"auth_param basic program {NCSA} {path}/users\nacl known proxy_auth REQUIRED\n"
        allow = f"http_access allow {'known' if has_login else 'all'}\nhttp_access deny all\n"
        config = path / "squid.conf"
        config.write_text(f"{scheme}_port {host}:{port} {listen}\n{login}{allow}{SQUID}{more}")
        with running(port, "squid", "-N", "-f", str(config)):
            yield (host, port)


@contextlib.contextmanager
def tinyproxy(port: int, has_login: bool, host: str = "127.0.0.1", more: str = "") -> Iterator[Address]:
    """tinyproxy; `more`: of its configuration."""
    with directory() as path:
        login = f"BasicAuth {USER} {PASSWORD}\n" * has_login
        config = path / "tinyproxy.conf"
        config.write_text(f"Port {port}\nListen {host}\nMaxClients 1000\nLogLevel Error\n{login}{more}")
        with running(port, "tinyproxy", "-d", "-c", str(config)):
            yield (host, port)


@contextlib.contextmanager
def microsocks(port: int, has_login: bool, host: str = "127.0.0.1") -> Iterator[Address]:
    """microsocks."""
    login = ["-u", USER, "-P", PASSWORD] if has_login else []
    with running(port, "microsocks", "-i", host, "-p", str(port), *login):
        yield (host, port)


DANTE = """
internal: {host} port = {port}
external: {host}
clientmethod: none
socksmethod: {method}
user.privileged: root
user.unprivileged: nobody
client pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 }}
socks pass {{ from: 0.0.0.0/0 to: 0.0.0.0/0 command: connect }}
"""


@contextlib.contextmanager
def dante(port: int, has_login: bool, host: str = "127.0.0.1") -> Iterator[Address]:
    """dante, whose users are those of the machine: it has other files of them than the rest of it."""
    with directory() as path:
        config = path / "danted.conf"
        config.write_text(DANTE.format(host=host, port=port, method="username" if has_login else "none"))
        command = [installed("danted"), "-f", str(config)]
        if has_login:
            mounts = ""
            for name, line in (("passwd", f"{USER}:x:1:1::/:/bin/false"), ("shadow", f"{USER}:{hashed('-6')}:1::::::")):
                (path / name).write_text(f"{Path('/etc', name).read_text()}{line}\n")
                mounts += f"mount --bind {path}/{name} /etc/{name} && "
            command = [installed("unshare"), "--mount", "sh", "-c", f"{mounts}exec {' '.join(command)}"]
        with running(port, *command):
            yield (host, port)


Start = Callable[[int, bool], AbstractContextManager[Address]]
PROXIES: dict[str, tuple[str, Start, tuple[str, ...]]] = {
    "squid": ("http", squid, ("squid", "openssl")),
    "tinyproxy": ("http", tinyproxy, ("tinyproxy",)),
    "microsocks": ("socks5h", microsocks, ("microsocks",)),
    "dante": ("socks5h", dante, ("danted", "openssl", "unshare", "mount namespaces")),
}
"""The scheme of each, how it is started, and what a test needs for that."""


def tls_only(port: int, host: str, certificate: Certificate) -> AbstractContextManager[Address]:
    """squid that looks at the first bytes that pass, and ends what is not TLS."""
    listen = f"ssl-bump generate-host-certificates=off tls-cert={certificate.crt} tls-key={certificate.key}"
    more = "acl first at_step SslBump1\nssl_bump peek first\nssl_bump splice all\n"
    return squid(port, False, host, listen, more)


def inside_tls(port: int, certificate: Certificate) -> AbstractContextManager[Address]:
    """squid as an https:// proxy, which demands the password."""
    return squid(port, True, listen=f"tls-cert={certificate.crt} tls-key={certificate.key}", scheme="https")
