"""Each generator's number of training questions, by writing out every key it can make."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

from persea.config.schema import CorpusSection
from persea.errors import DataError
from persea.tasks.generated import (
    code,
    find_generated_task,
    languages,
    refuse_too_many_questions,
    safety,
    tools,
)
from persea.tasks.generated.number_words import (
    COUNTED_NOUNS,
    SENTENCE_ADJECTIVES,
    SENTENCE_NOUNS,
    TRANSLATION_LANGUAGES,
)
from persea.tasks.task import Split, assign_split


def code_keys() -> Iterator[str]:
    for a, verb, b in itertools.product(range(2, 21), ("plus", "minus"), range(1, 31)):
        yield f"code/line/x times {a} {verb} {b}"
        for words in code.LIST_EXPRESSIONS:
            yield f"code/list/{words} x times {a} {verb} {b}"
            yield f"code/list/{words} x {verb} {b}"
    for a, b, c in itertools.product(range(2, 21), range(1, 31), range(1, 31)):
        yield from (f"code/choice/{a} if x is {w} than {b}, else {c}" for w in ("greater", "less"))


def language_keys() -> Iterator[str]:
    contents = [("number", str(k)) for k in range(1000)]
    for month, days in enumerate(languages.DAYS_PER_MONTH, start=1):
        pairs = itertools.product(range(7), range(1, days + 1))
        contents += [("date", f"{weekday}-{day}-{month}") for weekday, day in pairs]
    contents += [("quantity", f"{n}-{noun}") for n in range(2, 100) for noun in COUNTED_NOUNS]
    words = itertools.product(range(len(SENTENCE_NOUNS)), range(len(SENTENCE_ADJECTIVES)))
    contents += [("phrase", f"{noun}-{adjective}") for noun, adjective in words]
    contents += [("weekday", f"{day}-{hour}") for day in range(7) for hour in range(1, 13)]
    for (kind, content), (code_, name) in itertools.product(
        contents, TRANSLATION_LANGUAGES.items()
    ):
        yield f"To {name}: {languages.verbalize(kind, content, 'en')}"
        yield f"To English: {languages.verbalize(kind, content, code_)}"


def chains(figures: tuple[int, ...], length: int) -> Iterator[tuple[int, ...]]:
    if not length:
        yield figures
        return
    for figure in range(2, 10):
        yield from chains((*figures, figure), length - 1)
        if sum(figures) >= figure:
            yield from chains((*figures, -figure), length - 1)


def reasoning_keys() -> Iterator[str]:
    for start in range(2, 13):
        for kind, length in (("two", 2), ("three", 3)):
            for figures in chains((start,), length):
                yield f"reasoning/{kind}/{'/'.join(map(str, figures))}"
        for figures in chains((start,), 1):
            total = sum(figures)
            for rival in range(max(1, total - 9), total + 10):
                if rival != total:
                    yield f"reasoning/compare/{'/'.join(map(str, (*figures, rival)))}"


def safety_keys() -> Iterator[str]:
    for kind in safety.KIND_WEIGHTS:
        verbs = safety.GENTLE_VERBS if kind == "gentle" else safety.VIOLENT_VERBS
        objects = safety.HARMLESS_OBJECTS if kind == "alike" else safety.HARMED_OBJECTS
        for verb, who, when in itertools.product(verbs, objects, safety.CIRCUMSTANCES):
            yield f"safety/{kind}/{verb}/{who}/{when}".replace(" ", "-")


def tool_keys() -> Iterator[str]:
    names = list(tools.TOOL_ARGUMENTS)
    for kind, wanted in [(name, name) for name in names] + [("none", name) for name in names]:
        need = tools.TOOL_ARGUMENTS[wanted]
        numbers = need in ("minutes", "percent")
        values = list(map(str, range(2, 91))) if numbers else list(tools.ARGUMENT_VALUES[need])
        others = [name for name in names if name != wanted]
        declared = [(wanted, other) for other in others]
        if kind == "none":
            declared = list(itertools.combinations(others, 2))
        for value, pair, wording in itertools.product(values, declared, (0, 1)):
            yield f"tools/{kind}/{wanted}/{value}/{'-'.join(sorted(pair))}/{wording}"


@pytest.mark.parametrize(
    ("name", "keys", "total"),
    [
        ("code", code_keys, 42_540),
        ("languages", language_keys, 53_612),
        ("reasoning", reasoning_keys, 33_031),
        ("safety", safety_keys, 10_080),
        ("tools", tool_keys, 20_720),
    ],
)
def test_the_number_of_training_questions(
    name: str, keys: Callable[[], Iterator[str]], total: int
) -> None:
    different = set(keys())
    assert len(different) == total
    of_split = [key.rpartition("/")[0] if name == "safety" else key for key in different]
    number = sum(assign_split(key) is Split.TRAIN for key in of_split)
    assert find_generated_task(name).num_train_items == number
    task = find_generated_task(name)
    assert {i.prompt.id for i in task.items(Split.TRAIN, 50, 7)} <= different or name == "languages"


def test_too_many_questions_are_refused_at_once() -> None:
    part = CorpusSection(skill="languages", generate=100_000)
    with pytest.raises(DataError, match="languages has 13,930 training questions, not 100,000"):
        refuse_too_many_questions([part], "mine.yaml")
    refuse_too_many_questions([CorpusSection(skill="languages", generate=13_930)], "mine.yaml")
