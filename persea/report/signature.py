"""Sign a student's folder, and verify the signature, with OpenSSF's model-signing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persea.errors import DataError, MissingRequirementError
from persea.report.lineage import RECORD_FILE

SIGNATURE_FILE = "model.sig"


def sign_student(student: Path, private_key: Path) -> Path:
    """Sign every file of a student's folder with a private key of an elliptic curve.

    Args:
        student: The student's folder, with its lineage record.
        private_key: A PEM file.

    Returns:
        The signature's file.

    Raises:
        DataError: The folder has no lineage record, or the key cannot be read.
        MissingRequirementError: The package model-signing is not installed.
    """
    if not (student / RECORD_FILE).is_file():
        raise DataError(
            "the student has no lineage record to sign",
            where=str(student),
            remedy="run `persea run RECIPE` to its end first",
        )
    signature = student / SIGNATURE_FILE
    config = _model_signing("signing").Config().set_hashing_config(_hashing_config())
    try:
        config.use_elliptic_key_signer(private_key=private_key).sign(student, signature)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"cannot sign: {error}",
            where=str(private_key),
            remedy="give a private key in PEM: openssl ecparam -name prime256v1 -genkey -noout",
        ) from error
    return signature


def verify_signature(student: Path, public_key: Path) -> None:
    """Verify the signature of a student's folder.

    Args:
        student: The student's folder.
        public_key: A PEM file with the public key.

    Raises:
        DataError: There is no signature, or it is not one of these files and this key.
        MissingRequirementError: The package model-signing is not installed.
    """
    signature = student / SIGNATURE_FILE
    if not signature.is_file():
        raise DataError(
            "the student is not signed",
            where=str(student),
            remedy="sign it: persea lineage sign RUN --key FILE",
        )
    config = _model_signing("verifying").Config().set_hashing_config(_hashing_config())
    try:
        config.use_elliptic_key_verifier(public_key=public_key).verify(student, signature)
    except Exception as error:  # model-signing, sigstore and cryptography raise their own kinds
        raise DataError(
            f"the signature does not hold: {str(error).splitlines()[0]}",
            where=str(signature),
            remedy="get the student again from its publisher, with the right public key",
        ) from error


def _hashing_config() -> Any:
    """Return the settings that hash every file of the folder but the signature itself.

    model-signing's own default also leaves out .gitattributes and the like.
    """
    config = _model_signing("hashing").Config()
    # a path of model-signing's is relative to the model's folder
    return config.set_ignored_paths(paths=[SIGNATURE_FILE], ignore_git_paths=False)


def _model_signing(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise MissingRequirementError(
            f"signatures need model-signing and pyOpenSSL ({error})",
            where="persea lineage",
            remedy="pip install 'persea[sign]'",
        ) from error
