"""The table of licences, of checkpoints with a licence of their own, and of the terms of servers.

The facts are data, `licences.yaml`; this module finds the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from functools import cache
from ipaddress import ip_address
from pathlib import Path

import yaml
from license_expression import get_spdx_licensing
from pydantic import TypeAdapter

TABLE_FILE = Path(__file__).with_name("licences.yaml")
OWN_NETWORK_SUFFIXES = ("localhost", ".local", ".internal", ".lan", ".home.arpa")


class Use(StrEnum):
    """Intended use of a student.

    RESEARCH and INTERNAL stay with the user; INTERNAL serves a business. COMMERCIAL offers the
    student to others, as weights or as a service. PUBLISH gives the weights away.
    """

    RESEARCH = "research"
    INTERNAL = "internal"
    COMMERCIAL = "commercial"
    PUBLISH = "publish"

    @property
    def reaches_others(self) -> bool:
        """Whether somebody else receives the student or its service."""
        return self in (Use.COMMERCIAL, Use.PUBLISH)


class Relation(StrEnum):
    """How a student relates to a model or a data set."""

    BASE = "base"
    TEACHER = "teacher"
    DATA = "data"
    REFERENCE = "reference"


class Distillation(StrEnum):
    """Whether a model may learn from the outputs or logits. SILENT = no clause was found."""

    YES = "yes"
    CONDITIONS = "conditions"
    SILENT = "silent"
    NO = "no"
    UNKNOWN = "unknown"


BOTH = (Relation.BASE, Relation.TEACHER)


def has_relation(relations: Iterable[Relation], relation: Relation) -> bool:
    """Return whether a rule for `relations` applies; data count as teachers."""
    return (Relation.TEACHER if relation is Relation.DATA else relation) in relations


@dataclass(frozen=True)
class Duty:
    """What the user of a student owes.

    Attributes:
        kind: attribution, notice, policy, terms, copy, threshold or name.
        text: The duty; for a notice its wording.
        roles: Relations to the model that the duty follows.
    """

    kind: str
    text: str
    roles: tuple[Relation, ...] = BOTH


@dataclass(frozen=True)
class LicenceRow:
    """One licence, or the terms of one service. The head of `licences.yaml` explains the fields."""

    id: str
    title: str
    distillation: Distillation
    source: str
    read: date
    confidence: str
    names: tuple[str, ...] = ()
    hub: str = ""
    note: str = ""
    uses: tuple[Use, ...] = tuple(Use)
    except_bases: tuple[str, ...] = ()
    name_prefix: str = ""
    name_roles: tuple[Relation, ...] = BOTH
    carried: tuple[Relation, ...] = ()
    duties: tuple[Duty, ...] = ()
    with_weights: tuple[str, ...] = ()
    not_in: tuple[str, ...] = ()
    sha256: str = ""


@dataclass(frozen=True)
class CheckpointRow:
    """A regular expression of model names, and the licences that these models are under."""

    pattern: str
    licences: tuple[str, ...]


@dataclass(frozen=True)
class HostRow:
    """The end (and the beginning) of a server's host name, and the terms of its operator."""

    host: str
    licence: str
    prefix: str = ""


@dataclass(frozen=True)
class LicenceTable:
    """Everything in `licences.yaml`."""

    licences: tuple[LicenceRow, ...]
    checkpoints: tuple[CheckpointRow, ...]
    hosts: tuple[HostRow, ...]


@cache
def licence_table() -> LicenceTable:
    """Read the table."""
    return TypeAdapter(LicenceTable).validate_python(
        yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))
    )


@cache
def _rows_by_name() -> dict[str, LicenceRow]:
    return {
        _normalised(name): row
        for row in licence_table().licences
        for name in (row.id, row.title, row.hub, *row.names)
        if name
    }


def find_licence(name: str) -> LicenceRow | None:
    """Return the row of a licence by its id or one of its names; None if the table lacks it.

    Example:
        >>> find_licence("llama3.1").id, find_licence("Gemma Terms of Use").id
        ('llama-3.1', 'Gemma')
    """
    return _rows_by_name().get(_normalised(name))


def _normalised(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def is_spdx_licence(name: str) -> bool:
    """Return whether SPDX (or ScanCode's extension of it) knows a licence of this id."""
    return name.lower() in {key.lower() for key in get_spdx_licensing().known_symbols}


def spdx_id(name: str) -> str:
    """Return SPDX's own spelling of a licence id; "" for a name that SPDX does not list."""
    for key in get_spdx_licensing().known_symbols:
        if key.lower() == name.strip().lower() and not key.startswith("LicenseRef-"):
            return str(key)
    return ""


def checkpoint_licences(model_names: Iterable[str]) -> tuple[str, ...]:
    """Return the licences that models of these names are under, whatever their cards state.

    Args:
        model_names: Hub ids, names of folders or of files; owner and case do not count.
    """
    found: dict[str, None] = {}
    for name in model_names:
        last = re.sub(r"[\s_]+", "-", name.rstrip("/").rpartition("/")[2].lower())
        for row in licence_table().checkpoints:
            if re.fullmatch(row.pattern, last):
                found |= dict.fromkeys(row.licences)
    return tuple(found)


def host_licence(host: str) -> str:
    """Return the id of the terms of a server's operator.

    Returns:
        "" for a server of the user's own (a private address, or a name of the local network);
        "unknown" for a public host that the table lacks.
    """
    host = host.lower().strip("[]").rstrip(".")
    if not host or is_own_host(host):
        return ""
    for row in licence_table().hosts:
        is_part = host == row.host or host.endswith("." + row.host)
        if is_part and host.startswith(row.prefix):
            return row.licence
    return "unknown"


def is_own_host(host: str) -> bool:
    """Return whether a host is a private address or a name of the local network."""
    try:
        return not ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith(OWN_NETWORK_SUFFIXES)
