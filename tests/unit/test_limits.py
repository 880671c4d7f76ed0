"""What the limits on open files and memory allow, from fake limits and cgroups."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodepass.config.settings import Settings
from nodepass.daemon import limits
from nodepass.tunnel.buffers import LEAST

SMALL = 64 << 20  # bytes


@pytest.mark.parametrize(("tls", "fitting"), [(False, 134), (True, 66)])
def test_more_sessions_than_fit_into_memory_are_warned_of(
    monkeypatch: pytest.MonkeyPatch, tls: bool, fitting: int
) -> None:
    memory = limits.Memory("cgroup", SMALL)
    monkeypatch.setattr(limits, "memory_limits", lambda: [memory])
    monkeypatch.setattr(limits, "raise_descriptor_limit", lambda: 1 << 20)
    assert not limits.survey([Settings(semaphore_limit=fitting)], tls).warnings
    survey = limits.survey([Settings(semaphore_limit=fitting + 1024)], tls)
    (warning,) = survey.warnings
    assert (warning.reason, warning.available, warning.semaphore_limit) == ("memory", SMALL, fitting)
    assert warning.needed == limits.MEMORY_OWN[tls] + (fitting + 1024) * limits.memory_per_session(memory, tls)
    assert survey.settings[0].semaphore_limit == fitting + 1024


@pytest.mark.parametrize("tls", [False, True])
def test_a_cgroup_pays_for_the_buffers_of_the_kernel_and_only_it(monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    monkeypatch.setattr(limits, "raise_descriptor_limit", lambda: 1 << 20)
    settings, size = [Settings(semaphore_limit=10)], 100 << 20
    for what in ("cgroup", "address space", "machine"):
        memory = limits.Memory(what, size)
        monkeypatch.setattr(limits, "memory_limits", lambda memory=memory: [memory])
        survey = limits.survey(settings, tls)
        least = LEAST if what == "cgroup" else 0
        assert survey.memory_sessions == (size - limits.MEMORY_OWN[tls]) // (limits.MEMORY_PER_SESSION[tls] + least)
        needed = limits.MEMORY_OWN[tls] + 10 * (limits.MEMORY_PER_SESSION[tls] + LEAST)
        assert survey.buffers == (size - needed if what == "cgroup" else None)
    monkeypatch.setattr(limits, "memory_limits", lambda: [limits.Memory("cgroup", 1 << 20)])
    assert limits.survey(settings, tls).buffers == 0


def test_settings_are_lowered_in_proportion_but_leave_a_pool() -> None:
    settings = Settings(semaphore_limit=1000, min_pool_capacity=64, max_pool_capacity=2000)
    assert limits.fit_descriptors([settings] * 2, 8000 + limits.OWN) == [settings] * 2
    for half in limits.fit_descriptors([settings] * 2, 4000 + limits.OWN):
        assert (half.semaphore_limit, half.min_pool_capacity, half.max_pool_capacity) == (500, 64, 1000)
    (many,) = limits.fit_descriptors([Settings(semaphore_limit=1_000_000)], 1000 + limits.OWN)
    assert (many.semaphore_limit, many.min_pool_capacity, many.max_pool_capacity) == (492, 16, 16)
    for least in limits.fit_descriptors([settings] * 2, 3):
        assert (least.semaphore_limit, least.min_pool_capacity, least.max_pool_capacity) == (1, 1, 1)


def test_each_tunnel_is_lowered_in_proportion_to_what_it_can_need() -> None:
    large = Settings(semaphore_limit=1000, min_pool_capacity=1, max_pool_capacity=2000)
    small = Settings(semaphore_limit=100, min_pool_capacity=1, max_pool_capacity=200)
    assert limits.fit_descriptors([large, small], 4400 + limits.OWN) == [large, small]
    fitting = limits.fit_descriptors([large, small], 2200 + limits.OWN)
    assert [(each.semaphore_limit, each.max_pool_capacity) for each in fitting] == [(499, 999), (50, 100)]


tunnel_settings = st.builds(
    lambda sessions, least, more: Settings(
        semaphore_limit=sessions, min_pool_capacity=least, max_pool_capacity=least + more
    ),
    st.integers(1, 1_000_000),
    st.integers(1, 1024),
    st.integers(0, 64_512),
)


@given(st.lists(tunnel_settings, min_size=1, max_size=50), st.integers(0, 1 << 20))
def test_lowered_settings_fit_are_usable_and_never_above_those_given(settings: list[Settings], files: int) -> None:
    fitting = limits.fit_descriptors(settings, files)
    assert limits._descriptors(fitting) <= max(files, len(settings) * limits.LEAST + limits.OWN)
    for mine, given_ in zip(fitting, settings, strict=True):
        assert 1 <= mine.semaphore_limit <= given_.semaphore_limit
        assert 1 <= mine.min_pool_capacity <= mine.max_pool_capacity <= given_.max_pool_capacity


def test_the_limits_of_tunnels_count_by_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "raise_descriptor_limit", lambda: 1000)
    monkeypatch.setattr(limits, "pending_limit", lambda: 100)
    monkeypatch.setattr(
        limits, "memory_limits", lambda: [limits.Memory("machine", limits.MEMORY_OWN[False] + (4 << 20))]
    )
    large, small = Settings(), Settings(semaphore_limit=64, max_pool_capacity=64)
    files, memory = limits.survey([large, small], False).warnings
    assert files.needed == 3 * 1024 + 3 * 64 + limits.OWN + 100
    assert "SEMAPHORE_LIMIT 1088 and MAX_POOL_CAPACITY 1088 (sums of 2 tunnels)" in files.words
    assert files.semaphore_limit == sum(each.semaphore_limit for each in limits.survey([large, small], False).settings)
    assert memory.semaphore_limit == 256
    assert f"SEMAPHORE_LIMIT {files.semaphore_limit} (sums of 2 tunnels)" in memory.words
    assert not limits.survey([replace(small, semaphore_limit=16)] * 2, False).warnings


def test_too_few_open_files_are_warned_of_with_what_was_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "raise_descriptor_limit", lambda: 1000)
    monkeypatch.setattr(limits, "pending_limit", lambda: 100)
    monkeypatch.setattr(limits, "memory_limits", list)
    survey = limits.survey([Settings()], False)
    (warning,) = survey.warnings
    assert (warning.reason, warning.needed, warning.available) == ("open_files", 3 * 1024 + limits.OWN + 100, 1000)
    assert warning.semaphore_limit == survey.settings[0].semaphore_limit == survey.sessions
    assert "lowered to 289 and 289; raise it (ulimit -Hn, LimitNOFILE=)" in warning.words
    assert survey.line == "limits: 1,000 open files allow 289 sessions"
    assert survey.memory is survey.memory_sessions is None


def test_the_line_names_the_smallest_of_the_limits_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [
        limits.Memory("address space", 2 * SMALL),
        limits.Memory("cgroup", SMALL),
        limits.Memory("machine", 1 << 40),
    ]
    monkeypatch.setattr(limits, "memory_limits", lambda: memory)
    monkeypatch.setattr(limits, "raise_descriptor_limit", lambda: 1 << 20)
    survey = limits.survey([Settings()], False)
    assert survey.line.endswith(" sessions; 64 MiB of memory (cgroup) allow about 134")
    assert survey.memory == memory[1]
    assert str(memory[2]) == "1,048,576 MiB of memory (the machine's)"


def test_the_soft_limit_on_open_files_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda _kind, pair: asked.append(pair))
    assert limits.raise_descriptor_limit() == 4096
    assert asked == [(4096, 4096)]

    def forbid(_kind: int, _pair: tuple[int, int]) -> None:
        raise PermissionError

    monkeypatch.setattr(resource, "setrlimit", forbid)
    assert limits.raise_descriptor_limit() == 1024


def test_address_space_counts_what_is_unused_and_what_is_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_cgroup_limits", lambda: iter([]))
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (1 << 40, 1 << 40))
    space, machine = limits.memory_limits()
    assert (space.what, machine.what) == ("address space", "machine")
    assert 0 < (1 << 40) - space.size < 1 << 36, "only address space without memory is taken off"
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (resource.RLIM_INFINITY,) * 2)
    assert [each.what for each in limits.memory_limits()] == ["machine"]


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "100", "a/b/memory.max": "max"}, [100]),
        ("0::/a/b\n", {"a/memory.max": "100", "a/b/memory.max": "50"}, [50, 100]),
        ("0::/on/the/host\n", {"memory.max": "70"}, [70]),
        ("0::/a\n", {"unified/a/memory.max": "30"}, [30]),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "60"}, [60]),
        ("4:cpu,memory:/a\n", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, []),
        ("4:cpu:/a\n", {"memory/a/memory.limit_in_bytes": "60"}, []),
    ],
)
def test_the_limits_of_every_cgroup_above_count(
    tmp_path: Path, membership: str, files: dict[str, str], expected: list[int]
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    root = tmp_path / "fs"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    assert list(limits._cgroup_limits(root, tmp_path / "cgroup")) == expected


def test_without_cgroups_there_is_no_limit_of_theirs(tmp_path: Path) -> None:
    assert list(limits._cgroup_limits(tmp_path, tmp_path / "no such file")) == []
