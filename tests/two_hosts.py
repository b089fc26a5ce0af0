"""Two hosts in one machine: namespaces of Linux's, with a host name each, and a cable between."""

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

NAMES = ("alder", "birch")
OPENED = "hostname {name} && ip link set lo up && echo ready && exec cat"


@dataclass(frozen=True)
class Host:
    """A host, alive while the process is that holds it."""

    rank: int
    pid: int

    @property
    def address(self) -> str:
        """Its address in the network of the two."""
        return f"10.77.3.{self.rank + 1}"

    @property
    def plug(self) -> str:
        """Name of its end of the cable."""
        return f"llm-{NAMES[self.rank]}"

    def enter(self) -> None:
        """Move this process, which has one thread, to the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        for kind in ("net", "uts"):
            with Path(f"/proc/{self.pid}/ns/{kind}").open() as namespace:
                if libc.setns(namespace.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"cannot enter {kind}")
        os.environ["GLOO_SOCKET_IFNAME"] = self.plug

    def call(self, *command: object) -> None:
        """Run a command on the host, from outside or inside."""
        enter = ("nsenter", f"--target={self.pid}", "--net")
        subprocess.run([*enter, *map(str, command)], check=True, capture_output=True)

    def link(self, state: str) -> None:
        """Plug the cable in (up) or out (down)."""
        self.call("ip", "link", "set", self.plug, state)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Give two hosts that are joined; root can (see `can_be_made`)."""
    with ExitStack() as stack:
        hosts = []
        for rank, name in enumerate(NAMES):
            command = ("unshare", "--net", "--uts", "sh", "-c", OPENED.format(name=name))
            holder = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.callback(holder.communicate)  # closes its input, and so ends it
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            hosts.append(Host(rank, holder.pid))
        first, second = hosts
        ends = [(host.plug, "netns", str(host.pid)) for host in hosts]
        cable = ("ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        subprocess.run(cable, check=True, capture_output=True)
        for host in hosts:
            host.call("ip", "address", "add", f"{host.address}/24", "dev", host.plug)
            host.link("up")
        yield first, second


@cache
def can_be_made() -> bool:
    """Whether this system makes namespaces with a network for us."""
    try:
        with two_hosts():
            return True
    except (OSError, AssertionError, subprocess.CalledProcessError):
        return False
