"""Answers of inferred families are parsed into thought and answer."""

from __future__ import annotations

import re

import pytest

from persea.chat.response_parsing import (
    AnswerForm,
    Marker,
    control_characters,
    has_control_token,
    pieces_to_string,
)

PATTERN = re.compile("</?think>|<\\|eom\\|>")
CHARACTERS = control_characters("<think>\n\n</think>", control_pattern=PATTERN)
OPEN, CLOSE = CHARACTERS["<think>"], CHARACTERS["</think>"]


def form(*, lead: str = "", tail: str = "", is_opened: bool = False) -> AnswerForm:
    return AnswerForm(
        lead,
        tail,
        Marker.from_text(f"{OPEN}\n"),
        Marker.from_text(f"\n{CLOSE}\n\n"),
        is_opened,
    )


def parse(answer: AnswerForm, *pieces: str | bytes) -> tuple[str, str] | None:
    return answer.parse(pieces_to_string(pieces, CHARACTERS))


def test_white_space_of_the_template_is_no_part_of_the_texts():
    assert Marker.from_text("\n</think>\n\n") == Marker("\n", "</think>", "\n\n")
    pieces = ("<think>", b"\n so \n\n", "</think>", b"\n\n\n x ")
    assert parse(form(), *pieces) == (" so \n", "\n x ")


@pytest.mark.parametrize(
    ("is_opened", "pieces", "want"),
    [
        (False, (b"Hi",), ("", "Hi")),
        (False, (), ("", "")),
        (False, ("<think>", b"so", "</think>", b"Hi"), ("so", "Hi")),
        (False, (b"\n", "<think>", b"so", "</think>", b"Hi"), ("so", "Hi")),
        (False, ("<think>", b"so"), None),
        (False, (b"so", "</think>", b"Hi"), None),
        (False, (b"Hi", "<|eom|>"), None),
        (False, (b"<think>so</think>Hi",), ("", "<think>so</think>Hi")),  # text, no control tokens
        (True, (b"so\n", "</think>", b"\n\nHi"), ("so", "Hi")),
        (True, ("<think>", b"\nso\n", "</think>", b"\n\nHi"), ("so", "Hi")),
        (True, (b"\n", "</think>", b"\n\nHi"), ("", "Hi")),
        (True, (b"Hi",), None),  # the thought does not end
        (True, (b"so", "</think>", b"Hi", "</think>"), None),
    ],
)
def test_answers(is_opened: bool, pieces: tuple[str | bytes, ...], want: tuple[str, str] | None):
    assert parse(form(is_opened=is_opened), *pieces) == want


def test_lead_and_tail_are_removed():
    characters = control_characters("<|eom|>", control_pattern=PATTERN)
    plain = AnswerForm(
        f"{characters['<|eom|>']}user:", "\n", Marker("", "", ""), Marker("", "", ""), False
    )
    assert plain.parse(pieces_to_string(("<|eom|>", b"user:Hi\n"), characters)) == ("", "Hi")
    assert plain.parse(pieces_to_string((b"Hi\n",), characters)) is None
    text = AnswerForm(" ", "", Marker("", "", ""), Marker("", "", ""), False)
    assert text.parse(" Hi") == text.parse("Hi") == ("", "Hi")


def test_markers_in_plain_text_are_ambiguous():
    text = AnswerForm("", "", Marker.from_text("[A]"), Marker.from_text("[B]"), False)
    assert text.find_ambiguity("so [B]", "Hi") == "[B]"
    assert text.find_ambiguity("", " [A] Hi") == "[A]"
    assert text.find_ambiguity("so", "[A] Hi") == ""
    assert form().find_ambiguity("</think>", "<think>") == ""  # control tokens here


def test_control_tokens_become_surrogates():
    text = pieces_to_string((b"\xe4\xbd\xa0", "<think>", "<|other|>"), CHARACTERS)
    assert len(text) == 3 and text[0] == "你"
    assert has_control_token(text) and not has_control_token("你👩")
    with pytest.raises(UnicodeDecodeError):
        pieces_to_string((b"\xe4\xbd",), CHARACTERS)
