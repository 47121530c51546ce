"""How many CPU threads are worth starting here."""

from __future__ import annotations

import os
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(topology: Path = _TOPOLOGY, quota: Path = _QUOTA) -> int:
    """Physical cores that this process may run on, within a container's CPU quota; at least 1.

    Two hyper-threads of one core share its vector units, so counting them twice slows matrix work down.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))
    cores = {_core_of(cpu, topology) for cpu in cpus}
    limit = _quota_cpus(quota)
    return max(1, len(cores) if limit is None else min(len(cores), limit))


def _core_of(cpu: int, topology: Path) -> tuple[str, str]:
    """(package, core) of a logical CPU; a CPU that says nothing of itself counts as a core of its own."""
    folder = topology / f"cpu{cpu}" / "topology"
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return "unknown", str(cpu)


def _quota_cpus(quota: Path) -> int | None:
    """Whole CPUs of a cgroup v2 quota such as ``200000 100000``; None without one."""
    try:
        allowed, period = quota.read_text().split()[:2]
        return None if allowed == "max" else max(1, int(allowed) // int(period))
    except (OSError, ValueError):
        return None
