"""Errors, as types.

Everything raised on purpose is a `NodepassError`. What ends one connection is an `OSError` too, so that the code around
a connection needs one `except OSError` for the errors of the kernel, of TLS and of this program.
"""

from typing import NamedTuple


class NodepassError(Exception):
    """Base of the errors that this program raises on purpose; its text is one line for the user."""


class ConfigError(NodepassError):
    """A setting, a URL or a certificate file is not usable: the process exits with status 2."""


class Notice(NamedTuple):
    """A warning for the user, as a token and in words."""

    reason: str
    words: str


class ListenError(NodepassError):
    """An address cannot be listened on: the process exits with status 1 when this happens at start.

    `errno`: the kernel's reason, None where it was not the kernel's. `host`, which may be empty, `port` and `kind`
    (SOCK_STREAM, SOCK_DGRAM) say where; port 0 stands for no address of the network.
    """

    def __init__(self, text: str, errno: int | None = None, *, host: str = "", port: int = 0, kind: int = 0) -> None:
        super().__init__(text)
        self.errno = errno
        self.host = host
        self.port = port
        self.kind = kind


class StartError(NodepassError):
    """No server within START_TIMEOUT, or traffic that another process counts: the process exits with status 1."""


class ProtocolError(NodepassError, ConnectionError):
    """The peer sent bytes that the wire does not allow."""


class OtherProtocolError(ProtocolError):
    """The peer speaks another protocol; `protocol` is its name, where it is known."""

    def __init__(self, protocol: str, words: str) -> None:
        super().__init__(words)
        self.protocol = protocol


class ProxyHeaderError(ProtocolError):
    """A proxy's connection or datagram has no usable header; `reason` is header_late, _malformed or _missing."""

    def __init__(self, reason: str, words: str) -> None:
        super().__init__(words)
        self.reason = reason


class ProxyError(NodepassError, ConnectionError):
    """No connection through a proxy. `code` tells causes apart: a status of HTTP, a reply of SOCKS5, a token, or ""."""

    def __init__(self, words: str, code: str = "") -> None:
        super().__init__(words)
        self.code = code


class ClosedError(NodepassError, ConnectionError):
    """The peer closed the connection in good order."""


class TLSError(NodepassError, ConnectionError):
    """A TLS handshake or record failed."""


class CertificateRefusedError(TLSError):
    """The client refused the server's certificate, as its alert says."""


class ClearAnswer(NodepassError, ConnectionError):
    """The server answered a ClientHello with a line in the clear, which the caller can read from the same socket."""


class VerificationError(TLSError):
    """The server's certificate was rejected; `check` is what failed: chain, expired or name."""

    def __init__(self, text: str, check: str = "") -> None:
        super().__init__(text)
        self.check = check


class NoDataConnection(NodepassError, ConnectionError):
    """No data connection was available in time."""


class NoTarget(NoDataConnection):
    """The client has said that it can serve no such session; `reason` is a token for the log."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class ExpiredError(NodepassError, TimeoutError):
    """A timeout of a session has passed; `outcome` is one of `stats.TCP_OUTCOMES`."""

    def __init__(self, outcome: str, words: str) -> None:
        super().__init__(words)
        self.outcome = outcome


class RefusedError(NodepassError, ConnectionError):
    """The handshake was refused; `reason` is the wire's token, the text is for people."""

    def __init__(self, reason: str, words: str = "") -> None:
        super().__init__(words or f"rejected by the server: {reason}")
        self.reason = reason


def reason(error: BaseException) -> str:
    """The short words of an error, for the end of a log line."""
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return str(error) or type(error).__name__


def with_words(error: Exception, words: str) -> OSError:
    """The same error in words that say where it happened; its errno, and so its type, are kept."""
    number = error.errno if isinstance(error, OSError) else None
    return OSError(words) if number is None else OSError(number, words)
