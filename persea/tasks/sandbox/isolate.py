"""What runs in the sandbox before a stranger's program does: it builds the walls, then keeps watch. Standard library only.

sandbox.py starts this text with `python -I -S -c`, its settings as JSON in argv[1]. What it builds, in this order: own user, mount, net, pid,
ipc, uts and cgroup namespaces; a root of a few read-only folders, with no /proc, no /sys, no /etc and no home; a small /tmp in memory; no
capability and no way to gain one; limits. Process 1 stays here as the watchman; the program is its child and dies with it.
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

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    4096,
    16384,
    1 << 18,
)
NAMESPACE_FLAGS = (
    0x10000000 | 0x00020000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x02000000
)  # user, mount, net, pid, ipc, uts, cgroup
MNT_DETACH, AT_FDCWD, AT_RECURSIVE, SYS_MOUNT_SETATTR = (
    2,
    -100,
    0x8000,
    442,
)  # the call has this number on every architecture
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 24, 38
ROOT_CANDIDATES = (
    "/tmp",
    "/run",
    "/mnt",
)  # where the new root is laid: the first that hides nothing it is made of
LIBC = ctypes.CDLL(None, use_errno=True)


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns", ctypes.c_uint64),
    )


def check_syscall(result: int, call_name: str) -> None:
    """Raises OSError with the call's name where a system call failed."""
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{call_name}: {os.strerror(ctypes.get_errno())}")


def mount(
    source: str, target: str, filesystem: str = "", flags: int = 0, options: str = ""
) -> None:
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
    """Make a mount, and the mounts below it, read-only or the like, whatever flags they have already."""
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
    """A new root of the `binds`, read-only, with a /tmp of its own. Wants an own mount namespace and its CAP_SYS_ADMIN."""
    with open("/proc/sys/user/max_user_namespaces", "w", encoding="ascii") as file:
        file.write("0")  # no namespaces within: the only other way back to capabilities
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
    check_syscall(
        LIBC.pivot_root(b".", b"."), "pivot_root"
    )  # the old root now lies upon the new one, and goes
    check_syscall(LIBC.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/tmp")


def drop_privileges(uid: int) -> None:
    """No groups, another user where one is mapped, no capabilities, and none by any program that is started."""
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # EINVAL: past the last; a lack of right shows below, where the set is not empty
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    check_syscall(
        LIBC.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()), "capset"
    )
    check_syscall(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check_syscall(
        LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable"
    )  # the watchman's memory is nobody's


def run_program(settings: dict[str, Any]) -> None:
    """The child: limits, three descriptors and its channels, then the program. Never returns."""
    fds = settings["fds"]
    with os.fdopen(fds["program"], "rb", closefd=False) as file:
        program = file.read()
    os.setsid()
    last = max(fds["keep"] + [3 + len(fds["keep"]), 64]) + 1
    kept = [
        os.dup2(fd, last + k) for k, fd in enumerate(fds["keep"])
    ]  # out of the way first: their numbers may overlap
    null, out = os.open("/dev/null", os.O_RDONLY), os.dup(fds["output"])
    for place, fd in enumerate((null, out, out, *kept)):
        os.dup2(fd, place, inheritable=True)
    os.closerange(3 + len(kept), max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536))
    limits = settings["limits"]
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, limits["file"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_NPROC, limits["processes"] + 2),
        (resource.RLIMIT_AS, limits["memory"]),
    ):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(
        resource.RLIMIT_CPU, (limits["cpu"], limits["cpu"] + 1)
    )  # the second limit cannot be ignored
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
    """Until the program ends, its time is over, or whoever asked is gone."""
    pidfd = os.pidfd_open(child)
    ready, _, _ = select.select(
        [pidfd, settings["fds"]["life"]], [], [], settings["limits"]["wall"]
    )
    if pidfd not in ready:
        return {"end": "stopped" if ready else "timeout"}
    _, status = os.waitpid(child, 0)
    return {"end": "exit", "code": os.waitstatus_to_exitcode(status)}  # negative: the signal


def main() -> None:
    settings = json.loads(sys.argv[1])
    fds = settings["fds"]

    def tell(what: dict[str, Any]) -> None:
        os.write(fds["status"], json.dumps(what).encode() + b"\n")

    try:
        if settings["own"]:
            check_syscall(LIBC.unshare(NAMESPACE_FLAGS), "unshare")
            tell({"end": "unshared"})
            if os.read(fds["life"], 1) != b"m":  # whoever asked maps the users, then says so
                return
            if first := os.fork():
                os.waitpid(first, 0)
                return
            build_root(settings)
        drop_privileges(settings["uid"])
        child = os.fork()
    except (OSError, AttributeError, StopIteration) as error:
        tell({"end": "failed", "why": str(error) or type(error).__name__})
        os._exit(1)
    if not child:
        run_program(settings)
    for fd in (fds["output"], fds["program"], *fds["keep"]):
        os.close(fd)
    tell(wait_for_program(child, settings))
    os._exit(0)  # process 1 of its namespace: the kernel ends all that the program left


if __name__ == "__main__":
    main()
