"""How much memory this process may still take: what the machine has free, or what the control
groups that hold it leave (containers, job schedulers).
"""

from __future__ import annotations

from pathlib import Path

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def free_memory() -> int:
    """Bytes of the host's memory that are free for this process, page cache that can be dropped
    among them.
    """
    import psutil

    return min([psutil.virtual_memory().available, *_left_by_groups(_ROOT, _OWN)])


def _left_by_groups(root: Path, own: Path) -> list[int]:
    """Bytes left by every control group above this process that limits memory, of version 1 or 2;
    nothing where there are none.

    Args:
        root: where control groups are mounted.
        own: the file that says in which this process is.
    """
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        mount = root / "memory" if kinds else root
        folder = mount / path.lstrip("/")
        groups = [group for group in (folder, *folder.parents) if group.is_relative_to(mount)]
        found += [left for group in groups if (left := _left(group)) is not None]
    return found


def _left(group: Path) -> int | None:
    """What one group leaves; None where it sets no limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (group / limit).read_text(encoding="ascii").strip()
            taken = int((group / used).read_text(encoding="ascii"))
            stat = dict(
                line.split(" ", 1)
                for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
            )
            return max(0, int(most) - taken + int(stat.get(cache, 0)))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
