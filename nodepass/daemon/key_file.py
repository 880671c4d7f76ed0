"""Where the tunnels' keys come from: files, the environment, or systemd's credentials, and never the command line.

A process has no key, one secret for all its tunnels (TUNNEL_KEY, TUNNEL_KEY_FILE), or a file with a line for each
(TUNNEL_KEYS_FILE); a tunnel whose URL has tunnel_key_file has that file's, whatever its process has. `cli` and `check`
make `Keys` once at the start, and `daemon` lets it read the keys file again at SIGHUP. `wire.auth.Key` is derived from
a secret and a tunnel's name; the secret itself leaves this module only towards it, and no error or warning repeats a
part of one.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from nodepass.config.files import FileState, read_secret, state_of
from nodepass.config.urls import NAME, NAMELESS, TunnelURL
from nodepass.errors import ConfigError, Notice

if TYPE_CHECKING:
    from nodepass.wire.auth import Key

CREDENTIAL, CREDENTIALS = "tunnel-key", "tunnel-keys"  # systemd's, of one key and of a file of keys
SHORTEST = 22  # characters: 128 bits, if each of them is random in base64
FEWEST = 10  # different characters; fewer are a pattern
MOST_LINES = 4096  # of a keys file
LARGEST = 1 << 20  # bytes of a file
_GENERATED = 32  # random bytes
_MARK = "\ufeff"  # of the byte order, as the variable has it that a shell read from a file


def generate() -> str:
    """A new key: 256 random bits as 43 characters of base64url."""
    return _encode(os.urandom(_GENERATED))


class Keys:
    """The secrets of the tunnels of this process."""

    def __init__(self, common: str = "", by_name: Mapping[str, tuple[str, ...]] | None = None, place: str = "") -> None:
        self.place = place  # where they come from, for a user; "" without any
        self.notices: list[Notice] = []
        self._common = common
        self._by_name = by_name
        self._file = self._credentials = ""  # of a keys file
        self._used: set[str] = set()  # names that have been asked for
        self._derived: dict[tuple[str, str], Key] = {}  # by secret and name
        self._unprovable: Key | None = None  # of tunnels whose line is gone
        self._own: dict[str, Keys] = {}  # of tunnels whose URL names a file, by that

    @classmethod
    def find(cls, key_file: str | None, keys_file: str | None, environ: Mapping[str, str]) -> Keys:
        """What TUNNEL_KEY_FILE, TUNNEL_KEYS_FILE and the environment say.

        Raises ConfigError naming the place and the line, never a secret.
        """
        named = {"TUNNEL_KEY": environ.get("TUNNEL_KEY"), "TUNNEL_KEY_FILE": key_file, "TUNNEL_KEYS_FILE": keys_file}
        given = [name for name, value in named.items() if value is not None]
        for name in given:
            if not (named[name] or "").strip():
                what = "key" if name == "TUNNEL_KEY" else "path"
                raise ConfigError(f"{name}: the {what} is empty; allowed: one, or no such variable")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are set together; allowed: one of them")
        folder = environ.get("CREDENTIALS_DIRECTORY", "")
        if folder and not given:
            key_file, keys_file = (_credential(folder, name) for name in (CREDENTIAL, CREDENTIALS))
            if key_file and keys_file:
                raise ConfigError(f"credentials {CREDENTIAL} and {CREDENTIALS} are both passed; allowed: one of them")
        notices: list[Notice] = []
        keys = cls()
        if keys_file is not None:
            place = f"TUNNEL_KEYS_FILE={keys_file}"
            text = _read(keys_file, place, folder, notices)
            keys = cls(by_name=_parse_lines(text, place, notices), place=place)
            keys._file = keys_file
        elif key_file is not None:
            place = f"TUNNEL_KEY_FILE={key_file}"
            keys = cls(_parse_one(_read(key_file, place, folder, notices), place, notices), place=place)
        elif (secret := named["TUNNEL_KEY"]) is not None:
            keys = cls(_parse_one(secret, "TUNNEL_KEY", notices), place="TUNNEL_KEY")
        keys.notices, keys._credentials = notices, folder
        return keys

    def of(self, url: TunnelURL) -> Keys:
        """The keys of a tunnel: those of the file in its URL, which is read once, or else these. Raises ConfigError."""
        file = url.tunnel_key_file
        if not file:
            return self
        if file not in self._own:
            place, notices = f"{url.name}: tunnel_key_file={file}", list[Notice]()
            secret = _parse_one(_read(file, place, self._credentials, notices), place, notices)
            self._own[file] = own = Keys(secret, place=place)
            own.notices = notices
            self.notices += notices
        return self._own[file]

    def __repr__(self) -> str:
        return f"<Keys {self.place}>"

    @property
    def names(self) -> tuple[str, ...] | None:
        """The tunnels that the keys file names, or None without one."""
        return None if self._by_name is None else tuple(self._by_name)

    def secrets(self, name: str) -> tuple[str, ...]:
        """The secrets of the tunnel of this name: several while they are rotated, none where it has no key."""
        if self._by_name is not None:
            return self._by_name.get(name, ())
        return (self._common,) if self._common else ()

    def has(self, name: str) -> bool:
        """Whether the tunnel of this name needs a key: with a keys file each does, even one that is not in it."""
        return self._by_name is not None or bool(self.secrets(name))

    def keys_for(self, name: str) -> tuple[Key, ...]:
        """The keys of the tunnel of this name. Each takes tens of milliseconds when it is asked for first.

        None at all where the tunnel needs no key; one that no peer can prove where its line is gone from the keys file.
        """
        if not self.has(name):
            return ()
        from nodepass.wire.auth import unknown_key

        self._used.add(name)
        self._unprovable = self._unprovable or unknown_key()
        return self._derive(name, self.secrets(name), self._derived) or (self._unprovable,)

    def reload(self) -> bool:
        """Read the keys file again, if there is one; whether it has changed.

        Raises ConfigError where it cannot be used, and keeps the keys. Derives new keys of tunnels in use, which takes
        tens of milliseconds each: to be called in a thread.
        """
        if not self._file:
            return False
        fresh = Keys.find(None, self._file, {"CREDENTIALS_DIRECTORY": self._credentials})
        known = dict(self._derived)
        for name in tuple(self._used):
            self._derive(name, fresh.secrets(name), known)
        changed = fresh._by_name != self._by_name
        self._by_name, self.notices = fresh._by_name, fresh.notices
        self._derived = {each: key for each, key in known.items() if each[0] in fresh.secrets(each[1])}
        return changed

    @property
    def file_state(self) -> FileState:
        """Another one where the keys file has changed in any way."""
        return state_of(self._file)

    def try_reload(self) -> bool | ConfigError:
        """`reload`, with its error as a result: in gevent's threads an exception is printed."""
        try:
            return self.reload()
        except ConfigError as error:
            return error

    @staticmethod
    def _derive(name: str, secrets: Sequence[str], known: dict[tuple[str, str], Key]) -> tuple[Key, ...]:
        """The keys of these secrets; new ones are added to those that are known."""
        from nodepass.wire.auth import Key

        for secret in secrets:
            if (secret, name) not in known:
                known[secret, name] = Key(secret, name)
        return tuple(known[secret, name] for secret in secrets)


def _credential(folder: str, name: str) -> str | None:
    path = os.path.join(folder, name)
    return path if os.path.exists(path) else None


def _read(file: str, place: str, credentials: str, notices: list[Notice]) -> str:
    """The text of a file that others may not write; a notice where they may read it."""
    text, warning = read_secret(file, place, LARGEST, credentials)
    if warning:
        notices.append(Notice("key_readable", warning))
    return text


def _parse_one(text: str, place: str, notices: list[Notice]) -> str:
    """The secret that is the whole text."""
    secret = text.removeprefix(_MARK).strip()
    if len(secret.splitlines()) > 1:
        raise ConfigError(f"{place}: more than one line; allowed: one key (a line a tunnel: TUNNEL_KEYS_FILE)")
    return _judge(secret, place, notices)


def _parse_lines(text: str, file: str, notices: list[Notice]) -> dict[str, tuple[str, ...]]:
    """The secrets of a keys file, by the tunnels' names."""
    found: dict[str, tuple[str, ...]] = {}
    for place, line in _lines(text, file):
        name, *rest = line.split(maxsplit=1)
        if name != NAMELESS and not NAME.fullmatch(name):
            allowed = f"at most 64 of A-Z a-z 0-9 . _ -, or {NAMELESS} for no name"
            raise ConfigError(f"{place}: the name is not usable; allowed: {allowed}")
        if not rest:
            raise ConfigError(f"{place}: the key is missing; allowed: a name, blanks, and a key")
        secret, key = _judge(rest[0], place, notices), "" if name == NAMELESS else name
        if secret in found.get(key, ()):
            raise ConfigError(f"{place}: the same name and key as in a line before; allowed: once")
        found[key] = (*found.get(key, ()), secret)
    return found


def _lines(text: str, place: str) -> Iterator[tuple[str, str]]:
    """Each line that is not empty, without its comment, and where it stands. A `#` behind a blank begins a comment."""
    lines = re.split(r"\r\n|\n|\r", text.rstrip("\r\n"))
    if len(lines) > MOST_LINES:
        raise ConfigError(f"{place}: more than {MOST_LINES} lines; allowed: at most as many")
    for number, line in enumerate(lines, 1):
        if content := re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip():
            yield f"{place}, line {number}", content


def _judge(secret: str, place: str, notices: list[Notice]) -> str:
    """The secret, unless it can be guessed; a notice where it was not generated. Raises ConfigError."""
    try:
        secret.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{place}: not UTF-8 text") from None
    if not secret:
        raise ConfigError(f"{place}: the key is empty; allowed: the output of nodepass --generate-key")
    if len(secret) < SHORTEST or len(set(secret)) < FEWEST:
        raise ConfigError(
            f"{place}: the key has under {SHORTEST} characters or under {FEWEST} different ones and can be guessed;"
            " allowed: the output of nodepass --generate-key"
        )
    if not _is_generated(secret):
        words = (
            f"{place}: the key is not the output of nodepass --generate-key; a server that a client once connected to,"
            " or a man in the middle, can test guesses of it offline"
        )
        notices.append(Notice("key_not_generated", words))
    return secret


def _is_generated(secret: str) -> bool:
    """Whether `generate` could have made it."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{43}", secret, re.ASCII):
        return False
    return _encode(base64.urlsafe_b64decode(f"{secret}=")) == secret


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
