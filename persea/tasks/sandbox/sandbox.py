"""Where strangers' code runs, or is refused: namespaces, a root of its own, limits; proven by a self-test before the first program.

Nothing is degraded: where this machine cannot build every wall, `open_sandbox` refuses with the reason and the remedy (exit 7).
What the walls are: jail.py. What they are not, and what a program is tested by: docs/sandbox.md.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from persea.errors import EnvironmentLacks

NOBODY = 65534  # the user programs run as where persea is root: the kernel exempts root from the limit on processes
GRACE = 5.0  # seconds beyond the watchman's own limit after which it is killed too
TEXT = Path(__file__).with_name("isolate.py")
REMEDY = ("allow unprivileged user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a container with "
          "--security-opt seccomp=unconfined --security-opt systempaths=unconfined), or install bubblewrap; or leave out sets that run code")


class Walls(StrEnum):
    OWN = "own"  # built by jail.py
    BWRAP = "bwrap"  # built by bubblewrap, where the system lets it do what it does not let everybody do


@dataclass(frozen=True)
class Limits:
    """cpu, wall in seconds; memory (of one process), file (also the most output) and tmp in bytes; processes and threads; open files."""

    cpu: int = 5
    wall: float = 10.0
    memory: int = 512 << 20
    processes: int = 8
    files: int = 32
    file: int = 1 << 20
    tmp: int = 16 << 20


class End(StrEnum):
    EXIT = "exit"
    TIMEOUT = "timeout"
    STOPPED = "stopped"  # by whoever started it


@dataclass(frozen=True)
class Ran:
    """code  exit status, negative = the signal that ended it; output  at most Limits.file bytes of stdout and stderr"""

    end: End
    code: int
    output: bytes
    seconds: float


@dataclass(frozen=True, eq=False)
class Running:
    """A program under way."""

    process: subprocess.Popen[bytes]
    life: int
    status: int
    output: Any
    begin: float
    wall: float
    early: dict[str, Any] | None

    def finish(self, stop: bool = False) -> Ran:
        """Wait for its end, or bring it about. Nothing of it is left behind, however it ended.

        Raises EnvironmentLacks where the walls did not stand.
        """
        if stop:
            os.close(self.life)
        try:
            told = self.early or _told(self.status, self.begin + self.wall + GRACE)
        finally:
            if not stop:
                os.close(self.life)
            os.close(self.status)
            try:
                self.process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        with self.output as file:
            file.seek(0)
            said = file.read()
        if told["end"] == "failed":
            words = f"{told['why']} {said[:300].decode(errors='replace')}".strip()
            raise EnvironmentLacks(f"the sandbox cannot be built: {words}", where="sandbox", remedy=REMEDY)
        return Ran(End(told["end"]), int(told.get("code", -9)), said, time.monotonic() - self.begin)


@dataclass(frozen=True)
class Sandbox:
    """How walls are built here, and by which Python; programs get its standard library and nothing else."""

    walls: Walls
    python: str
    limits: Limits = Limits()

    def start(self, program: str, channels: Sequence[int] = ()) -> Running:
        """Start a Python program. channels: descriptors it finds as 3, 4, ...; it has no other but /dev/null and its output."""
        begin = time.monotonic()
        life, alive = os.pipe()
        told, status = os.pipe()
        # Handed over as files, not pipes: nobody has to feed them while the walls go up.
        with tempfile.TemporaryFile() as source:
            source.write(program.encode(errors="surrogatepass"))
            source.seek(0)
            output = tempfile.TemporaryFile()  # noqa: SIM115  (Running closes it)
            fds = {"life": life, "status": status, "program": source.fileno(), "output": output.fileno(), "keep": list(channels)}
            root = os.geteuid() == 0
            own = self.walls is Walls.OWN
            settings = {"own": own, "uid": NOBODY if root and own else -1, "fds": fds, "binds": _binds(self.python), "links": _links(),
                        "tmp": self.limits.tmp, "limits": asdict(self.limits)}
            command = [self.python, "-I", "-S", "-c", TEXT.read_text(encoding="utf-8"), json.dumps(settings)]
            other: dict[str, Any] = {"user": NOBODY, "group": NOBODY, "extra_groups": ()} if root and not own else {}
            try:
                process = subprocess.Popen(
                    command if own else [*_bwrap(settings), *command], stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd="/",
                    env={"LANG": "C.UTF-8"}, close_fds=True, pass_fds=(life, status, source.fileno(), output.fileno(), *channels), **other)
            except OSError as error:
                for fd in (life, alive, told, status):
                    os.close(fd)
                raise EnvironmentLacks(f"the sandbox cannot be started: {error}", where="sandbox", remedy=REMEDY) from error
        os.close(life)
        os.close(status)
        early = _map_users(process.pid, told, alive, root) if own else None
        return Running(process, alive, told, output, begin, self.limits.wall, early)

    def run(self, program: str) -> Ran:
        """Run a Python program to its end."""
        return self.start(program).finish()


def _told(status: int, until: float) -> dict[str, Any]:
    """The watchman's next line; his silence, or his death, is a timeout or a wall that did not stand."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([status], [], [], max(0.0, until - time.monotonic()))
        more = os.read(status, 1) if ready else b""
        if not ready:
            return {"end": "timeout"}
        if not more:
            return {"end": "failed", "why": "it ended before the program began"}
        line += more
    found: dict[str, Any] = json.loads(line)
    return found


def _map_users(pid: int, told: int, alive: int, root: bool) -> dict[str, Any] | None:
    """Give the new namespace its users: ourselves as 0, and `nobody` where we are root. Returns what the watchman says instead, if he does."""
    first = _told(told, time.monotonic() + GRACE)
    if first["end"] != "unshared":
        return first
    try:
        if not root:
            Path(f"/proc/{pid}/setgroups").write_text("deny")
        for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
            Path(f"/proc/{pid}/{name}").write_text(f"0 {own} 1\n" + (f"{NOBODY} {NOBODY} 1\n" if root else ""))
    except OSError as error:
        os.write(alive, b"x")
        return {"end": "failed", "why": f"users of the new namespace: {error}"}
    os.write(alive, b"m")
    return None


def _binds(python: str) -> list[str]:
    """Folders a Python program needs, none inside another."""
    wanted = ["/usr", *(p for p in ("/lib", "/lib64") if os.path.isdir(p) and not os.path.islink(p))]
    prefix = os.path.dirname(os.path.dirname(python))
    return wanted if any(prefix == w or prefix.startswith(w + "/") for w in wanted) else [*wanted, prefix]


def _links() -> dict[str, str]:
    """/lib and the like, where they are links into /usr."""
    return {p: os.readlink(p) for p in ("/lib", "/lib64", "/bin") if os.path.islink(p)}


def _bwrap(settings: dict[str, Any]) -> list[str]:
    """bubblewrap's words for the same walls."""
    words = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--as-pid-1", "--cap-drop", "ALL", "--clearenv",
             "--setenv", "LANG", "C.UTF-8"]
    for path in settings["binds"]:
        words += ["--ro-bind", path, path]
    for path, target in settings["links"].items():
        words += ["--symlink", target, path]
    return [*words, "--dev-bind", "/dev/null", "/dev/null", "--size", str(settings["tmp"]), "--perms", "0777", "--tmpfs", "/tmp",
            "--remount-ro", "/", "--chdir", "/tmp", "--"]


PROBE = r"""
import ctypes, json, os, resource, socket, sys
host, port, hidden = {host!r}, {port!r}, {hidden!r}
def fails(act):
    try:
        act()
    except (OSError, MemoryError):
        return True
    return False
def write(path):
    with open(path, "w") as file:
        file.write("x")
def big():
    with open("/tmp/big", "wb") as file:
        for _ in range({file} // 4096 + 64):
            file.write(bytes(4096))
            file.flush()
def many():
    for _ in range({processes} + 8):
        if os.fork() == 0:
            import time
            time.sleep(5)
            os._exit(0)
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
libc = ctypes.CDLL(None, use_errno=True)
def unshare():
    if libc.unshare(0x10000000) < 0:
        raise OSError
    os._exit(3)
capabilities = (ctypes.c_uint32 * 6)()
libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), capabilities)
held = dict(
    network=fails(lambda: socket.create_connection((host, port), 1)),
    files=not any(os.path.exists(p) for p in ("/etc/passwd", "/proc/self", "/sys", *hidden)),
    root=all(fails(lambda p=p: write(p)) for p in ("/canary", "/usr/canary", "/dev/canary", sys.executable))
        and all(os.statvfs(p).f_flag & os.ST_RDONLY for p in ("/", "/usr", sys.base_prefix)),
    tmp=not fails(lambda: write("/tmp/mine")) and os.getcwd() == "/tmp",
    environment=set(os.environ) <= {{"LANG", "LC_CTYPE", "PWD"}},
    descriptors=all(fails(lambda fd=fd: os.fstat(fd)) for fd in range(3, 4096)),
    processes=os.getppid() == 1,
    capabilities=not any(capabilities) and libc.prctl(39, 0, 0, 0, 0) == 1,
    namespaces=fails(unshare),
    memory=fails(lambda: bytearray({memory})),
    size=fails(big),
    forks=fails(many),
)
print(json.dumps(held))
"""


def prove(sandbox: Sandbox) -> None:
    """Try to break out by each way we know. Raises EnvironmentLacks that names every wall that does not hold."""
    with tempfile.NamedTemporaryFile() as canary, socket.create_server(("127.0.0.1", 0)) as server:
        limits, needed = sandbox.limits, _binds(sandbox.python)
        home = Path.home()
        own = sorted(home.iterdir()) if os.access(home, os.R_OK | os.X_OK) else []  # a user without a home has nothing there to hide
        hidden = [canary.name, *(str(p) for p in own if not any(f"{b}/".startswith(f"{p}/") for b in needed))]
        probe = PROBE.format(host="127.0.0.1", port=server.getsockname()[1], hidden=hidden[:100], file=limits.file,
                             processes=limits.processes, memory=limits.memory)
        ran = sandbox.run(probe)
    try:
        held = json.loads(ran.output)
    except ValueError:
        held = {f"the self-test itself ({ran.end} {ran.code}: {ran.output[-200:].decode(errors='replace')!r})": False}
    weak = [name for name, holds in held.items() if not holds]
    if weak:
        raise EnvironmentLacks(f"the sandbox does not hold: {', '.join(weak)}", where=f"sandbox, walls of {sandbox.walls}", remedy=REMEDY)


@cache
def open_sandbox() -> Sandbox:
    """A sandbox that has proven itself: with own walls, or bubblewrap's where it is installed. Once a process.

    Raises EnvironmentLacks where neither holds.
    """
    reasons = []
    for walls in (Walls.OWN, *((Walls.BWRAP,) if shutil.which("bwrap") else ())):
        sandbox = Sandbox(walls, os.path.realpath(sys.executable))
        try:
            prove(sandbox)
        except EnvironmentLacks as error:
            reasons.append(f"{walls}: {error.what}")
        else:
            return sandbox
    raise EnvironmentLacks("no code is run here: " + "; ".join(reasons), where="sandbox", remedy=REMEDY)
