"""More than twenty hostile programs, each in a real sandbox: none gets out.

A sandbox that does not isolate is refused.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from persea.errors import MissingRequirementError
from persea.tasks.sandbox import sandbox as module
from persea.tasks.sandbox.sandbox import (
    ExitKind,
    Isolation,
    RunResult,
    Sandbox,
    SandboxLimits,
    open_sandbox,
    verify_isolation,
)


def of_kind(isolation: Isolation) -> Sandbox:
    """A sandbox with this isolation; nobody may not look into root's home for a Python."""
    is_bubblewrap = isolation is Isolation.BUBBLEWRAP
    python = "/usr/bin/python3" if is_bubblewrap and os.geteuid() == 0 else sys.executable
    if is_bubblewrap and not (shutil.which("bwrap") and Path(python).exists()):
        pytest.skip("bubblewrap or a Python for it is not installed")
    return Sandbox(isolation, os.path.realpath(python))


@pytest.fixture(scope="module", params=list(Isolation), ids=str)
def proven(request: pytest.FixtureRequest) -> Sandbox:
    """Every test runs with each isolation that this machine has."""
    sandbox = of_kind(request.param)
    try:
        verify_isolation(sandbox)
    except MissingRequirementError as error:
        pytest.skip(f"no such sandbox on this machine: {error}")
    return sandbox


@pytest.fixture(scope="module")
def box(proven: Sandbox) -> Sandbox:
    """With little time, so that programs that take all of it end soon."""
    return replace(proven, limits=SandboxLimits(cpu_s=1, wall_s=1.5, memory_bytes=256 << 20))


@pytest.fixture(scope="module")
def secret() -> Iterator[Path]:
    """A file anybody may read and write, outside."""
    with tempfile.NamedTemporaryFile("w", suffix=".secret") as file:
        file.write("the key")
        file.flush()
        os.chmod(file.name, 0o666)
        yield Path(file.name)


def offspring() -> set[str]:
    """Processes that stand below this one, by number and name, from outside all namespaces."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            found[path.name] = fields[1], fields[0]
    mine, names = {str(os.getpid())}, set[str]()
    while more := {p for p, (parent, _) in found.items() if parent in mine} - names:
        names |= more
        mine |= more
    return {p for p in names if found[p][1] != "Z"}


def test_a_program_runs_and_its_output_is_returned(box: Sandbox):
    ran = box.run(
        "import math, sys\nprint(math.isqrt(81))\nprint('aside', file=sys.stderr)\nopen('mine', "
        "'w').write('x')\nsys.exit(3)"
    )
    assert (ran.exit_kind, ran.exit_code, sorted(ran.output.split())) == (
        ExitKind.EXIT,
        3,
        [b"9", b"aside"],
    )


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("", 0),
        ("raise SystemExit", 0),
        ("raise SystemExit('why')", 1),
        ("raise ValueError", 1),
        ("import os\nos._exit(7)", 7),
        ("1 +", 1),
        ("\0", 1),
    ],
)
def test_how_a_program_ends(box: Sandbox, program: str, code: int):
    assert box.run(program).exit_code == code


READS = """
import os
for path in {paths!r}:
    try:
        print(open(path).read()[:20] or "empty", path)
    except OSError:
        pass
print("done")
"""


def test_no_file_of_this_machine_is_read(box: Sandbox, secret: Path):
    paths = [
        "/etc/passwd",
        "/etc/shadow",
        "/etc/hosts",
        str(secret),
        str(Path.home() / ".bashrc"),
        str(Path(__file__)),
        "/proc/self/environ",
        "/proc/1/environ",
        "/proc/1/cmdline",
        "/proc/1/maps",
        "/proc/mounts",
        "/proc/self/fd/3",
        "/sys/kernel/version",
        "/dev/mem",
        "/dev/vda",
    ]
    assert box.run(READS.format(paths=paths)).output == b"done\n"


def test_no_file_of_this_machine_is_written(box: Sandbox, secret: Path):
    here = os.getcwd()
    paths = [
        str(secret),
        f"{here}/canary",
        "/canary",
        "/usr/canary",
        "/usr/bin/env",
        "/dev/canary",
        "/etc/canary",
        str(Path.home() / "canary"),
    ]
    program = (
        f"for path in {paths!r}:\n    try:\n        open(path, 'w').write('x')\n"
        "        print(path)\n    except OSError:\n        pass"
    )
    assert box.run(program).output in (
        b"",
        f"{secret}\n".encode(),
    )  # one of /tmp, where it has a /tmp of its own
    assert secret.read_text() == "the key"
    assert not any(Path(p).exists() for p in paths if "canary" in p)


def test_nothing_is_reached_over_a_network(box: Sandbox):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind("\0persea-test")  # an abstract address, in no folder
        unix.listen()
        program = f"""
import socket
local = ("127.0.0.1", {server.getsockname()[1]})
for family, address in ((2, local), (2, ("10.0.2.2", 80)), (1, "\\0persea-test")):
    with socket.socket(family) as s:
        s.settimeout(1)
        try:
            s.connect(address)
            print("reached", address)
        except OSError as error:
            pass
print("done")"""
        with socket.create_connection(server.getsockname()):  # it is there
            assert box.run(program).output == b"done\n"


def test_the_environment_holds_no_secret(box: Sandbox, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PERSEA_TEST_TOKEN", "the key")
    ran = box.run(
        "import os, ctypes\nprint(dict(os.environ))\nprint(ctypes.string_at(id(os), 1) and '')"
    )
    assert b"PERSEA" not in ran.output
    assert b"LANG" in ran.output


def test_no_descriptor_is_inherited(box: Sandbox):
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        ran = box.run(
            "import os\nfor fd in range(3, 4096):\n    try:\n        print(os.write(fd, b'x'))\n   "
            " except OSError:\n        pass"
        )
    finally:
        os.close(read)
        os.close(write)
    assert ran.output == b""


ENDLESS = {
    "a loop": "while True: pass",
    "a sleep": "import time\ntime.sleep(1000)",
    "signals ignored": (
        "import signal\nfor s in range(1, 65):\n    try:\n        signal.signal(s, "
        "signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True: pass"
    ),
    "waiting for input": "import sys, time\nsys.stdin.read() or time.sleep(1000)",
    "a fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n     "
    "   pass",
    "threads": (
        "import threading, time\nwhile True:\n    try:\n        threading.Thread(target=time.sleep,"
        " args=(1000,)).start()\n"
        "    except (RuntimeError, MemoryError):\n        pass"
    ),
    "its watchman killed": "import os, time\nfor signal in (19, 9, 15):\n    os.kill(1, signal)\n  "
    "  os.kill(os.getppid(), signal)\ntime.sleep(1000)",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_program_is_ended(box: Sandbox, name: str):
    before = offspring()
    ran = box.run(ENDLESS[name])
    assert ran.exit_kind is ExitKind.TIMEOUT or ran.exit_code in (-9, -24)
    assert ran.duration_s < 1.5 + module.WATCHDOG_GRACE_S
    assert offspring() <= before


def test_forks_are_few(box: Sandbox):
    program = (
        "import os, time\nn = 0\ntry:\n    while os.fork():\n        n += 1\n"
        "    time.sleep(9)\nexcept OSError:\n    print(n)"
    )
    assert 1 <= int(box.run(program).output) <= box.limits.max_processes + 1


def test_memory_is_bounded(box: Sandbox):
    patient = replace(box, limits=replace(box.limits, wall_s=10))
    ran = patient.run(
        "try:\n    held = [bytearray(1 << 26) for _ in range(1000)]\nexcept MemoryError:\n    "
        "print('full')"
    )
    assert ran.output == b"full\n"


def test_deep_recursion_ends_only_the_program(box: Sandbox):
    ran = box.run("import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)")
    assert ran.exit_code != 0
    assert ran.duration_s < 1.5 + module.WATCHDOG_GRACE_S


@pytest.mark.parametrize(
    "program",
    [
        "while True: print('x' * 10_000)",
        "import os\nwhile True: os.write(2, b'x' * 10_000)",
        "import signal, os\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nwhile True: os.write(1, "
        "b'x' * 10_000)",
    ],
)
def test_output_is_bounded(box: Sandbox, program: str):
    ran = box.run(program)
    assert ran.exit_code != 0
    assert 1000 < len(ran.output) <= box.limits.max_file_bytes


def test_files_are_bounded(box: Sandbox):
    program = """
import os
total = 0
for k in range(10_000):
    try:
        with open(f"/tmp/{k}", "wb") as file:
            while True:
                total += file.write(bytes(65536))
                file.flush()
    except OSError:
        if k > 40:
            break
print(total, os.path.getsize("/tmp/0"))"""
    total, first = map(int, box.run(program).output.split())
    assert first == box.limits.max_file_bytes
    assert box.limits.max_file_bytes < total <= 2 * box.limits.tmp_bytes


def test_a_sparse_giant_is_refused(box: Sandbox):
    ran = box.run(
        "import os\nfile = open('/tmp/big', 'w')\ntry:\n    os.truncate(file.fileno(), 1 << 40)\n"
        "except OSError as e:\n    print(e.errno)"
    )
    assert ran.output == b"27\n"


def test_a_daemon_does_not_outlive_its_program(box: Sandbox):
    before = offspring()
    ran = box.run(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    os.fork() or time.sleep(1000)\n "
        "   os._exit(0)\nprint('gone')"
    )
    assert (ran.exit_kind, ran.output) == (ExitKind.EXIT, b"gone\n")
    assert ran.duration_s < 1.5
    assert offspring() <= before


def test_links_lead_nowhere(box: Sandbox, secret: Path):
    program = f"""
import os
os.symlink({str(secret)!r}, "/tmp/link")
os.symlink("/proc/1/root/etc/passwd", "/tmp/up")
os.symlink("../../../../../../etc/passwd", "/tmp/dots")
for path in ("/tmp/link", "/tmp/up", "/tmp/dots", "../../../etc/passwd"):
    try:
        print(open(path).read())
    except OSError:
        pass
try:
    os.link("/usr/bin/env", "/tmp/env")
    print("linked")
except OSError:
    pass"""
    assert box.run(program).output == b""


CALLS = {
    "ptrace the watchman": "libc.ptrace(16, 1, 0, 0)",
    "read the watchman's memory": "libc.process_vm_readv(1, ctypes.byref(vec), 1, "
    "ctypes.byref(vec), 1, 0)",
    "a new user namespace": "libc.unshare(0x10000000)",
    "a new mount namespace": "libc.unshare(0x00020000)",
    "mount": "libc.mount(b'none', b'/tmp', b'tmpfs', 0, b'')",
    "remount the root": "libc.mount(b'none', b'/usr', b'', 32 | 4096, b'')",
    "unmount": "libc.umount2(b'/usr', 2)",
    "chroot": "libc.chroot(b'/tmp')",
    "setuid": "libc.setuid(0) or libc.setgid(0)",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "more processes": "resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))",
    "a device": "os.mknod('/tmp/mem', 0o20666, os.makedev(1, 1))",
    "a program of its own": "os.execv('/tmp/own', ['own'])",
}


def test_system_calls_open_nothing(box: Sandbox):
    tries = "\n".join(f"attempt({name!r}, lambda: {call})" for name, call in CALLS.items())
    program = f"""
import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
vec = (ctypes.c_uint64 * 2)(id(os), 8)
open("/tmp/own", "w").write("#!/usr/bin/env python3\\nprint('own')")
os.chmod("/tmp/own", 0o777)
def attempt(name, act):
    try:
        if act() in (0, 1, 8):
            print("HELD NOT", name)
    except (OSError, ValueError):
        pass
    print(name)
{tries}"""
    lines = box.run(program).output.decode().splitlines()
    uid = (
        # Inside, the own user is 0 already; without a capability that has no value.
        "setuid" if os.geteuid() else ""
    )
    assert [x for x in lines if x.startswith("HELD NOT") and x != f"HELD NOT {uid}"] == []
    assert len([x for x in lines if not x.startswith("HELD NOT")]) == len(CALLS)


def test_a_program_ends_with_the_process_that_started_it(box: Sandbox):
    """A program does not outlive the process that started it: the watchman sees the pipe close."""
    running = box.start("import time\ntime.sleep(1000)")
    time.sleep(0.3)
    ran = running.finish(stop=True)
    assert ran.exit_kind is ExitKind.STOPPED
    assert ran.duration_s < 2
    assert running.process.returncode is not None


@pytest.mark.parametrize("walls", Isolation)
def test_both_kinds_of_isolation_hold(walls: Isolation):
    verify_isolation(of_kind(walls))


def test_a_machine_without_namespaces_is_refused(
    proven: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = module.ISOLATE_SCRIPT.read_text()
    call = 'check_syscall(LIBC.unshare(NAMESPACE_FLAGS), "unshare")'
    assert text.count(call) == 1
    (tmp_path / "isolate.py").write_text(
        text.replace(call, 'raise OSError(1, "unshare: Operation not permitted")')
    )
    monkeypatch.setattr(module, "ISOLATE_SCRIPT", tmp_path / "isolate.py")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(
        MissingRequirementError,
        match=r"cannot run untrusted code: namespaces: the sandbox cannot be built: .*not "
        r"permitted",
    ) as caught:
        open_sandbox.__wrapped__()
    assert caught.value.exit_code == 7


def test_a_python_that_cannot_be_started_is_refused(proven: Sandbox):
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(MissingRequirementError, match="cannot be started"):
        Sandbox(Isolation.NAMESPACES, "/usr/bin/no-such-python").run("")
    assert sorted(os.listdir("/proc/self/fd")) == before  # nothing stays open


def test_any_error_of_the_start_closes_what_was_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no process")

    monkeypatch.setattr(module.subprocess, "Popen", broken)
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="no process"):
        Sandbox(Isolation.NAMESPACES, sys.executable).start("")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_supervisor_that_dies_before_its_users_are_mapped_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The write to its pipe then raises BrokenPipeError, which is reported and not raised."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(module, "_read_status", lambda fd, deadline: {"exit_kind": "unshared"})
    monkeypatch.setattr(module.Path, "write_text", lambda self, text: len(text))
    status = module._map_namespace_users(os.getpid(), 0, write, False)
    os.close(write)
    assert status is not None
    assert status["exit_kind"] == "failed"
    assert "Broken pipe" in status["reason"]


def test_a_run_result_is_a_value():
    assert RunResult(ExitKind.EXIT, 0, b"", 0.1) == RunResult(ExitKind("exit"), 0, b"", 0.1)


def test_a_user_without_a_home_has_a_sandbox_too(
    proven: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    verify_isolation(proven)
