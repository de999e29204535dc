"""The hybrid student in each of its modes: how good, does it think when told to and only then, how long, and in which language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any

from persea.chat.messages import Effort, Finish, Message
from persea.data.language_id import same
from persea.data.language_id import tongue as known_tongue
from persea.tasks.intervals import wilson
from persea.tasks.task import Item, Score, Skill, grade, score
from persea.teachers.teacher import Teacher
from persea.tokenization.vocabulary import Vocabulary

UNDETERMINED = "undetermined"


@dataclass(frozen=True)
class Count:
    """`found` of n, with the share's 95 % interval."""

    found: int
    n: int
    low: float
    high: float

    @staticmethod
    def of(found: int, n: int) -> Count:
        return Count(found, n, *wilson(found, n))


@dataclass(frozen=True)
class Length:
    """How long the thoughts are that came to an end, in the student's tokens and in bytes; all 0 where there are none.

    cut  thoughts that the limit of tokens cut: the longest ones, and in no mean
    """

    thoughts: int
    tokens: float
    tokens_median: float
    bytes: float
    bytes_median: float
    cut: int


@dataclass(frozen=True)
class Mode:
    """One skill at one effort.

    leak       answers that thought although the effort is none, or did not although it is not
    languages  language of the thought -> how many; "undetermined" where it is short or symbols
    as_asked   of the thoughts with a language, those in the language of the question's item
    """

    skill: str
    effort: Effort
    score: Score
    leak: Count
    length: Length
    languages: Mapping[str, int]
    as_asked: Count


@dataclass(frozen=True)
class Modes:
    """modes by skill and effort; leaks over all skills: at none, and at every other effort together; rises: skill -> do thoughts get longer."""

    student: str
    modes: tuple[Mode, ...]
    thinks_unasked: Count
    answers_unthinking: Count
    rises: Mapping[str, bool]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(student: Teacher, skills: Sequence[tuple[Skill, Sequence[Item]]], taught: Mapping[str, Sequence[Effort]], max_new_tokens: int,
            direct: Iterable[Mapping[str, Any]] = (), done: Callable[[str], None] = lambda words: None) -> Modes:
    """Ask the student the skills' items at every effort it was taught them in.

    taught  skill -> efforts; skills that are not in it are left out, and so are items with choices, which are not answered in words
    direct  answers at effort none to other skills, as examples.jsonl has them, which count for the leak there
    """
    found: list[Mode] = []
    unasked = [_thought(line.get("thinking", ""), line["answer"] or line.get("calls"), line["finish"]) for line in direct]
    unthinking: list[bool] = []
    for skill, every in skills:
        items = [i for i in every if not i.choices]
        for effort in (e for e in Effort if items and e in taught.get(skill.name, ())):
            answers = student.answer([replace(i.prompt, effort=effort) for i in items], max_new_tokens)
            said = [(a.conversation.messages[-1], a.finish) for a in answers]
            found.append(_mode(student, skill, items, effort, said))
            thinks = [_thinks(*one) for one in said]
            unasked += thinks if effort is Effort.NONE else []
            unthinking += [not t for t in thinks] if effort is not Effort.NONE else []
            done(f"{skill.name} at {effort} {found[-1].score.value:.2f}")
    rises = {skill: _rises([m for m in found if m.skill == skill]) for skill in dict.fromkeys(m.skill for m in found)}
    return Modes(student.name, tuple(found), Count.of(sum(unasked), len(unasked)), Count.of(sum(unthinking), len(unthinking)),
                 {skill: r for skill, r in rises.items() if r is not None})


def at_once(lines: Iterable[Mapping[str, Any]], speaker: str, taught: Mapping[str, object]) -> list[Mapping[str, Any]]:
    """Of everybody's answers, as examples.jsonl has them, a speaker's at effort none to skills without modes: what `measure` calls direct."""
    return [line for line in lines if (line["speaker"], line["effort"]) == (speaker, Effort.NONE) and line["skill"] not in taught
            and "likelihoods" not in line]  # who chooses says nothing, and cannot think unasked


def _thinks(said: Message, finish: Finish) -> bool:
    return _thought(said.thinking, said.text or said.calls, finish)


def _thought(thinking: str, words: object, finish: str) -> bool:
    """Whether an answer thought. One that ends without a readable word (a thought that was cut, or never closed) counts as a thought."""
    return bool(thinking) or (finish != Finish.STOP and not words)


def _mode(student: Teacher, skill: Skill, items: Sequence[Item], effort: Effort, said: Sequence[tuple[Message, Finish]]) -> Mode:
    results = grade(skill, items, said)
    astray = sum(_thinks(*one) is (effort is Effort.NONE) for one in said)
    thoughts = [(m.thinking, i.prompt.language) for (m, _), i in zip(said, items, strict=True) if m.thinking]
    tongues = [(tongue(text), language) for text, language in thoughts]
    told = [(found, language) for found, language in tongues if found != UNDETERMINED]
    cut = sum(_thinks(m, finish) and not m.thinking for m, finish in said)
    return Mode(skill.name, effort, score(student.name, skill.name, results, effort), Count.of(astray, len(said)),
                _length(student.voice.vocabulary, [text for text, _ in thoughts], cut), dict(Counter(found for found, _ in tongues).most_common()),
                Count.of(sum(same(found, language) for found, language in told), len(told)))


def _length(vocabulary: Vocabulary, thoughts: Sequence[str], cut: int) -> Length:
    if not thoughts:
        return Length(0, 0, 0, 0, 0, cut)
    tokens, sizes = [len(ids) for ids in vocabulary.encode_batch(thoughts)], [len(t.encode()) for t in thoughts]
    return Length(len(thoughts), fmean(tokens), median(tokens), fmean(sizes), median(sizes), cut)


def _rises(modes: Sequence[Mode]) -> bool | None:
    """Whether mean thoughts get longer from effort to effort, in tokens and in bytes; None where fewer than two efforts think.

    Not where an effort that should think never came to a thought's end: no length of it is known.
    """
    dials = [m.length for m in modes if m.effort is not Effort.NONE]
    if len(dials) < 2:
        return None
    return all(m.thoughts for m in dials) and all(a.tokens < b.tokens and a.bytes < b.bytes for a, b in pairwise(dials))


def tongue(text: str) -> str:
    """Language of a text, such as "vi"; "undetermined" where nobody can say (see tongues.tongue)."""
    return known_tongue(text) or UNDETERMINED
