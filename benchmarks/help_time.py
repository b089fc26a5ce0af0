"""Wall time of `llmctl --help` and of a command's help, whole processes.

python benchmarks/help_time.py
"""

import sys

from common import alternate, machine, seconds, show, table

CASES = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "llmctl --help": [sys.executable, "-m", "llmctl", "--help"],
    "llmctl pretrain --help": [sys.executable, "-m", "llmctl", "pretrain", "--help"],
}


def main() -> None:
    sides = {name: (lambda command=command: seconds(command)) for name, command in CASES.items()}
    alternate(sides, 2)
    found = alternate(sides, 15)
    print(f"{machine()}; 15 rounds, alternating, medians (least to most)\n")
    print(table(["command", "seconds"], [[name, show(v, 3)] for name, v in found.items()]))


if __name__ == "__main__":
    main()
