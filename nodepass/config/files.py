"""Files that an operator writes: certificates, keys and lists of keys, whichever editor and system they come from.

What a file means is the business of `tls`, of `visitors.rules` and of the daemon's `key_file`; here is only whether it
has changed, and its text without what Windows adds. Nothing of OpenSSL is imported, because a process without TLS reads
keys, too.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping

from nodepass.errors import ConfigError, reason

CA_VARIABLE = "SSL_CERT_FILE"  # names the file of CAs instead of the system's
RETRY = 2.0  # seconds between two looks at a file that could not be used
FileState = tuple[int, ...]  # equal as long as nothing about the file has changed; empty where it cannot be found

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def state_of(path: str) -> FileState:
    """What changes when a file is written, replaced, or given another mode or owner."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    return (
        *(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns),
        *(status.st_mode, status.st_uid, status.st_gid),
    )


def find_ca_trouble(environ: Mapping[str, str]) -> str:
    """Why SSL_CERT_FILE holds no CA, so that no certificate is trusted; "" where it does, or is not set."""
    path = environ.get(CA_VARIABLE, "")
    if not path:
        return ""
    try:
        with open(path, "rb") as file:
            content = without_mark(file.read())
    except OSError as error:
        return f"{CA_VARIABLE}={path} cannot be read: {reason(error)}"
    except UnicodeDecodeError:
        content = b""
    return "" if b"-----BEGIN" in content else f"{CA_VARIABLE}={path} has no certificate in it; allowed: PEM"


def has_mark(content: bytes) -> bool:
    """Whether a text begins with a byte order mark."""
    return content.startswith((codecs.BOM_UTF8, *_UTF_16))


def without_mark(content: bytes) -> bytes:
    """A text in UTF-8 without a byte order mark; one in UTF-16 is known by its mark. Raises UnicodeDecodeError."""
    if content.startswith(_UTF_16):
        return content.decode("utf-16").encode()
    return content.removeprefix(codecs.BOM_UTF8)


def as_text(content: bytes, place: str, largest: int) -> str:
    """The text of a file of at most so many bytes, of which one more was read. Raises ConfigError."""
    if len(content) > largest:
        raise ConfigError(f"{place}: longer than {largest} bytes")
    try:
        return without_mark(content).decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{place}: not UTF-8 text") from None
