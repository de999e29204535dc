"""Every protection is needed: with any of them removed, the self-test names it, and no program
runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.errors import MissingRequirementError
from persea.tasks.sandbox import sandbox as module
from persea.tasks.sandbox.sandbox import Isolation, open_sandbox, verify_isolation
from tests.tasks.sandbox.test_sandbox import of_kind

WEAKENED = {  # protection that the self-test must report -> text of isolate.py and its replacement
    "capabilities": ('PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no', 'PR_SET_DUMPABLE, 0, 0, 0, 0), "no'),
    "keyring": ("        leave_session()\n", ""),
    "hostname": ('LIBC.sethostname(b"sandbox", 7)', "0"),
    "root_entries": (
        'os.mkdir(root + "/tmp")',
        'os.mkdir(root + "/tmp"), os.mkdir(root + "/session")',
    ),
    "forks": ('limits["max_processes"] + 2', "500"),
    "memory": ('limits["memory_bytes"]', "1 << 40"),
    "size": ('limits["max_file_bytes"]', "1 << 30"),
    "root": ("set_mount_flags(root, MS_RDONLY | ", "set_mount_flags(root, "),
    "files": (
        'os.mkdir(root + "/tmp")',
        'os.mkdir(root + "/tmp"), os.mkdir(root + "/etc"), mount("/etc", root + "/etc", '
        "flags=MS_BIND | MS_REC)",
    ),
    "namespaces": ('file.write("0")', 'file.write("9")'),
    "network": ("| 0x40000000 |", "|"),
    "descriptors": ("os.closerange(3 + len(moved), ", "os.closerange(4000 + len(moved), "),
    "processes": ("| 0x20000000 |", "|"),
    "programs": ("MS_NOSUID | MS_NODEV | MS_NOEXEC,", "MS_NOSUID | MS_NODEV,"),
}


def test_bubblewrap_without_its_rule_for_programs_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = of_kind(Isolation.BUBBLEWRAP)
    text = module.ISOLATE_SCRIPT.read_text()
    before = "            forbid_other_programs("
    assert text.count(before) == 1
    (tmp_path / "isolate.py").write_text(text.replace(before, "            len("))
    monkeypatch.setattr(module, "ISOLATE_SCRIPT", tmp_path / "isolate.py")
    with pytest.raises(MissingRequirementError, match="programs"):
        verify_isolation(box)


@pytest.mark.parametrize("name", WEAKENED)
def test_a_missing_protection_is_reported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    try:
        proven = open_sandbox()
    except MissingRequirementError as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    if proven.isolation is not Isolation.NAMESPACES:
        pytest.skip("here bubblewrap builds the isolation")
    before, after = WEAKENED[name]
    text = module.ISOLATE_SCRIPT.read_text()
    assert text.count(before) == 1
    (tmp_path / "isolate.py").write_text(text.replace(before, after))
    monkeypatch.setattr(module, "ISOLATE_SCRIPT", tmp_path / "isolate.py")
    with pytest.raises(MissingRequirementError, match=name) as caught:
        verify_isolation(proven)
    assert caught.value.exit_code == 7
    assert "bubblewrap" in caught.value.remedy
