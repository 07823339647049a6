"""What it takes to load a bundle, from a process's start to a model that is ready for an image.

    python -m benchmarks.load [BUNDLE] [--runs 5] [--json FILE]

Without BUNDLE, a synthetic 0.5B checkpoint (random weights in Apple's shapes) is exported first,
at 4 bits. Every run is a process of its own that imports fastvlm_mlx and loads the bundle; one
before them fills the disk cache and does not count. Wall and CPU seconds are the process's, as the
operating system accounts for them; the resident memory is what it holds after loading (on macOS
its peak). Beside the whole, the largest parts, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.encoder import machine
from benchmarks.synthetic import make

# Run with the bundle's path as the only argument.
PARTS = {
    "python": "pass",
    "import": "import fastvlm_mlx.loading",
    "hashes": "from fastvlm_mlx.bundle.bundle import Bundle;Bundle.open(sys.argv[1]).check_files()",
    "tokenizer": "from tokenizers import Tokenizer;"
    "kept = Tokenizer.from_file(sys.argv[1] + '/tokenizer.json')",
    "load": "import fastvlm_mlx; kept = fastvlm_mlx.load(sys.argv[1])",
}
# Linux keeps the peak of the process that started this one, so that says nothing there.
RESIDENT = """
if sys.platform == "darwin":
    import resource
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
else:
    import os
    print(int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
"""
# What it must reach: a load at 0.5B.
MAX_SECONDS = 1.5


def measure(code: str, bundle: Path) -> dict[str, float]:
    """One new process: wall seconds, CPU seconds, resident bytes at its end."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; {code}\n{RESIDENT}", str(bundle)],
        stdout=subprocess.PIPE,
        text=True,
    )
    printed = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status != 0:
        raise SystemExit(f"{code} failed")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "resident_bytes": int(printed),
    }


def export(directory: Path) -> Path:
    """The 4-bit bundle of a synthetic 0.5B checkpoint, below `directory`."""
    checkpoint, bundle = directory / "checkpoint", directory / "bundle"
    make(checkpoint, "0.5b")
    command = [sys.executable, "-m", "fastvlm_mlx", "export", str(checkpoint), str(bundle)]
    subprocess.run([*command, "--llm-bits", "4"], check=True, stdout=subprocess.DEVNULL)
    return bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle's directory")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        bundle = arguments.bundle or export(Path(temporary))
        measure(PARTS["load"], bundle)
        # In turns, so that a busy machine slows all of them.
        rounds = [
            {name: measure(code, bundle) for name, code in PARTS.items()}
            for _ in range(arguments.runs)
        ]
        total = sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file())
    found = {
        name: {key: median(one[name][key] for one in rounds) for key in rounds[0][name]}
        for name in PARTS
    }
    result = {
        "machine": machine(),
        "bundle": str(arguments.bundle or "synthetic 0.5b, 4 bits"),
        "bundle_bytes": total,
        "runs": arguments.runs,
        "limit_s": MAX_SECONDS,
        **found,
    }
    print(json.dumps(result["machine"]))
    print(f"{result['bundle']}, {total / 1e6:.0f} MB, medians of {arguments.runs} new processes:")
    for name, part in found.items():
        print(
            f"  {name:10} {part['seconds']:6.2f} s wall {part['cpu_seconds']:6.2f} s CPU "
            f"{part['resident_bytes'] / 1e6:6.0f} MB resident"
        )
    whole = found["load"]["seconds"]
    print(f"load: {whole:.2f} s, limit {MAX_SECONDS} s: {'' if whole < MAX_SECONDS else 'NOT '}met")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
