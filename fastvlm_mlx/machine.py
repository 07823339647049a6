"""The machine that this runs on: its system, chip and memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def system() -> str:
    """Name and version: macOS 15.1, or Linux 6.8.0."""
    macos = platform.mac_ver()[0]
    return f"macOS {macos}" if macos else f"{platform.system()} {platform.release()}"


def chip() -> str:
    """The processor's name, "Apple M1 Max" for example; its architecture where nobody tells."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            return done.stdout.strip()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def memory_bytes() -> int:
    """What is built in, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def tell(text: str) -> None:
    """One line on stderr about something that takes long, or is not as it should be."""
    print(f"fastvlm: {text}", file=sys.stderr, flush=True)
