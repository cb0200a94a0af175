"""What the machine and the container leave is read as they state it, and nothing is made up where they do not."""

from __future__ import annotations

import pytest

from vdu_fast import memory


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine of its own: writes the files that are given, and leaves the others out."""
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / name.replace("_", ".", 1)).write_text(text)

    return write


def test_the_machine_says_what_can_be_freed(system):
    system(meminfo="MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable:     3000 kB\nHugePages_Total: 0\n")
    assert memory.available_memory() == 3000 * 1024


def test_a_smaller_container_decides_and_its_file_cache_counts_as_free(system):
    system(meminfo="MemAvailable: 3000 kB\n", memory_max="1000000\n", memory_current="900000\n")
    assert memory.available_memory() == 100_000
    system(memory_stat="anon 5\ninactive_file 300000\n")
    assert memory.available_memory() == 400_000


def test_a_container_without_a_limit_or_a_larger_one_changes_nothing(system):
    system(meminfo="MemAvailable: 3000 kB\n", memory_max="max\n", memory_current="900000\n")
    assert memory.available_memory() == 3000 * 1024
    system(memory_max="99000000000\n")
    assert memory.available_memory() == 3000 * 1024


def test_a_full_container_has_nothing_left(system):
    system(memory_max="1000\n", memory_current="2000\n")
    assert memory.available_memory() == 0


def test_a_system_that_does_not_say_is_not_guessed_at(system):
    assert memory.available_memory() is None
