"""Unix stream sockets: their files, and sessions over them, about which the kernel tells less than about TCP."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from gevent import Greenlet, socket

from nodepass.config.kinds import Owner
from nodepass.errors import ListenError
from nodepass.net.deadlines import Bounds, Deadlines
from nodepass.net.relay import Traffic, relay
from nodepass.net.sockets import Socket, is_gone, read_tcp_info, room_to_send
from nodepass.net.stopped import stopped_directions
from nodepass.net.stream import TCPStream
from nodepass.net.unix import UnixListener, dial_unix, is_living
from nodepass.stats import Stats
from tests.unit.controls import run, until
from tests.unit.streams import receive_all, tcp_pair


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "app.sock"


def unix_pair(stack: ExitStack, path: Path) -> tuple[TCPStream, socket.socket]:
    """A stream that a target was dialled with, and the target's end."""
    listener = UnixListener(str(path), "it")
    stack.callback(listener.close)
    sock = dial_unix(str(path), 10)
    stack.callback(sock.close)
    peer, _ = socket.socket.accept(_of_gevent(stack, listener.sock))
    return TCPStream(sock), stack.enter_context(peer)


def _of_gevent(stack: ExitStack, listener: object) -> socket.socket:
    return stack.enter_context(socket.socket(fileno=os.dup(listener.fileno())))  # type: ignore[attr-defined]


# The file


def test_a_listener_whose_queue_is_full_is_not_taken_for_a_stale_socket_or_waited_for(
    stack: ExitStack, path: Path
) -> None:
    stack.callback(UnixListener(str(path), "it", backlog=0).close)
    stack.enter_context(closing(dial_unix(str(path), 10)))
    assert is_living(str(path))
    with pytest.raises(ListenError, match="another process listens there"):
        UnixListener(str(path), "it")
    assert path.exists()


def test_a_listeners_file_has_the_mode_and_the_owner_and_is_removed(path: Path) -> None:
    me, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
    for owner in (Owner(), Owner(me), Owner("", group), Owner(str(os.getuid()), str(os.getgid()))):
        listener = UnixListener(str(path), "it", 0o606, owner)
        assert stat.S_IMODE(path.stat().st_mode) == 0o606
        assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid())
        listener.close()
        assert not path.exists()


@pytest.mark.parametrize(
    ("owner", "why"), [(Owner("no-such-user"), "no user 'no-such-user'"), (Owner("", "no-such"), "no group 'no-such'")]
)
def test_an_owner_that_does_not_exist_is_an_error_and_leaves_no_file(path: Path, owner: Owner, why: str) -> None:
    with pytest.raises(ListenError, match=f"cannot listen on it unix:{path}: there is {why}"):
        UnixListener(str(path), "it", 0o660, owner)
    assert not path.exists()


def test_an_owner_that_is_not_permitted_is_an_error_and_leaves_no_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(ListenError, match="cannot change its owner: Operation not permitted"):
        UnixListener(str(path), "it", 0o660, Owner("0"))
    assert not path.exists()


# What the kernel tells


def test_a_connection_is_gone_once_its_peer_has_closed_it(stack: ExitStack, path: Path) -> None:
    stream, peer = unix_pair(stack, path)
    assert not is_gone(stream.sock)
    peer.shutdown(socket.SHUT_WR)
    assert not is_gone(stream.sock), "it can still be written to"
    peer.close()
    assert is_gone(stream.sock)
    assert read_tcp_info(stream.sock).is_gone


def test_what_the_peer_has_read_is_progress(stack: ExitStack, path: Path) -> None:
    stream, peer = unix_pair(stack, path)
    stream.write(bytes(1000))
    before = read_tcp_info(stream.sock)
    assert not before.waits
    assert peer.recv(1000)
    assert read_tcp_info(stream.sock).acknowledged > before.acknowledged


def test_a_full_socket_has_no_room(stack: ExitStack, path: Path) -> None:
    stream, _ = unix_pair(stack, path)
    before = room_to_send(stream.sock)
    assert before > 10_000
    while not stream.send(bytes(1000)):
        pass
    assert room_to_send(stream.sock) < before / 8


# Sessions


def start_session(
    stack: ExitStack, near: TCPStream, far: TCPStream, deadlines: Deadlines | None = None
) -> Greenlet[..., Traffic]:
    running: Greenlet[..., Traffic] = Greenlet.spawn(relay, near, far, Stats(), None, deadlines)
    stack.callback(running.kill)
    return running


def test_a_session_keeps_half_closes_and_outlives_the_looks_at_its_deadlines(stack: ExitStack, path: Path) -> None:
    near, visitor = stack.enter_context(tcp_pair())
    far, target = unix_pair(stack, path)
    deadlines = Deadlines(0.0, 0.0, data_is_near=True, bounds=Bounds(0.01, 0.01, 0.01))
    running = start_session(stack, near, far, deadlines)
    visitor.sendall(b"question")
    visitor.shutdown(socket.SHUT_WR)
    assert receive_all(target) == b"question"
    for _ in range(3):
        deadlines._look()
    target.sendall(b"answer")
    target.close()
    assert receive_all(visitor) == b"answer"
    assert running.get().outcome == "completed"


def test_a_busy_session_is_complete(stack: ExitStack, path: Path) -> None:
    near, visitor = stack.enter_context(tcp_pair())
    far, target = unix_pair(stack, path)
    start_session(stack, near, far)
    data = bytes(range(256)) * (32 << 10)
    run(stack, lambda: (visitor.sendall(data), visitor.shutdown(socket.SHUT_WR)))
    assert receive_all(target) == data
    run(stack, lambda: (target.sendall(data), target.close()))
    assert receive_all(visitor) == data


def test_a_target_that_leaves_while_its_visitor_reads_nothing_ends_the_session(
    stack: ExitStack, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopped_directions.timer, "period", 0.01)
    monkeypatch.setattr(stopped_directions, "patience", 0.05)
    near, visitor = stack.enter_context(tcp_pair())
    far, target = unix_pair(stack, path)
    running = start_session(stack, near, far)
    visitor.sendall(b"unread")
    until(lambda: _is_full(target))
    target.close()  # with bytes unread: a reset, as far as Unix sockets have one
    assert running.get(timeout=10).outcome == "reset"


def _is_full(sock: socket.socket) -> bool:
    """Send what is taken now; whether the direction has come to a stop."""
    sock.setblocking(False)
    try:
        while sock.send(bytes(65536)):
            pass
    except BlockingIOError:
        pass
    return bool(len(stopped_directions))


def test_a_socket_of_the_kernel_is_what_a_session_uses(stack: ExitStack, path: Path) -> None:
    assert type(unix_pair(stack, path)[0].sock) is Socket
