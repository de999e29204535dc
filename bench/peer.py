"""The version of TRL that the figures were measured with."""

from __future__ import annotations

import sys

TRL = "1.16.0"


def has_trl() -> bool:
    """Return whether TRL is installed; print a hint where it is not.

    Exits where its version is not the measured one, because the figures hold for that version only.
    """
    try:
        from trl import __version__
    except ModuleNotFoundError as error:
        print(f"{error}: TRL's columns are left out; pip install -e '.[bench]'", file=sys.stderr)
        return False
    if __version__ != TRL:
        sys.exit(
            f"trl {__version__}: these figures were measured with {TRL}; pip install -e '.[bench]'"
        )
    return True
