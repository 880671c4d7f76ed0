"""Files that an operator writes: certificates, keys and lists of keys, whichever editor and system they come from.

What a file means is the business of `tls`, of `visitors.rules`, of `config.outbound` and of the daemon's `key_file`;
here is only whether it has changed, which users can change or read a secret one, and its text without what Windows
adds. Nothing of OpenSSL is imported, because a process without TLS reads keys, too.
"""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Mapping

from nodepass.errors import ConfigError, reason

CA_VARIABLE = "SSL_CERT_FILE"  # names the file of CAs instead of the system's
RETRY = 2.0  # seconds between two looks at a file that could not be used
FileState = tuple[int, ...]  # equal as long as nothing about the file has changed; empty where it cannot be found

_MAY_READ, _MAY_WRITE = 0o044, 0o022  # group and others
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


def read_secret(file: str, place: str, largest: int, credentials: str) -> tuple[str, str]:
    """The text of a file that no other user may write, and a warning where group or others may read it.

    `credentials`: the directory of those that systemd has passed, if it has. Raises ConfigError.
    """
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            content = opened.read(largest + 1)
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{place}: cannot be read: not a path") from None
    _judge_access(status, file, place)
    text, warning = as_text(content, place, largest), ""
    # systemd lets in the service's user by an ACL, shown as a group.
    is_systemds = credentials and os.path.dirname(os.path.realpath(file)) == os.path.realpath(credentials)
    if _is_readable_by_others(status) and not is_systemds:
        warning = f"{place}: readable by group or others; run chmod 600 {file}"
    return text, warning


def _is_readable_by_others(status: os.stat_result) -> bool:
    """Whether the mode lets more than the owner and this process read it.

    A file of root's for the group of a process that is not root's cannot have less: Kubernetes mounts secrets so.
    """
    is_for_us = status.st_uid == 0 and os.geteuid() != 0 and status.st_gid == os.getegid()
    return bool(status.st_mode & _MAY_READ & ~(stat.S_IRGRP if is_for_us else 0))


def _judge_access(status: os.stat_result, file: str, place: str) -> None:
    """Raise ConfigError where another user could replace the secret."""
    if status.st_uid not in (0, os.geteuid()):
        allowed = f"root or the user that runs nodepass ({os.geteuid()})"
        raise ConfigError(f"{place}: owned by user {status.st_uid}, who can change it; allowed as owner: {allowed}")
    if status.st_mode & _MAY_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        raise ConfigError(f"{place}: mode {mode:04o}, so others can change it; allowed: run chmod 600 {file}")
