"""Peak memory of this process."""

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """Peak of the resident set, in bytes.

    On Linux `ru_maxrss` starts from what the parent held when it started this process, so the
    kernel's own count for this program is read instead.
    """
    if STATUS.exists():
        lines = dict(
            line.split(":", 1)
            for line in STATUS.read_text(encoding="ascii").splitlines()
            if ":" in line
        )
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
