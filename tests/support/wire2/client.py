"""A v2 client that runs by itself: it does what `V1Client` does, over the steps of a `ClientSide`, and serves lanes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.sockets import PATIENCE, Address
from tests.support.v1_client import V1Client
from tests.support.v1_stream import Stream
from tests.support.wire2.client_side import ClientSide, GoodbyeError
from tests.support.wire2.lane import Lane, TargetFlows
from tests.support.wire2.lines import Line
from tests.support.wire2.talk import Rejected, Talk, dial
from tests.support.workers import WorkerPool


class OwnedSide(ClientSide):
    """A client's side whose connections its workers close."""

    def __init__(self, workers: WorkerPool, address: Address, **given: Any) -> None:
        super().__init__(address, **given)
        self._workers = workers

    def connect_to(self, address: Address, source: str | None) -> Talk:
        talk = dial(address, source)
        self._workers.own(talk.sock)
        return talk


class V2Client(V1Client):
    """One client; a context manager."""

    def __init__(
        self,
        tunnel: Address,
        target: Address = ("127.0.0.1", 0),
        *,
        secret: str = "",
        name: str = "",
        demand: int = 0,
        wants: bool = False,
        cafile: Path | None = None,
        server_name: str = "127.0.0.1",
        pool: int = 8,
        flow_timeout: float = 5.0,
    ) -> None:
        """flow_timeout: seconds without traffic after which a flow ends."""
        super().__init__(tunnel, target, cafile=cafile, server_name=server_name, pool=pool)
        self.side = OwnedSide(
            self.workers,
            tunnel,
            secret=secret,
            name=name,
            demand=demand,
            wants=wants,
            cafile=cafile,
            server_name=server_name,
        )
        self._flow_timeout = flow_timeout
        self.launches: list[Line] = []
        self.rejections: list[str] = []
        self.goodbyes: list[str] = []

    def __enter__(self) -> V2Client:
        super().__enter__()
        return self

    def connect(self) -> None:
        """The whole negotiation."""
        try:
            self.side.begin()
            self._control = self.side.talk.sock
            self.side.negotiate()
        except Rejected as rejected:
            self.rejections.append(str(rejected))
            raise
        self._control.settimeout(None)
        self.tls = self.side.tls
        self.data_address = self.side.data_address
        self.connects += 1

    def next_launch(self) -> tuple[str, int]:
        """The id and the kind of the next launch; heartbeats are answered on the way."""
        try:
            line = self.side.hear_launch()
        except GoodbyeError as goodbye:
            self.goodbyes.append(str(goodbye))
            raise
        self.launches.append(line)
        return line.host, int(line.fragment)

    def open_data(self, timeout: float = PATIENCE) -> tuple[str, Stream]:  # noqa: ARG002  # the sides' own
        """Open one data connection; its id and the stream."""
        identity, talk = self.side.open_data()
        talk.sock.settimeout(None)
        return identity, talk

    def _flush(self) -> None:
        if hasattr(self.side, "talk"):
            self.side.talk.abort()
        self.close_idle()

    def _serve_datagram(self, stream: Stream) -> None:
        """Serve a lane: what a v1 client does for one datagram, a v2 client does for all."""
        TargetFlows(Lane(stream), self._target, self._flow_timeout, self.workers).run()
