"""`llmctl` and `python -m llmctl`: the process starts here."""

import gc
import os
import signal

from llmctl.signals import exit_on_signals


def start() -> None:
    """Mind signals first: importing the rest takes long enough to be interrupted."""
    exit_on_signals()
    gc.disable()  # of a million new objects of modules none is garbage; the command enables it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice, once for each rank
    from llmctl import optional_imports
    from llmctl.cli import main

    optional_imports.deny()
    try:
        main()
    finally:  # Python takes its handlers away before it ends: SIGUSR1 would give a code of its own
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


if __name__ == "__main__":
    start()
