"""Answers are generated once, kept under everything they depend on, and graded anew each time."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persea import storage as store
from persea.chat.messages import Conversation, FinishReason, Text, ThinkingEffort
from persea.data.prompts import Prompt
from persea.errors import DataError, TeacherError
from persea.evaluation import answering as asking
from persea.evaluation.answering import (
    ITEMS_PER_ANSWER_FILE,
    EvaluatedModel,
    answer_items,
    compute_nll,
    reference_bits,
    single_model_loader,
)
from persea.tasks.generated import CODE_TASK, LANGUAGES_TASK, REASONING_TASK, TOOLS_TASK
from persea.tasks.task import Split, Task, TaskItem, Verdict
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from tests.teachers.engines.test_transformers import NAMES, opened
from tests.teachers.test_teacher import scripted, teacher, words

ITEMS = {
    skill: skill.items(Split.TEST, 6, 0) for skill in (LANGUAGES_TASK, CODE_TASK, REASONING_TASK)
}


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("PERSEA_HOME", str(tmp_path))
    return tmp_path


@dataclass
class Counting:
    """Opens a speaker, and counts how often."""

    load: Callable[[], Teacher]
    times: int = 0

    def __call__(self) -> Teacher:
        self.times += 1
        return self.load()


def evaluated(
    folder: str, load: Callable[[], Teacher] | None = None, name: str = ""
) -> EvaluatedModel:
    """A sapling to be measured; with `load` somebody else behind the same identity."""
    own = ThinkingEffort.LOW if folder.startswith("gpt-oss") else ThinkingEffort.NONE
    return EvaluatedModel(
        name or folder,
        f"identity of {folder}",
        (own,),
        load or (lambda: teacher(folder)),
        {"batch": 64},
    )


def kept(home: Path) -> list[Path]:
    return sorted((home / "answers").rglob("*.json"))


# --- answers ---


def test_answers_are_graded_in_order_and_unfinished_ones_are_malformed() -> None:
    name, items = "llama-sapling", LANGUAGES_TASK.items(Split.AUDITION, 30, 0)
    stop = ("<|eot_id|>",)
    says = [
        (words(name, i.reference, *stop), words(name, "no", *stop), words(name, "n"))[k % 3]
        for k, i in enumerate(items)
    ]
    results, reused = answer_items(
        evaluated(name, lambda: scripted(name, *says)),
        ThinkingEffort.NONE,
        LANGUAGES_TASK,
        items,
        60,
    )
    assert reused == 0
    assert [r.item for r in results] == list(items)
    verdicts = [Verdict.RIGHT, Verdict.WRONG, Verdict.MALFORMED]
    assert [(r.verdict, r.finish) for r in results] == [
        (verdicts[k % 3], FinishReason.LENGTH if k % 3 == 2 else FinishReason.STOP)
        for k in range(30)
    ]


def test_what_was_said_is_asked_once(own_home: Path) -> None:
    one = Counting(lambda: teacher("qwen-sapling"))
    first = answer_items(
        evaluated("qwen-sapling", one), ThinkingEffort.NONE, CODE_TASK, ITEMS[CODE_TASK], 40
    )
    assert (one.times, first[1]) == (1, 0)
    again = answer_items(
        evaluated("qwen-sapling", one), ThinkingEffort.NONE, CODE_TASK, ITEMS[CODE_TASK], 40
    )
    assert (one.times, again[1]) == (1, 6)
    assert [r.to_json() for r in again[0]] == [r.to_json() for r in first[0]]
    assert len(kept(own_home)) == 1


def changed(**what: Any) -> tuple[EvaluatedModel, ThinkingEffort, tuple[TaskItem, ...], int]:
    one = evaluated("qwen-sapling")
    return (
        replace(one, **{k: v for k, v in what.items() if k in ("identity", "settings")}),
        what.get("effort", ThinkingEffort.NONE),
        what.get("items", ITEMS[CODE_TASK]),
        what.get("most", 40),
    )


@pytest.mark.parametrize(
    "what",
    [
        {"identity": "other weights"},
        {"settings": {"batch": 1}},
        {"effort": ThinkingEffort.HIGH},
        {"most": 41},
        {"items": CODE_TASK.items(Split.TEST, 6, 1)},
        {"items": ITEMS[CODE_TASK][::-1]},
    ],
    ids=str,
)
def test_whatever_an_answer_depends_on_is_in_its_key(what: dict[str, Any]) -> None:
    for case, expected in (({}, 0), (what, 0), ({}, 6)):
        one, effort, items, most = changed(**case)
        assert answer_items(one, effort, CODE_TASK, items, most)[1] == expected


def test_another_answers_version_generates_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, expected in ((None, 0), (0, 0), (None, 6)):
        with monkeypatch.context() as patch:
            if version is not None:
                patch.setattr(asking, "ANSWERS_VERSION", version)
            _, reused = answer_items(
                evaluated("qwen-sapling"), ThinkingEffort.NONE, CODE_TASK, ITEMS[CODE_TASK], 40
            )
            assert reused == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: data.replace(b'"stop"', b'"length"', 1),
        lambda data: b"{}",
    ],
)
def test_a_kept_answer_that_is_not_as_it_was_written_is_asked_anew(
    own_home: Path, damage: Callable[[bytes], bytes]
) -> None:
    first = answer_items(
        evaluated("qwen-sapling"), ThinkingEffort.NONE, CODE_TASK, ITEMS[CODE_TASK], 40
    )
    (path,) = kept(own_home)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    again = answer_items(
        evaluated("qwen-sapling"), ThinkingEffort.NONE, CODE_TASK, ITEMS[CODE_TASK], 40
    )
    assert again[1] == 0 and again[0] == first[0]
    assert path.read_bytes() == whole


def test_a_record_under_another_name_is_not_taken(own_home: Path) -> None:
    answer_items(evaluated("qwen-sapling"), ThinkingEffort.NONE, CODE_TASK, ITEMS[CODE_TASK], 40)
    (path,) = kept(own_home)
    record = store.read_json_with_checksum(path, "")
    store.write_json_with_checksum(path, record | {"key": "0" * 64})
    assert (
        answer_items(
            evaluated("qwen-sapling"), ThinkingEffort.NONE, CODE_TASK, ITEMS[CODE_TASK], 40
        )[1]
        == 0
    )


def test_kept_answers_are_graded_by_the_grader_of_today() -> None:
    first, _ = answer_items(
        evaluated("qwen-sapling"), ThinkingEffort.NONE, CODE_TASK, ITEMS[CODE_TASK], 40
    )
    strict = replace(CODE_TASK, grade=lambda item, said: Verdict.WRONG)
    again, reused = answer_items(
        evaluated("qwen-sapling"), ThinkingEffort.NONE, strict, ITEMS[CODE_TASK], 40
    )
    assert reused == 6
    assert any(r.verdict is not Verdict.WRONG for r in first)
    assert {r.verdict for r in again} == {Verdict.WRONG}


def test_a_killed_evaluation_goes_on_where_it_was(own_home: Path) -> None:
    """Killed in the third part: the two before it stand, and only the rest is asked."""
    items = tuple(
        TaskItem(
            Prompt(
                f"code/{k}", Conversation.from_question(f"Write f(x): x plus {k}"), "code", "python"
            ),
            "x",
        )
        for k in range(3 * ITEMS_PER_ANSWER_FILE)
    )
    asked: list[int] = []

    class Dying(TransformersEngine):
        def generate(self, prompts: Any, stop_ids: Any, max_new_tokens: int) -> Any:
            if len(asked) == 2 and dies:
                raise KeyboardInterrupt
            asked.append(len(prompts))
            return [torch.tensor(list(stop_ids)[:1]).numpy().astype("int32") for _ in prompts]

    whole = teacher("qwen-sapling")
    one = evaluated(
        "qwen-sapling",
        lambda: replace(whole, engine=Dying(whole.engine.model, whole.engine.vocab_size)),
    )  # type: ignore[attr-defined]
    dies = True
    with pytest.raises(KeyboardInterrupt):
        answer_items(one, ThinkingEffort.NONE, CODE_TASK, items, 4)
    assert (asked, len(kept(own_home))) == ([ITEMS_PER_ANSWER_FILE, ITEMS_PER_ANSWER_FILE], 2)
    dies = False
    results, reused = answer_items(one, ThinkingEffort.NONE, CODE_TASK, items, 4)
    assert (asked, reused, len(results)) == (
        [ITEMS_PER_ANSWER_FILE] * 3,
        2 * ITEMS_PER_ANSWER_FILE,
        3 * ITEMS_PER_ANSWER_FILE,
    )


@pytest.mark.parametrize(
    "items", [(), (ITEMS[CODE_TASK][0], ITEMS[CODE_TASK][0])], ids=["none", "twice"]
)
def test_no_questions_and_questions_that_cannot_be_told_apart_are_refused(
    items: tuple[TaskItem, ...],
) -> None:
    with pytest.raises(
        DataError, match=r"code: (there is no item to answer|two items have the same id)"
    ):
        answer_items(evaluated("qwen-sapling"), ThinkingEffort.NONE, CODE_TASK, items, 40)


# --- choices ---


def chooser(reference: str, *choices: str) -> TaskItem:
    return TaskItem(
        Prompt(
            f"choice/{choices}", Conversation.from_question("To English: 七"), "languages", "zh"
        ),
        reference,
        choices=choices,
    )


def test_the_likeliest_choice_per_byte_is_the_answer() -> None:
    skill = Task(
        "choices",
        ("zh",),
        lambda split, n, seed: (),
        lambda i, said: Verdict.RIGHT if said.text == i.reference else Verdict.WRONG,
    )
    items = (
        chooser("seven", "seven", "nine hundred and ninety-nine", "x"),
        chooser("nine", "two", "nine"),
        *ITEMS[LANGUAGES_TASK][:2],
    )
    one = Counting(lambda: teacher("qwen-sapling"))
    results, reused = answer_items(
        evaluated("qwen-sapling", one), ThinkingEffort.NONE, skill, items, 40
    )
    assert reused == 0
    for i, r in zip(items[:2], results[:2], strict=True):
        nats = list(
            compute_nll(
                teacher("qwen-sapling"),
                [i.prompt.conversation.with_answer(Text(c)) for c in i.choices],
            )
        )
        assert r.choice_logprobs_per_byte == pytest.approx(
            [-x / len(c.encode()) for x, c in zip(nats, i.choices, strict=True)], rel=1e-5
        )
        assert (
            r.answer.text
            == i.choices[max(range(len(i.choices)), key=lambda k: r.choice_logprobs_per_byte[k])]
        )
        assert (r.finish, r.to_json()["choice_logprobs_per_byte"]) == (
            FinishReason.STOP,
            list(r.choice_logprobs_per_byte),
        )
    assert results[0].verdict is Verdict.RIGHT  # the sapling was grown on numbers
    assert (
        results[2].choice_logprobs_per_byte == ()
        and "choice_logprobs_per_byte" not in results[2].to_json()
    )
    assert answer_items(evaluated("qwen-sapling", one), ThinkingEffort.NONE, skill, items, 40) == (
        results,
        4,
    )


def test_an_empty_choice_and_a_speaker_of_words_alone_are_refused() -> None:
    skill = replace(LANGUAGES_TASK, name="choices")
    with pytest.raises(DataError, match=r"choices, choice/.*: one of its choices is empty"):
        answer_items(
            evaluated("qwen-sapling"), ThinkingEffort.NONE, skill, [chooser("a", "a", "")], 40
        )
    with pytest.raises(
        TeacherError,
        match="qwen-sapling: its engine returns no log-probabilities, and choices compares",
    ) as caught:
        answer_items(
            replace(evaluated("qwen-sapling"), is_text_only=True),
            ThinkingEffort.NONE,
            skill,
            [chooser("a", "a", "b")],
            40,
        )
    assert caught.value.exit_code == 5


# --- bits ---


def uniform(name: str) -> Teacher:
    """A speaker to whom every token is as likely as any other."""
    renderer, model = opened(name)
    model = deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    return Teacher("uniform", renderer, TransformersEngine(model, len(renderer.vocabulary)))


@pytest.mark.parametrize("name", NAMES)
def test_a_uniform_model_spends_the_logarithm_of_its_vocabulary_on_every_token(name: str) -> None:
    vocabulary = opened(name)[0].vocabulary
    for items in ITEMS.values():
        spent, size = reference_bits(evaluated(name, lambda: uniform(name)), items)
        tokens = sum(
            len(ids) + 1 for ids in vocabulary.encode_batch([i.reference for i in items])
        )  # and the one that ends the turn
        assert size == sum(len(i.reference.encode("utf-8")) for i in items)
        assert spent == pytest.approx(tokens * math.log2(len(vocabulary)), rel=1e-6)


def test_bits_are_the_surprise_of_the_very_tokens_and_are_kept() -> None:
    name = "qwen-sapling"
    renderer, model = opened(name)
    items = ITEMS[LANGUAGES_TASK]
    expected = 0.0
    for item in items:
        tokens = renderer.render(item.prompt.conversation.with_answer(Text(item.reference)))
        with torch.inference_mode():
            p = torch.log_softmax(
                model(input_ids=torch.from_numpy(tokens.ids_T)[None].long())
                .logits[0, :, : len(renderer.vocabulary)]
                .double(),
                -1,
            )
        expected -= sum(
            float(p[t - 1, tokens.ids_T[t]]) / math.log(2)
            for t in range(len(tokens))
            if tokens.loss_mask_T[t] and tokens.starts_T[t] >= 0
        )
    one = Counting(lambda: teacher(name))
    spent = reference_bits(evaluated(name, one), items)
    assert spent[0] == pytest.approx(expected, rel=1e-4)
    assert reference_bits(evaluated(name, one), items) == spent and one.times == 1
    assert (
        spent[0]
        < reference_bits(
            replace(evaluated(name, lambda: uniform(name)), identity="uniform"), items
        )[0]
        / 2
    )  # and it has learned something


def test_items_whose_right_answer_is_no_text_cost_no_bits() -> None:
    items = [replace(i, reference="") for i in ITEMS[CODE_TASK]]
    assert reference_bits(evaluated("qwen-sapling"), items) == (0.0, 0)
    assert reference_bits(evaluated("qwen-sapling"), [*items, ITEMS[REASONING_TASK][0]])[1] == len(
        ITEMS[REASONING_TASK][0].reference
    )


def test_one_speaker_at_a_time_is_in_memory() -> None:
    log: list[str] = []
    hold = single_model_loader(lambda name: log.append(name) or teacher("qwen-sapling"))  # type: ignore[func-returns-value]
    for name in ("a", "a", "b", "b", "a"):
        hold(name)
    assert log == ["a", "b", "a"]


def test_what_a_template_cannot_say_is_a_miss_that_says_so() -> None:
    """Tools, asked of a family that has no notation for them: no answer, no bits, and nobody's run
    ends.
    """
    items = TOOLS_TASK.items(Split.TEST, 3, 0)
    results, _ = answer_items(
        evaluated("gemma-sapling"), ThinkingEffort.NONE, TOOLS_TASK, items, 20
    )
    assert [(r.verdict, r.finish, r.answer.parts) for r in results] == [
        (Verdict.MALFORMED, FinishReason.REFUSED, ())
    ] * 3
    assert reference_bits(evaluated("gemma-sapling"), items) == (0.0, 0)
    mixed = (*items, *ITEMS[CODE_TASK][:2])
    assert reference_bits(evaluated("gemma-sapling"), mixed) == pytest.approx(
        reference_bits(evaluated("gemma-sapling"), ITEMS[CODE_TASK][:2])
    )
