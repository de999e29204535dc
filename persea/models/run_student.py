"""Open the student of a run only if its files are those that the training wrote."""

from __future__ import annotations

from pathlib import Path

from persea import storage
from persea.errors import DataError

STAGE_RECORD = "done.json"


def refuse_changed_student(student: Path, where: str) -> None:
    """Refuse a run's student whose files differ from the record of its training.

    Args:
        student: The folder `RUN/train/student`. A folder without the record of a training beside it
            is not a run's student, and is accepted.
        where: The place for error messages.

    Raises:
        DataError: A file is missing or changed, or the record is damaged.
    """
    record_file = student.parent / STAGE_RECORD
    if student.name != "student" or not record_file.is_file():
        return
    remedy = (
        "restore the file from a backup; or delete it and run the recipe again with the same "
        "--out: the training ends again from its last checkpoint"
    )
    record = storage.read_json_with_checksum(record_file, remedy)
    for name, digest in record["outputs"].items():
        path = student.parent / name
        if path.parts[len(student.parent.parts)] != student.name:
            continue
        if not path.is_file() or storage.digest_file(path) != digest:
            raise DataError(
                f"{path} is not the file that the training wrote", where=where, remedy=remedy
            )
