"""Machines made of this one: network namespaces with an address each on one bridge, own processes, own host names.

What a folder is depends on the machine where `private` names it. A cable that is pulled (`cut`) drops whatever is sent,
as a real one does: nobody hears a connection end. Needs root and `ip`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from server_fixture import command_of
from waiting import wait_until

NETWORK = "10.77.0"
HERE = f"{NETWORK}.1"  # of whoever runs the tests, on the same bridge
BRIDGE, PREFIX, CABLE = "specserve0", "specserve-", "ss-"
READY = "specserve-machine"  # what the first process of a machine is called, once its folders and name are its own

PORTS = (  # of Ray's agents, which are those of the machine alone: Ray waits less for what it knows
    "--dashboard-agent-grpc-port", "6401", "--dashboard-agent-listen-port", "6402",
    "--runtime-env-agent-port", "6403", "--metrics-export-port", "6404",
)  # fmt: skip


def can_be_made() -> bool:
    """Whether this user may make one here."""
    if os.getuid() or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    made = subprocess.run(["ip", "netns", "add", f"{PREFIX}try"], capture_output=True)
    if made.returncode == 0:
        _ip("netns", "del", f"{PREFIX}try")
    return made.returncode == 0


class Network:
    """The bridge, and the machines on it; `close` ends all of them."""

    def __init__(self):
        _remove_left()
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{HERE}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        self.machines: list[Machine] = []

    def machine(self, name: str, private: dict[Path, Path]) -> Machine:
        """On which the folders that are keys of `private` are the ones that are their values."""
        made = Machine(name, f"{NETWORK}.{len(self.machines) + 2}", private)
        self.machines.append(made)
        return made

    def close(self) -> None:
        for machine in self.machines:
            machine.close()
        _ip("link", "del", BRIDGE)


class Machine:
    """One, which is switched on."""

    def __init__(self, name: str, address: str, private: dict[Path, Path]):
        self.name, self.address = name, address
        self._space, self._cable = f"{PREFIX}{name}", f"{CABLE}{name}"
        self._private = private
        _ip("netns", "add", self._space)
        _ip("link", "add", self._cable, "type", "veth", "peer", "name", "eth0", "netns", self._space)
        _ip("link", "set", self._cable, "master", BRIDGE, "up")
        _ip("-n", self._space, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", self._space, "link", "set", "eth0", "up")
        _ip("-n", self._space, "link", "set", "lo", "up")
        _ip("-n", self._space, "route", "add", "default", "via", HERE)  # by which Ray learns its address; leads nowhere
        self.begin()

    def begin(self) -> None:
        """Switch it on: it runs nothing yet."""
        mounts = "".join(f"mount --bind {there} {path} && " for path, there in self._private.items())
        # Bash takes leave of what its parent left, as an init does: Ray asks whether a process is still there.
        first = f"{mounts}hostname {self.name} && exec -a {READY} bash -c 'while true; do sleep 1000 & wait $!; done'"
        command = ["ip", "netns", "exec", self._space, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._first = subprocess.Popen([*command, "--uts", "bash", "-c", first])
        wait_until(lambda: command_of(str(self._first_pid())).startswith(READY))

    def end(self) -> None:
        """Switch it off: all that runs on it ends at once."""
        self._first.kill()
        self._first.wait()

    def _first_pid(self) -> int:
        return _child_of(self._first.pid)

    def popen(self, *command: str, **options) -> subprocess.Popen:
        """A process of this machine."""
        return _Inside(["nsenter", "-t", str(self._first_pid()), "-n", "-m", "-p", "-u", *command], **options)

    def start_ray(self, *flags: str, env: dict[str, str]) -> None:
        """Its processes stay behind; the head's own if there is no address of one among `flags`."""
        flags = (
            "--disable-usage-stats",
            "--node-ip-address",
            self.address,
            *PORTS,
            "--include-log-monitor=false",
            *flags,
        )
        done = self.popen(
            sys.executable, "-m", "ray.scripts.scripts", "start", *flags,
            env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        said, _ = done.communicate(timeout=300)
        assert done.returncode == 0, said

    def cut(self) -> None:
        _ip("link", "set", self._cable, "down")

    def mend(self) -> None:
        _ip("link", "set", self._cable, "up")

    def close(self) -> None:
        self.end()
        _ip("link", "del", self._cable)  # a namespace goes when its last process has
        _ip("netns", "del", self._space)


def _remove_left() -> None:
    """What a run that was killed has left."""
    for line in _ip("netns", "list").splitlines():
        if (space := line.split()[0]).startswith(PREFIX):
            for pid in _ip("netns", "pids", space).split():
                with contextlib.suppress(ProcessLookupError):  # with the first go all
                    os.kill(int(pid), signal.SIGKILL)
            _ip("netns", "del", space)
    for link in json.loads(_ip("-json", "link", "show")):
        if link["ifname"] == BRIDGE or link["ifname"].startswith(CABLE):
            _ip("link", "del", link["ifname"])


class _Inside(subprocess.Popen):
    """Signals go to the process in the machine, whose parent is the one that was started."""

    def send_signal(self, number: int) -> None:
        if self.poll() is None and (pid := _child_of(self.pid)):
            os.kill(pid, number)


def _child_of(pid: int) -> int:
    """0 while it has none."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else 0


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
