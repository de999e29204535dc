"""Isolate this process, then run an untrusted program as its child. Standard library only: this
file is sent as text.

sandbox.py starts this text with `python -I -S -c` and passes the settings as JSON in argv[1]. In
this order it creates own user, mount, net, pid, ipc, uts and cgroup namespaces; a root of a few
read-only folders, without /proc, /sys, /etc and home; a small /tmp in memory; drops all
capabilities and every way to gain one; and sets limits. Process 1 of the namespace stays here as
the supervisor; the program is its child and ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import sys
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
# user, mount, net, pid, ipc, uts, cgroup
NAMESPACE_FLAGS = (
    0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x02000000
)
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
# on every architecture
SYS_MOUNT_SETATTR = 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_PATH_BENEATH, LANDLOCK_EXECUTE = 1, 1
CAPABILITY_HEADER = (0x20080522, 0)  # version 3, this process
KEYCTL_JOIN_SESSION_KEYRING = 1
# keyctl has another number on each architecture; 219 is that of all newer ones
SYS_KEYCTL = {"x86_64": 250, "ppc64le": 271, "s390x": 280}.get(os.uname().machine, 219)
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 24, 38
# Mount points of the new root: the first that hides none of the folders that go into it.
ROOT_CANDIDATES = ("/tmp", "/run", "/mnt")
LIBC = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    )


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def check_syscall(result: int, call_name: str) -> int:
    """Return the result of a system call.

    Raises:
        OSError: If the call failed; the message names it.
    """
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{call_name}: {os.strerror(ctypes.get_errno())}")
    return result


def mount(
    source: str, target: str, filesystem: str = "", flags: int = 0, options: str = ""
) -> None:
    """Mount a file system, or bind a folder."""
    check_syscall(
        LIBC.mount(
            source.encode(),
            target.encode(),
            filesystem.encode(),
            ctypes.c_ulong(flags),
            options.encode(),
        ),
        f"mount {filesystem or 'bind'} {source}",
    )


def set_mount_flags(path: str, flags: int, recursive: bool) -> None:
    """Add flags such as MS_RDONLY to a mount, and to the mounts below it if recursive."""
    attributes = _MountAttributes(flags, 0, 0, 0)
    check_syscall(
        LIBC.syscall(
            SYS_MOUNT_SETATTR,
            AT_FDCWD,
            path.encode(),
            AT_RECURSIVE if recursive else 0,
            ctypes.byref(attributes),
            ctypes.c_size_t(ctypes.sizeof(attributes)),
        ),
        f"mount_setattr {path}",
    )


def build_root(settings: dict[str, Any]) -> None:
    """Enter a new root of the folders in `binds`, read-only, with an own /tmp.

    Needs an own mount namespace and CAP_SYS_ADMIN in it.
    """
    with open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as file:
        file.write("0")  # nested namespaces would give capabilities back
    check_syscall(LIBC.sethostname(b"sandbox", 7), "sethostname")
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    root = next(
        p
        for p in ROOT_CANDIDATES
        if os.path.isdir(p) and not any(b == p or b.startswith(p + "/") for b in settings["binds"])
    )
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=256,mode=0755")
    for path in settings["binds"]:
        os.makedirs(root + path, exist_ok=True)
        mount(path, root + path, flags=MS_BIND | MS_REC)
        set_mount_flags(root + path, MS_RDONLY | MS_NOSUID | MS_NODEV, recursive=True)
    for path, target in settings["links"].items():
        os.symlink(target, root + path)
    os.mkdir(root + "/dev")
    with open(root + "/dev/null", "w", encoding="ascii"):
        pass
    mount("/dev/null", root + "/dev/null", flags=MS_BIND)
    os.mkdir(root + "/tmp")
    mount(
        "tmpfs",
        root + "/tmp",
        "tmpfs",
        MS_NOSUID | MS_NODEV | MS_NOEXEC,
        f"size={settings['tmp']},nr_inodes=1024,mode=0777",
    )
    set_mount_flags(root, MS_RDONLY | MS_NOSUID | MS_NODEV, recursive=False)
    os.chdir(root)
    check_syscall(LIBC.pivot_root(b".", b"."), "pivot_root")
    # The old root is now mounted over the new one, and is removed.
    check_syscall(LIBC.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/tmp")


def leave_session() -> None:
    """Leave the session keyring, which holds keys of the user's login, for an empty one.

    Where a container forbids the call, it forbids every use of keyrings; the self-test looks.
    """
    LIBC.syscall(SYS_KEYCTL, KEYCTL_JOIN_SESSION_KEYRING, None)


def drop_privileges(uid: int) -> None:
    """Drop groups and capabilities, and every way to gain a capability.

    Args:
        uid: User and group to change to; -1 = keep the current ones.
    """
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # EINVAL after the last one; a missing right shows in the self-test
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    check_syscall(
        LIBC.capset((ctypes.c_uint32 * 2)(*CAPABILITY_HEADER), (ctypes.c_uint32 * 6)()), "capset"
    )
    check_syscall(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    # No other process may read the memory of the supervisor.
    check_syscall(LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")


def forbid_other_programs(folders: list[str]) -> None:
    """Let only programs in these folders be executed, for this process and its children.

    Bubblewrap mounts a /tmp from which programs can be executed, and has no option against it.
    Needs `no_new_privs`.
    """
    handled = ctypes.c_uint64(LANDLOCK_EXECUTE)
    size = ctypes.c_size_t(ctypes.sizeof(handled))
    rules = check_syscall(
        LIBC.syscall(SYS_LANDLOCK_CREATE_RULESET, ctypes.byref(handled), size, 0), "landlock"
    )
    for path in folders:
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = ctypes.byref(_PathBeneath(LANDLOCK_EXECUTE, folder))
        check_syscall(
            LIBC.syscall(SYS_LANDLOCK_ADD_RULE, rules, LANDLOCK_PATH_BENEATH, rule, 0), "landlock"
        )
        os.close(folder)
    check_syscall(LIBC.syscall(SYS_LANDLOCK_RESTRICT_SELF, rules, 0), "landlock")
    os.close(rules)


def run_program(settings: dict[str, Any]) -> None:
    """Run the program in the child process, with limits, three descriptors and its channels. Never
    returns.
    """
    fds = settings["fds"]
    with os.fdopen(fds["program"], "rb", closefd=False) as file:
        program = file.read()
    os.setsid()
    channels = fds["channels"]
    first_free = max([*channels, 3 + len(channels), 64]) + 1
    # Move the channels to free numbers first: old and new numbers may overlap.
    moved = [os.dup2(fd, first_free + k) for k, fd in enumerate(channels)]
    null, out = os.open("/dev/null", os.O_RDONLY), os.dup(fds["output"])
    for number, fd in enumerate((null, out, out, *moved)):
        os.dup2(fd, number, inheritable=True)
    os.closerange(3 + len(moved), max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536))
    limits = settings["limits"]
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits["max_file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["max_open_files"]),
        (resource.RLIMIT_NPROC, limits["max_processes"] + 2),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
    ):
        resource.setrlimit(kind, (limit, limit))
    # A program can ignore the signal of the soft limit, but not that of the hard limit.
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(program, "<program>", "exec"), names)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        with contextlib.suppress(BaseException):
            traceback.print_exc()
        code = 1
    else:
        code = 0
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code & 255)


def wait_for_program(child: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Wait until the program ends, its time is over, or the parent closes the `life` pipe.

    Returns:
        The status line: exit_kind, and exit_code (negative = signal) after an exit.
    """
    pidfd = os.pidfd_open(child)
    ready, _, _ = select.select(
        [pidfd, settings["fds"]["life"]], [], [], settings["limits"]["wall_s"]
    )
    if pidfd not in ready:
        return {"exit_kind": "stopped" if ready else "timeout"}
    _, status = os.waitpid(child, 0)
    return {"exit_kind": "exit", "exit_code": os.waitstatus_to_exitcode(status)}


def main() -> None:
    """Isolate this process, run the program and write status lines to the status pipe."""
    settings = json.loads(sys.argv[1])
    fds = settings["fds"]

    def report(status: dict[str, Any]) -> None:
        os.write(fds["status"], json.dumps(status).encode() + b"\n")

    try:
        if settings["use_namespaces"]:
            check_syscall(LIBC.unshare(NAMESPACE_FLAGS), "unshare")
            report({"exit_kind": "unshared"})
            if os.read(fds["life"], 1) != b"m":  # the parent has mapped the users
                return
            if first := os.fork():
                os.waitpid(first, 0)
                return
            build_root(settings)
        leave_session()
        drop_privileges(settings["uid"])
        if not settings["use_namespaces"]:
            forbid_other_programs(settings["binds"])
        child = os.fork()
    except (OSError, AttributeError, StopIteration) as error:
        report({"exit_kind": "failed", "reason": str(error) or type(error).__name__})
        os._exit(1)
    if not child:
        run_program(settings)
    for fd in (fds["output"], fds["program"], *fds["channels"]):
        os.close(fd)
    report(wait_for_program(child, settings))
    os._exit(0)  # process 1 of the namespace: the kernel ends all remaining processes


if __name__ == "__main__":
    main()
