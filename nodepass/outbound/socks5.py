"""SOCKS5: a connection through a proxy (RFC 1928), with a user and a password where there are any (RFC 1929).

Each answer of the proxy says how long it is, so exactly that much is read: what follows the last one is the server's.
The deadline is the caller's. `ways` calls this, once it is connected to the proxy.
"""

from __future__ import annotations

import socket

from nodepass.config.outbound import Credentials
from nodepass.config.urls import Address
from nodepass.errors import ProxyError
from nodepass.net.sockets import endpoint_of
from nodepass.net.stream import Stream, recv_exactly
from nodepass.wire.lines import printable

_VERSION, _LOGIN_VERSION = 5, 1
_NO_LOGIN, _LOGIN, _NONE = 0, 2, 0xFF  # methods of authentication
_CONNECT = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4  # kinds of address
_FAMILIES = {_IPV4: socket.AF_INET, _IPV6: socket.AF_INET6}
_SIZES = {_IPV4: 4, _IPV6: 16}
_REPLIES = {
    1: "failed to connect to {0}",
    2: "does not allow connections to {0}",
    3: "cannot reach the network of {0}",
    4: "cannot reach the host of {0}",
    5: "gets its connection to {0} refused",
    6: "got no answer from {0}",
    7: "does not accept CONNECT",
    8: "does not accept the kind of address of {0}",
}


def connect(stream: Stream, host: str, port: int, credentials: Credentials | None) -> None:
    """Have the proxy connect to the host, which it looks up. Raises OSError; ProxyError where the proxy refuses."""
    methods = bytes([_NO_LOGIN, _LOGIN] if credentials else [_NO_LOGIN])
    stream.write(bytes([_VERSION, len(methods)]) + methods)
    version, method = _read(stream, 2)
    if version != _VERSION:
        raise ProxyError(f"does not speak SOCKS5: {printable(bytes([version, method]))}")
    if method == _LOGIN and credentials:
        _log_in(stream, credentials)
    elif method in (_NONE, _LOGIN):
        words = "accepts neither no login nor a user and password"
        raise ProxyError(words if credentials else "requires a user and a password, see TUNNEL_PROXY_AUTH_FILE", "auth")
    elif method != _NO_LOGIN:
        raise ProxyError(f"chooses method {method}, which was not offered")
    stream.write(bytes([_VERSION, _CONNECT, 0]) + encode_address(host) + port.to_bytes(2, "big"))
    _read_reply(stream, str(Address(host, port)))


def encode_address(host: str) -> bytes:
    """A host as SOCKS5 has it: an address, or a name of at most 255 bytes."""
    endpoint = endpoint_of(Address(host, 0))
    if not endpoint:
        name = host.encode("ascii")
        return bytes([_NAME, len(name)]) + name
    kind = _IPV6 if endpoint.family == socket.AF_INET6 else _IPV4
    return bytes([kind]) + socket.inet_pton(endpoint.family, host)


def _log_in(stream: Stream, credentials: Credentials) -> None:
    user, password = credentials.user.encode(), credentials.password.encode()
    stream.write(bytes([_LOGIN_VERSION, len(user)]) + user + bytes([len(password)]) + password)
    version, status = _read(stream, 2)
    if version != _LOGIN_VERSION:
        raise ProxyError(f"answers the user and password with version {version}, not {_LOGIN_VERSION}")
    if status:
        raise ProxyError("rejects the user and password", "auth")


def _read_reply(stream: Stream, place: str) -> None:
    """Read the answer to a request, with the address that it ends in."""
    version, reply, _, kind = _read(stream, 4)
    if version != _VERSION:
        raise ProxyError(f"answers with version {version}, not {_VERSION}")
    if reply:  # the address behind it says nothing
        words = _REPLIES.get(reply, "refuses a connection to {0}").format(place)
        raise ProxyError(f"{words} (SOCKS5 reply {reply})", str(reply))
    if kind not in (*_SIZES, _NAME):
        raise ProxyError(f"answers with an address of unknown kind {kind}")
    size = _SIZES.get(kind) or _read(stream, 1)[0]
    _read(stream, size + 2)


def _read(stream: Stream, size: int) -> bytes:
    return recv_exactly(stream, size)
