"""How much memory this process holds."""

from pathlib import Path

__all__ = ["process_memory"]


def process_memory(which="VmHWM"):
    """MiB, as Linux counts it.

    Not `getrusage`: its maximum counts the process that forked this one.

    Args:
        which: str. `"VmHWM"`, the peak; or `"VmRSS"`, now.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no line {which!r}")
