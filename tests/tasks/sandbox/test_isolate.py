"""Each wall is needed: with any of them taken away, the self-test says which is missing, and nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.errors import MissingRequirementError
from persea.tasks.sandbox import sandbox as module
from persea.tasks.sandbox.sandbox import Isolation, open_sandbox, verify_isolation

WEAK = {  # the wall the self-test must miss -> what is taken away
    "capabilities": ('PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no', 'PR_SET_DUMPABLE, 0, 0, 0, 0), "no'),
    "forks": ('limits["processes"] + 2', "500"),
    "memory": ('limits["memory"]', "1 << 40"),
    "size": ('limits["file"]', "1 << 30"),
    "root": ("seal(root, MS_RDONLY | ", "seal(root, "),
    "files": (
        'os.mkdir(root + "/tmp")',
        'os.mkdir(root + "/tmp"), os.mkdir(root + "/etc"), mount("/etc", root + "/etc", flags=MS_BIND | MS_REC)',
    ),
    "namespaces": ('file.write("0")', 'file.write("9")'),
    "network": ("| 0x40000000 |", "|"),
    "descriptors": ("os.closerange(3 + len(kept), ", "os.closerange(4000 + len(kept), "),
    "processes": ("| 0x20000000 |", "|"),
}


@pytest.mark.parametrize("name", WEAK)
def test_a_wall_that_does_not_stand_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    try:
        proven = open_sandbox()
    except MissingRequirementError as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    if proven.isolation is not Isolation.NAMESPACES:
        pytest.skip("here bubblewrap builds the walls")
    before, after = WEAK[name]
    text = module.ISOLATE_SCRIPT.read_text()
    assert text.count(before) == 1
    (tmp_path / "jail.py").write_text(text.replace(before, after))
    monkeypatch.setattr(module, "ISOLATE_SCRIPT", tmp_path / "jail.py")
    with pytest.raises(MissingRequirementError, match=name) as caught:
        verify_isolation(proven)
    assert caught.value.exit_code == 7
    assert "bubblewrap" in caught.value.remedy
