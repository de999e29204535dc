"""The teachers of given texts: who needs the fewest bits for a language teaches it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from persea.chat.messages import Conversation
from persea.evaluation.gain import Gain
from persea.evaluation.text_contest import GivenTexts, decide_text_contest

TEXT = "abcdefghij"


def texts(language: str, n: int = 12, windows: int = 1) -> GivenTexts:
    conversations = (Conversation.from_document(TEXT),) * (n * windows)
    names = tuple(f"{language}:{k // windows}" for k in range(n * windows))
    return GivenTexts("world", language, conversations, names)


def bits(rate: float, n: int = 12, seed: int = 0, noise: float = 0.02) -> npt.NDArray[np.float64]:
    dice = np.random.default_rng([seed, int(1000 * rate)])
    return 10 * (rate + noise * dice.normal(size=n))


def test_each_language_gets_its_own_teacher_and_equals_share() -> None:
    found = decide_text_contest(
        [texts("id"), texts("th")],
        {
            "a": [bits(1.0), bits(1.5, noise=0.1)],
            "b": [bits(1.4), bits(1.501, noise=0.1)],
            "base": [bits(2.0), bits(1.2)],
        },
        ["a", "b"],
        "base",
    )
    assert found.parts == {
        "world/id": (("a", 1.0),),
        "world/th": (("a", 0.5), ("b", 0.5)),
    }
    assert found.worse_than == {"world/id": {"b": "a"}, "world/th": {}}
    assert [(g.part, g.teacher, g.gain_kind) for g in found.gains] == [
        ("world/id", "a", Gain.BETTER),
        ("world/th", "a", Gain.WORSE),
    ]
    assert found.gains[0].gain == pytest.approx(1.0, abs=0.05)
    assert [(s.model_name, s.language, s.n) for s in found.scores] == [
        ("a", "id", 12),
        ("b", "id", 12),
        ("a", "th", 12),
        ("b", "th", 12),
    ]


def test_one_language_is_the_skill_itself_and_a_pinned_teacher_stays() -> None:
    measured = {"a": [bits(1.4)], "base": [bits(1.0)]}
    found = decide_text_contest([texts("id")], measured, ["a"], "base", pinned="a")
    assert found.parts == {"world": (("a", 1.0),)}
    assert (found.gains[0].part, found.gains[0].pinned) == ("world", True)
    assert found.gains[0].gain_kind is Gain.WORSE
    assert decide_text_contest([texts("id")], measured, ["a"], None).gains == ()


def test_one_text_decides_nothing() -> None:
    measured = {name: [bits(rate, 1)] for name, rate in (("a", 1.0), ("b", 2.0), ("base", 3.0))}
    found = decide_text_contest([texts("id", 1)], measured, ["a", "b"], "base")
    assert found.parts == {"world": (("a", 0.5), ("b", 0.5))}
    assert (found.gains[0].gain_kind, found.gains[0].low) == (Gain.UNDECIDED, None)


def test_windows_of_a_document_count_as_one() -> None:
    """Three windows with the same error are no three observations."""
    once = {"a": [bits(1.0, 6, noise=0.3)], "base": [bits(1.2, 6, noise=0.3)]}
    thrice = {name: [np.repeat(x, 3) for x in values] for name, values in once.items()}
    (one,) = decide_text_contest([texts("id", 6)], once, ["a"], "base").gains
    (three,) = decide_text_contest([texts("id", 6, windows=3)], thrice, ["a"], "base").gains
    assert one.low is not None and three.low is not None
    assert (three.gain, three.low, three.n) == pytest.approx((one.gain, one.low, one.n))
