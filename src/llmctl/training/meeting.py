"""What one process refuses, all refuse: with the same code, told once on each machine.

Each process reads its command and recipe by itself, and looks for its own devices and run. Before
their group forms, processes meet in the launcher's store: one that is refused comes too, since the
others would wait for it.
"""

import pickle
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import uuid4

from torch.distributed import is_initialized
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from llmctl import console, launch
from llmctl.errors import OutputError, UserError

WAITS = 120.0
"""Seconds for the others to come, where this process has nothing to do but tell them."""
PARTING = 5.0
"""Seconds to keep the store for those that have not read it."""
POLL = 0.1
"""Seconds between two looks for the answer."""


@dataclass(frozen=True)
class Answer:
    """What a process has to say before the group forms."""

    error: UserError | None = None
    is_complete: bool = False
    """Whether it sees a run that is completed, and so nothing to do."""
    host: str = field(default_factory=socket.gethostname)
    token: str = field(default_factory=lambda: uuid4().hex)
    """Tells it from those of earlier starts: a launcher that starts again may keep its store."""


@contextmanager
def met(mine: Answer, seconds: float) -> Iterator[None]:
    """Hear what all processes say; the body, where none is refused, forms their group. Collective.

    Raises:
        UserError: of the first process that is refused.
        OutputError: only some of them see a completed run.
        RuntimeError: of the network's; a process has not come within these seconds.
    """
    if not launch.is_one_of_several():
        yield
        return
    handler = rendezvous("env://", timeout=timedelta(seconds=seconds))
    store = PrefixStore("llmctl", next(iter(handler))[0])
    answers = _answers(store, mine, seconds)
    error = first_error([(answer.host, answer.error) for answer in answers], console.rank())
    if error := error or _unlike(answers):
        _part(store, answers)
        raise error
    yield  # here, since rank 0 may keep the store


def tell(error: UserError) -> UserError:
    """Tell the others, which wait for the group to form; return the error that all end with."""
    if error.is_shared or is_initialized():
        return error
    try:
        with met(Answer(error), WAITS):
            raise AssertionError("met without a word of the refusal")
    except UserError as said:
        return said
    except (RuntimeError, ValueError):  # they have not come, or have no address to meet at
        return error


def confirm_completed() -> None:
    """Tell the others that this process sees a completed run, and has nothing to do.

    Raises:
        UserError: another process is refused, or sees no such run.
    """
    with suppress(RuntimeError), met(Answer(is_complete=True), WAITS):
        pass


def first_error(told: Sequence[tuple[str, UserError | None]], rank: int) -> UserError | None:
    """Return what all processes are to raise, None where none of them (host, error) is refused.

    One tells it on each machine, and names the process where there are several machines.
    """
    first = next((number for number, (_, error) in enumerate(told) if error is not None), None)
    if first is None:
        return None
    hosts = [host for host, _ in told]
    error = told[first][1]
    assert error is not None
    place = f"rank {first} ({hosts[first]})"
    if len({*hosts}) > 1 and place not in error.message:
        error.message += f", on {place}"
    is_there = hosts[rank] == hosts[first]
    return shared(error, is_told=rank == first if is_there else speaks(hosts, rank))


def shared(error: UserError, *, is_told: bool) -> UserError:
    """Mark an error that all processes raise, and whether this one tells it."""
    error.is_shared, error.is_reported = True, not is_told
    return error


def speaks(hosts: Sequence[str], rank: int) -> bool:
    """Whether a process is the first on its machine."""
    return hosts.index(hosts[rank]) == rank


def _answers(store: Store, mine: Answer, seconds: float) -> list[Answer]:
    """Return the answers of all processes by rank, this one's as it is."""
    rank, others = console.rank(), range(1, launch.group_size())
    if rank == 0:
        store.set("meeting", mine.token)
        came = [_got(store, f"{mine.token}/{other}") for other in others]
        _put(store, f"{mine.token}/all", [mine, *came])
        return [mine, *came]
    limit, known = time.monotonic() + seconds, None
    while time.monotonic() < limit:
        if (meeting := store.get("meeting").decode()) != known:
            _put(store, f"{meeting}/{rank}", mine)
            known = meeting
        if store.check([f"{meeting}/all"]):
            answers: list[Answer] = _got(store, f"{meeting}/all")
            if answers[rank].token == mine.token:
                answers[rank] = mine
                return answers
        time.sleep(POLL)
    raise RuntimeError(f"timed out after {seconds:g} s")


def _put(store: Store, key: str, value: object) -> None:
    store.set(key, pickle.dumps(value).hex())


def _got(store: Store, key: str) -> Any:
    """Wait for what a process put there, and return it."""
    return pickle.loads(bytes.fromhex(store.get(key).decode()))


def _unlike(answers: Sequence[Answer]) -> UserError | None:
    """Return the error where only some processes see a completed run."""
    states = [answer.is_complete for answer in answers]
    if len({*states}) == 1:
        return None
    hosts = [answer.host for answer in answers]
    sees, lacks = states.index(True), states.index(False)
    error = OutputError(
        f"rank {sees} ({hosts[sees]}) sees a completed run, "
        f"and rank {lacks} ({hosts[lacks]}) does not",
        hint="put the run directory on a file system that all machines share",
    )
    return shared(error, is_told=speaks(hosts, console.rank()))


def _part(store: Store, answers: Sequence[Answer]) -> None:
    """Leave when all have read the answers: the store ends with a process or its launcher."""
    meeting = answers[0].token
    with suppress(RuntimeError):  # the store has ended, or one of the others
        store.set(f"{meeting}/{console.rank()}/read", "")
        read = [f"{meeting}/{rank}/read" for rank in range(len(answers))]
        store.wait(read, timedelta(seconds=PARTING))
