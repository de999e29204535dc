"""The context of a run: a recipe, its run folder, and the data that the stages share.

Everything is computed when a stage first reads it, and kept for the stages that follow. Models are
in `model_refs`, the record of finished stages is in `stage_store`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from persea import storage
from persea.cache.canaries import Canaries, choose_canaries
from persea.cache.capture import CaptureUnit, plan_units
from persea.cache.given_answers import refuse_missing_answers
from persea.chat.messages import ThinkingEffort
from persea.config.recipe import Recipe
from persea.config.schema import TrainingSection
from persea.config.size_defaults import apply_size_defaults, has_size_defaults, resolve_steps
from persea.data.dedup import DedupOptions
from persea.data.held_out_texts import HeldOutText, read_held_out_texts
from persea.data.prompts import (
    Corpus,
    MalformedLine,
    Prompt,
    RemovalReason,
    build_corpus,
    refuse_lost_parts,
)
from persea.errors import DataError, RecipeError
from persea.evaluation.audition import Cast
from persea.evaluation.compatibility import ConversationSample
from persea.evaluation.text_contest import GivenTexts
from persea.evaluation.unwritable import UnwritableTexts, leave_out_unwritable
from persea.pipeline import tasks_and_prompts
from persea.pipeline.model_refs import BASE, STUDENT, ModelRefs
from persea.pipeline.stage_keys import STAGE_VERSIONS
from persea.pipeline.stage_store import StageStore
from persea.storage import digest_json
from persea.tasks.benchmarks import LoadedBenchmark, grading_options
from persea.tasks.task import Split, Task, TaskItem
from persea.training.distributed.world import LaunchOptions, World


@dataclass(eq=False)
class RunContext:
    """A recipe and its run folder, and how the training is spread over processes.

    Attributes:
        recipe: The recipe.
        folder: The run folder, `runs/<name>` by default.
        launch_options: How many processes train, and from which checkpoint.
        world: The processes that train together, and which of them this one is.
        task_files: Python files with questions and a grader.
        models: The recipe's models.
        stages: The records and outputs of the stages in the run folder.
        size_defaults: Dotted key -> value of each key that follows the student's size.
    """

    recipe: Recipe
    folder: Path
    launch_options: LaunchOptions = field(default_factory=LaunchOptions)
    world: World = field(default_factory=World)
    task_files: tuple[Path, ...] = ()
    models: ModelRefs = field(init=False, repr=False)
    stages: StageStore = field(init=False, repr=False)
    size_defaults: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.models = ModelRefs(self.recipe, self.folder)
        self.stages = StageStore(self.folder)
        if has_size_defaults(self.recipe) and not self.recipe.student.sizes:
            size = self.models.student_size
            self.recipe, self.size_defaults = apply_size_defaults(
                self.recipe,
                size.num_parameters if size else 0,
                self.models.max_positions(BASE) if size else 0,
            )
            self.models.recipe = self.recipe

    @cached_property
    def training(self) -> TrainingSection:
        """The section `training`, its epochs and ratios in steps of this corpus."""
        training = self.recipe.training
        if training.num_train_epochs is None and training.warmup_ratio is None:
            return training
        epochs = training.num_train_epochs
        resolved = resolve_steps(training, len(self.corpus.prompts) if epochs else 0)
        on_policy = resolved.on_policy
        if on_policy and on_policy.start_step >= resolved.steps:
            raise RecipeError(
                f"{on_policy.start_step}, but {epochs:g} epochs are {resolved.steps:,} steps",
                where="training.on_policy.start_step",
                remedy="fewer, or a larger `num_train_epochs:`",
            )
        return resolved

    @property
    def resolved_recipe(self) -> Recipe:
        """The recipe with `training` in steps."""
        return self.recipe.model_copy(update={"training": self.training})

    # --- tasks, held-out items and held-out texts ---

    @cached_property
    def held_out_texts(self) -> tuple[HeldOutText, ...]:
        """The documents of `evaluation.texts`."""
        return tuple(
            text
            for k, part in enumerate(self.recipe.evaluation.texts)
            for text in read_held_out_texts(
                Path(part.texts), part.skill, part.language, f"evaluation.texts.{k}", part.column
            )
        )

    @cached_property
    def held_out_texts_digest(self) -> str:
        """Digest of the documents of `evaluation.texts`."""
        return digest_json([[t.text, t.skill, t.language] for t in self.held_out_texts])

    @cached_property
    def benchmarks(self) -> tuple[LoadedBenchmark, ...]:
        """The published benchmarks and own tasks of the recipe, read from their files."""
        evaluation = self.recipe.evaluation
        judge = tasks_and_prompts.make_safety_judge(
            evaluation.judge,
            self.recipe.teachers,
            lambda name: self.models.renderers[name].family.name,
            partial(self.models.load_teacher, batch=1),
            evaluation.judge_max_new_tokens,
        )
        options = grading_options(evaluation.grading)
        return (
            *tasks_and_prompts.load_benchmarks(evaluation.benchmarks, judge, options),
            *tasks_and_prompts.load_own_tasks(self.recipe.tasks, self.task_files, judge, options),
        )

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The skills of the corpus in its order, then the tasks that only benchmarks measure.

        Without skills that are taught from texts alone, where held-out texts measure them.
        """
        evaluation = self.recipe.evaluation
        only_prompts = evaluation.texts and not evaluation.generated_tasks
        skills = [
            s for s in self.recipe.skills if s in self.skills_with_prompts or not only_prompts
        ]
        return tasks_and_prompts.measured_tasks(skills, self.benchmarks)

    @cached_property
    def evaluated_tasks(self) -> tuple[Task, ...]:
        """The tasks that the evaluation asks.

        Skills that are taught from texts alone have none, unless the recipe says so: the questions
        of a generator say nothing about the user's own texts. None at all if the student or all of
        its teachers have no chat template.
        """
        models, generated_tasks = self.models, self.recipe.evaluation.generated_tasks
        teachers = [models.renderers[name] for name in models.teacher_names]
        if models.student_renderer.is_text or all(t.is_text for t in teachers):
            return ()
        with_prompts = [s for s in self.recipe.skills if s in self.skills_with_prompts]
        skills = self.recipe.skills if generated_tasks else with_prompts
        if generated_tasks is False:
            skills = ()
        return tasks_and_prompts.measured_tasks(skills, self.benchmarks)

    def held_out_items(self, split: Split) -> list[tuple[Task, tuple[TaskItem, ...]]]:
        """Return the held-out items of a split: AUDITION chooses teachers, TEST compares models.

        Raises:
            DataError: A task has no item in this split.
        """
        if split is Split.AUDITION:
            n, tasks = self.recipe.audition.items, self.tasks
        else:
            n, tasks = self.recipe.evaluation.items, self.evaluated_tasks
        found = [(task, task.items(split, n, self.recipe.seed)) for task in tasks]
        if empty := [task.name for task, items in found if not items]:
            raise DataError(
                f"no question of {', '.join(empty)} is left for the {split} split",
                where="evaluation.benchmarks",
                remedy="give a set with more rows",
            )
        return found

    def items_digest(self, split: Split) -> str:
        """Return a digest of a split's questions, their right answers, and the judge."""
        return digest_json(
            [
                *filter(None, [self.recipe.evaluation.judge]),
                *([t.skill, t.metric, t.rubric] for t in self.recipe.tasks),
                *tasks_and_prompts.grader_versions(self.benchmarks),
                *(
                    [
                        i.prompt.id,
                        i.prompt.conversation.to_json(),
                        i.reference,
                        i.calls,
                        i.choices,
                        i.answer_key,
                    ]
                    for _, items in self.held_out_items(split)
                    for i in items
                ),
            ]
        )

    @property
    def check_samples(self) -> tuple[ConversationSample, ...]:
        """Conversations that check tokenizes: what is taught, and the texts of the recipe.

        Those that a model's vocabulary cannot write are left out.
        """
        return self._writable_check_samples[0]

    @property
    def unwritable_texts(self) -> list[UnwritableTexts]:
        """What was left out of `check_samples`, for each vocabulary that lacks bytes."""
        return self._writable_check_samples[1]

    @cached_property
    def _writable_check_samples(
        self,
    ) -> tuple[tuple[ConversationSample, ...], list[UnwritableTexts]]:
        check = self.recipe.check
        asked = self.asked_skills
        samples = tasks_and_prompts.make_check_samples(
            [(t, items) for t, items in self.held_out_items(Split.AUDITION) if t.name in asked],
            check.texts,
            check.max_lines_per_text,
            check.max_answers_per_language,
            tasks_and_prompts.given_samples(
                self.corpus.prompts if self.teaches_given_texts else (),
                self.are_answers_given,
                check.max_answers_per_language,
            ),
        )
        renderers = {STUDENT: self.models.student_renderer} | {
            name: self.models.renderers[name] for name in self.models.teacher_names
        }
        return leave_out_unwritable(samples, {n: r.vocabulary for n, r in renderers.items()})

    @cached_property
    def check_samples_digest(self) -> str:
        """Digest of the conversations that check tokenizes."""
        return digest_json(
            [
                [s.skill, s.language, [c.to_json() for c in s.conversations]]
                for s in self.check_samples
            ]
        )

    # --- the corpus and its capture ---

    @property
    def are_answers_given(self) -> bool:
        """Whether teachers score the answers of the prompt files, and write none."""
        return self.recipe.capture.answers == "given"

    @property
    def teaches_given_texts(self) -> bool:
        """Whether the student learns texts that no teacher wrote."""
        return self.are_answers_given or any(p.texts is not None for p in self.recipe.corpus)

    @property
    def skills_with_prompts(self) -> frozenset[str]:
        """Skills of the corpus with conversations, and not with plain texts alone."""
        return frozenset(p.skill for p in self.recipe.corpus if p.texts is None)

    @property
    def asked_skills(self) -> frozenset[str]:
        """Skills whose prompts teachers answer, and tasks that only benchmarks measure."""
        asked = frozenset() if self.are_answers_given else self.skills_with_prompts
        only_given = set(self.recipe.skills) - asked
        return frozenset(task.name for task in self.tasks if task.name not in only_given)

    @cached_property
    def corpus(self) -> Corpus:
        """The prompts that teachers answer and the texts that they score.

        Without held-out items and near-duplicates; long texts are split into windows.

        Raises:
            RefusedError: Everything of a part is left out.
        """
        held_out = [
            i.prompt
            for split in (Split.AUDITION, Split.TEST)
            for _, items in self.held_out_items(split)
            for i in items
        ]
        # every row of a benchmark, also those that this run does not draw
        held_out += [i.prompt for benchmark in self.benchmarks for i in benchmark.items]
        malformed: list[MalformedLine] = []
        notes: list[str] = []
        parts = [
            tasks_and_prompts.load_part_prompts(
                part,
                f"corpus.{k}.generate",
                self.tasks,
                self.recipe.skills,
                self.recipe.seed,
                malformed.append,
                notes.append,
            )
            for k, part in enumerate(self.recipe.corpus)
        ]
        if self.are_answers_given:
            refuse_missing_answers(parts)
        corpus = build_corpus(
            parts,
            held_out,
            [part.near_duplicate_threshold for part in self.recipe.corpus],
            DedupOptions(**self.recipe.dedup.model_dump()),
            [(text.id, text.text) for text in self.held_out_texts],
            self.are_answers_given,
        )
        refuse_lost_parts(corpus, parts)
        return replace(
            corpus,
            prompts=tuple(self.split_documents(corpus.prompts)),
            malformed=tuple(malformed),
            notes=tuple(notes),
        )

    @property
    def num_prompts(self) -> int:
        """Number of prompts and texts that are captured."""
        return len(self.corpus.prompts)

    def split_documents(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """Split documents into windows that the student and all its teachers take.

        The limits are `training.max_length`, and the context length of each model's configuration.
        """
        models = self.models
        limits = {name: models.max_positions(name) for name in (BASE, *models.teacher_names)}
        max_length = self.recipe.training.max_length
        limits[BASE] = min(max_length, limits[BASE] or max_length)
        renderers = models.renderers | {BASE: models.student_renderer}
        return tasks_and_prompts.split_documents(prompts, limits, renderers)

    @cached_property
    def taught_efforts(self) -> dict[str, tuple[ThinkingEffort, ...]]:
        """Skill -> thinking efforts that the corpus teaches; empty if no part has effort shares."""
        taught: dict[str, set[ThinkingEffort]] = {}
        for part in self.recipe.corpus:
            taught.setdefault(part.skill, set()).update(part.effort_shares)
        return {
            skill: tuple(e for e in ThinkingEffort if e in efforts)
            for skill, efforts in taught.items()
            if efforts
        }

    @cached_property
    def cast(self) -> Cast:
        """The teachers of each skill: the audition's, or those that leave nothing to measure.

        Raises:
            DataError: The audition has not run, and several teachers may teach a skill.
        """
        path = self.folder / "audition" / "cast.json"
        if path.is_file():
            return Cast.from_json(storage.read_json(path))
        if self.needs_audition or self.recipe.audition.without_gain != "warn":
            raise DataError(
                "no teacher is chosen yet, or compared with the student",
                where=str(path),
                remedy=f"run `persea audition {self.recipe.source_path}` first, or pin a teacher "
                "of each skill under audition.pinned",
            )
        return self.cast_without_audition

    @property
    def needs_audition(self) -> bool:
        """Whether several teachers may teach a skill, so that they must be measured."""
        pinned = self.recipe.audition.pinned
        return len(self.models.teacher_names) > 1 and any(
            skill not in pinned for skill in self.recipe.skills
        )

    @property
    def single_teachers(self) -> dict[str, str]:
        """Skill -> its teacher, of the skills that only one teacher may teach."""
        pinned, names = self.recipe.audition.pinned, self.models.teacher_names
        only = dict.fromkeys(self.recipe.skills, names[0]) if len(names) == 1 else {}
        return only | dict(pinned)

    @property
    def cast_without_audition(self) -> Cast:
        """The cast where each skill has one possible teacher."""
        pinned, single = self.recipe.audition.pinned, self.single_teachers
        return Cast(
            {skill: ((single[skill], 1.0),) for skill in self.recipe.skills},
            (),
            tuple(skill for skill in self.recipe.skills if skill in pinned),
        )

    @property
    def scored_skills(self) -> tuple[str, ...]:
        """Skills whose texts or answers are given, so that teachers are compared by bits."""
        return tuple(skill for skill in self.recipe.skills if skill not in self.asked_skills)

    def text_contestants(self, skill: str) -> tuple[tuple[str, ...], list[GivenTexts]]:
        """Return the teachers that can render a skill's given texts, and at most `audition.items`
        texts of each language, which all of them and the student can render.
        """
        models, items = self.models, self.recipe.audition.items
        prompts = (p for p in self.corpus.prompts if p.skill == skill)
        samples = tasks_and_prompts.given_samples(prompts, self.are_answers_given, items)
        teachers = {name: models.renderers[name] for name in models.teacher_names}
        able = tasks_and_prompts.able_teachers(samples, teachers)
        shared = [models.student_renderer, *(teachers[name] for name in able)]
        return able, tasks_and_prompts.texts_by_language(samples, shared)

    @cached_property
    def captured_corpus(self) -> Corpus:
        """The corpus without the parts that the audition leaves out of the distillation."""
        skipped = set(self.cast.skipped)
        return self.corpus.without(
            lambda p: self.cast.part_of(p.skill, p.language) in skipped, RemovalReason.NO_GAIN
        )

    @cached_property
    def canaries(self) -> Canaries | None:
        """The prompts that are answered twice; None if the recipe asks for none."""
        wanted = self.recipe.capture.canaries
        prompts = self.captured_corpus.prompts
        return choose_canaries(self.folder, prompts, wanted) if wanted else None

    @cached_property
    def capture_units(self) -> tuple[CaptureUnit, ...]:
        """The prompts of each teacher, in units named by a digest of all that sets their bytes.

        Raises:
            RecipeError: A teacher was cast for a thinking effort that it does not support.
        """
        capture, version = self.recipe.capture, STAGE_VERSIONS["capture"]
        sparsity = (
            {"tau": capture.sampling_threshold}
            if capture.distributions == "sampled"
            else {"rows": capture.distributions, "kl": capture.max_kl}
        )
        settings = {
            **sparsity,
            "answers": capture.answers,
            # format of the answers in a unit: since 2, a given answer is marked as such
            **({"given": 2} if self.are_answers_given else {}),
            "max_new_tokens": capture.max_new_tokens,
            "batch": capture.batch_size,
            "seed": self.recipe.seed,
            "threads": self.recipe.threads,
            **({"version": version} if version > 1 else {}),
            **(self.canaries.settings if self.canaries else {}),
        }
        longest = max(
            t.generation.max_new_tokens or capture.max_new_tokens for t in self.recipe.teachers
        )
        units = plan_units(
            self.captured_corpus.prompts,
            self.cast,
            self.models.teacher_identities,
            capture.prompts_per_unit,
            settings,
            None if self.are_answers_given else longest,
        )
        self._refuse_unsupported_units(units)
        return units

    def _refuse_unsupported_units(self, units: tuple[CaptureUnit, ...]) -> None:
        asked = {
            (unit.teacher, prompt.skill, prompt.effort)
            for unit in units
            for prompt in unit.prompts
            if prompt.effort is not None
        }
        for name, skill, effort in sorted(asked):
            if not self.models.can_answer_at(name, effort):
                raise RecipeError(
                    f"{name} was cast for {skill}, which needs {effort} effort: "
                    f"{self.models.describe_efforts()}",
                    where="corpus.effort_shares",
                    remedy=f"change the effort_shares of {skill}, or pin a teacher that supports "
                    f"them: audition.pinned.{skill}",
                )
