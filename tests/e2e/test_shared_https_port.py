"""One port for a website and the tunnel: nginx and haproxy look at the protocol that a ClientHello asks for."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.process import Environment
from tests.support.programs import running_haproxy, running_nginx
from tests.support.sockets import Address, free_port
from tests.support.target import Target
from tests.support.tunnel import CALM, OurClient, OurServer, Tunnel, assert_connected
from tests.support.v2_tunnel import KEYED

PAGE = b"<h1>a website</h1>"

NGINX = """
stream {{
    map $ssl_preread_alpn_protocols $behind {{
        ~\\bnodepass/2\\b {tunnel};
        default {website};
    }}
    server {{
        listen 127.0.0.1:{port};
        ssl_preread on;
        proxy_pass $behind;
        proxy_timeout 1h;
    }}
}}
"""

HAPROXY = """
frontend https
    bind 127.0.0.1:{port}
    tcp-request inspect-delay 5s
    tcp-request content accept if {{ req.ssl_hello_type 1 }}
    use_backend tunnel if {{ req.ssl_alpn -m sub nodepass/2 }}
    default_backend website
backend tunnel
    server tunnel {tunnel}
backend website
    server website {website}
"""


class Page(http.server.BaseHTTPRequestHandler):
    """The website."""

    def do_GET(self) -> None:  # the name is that of http.server
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture(scope="module")
def website(authority: Authority) -> Iterator[str]:
    """An HTTPS server; its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.local.crt, authority.local.key)
    context.set_alpn_protocols(["http/1.1"])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def shared_port(name: str, root: Path, tunnel: Address, website: str) -> AbstractContextManager[Address]:
    """One of the two programs in front of both."""
    port = free_port()
    text = {"nginx": NGINX, "haproxy": HAPROXY}[name]
    text = text.format(port=port, tunnel=f"127.0.0.1:{tunnel[1]}", website=website)
    if name == "nginx":
        return running_nginx(root, port, text, has_streams=True)
    return running_haproxy(root, port, text)


def read_page(address: Address, authority: Authority, protocols: list[str]) -> bytes:
    """Read the website as a browser does."""
    context = ssl.create_default_context(cafile=str(authority.crt))
    if protocols:
        context.set_alpn_protocols(protocols)
    with contextlib.closing(http.client.HTTPSConnection(*address, timeout=20, context=context)) as connection:
        connection.request("GET", "/")
        return connection.getresponse().read()


MODES: dict[str, tuple[int, Environment]] = {"tls 1, key": (1, KEYED), "tls 2": (2, CALM), "tls 2, key": (2, KEYED)}
Front = Callable[[Address], AbstractContextManager[Address]]


def assert_both_are_served(front: Front, authority: Authority, mode: str) -> None:
    """Put a tunnel and the website behind one port, and use both at the same time."""
    tls, keyed = MODES[mode]
    env = {**keyed, "DATA_PORT": "tunnel", "SSL_CERT_FILE": str(authority.crt)}
    with (
        OurServer(tls, authority.local, env=env) as server,
        front(server.tunnel_address) as address,
        Target() as target,
        OurClient(address, target.address, query=f"tls={tls}", env=env) as client,
    ):
        client.wait_until_connected(tls=tls, wire=2)
        tunnel = Tunnel(server, client, target)
        with tunnel.session() as (visitor, service):
            for protocols in ([], ["http/1.1"], ["h2", "http/1.1"]):
                assert read_page(address, authority, protocols) == PAGE
                tunnel.assert_works()
            for _ in range(20):
                tunnel.assert_works()
            assert_connected(visitor, service)
        assert tunnel.exchange(b"question", b"answer") == (b"question", b"answer")
        assert not client.find("data.dial_failed") + server.find("client.disconnected")


@pytest.mark.programs("nginx", "nginx's stream module")
@pytest.mark.parametrize("mode", MODES)
def test_nginx_shares_a_port_between_a_website_and_the_tunnel(
    authority: Authority, website: str, tmp_path: Path, mode: str
) -> None:
    assert_both_are_served(lambda tunnel: shared_port("nginx", tmp_path, tunnel, website), authority, mode)


@pytest.mark.programs("haproxy")
@pytest.mark.parametrize("mode", MODES)
def test_haproxy_shares_a_port_between_a_website_and_the_tunnel(
    authority: Authority, website: str, tmp_path: Path, mode: str
) -> None:
    assert_both_are_served(lambda tunnel: shared_port("haproxy", tmp_path, tunnel, website), authority, mode)
