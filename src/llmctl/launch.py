"""Several processes: what a launcher's environment says, and `--processes N`, which launches."""

import logging
import os
import signal
import sys

from llmctl.errors import UserError

GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun and `accelerate launch` set for each process of several."""
MPI = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "MV2_COMM_WORLD_SIZE": "MV2_COMM_WORLD_RANK",
}
"""Variables of mpirun and of SLURM's PMI: number of processes -> number of this one."""
PASSED_ON = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that the launcher sends on to its ranks; one that it does not would kill it alone."""


def require_placed(command: str, *, trains: bool) -> None:
    """Refuse an environment of several processes that a command cannot be one of.

    Only commands that train share their work; of others each process would do all of it, to the
    same files. They do not mind addresses that a container happens to set.

    Raises:
        UserError: the launcher's variables are incomplete, or mpirun's, or no group trains.
    """
    is_started = os.environ.get("LOCAL_RANK", "-1") != "-1" or _mpi_size() is not None
    if not (trains or is_started):
        return
    world = group_size()
    if world > 1 and not trains:
        error = UserError(
            f"`llmctl {command}` works in one process, and a launcher started {world}",
            hint="start it without the launcher"
            + ("; `processes: N` in a stage starts N for it" if command in ("run", "demo") else ""),
        )
        error.is_reported, error.is_shared = os.environ["RANK"] != "0", True
        raise error


def group_size() -> int:
    """Return the number of processes that a launcher started, this one among them; else 1.

    Raises:
        UserError: the variables are incomplete or contradict each other, or only mpirun's are set.
    """
    given = {name: os.environ[name] for name in GROUP if os.environ.get(name, "") not in ("", "-1")}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not given.get(name, "0").isdecimal():
            raise UserError(f"{name}={given[name]}: expected a number", hint=_how_to_launch(name))
    rank, world = int(given.get("RANK", "0")), int(given.get("WORLD_SIZE", "1"))
    missing = [name for name in GROUP if name not in given]
    if missing and (size := _mpi_size()):
        raise _mpi_error(size)
    if rank == 0 and world == 1 and "LOCAL_RANK" not in given:
        return 1
    first = next(name for name in ("WORLD_SIZE", "LOCAL_RANK", "RANK") if name in given)
    if missing:
        raise UserError(
            f"{first}={given[first]} is set, as a launcher of several processes sets it, "
            f"and {', '.join(missing)} not",
            hint=_how_to_launch(first),
        )
    if rank >= world:
        raise UserError(
            f"RANK={rank}: with WORLD_SIZE={world} ranks are 0 to {world - 1}",
            hint=_how_to_launch("RANK"),
        )
    return world


def is_one_of_several() -> bool:
    """Whether this process trains with others."""
    try:
        return group_size() > 1
    except UserError:
        return False


def machines() -> int:
    """Return on how many machines the processes of this run are."""
    return max(1, _number("WORLD_SIZE") // _number("LOCAL_WORLD_SIZE"))


def run(processes: int) -> int:
    """Launch `python -m llmctl` with this process's arguments; return the exit code to end with.

    torchrun itself turns every code into 1; the first child to fail is the one that knows why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

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


def _number(name: str) -> int:
    return int(os.environ.get(name) or "1")


def _mpi_size() -> str | None:
    """Return the variable by which mpirun tells of several processes, None where none does."""
    sizes = {name: os.environ.get(name, "") for name in MPI}
    return next((name for name, size in sizes.items() if size.isdecimal() and int(size) > 1), None)


def _mpi_error(name: str) -> UserError:
    error = UserError(
        f"{name}={os.environ[name]}: processes of mpirun or srun, which llmctl does not join",
        hint=_how_to_launch(name),
    )
    error.is_reported = os.environ.get(MPI[name], "0") != "0"
    return error


def _how_to_launch(name: str) -> str:
    return (
        "start several processes by --processes N, torchrun or `accelerate launch`; "
        f"for one: unset {name}"
    )
