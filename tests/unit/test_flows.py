"""The table of UDP flows: how long a flow lives, and which one makes room for another."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nodepass.tunnel.flows import UNANSWERED_TIMEOUT, FlowTable


@dataclass(eq=False)
class Flow:
    key: int
    network: str = ""
    last: float = 0.0
    rank: int = 0


class Table:
    """A table, and what became of the flows that left."""

    def __init__(self, limit: int = 2, timeout: float = 60, share: int | None = None) -> None:
        self.ended: list[tuple[int, str]] = []
        self.table: FlowTable[Flow] = FlowTable(
            limit, timeout, lambda flow, how: self.ended.append((flow.key, how)), share
        )

    def begin(self, *keys: int, network: str = "") -> list[Flow]:
        flows = [Flow(key, network) for key in keys]
        for flow in flows:
            self.table.add(flow)
        return flows

    def converse(self, flow: Flow) -> None:
        self.table.count_answer(flow)
        assert self.table.find(flow.key) is flow


def test_the_longest_idle_flow_makes_room_for_a_new_one() -> None:
    table = Table()
    table.begin(1, 2)
    assert table.table.find(1)
    table.begin(3)
    assert table.ended == [(2, "evicted")]
    assert len(table.table) == 2


def test_where_most_flows_have_no_answer_one_of_them_makes_room() -> None:
    """A flood does not end what is answered."""
    table = Table(limit=4)
    conversation, answered, *_ = table.begin(1, 2, 3, 4)
    table.converse(conversation)
    table.table.count_answer(answered)
    table.begin(5)  # two of four are new: the answered one leaves
    assert table.ended == [(2, "evicted")]
    table.begin(6, 7)
    assert table.ended[1:] == [(3, "evicted"), (4, "evicted")]


def test_a_question_that_waits_for_its_answer_stays_where_others_have_had_theirs() -> None:
    table = Table(limit=4)
    conversation, *answered = table.begin(1, 2, 3)
    table.converse(conversation)
    for flow in answered:
        table.table.count_answer(flow)
    table.begin(4, 5)
    assert table.ended == [(2, "evicted")]


def test_conversations_make_room_last() -> None:
    table = Table(limit=2)
    for flow in table.begin(1, 2):
        table.converse(flow)
    table.begin(3, 4)
    assert table.ended == [(1, "evicted"), (3, "evicted")]


def test_an_answer_to_a_conversation_keeps_it_one() -> None:
    table = Table()
    conversation, _ = table.begin(1, 2)
    table.converse(conversation)
    table.table.count_answer(conversation)
    table.begin(3, 4, 5)
    assert [key for key, _ in table.ended] == [2, 3, 4]


def test_a_network_with_its_share_of_the_table_evicts_its_own_flows() -> None:
    table = Table(limit=8, share=2)
    [other] = table.begin(1, network="other")
    first, _ = table.begin(2, 3, network="flood")
    table.converse(first)
    table.begin(4, 5, network="flood")
    assert table.ended == [(3, "evicted"), (4, "evicted")]
    assert table.table.find(other.key) is other


def test_a_network_may_come_back_after_its_last_flow() -> None:
    table = Table(limit=1, share=1)
    table.begin(1, 2, network="alone")
    table.begin(3, network="other")
    assert table.ended == [(1, "evicted"), (2, "evicted")]
    assert [flow.key for flow in table.table] == [3]


@pytest.mark.parametrize(
    ("timeout", "unanswered"), [(60.0, UNANSWERED_TIMEOUT), (5.0, 5.0)], ids=["usual", "shorter timeout"]
)
def test_a_sweep_ends_the_flows_that_have_been_silent_for_too_long(timeout: float, unanswered: float) -> None:
    table = Table(limit=8, timeout=timeout)
    flows = table.begin(1, 2, 3, 4, 5, 6)
    for flow in flows[2:]:
        table.table.count_answer(flow)
    table.converse(flows[4])
    table.converse(flows[5])
    for over, limit in ((flows[0], unanswered), (flows[2], timeout), (flows[4], timeout)):
        over.last -= limit + 1
    for alive, limit in ((flows[1], unanswered), (flows[3], timeout), (flows[5], timeout)):
        alive.last -= limit - 1
    table.table.sweep()
    assert table.ended == [(1, "unanswered"), (3, "completed"), (5, "completed")]
    assert [flow.key for flow in table.table] == [2, 4, 6]


def test_the_flows_of_a_lost_lane_end_and_no_others() -> None:
    table = Table()
    table.begin(1, 2)
    table.table.end(lambda flow: flow.key == 1, "lost")
    assert table.ended == [(1, "lost")]
    assert table.table.find(1) is None
    assert table.table.find(2)
