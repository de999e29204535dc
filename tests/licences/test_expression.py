"""Licence expressions, also broken and huge ones."""

from __future__ import annotations

import pytest

from persea.licences.expression import licence_alternatives


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("MIT", (("MIT",),)),
        ("MIT AND MIT", (("MIT",),)),
        ("MIT OR (Apache-2.0 AND Gemma)", (("MIT",), ("Apache-2.0", "Gemma"))),
        ("(a OR b) AND c", (("a", "c"), ("b", "c"))),
        ("Gemma Terms of Use", (("Gemma Terms of Use",),)),
        ("NVIDIA Open Model License", (("NVIDIA Open Model License",),)),
        ("llama3.2-and-gemma", (("llama3.2", "gemma"),)),
        ("x-and-gemma", (("x-and-gemma",),)),
        ("((((", (("((((",),)),
        ("", (("",),)),
    ],
)
def test_alternatives(text: str, want: tuple[tuple[str, ...], ...]) -> None:
    assert licence_alternatives(text) == want


def test_an_expression_of_many_alternatives_holds_as_a_whole() -> None:
    text = " AND ".join(f"(a{k} OR b{k})" for k in range(12))
    (only,) = licence_alternatives(text)
    assert set(only) == {f"{x}{k}" for x in "ab" for k in range(12)}
    assert licence_alternatives("x" * 5000) == (("x" * 5000,),)
