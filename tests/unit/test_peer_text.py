"""What a peer sends is in an error's text escaped, and not longer than is worth reading."""

from __future__ import annotations

from collections.abc import Callable

from nodepass.errors import ProtocolError
from nodepass.tls.verify import shown_names
from nodepass.wire.negotiation import parse_auth, parse_first, parse_opening
from nodepass.wire.signals import parse_id, parse_signal, parse_v1_signal
from tests.support.table import each_row

PARSERS: tuple[Callable[[bytes], object], ...] = (
    parse_first,
    parse_auth,
    parse_opening,
    parse_signal,
    parse_v1_signal,
    parse_id,
)
ODD = ("\x1b[31m\r\n", "\u202e", "\u2028", "\x9b", "'\"\\", "x")
FORMS = ("{}", "//{}", "//{}?v=2&nonce={}", "//error?reason={}", "//bye?reason={}", "//hello?v=2&nonce={}#{}")
LONGEST = 350  # characters


@each_row("parse", PARSERS)
def test_an_error_about_a_line_is_printable_and_short(parse: Callable[[bytes], object]) -> None:
    texts = []
    for form in FORMS:
        for odd in ODD:
            try:
                parse(form.replace("{}", 500 * odd).encode())
            except ProtocolError as error:
                texts.append(str(error))
    assert len(texts) >= len(ODD)
    assert not [text for text in texts if not text.isprintable() or len(text) > LONGEST]


def test_the_names_in_a_certificate_are_printable_and_few() -> None:
    shown = shown_names([500 * odd for odd in ODD] * 100)
    assert shown.isprintable()
    assert shown.isascii()
    assert len(shown) < 10_000
    assert shown.endswith("and 595 more")
