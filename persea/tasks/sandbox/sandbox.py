"""Run untrusted programs in Linux namespaces with limits, or refuse to run them.

There is no weaker mode: where this machine cannot build the whole isolation, `open_sandbox` refuses
with the reason and the remedy (exit 7). A self-test tries to escape in fifteen ways before the
first program runs. isolate.py builds the isolation; docs/sandbox.md lists its limits and how
programs are tested.
"""

from __future__ import annotations

import ctypes
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import IO, Any

from persea.errors import MissingRequirementError
from persea.tasks.sandbox.isolate import SYS_KEYCTL

# The user of programs if persea runs as root: the kernel exempts root from the limit on processes.
NOBODY_UID = 65534
WATCHDOG_GRACE_S = 5.0  # after the supervisor's own time limit, before the supervisor is killed too
REAP_TIMEOUT_S = 1.0  # for the supervisor to end after its last status line
SESSION_KEYRING_ID = (0, -3, 0)  # arguments of keyctl: the id of the session keyring, if any
MAX_HIDDEN_PATHS = 100  # entries of the home folder that the self-test looks for
ISOLATE_SCRIPT = Path(__file__).with_name("isolate.py")
SANDBOX_REMEDY = (
    "allow unprivileged user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0, "
    "or a container with --security-opt seccomp=unconfined --security-opt systempaths=unconfined), "
    "or install bubblewrap; or remove the benchmarks that run code from the recipe"
)


class Isolation(StrEnum):
    """The program that builds the isolation."""

    NAMESPACES = "namespaces"  # isolate.py
    BUBBLEWRAP = "bwrap"  # bubblewrap, which some systems allow more than other programs


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a program.

    Attributes:
        cpu_s: Seconds of CPU time.
        wall_s: Seconds of wall time.
        memory_bytes: Address space of one process.
        max_processes: Processes and threads.
        max_open_files: Open files of one process.
        max_file_bytes: Size of a file; also the most output.
        tmp_bytes: Size of /tmp.
    """

    cpu_s: int = 5
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20
    max_processes: int = 8
    max_open_files: int = 32
    max_file_bytes: int = 1 << 20
    tmp_bytes: int = 16 << 20


class ExitKind(StrEnum):
    """How a program ended."""

    EXIT = "exit"
    TIMEOUT = "timeout"
    STOPPED = "stopped"  # by the process that started it


@dataclass(frozen=True)
class RunResult:
    """Result of a program.

    Attributes:
        exit_kind: How it ended.
        exit_code: Exit status; negative = the signal that ended it.
        output: stdout and stderr, at most `SandboxLimits.max_file_bytes`.
        duration_s: Wall time in seconds.
    """

    exit_kind: ExitKind
    exit_code: int
    output: bytes
    duration_s: float


@dataclass(frozen=True, eq=False)
class RunningProgram:
    """A program that has been started. Call `finish` exactly once.

    Attributes:
        process: The supervisor.
        life_fd: Closing this pipe ends the program.
        status_fd: Pipe of the supervisor's status lines.
        output: File of stdout and stderr.
        started_at: `time.monotonic()` of the start.
        wall_limit_s: Seconds of wall time.
        early_status: Status of a supervisor that failed before the program began, else None.
    """

    process: subprocess.Popen[bytes]
    life_fd: int
    status_fd: int
    output: IO[bytes]
    started_at: float
    wall_limit_s: float
    early_status: dict[str, Any] | None

    def finish(self, stop: bool = False) -> RunResult:
        """Wait for the end of the program, and remove every process of it.

        Args:
            stop: End the program now.

        Returns:
            The result.

        Raises:
            MissingRequirementError: If the isolation could not be built (exit 7).
        """
        if stop:
            os.close(self.life_fd)
        try:
            status = self.early_status or _read_status(
                self.status_fd, self.started_at + self.wall_limit_s + WATCHDOG_GRACE_S
            )
        finally:
            if not stop:
                os.close(self.life_fd)
            os.close(self.status_fd)
            try:
                self.process.wait(timeout=REAP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        with self.output as file:
            file.seek(0)
            output = file.read()
        if status["exit_kind"] == "failed":
            message = f"{status['reason']} {output[:300].decode(errors='replace')}".strip()
            raise MissingRequirementError(
                f"the sandbox cannot be built: {message}", where="sandbox", remedy=SANDBOX_REMEDY
            )
        return RunResult(
            ExitKind(status["exit_kind"]),
            int(status.get("exit_code", -9)),
            output,
            time.monotonic() - self.started_at,
        )


@dataclass(frozen=True)
class Sandbox:
    """Runs Python programs in isolation. Programs have the standard library of `python` and nothing
    else.
    """

    isolation: Isolation
    python: str
    limits: SandboxLimits = SandboxLimits()

    def start(self, program: str, channel_fds: Sequence[int] = ()) -> RunningProgram:
        """Start a Python program.

        Args:
            program: Source of the program.
            channel_fds: Descriptors that the program inherits as 3, 4, ...; besides them it has
                /dev/null and its output.

        Returns:
            The running program.

        Raises:
            MissingRequirementError: If Python or bubblewrap cannot be started (exit 7).
        """
        started_at = time.monotonic()
        uses_namespaces = self.isolation is Isolation.NAMESPACES
        is_root = os.geteuid() == 0
        # Close everything that was opened unless the program runs.
        with ExitStack() as inherited, ExitStack() as on_failure:
            inherited_life, life_fd = os.pipe()
            inherited.callback(os.close, inherited_life)
            on_failure.callback(os.close, life_fd)
            status_fd, inherited_status = os.pipe()
            on_failure.callback(os.close, status_fd)
            inherited.callback(os.close, inherited_status)
            # Source and output are files and not pipes, so that no thread has to feed them during
            # the start.
            source = inherited.enter_context(tempfile.TemporaryFile())
            source.write(program.encode(errors="surrogatepass"))
            source.seek(0)
            output = on_failure.enter_context(tempfile.TemporaryFile())
            settings = {
                "use_namespaces": uses_namespaces,
                "uid": NOBODY_UID if is_root and uses_namespaces else -1,
                "fds": {
                    "life": inherited_life,
                    "status": inherited_status,
                    "program": source.fileno(),
                    "output": output.fileno(),
                    "channels": list(channel_fds),
                },
                "binds": _bind_mount_paths(self.python),
                "links": _root_symlinks(),
                "tmp": self.limits.tmp_bytes,
                "limits": asdict(self.limits),
            }
            process = self._start_supervisor(settings, output, is_root and not uses_namespaces)
            on_failure.pop_all()
        early_status = None
        if uses_namespaces:
            early_status = _map_namespace_users(process.pid, status_fd, life_fd, is_root)
        return RunningProgram(
            process, life_fd, status_fd, output, started_at, self.limits.wall_s, early_status
        )

    def _start_supervisor(
        self, settings: dict[str, Any], output: IO[bytes], as_nobody: bool
    ) -> subprocess.Popen[bytes]:
        fds = settings["fds"]
        script = ISOLATE_SCRIPT.read_text(encoding="utf-8")
        command = [self.python, "-I", "-S", "-c", script, json.dumps(settings)]
        if not settings["use_namespaces"]:
            command = [*_bwrap_command(settings), *command]
        user: dict[str, Any] = {}
        if as_nobody:
            user = {"user": NOBODY_UID, "group": NOBODY_UID, "extra_groups": ()}
        inherited = (fds["life"], fds["status"], fds["program"], fds["output"], *fds["channels"])
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env={"LANG": "C.UTF-8"},
                close_fds=True,
                pass_fds=inherited,
                **user,
            )
        except OSError as error:
            raise MissingRequirementError(
                f"the sandbox cannot be started: {error}", where="sandbox", remedy=SANDBOX_REMEDY
            ) from error

    def run(self, program: str) -> RunResult:
        """Run a Python program to its end. Raises as `start` and `RunningProgram.finish` do."""
        return self.start(program).finish()


def _read_status(status_fd: int, deadline: float) -> dict[str, Any]:
    """Return the supervisor's next status line; a timeout if it is silent, a failure if it
    ended.
    """
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([status_fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return {"exit_kind": "timeout"}
        more = os.read(status_fd, 1)
        if not more:
            return {"exit_kind": "failed", "reason": "it ended before the program began"}
        line += more
    status: dict[str, Any] = json.loads(line)
    return status


def _map_namespace_users(
    pid: int, status_fd: int, life_fd: int, is_root: bool
) -> dict[str, Any] | None:
    """Map this user to 0 in the new namespace, and `nobody` too if persea runs as root.

    Returns:
        None, or the status of a supervisor that failed.
    """
    first = _read_status(status_fd, time.monotonic() + WATCHDOG_GRACE_S)
    if first["exit_kind"] != "unshared":
        return first
    try:
        if not is_root:
            Path(f"/proc/{pid}/setgroups").write_text("deny")
        for name, own_id in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
            Path(f"/proc/{pid}/{name}").write_text(
                f"0 {own_id} 1\n" + (f"{NOBODY_UID} {NOBODY_UID} 1\n" if is_root else "")
            )
        os.write(life_fd, b"m")
    except OSError as error:  # also BrokenPipeError, if the supervisor was killed meanwhile
        # `finish` closes the pipe, which ends a supervisor that still waits for its users.
        return {"exit_kind": "failed", "reason": f"users of the new namespace: {error}"}
    return None


def _bind_mount_paths(python: str) -> list[str]:
    """Return the folders that a Python program needs, none inside another."""
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
    """Return /lib and the like, if they are links into /usr: link -> target."""
    return {p: os.readlink(p) for p in ("/lib", "/lib64", "/bin") if os.path.islink(p)}


def _bwrap_command(settings: dict[str, Any]) -> list[str]:
    """Return the command line with which bubblewrap builds the same isolation."""
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--disable-userns",
        "--as-pid-1",
        "--hostname",
        "sandbox",
        "--cap-drop",
        "ALL",
        "--clearenv",
        "--setenv",
        "LANG",
        "C.UTF-8",
    ]
    for path in settings["binds"]:
        command += ["--ro-bind", path, path]
    for path, target in settings["links"].items():
        command += ["--symlink", target, path]
    return [
        *command,
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
host, port, hidden, keyring, keyctl = {host!r}, {port!r}, {hidden!r}, {keyring!r}, {keyctl!r}
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
def own_program():
    with open("/tmp/own", "w") as file:
        file.write("#!" + sys.executable)
    os.chmod("/tmp/own", 0o755)
    os.waitpid(os.posix_spawn("/tmp/own", ["own"], {{}}), 0)
capabilities = (ctypes.c_uint32 * 6)()
libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), capabilities)
results = dict(
    network=fails(lambda: socket.create_connection((host, port), 1)),
    files=not any(os.path.exists(p) for p in ("/etc/passwd", "/proc/self", "/sys", *hidden)),
    root=all(fails(lambda p=p: write(p))
        for p in ("/canary", "/usr/canary", "/dev/canary", sys.executable))
        and all(os.statvfs(p).f_flag & os.ST_RDONLY for p in ("/", "/usr", sys.base_prefix)),
    tmp=not fails(lambda: write("/tmp/mine")) and os.getcwd() == "/tmp",
    environment=set(os.environ) <= {{"LANG", "LC_CTYPE", "PWD"}},
    descriptors=all(fails(lambda fd=fd: os.fstat(fd)) for fd in range(3, 4096)),
    processes=os.getppid() == 1,
    capabilities=not any(capabilities) and libc.prctl(39, 0, 0, 0, 0) == 1,
    namespaces=fails(unshare),
    memory=fails(lambda: bytearray({memory})),
    size=fails(big),
    keyring=keyring <= 0 or libc.syscall(keyctl, 0, -3, 0) != keyring,
    hostname=socket.gethostname() == "sandbox",
    root_entries=set(os.listdir("/")) <= {entries!r},
    programs=fails(own_program),
    forks=fails(many),
)
print(json.dumps(results))
"""


def verify_isolation(sandbox: Sandbox) -> None:
    """Run a program that tries every known way to escape.

    Raises:
        MissingRequirementError: If a way is open; the message names every one (exit 7).
    """
    with tempfile.NamedTemporaryFile() as canary, socket.create_server(("127.0.0.1", 0)) as server:
        limits, needed = sandbox.limits, _bind_mount_paths(sandbox.python)
        home = Path.home()
        # A user without a home has nothing there to hide.
        entries = sorted(home.iterdir()) if os.access(home, os.R_OK | os.X_OK) else []
        hidden = [
            canary.name,
            *(str(p) for p in entries if not any(f"{b}/".startswith(f"{p}/") for b in needed)),
        ]
        probe = ESCAPE_PROBE.format(
            host="127.0.0.1",
            port=server.getsockname()[1],
            hidden=hidden[:MAX_HIDDEN_PATHS],
            file=limits.max_file_bytes,
            processes=limits.max_processes,
            memory=limits.memory_bytes,
            keyring=ctypes.CDLL(None).syscall(SYS_KEYCTL, *SESSION_KEYRING_ID),
            keyctl=SYS_KEYCTL,
            entries={"dev", "tmp", *(p.split("/")[1] for p in (*needed, *_root_symlinks()))},
        )
        result = sandbox.run(probe)
    try:
        passed = json.loads(result.output)
    except ValueError:
        end = result.output[-200:].decode(errors="replace")
        passed = {f"the self-test itself ({result.exit_kind} {result.exit_code}: {end!r})": False}
    failed = [name for name, ok in passed.items() if not ok]
    if failed:
        raise MissingRequirementError(
            f"the sandbox does not isolate: {', '.join(failed)}",
            where=f"sandbox, {sandbox.isolation}",
            remedy=SANDBOX_REMEDY,
        )


@cache
def open_sandbox(limits: SandboxLimits = SandboxLimits()) -> Sandbox:
    """Return a sandbox that passed its self-test; tested once in a process for each set of limits.

    Bubblewrap is tried first if it is installed, then own namespaces.

    Raises:
        MissingRequirementError: If neither isolates programs on this machine (exit 7).
    """
    reasons = []
    kinds = (
        *((Isolation.BUBBLEWRAP,) if shutil.which("bwrap") else ()),
        Isolation.NAMESPACES,
    )
    for isolation in kinds:
        sandbox = Sandbox(isolation, os.path.realpath(sys.executable), limits)
        try:
            verify_isolation(sandbox)
        except MissingRequirementError as error:
            reasons.append(f"{isolation}: {error.message}")
        else:
            return sandbox
    raise MissingRequirementError(
        "this machine cannot run untrusted code: " + "; ".join(reasons),
        where="sandbox",
        remedy=SANDBOX_REMEDY,
    )
