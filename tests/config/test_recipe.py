"""Recipes: valid files, their meaning, and the message of every mistake."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from persea.chat.families import FAMILIES
from persea.chat.messages import PINNED_DATE, ThinkingEffort
from persea.config.recipe import Recipe, load_recipe, recipe_json_schema
from persea.config.schema import (
    CorpusSection,
    LoraSection,
    RandomModelSection,
    StudentSection,
    TeacherSection,
)
from persea.config.yaml_source import ALLOWED_ENV_VARS
from persea.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GOOD = """\
student:
  model: org/student
teachers:
  - model: org/one
  - model: org/two
    effort: high
corpus:
  - {skill: code, generate: 10}
  - {skill: languages, file: more.jsonl, language: vi}
training:
  steps: 30
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """text -> path of a recipe file. The environment holds none of the allowed variables."""
    for name in ALLOWED_ENV_VARS:
        monkeypatch.delenv(name, raising=False)

    def to(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return to


def refusal(path: Path, *overrides: str) -> str:
    """The message of the one RecipeError that loading ends with, the folder's name left out."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{path.parent}{os.sep}", "")


# --- what is right ---


def test_a_short_recipe_gets_every_default(write: Any) -> None:
    path = write(GOOD)
    recipe = load_recipe(path)
    assert (recipe.name, recipe.seed, recipe.template_date, recipe.source_path) == (
        "mine",
        0,
        PINNED_DATE,
        path,
    )
    assert [t.name for t in recipe.teachers] == ["one", "two"]
    assert [t.effort for t in recipe.teachers] == [ThinkingEffort.NONE, ThinkingEffort.HIGH]
    assert (recipe.student.adapt, recipe.student.lora, recipe.student.sizes) == ("full", None, None)
    assert (recipe.training.steps, recipe.training.learning_rate, recipe.training.event_weight) == (
        30,
        None,
        0.7,
    )
    assert (
        recipe.audition.items,
        recipe.audition.pinned,
        recipe.capture.sampling_threshold,
        recipe.capture.prompts_per_unit,
    ) == (100, {}, 0.02, 256)
    assert (recipe.evaluation.items, recipe.check.min_common_share) == (200, 0.3)
    assert [(c.skill, c.generate, c.language) for c in recipe.corpus] == [
        ("code", 10, ""),
        ("languages", None, "vi"),
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_bundled_recipes_are_valid(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PERSEA_DATA", str(tmp_path))
    assert load_recipe(path).source_path == path


def test_values_of_three_bundled_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PERSEA_DATA", str(tmp_path))
    paths = [ROOT / "recipes" / f"{n}.yaml" for n in ("quickstart", "avocado", "real-vocabularies")]
    quick, avocado, real = map(load_recipe, paths)
    assert [r.name for r in (quick, avocado, real)] == [p.stem for p in paths]
    assert all(
        p.read_text().startswith(f"# {p.stem}: ") for p in paths
    )  # `persea recipes ls` shows the first line
    assert quick.student.model == str(ROOT / "saplings" / "llama-sapling")
    assert [t.name for t in quick.teachers] == ["qwen-sapling", "gemma-sapling", "gpt-oss-sapling"]
    assert [c.skill for c in quick.corpus] == [
        "languages",
        "code",
        "safety",
        "reasoning",
        "tools",
    ] and quick.threads == 1
    assert [t.model for t in avocado.teachers] == [
        "Qwen/Qwen3-30B-A3B",
        "google/gemma-3-27b-it",
        "openai/gpt-oss-120b",
    ]
    assert avocado.student.lora == LoraSection(
        rank=64, alpha=128, targets=(*LoraSection().targets, "gate_proj", "up_proj", "down_proj")
    )
    assert (avocado.training.learning_rate, avocado.capture.max_new_tokens) == (1e-4, 1024)
    assert real.teachers[0].tokenizer == str(tmp_path / "tokenizers" / "qwen3")
    assert real.teachers[2].sizes == RandomModelSection(hidden=32, layers=1, heads=2)
    assert (real.training.steps, real.training.batch_size, real.check.min_common_share) == (
        6,
        4,
        0.0,
    )
    assert real.audition.pinned == {"languages": "qwen3", "code": "gemma3", "reasoning": "gpt-oss"}


def test_onpolicy_is_the_quickstart_with_on_policy_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """So that the two students can be compared, and bench/onpolicy.py's arms are these recipes."""
    own, quick = (
        yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        for name in ("onpolicy", "quickstart")
    )
    assert own["training"].pop("on_policy")["start_step"] < own["training"]["steps"]
    assert own | {"name": "quickstart"} == quick


def test_importing_it_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import persea.config.recipe, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_scalars_are_what_they_look_like(write: Any) -> None:
    """YAML 1.1 reads `no` as false, 3e-3 as text and 1:30 as 90."""
    recipe = load_recipe(
        write(GOOD.replace("vi}", "no}") + "  learning_rate: 3e-4\ntoday: 2026-02-03\n"),
        ["student.revision=1:30"],
    )
    assert (recipe.corpus[1].language, recipe.training.learning_rate) == ("no", 3e-4)
    assert (recipe.template_date, recipe.student.revision) == (date(2026, 2, 3), "1:30")


def test_the_key_of_a_kind_survives_yaml(write: Any) -> None:
    top = load_recipe(write(GOOD), ["capture.distributions=topk"])
    assert load_recipe(write(top.to_yaml())).capture == top.capture


def test_a_recipe_can_be_made_in_python() -> None:
    part = CorpusSection(skill="code", generate=3)
    recipe = Recipe(
        name="mine",
        student=StudentSection(model="a/b"),
        teachers=(TeacherSection(model="c/d"),),
        corpus=(part,),
    )
    assert recipe.teachers[0].name == "d"
    assert len(recipe.hash) == 64 and yaml.safe_load(recipe.to_yaml())["student"]["model"] == "a/b"


def test_the_json_schema_describes_the_file() -> None:
    described = recipe_json_schema()
    json.dumps(described)
    assert described["required"] == ["student", "teachers", "corpus"]
    assert described["additionalProperties"] is False
    assert described["$defs"]["TeacherSection"]["required"] == ["model"]
    assert (
        "conversations a step"
        in described["$defs"]["TrainingSection"]["properties"]["batch_size"]["description"]
    )


# --- paths, variables ---


def test_paths_are_relative_to_the_recipe_and_hub_ids_are_left_alone(
    write: Any, tmp_path: Path
) -> None:
    (tmp_path / "near" / "model").mkdir(parents=True)
    teachers = (
        "teachers: [{model: near/model}, {model: far/model, name: x}, {model: ~/m, name: y}]\n"
    )
    student = "student: {model: ../s, tokenizer: near/model}\n"
    recipe = load_recipe(write(student + teachers + "corpus: [{skill: code, file: p.jsonl}]"))
    assert recipe.student.model == str(tmp_path.parent / "s")
    assert [t.model for t in recipe.teachers] == [
        str(tmp_path / "near" / "model"),
        "far/model",
        str(Path.home() / "m"),
    ]
    assert recipe.student.tokenizer == str(tmp_path / "near" / "model")
    assert recipe.corpus[0].file == str(tmp_path / "p.jsonl")


def test_texts_to_check_are_files_beside_the_recipe(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSEA_DATA", str(tmp_path / "data"))
    page = (
        TWO + REST + "check: {texts: {vi: vi.txt, py: 'sub/a.jsonl#code', random: random, "
        "th: '${PERSEA_DATA}/th.txt'}}\n"
    )
    recipe = load_recipe(write(page))
    assert recipe.check.texts == {
        "vi": str(tmp_path / "vi.txt"),
        "py": str(tmp_path / "sub" / "a.jsonl#code"),
        "random": str(tmp_path / "random"),
        "th": str(tmp_path / "data" / "th.txt"),
    }
    assert recipe.check.measure_likelihood is None
    assert recipe.as_written["check"]["texts"]["th"] == "${PERSEA_DATA}/th.txt"
    assert "measure_likelihood" not in recipe.as_written["check"]


def test_a_link_keeps_its_name(write: Any, tmp_path: Path) -> None:
    (tmp_path / "v17").mkdir()
    (tmp_path / "latest").symlink_to("v17")
    recipe = load_recipe(write(GOOD), ["teachers.0.model=./latest"])
    assert (recipe.teachers[0].name, recipe.teachers[0].model) == (
        "latest",
        str(tmp_path / "latest"),
    )


def test_a_folder_called_random_is_not_random(write: Any, tmp_path: Path) -> None:
    (tmp_path / "random").mkdir()
    recipe = load_recipe(write(GOOD), ["student={model: random, tokenizer: a/b, sizes: {}}"])
    assert recipe.student.model == "random"


def test_allowed_variables_are_filled_in(
    write: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = write(GOOD.replace("more.jsonl", "'${PERSEA_DATA}/more.jsonl'"))
    told = refusal(path)
    assert "the variable 'PERSEA_DATA' is not set -> export PERSEA_DATA=/some/folder" in told
    hashes = set()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.setenv("PERSEA_DATA", str(folder))
        assert load_recipe(path).corpus[1].file == str(folder / "more.jsonl")
        hashes.add(load_recipe(path).hash)
    assert len(hashes) == 1
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    assert load_recipe(path, ["student.model=${HF_HOME}/m"]).student.model == str(
        tmp_path / "hub" / "m"
    )


# --- hash and to_yaml ---


def test_the_hash_does_not_depend_on_the_folder(write: Any, tmp_path: Path) -> None:
    text = GOOD.replace("org/one", "./one")
    (tmp_path / "elsewhere").mkdir()
    here, there = load_recipe(write(text)), load_recipe(write(text, "elsewhere/mine.yaml"))
    assert here.teachers[0].model != there.teachers[0].model
    assert here.hash == there.hash


def test_order_comments_and_spelt_out_defaults_do_not_change_the_hash(write: Any) -> None:
    plain = load_recipe(write(GOOD)).hash
    head, tail = GOOD.split("teachers:")
    other = (
        f"# a comment\nseed: 0\nteachers:{tail}  weight_decay: 0.01\n"
        f"check: {{min_common_share: 3.0e-1}}\n{head}  thinking: false\n"
    )
    assert load_recipe(write(other)).hash == plain


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "name=x",
        "template_date=2025-01-02",
        "student.model=org/x",
        "student.adapt=lora",
        "teachers.0.effort=low",
        "teachers.0.licence=MIT",
        "corpus.0.generate=11",
        "audition.items=9",
        "audition.pinned.code=two",
        "capture.sampling_threshold=0.05",
        "capture.distributions=topk",
        "training.steps=31",
        "evaluation.batch_size=2",
        "check.min_common_share=0.1",
    ],
)
def test_any_field_changes_the_hash(write: Any, override: str) -> None:
    path = write(GOOD)
    assert load_recipe(path, [override]).hash != load_recipe(path).hash
    assert load_recipe(path, [override]).hash == load_recipe(path, [override]).hash


def variants() -> list[tuple[str, ...]]:
    """Recipes of random but right overrides, the same ones every time."""
    rng = random.Random(7)
    values = {
        "seed": range(9),
        "template_date": ("2024-02-29",),
        "name": ("a", "'1e5'", "0x1f", "yes", "2025-01-01", "null.x", "'1_000'", "0o7", "'1e-5'"),
        "student.adapt": ("full", "lora"),
        "student.family": ("llama", "gpt-oss"),
        "student.revision": ("main", '"1e5"', '"~"', "3.x"),
        "teachers.0.name": ("A", '"007"', '"1e3"', '"NO"', '"3.0"', '"2e-3"'),
        "teachers.1.licence": ("'a: b # c'", '"tab\\t"', "한국어", "'null'"),
        "teachers.1.effort": ("none", "low"),
        "corpus.1.language": ("no", "zh", '"off"'),
        "corpus.1.license": ("'='", "'<<'"),
        "capture.sampling_threshold": ("1e-5", "0.5", "5.0e-2"),
        "training.learning_rate": ("1e-6", "1", ".5"),
        "training.max_grad_norm": ("1e5", "7"),
        "audition.pinned": ("{code: two}", "{languages: two}", "{}"),
    }
    return [
        tuple(f"{k}={rng.choice(values[k])}" for k in rng.sample(list(values), 6))
        for _ in range(25)
    ]


@pytest.mark.parametrize("overrides", variants())
def test_to_yaml_loads_again_to_the_same_recipe(write: Any, overrides: tuple[str, ...]) -> None:
    first = load_recipe(write(GOOD), overrides)
    again = load_recipe(write(first.to_yaml(), "other.yaml"))
    assert (again.hash, again.to_yaml()) == (first.hash, first.to_yaml())
    assert again.model_dump() == first.model_dump()


# --- overrides ---


def test_overrides_apply_in_order(write: Any) -> None:
    recipe = load_recipe(
        write(GOOD),
        [
            "training.steps=20",
            "training.steps=21",
            "teachers.1.effort=low",
            "capture.sampling_threshold=1e-3",
            "audition.pinned.code=two",
            "student.revision=a=b",
            "corpus.0.skill=languages",
            "corpus.0={skill: code, generate: 5}",
        ],
    )
    assert (
        recipe.training.steps,
        recipe.training.batch_size,
        recipe.teachers[1].effort,
        recipe.capture.sampling_threshold,
    ) == (21, 16, ThinkingEffort.LOW, 1e-3)
    assert (recipe.audition.pinned, recipe.student.revision, recipe.corpus[0].generate) == (
        {"code": "two"},
        "a=b",
        5,
    )


def test_an_override_replaces_a_wrong_value(write: Any) -> None:
    assert (
        load_recipe(
            write(GOOD.replace("steps: 30", "steps: many")), ["training.steps=5"]
        ).training.steps
        == 5
    )
    assert (
        load_recipe(write(GOOD.replace("  steps: 30", "")), ["training.steps=5"]).training.steps
        == 5
    )


def test_an_override_of_an_alias_changes_only_its_own_place(write: Any) -> None:
    text = GOOD.replace("{skill: code, generate: 10}", "&a {skill: code, generate: 10}\n  - *a")
    assert [c.generate for c in load_recipe(write(text), ["corpus.0.generate=7"]).corpus] == [
        7,
        10,
        None,
    ]


BAD_OVERRIDES = [
    (
        "training.stpes=20",
        "--set training.stpes=20: training.stpes: unknown key -> did you mean 'steps'?",
    ),
    (
        "trainnig.steps=20",
        "--set trainnig.steps=20: trainnig: unknown key -> did you mean 'training'?",
    ),
    (
        "training.steps=many",
        "--set training.steps=many: training.steps: should be a whole number (got 'many') -> "
        "optimiser steps",
    ),
    ("training.steps='20'", "should be a whole number (got '20')"),
    ("training.steps=", "--set training.steps=: training.steps: has no value -> give one"),
    (
        "training.steps",
        "--set training.steps: not `key=value` -> for example --set training.steps=20",
    ),
    ("=20", "not `key=value`"),
    ("training..steps=20", "not `key=value`"),
    (
        "teachers.2.effort=low",
        "--set teachers.2.effort=low: teachers has no entry '2' -> it has 2; count from 0",
    ),
    ("teachers.two.effort=low", "teachers has no entry 'two' -> it has 2; count from 0"),
    ("teachers.-1.effort=low", "teachers has no entry '-1'"),
    (
        "teachers.1.effort.x=low",
        "--set teachers.1.effort.x=low: teachers.1.effort is a plain value -> leave out `.x`",
    ),
    ("capture.sampling_threshold=[1", "--set capture.sampling_threshold=[1: not YAML"),
    (
        "capture.sampling_threshold=!!python/name:os.system x",
        "the tag !!python/name:os.system is refused",
    ),
    ("teachers=[]", "--set teachers=[]: teachers: needs at least one entry"),
    (
        "student={model: a, model: b}",
        "--set student={model: a, model: b}: student.model: written twice, on lines 1 and 1 "
        "-> keep one",
    ),
    (
        "student.tokenizer=hf_abcdef",
        "--set student.tokenizer=...: student.tokenizer: looks like a secret",
    ),
    (
        "student={model: a/b, revision: hf_abcdef}",
        "--set student=...: student.revision: looks like a secret",
    ),
    ("training.stpes=2\n", "--set 'training.stpes=2\\n': training.stpes: unknown key"),
    ("training.steps='sk-abcdef'", "training.steps: looks like a secret"),
    ("teachers.0={model: x, wieght: 1}", "teachers.0.wieght: unknown key"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES, ids=[o for o, _ in BAD_OVERRIDES])
def test_bad_overrides(write: Any, override: str, message: str) -> None:
    told = refusal(write(GOOD), override)
    assert message in told
    assert told.startswith("--set ") and "abcdef" not in told and "\n" not in told


# --- what is wrong ---

REST = "corpus: [{skill: code, generate: 10}]\n"
S, T = "student: {model: a/b}\n", "teachers: [{model: a/c}]\n"
TWO = S + T
RANDOM = "student: {model: random, tokenizer: a/b, sizes: {%s}}\n" + T + REST

# (name, text, place, what and remedy)
FAMILY_NAMES = ", ".join(dict.fromkeys(f.name for f in FAMILIES))
BAD: list[tuple[str, str, str, str]] = [
    # not a recipe at all
    ("empty", "", "1:1", "the recipe is empty -> start from recipes/quickstart.yaml"),
    ("only comments", "# nothing\n", "1:1", "the recipe is empty"),
    ("list", "- a\n- b\n", "1:1", "does not consist of `key: value` lines"),
    ("scalar", "hello\n", "1:1", "does not consist of `key: value` lines"),
    ("two documents", TWO + REST + "---\na: 1\n", "4:1", "not YAML: but found another document"),
    ("unclosed list", TWO + "corpus: [\n", "4:1", "not YAML"),
    (
        "tab",
        "student:\n\tmodel: a/b\n",
        "2:1",
        "not YAML: found character '\\t' that cannot start any token -> indent with spaces",
    ),
    (
        "colon in value",
        "student: {model: a/b}\nname: a: b\n",
        "2:8",
        "quote a value that begins with a sign or holds `: `",
    ),
    ("bad indent", "student:\n  model: a\n tokenizer: b\n", "3:2", "not YAML"),
    (
        "control character",
        TWO + "name: a\x01b\n",
        "3:8",
        "not YAML: a control character -> delete it",
    ),
    ("unknown alias", TWO + "corpus: *x\n", "3:9", "not YAML: found undefined alias 'x'"),
    (
        "half a character",
        TWO + REST + 'name: "a\\ud800"\n',
        "4:7",
        "half a character -> write the plain values",
    ),
    (
        "python object",
        TWO + "corpus: !!python/object/apply:os.system ['x']\n",
        "3:9",
        "the tag !!python/object/apply:os.system is refused",
    ),
    (
        "own tag",
        TWO + REST + "seed: !env SEED\n",
        "4:7",
        "the tag !env is refused -> write the plain values",
    ),
    ("explicit int", TWO + REST + "seed: !!int many\n", "4:7", "the tag !!int is refused"),
    ("deep", "a: " + "[" * 40 + "]" * 40, "1:19", "nested more than 16 deep"),
    ("very deep", "a: " + "[" * 5000, "1:19", "nested more than 16 deep"),
    (
        "many aliases",
        "a: &a 1\nb: [" + ", ".join(["*a"] * 101) + "]\n",
        "2:405",
        "more than 100 aliases",
    ),
    (
        "alias bomb",
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
            for a, b in itertools.pairwise("abcdefghijk")
        ),
        "",
        "expand to too many values",
    ),
    ("alias of itself", "a: &a [*a]\n", "1:4", "expand to too many values"),
    ("number as key", TWO + REST + "1: 2\n", "4:1", "this key is not a word"),
    ("list as key", TWO + REST + "? [a]\n: 2\n", "4:3", "this key is not a word"),
    (
        "twice",
        TWO + REST + "seed: 1\nname: x\nseed: 2\n",
        "6:1",
        "seed: written twice, on lines 4 and 6 -> keep one",
    ),
    (
        "twice inside",
        "student:\n  model: a/b\n  model: a/c\n" + T + REST,
        "3:3",
        "student.model: written twice, on lines 2 and 3",
    ),
    # keys
    (
        "unknown key at the top",
        TWO + REST + "sed: 1\n",
        "4:1",
        "sed: unknown key -> did you mean 'seed'?",
    ),
    (
        "unknown section",
        TWO + REST + "trainning: {steps: 3}\n",
        "4:1",
        "trainning: unknown key -> did you mean 'training'?",
    ),
    (
        "typing error",
        TWO + REST + "training:\n  stpes: 3\n",
        "5:3",
        "training.stpes: unknown key -> did you mean 'steps'?",
    ),
    (
        "in a list",
        S + "teachers:\n  - model: a/c\n    efort: low\n" + REST,
        "4:5",
        "teachers.0.efort: unknown key -> did you mean 'effort'?",
    ),
    (
        "hyphens",
        TWO + REST + "capture: {max-new-tokens: 3}\n",
        "4:11",
        "capture.max-new-tokens: unknown key -> did you mean 'max_new_tokens'?",
    ),
    (
        "upper case",
        TWO + REST + "check: {Min_Common_Share: 0}\n",
        "4:9",
        "check.Min_Common_Share: unknown key -> did you mean 'min_common_share'?",
    ),
    (
        "per device",
        TWO + REST + "training: {per_device_train_batch_size: 3}\n",
        "4:12",
        "training.per_device_train_batch_size: unknown key -> write `batch_size:`, the "
        "conversations of a whole step (per device x devices x accumulation), and "
        "`gradient_accumulation_steps:` to split it",
    ),
    (
        "a number in quotes",
        TWO + REST + 'training: {steps: "60"}\n',
        "4:12",
        "training.steps: should be a whole number (got '60') -> write `steps: 60`",
    ),
    (
        "a number with separators in quotes",
        TWO + REST + 'training: {learning_rate: "1e-4"}\n',
        "4:12",
        "training.learning_rate: should be a number (got '1e-4') -> write `learning_rate: 1e-4`",
    ),
    (
        "steps and epochs",
        TWO + REST + "training: {max_steps: 9, num_train_epochs: 2}\n",
        "4:26",
        "training.num_train_epochs: given together with `steps` -> delete `num_train_epochs:` or "
        "`steps:`",
    ),
    (
        "of another section",
        TWO + REST + "training: {max_lines_per_text: 3}\n",
        "4:12",
        "training.max_lines_per_text: unknown key -> it belongs under `check:`",
    ),
    (
        "of two others",
        TWO + REST + "training: {items: 3}\n",
        "4:12",
        "it belongs under `audition:` or under `evaluation:`",
    ),
    (
        "of the top",
        TWO + REST + "check: {template_date: 2025-01-01}\n",
        "4:9",
        "it belongs at the top of the file",
    ),
    (
        "of a section, at the top",
        TWO + REST + "sampling_threshold: 0.1\n",
        "4:1",
        "sampling_threshold: unknown key -> it belongs under `capture:`",
    ),
    (
        "of nothing",
        TWO + REST + "check: {qqqq: 3}\n",
        "4:9",
        "check.qqqq: unknown key -> one of min_common_share",
    ),
    (
        "merge key",
        "student: {<<: {model: a/b}, model: a}\n" + T + REST,
        "1:11",
        "student.<<: unknown key",
    ),
    (
        "no student",
        "teachers: [{model: a/c}]\n" + REST,
        "1:1",
        "student: missing -> add `student:`, the model that learns",
    ),
    (
        "no teachers",
        "student: {model: a/b}\n" + REST,
        "1:1",
        "teachers: missing -> add `teachers:`",
    ),
    ("no corpus", TWO, "1:1", "corpus: missing -> add `corpus:`, the prompts that teachers answer"),
    (
        "no model",
        S + "teachers:\n  - name: x\n" + REST,
        "3:5",
        "teachers.0.model: missing -> add `model:`, a folder",
    ),
    (
        "no skill",
        TWO + "corpus:\n  - generate: 3\n",
        "4:5",
        "corpus.0.skill: missing -> add `skill:`",
    ),
    # values
    (
        "empty section",
        TWO + REST + "training:\n",
        "4:1",
        "training: has no value -> give one, or delete the line",
    ),
    ("null", TWO + REST + "seed: ~\n", "4:1", "seed: has no value"),
    (
        "null lora",
        "student: {model: a/b, adapt: lora, lora: }\n" + T + REST,
        "1:36",
        "student.lora: has no value",
    ),
    (
        "text for a number",
        TWO + REST + "training: {steps: many}\n",
        "4:12",
        "training.steps: should be a whole number (got 'many') -> optimiser steps",
    ),
    (
        "quoted number",
        TWO + REST + "training: {steps: '3'}\n",
        "4:12",
        "training.steps: should be a whole number (got '3')",
    ),
    (
        "fraction",
        TWO + REST + "training: {steps: 2.5}\n",
        "4:12",
        "training.steps: should be a whole number (got 2.5)",
    ),
    (
        "truth for a number",
        TWO + REST + "training: {steps: true}\n",
        "4:12",
        "should be a whole number (got true)",
    ),
    ("octal", TWO + REST + "seed: 010\n", "4:1", "seed: should be a whole number (got '010')"),
    (
        "endless digits",
        TWO + REST + f"seed: {'9' * 5000}\n",
        "4:1",
        "seed: should be a whole number (got '9999",
    ),
    (
        "list for text",
        TWO + REST + "name: [a]\n",
        "4:1",
        "name: should be text (got a list) -> name of the run's folder",
    ),
    (
        "list for a number",
        TWO + REST + "capture: {sampling_threshold: [1]}\n",
        "4:11",
        "capture.sampling_threshold: should be a number (got a list)",
    ),
    ("number for text", TWO + REST + "name: 3\n", "4:1", "name: should be text (got 3)"),
    (
        "not a number",
        TWO + REST + "training: {weight_decay: .nan}\n",
        "4:12",
        "training.weight_decay: should be a finite number (got NaN)",
    ),
    (
        "infinite",
        TWO + REST + "training: {max_grad_norm: .inf}\n",
        "4:12",
        "training.max_grad_norm: should be a finite number (got Infinity)",
    ),
    (
        "scalar for a section",
        TWO + REST + "training: fast\n",
        "4:1",
        "training: should be a section, its keys indented below it (got 'fast')",
    ),
    ("list for a section", TWO + REST + "training: [1]\n", "4:1", "training: should be a section"),
    (
        "section for a list",
        S + "teachers: {model: a/c}\n" + REST,
        "2:1",
        "teachers: should be a list, each entry after `- ` (got a section)",
    ),
    (
        "list for pins",
        TWO + REST + "audition: {pinned: [code]}\n",
        "4:12",
        "audition.pinned: should be a section",
    ),
    (
        "number for a pin",
        TWO + REST + "audition: {pinned: {code: 3}}\n",
        "4:21",
        "audition.pinned.code: should be text (got 3)",
    ),
    (
        "number for a target",
        "student: {model: a/b, adapt: lora, lora: {targets: [3]}}\n" + T + REST,
        "1:53",
        "student.lora.targets.0: should be text (got 3) -> put it in quotes",
    ),
    ("no teacher", S + "teachers: []\n" + REST, "2:1", "teachers: needs at least one entry"),
    (
        "effort",
        S + "teachers: [{model: a/c, effort: medum}]\n" + REST,
        "2:25",
        "teachers.0.effort: should be none, low, medium or high (got 'medum') -> did you "
        "mean 'medium'?",
    ),
    (
        "effort off",
        S + "teachers: [{model: a/c, effort: false}]\n" + REST,
        "2:25",
        "should be none, low, medium or high (got false)",
    ),
    (
        "family",
        "student: {model: a/b, family: gptoss}\n" + T + REST,
        "1:23",
        f"student.family: should be {FAMILY_NAMES}, generic or text "
        "(got 'gptoss') -> did you mean 'gpt-oss'?",
    ),
    (
        "adapt",
        "student: {model: a/b, adapt: qlora}\n" + T + REST,
        "1:23",
        "student.adapt: should be full or lora (got 'qlora')",
    ),
    (
        "date",
        TWO + REST + "template_date: 2025-02-30\n",
        "4:1",
        "template_date: should be a date such as 2025-01-01 (got '2025-02-30')",
    ),
    (
        "number as date",
        TWO + REST + "template_date: 20250101\n",
        "4:1",
        "template_date: should be a date such as 2025-01-01 (got 20250101)",
    ),
    (
        "name",
        TWO + REST + "name: ../x\n",
        "4:1",
        "name: should be a plain name (got '../x') -> name of the run's folder",
    ),
    (
        "language by its name",
        TWO + "corpus: [{skill: code, generate: 8, language: german}]\n",
        "3:37",
        "corpus.0.language: should be a language code (got 'german')",
    ),
    (
        "teacher's name",
        S + "teachers: [{model: a/c, name: a b}]\n" + REST,
        "2:25",
        "teachers.0.name: should be a plain name (got 'a b')",
    ),
    (
        "empty model",
        "student: {model: ''}\n" + T + REST,
        "1:11",
        "student.model: should be some text (got '')",
    ),
    # bounds
    (
        "no steps",
        TWO + REST + "training: {steps: 0}\n",
        "4:12",
        "training.steps: should be at least 1 (got 0)",
    ),
    (
        "too many",
        TWO + REST + "capture: {prompts_per_unit: 99999999999}\n",
        "4:11",
        "capture.prompts_per_unit: should be at most 1073741824 (got 99999999999)",
    ),
    (
        "broken lines of no file",
        TWO + "corpus: [{skill: code, generate: 10, on_malformed: quarantine}]\n",
        "3:38",
        "corpus.0.on_malformed: given, but no file that could have malformed lines -> "
        "delete `on_malformed:`",
    ),
    (
        "kl of a sample",
        TWO + REST + "capture: {max_kl: 0.02}\n",
        "4:11",
        "capture.max_kl: given, but `distributions` is sampled -> write `distributions: "
        "topk`, or delete `max_kl:`",
    ),
    (
        "tau of the likeliest",
        TWO + REST + "capture: {distributions: topk, sampling_threshold: 0.02}\n",
        "4:32",
        "capture.sampling_threshold: given, but `distributions` is topk -> write "
        "`distributions: sampled`, or delete `sampling_threshold:`",
    ),
    (
        "kl 0",
        TWO + REST + "capture: {distributions: topk, max_kl: 0}\n",
        "4:32",
        "capture.max_kl: should be at least 0.003 (got 0)",
    ),
    (
        "rows",
        TWO + REST + "capture: {distributions: full}\n",
        "4:11",
        "capture.distributions: should be sampled or topk (got 'full')",
    ),
    (
        "completion of the likeliest",
        TWO + REST + "capture: {distributions: topk}\ntraining: {partial_tokens: true}\n",
        "5:12",
        "training.partial_tokens: true, but the rest of a topk distribution has no tokens to "
        "look inside",
    ),
    (
        "tau 0",
        TWO + REST + "capture: {sampling_threshold: 0}\n",
        "4:11",
        "capture.sampling_threshold: should be more than 0 (got 0)",
    ),
    (
        "tau 0.6",
        TWO + REST + "capture: {sampling_threshold: 0.6}\n",
        "4:11",
        "capture.sampling_threshold: should be at most 0.5 (got 0.6)",
    ),
    (
        "share",
        TWO + REST + "training: {event_weight: 1.5}\n",
        "4:12",
        "training.event_weight: should be at most 1 (got 1.5) -> weight of the event loss",
    ),
    (
        "floor",
        TWO + REST + "check: {min_common_share: -0.1}\n",
        "4:9",
        "check.min_common_share: should be at least 0 (got -0.1)",
    ),
    (
        "disagreement",
        TWO + REST + "check: {max_disagreement: 2}\n",
        "4:9",
        "check.max_disagreement: should be at most 1 (got 2)",
    ),
    (
        "likelihood",
        TWO + REST + "check: {measure_likelihood: maybe}\n",
        "4:9",
        "check.measure_likelihood: should be true or false (got 'maybe') -> load the weights",
    ),
    (
        "text of texts",
        TWO + REST + "check: {texts: {vi: 3}}\n",
        "4:17",
        "check.texts.vi: should be text (got 3)",
    ),
    (
        "texts in a list",
        TWO + REST + "check: {texts: [a]}\n",
        "4:9",
        "check.texts: should be a section, its keys indented below it (got a list)",
    ),
    (
        "learning rate",
        TWO + REST + "training: {learning_rate: 0}\n",
        "4:12",
        "training.learning_rate: should be more than 0",
    ),
    (
        "nothing generated",
        TWO + "corpus: [{skill: code, generate: 0}]\n",
        "3:24",
        "corpus.0.generate: should be at least 1",
    ),
    (
        "rank",
        "student: {model: a/b, adapt: lora, lora: {rank: 0}}\n" + T + REST,
        "1:43",
        "student.lora.rank: should be at least 1",
    ),
    # contradictions
    (
        "random without tokenizer",
        "student: {model: random, sizes: {}}\n" + T + REST,
        "1:1",
        "student.tokenizer: missing; random weights have no tokenizer of their own -> add "
        "`tokenizer:`",
    ),
    (
        "random without sizes",
        "student: {model: random, tokenizer: a/b}\n" + T + REST,
        "1:1",
        "student.sizes: missing; random weights need a size -> add `sizes:",
    ),
    (
        "sizes without random",
        "student: {model: a/b, sizes: {hidden: 64}}\n" + T + REST,
        "1:23",
        "student.sizes: given, but this model has a size of its own -> delete `sizes:`",
    ),
    (
        "odd heads",
        RANDOM % "hidden: 36, heads: 8",
        "1:50",
        "student.sizes.hidden: 36 is not 8 heads of even width -> a multiple of 16",
    ),
    (
        "revision of a folder",
        "student: {model: ./x, revision: main}\n" + T + REST,
        "1:23",
        "student.revision: given, but only a hub model has one -> delete `revision:`",
    ),
    (
        "idle lora",
        "student: {model: a/b, lora: {rank: 8}}\n" + T + REST,
        "1:23",
        "student.lora: given, but `adapt` is full -> write `adapt: lora`, or delete `lora:`",
    ),
    (
        "nameless random",
        S + "teachers:\n  - {model: random, tokenizer: a/b, sizes: {}}\n" + REST,
        "3:5",
        "teachers.0.name: missing; `model: random` gives none -> add `name:`",
    ),
    (
        "nameless folder",
        S + "teachers: [{model: ..}]\n" + REST,
        "2:12",
        "teachers.0.name: missing; `model: ..` gives none",
    ),
    (
        "twin teachers",
        S + "teachers:\n  - model: a/c\n  - model: b/c\n" + REST,
        "4:5",
        "teachers.1.name: two teachers have the name 'c' -> give each its own `name:`",
    ),
    (
        "both sources",
        TWO + "corpus: [{skill: code, generate: 3, file: a.jsonl}]\n",
        "3:10",
        "corpus.0: both `generate` and `file` -> keep one",
    ),
    (
        "no source",
        TWO + "corpus: [{skill: code}]\n",
        "3:10",
        "corpus.0: neither `generate` nor `file`, `hub` or `texts` -> add `generate: 1000`, ",
    ),
    (
        "columns of nothing",
        TWO + "corpus: [{skill: code, generate: 3, columns: {prompt: q}}]\n",
        "",
        "given, but no `file` or `hub`",
    ),
    (
        "mode nobody knows",
        TWO + "corpus: [{skill: code, generate: 3, effort_shares: {hi: 1}}]\n",
        "3:53",
        "should be none, low, medium or high (got 'hi') -> did you mean 'high'?",
    ),
    (
        "mode without a share",
        TWO + "corpus: [{skill: code, generate: 3, effort_shares: {none: 0, high: 1}}]\n",
        "3:53",
        "corpus.0.effort_shares.none: should be more than 0 (got 0) -> thinking effort -> share",
    ),
    (
        "modes of half",
        TWO + "corpus: [{skill: code, generate: 3, effort_shares: {none: 0.25, high: 0.25}}]\n",
        "3:37",
        "corpus.0.effort_shares: shares that sum to 0.5 -> make them sum to 1",
    ),
    (
        "modes of given answers",
        TWO + "corpus: [{skill: code, generate: 3, effort_shares: {none: 1}}]\n"
        "capture: {answers: given}\n",
        "3:37",
        "corpus.0.effort_shares: given, but no teacher answers",
    ),
    (
        "pinned stranger",
        TWO + REST + "audition: {pinned: {code: d}}\n",
        "4:21",
        "audition.pinned.code: no teacher has the name 'd' -> one of c",
    ),
    (
        "pinned skill",
        TWO + REST + "audition: {pinned: {cod: c}}\n",
        "4:21",
        "audition.pinned.cod: no part of the corpus teaches 'cod' -> did you mean 'code'?",
    ),
    # secrets and variables
    (
        "key of an API",
        TWO + REST + "api_key: sk-abcdef\n",
        "4:1",
        "api_key: looks like a secret -> name an environment variable instead",
    ),
    (
        "hub token",
        "student: {model: a/b, revision: hf_abcdef}\n" + T + REST,
        "1:23",
        "student.revision: looks like a secret",
    ),
    (
        "key before a host",
        "student: {model: 'https://me:abcdef@host/m'}\n" + T + REST,
        "1:11",
        "student.model: looks like a secret",
    ),
    (
        "key in an address",
        S + "teachers: [{model: a/c, endpoint: {url: 'http://host/v1?key=abcdef'}}]\n" + REST,
        "2:36",
        "teachers.0.endpoint.url: looks like a secret",
    ),
    (
        "secret for a number",
        TWO + REST + "seed: ' sk-abcdef'\n",
        "4:1",
        "seed: looks like a secret",
    ),
    (
        "strange variable",
        "student: {model: '${HOME}/m'}\n" + T + REST,
        "1:11",
        "student.model: the variable 'HOME' may not be read here -> allowed: ${PERSEA_DATA}, "
        "${HF_HOME}",
    ),
    (
        "unset variable",
        "student: {model: '${HF_HOME}/m'}\n" + T + REST,
        "1:11",
        "the variable 'HF_HOME' is not set -> export HF_HOME=/some/folder; allowed: "
        "${PERSEA_DATA}, ${HF_HOME}",
    ),
    (
        "open variable",
        "student: {model: '${HF_HOME'}\n" + T + REST,
        "1:11",
        "the variable 'HF_HOME' is not set",
    ),
    (
        "nameless variable",
        TWO + "corpus: [{skill: code, file: '${}/a.jsonl'}]\n",
        "3:24",
        "the variable '' may not be read here",
    ),
]


@pytest.mark.parametrize(("name", "text", "place", "message"), BAD, ids=[b[0] for b in BAD])
def test_bad_recipes(write: Any, name: str, text: str, place: str, message: str) -> None:
    told = refusal(write(text))
    first = next((line for line in told.splitlines() if message in line), told)
    assert message in first
    assert first.startswith(f"mine.yaml:{place}: ") if place else first.startswith("mine.yaml:")
    assert " -> " in first and "abcdef" not in told
    assert len({line.split(" -> ")[0] for line in told.splitlines()}) == len(told.splitlines()), (
        "a problem is told once"
    )


def test_there_are_enough_bad_recipes() -> None:
    assert len({name for name, *_ in BAD}) == len(BAD) >= 40


def test_all_problems_are_reported_at_once_in_file_order(write: Any) -> None:
    told = refusal(
        write(
            "seeed: 1\nstudent:\n  model: random\n  adapt: ful\n"
            "teachers:\n  - model: a/b\n    wieght: 2\n  - {model: a/c, effort: hgih}\n"
            "corpus: []\ntraining:\n  steps: many\n  batch_size: 0\n"
        ),
        "check.flor=1",
    ).splitlines()
    assert [line.split(": ")[:2] for line in told] == [
        ["mine.yaml:1:1", "seeed"],
        ["mine.yaml:4:3", "student.adapt"],
        ["mine.yaml:7:5", "teachers.0.wieght"],
        ["mine.yaml:8:18", "teachers.1.effort"],
        ["mine.yaml:9:1", "corpus"],
        ["mine.yaml:11:3", "training.steps"],
        ["mine.yaml:12:3", "training.batch_size"],
        ["--set check.flor=1", "check.flor"],
    ]


def test_one_problem_has_message_location_and_remedy(write: Any) -> None:
    path = write(TWO + REST + "sed: 1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert (caught.value.message, caught.value.where, caught.value.remedy) == (
        "sed: unknown key",
        f"{path}:4:1",
        "did you mean 'seed'?",
    )


def test_a_secret_is_never_shown(write: Any) -> None:
    told = refusal(
        write(
            TWO + REST + "training: {steps: sk-abcdef, batch_size: hf_abcdef}\nseed: [sk-abcdef]\n"
        ),
        "name=sk-abcdef",
    )
    assert told.count("looks like a secret") == 4 and "abcdef" not in told


def test_files_that_cannot_be_read(write: Any, tmp_path: Path) -> None:
    write(GOOD)
    assert (
        refusal(tmp_path / "mien.yaml")
        == "mien.yaml: cannot read the recipe: No such file or directory -> did you mean mine.yaml?"
    )
    assert "Is a directory -> give the path of a .yaml file" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "none" / "x.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: café".encode("latin-1"))
    assert (
        refusal(tmp_path / "latin.yaml")
        == "latin.yaml: byte 9 is not UTF-8 -> save the file as UTF-8"
    )


def test_a_file_name_that_is_not_a_plain_name_is_refused(write: Any) -> None:
    path = write(GOOD, "My Recipe.yaml")
    assert "name: should be a plain name (got 'My Recipe') -> name of the run's folder" in refusal(
        path
    )
    assert load_recipe(path, ["name=mine"]).name == "mine"


def test_a_byte_order_mark_and_windows_newlines_are_no_problem(write: Any, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_recipe(tmp_path / "w.yaml", ["name=mine"]).hash == load_recipe(write(GOOD)).hash


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_recipe_loads_or_is_explained(write: Any, seed: int) -> None:
    """A damaged recipe loads, or each line of the RecipeError has a location and a remedy."""
    rng, text = random.Random(seed), (ROOT / "recipes" / "real-vocabularies.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for _ in range(rng.randint(1, 4)):
        k = rng.randrange(len(lines))
        damage = rng.choice(("cut", "swap", "junk", "indent"))
        if damage == "cut":
            del lines[k]
        elif damage == "swap":
            lines[k], lines[k - 1] = lines[k - 1], lines[k]
        elif damage == "indent":
            lines[k] = f"  {lines[k]}"
        else:
            at = rng.randint(0, len(lines[k]))
            junk = rng.choice(
                (
                    "&",
                    "*",
                    "{",
                    "}",
                    "- ",
                    ": ",
                    "!!x ",
                    "\t",
                    "\x07",
                    "'",
                    "#",
                    "1e9",
                    "null",
                    "~",
                    "\ud7ff",
                    "${X}",
                )
            )
            lines[k] = lines[k][:at] + junk + lines[k][at:]
    path = write("\n".join(lines))
    try:
        load_recipe(path)
    except RecipeError as error:
        assert all(
            line.startswith(str(path)) and " -> " in line for line in str(error).splitlines()
        )
