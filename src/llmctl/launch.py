"""`--processes N`: run this very command in N processes, and pass the child's exit code on."""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that the launcher sends on to its ranks; one that it does not would kill it alone."""


def run(processes: int) -> int:
    """Launch `python -m llmctl` with this process's arguments; return the exit code to end with.

    torchrun itself turns every code into 1; the first child to fail is the one that knows why.
    """
    for name in ("agent.server.api", "multiprocessing.api"):  # each sets a level of its own
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds to save after a signal
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each rank sets its own share of the cores
    flags = ["--standalone", "--nproc-per-node", str(processes), "--signals-to-handle", PASSED_ON]
    try:
        torchrun([*flags, "-m", "llmctl", *sys.argv[1:]])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    except SignalException as error:
        received = int(error.sigval)
        return 128 + (signal.SIGTERM if received == signal.SIGUSR1 else received)
    return 0
