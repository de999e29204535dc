"""River: what a recipe's words stand for, opened when first needed, and the run folder it all flows into.

Voices (tokenizers, templates) stay open; weights are opened where a stage uses them and dropped after it, so that one
teacher at a time is in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage as store
from persea.alignment.event_map import EventMap, load_event_map
from persea.cache.capture import CaptureUnit, plan_units
from persea.chat.messages import ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.config.recipe import Recipe
from persea.config.schema import TEXT_ONLY_MODEL, GenerationSection, ModelRef
from persea.config.schema import StudentSection as StudentRef
from persea.config.schema import TeacherSection as TeacherRef
from persea.data.dedup import DedupOptions
from persea.data.prompts import Corpus, MalformedLine, build_corpus
from persea.errors import DataError, RecipeError, RefusedError
from persea.evaluation.answering import EvaluatedModel
from persea.evaluation.audition import Cast
from persea.evaluation.compatibility import ConversationSample
from persea.models.identity import file_stats, fingerprint, model_warnings
from persea.models.loading import ModelSource, load_renderer, local_folder
from persea.models.loading import set_threads as set_threads
from persea.pipeline import tasks_and_prompts as questions
from persea.pipeline.remote_teachers import (
    endpoint_identity,
    generation_identity,
    has_fixed_effort,
    is_remote,
    open_remote_engine,
    remote_parent,
    sampling_of,
)
from persea.report.lineage import ParentModel
from persea.storage import digest_json as digest_json
from persea.tasks.benchmarks import LoadedBenchmark, grading_options
from persea.tasks.task import Split, Task, TaskItem
from persea.training.distributed.world import LaunchOptions, World

if TYPE_CHECKING:
    from persea.teachers.teacher import Teacher
    from persea.training.student import StudentModel

STUDENT, BASE = "student", "base"
ProgressCallback = Callable[[str, float, str], None]  # stage, share done in [0, 1], a few words


def model_source(ref: ModelRef) -> ModelSource:
    """Where a recipe's model comes from."""
    sizes = tuple(sorted(ref.sizes.model_dump().items())) if ref.sizes else ()
    found = ModelSource(
        ref.model,
        ref.revision,
        ref.tokenizer,
        ref.family,
        sizes,
        isinstance(ref, StudentRef) and ref.thinking,
    )
    return (
        replace(found, quantize=ref.quantize, offload=ref.offload)
        if isinstance(ref, TeacherRef)
        else found
    )


def is_small_local_model(source: ModelSource, max_bytes: int) -> bool:
    """Return whether the weights are in a local folder and have at most `max_bytes`.

    Weights of a hub model may have to be downloaded, and random weights have no likelihoods worth
    measuring.
    """
    folder = None if source.is_random else local_folder(source.model, "check.measure_likelihood")
    return (
        folder is not None
        and sum(p.stat().st_size for p in folder.glob("*.safetensors")) <= max_bytes
    )


@dataclass(frozen=True, eq=False)
class RunContext:
    """A recipe and its run folder; how its training is spread over processes, and which of them this is."""

    recipe: Recipe
    folder: Path
    launch_options: LaunchOptions = field(default_factory=LaunchOptions)
    world: World = field(default_factory=World)

    @cached_property
    def renderers(self) -> dict[str, ChatRenderer]:
        """Teacher name -> voice, in the recipe's order. Words of a teacher whose tokenizer nobody knows are laid in the student's."""
        return {
            t.name: self.student_renderer
            if t.model == TEXT_ONLY_MODEL
            else load_renderer(model_source(t), f"teachers.{k}.model", self.recipe.template_date)
            for k, t in enumerate(self.recipe.teachers)
        }

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Those who teach, yardsticks left out."""
        return tuple(t.name for t in self.recipe.teachers if not t.reference)

    @cached_property
    def remote_engines(self) -> dict[str, Any]:
        """Teacher name -> engine of its server, filled when it is first asked: one handshake, one budget a run."""
        return {}

    @cached_property
    def student_renderer(self) -> ChatRenderer:
        return load_renderer(
            model_source(self.recipe.student), "student.model", self.recipe.template_date
        )

    @cached_property
    def family_info(self) -> dict[str, dict[str, Any]]:
        """Speaker -> its family, whether persea recognised it or the recipe named it, and what a person should know of it."""
        speakers = [
            (t.name, model_source(t), self.renderers[t.name])
            for t in self.recipe.teachers
            if t.model != TEXT_ONLY_MODEL
        ]
        return {
            name: {
                "family": voice.family.name,
                "detected": not where.family,
                "note": model_warnings(where, voice, name),
            }
            for name, where, voice in [
                *speakers,
                (STUDENT, model_source(self.recipe.student), self.student_renderer),
            ]
        }

    @cached_property
    def teacher_identities(self) -> dict[str, str]:
        """Teacher name -> digest of weights, voice and effort: what an answer depends on."""
        assert self._file_stats  # noted first: what is written while it is read is seen afterwards
        return {
            t.name: digest_json(
                [
                    *(endpoint_identity(t) or [fingerprint(model_source(t), t.name)]),
                    self.renderers[t.name].digest,
                    t.effort,
                    *generation_identity(t),
                ]
            )
            for t in self.recipe.teachers
        }

    @cached_property
    def _file_stats(self) -> dict[str, object]:
        return {
            t.name: () if t.endpoint else file_stats(model_source(t), t.name)
            for t in self.recipe.teachers
        }

    def refuse_changed_teacher(self, name: str) -> None:
        """Raises Refused where a teacher's files are no longer those that its identity was made of, TeacherError where its server is another's."""
        ref = next(t for t in self.recipe.teachers if t.name == name)
        if ref.endpoint:
            self.remote_engines[name].verify_same_model()
            return
        if file_stats(model_source(ref), name) != self._file_stats[name]:
            raise RefusedError(
                f"the files of {name} changed while it was asked",
                where=ref.model,
                remedy="put back what was there, or give the changed teacher a run of its own (--out): what is committed stays",
            )

    @cached_property
    def student_identity(self) -> str:
        return digest_json(
            [
                fingerprint(model_source(self.recipe.student), STUDENT),
                self.student_renderer.digest,
                self.recipe.student.model_dump(include={"adapt", "lora"}),
            ]
        )

    @cached_property
    def event_maps(self) -> dict[str, EventMap]:
        """Teacher name -> bridge to the student."""
        return {
            name: load_event_map(
                self.renderers[name],
                self.student_renderer,
                self.recipe.check.max_mask_search_tokens,
            )
            for name in self.teacher_names
        }

    @cached_property
    def benchmarks(self) -> tuple[LoadedBenchmark, ...]:
        """The recipe's published sets, read."""
        by = questions.make_safety_judge(
            self.recipe.evaluation.judge,
            self.recipe.teachers,
            lambda t: self.renderers[t].family.name,
            partial(self.load_teacher, batch=1),
        )
        evaluation = self.recipe.evaluation
        return questions.load_benchmarks(
            evaluation.benchmarks, by, grading_options(evaluation.grading)
        )

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """The corpus' skills, in its order; then what published sets measure besides."""
        return questions.measured_tasks(self.recipe.skills, self.benchmarks)

    def held_out_items(self, split: Split) -> list[tuple[Task, tuple[TaskItem, ...]]]:
        """Held-out items: AUDITION chooses teachers, TEST compares everybody."""
        n = self.recipe.audition.items if split is Split.AUDITION else self.recipe.evaluation.items
        found = [(skill, skill.items(split, n, self.recipe.seed)) for skill in self.tasks]
        if empty := [skill.name for skill, some in found if not some]:
            raise DataError(
                f"no question of {', '.join(empty)} is left for the {split}",
                where="evaluation.benchmarks",
                remedy="a set with more rows",
            )
        return found

    @cached_property
    def items_digest(self) -> str:
        """Digest of all held-out questions and their answers, and of who judges."""
        return digest_json(
            [
                *filter(None, [self.recipe.evaluation.judge]),
                *(
                    [
                        i.prompt.id,
                        i.prompt.conversation.to_json(),
                        i.reference,
                        i.calls,
                        i.choices,
                        i.answer_key,
                    ]
                    for split in (Split.AUDITION, Split.TEST)
                    for _, items in self.held_out_items(split)
                    for i in items
                ),
            ]
        )

    @cached_property
    def check_samples(self) -> tuple[ConversationSample, ...]:
        """What check lays over each other: every skill's reference answers, by language, and the recipe's texts."""
        return questions.make_check_samples(
            self.held_out_items(Split.AUDITION),
            self.recipe.check.texts,
            self.recipe.check.max_lines_per_text,
        )

    @cached_property
    def check_samples_digest(self) -> str:
        """Digest of what check lays over each other."""
        return digest_json(
            [
                [s.skill, s.language, [c.to_json() for c in s.conversations]]
                for s in self.check_samples
            ]
        )

    @cached_property
    def corpus(self) -> Corpus:
        """What to ask, without test items."""
        held_out = [
            i.prompt
            for split in (Split.AUDITION, Split.TEST)
            for _, items in self.held_out_items(split)
            for i in items
        ]
        held_out += [
            i.prompt for opened in self.benchmarks for i in opened.items
        ]  # asked this time or not
        broken: list[MalformedLine] = []
        parts = [
            questions.load_part_prompts(
                part,
                f"corpus.{k}.generate",
                self.tasks,
                self.recipe.skills,
                self.recipe.seed,
                broken.append,
            )
            for k, part in enumerate(self.recipe.corpus)
        ]
        return replace(
            build_corpus(
                parts,
                held_out,
                [part.near_duplicate_threshold for part in self.recipe.corpus],
                DedupOptions(**self.recipe.dedup.model_dump()),
            ),
            malformed=tuple(broken),
        )

    def refuse_unsupported_efforts(self) -> None:
        """Raises RecipeError where the student cannot learn a mode of the corpus, or nobody who may be cast for it can be asked in it."""
        for k, part in enumerate(self.recipe.corpus):
            for effort in part.effort_shares:
                where, pinned = (
                    f"corpus.{k}.effort_shares",
                    self.recipe.audition.pinned.get(part.skill),
                )
                if effort not in self.student_renderer.family.efforts:
                    raise RecipeError(
                        f"{effort} is asked for, and the student's template cannot tell it",
                        where=where,
                        remedy="write `thinking: true` under `student:`, or choose another student",
                    )
                if not any(
                    self.can_answer_at(name, effort)
                    for name in ([pinned] if pinned else self.teacher_names)
                ):
                    raise RecipeError(
                        f"{effort} is asked for, and no teacher of {part.skill} knows it: {self._efforts_message()}",
                        where=where,
                        remedy="choose among the efforts of the teacher, or add one that knows it",
                    )

    def _efforts_message(self) -> str:
        return "; ".join(
            f"{name} knows {', '.join(e for e in ThinkingEffort if self.can_answer_at(name, e))}"
            for name in self.teacher_names
        )

    def can_answer_at(self, name: str, effort: ThinkingEffort) -> bool:
        """Whether a teacher knows an effort, and is told it: a chat route without `send_effort` answers in one way, whatever it is asked for."""
        ref = next(t for t in self.recipe.teachers if t.name == name)
        return has_effort(self.renderers[name], effort) and (
            effort in (ThinkingEffort.NONE, ref.effort) or not has_fixed_effort(ref)
        )

    @cached_property
    def taught_efforts(self) -> dict[str, tuple[ThinkingEffort, ...]]:
        """Skill -> the efforts that the corpus teaches it in; empty where no part has modes."""
        taught: dict[str, set[ThinkingEffort]] = {}
        for part in self.recipe.corpus:
            taught.setdefault(part.skill, set()).update(part.effort_shares)
        return {
            skill: tuple(e for e in ThinkingEffort if e in efforts)
            for skill, efforts in taught.items()
            if efforts
        }

    def lm_eval_digests(self) -> dict[str, str]:
        """Speaker -> digest of the file of standard results that joins the page. DataError where it is not there."""
        found = {}
        for name, file in self.recipe.evaluation.lm_eval_results.items():
            if not Path(file).is_file():
                raise DataError(
                    "not there",
                    where=file,
                    remedy=f"run lm_eval on {name} first (docs/evaluate.md), or delete the line",
                )
            found[name] = store.digest_file(Path(file))
        return found

    @cached_property
    def cast(self) -> Cast:
        """Who teaches what, as the audition left it."""
        return Cast.from_json(store.read_json(self.folder / "audition" / "cast.json"))

    @cached_property
    def capture_units(self) -> tuple[CaptureUnit, ...]:
        """What the cast is asked, in units named by all that determines their bytes."""
        c = self.recipe.capture
        kind = (
            {"tau": c.sampling_threshold}
            if c.distributions == "sampled"
            else {"rows": c.distributions, "kl": c.max_kl}
        )
        settings = {
            **kind,
            "answers": c.answers,
            "max_new_tokens": c.max_new_tokens,
            "batch": c.batch_size,
            "seed": self.recipe.seed,
            "threads": self.recipe.threads,
        }
        longest = max(t.generation.max_new_tokens or c.max_new_tokens for t in self.recipe.teachers)
        units = plan_units(
            self.corpus.prompts,
            self.cast,
            self.teacher_identities,
            c.prompts_per_unit,
            settings,
            longest if c.answers == "ask" else None,
        )
        for name, skill, effort in sorted(
            {
                (u.teacher, p.skill, p.effort)
                for u in units
                for p in u.prompts
                if p.effort is not None
            }
        ):
            if not self.can_answer_at(name, effort):
                raise RecipeError(
                    f"{name} was cast for {skill}, which is to be asked at {effort} effort: {self._efforts_message()}",
                    where="corpus.effort_shares",
                    remedy=f"change the modes of {skill}, or pin a teacher who knows them: audition.pinned.{skill}",
                )
        return units

    def load_teacher(self, name: str, batch: int) -> Teacher:
        """A teacher with its weights."""
        ref = next(t for t in self.recipe.teachers if t.name == name)
        if is_remote(ref):
            from persea.teachers.teacher import Teacher

            engine: Any = self.remote_engines.get(name) or open_remote_engine(
                ref, self.renderers[name], self.folder / "endpoints" / f"{name}.json"
            )
            if ref.endpoint:  # weights in vLLM are dropped after their stage, as all that are here
                self.remote_engines[name] = engine
            return Teacher(
                name,
                self.renderers[name],
                engine,
                ref.effort,
                max_answer_tokens=ref.generation.max_new_tokens or 0,
            )
        return self._load_local_teacher(
            name, model_source(ref), self.renderers[name], batch, ref.effort, ref.generation
        )

    def load_participant(self, name: str, batch: int) -> Teacher:
        """The student as trained, its base, or a teacher: whoever is measured."""
        if name == STUDENT:
            return self._load_local_teacher(
                name,
                ModelSource(str(self.folder / "train" / "student")),
                self.student_renderer,
                batch,
                ThinkingEffort.NONE,
            )
        if name == BASE:
            return self._load_local_teacher(
                name,
                model_source(self.recipe.student),
                self.student_renderer,
                batch,
                ThinkingEffort.NONE,
            )
        return self.load_teacher(name, batch)

    def evaluated_model(
        self,
        name: str,
        batch: int,
        extra_efforts: Sequence[ThinkingEffort],
        load: Callable[[str], Teacher],
    ) -> EvaluatedModel:
        """A speaker to be measured at its own effort and those of `efforts` that it has. Weights are not loaded for that; a server says who it is."""
        voice = self.renderers.get(name, self.student_renderer)
        where = (
            ModelSource(str(self.folder / "train" / "student"))
            if name == STUDENT
            else model_source(self.recipe.student)
        )
        identity = (
            self.teacher_identities[name]
            if name in self.renderers
            else digest_json([fingerprint(where, name), voice.digest])
        )
        at = next((t.endpoint for t in self.recipe.teachers if t.name == name), None)
        identity = (
            digest_json(
                [identity, load(name) and self.remote_engines[name].fingerprints[0].to_json()]
            )
            if at
            else identity
        )  # another model's words are its own
        settings = {"batch": batch, "threads": self.recipe.threads}
        return EvaluatedModel(
            name,
            identity,
            self.measured_efforts(name, extra_efforts),
            partial(load, name),
            settings,
            at is not None and at.protocol == "chat",
        )

    def measured_efforts(
        self, name: str, extra_efforts: Sequence[ThinkingEffort]
    ) -> tuple[ThinkingEffort, ...]:
        """A speaker's own effort, and those of `efforts` that it has."""
        ref = next((t for t in self.recipe.teachers if t.name == name), None)
        own, extra_efforts = (
            (ThinkingEffort.NONE, extra_efforts)
            if ref is None
            else (ref.effort, () if has_fixed_effort(ref) else extra_efforts)
        )
        return tuple(
            dict.fromkeys(
                [
                    own,
                    *(
                        e
                        for e in extra_efforts
                        if e in self.renderers.get(name, self.student_renderer).family.efforts
                    ),
                ]
            )
        )

    def _load_local_teacher(
        self,
        name: str,
        source: ModelSource,
        renderer: ChatRenderer,
        batch: int,
        effort: Any,
        generation: GenerationSection | None = None,
    ) -> Teacher:
        from persea.models.loading import load_model
        from persea.teachers.engines.transformers import TransformersEngine
        from persea.teachers.teacher import Teacher

        model = load_model(source, renderer, name)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        how = generation or GenerationSection()
        engine = TransformersEngine(model, len(renderer.vocabulary), batch, sampling_of(how))
        return Teacher(
            name,
            renderer,
            engine,
            effort,
            max_context_tokens=context or 0,
            max_answer_tokens=how.max_new_tokens or 0,
        )

    def load_student(self) -> StudentModel:
        """The student, ready to be trained."""
        from persea.training.student import ComputeOptions, LoraSettings, load_student

        ref, t = self.recipe.student, self.recipe.training
        lora = LoraSettings(ref.lora.rank, ref.lora.alpha, ref.lora.targets) if ref.lora else None
        return load_student(
            model_source(ref),
            self.student_renderer,
            lora,
            self.recipe.seed,
            ComputeOptions(t.precision == "bfloat16", t.gradient_checkpointing, t.packing),
        )

    def lineage_parent(self, name: str) -> ParentModel:
        """A teacher, or the base, for the lineage record."""
        ref: ModelRef = (
            self.recipe.student
            if name == BASE
            else next(t for t in self.recipe.teachers if t.name == name)
        )
        voice = self.student_renderer if name == BASE else self.renderers[name]
        if isinstance(ref, TeacherRef) and ref.endpoint:
            return remote_parent(ref, voice, self.folder / "endpoints" / f"{name}.json")
        licence = getattr(ref, "licence", "") or voice.family.licence
        return ParentModel(
            name,
            Path(ref.model).name if Path(ref.model).is_dir() else ref.model,
            ref.revision,
            voice.family.name,
            licence,
            fingerprint(model_source(ref), name),
        )

    def read_stage_record(self, stage: str) -> dict[str, Any]:
        """The record a finished stage leaves. DataError where it has not run."""
        return store.read_json_with_checksum(
            self.folder / stage / "done.json", "delete it and run the stage again"
        )

    def is_up_to_date(self, stage: str, key: str) -> bool:
        """Whether a stage's output is there for the same inputs, whole."""
        if not (self.folder / stage / "done.json").is_file():
            return False
        record = self.read_stage_record(stage)
        files = {self.folder / stage / name: sha for name, sha in record["outputs"].items()}
        return record["key"] == key and all(
            path.is_file() and store.digest_file(path) == sha for path, sha in files.items()
        )

    def run_stage(
        self,
        stage: str,
        inputs: object,
        work: Callable[[Path, ProgressCallback], None],
        progress: ProgressCallback,
    ) -> None:
        """Skip a stage whose output stands (--resume never: train it anew); otherwise let it work in its folder and, last, write its record.

        Raises Refused where a finished training of another recipe, base or capture stands there, with what differs.
        """
        folder, key, anew = (
            self.folder / stage,
            digest_json(inputs),
            stage == "train" and self.launch_options.resume == "never",
        )
        if not anew and self.is_up_to_date(stage, key):
            progress(stage, 1.0, "stands")
            return
        record = folder / "done.json"
        if (
            stage == "train"
            and not anew
            and record.is_file()
            and self.read_stage_record("train")["key"] != key
        ):
            from persea.training.checkpoint import describe_input_changes

            different = describe_input_changes(folder, inputs) if isinstance(inputs, dict) else ""
            raise RefusedError(
                f"a student of another recipe, base or capture stands here ({different or 'no checkpoint tells which'})",
                where=str(folder / "student"),
                remedy=f"give this run another --out, or delete {folder}",
            )
        record.unlink(missing_ok=True)
        for half in folder.rglob(
            ".*.tmp"
        ):  # a killed run's; the lock says that nobody writes them now
            half.unlink()
        store.write_atomic(self.folder / "recipe.yaml", self.recipe.to_yaml().encode())
        begin = time.monotonic()
        progress(stage, 0.0, "")
        work(folder, progress)
        outputs = {
            str(p.relative_to(folder)): store.digest_file(p)
            for p in sorted(folder.rglob("*"))
            if p.is_file() and not {"checkpoints", "units"} & set(p.relative_to(folder).parts)
        }
        store.write_json_with_checksum(
            record, {"key": key, "seconds": round(time.monotonic() - begin, 2), "outputs": outputs}
        )
        progress(stage, 1.0, f"{time.monotonic() - begin:.0f} s")


def has_effort(renderer: ChatRenderer, effort: ThinkingEffort) -> bool:
    """Whether a teacher can be asked at an effort. Everybody can be asked to answer at once: gpt-oss, which always thinks, then thinks at
    its lowest effort, and the student does not see what it thought.
    """
    return effort is ThinkingEffort.NONE or effort in renderer.family.efforts


def silence_transformers() -> None:
    """Let transformers say only what is an error: persea has bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
