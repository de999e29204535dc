"""Every error is one line with failure, place and remedy, and has its exit code."""

from __future__ import annotations

import pickle
import signal

import pytest

from persea import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.RecipeError, 2),
        (errors.DataError, 3),
        (errors.RefusedError, 4),
        (errors.TeacherError, 5),
        (errors.StorageError, 6),
        (errors.MissingRequirementError, 7),
    ],
)
def test_an_error_is_one_line_with_place_and_remedy(
    kind: type[errors.PerseaError], code: int
) -> None:
    error = kind("the door is shut", where="house:3", remedy="open it")
    assert str(error) == "house:3: the door is shut -> open it"
    assert (error.exit_code, error.message, error.where, error.remedy) == (
        code,
        "the door is shut",
        "house:3",
        "open it",
    )
    assert str(kind("alone")) == "alone"


def test_outside_text_cannot_steer_a_terminal() -> None:
    error = errors.DataError("a\x1b[2Jb\x07", where="\u202ename\ud800", remedy="c\rd")
    assert str(error) == "\\u202ename\\ud800: a\\x1b[2Jb\\x07 -> c\\rd"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert errors.make_printable("ไทย\n你好 👍🏽") == "ไทย\n你好 👍🏽"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_has_the_shells_exit_code(number: int, code: int) -> None:
    assert errors.RunInterrupted(number).exit_code == code
    assert signal.Signals(number).name in str(errors.RunInterrupted(number))
