"""Find API keys in the values of a recipe, which is shared and written to records and pages.

The kinds of many vendors come from detect-secrets, which is maintained. Keys of no known form are
found by their shape: a long run of letters and digits in no order.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from typing import Any

# Prefixes of keys of model hosts; no model, path or licence begins so.
SECRET_PREFIXES = (
    "sk-",
    "hf_",
    "gsk_",
    "xai-",
    "r8_",
    "nvapi-",
    "pplx-",
    "AIza",
    "ya29.",
    "github_pat_",
    "ghp_",
    "glpat-",
    "xoxb-",
    "xoxp-",
    "AKIA",
    "eyJhbGciOi",
)
URL_WITH_CREDENTIALS = re.compile(r"https?://(?:[^/\s]*@|\S*\?)")
# Detectors of detect-secrets that look at the words around a key, or at any address.
UNUSED_DETECTORS = frozenset(
    (
        "Secret Keyword",
        "Basic Auth Credentials",
        "Public IP (ipv4)",
        "Base64 High Entropy String",
        "Hex High Entropy String",
    )
)
WORD = re.compile(r"[A-Za-z0-9_+/=.\-]{20,}")
RANDOM_RUN = re.compile(r"[A-Za-z0-9]{20,}")
HEX_KEY = re.compile(r"[0-9a-f]{32,128}|[0-9A-F]{32,128}")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_CHECKED_CHARS = 10_000
# Of a word that somebody chose ("DeepSeekR1DistillQwen32B"), fewer neighbours are of two kinds.
MIN_SWITCHES, MIN_SWITCH_SHARE = 5, 0.4


def is_secret(value: Any, key: str = "") -> bool:
    """Return whether a value holds an API key, or is an address with one.

    Addresses with a user (https://user:key@host) or a query (https://host?key=...) count too.

    Args:
        value: A value of a recipe; only text can be a secret.
        key: The last key of its path. A `revision` is a commit, and no key.

    Example:
        >>> is_secret("hf_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3h")
        True
        >>> is_secret("meta-llama/Llama-3.2-3B-Instruct")
        False
    """
    if not isinstance(value, str):
        return False
    text = value[:MAX_CHECKED_CHARS].strip(" '\"")
    if key == "revision" and COMMIT.fullmatch(text):
        return False
    words = re.split(r"[\s'\"`,;:=<>()\[\]{}|]+", text)
    return (
        URL_WITH_CREDENTIALS.match(text) is not None
        or any(word.startswith(SECRET_PREFIXES) for word in words)
        or HEX_KEY.fullmatch(text) is not None
        or any(_is_random(run) for word in WORD.findall(text) for run in RANDOM_RUN.findall(word))
        or _is_known_kind(text)
    )


def _is_random(run: str) -> bool:
    """Return whether letters and digits follow each other in no order.

    Hexadecimal runs are names of files in caches, and commits.
    """
    if re.fullmatch(r"[0-9a-f]+", run):
        return False
    kinds = [0 if c.isdigit() else 1 if c.islower() else 2 for c in run]
    switches = sum(a != b for a, b in pairwise(kinds))
    digit_switches = sum((a == 0) != (b == 0) for a, b in pairwise(kinds))
    is_mixed = len(set(kinds)) == 3 and switches / len(run) >= MIN_SWITCH_SHARE
    return digit_switches >= MIN_SWITCHES and is_mixed


@cache
def _detectors() -> tuple[Any, ...]:
    """Return the detectors of detect-secrets for the keys of known vendors.

    An installation without that package, of an older persea, finds keys by their shape alone.
    """
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    except ImportError:
        return ()
    kinds: dict[str, Any] = get_mapping_from_secret_type_to_class()
    return tuple(kind() for name, kind in kinds.items() if name not in UNUSED_DETECTORS)


def _is_known_kind(text: str) -> bool:
    if not WORD.search(text) and "PRIVATE KEY" not in text:
        return False  # too short for a key; the package is not even imported
    line = " ".join(text.splitlines())
    return any(
        detector.analyze_line(filename="", line=f'"{line}"', line_number=1)
        for detector in _detectors()
    )
