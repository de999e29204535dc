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

from persea.errors import MissingRequirementError

NOBODY_UID = 65534  # the user programs run as where persea is root: the kernel exempts root from the limit on processes
WATCHDOG_GRACE_S = 5.0  # seconds beyond the watchman's own limit after which it is killed too
ISOLATE_SCRIPT = Path(__file__).with_name("isolate.py")
SANDBOX_REMEDY = (
    "allow unprivileged user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0, or a container with "
    "--security-opt seccomp=unconfined --security-opt systempaths=unconfined), or install bubblewrap; or leave out sets that run code"
)


class Isolation(StrEnum):
    NAMESPACES = "own"  # built by jail.py
    BUBBLEWRAP = "bwrap"  # built by bubblewrap, where the system lets it do what it does not let everybody do


@dataclass(frozen=True)
class SandboxLimits:
    """cpu, wall in seconds; memory (of one process), file (also the most output) and tmp in bytes; processes and threads; open files."""

    cpu_s: int = 5
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20
    max_processes: int = 8
    max_open_files: int = 32
    max_file_bytes: int = 1 << 20
    tmp_bytes: int = 16 << 20


class ExitKind(StrEnum):
    EXIT = "exit"
    TIMEOUT = "timeout"
    STOPPED = "stopped"  # by whoever started it


@dataclass(frozen=True)
class RunResult:
    """code  exit status, negative = the signal that ended it; output  at most Limits.file bytes of stdout and stderr"""

    exit_kind: ExitKind
    exit_code: int
    output: bytes
    duration_s: float


@dataclass(frozen=True, eq=False)
class RunningProgram:
    """A program under way."""

    process: subprocess.Popen[bytes]
    life_fd: int
    status_fd: int
    output: Any
    started_at: float
    wall_limit_s: float
    early_status: dict[str, Any] | None

    def finish(self, stop: bool = False) -> RunResult:
        """Wait for its end, or bring it about. Nothing of it is left behind, however it ended.

        Raises EnvironmentLacks where the walls did not stand.
        """
        if stop:
            os.close(self.life_fd)
        try:
            told = self.early_status or _read_status(
                self.status_fd, self.started_at + self.wall_limit_s + WATCHDOG_GRACE_S
            )
        finally:
            if not stop:
                os.close(self.life_fd)
            os.close(self.status_fd)
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
            raise MissingRequirementError(
                f"the sandbox cannot be built: {words}", where="sandbox", remedy=SANDBOX_REMEDY
            )
        return RunResult(
            ExitKind(told["end"]),
            int(told.get("code", -9)),
            said,
            time.monotonic() - self.started_at,
        )


@dataclass(frozen=True)
class Sandbox:
    """How walls are built here, and by which Python; programs get its standard library and nothing else."""

    isolation: Isolation
    python: str
    limits: SandboxLimits = SandboxLimits()

    def start(self, program: str, channel_fds: Sequence[int] = ()) -> RunningProgram:
        """Start a Python program. channels: descriptors it finds as 3, 4, ...; it has no other but /dev/null and its output."""
        begin = time.monotonic()
        life, alive = os.pipe()
        told, status = os.pipe()
        # Handed over as files, not pipes: nobody has to feed them while the walls go up.
        with tempfile.TemporaryFile() as source:
            source.write(program.encode(errors="surrogatepass"))
            source.seek(0)
            output = tempfile.TemporaryFile()
            fds = {
                "life": life,
                "status": status,
                "program": source.fileno(),
                "output": output.fileno(),
                "keep": list(channel_fds),
            }
            root = os.geteuid() == 0
            own = self.isolation is Isolation.NAMESPACES
            settings = {
                "own": own,
                "uid": NOBODY_UID if root and own else -1,
                "fds": fds,
                "binds": _bind_mount_paths(self.python),
                "links": _root_symlinks(),
                "tmp": self.limits.tmp_bytes,
                "limits": asdict(self.limits),
            }
            command = [
                self.python,
                "-I",
                "-S",
                "-c",
                ISOLATE_SCRIPT.read_text(encoding="utf-8"),
                json.dumps(settings),
            ]
            other: dict[str, Any] = (
                {"user": NOBODY_UID, "group": NOBODY_UID, "extra_groups": ()}
                if root and not own
                else {}
            )
            try:
                process = subprocess.Popen(
                    command if own else [*_bwrap_command(settings), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd="/",
                    env={"LANG": "C.UTF-8"},
                    close_fds=True,
                    pass_fds=(life, status, source.fileno(), output.fileno(), *channel_fds),
                    **other,
                )
            except OSError as error:
                for fd in (life, alive, told, status):
                    os.close(fd)
                raise MissingRequirementError(
                    f"the sandbox cannot be started: {error}",
                    where="sandbox",
                    remedy=SANDBOX_REMEDY,
                ) from error
        os.close(life)
        os.close(status)
        early = _map_namespace_users(process.pid, told, alive, root) if own else None
        return RunningProgram(process, alive, told, output, begin, self.limits.wall_s, early)

    def run(self, program: str) -> RunResult:
        """Run a Python program to its end."""
        return self.start(program).finish()


def _read_status(status_fd: int, deadline: float) -> dict[str, Any]:
    """The watchman's next line; his silence, or his death, is a timeout or a wall that did not stand."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([status_fd], [], [], max(0.0, deadline - time.monotonic()))
        more = os.read(status_fd, 1) if ready else b""
        if not ready:
            return {"end": "timeout"}
        if not more:
            return {"end": "failed", "why": "it ended before the program began"}
        line += more
    found: dict[str, Any] = json.loads(line)
    return found


def _map_namespace_users(
    pid: int, status_fd: int, life_fd: int, is_root: bool
) -> dict[str, Any] | None:
    """Give the new namespace its users: ourselves as 0, and `nobody` where we are root. Returns what the watchman says instead, if he does."""
    first = _read_status(status_fd, time.monotonic() + WATCHDOG_GRACE_S)
    if first["end"] != "unshared":
        return first
    try:
        if not is_root:
            Path(f"/proc/{pid}/setgroups").write_text("deny")
        for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
            Path(f"/proc/{pid}/{name}").write_text(
                f"0 {own} 1\n" + (f"{NOBODY_UID} {NOBODY_UID} 1\n" if is_root else "")
            )
    except OSError as error:
        os.write(life_fd, b"x")
        return {"end": "failed", "why": f"users of the new namespace: {error}"}
    os.write(life_fd, b"m")
    return None


def _bind_mount_paths(python: str) -> list[str]:
    """Folders a Python program needs, none inside another."""
    wanted = [
        "/usr",
        *(p for p in ("/lib", "/lib64") if os.path.isdir(p) and not os.path.islink(p)),
    ]
    prefix = os.path.dirname(os.path.dirname(python))
    return (
        wanted
        if any(prefix == w or prefix.startswith(w + "/") for w in wanted)
        else [*wanted, prefix]
    )


def _root_symlinks() -> dict[str, str]:
    """/lib and the like, where they are links into /usr."""
    return {p: os.readlink(p) for p in ("/lib", "/lib64", "/bin") if os.path.islink(p)}


def _bwrap_command(settings: dict[str, Any]) -> list[str]:
    """Bubblewrap's words for the same walls."""
    words = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--as-pid-1",
        "--cap-drop",
        "ALL",
        "--clearenv",
        "--setenv",
        "LANG",
        "C.UTF-8",
    ]
    for path in settings["binds"]:
        words += ["--ro-bind", path, path]
    for path, target in settings["links"].items():
        words += ["--symlink", target, path]
    return [
        *words,
        "--dev-bind",
        "/dev/null",
        "/dev/null",
        "--size",
        str(settings["tmp"]),
        "--perms",
        "0777",
        "--tmpfs",
        "/tmp",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
        "--",
    ]


ESCAPE_PROBE = r"""
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


def verify_isolation(sandbox: Sandbox) -> None:
    """Try to break out by each way we know. Raises EnvironmentLacks that names every wall that does not hold."""
    with tempfile.NamedTemporaryFile() as canary, socket.create_server(("127.0.0.1", 0)) as server:
        limits, needed = sandbox.limits, _bind_mount_paths(sandbox.python)
        home = Path.home()
        own = (
            sorted(home.iterdir()) if os.access(home, os.R_OK | os.X_OK) else []
        )  # a user without a home has nothing there to hide
        hidden = [
            canary.name,
            *(str(p) for p in own if not any(f"{b}/".startswith(f"{p}/") for b in needed)),
        ]
        probe = ESCAPE_PROBE.format(
            host="127.0.0.1",
            port=server.getsockname()[1],
            hidden=hidden[:100],
            file=limits.max_file_bytes,
            processes=limits.max_processes,
            memory=limits.memory_bytes,
        )
        ran = sandbox.run(probe)
    try:
        held = json.loads(ran.output)
    except ValueError:
        held = {
            f"the self-test itself ({ran.exit_kind} {ran.exit_code}: {ran.output[-200:].decode(errors='replace')!r})": False
        }
    weak = [name for name, holds in held.items() if not holds]
    if weak:
        raise MissingRequirementError(
            f"the sandbox does not hold: {', '.join(weak)}",
            where=f"sandbox, walls of {sandbox.isolation}",
            remedy=SANDBOX_REMEDY,
        )


@cache
def open_sandbox() -> Sandbox:
    """A sandbox that has proven itself: with own walls, or bubblewrap's where it is installed. Once a process.

    Raises EnvironmentLacks where neither holds.
    """
    reasons = []
    for walls in (
        Isolation.NAMESPACES,
        *((Isolation.BUBBLEWRAP,) if shutil.which("bwrap") else ()),
    ):
        sandbox = Sandbox(walls, os.path.realpath(sys.executable))
        try:
            verify_isolation(sandbox)
        except MissingRequirementError as error:
            reasons.append(f"{walls}: {error.message}")
        else:
            return sandbox
    raise MissingRequirementError(
        "no code is run here: " + "; ".join(reasons), where="sandbox", remedy=SANDBOX_REMEDY
    )
