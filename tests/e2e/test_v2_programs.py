"""Real programs over UDP through the tunnel: a name server asked ten thousand times, iperf3, DTLS."""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.process import scrubbed
from tests.support.programs import running, tunnel_to
from tests.support.sockets import PATIENCE, Address, free_port, parse_address
from tests.support.tunnel import CALM, OurClient, OurServer

NAME, FOUND = "host.example.test", "192.0.2.7"
LONG = "x" * 250
STRINGS = 12
"""Of 250 characters: an answer of more than two packets."""

QUESTIONS = 10_000
WINDOW = 64
"""Questions on their way at once: what every receive buffer on the way has room for."""


@pytest.fixture(scope="module")
def name_server() -> Iterator[Address]:
    """A dnsmasq that knows one name and one long text, and asks nobody else."""
    port = free_port()
    command = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file", "--no-resolv", "--no-hosts"]
    command += [f"--port={port}", "--listen-address=127.0.0.1", "--bind-interfaces", "--edns-packet-max=4096"]
    command += [f"--address=/{NAME}/{FOUND}", f"--txt-record=long.example.test{f',{LONG}' * STRINGS}"]
    with running(port, *command) as address:
        yield address


def dig(visitors: str, *question: str) -> str:
    """What dig prints; it asks once and waits as long as anything does here."""
    host, port = parse_address(visitors)
    command = ["dig", f"@{host}", "-p", str(port), "+short", "+tries=1", f"+time={PATIENCE:.0f}", *question]
    done = subprocess.run(command, env=scrubbed(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.mark.programs("dig", "dnsmasq")
@pytest.mark.parametrize("tls", [0, 1])
def test_dig_asks_a_name_server_through_the_tunnel(name_server: Address, tls: int) -> None:
    with tunnel_to(name_server, tls) as visitors:
        for _ in range(5):
            assert dig(visitors, NAME, "A") == FOUND
        assert dig(visitors, "+tcp", NAME, "A") == FOUND
        long = dig(visitors, "+bufsize=4096", "+ignore", "+notcp", "long.example.test", "TXT")
        assert long.count(LONG) == STRINGS


def query(number: int) -> bytes:
    """A question for the name's address with this id."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in NAME.split("."))
    return struct.pack(">6H", number, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", 1, 1)


class Asker:
    """Asks every question once, each from a port of its own, with a window of unanswered ones."""

    def __init__(self, visitors: Address, stack: contextlib.ExitStack) -> None:
        self._visitors = visitors
        self._stack = stack
        self._poll = select.poll()
        self._waiting: dict[int, tuple[int, socket.socket]] = {}
        self.ports: set[int] = set()
        self.answered = 0

    def run(self, questions: int) -> None:
        for number in range(questions):
            self._ask(number)
            while len(self._waiting) >= WINDOW:
                self._hear()
        while self._waiting:
            self._hear()

    def _ask(self, number: int) -> None:
        visitor = self._stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        visitor.connect(self._visitors)
        self.ports.add(visitor.getsockname()[1])
        visitor.send(query(number))
        self._waiting[visitor.fileno()] = number, visitor
        self._poll.register(visitor, select.POLLIN)

    def _hear(self) -> None:
        ready = self._poll.poll(PATIENCE * 1000)
        assert ready, f"questions without an answer: {sorted(number for number, _ in self._waiting.values())}"
        for descriptor, _ in ready:
            number, visitor = self._waiting.pop(descriptor)
            self._poll.unregister(descriptor)
            answer = visitor.recv(4096)
            assert answer[:2] == struct.pack(">H", number)
            assert answer.endswith(socket.inet_aton(FOUND))
            self.answered += 1


@pytest.mark.programs("dnsmasq")
def test_ten_thousand_questions_from_as_many_ports_are_all_answered(
    name_server: Address, stack: contextlib.ExitStack
) -> None:
    env = {**CALM, "SEMAPHORE_LIMIT": str(2 * QUESTIONS), "UDP_SESSION_TIMEOUT": "60s"}
    server = stack.enter_context(OurServer(log="info", env=env))
    client = stack.enter_context(OurClient(server.tunnel_address, name_server, log="info", env=env))
    client.wait_until_connected()
    asker = Asker(server.visitor_address, stack)
    asker.run(QUESTIONS)
    assert asker.answered == len(asker.ports) == QUESTIONS
    # A flow that has had its answer may make room for another where the machine allows too few open files.
    assert not server.find("datagram.dropped") + client.find("datagram.dropped")


@pytest.mark.programs("in.tftpd", "curl")
def test_curl_reads_and_writes_files_by_tftp_whose_server_answers_from_other_ports(tmp_path: Path) -> None:
    """Each transfer has a port of its own at the server."""
    sent = random.Random(0).randbytes(100_000)
    (tmp_path / "file").write_bytes(sent)
    tmp_path.chmod(0o777)
    port = free_port()
    command = ("in.tftpd", "--foreground", "--address", f"127.0.0.1:{port}", "--user", "root", "--secure", "--create")
    server = running(port, *command, str(tmp_path), protocol="udp")
    with server as address, tunnel_to(address, 1, UDP_ANSWERS="any") as visitors:
        curl = ["curl", "--silent", "--show-error", "--max-time", "30"]
        done = subprocess.run([*curl, f"tftp://{visitors}/file"], env=scrubbed(), capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == sent
        upload = [*curl, "--upload-file", str(tmp_path / "file"), f"tftp://{visitors}/written"]
        subprocess.run(upload, env=scrubbed(), check=True)
        assert (tmp_path / "written").read_bytes() == sent


@pytest.mark.programs("iperf3")
@pytest.mark.parametrize("direction", [(), ("--reverse",)], ids=["to the target", "to the visitor"])
def test_iperf3_sends_datagrams_through_the_tunnel(direction: tuple[str, ...]) -> None:
    port = free_port()
    server = running(port, "iperf3", "--server", "--bind", "127.0.0.1", "--port", str(port))
    with server as address, tunnel_to(address, 0) as visitors:
        host, number = parse_address(visitors)
        command = ["iperf3", "--client", host, "--port", str(number), "--udp", "--bitrate", "10M", "--bytes", "1M"]
        command += ["--length", "1400", "--json", *direction]
        done = subprocess.run(command, env=scrubbed(), capture_output=True, check=False, timeout=60)
    report = json.loads(done.stdout)
    assert "error" not in report, report["error"]
    assert report["end"]["sum"]["packets"] > 500
    assert report["end"]["sum"]["lost_packets"] == 0


@pytest.mark.programs("openssl")
def test_a_dtls_conversation_passes_the_tunnel(authority: Authority, stack: contextlib.ExitStack) -> None:
    leaf, port = authority.local, free_port()
    service = spoken_to(
        stack, "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(leaf.crt), "-key", str(leaf.key)
    )
    visitors = stack.enter_context(tunnel_to(("127.0.0.1", port), 0))
    trust = ("-CAfile", str(authority.crt), "-verify_return_error")
    visitor = spoken_to(stack, "s_client", "-connect", visitors, *trust)
    for speaker, listener in ((visitor, service), (service, visitor)):
        assert speaker.stdin is not None
        assert listener.stdout is not None
        speaker.stdin.write(b"a line\n")
        speaker.stdin.flush()
        assert listener.stdout.readline() == b"a line\n"


def spoken_to(stack: contextlib.ExitStack, *arguments: str) -> subprocess.Popen[bytes]:
    """One end of OpenSSL's DTLS, whose standard input and output are the conversation."""
    command = ["openssl", arguments[0], "-dtls1_2", "-quiet", *arguments[1:]]
    process = subprocess.Popen(command, env=scrubbed(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    stack.enter_context(process)
    stack.callback(process.kill)
    return process
