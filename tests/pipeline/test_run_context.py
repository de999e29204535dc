"""What a recipe's words stand for: identities that change when an answer could, questions that
nobody is tested on, outputs that stand.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from persea.chat.messages import ThinkingEffort
from persea.config.recipe import load_recipe
from persea.errors import DataError, RecipeError, TeacherError
from persea.models import identity
from persea.pipeline.model_refs import BASE, STUDENT, has_effort
from persea.pipeline.plan import plan_run
from persea.pipeline.preflight import refuse_unsupported_efforts
from persea.pipeline.run_context import RunContext
from persea.pipeline.stage_keys import check_inputs
from persea.pipeline.stages import STAGES as STREAM
from persea.pipeline.stages import run_check, run_pipeline
from persea.storage import digest_json
from persea.tasks import benchmarks
from persea.tasks import generated as skills
from persea.tasks.task import Split
from tests.cli.test_cli import SAPLINGS, STAGES, TINY, flowed, flowed_copy, recipe


def river(folder: Path, *overrides: str, **sections: Any) -> RunContext:
    return RunContext(load_recipe(recipe(folder, **sections), overrides), folder / "run")


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest_json({"a": 1, "b": [2, 3]}) == digest_json({"b": [2, 3], "a": 1})
    assert len({digest_json(v) for v in ({"a": 1}, {"a": 2}, [1, 2], [2, 1], "1", 1)}) == 6


def _append(data: bytes) -> bytes:
    return data + b" "


def _flip_a_mantissa_bit(data: bytes) -> bytes:
    """Another weight; a byte more would be no safetensors file."""
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


def test_a_teachers_identity_changes_with_its_effort_and_its_files_and_not_with_its_place(
    tmp_path: Path,
) -> None:
    one = river(tmp_path).models.teacher_identities
    assert list(one) == ["qwen-sapling", "gemma-sapling", "gpt-oss-sapling"]
    assert len(set(one.values())) == 3
    other = river(tmp_path, "teachers.2.effort=high").models.teacher_identities
    assert {n for n in one if one[n] != other[n]} == {"gpt-oss-sapling"}
    moved = tmp_path / "elsewhere" / "qwen-sapling"
    shutil.copytree(SAPLINGS / "qwen-sapling", moved)
    teachers = [{"model": str(moved)}, *TINY["teachers"][1:]]
    assert river(tmp_path, teachers=teachers).models.teacher_identities == one
    for name, change in {"model.safetensors": _flip_a_mantissa_bit, "config.json": _append}.items():
        data = (moved / name).read_bytes()
        (moved / name).write_bytes(change(data))
        assert {
            n
            for n in one
            if one[n] != river(tmp_path, teachers=teachers).models.teacher_identities[n]
        } == {"qwen-sapling"}
        (moved / name).write_bytes(data)
    template = (moved / "chat_template.jinja").read_text()
    (moved / "chat_template.jinja").write_text(template + "{# another #}")
    assert (
        river(tmp_path, teachers=teachers).models.teacher_identities["qwen-sapling"]
        != one["qwen-sapling"]
    )


def test_how_a_running_state_is_computed_is_part_of_an_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers of Mamba and Jamba from before the probe of their caches are not reused."""
    one = river(tmp_path).models.teacher_identities
    monkeypatch.setattr(identity, "RUNNING_STATE_TYPES", frozenset({"qwen3"}))
    other = river(tmp_path).models.teacher_identities
    assert {n for n in one if one[n] != other[n]} == {"qwen-sapling"}
    monkeypatch.setattr(identity, "RUNNING_STATE_VERSION", 2)
    third = river(tmp_path).models.teacher_identities
    assert {n for n in one if other[n] != third[n]} == {"qwen-sapling"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_student_with_a_broken_weight_is_refused_before_the_first_stage(
    tmp_path: Path, value: float
) -> None:
    """The key of `check`, the first stage, holds the identity of the student."""
    broken = Path(shutil.copytree(SAPLINGS / "llama-sapling", tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].view(-1)[0] = value
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    context = river(tmp_path, student=TINY["student"] | {"model": str(broken)})
    with pytest.raises(DataError, match=r"model\.norm\.weight") as caught:
        check_inputs(context)
    assert caught.value.where and "\n" not in str(caught.value)


def test_a_students_identity_changes_with_how_it_is_adapted(tmp_path: Path) -> None:
    lora = {"adapt": "lora", "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj"]}}
    shapes = [
        {},
        lora,
        lora | {"lora": lora["lora"] | {"rank": 4}},
        lora | {"lora": lora["lora"] | {"alpha": 8}},
        lora | {"lora": lora["lora"] | {"targets": ["v_proj"]}},
    ]
    assert (
        len(
            {
                river(tmp_path, student=TINY["student"] | shape).models.student_identity
                for shape in shapes
            }
        )
        == 5
    )


def test_nobody_is_taught_what_he_is_tested_on(tmp_path: Path) -> None:
    held = river(tmp_path).held_out_items(Split.TEST)[0][1][0].prompt.conversation.messages[-1].text
    lines = [
        {"prompt": held},
        {"prompt": held.upper() + " "},
        {"prompt": "What else?", "answer": "This."},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = river(
        tmp_path,
        corpus=[{"skill": "languages", "file": "p.jsonl"}, {"skill": "code", "generate": 5}],
        audition={},
    ).corpus
    assert [p.skill for p in corpus.prompts] == ["languages"] + ["code"] * 5
    assert (corpus.prompts[0].conversation.messages[-1].text, corpus.prompts[0].answer) == (
        "What else?",
        "This.",
    )
    assert [r.reason.value for r in corpus.removed] == ["test item", "test item"]
    assert all(p.answer for p in corpus.prompts)  # a generator's questions bring their answers


def test_a_broken_line_ends_the_run_unless_the_recipe_sets_it_aside(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(
        b'{"prompt": "one"}\n{"prompt": "\xff"}\n{"prompt": "ONE"}\n{"prompt": "two"}\n'
    )
    part = {"skill": "languages", "file": "p.jsonl"}
    with pytest.raises(DataError, match=r"p\.jsonl:2: not JSON"):
        _ = river(tmp_path, corpus=[part], audition={}).corpus
    corpus = river(tmp_path, corpus=[part | {"on_malformed": "quarantine"}], audition={}).corpus
    assert (len(corpus.prompts), len(corpus.removed), [b.location for b in corpus.malformed]) == (
        2,
        1,
        [str(tmp_path / "p.jsonl:2")],
    )
    assert corpus.num_inputs == 4


def test_a_speaker_knows_how_far_its_positions_reach(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "audition")
    one = river(tmp_path)
    assert [
        one.models.load_teacher(name, 4).max_context_tokens for name in one.models.renderers
    ] == [
        1024,
        1024,
        1024,
    ]


def test_more_questions_than_there_are_is_refused_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(
        skills.REASONING_TASK,
        name="few",
        items=lambda split, n, seed: skills.REASONING_TASK.items(split, min(n, 7), seed),
    )
    monkeypatch.setattr(skills, "GENERATED_TASKS", (few,))
    with pytest.raises(
        DataError,
        match=r"corpus\.0\.generate: few has only 7 training questions -> ask for at most 7",
    ):
        _ = river(tmp_path, corpus=[{"skill": "few", "generate": 8}], audition={}).corpus
    assert (
        len(river(tmp_path, corpus=[{"skill": "few", "generate": 7}], audition={}).corpus.prompts)
        == 7
    )


def test_the_questions_change_with_seed_and_number(tmp_path: Path) -> None:
    overrides = ((), ("seed=1",), ("audition.items=9",), ("evaluation.items=9",))
    audition, test = (
        [river(tmp_path, *o).items_digest(split) for o in overrides]
        for split in (Split.AUDITION, Split.TEST)
    )
    assert len(set(audition)) == len(set(test)) == 3
    assert audition[0] == audition[3] != audition[2]  # the items of a split are its own
    assert test[0] == test[2] != test[3]
    assert river(tmp_path, "training.steps=9").items_digest(Split.AUDITION) == audition[0]


def test_a_stage_stands_for_its_key_as_long_as_its_files_are_whole(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "audition")
    one = river(tmp_path)
    key = one.stages.read_record("audition")["key"]
    assert one.stages.is_up_to_date("audition", key)
    assert not one.stages.is_up_to_date("audition", "another")
    assert not one.stages.is_up_to_date("check", key)
    path = tmp_path / "run" / "audition" / "cast.json"
    data = path.read_bytes()
    path.write_bytes(data + b" ")
    assert not one.stages.is_up_to_date("audition", key)
    path.unlink()
    assert not one.stages.is_up_to_date("audition", key)
    path.write_bytes(data)
    (tmp_path / "run" / "audition" / "other.txt").write_text("not ours")
    assert one.stages.is_up_to_date("audition", key)


def test_units_are_the_same_whoever_reads_them_and_change_with_what_they_hold(
    tmp_path: Path,
) -> None:
    flowed_copy(tmp_path, "audition")
    names = [u.name for u in river(tmp_path).capture_units]
    assert len(names) == 9
    assert {p.stem for p in (flowed()[0] / "run" / "capture" / "units").iterdir()} == set(names)
    for change in (
        "capture.sampling_threshold=0.05",
        "capture.max_new_tokens=47",
        "capture.batch_size=7",
        "capture.answers=given",
        "capture.distributions=topk",
    ):
        assert not set(names) & {u.name for u in river(tmp_path, change).capture_units}, change
    assert {
        u.name for u in river(tmp_path, "training.steps=9", "evaluation.items=9").capture_units
    } == set(names)


HYBRID = {"model": str(SAPLINGS / "llama-sapling"), "thinking": True}
SUMS = {"skill": "reasoning", "generate": 24, "effort_shares": {"none": 0.5, "high": 0.5}}


def test_prompts_have_the_modes_of_their_part(tmp_path: Path) -> None:
    one = river(tmp_path, student=HYBRID, corpus=[*TINY["corpus"][:2], SUMS])
    efforts = Counter((p.skill, p.effort) for p in one.corpus.prompts)
    assert efforts == {
        ("languages", None): 24,
        ("code", None): 24,
        ("reasoning", ThinkingEffort.NONE): 12,
        ("reasoning", ThinkingEffort.HIGH): 12,
    }


def test_modes_change_the_units_of_their_part_alone(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "audition")
    plain, mixed = (
        river(tmp_path, student=HYBRID, corpus=[*TINY["corpus"][:2], part]).capture_units
        for part in (TINY["corpus"][2], SUMS)
    )
    same = {u.name for u in plain} & {u.name for u in mixed}
    assert {u.teacher for u in plain if u.name in same} == {"qwen-sapling", "gemma-sapling"}
    assert {u.teacher for u in plain if u.name not in same} == {"gpt-oss-sapling"}


@pytest.mark.parametrize(
    ("student", "modes", "pinned", "what", "remedy"),
    [
        (
            {"model": str(SAPLINGS / "gemma-sapling"), "thinking": False},
            {"none": 0.5, "high": 0.5},
            "gpt-oss-sapling",
            "the corpus asks for high effort, which the student's template cannot express",
            "thinking: true",
        ),
        (
            {},
            {"low": 1.0},
            "qwen-sapling",
            (
                "the corpus asks for low effort, and no teacher of reasoning supports it: "
                "qwen-sapling supports none, high"
            ),
            "choose an effort",
        ),
        (
            {},
            {"high": 1.0},
            "gemma-sapling",
            "the corpus asks for high effort, and no teacher",
            "choose an effort",
        ),
    ],
)
def test_a_mode_that_somebody_does_not_know_is_refused_before_anything_starts(
    tmp_path: Path,
    student: dict[str, Any],
    modes: dict[str, float],
    pinned: str,
    what: str,
    remedy: str,
) -> None:
    one = river(
        tmp_path,
        student=HYBRID | student,
        corpus=[SUMS | {"effort_shares": modes}],
        audition={"pinned": {"reasoning": pinned}},
    )
    for start in (lambda: run_pipeline(one, lambda *_: None), lambda: plan_run(one)):
        with pytest.raises(RecipeError, match=f"{re.escape(what)}.*{remedy}") as caught:
            start()
        assert caught.value.where == "corpus.0.effort_shares"
    assert not (one.folder / "check").exists()


def test_a_teacher_who_is_cast_for_a_mode_he_does_not_know_is_refused(tmp_path: Path) -> None:
    flowed_copy(tmp_path, "audition")
    one = river(
        tmp_path,
        student=HYBRID,
        corpus=[SUMS | {"effort_shares": {"none": 0.5, "low": 0.5}}],
        audition={},
    )
    refuse_unsupported_efforts(one)  # gpt-oss could be cast
    cast = json.loads((one.folder / "audition" / "cast.json").read_text())
    assert len(river(tmp_path, student=HYBRID, corpus=[SUMS], audition={}).capture_units) == 3
    cast["parts"]["reasoning"] = [["qwen-sapling", 1.0]]
    (one.folder / "audition" / "cast.json").write_text(json.dumps(cast))
    with pytest.raises(
        RecipeError,
        match=(
            r"qwen-sapling was cast for reasoning, which needs low "
            r"effort.*audition\.pinned\.reasoning"
        ),
    ):
        _ = one.capture_units


def test_everybody_can_be_asked_to_answer_at_once(tmp_path: Path) -> None:
    one = river(tmp_path)
    assert {
        name: [e.value for e in ThinkingEffort if has_effort(voice, e)]
        for name, voice in one.models.renderers.items()
    } == {
        "qwen-sapling": ["none", "high"],
        "gemma-sapling": ["none"],
        "gpt-oss-sapling": ["none", "low", "medium", "high"],
    }


def test_a_teacher_that_is_sent_no_effort_is_measured_and_asked_at_its_own_alone(
    tmp_path: Path,
) -> None:
    def talks(**more: Any) -> RunContext:
        far = {
            "model": str(SAPLINGS / "gpt-oss-sapling"),
            "effort": "low",
            "endpoint": {"url": "http://127.0.0.1:1", "protocol": "chat"} | more,
        }
        return river(tmp_path, teachers=[*TINY["teachers"][:2], far])

    deaf, dialled = talks(), talks(send_effort=True)
    assert deaf.models.measured_efforts("gpt-oss-sapling", tuple(ThinkingEffort)) == (
        ThinkingEffort.LOW,
    )
    assert [e for e in ThinkingEffort if deaf.models.can_answer_at("gpt-oss-sapling", e)] == [
        ThinkingEffort.NONE,
        ThinkingEffort.LOW,
    ]
    assert set(dialled.models.measured_efforts("gpt-oss-sapling", tuple(ThinkingEffort))) == {
        ThinkingEffort.LOW,
        ThinkingEffort.MEDIUM,
        ThinkingEffort.HIGH,
    }
    assert all(dialled.models.can_answer_at("gpt-oss-sapling", e) for e in ThinkingEffort)


def test_a_yardstick_does_not_make_a_mode_known(tmp_path: Path) -> None:
    teachers = [*TINY["teachers"][:2], TINY["teachers"][2] | {"reference": True}]
    one = river(
        tmp_path,
        student=HYBRID,
        teachers=teachers,
        corpus=[SUMS | {"effort_shares": {"low": 1.0}}],
        audition={},
    )
    with pytest.raises(RecipeError, match="no teacher of reasoning supports it"):
        refuse_unsupported_efforts(one)


def test_the_student_speaks_with_its_new_weights_and_its_base_with_the_old(tmp_path: Path) -> None:
    flowed_copy(tmp_path, *STAGES)
    one = river(tmp_path)
    student, base, teacher = (
        one.models.load_participant(name, 4) for name in (STUDENT, BASE, "qwen-sapling")
    )
    weights = [s.engine.model.get_input_embeddings().weight for s in (student, base, teacher)]
    assert weights[0].shape == weights[1].shape
    assert not (weights[0] == weights[1]).all()
    assert [s.name for s in (student, base, teacher)] == [STUDENT, BASE, "qwen-sapling"]
    assert teacher.renderer is one.models.renderers["qwen-sapling"]
    assert student.renderer is base.renderer is one.models.student_renderer


def test_a_parent_has_the_licence_of_the_recipe_or_of_its_own_card(tmp_path: Path) -> None:
    teachers = [TINY["teachers"][0] | {"licence": "MIT"}, *TINY["teachers"][1:]]
    one = river(tmp_path, teachers=teachers)
    qwen, gemma, base = (
        one.models.lineage_parent(n) for n in ("qwen-sapling", "gemma-sapling", BASE)
    )
    assert (qwen.licence, qwen.family, qwen.model) == ("MIT", "qwen", "qwen-sapling")
    assert gemma.licence == "apache-2.0"
    assert base.model == "llama-sapling"


# --- published sets ---


def gsm(folder: Path, n: int = 40) -> str:
    lines = [
        json.dumps(
            {
                "question": f"Ann has {k} figs and buys {k + 1}. How many?",
                "answer": f"{k} + {k + 1}\n#### {2 * k + 1}",
            }
        )
        for k in range(n)
    ]
    (folder / "gsm.jsonl").write_text("\n".join(lines))
    return str(folder / "gsm.jsonl")


def test_published_sets_are_skills_beside_the_corpus_or_for_it(tmp_path: Path) -> None:
    one = {"benchmark": "gsm8k", "file": gsm(tmp_path)}
    beside = river(tmp_path, evaluation={"benchmarks": [one], "items": 5}, audition={"items": 3})
    assert [s.name for s in beside.tasks] == ["languages", "code", "reasoning", "gsm8k"]
    assert beside.recipe.skills == ("languages", "code", "reasoning")
    drawn = {split: beside.held_out_items(split)[3][1] for split in (Split.AUDITION, Split.TEST)}
    assert [len(items) for items in drawn.values()] == [3, 5]
    assert not {i.prompt.id for i in drawn[Split.AUDITION]} & {
        i.prompt.id for i in drawn[Split.TEST]
    }
    assert "gsm8k" in {s.skill for s in beside.check_samples}
    instead = river(
        tmp_path,
        evaluation={"benchmarks": [one | {"skill": "reasoning"}]},
        corpus=[*TINY["corpus"][:2], {"skill": "reasoning", "file": "p.jsonl"}],
    )
    assert [s.name for s in instead.tasks] == ["languages", "code", "reasoning"]
    assert {i.prompt.id.split("/")[0] for i in instead.tasks[2].items(Split.TEST, 99, 0)} == {
        "gsm8k"
    }
    assert river(tmp_path).items_digest(Split.TEST) != beside.items_digest(Split.TEST)
    with pytest.raises(DataError, match="reasoning has only 0 training questions"):
        _ = river(tmp_path, evaluation={"benchmarks": [one | {"skill": "reasoning"}]}).corpus


def test_another_version_of_a_grader_is_another_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = {"benchmark": "gsm8k", "file": gsm(tmp_path)}
    before = river(tmp_path, evaluation={"benchmarks": [one]}).items_digest(Split.TEST)
    raised = [
        replace(b, grader_version=b.grader_version + 1) if b.name == "gsm8k" else b
        for b in benchmarks.BENCHMARKS
    ]
    monkeypatch.setattr(benchmarks, "BENCHMARKS", tuple(raised))
    assert river(tmp_path, evaluation={"benchmarks": [one]}).items_digest(Split.TEST) != before


def test_a_measured_skill_that_is_taught_from_now_on_is_cast_anew(tmp_path: Path) -> None:
    """The questions are the same; the cast that stands has no part of that skill."""
    sets = {"benchmarks": [{"benchmark": "gsm8k", "file": gsm(tmp_path)}]}
    (tmp_path / "p.jsonl").write_text('{"prompt": "One and one?"}')
    before = river(tmp_path, evaluation=sets)
    after = river(
        tmp_path, evaluation=sets, corpus=[*TINY["corpus"], {"skill": "gsm8k", "file": "p.jsonl"}]
    )
    inputs = next(s.inputs for s in STREAM if s.name == "audition")
    assert before.items_digest(Split.TEST) == after.items_digest(Split.TEST)
    assert digest_json(inputs(before)) != digest_json(inputs(after))


def test_nothing_of_a_published_set_is_taught_asked_or_not(tmp_path: Path) -> None:
    file = gsm(tmp_path)
    known = [json.loads(line)["question"] for line in Path(file).read_text().splitlines()[:9]]
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text}) for text in [*known, "Another?"])
    )
    part = {"skill": "reasoning", "file": "p.jsonl"}
    corpus = river(
        tmp_path,
        corpus=[part],
        audition={},
        evaluation={"items": 1, "sets": [{"benchmark": "gsm8k", "file": file}]},
    ).corpus
    assert [p.conversation.messages[-1].text for p in corpus.prompts] == ["Another?"]
    assert len(river(tmp_path, corpus=[part], audition={}).corpus.prompts) == 10


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (
            {"benchmark": "gsm9k", "file": "gsm.jsonl"},
            (
                "evaluation.benchmarks: unknown benchmark 'gsm9k' -> known benchmarks: "
                "translation, xcopa"
            ),
        ),
        (
            {"benchmark": "mgsm", "file": "gsm.jsonl"},
            "the benchmark mgsm has no language of its own",
        ),
        ({"benchmark": "gsm8k", "file": "none.jsonl"}, "cannot read the benchmark"),
        ({"benchmark": "bfcl", "file": "gsm.jsonl"}, "no file of possible answers"),
    ],
)
def test_a_set_that_cannot_be_used_ends_a_run_at_its_start(
    tmp_path: Path, one: dict[str, str], reason: str
) -> None:
    gsm(tmp_path)
    with pytest.raises(DataError) as caught:
        _ = river(tmp_path, evaluation={"benchmarks": [one]}).check_samples
    assert reason in str(caught.value)


def test_a_yardstick_of_words_alone_that_would_have_to_choose_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    row = {"premise": "Itu jatuh.", "choice1": "a", "choice2": "b", "question": "cause", "label": 0}
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(row | {"id": k}) for k in range(40)))
    words = {
        "model": "text_only",
        "name": "w",
        "reference": True,
        "endpoint": {"url": "http://127.0.0.1:1", "protocol": "chat"},
    }
    sets = [{"benchmark": "xcopa", "file": str(tmp_path / "x.jsonl"), "language": "id"}]
    one = river(tmp_path, teachers=[*TINY["teachers"], words], evaluation={"benchmarks": sets})
    for start in (lambda: run_pipeline(one, lambda *_: None), lambda: plan_run(one)):
        with pytest.raises(
            TeacherError, match="w: its engine returns no log-probabilities, and xcopa compares"
        ):
            start()
    assert not one.folder.exists()


def test_a_set_too_small_for_a_split_is_told_at_the_start(tmp_path: Path) -> None:
    one = river(
        tmp_path, evaluation={"benchmarks": [{"benchmark": "gsm8k", "file": gsm(tmp_path, 1)}]}
    )
    with pytest.raises(
        DataError,
        match=r"evaluation\.benchmarks: no question of gsm8k is left for the (audition|test) split",
    ):
        _ = one.items_digest(Split.AUDITION), one.items_digest(Split.TEST)


def test_check_holds_one_teacher_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = river(tmp_path)
    load, loaded = one.models.load_teacher, list[tuple[str, Any]]()

    def load_alone(name: str, batch: int) -> Any:
        gc.collect()
        assert [n for n, model in loaded if model() is not None] == []
        teacher = load(name, batch)
        loaded.append((name, weakref.ref(teacher.engine.model)))
        return teacher

    monkeypatch.setattr(one.models, "load_teacher", load_alone)
    (tmp_path / "check").mkdir()
    run_check(one, tmp_path / "check", lambda *_: None)
    assert [name for name, _ in loaded] == ["qwen-sapling", "gemma-sapling", "gpt-oss-sapling"]
