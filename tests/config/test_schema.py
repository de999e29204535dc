"""Recipe sections: defaults that depend on other keys, descriptions, immutability."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from persea.chat.families import FAMILIES
from persea.chat.families.generic import GENERIC_FAMILY_NAME
from persea.config.recipe import SECTION_CLASSES, Recipe
from persea.config.schema import (
    CaptureSection,
    LoraSection,
    LRSchedule,
    ModelRef,
    OnPolicySection,
    RandomModelSection,
    RecipeSection,
    StudentSection,
    TeacherSection,
    TrainingSection,
)


def test_a_recipe_may_name_every_family_and_the_generic_one() -> None:
    for name in ("", *(f.name for f in FAMILIES), GENERIC_FAMILY_NAME):
        assert StudentSection(model="org/student", family=name).family == name
    with pytest.raises(ValidationError):
        StudentSection(model="org/student", family="another")


def test_lora_has_defaults_only_where_it_is_asked_for() -> None:
    assert StudentSection(model="org/student").lora is None
    assert StudentSection(model="org/student", adapt="lora").lora == LoraSection()
    assert StudentSection(
        model="org/student", adapt="lora", lora=LoraSection(rank=8)
    ).lora == LoraSection(rank=8)


def test_each_kind_of_distribution_has_its_own_key() -> None:
    sampled, top = CaptureSection(), CaptureSection(distributions="topk")
    assert (sampled.distributions, sampled.sampling_threshold, sampled.max_kl) == (
        "sampled",
        0.02,
        None,
    )
    assert (top.distributions, top.sampling_threshold, top.max_kl) == ("topk", None, 0.01)


@pytest.mark.parametrize(
    ("on", "training", "key", "what"),
    [
        ({"start_step": 40}, {"steps": 40}, "start_step", "40, but there are 40 steps"),
        (
            {"start_step": 0, "rollouts": 24},
            {"batch_size": 16},
            "rollouts",
            "24 is not a multiple of `batch_size`, 16",
        ),
        (
            {"start_step": 0, "rollouts": 64, "max_staleness_steps": 5},
            {"batch_size": 16},
            "max_staleness_steps",
            "5, but the last of 64 answers is 6 steps old when used",
        ),
    ],
)
def test_rollouts_are_used_in_time_and_completely(
    on: dict[str, int], training: dict[str, int], key: str, what: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingSection(**training, on_policy=OnPolicySection(**on))  # type: ignore[arg-type]
    assert [f[:2] for f in caught.value.errors()[0]["ctx"]["found"]] == [(("on_policy", key), what)]
    assert (
        TrainingSection(
            steps=41,
            batch_size=16,
            on_policy=OnPolicySection(start_step=40, rollouts=64, max_staleness_steps=6),
        ).on_policy
        is not None
    )


def test_cooldown_and_validation_share_have_defaults_only_if_used() -> None:
    plain, asked = (
        TrainingSection(),
        TrainingSection(lr_scheduler_type=LRSchedule.WSD, eval_steps=100),
    )
    assert (plain.cooldown, plain.validation_share, plain.report_to) == (None, None, None)
    assert (asked.cooldown, asked.validation_share) == (0.2, 0.05)
    for idle in ({"cooldown": 0.1}, {"validation_share": 0.1}, {"gradient_accumulation_steps": 17}):
        with pytest.raises(ValidationError, match="contradiction"):
            TrainingSection(**idle)  # type: ignore[arg-type]


def test_sections_cannot_be_changed() -> None:
    section = TrainingSection()
    with pytest.raises(ValidationError):
        section.steps = 3  # type: ignore[misc]


def test_every_field_has_a_description() -> None:
    for name, section in {**SECTION_CLASSES, "recipe": Recipe}.items():
        for key, described in section.model_fields.items():
            assert described.description, f"{name}.{key}"


def test_every_section_is_found_by_its_key() -> None:
    """SECTIONS is written by hand: it must name each section that a field of a section holds."""
    held = [
        (key, (f.annotation, *get_args(f.annotation)))
        for s in (Recipe, *SECTION_CLASSES.values())
        for key, f in s.model_fields.items()
    ]
    sections = {
        key: kind for key, kinds in held for kind in kinds if kind in SECTION_CLASSES.values()
    }
    assert sections == SECTION_CLASSES
    assert set(RecipeSection.__subclasses__()) | set(ModelRef.__subclasses__()) == {
        *SECTION_CLASSES.values(),
        ModelRef,
        Recipe,
    }


def test_sft_has_no_partial_tokens() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingSection(objective="sft", partial_tokens=True)
    assert "`objective` is sft" in str(caught.value.errors()[0]["ctx"])


def test_weights_that_persea_does_not_load_are_not_quantised() -> None:
    for more in (
        {
            "model": "random",
            "name": "t",
            "tokenizer": "./t",
            "sizes": RandomModelSection(),
            "quantize": "4bit",
        },
        {"model": "a/b", "engine": "vllm", "quantize": "8bit"},
        {"model": "a/b", "engine": "vllm", "offload": True},
        {"model": "a/b", "engine": "vllm", "precision": "bfloat16"},
        {"model": "a/b", "quantize": "4bit", "precision": "bfloat16"},
        {
            "model": "random",
            "name": "t",
            "tokenizer": "./t",
            "sizes": RandomModelSection(),
            "precision": "float32",
        },
    ):
        with pytest.raises(ValidationError) as caught:
            TeacherSection(**more)
        assert "given, but" in str(caught.value.errors()[0]["ctx"])
