"""`llmctl demo` with three seeds: whether every gate holds, and what time it takes.

Run: `python benchmarks/demo.py [DIRECTORY] [--threads N]`. User CPU seconds are told beside wall
time, since other work on the machine moves them less. Exit code 1 where a gate does not hold.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEEDS = (0, 1, 2)
GATE = 8
"""The exit code of a gate that does not hold."""


def main() -> int:
    """Run each seed in a directory of its own; print a line for each gate of each."""
    flags = sys.argv[sys.argv.index("--threads") :][:2] if "--threads" in sys.argv else []
    named = [word for word in sys.argv[1:] if word not in flags]
    root = Path(named[0]) if named else Path(tempfile.mkdtemp(prefix="llmctl-demo-"))
    codes = []
    for seed in SEEDS:
        began, cpu = time.monotonic(), _user_seconds()
        command = ["demo", "--seed", str(seed), "-o", str(root / f"seed-{seed}"), "--json", "-q"]
        ran = subprocess.run(
            [sys.executable, "-m", "llmctl", *command, *flags], capture_output=True, text=True
        )
        wall, user = time.monotonic() - began, _user_seconds() - cpu
        print(f"seed {seed}: exit code {ran.returncode}, {wall:.0f} s, {user:.0f} s of user CPU")
        codes.append(ran.returncode)
        if ran.returncode not in (0, GATE):
            print(ran.stderr.strip())
            continue
        for stage in json.loads(ran.stdout)["stages"]:
            for gate in stage["gates"] or ():
                wanted = f"{gate['figure']} {gate['sign']} {gate['bound']:g}"
                held = "holds" if gate["holds"] else "FAILS"
                print(f"  {stage['name']:8} {wanted:28} {gate['value']:8.4g}  {held}")
    return int(any(codes))


def _user_seconds() -> float:
    """Of all children so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


if __name__ == "__main__":
    sys.exit(main())
