"""What is said when it goes wrong between two ends: each that can know has one line with the cause and the remedy.

The client's line is that of `--check`, which says the same as a client does in its log. tests/unit/test_said.py has
what one process finds alone, tests/faults/test_unready.py what a connected tunnel lacks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from nodepass.daemon.key_file import generate
from tests.support.certificates import Authority
from tests.support.checks import check_of, found
from tests.support.process import Finished, run
from tests.support.sockets import Address, connect, format_address
from tests.support.target import Target
from tests.support.wire2.ours import OurServers


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(generate())
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def servers(authority: Authority, key_file: Path) -> Iterator[OurServers]:
    """One without protection, one with a key, one with a certificate."""
    queries = {"open": "tls=0", "keyed": f"tls=1&tunnel_key_file={key_file}", "certified": "tls=2"}
    with OurServers(queries, authority.local) as started:
        yield started
        assert not started.find_crashes()


class Said(NamedTuple):
    situation: str
    server: str
    query: str  # of the client
    client: tuple[str, str]  # the words of its line
    event: str  # the server's
    words: tuple[str, str]


SAME_KEY = "set the same key on both ends"
REFUSED = ("the client refused this server's certificate", "come from a CA that the client's system or SSL_CERT_FILE")
NO_CAS = ("its issuer is not trusted here", "SSL_CERT_FILE=/none cannot be read: No such file or directory")

TABLE = (
    Said(
        *("a key on the server only", "keyed", ""),
        ("the server requires a key and this client has none", SAME_KEY),
        "client.rejected",
        ("disconnected after the challenge (no key, or a different one)", SAME_KEY),
    ),
    Said(
        *("a key on the client only", "open", "tunnel_key_file={key_file}"),
        ("the server does not use TLS (tls=0) and this client requires it because it has a key", SAME_KEY),
        "client.rejected",
        ("this server does not use it (tls=0)", "where the client has a key, set the same here"),
    ),
    Said(
        *("a certificate that the client demands and rejects", "certified", "tls=2"),
        NO_CAS,
        "client.certificate_refused",
        REFUSED,
    ),
    Said(
        *("a certificate that the client adopts and rejects", "certified", "tls=0"),
        NO_CAS,
        "client.disconnected",
        REFUSED,
    ),
)


@pytest.fixture(scope="module")
def checked(servers: OurServers, key_file: Path) -> Finished:
    """One check of all these clients, each with a target of its own."""
    urls = [
        f"client://{format_address(servers[said.server].tunnel_address)}/127.0.0.1:{port}"
        + f"?{said.query.format(key_file=key_file)}" * bool(said.query)
        for port, said in enumerate(TABLE, 1)
    ]
    return check_of(*urls, SSL_CERT_FILE="/none")


@pytest.mark.parametrize("said", TABLE, ids=lambda said: said.situation)
def test_both_ends_have_a_line_with_the_cause_and_the_remedy(
    servers: OurServers, checked: Finished, said: Said
) -> None:
    same = [each for each in TABLE if (each.server, each.client) == (said.server, said.client)]
    of_server = f" client:{servers[said.server].tunnel_address[1]}: "
    lines = [line for line in checked.output.splitlines() if of_server in line]
    assert len([line for line in lines if all(words in line for words in said.client)]) == len(same), lines
    entry = servers.wait_in(said.server, said.event)
    assert all(words in entry["message"] for words in said.words), entry


@pytest.mark.parametrize(
    ("spoken", "protocol"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH"),
        (b"PROXY TCP4 ", "the PROXY"),
    ],
)
def test_a_server_names_what_is_spoken_at_its_port(servers: OurServers, spoken: bytes, protocol: str) -> None:
    for label in ("open", "certified"):
        mark = servers.mark()
        with connect(servers[label].tunnel_address) as peer:
            peer.sendall(spoken)
            entry = servers.wait_in(label, "client.other_protocol", after=mark)
        assert f"it speaks {protocol}" in entry["message"]
        assert "visitors connect to the target address" in entry["message"]


@contextlib.contextmanager
def answering(answer: bytes) -> Iterator[Address]:
    """A service that reads what its first connection says, gives it this answer and closes it."""
    with Target() as service:

        def serve() -> None:
            with service.accept() as visitor:
                visitor.recv(1 << 16)
                visitor.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield service.address
        thread.join()


def test_a_client_at_a_service_asks_for_the_tunnel_address() -> None:
    cases = (
        ("tls=0", b"HTTP/1.1 400 Bad Request\r\n\r\n", "the answer is HTTP"),
        ("tls=1", b"HTTP/1.1 400 Bad Request\r\n\r\n", "the answer is HTTP"),
        ("tls=0", b"SSH-2.0-OpenSSH_9.6\r\n", "the answer is SSH"),
        ("tls=0", b"", "closed by the peer during the handshake"),
    )
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(answering(answer)) for _, answer, _ in cases]
        urls = [
            f"client://{format_address(address)}/127.0.0.1:9?{query}"
            for address, (query, _, _) in zip(addresses, cases, strict=True)
        ]
        done = check_of(*urls)
    for address, (_, _, cause) in zip(addresses, cases, strict=True):
        assert found(done, "fail", f"client:{address[1]}: .*handshake failed: .*{cause}.*not its target address"), cause


def test_a_start_says_which_process_has_its_port(servers: OurServers) -> None:
    address = format_address(servers["open"].tunnel_address)
    done = run(f"server://{address}/127.0.0.1:0?tls=1")
    assert done.code == 1
    assert f"cannot listen on tunnel address {address}: Address already in use; in use by " in done.errors
    assert done.errors.endswith(f", process {servers.pid}\n")


@pytest.mark.programs
def test_a_check_is_a_failure_beside_another_tunnel_and_a_warning_beside_its_own(servers: OurServers) -> None:
    address = format_address(servers["open"].tunnel_address)
    done = check_of(f"server://{address}/127.0.0.1:0?tls=1")
    assert done.code == 0
    assert found(done, "warn", f"tunnel address {address}: in use by a running nodepass .*: expected if it runs this")
    done = check_of(f"server://{address}/127.0.0.1:0?tls=1&name=another")
    assert done.code == 1
    assert found(done, "fail", f"tunnel address {address}: in use by a running nodepass .*, which has another URL")
