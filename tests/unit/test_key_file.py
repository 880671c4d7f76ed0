"""Where keys come from, which are refused or warned of, and who may read and write their files."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from urllib.parse import quote

import pytest

from nodepass.config.urls import parse_url
from nodepass.daemon import key_file
from nodepass.daemon.key_file import LARGEST, MOST_LINES, Keys, generate
from nodepass.errors import ConfigError
from tests.support.table import each_row

PHRASE = "correct horse battery staple"


def write(path: Path, content: str | bytes, mode: int = 0o600) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return str(path)


def reasons(keys: Keys) -> list[str]:
    return [notice.reason for notice in keys.notices]


def refusal(*arguments: str | None, **environ: str) -> str:
    """The line with which these keys are refused."""
    with pytest.raises(ConfigError) as caught:
        Keys.find(*arguments, environ)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_generated_key_has_43_characters_of_base64url_and_is_fresh() -> None:
    keys = {generate() for _ in range(20)}
    assert len(keys) == 20
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{43}", each) for each in keys)


def test_without_a_key_no_tunnel_has_one(tmp_path: Path) -> None:
    for environ in ({}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}):
        keys = Keys.find(None, None, environ)
        assert (keys.secrets("web"), keys.has(""), keys.keys_for(""), keys.place) == ((), False, (), "")
        assert not keys.notices


def test_one_key_is_that_of_every_tunnel_wherever_it_comes_from(tmp_path: Path) -> None:
    secret = generate()
    file = write(tmp_path / "tunnel-key", f"  {secret}\r\n")
    for keys in (
        Keys.find(None, None, {"TUNNEL_KEY": secret}),
        Keys.find(file, None, {}),
        Keys.find(None, None, {"CREDENTIALS_DIRECTORY": str(tmp_path)}),
    ):
        assert keys.secrets("web") == keys.secrets("") == (secret,)
        assert keys.has("web")
        assert not keys.notices
        assert secret not in repr(keys) + keys.place


def test_a_keys_file_has_a_line_for_each_tunnel(tmp_path: Path) -> None:
    web, new, nameless = generate(), generate(), generate()
    lines = ("# of the tunnels", "", f"web \t {web}  # Monday's", f"  web {new}", f"-  {nameless}", f"a.B_0-9 {PHRASE}")
    file = write(tmp_path / "tunnel-keys", "\n".join(lines))
    for keys in (Keys.find(None, file, {}), Keys.find(None, None, {"CREDENTIALS_DIRECTORY": str(tmp_path)})):
        assert keys.names == ("web", "", "a.B_0-9")
        assert keys.secrets("web") == (web, new)
        assert (keys.secrets(""), keys.secrets("a.B_0-9"), keys.secrets("other")) == ((nameless,), (PHRASE,), ())
        (notice,) = keys.notices
        assert (notice.reason, notice.words[: len(keys.place) + 8]) == ("key_not_generated", f"{keys.place}, line 6")
        assert "horse" not in notice.words


def test_a_tunnel_that_a_keys_file_lacks_is_never_taken_for_one_without_a_key(tmp_path: Path) -> None:
    assert Keys.find(None, write(tmp_path / "keys", f"web {generate()}"), {}).has("other")


def test_a_key_is_derived_once_for_each_name() -> None:
    keys = Keys.find(None, None, {"TUNNEL_KEY": generate()})
    (web,), (again,), (other,) = keys.keys_for("web"), keys.keys_for("web"), keys.keys_for("")
    assert web is again
    assert web is not other


def test_a_changed_keys_file_is_read_again_and_its_old_keys_stay_what_they_are(tmp_path: Path) -> None:
    web, new, ssh = generate(), generate(), generate()
    keys = Keys.find(None, write(tmp_path / "keys", f"web {web}\nssh {ssh}"), {})
    before = {name: keys.keys_for(name) for name in ("web", "ssh")}
    assert not keys.reload()
    write(tmp_path / "keys", f"web {new}\nweb {web}")
    assert keys.reload()
    assert keys.secrets("web") == (new, web)
    assert keys.keys_for("web")[1] is before["web"][0]
    (unprovable,) = keys.keys_for("ssh")
    assert unprovable != before["ssh"][0]


def test_a_keys_file_that_became_unusable_changes_nothing(tmp_path: Path) -> None:
    secret = generate()
    keys = Keys.find(None, write(tmp_path / "keys", f"web {secret}"), {})
    write(tmp_path / "keys", "web short")
    assert isinstance(keys.try_reload(), ConfigError)
    assert keys.secrets("web") == (secret,)


def test_one_key_for_all_is_not_read_again(tmp_path: Path) -> None:
    keys = Keys.find(write(tmp_path / "key", secret := generate()), None, {})
    write(tmp_path / "key", generate())
    assert not keys.reload()
    assert keys.secrets("") == (secret,)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("web", "the key is missing"),
        ("w/b KEY", "the name is not usable"),
        ("ü KEY", "the name is not usable"),
        (f"{65 * 'w'} KEY", "the name is not usable"),
        ("web short", "under 22 characters"),
        ("KEY web", "under 22 characters"),
        ("web KEY\nweb KEY", "the same name and key"),
        ("web #KEY", "the key is missing"),
    ],
)
def test_a_bad_line_of_a_keys_file_is_named_by_its_number_and_not_repeated(
    tmp_path: Path, line: str, said: str
) -> None:
    secret = generate()
    file = write(tmp_path / "keys", "# comment\n" + line.replace("KEY", secret))
    text = refusal(None, file)
    assert text.startswith(f"TUNNEL_KEYS_FILE={file}, line {2 + line.count(chr(10))}: ")
    assert said in text
    assert secret not in text
    assert "short" not in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the key is empty"),
        (b" \n", "the key is empty"),
        (b"\xff\xfe", "the key is empty"),
        (b"\xff", "not UTF-8"),
        (b"\xff\xfeodd", "not UTF-8"),
        (b"21-characters-are-few", "under 22 characters"),
        (b"123456789123456789123456789", "under 10 different ones"),
        (b"x" * 64, "under 10 different ones"),
        (f"{PHRASE}\n{PHRASE}".encode(), "more than one line"),
        (b"k" * (LARGEST + 1), f"longer than {LARGEST} bytes"),
    ],
)
def test_a_file_without_a_usable_key_is_refused_and_never_taken_for_no_key(
    tmp_path: Path, content: bytes, said: str
) -> None:
    text = refusal(write(tmp_path / "key", content), None)
    assert said in text
    assert "characters-are" not in text
    if len(content) < LARGEST and b"\xff" not in content and b"\n" not in content.strip():
        assert said in refusal(None, None, TUNNEL_KEY=content.decode())


def test_an_endless_keys_file_is_refused(tmp_path: Path) -> None:
    Keys.find(None, write(tmp_path / "keys", MOST_LINES * "#\n"), {})
    assert f"more than {MOST_LINES} lines" in refusal(None, write(tmp_path / "keys", MOST_LINES * "#\n" + "#"))


@pytest.mark.parametrize("place", ["TUNNEL_KEY_FILE", "TUNNEL_KEYS_FILE"])
def test_a_missing_file_is_refused_by_name(place: str) -> None:
    files = ("/no/such/file", None) if place == "TUNNEL_KEY_FILE" else (None, "/no/such/file")
    assert f"{place}=/no/such/file: cannot be read" in refusal(*files)


def test_keys_from_two_places_are_refused(tmp_path: Path) -> None:
    assert refusal("a", None, TUNNEL_KEY="b").startswith("TUNNEL_KEY and TUNNEL_KEY_FILE are set together")
    assert refusal(None, "a", TUNNEL_KEY="b").startswith("TUNNEL_KEY and TUNNEL_KEYS_FILE are set together")
    assert refusal("a", "b").startswith("TUNNEL_KEY_FILE and TUNNEL_KEYS_FILE are set together")
    for name in (key_file.CREDENTIAL, key_file.CREDENTIALS):
        write(tmp_path / name, generate())
    assert "credentials tunnel-key and tunnel-keys" in refusal(None, None, CREDENTIALS_DIRECTORY=str(tmp_path))


@each_row("secret", [PHRASE, 4 * "0123456789abcdef", "abcdefghijklmnopqrstuv", "ßabcdefghijklmnopqrstuv"])
def test_what_generate_key_did_not_print_is_warned_of(secret: str) -> None:
    keys = Keys.find(None, None, {"TUNNEL_KEY": secret})
    assert keys.secrets("") == (secret,)
    assert reasons(keys) == ["key_not_generated"]
    assert secret not in keys.notices[0].words


def test_a_last_character_that_generate_key_never_prints_is_noticed() -> None:
    """43 characters of base64 hold 258 bits, a key has 256."""
    secret = generate()[:-1] + "B"
    assert reasons(Keys.find(None, None, {"TUNNEL_KEY": secret})) == ["key_not_generated"]


@pytest.mark.parametrize(("mode", "expected"), [(0o600, []), (0o400, []), (0o640, ["r"]), (0o604, ["r"]), (0o711, [])])
def test_a_key_file_that_others_may_read_is_warned_of(tmp_path: Path, mode: int, expected: list[str]) -> None:
    for keys in (
        Keys.find(write(tmp_path / "key", generate(), mode), None, {}),
        Keys.find(None, write(tmp_path / "keys", f"web {generate()}", mode), {}),
    ):
        assert reasons(keys) == ["key_readable" for _ in expected]
        assert not expected or keys.notices[0].words.startswith(f"{keys.place}: ")


@pytest.mark.parametrize(
    ("mode", "owner", "group", "expected"),
    [
        (0o440, 0, 65532, []),
        (0o444, 0, 65532, ["key_readable"]),
        (0o440, 0, 4, ["key_readable"]),
        (0o440, 65532, 65532, ["key_readable"]),
    ],
)
def test_a_file_of_roots_for_the_group_of_the_process_is_not_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, owner: int, group: int, expected: list[str]
) -> None:
    """As Kubernetes mounts a secret for a user that is not root, with fsGroup."""
    file = write(tmp_path / "key", generate())
    monkeypatch.setattr(os, "geteuid", lambda: 65532)
    monkeypatch.setattr(os, "getegid", lambda: 65532)
    monkeypatch.setattr(os, "fstat", lambda _: os.stat_result((stat.S_IFREG | mode, 0, 0, 1, owner, group, 0, 0, 0, 0)))
    assert reasons(Keys.find(file, None, {})) == expected


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_key_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    """The file itself counts, not a link to it."""
    file = write(tmp_path / "key", generate(), mode)
    (tmp_path / "link").symlink_to(file)
    for path in (file, str(tmp_path / "link")):
        assert f"TUNNEL_KEY_FILE={path}: mode {mode:04o}, so others can change it" in refusal(path, None)


def test_a_key_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "key", generate())
    owner = os.stat(file).st_uid
    if owner:  # the superuser's files are everybody's
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    else:
        try:
            os.chown(file, 12345, -1)
        except PermissionError:
            pytest.skip("the superuser of this namespace has no other users")
        owner = 12345
    assert f"owned by user {owner}, who can change it" in refusal(file, None)


def test_systemds_credentials_are_not_warned_of(tmp_path: Path) -> None:
    """Their mode shows the entry of an ACL for the service's user as one for the group."""
    file = write(tmp_path / "tunnel-key", generate(), 0o440)
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert not Keys.find(None, None, environ).notices
    assert not Keys.find(file, None, environ).notices
    assert reasons(Keys.find(file, None, {})) == ["key_readable"]


def test_a_file_in_a_url_is_for_that_tunnel_and_wins_over_the_keys_of_the_process(tmp_path: Path) -> None:
    common, own = generate(), PHRASE
    file = write(tmp_path / "own key", own)
    web, ssh = (parse_url(f"server://:1/:2?name={name}") for name in ("web", f"ssh&tunnel_key_file={quote(file)}"))
    keys_file = write(tmp_path / "keys", f"web {common}")
    for keys in (Keys.find(None, None, {"TUNNEL_KEY": common}), Keys.find(None, keys_file, {}), Keys()):
        assert keys.of(web) is keys
        assert keys.of(ssh).secrets("ssh") == (own,)
        assert keys.of(ssh) is keys.of(ssh), "the file is read once"
        assert reasons(keys) == reasons(keys.of(ssh)) == ["key_not_generated"]


def test_a_file_in_a_url_that_is_not_usable_is_refused_with_the_tunnel() -> None:
    with pytest.raises(ConfigError, match=r"^server:1/web: tunnel_key_file=/none: cannot be read: No such file"):
        Keys().of(parse_url("server://:1/:2?name=web&tunnel_key_file=/none"))
