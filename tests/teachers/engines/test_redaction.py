"""No spelling of a key that a server says back remains, and answers stay as they are."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest

from persea.teachers.engines.redaction import redact_text, redact_value

KEY = "sk-proj/aB3dE6+gH9jK2mN5pQ8&sT1vW4yZ7"
PIECES = [KEY[k : k + 10] for k in range(len(KEY) - 10)]

SPELLINGS = {
    "plain": KEY,
    "upper case": KEY.upper(),
    "reversed": KEY[::-1],
    "in an address": quote(KEY, safe=""),
    "in an address twice": quote(quote(KEY, safe=""), safe=""),
    "hexadecimal": KEY.encode().hex(),
    "HTML": KEY.replace("&", "&amp;"),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 of its header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "base64 of a user and it": base64.b64encode(f"somebody:{KEY}".encode()).decode(),
    "base64 in a sentence": base64.b64encode(f"key {KEY} is bad".encode()).decode(),
    "base64 for addresses": base64.urlsafe_b64encode(KEY.encode()).decode(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_is_removed(spelling: str) -> None:
    said = SPELLINGS[spelling]
    cleaned = redact_text(f"no: {said}!", KEY)
    assert "***" in cleaned
    assert said not in cleaned
    longest = max(
        (
            n
            for n in range(8, len(said))
            if any(said[k : k + n] in cleaned for k in range(len(said) - n))
        ),
        default=0,
    )
    assert longest < 12


@pytest.mark.parametrize("length", [10, 20, 30])
def test_a_cut_key_is_removed(length: int) -> None:
    for cut in (KEY[:length], KEY[-length:], KEY[3 : 3 + length]):
        assert redact_text(f"key {cut}...", KEY) == "key ***..."


def test_entries_and_names_of_a_response_are_cleaned() -> None:
    value = {"data": [{"id": f"model-{KEY}", KEY: [1, None, KEY[:12]]}]}
    assert KEY[:12] not in json.dumps(redact_value(value, KEY, with_pieces=True))
    answer = {"text": f"it is {KEY}; pieces such as {KEY[:9]} stay"}
    assert redact_value(answer, KEY, with_pieces=False) == {
        "text": f"it is ***; pieces such as {KEY[:9]} stay"
    }


@pytest.mark.parametrize("key", ["", " ", "EMPTY", "token-abc123"])
def test_a_word_as_key_changes_no_answer(key: str) -> None:
    answer = {"text": "An EMPTY set; token-abc123 is a name."}
    assert redact_value(answer, key, with_pieces=False) == answer


def test_a_short_key_is_removed_from_messages() -> None:
    assert redact_text("status 401: EMPTY", "EMPTY") == "status 401: ***"
