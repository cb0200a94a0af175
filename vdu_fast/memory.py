"""How much memory this process may still take, so that what cannot fit is refused before it is begun."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes of main memory that are free or can be freed, within the container's limit; None where nothing says so."""
    found = [free for free in (_machine(), _container()) if free is not None]
    return min(found) if found else None


def _machine() -> int | None:
    """Linux's own estimate, which counts the file cache as free; None on other systems."""
    kibibytes = _table(MEMINFO).get("MemAvailable:")
    return None if kibibytes is None else 1024 * kibibytes


def _container() -> int | None:
    """What the memory limit of a version 2 control group leaves; None where there is no limit."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such files, or "max"
        return None
    return max(0, limit - used + _table(CGROUP / "memory.stat").get("inactive_file", 0))


def _table(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file; nothing where it cannot be read."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
