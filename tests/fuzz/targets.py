"""The table of what is fuzzed, and the seeds of each."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.connections import (
    check_ancillary,
    check_datagram,
    check_frames,
    check_proof,
    check_sorting,
)
from tests.fuzz.handshakes import check_client_handshake, check_reader, check_server_handshake
from tests.fuzz.proxies import check_proxy_answer
from tests.fuzz.records import check_tls
from tests.fuzz.settings import check_setting, check_url
from tests.fuzz.signals import check_introduction, check_lines, check_opening, check_proxy_header, check_signal
from tests.fuzz.watching import check_manager, check_request, check_scrape

Check = Callable[[bytes], None]

TARGETS: dict[str, Check] = {
    "lines": check_lines,
    "signal": check_signal,
    "opening": check_opening,
    "introduction": check_introduction,
    "proxy-header": check_proxy_header,
    "proxy-answer": check_proxy_answer,
    "reader": check_reader,
    "server-handshake": check_server_handshake,
    "client-handshake": check_client_handshake,
    "sorting": check_sorting,
    "proof": check_proof,
    "frames": check_frames,
    "datagram": check_datagram,
    "ancillary": check_ancillary,
    "tls": check_tls,
    "url": check_url,
    "setting": check_setting,
    "request": check_request,
    "scrape": check_scrape,
    "manager": check_manager,
}

SEEDS = Path(__file__).parent / "seeds"


def seeds(name: str) -> list[bytes]:
    """The inputs that are kept for a target, one bytes literal a line; inputs that once failed are among them."""
    lines = (SEEDS / f"{name}.txt").read_text(encoding="ascii").splitlines()
    return [ast.literal_eval(line) for line in lines if line and not line.startswith("#")]
