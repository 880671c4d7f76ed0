"""Where the shared key comes from: a file, the environment, or systemd's credentials, and never the command line.

`cli` and `check` read it once at the start. The text leaves this module as it is; `wire.auth.Key` derives from it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping

from nodepass.config import Notice
from nodepass.errors import ConfigError

SHORTEST = 16  # characters; a shorter key can be guessed
CREDENTIAL = "tunnel-key"


def generate() -> str:
    """A new key: 256 random bits as 64 hex digits."""
    return os.urandom(32).hex()


def find_secret(file: str | None, environ: Mapping[str, str]) -> tuple[str | None, list[Notice]]:
    """The key's text, if there is one, and warnings. Raises ConfigError naming its place, never the key."""
    text = environ.get("TUNNEL_KEY")
    if file is not None and text is not None:
        raise ConfigError("TUNNEL_KEY and TUNNEL_KEY_FILE are both set; allowed: one of them")
    warnings: list[Notice] = []
    place = "TUNNEL_KEY"
    if file is None and text is None and (folder := environ.get("CREDENTIALS_DIRECTORY")):
        credential = os.path.join(folder, CREDENTIAL)
        file = credential if os.path.exists(credential) else None
    if file is not None:
        place = f"TUNNEL_KEY_FILE={file}"
        text = _read(file, place, warnings)
    if text is None:
        return None, warnings
    secret = text.strip()
    try:
        secret.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{place}: not UTF-8 text") from None
    if not secret:
        raise ConfigError(
            f"{place}: the key is empty; allowed: a text, preferably the output of nodepass --generate-key"
        )
    if len(secret) < SHORTEST:
        words = f"{place}: the key has fewer than {SHORTEST} characters and can be guessed"
        warnings.append(Notice("key_short", words))
    return secret, warnings


def _read(file: str, place: str, warnings: list[Notice]) -> str:
    try:
        with open(file, encoding="utf-8") as opened:
            if os.fstat(opened.fileno()).st_mode & stat.S_IROTH:
                warnings.append(Notice("key_readable", f"{place}: readable by others; run chmod 600 {file}"))
            return opened.read()
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{place}: not UTF-8 text") from None
