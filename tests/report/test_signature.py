"""A signature holds for the files that were signed, and for the key alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from persea.errors import DataError
from persea.report.signature import sign_student, verify_signature


def write_keys(folder: Path) -> tuple[Path, Path]:
    """A pair of an elliptic curve in PEM."""
    ec = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ec")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / "key.pem", folder / "key.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


def test_a_signed_student_verifies_until_a_byte_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("model_signing.signing", exc_type=ImportError)
    private, public = write_keys(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = write_keys(tmp_path / "other")
    student = tmp_path / "student"
    student.mkdir()
    (student / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(DataError, match="no lineage record to sign"):
        sign_student(student, private)
    (student / "lineage.json").write_text("{}")
    with pytest.raises(DataError, match="the student is not signed"):
        verify_signature(student, public)
    with pytest.raises(DataError, match="cannot sign"):
        sign_student(student, tmp_path / "none.pem")
    (student / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    for _ in range(2):  # a second signature replaces the first, and does not sign it
        sign_student(student, private)
        verify_signature(student, public)
    monkeypatch.chdir(tmp_path)
    verify_signature(Path("student"), public)
    with pytest.raises(DataError, match="the signature does not hold"):
        verify_signature(student, other)
    (student / ".gitattributes").write_text("")
    with pytest.raises(DataError, match=r"the signature does not hold.*gitattributes"):
        verify_signature(student, public)
    sign_student(student, private)
    (student / "added.txt").write_text("x")
    with pytest.raises(DataError, match=r"the signature does not hold.*added\.txt"):
        verify_signature(student, public)
    (student / "added.txt").unlink()
    (student / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(DataError, match="the signature does not hold"):
        verify_signature(student, public)
