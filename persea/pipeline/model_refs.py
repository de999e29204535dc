"""The models that a recipe names: renderers, identities, event maps, and weights.

Tokenizers and chat templates stay open for the whole run. Weights are loaded by the stage that
needs them and dropped after it, so that one teacher at a time is in memory.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import storage
from persea.alignment.event_map import EventMap, load_event_map
from persea.chat.messages import ThinkingEffort
from persea.chat.renderer import ChatRenderer
from persea.config.recipe import Recipe
from persea.config.schema import (
    TEXT_ONLY_MODEL,
    GenerationSection,
    ModelRef,
    StudentSection,
    TeacherSection,
)
from persea.errors import RefusedError
from persea.evaluation.answering import EvaluatedModel
from persea.models.identity import (
    computation_version,
    file_digests,
    file_stats,
    fingerprint,
    gguf_origin,
    model_name,
    model_warnings,
    resolved_revision,
    weight_bytes,
)
from persea.models.licence import read_ancestors, read_licence
from persea.models.loading import ModelSource, load_renderer, max_positions
from persea.models.run_student import refuse_changed_student
from persea.models.sizes import ModelSize, read_model_size
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
from persea.storage import digest_json
from persea.training.learning_rate import default_learning_rate

if TYPE_CHECKING:
    from persea.teachers.teacher import Teacher
    from persea.training.student import StudentModel

STUDENT, BASE = "student", "base"


def model_source(ref: ModelRef) -> ModelSource:
    """Return where the weights, the tokenizer and the template of a recipe's model come from."""
    sizes = tuple(sorted(ref.sizes.model_dump().items())) if ref.sizes else ()
    source = ModelSource(
        ref.model,
        ref.revision,
        ref.tokenizer,
        ref.family,
        sizes,
        isinstance(ref, StudentSection) and ref.thinking,
        chat_template=ref.chat_template,
        attn_implementation=ref.attn_implementation,
    )
    if isinstance(ref, TeacherSection):
        return replace(source, **ref.model_dump(include={"quantize", "precision", "offload"}))
    return source


def is_small_local_model(source: ModelSource, max_bytes: int) -> bool:
    """Return whether the weights lie in a local folder and have at most `max_bytes` bytes.

    A hub model may have to be downloaded first, and random weights cannot be measured: both
    return False.
    """
    num_bytes = weight_bytes(source, "check.measure_likelihood")
    return num_bytes is not None and num_bytes <= max_bytes


def has_effort(renderer: ChatRenderer, effort: ThinkingEffort) -> bool:
    """Return whether a model can be asked at a thinking effort.

    Every model can be asked to answer at once. gpt-oss, which always thinks, then thinks at its
    lowest effort, and the student does not see the thought.
    """
    return effort is ThinkingEffort.NONE or effort in renderer.family.efforts


def silence_transformers() -> None:
    """Make transformers print errors only: persea has progress bars of its own.

    transformers takes seconds to import, and many commands do without it. So it is not imported
    here: the environment tells it when it is.
    """
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    elif "huggingface_hub" in sys.modules:  # it has read its environment
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()


@dataclass(eq=False)
class ModelRefs:
    """The student, its base and the teachers of one recipe.

    Properties open tokenizers and files when they are first read, and keep the result.

    Attributes:
        recipe: The recipe that names the models.
        folder: The run folder. It holds the trained student and the handshakes of servers.
        remote_engines: Teacher name -> engine of its server, filled by `load_teacher`: one
            handshake and one budget a run.
    """

    recipe: Recipe
    folder: Path
    remote_engines: dict[str, Any] = field(default_factory=dict, init=False)

    def teacher_ref(self, name: str) -> TeacherSection:
        """Return the recipe's section of a teacher."""
        return next(t for t in self.recipe.teachers if t.name == name)

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of the models that teach: every teacher of the recipe but the reference models."""
        return tuple(t.name for t in self.recipe.teachers if not t.reference)

    # --- tokenizers and templates ---

    @cached_property
    def student_renderer(self) -> ChatRenderer:
        """The student's chat renderer."""
        return load_renderer(
            model_source(self.recipe.student), "student.model", self.recipe.template_date
        )

    @cached_property
    def renderers(self) -> dict[str, ChatRenderer]:
        """Teacher name -> chat renderer, in the order of the recipe.

        The text of a teacher whose tokenizer is unknown is rendered with the student's tokenizer.
        """
        return {
            t.name: self.student_renderer
            if t.model == TEXT_ONLY_MODEL
            else load_renderer(model_source(t), f"teachers.{k}.model", self.recipe.template_date)
            for k, t in enumerate(self.recipe.teachers)
        }

    def renderer(self, name: str) -> ChatRenderer:
        """Return the chat renderer of STUDENT, BASE or a teacher."""
        return self.renderers.get(name, self.student_renderer)

    @cached_property
    def event_maps(self) -> dict[str, EventMap]:
        """Teacher name -> event map to the student's vocabulary, without the reference models."""
        return {
            name: load_event_map(
                self.renderers[name],
                self.student_renderer,
                self.recipe.check.max_mask_search_tokens,
            )
            for name in self.teacher_names
        }

    @cached_property
    def family_info(self) -> dict[str, dict[str, Any]]:
        """Model name -> family, whether persea detected it, and warnings about the model."""
        models = [
            (t.name, model_source(t), self.renderers[t.name])
            for t in self.recipe.teachers
            if t.model != TEXT_ONLY_MODEL
        ]
        models.append((STUDENT, model_source(self.recipe.student), self.student_renderer))
        return {
            name: {
                "family": renderer.family.name,
                "detected": not source.family,
                "note": model_warnings(source, renderer, name) + self._text_note(renderer),
            }
            for name, source, renderer in models
        }

    def _text_note(self, renderer: ChatRenderer) -> str:
        """Return what a model's tokenizer lacks for plain texts; "" if the corpus has none."""
        has_texts = any(part.texts is not None for part in self.recipe.corpus)
        note = renderer.document_tokens.note if has_texts else ""
        return f" {note[0].upper()}{note[1:]}." if note else ""

    # --- identities: digests of everything that a model's answers depend on ---

    @cached_property
    def teacher_identities(self) -> dict[str, str]:
        """Teacher name -> digest of weights, renderer, effort and generation settings."""
        assert self._recorded_file_stats  # taken first, so that a later change is noticed
        return {
            t.name: digest_json(
                [
                    *(endpoint_identity(t) or [fingerprint(model_source(t), t.name)]),
                    self.renderers[t.name].digest,
                    t.effort,
                    *generation_identity(t),
                    *([t.attn_implementation] if t.attn_implementation else []),
                    *([] if is_remote(t) else computation_version(model_source(t), t.name)),
                ]
            )
            for t in self.recipe.teachers
        }

    @cached_property
    def _recorded_file_stats(self) -> dict[str, object]:
        return {
            t.name: () if t.endpoint else file_stats(model_source(t), t.name)
            for t in self.recipe.teachers
        }

    def refuse_changed_teacher(self, name: str) -> None:
        """Raise if a teacher is no longer the model that its identity was computed from.

        Raises:
            RefusedError: The teacher's files changed.
            TeacherError: The teacher's server now runs another model.
        """
        ref = self.teacher_ref(name)
        if ref.endpoint:
            self.remote_engines[name].verify_same_model()
            return
        if file_stats(model_source(ref), name) != self._recorded_file_stats[name]:
            raise RefusedError(
                f"the files of {name} changed during the capture",
                where=ref.model,
                remedy="restore the files, or capture the changed teacher in another run folder "
                "(--out); committed units stay",
            )

    @cached_property
    def student_identity(self) -> str:
        """Digest of the untrained student: weights, renderer and adaptation."""
        return digest_json(
            [
                fingerprint(model_source(self.recipe.student), STUDENT),
                self.student_renderer.digest,
                self.recipe.student.model_dump(include={"adapt", "lora"}),
                *([attention] if (attention := self.recipe.student.attn_implementation) else []),
            ]
        )

    # --- sizes ---

    @cached_property
    def student_size(self) -> ModelSize | None:
        """Size of the student; None if it cannot be told without its weights."""
        return read_model_size(model_source(self.recipe.student))

    @cached_property
    def teacher_sizes(self) -> dict[str, ModelSize | None]:
        """Teacher name -> size; None behind a server, or if it cannot be told."""
        return {
            ref.name: None if is_remote(ref) else read_model_size(model_source(ref))
            for ref in self.recipe.teachers
        }

    @cached_property
    def learning_rate(self) -> float:
        """The recipe's learning rate, or the default of the student's size."""
        given = self.recipe.training.learning_rate
        if given is not None:
            return given
        size, is_lora = self.student_size, self.recipe.student.lora is not None
        return default_learning_rate(size.num_parameters if size else 0, is_lora)

    # --- thinking efforts ---

    def can_answer_at(self, name: str, effort: ThinkingEffort) -> bool:
        """Return whether a teacher can be asked at a thinking effort.

        A chat server without `send_effort` receives no effort: it answers at its own effort only.
        """
        ref = self.teacher_ref(name)
        return has_effort(self.renderers[name], effort) and (
            effort in (ThinkingEffort.NONE, ref.effort) or not has_fixed_effort(ref)
        )

    def measured_efforts(
        self, name: str, extra_efforts: Sequence[ThinkingEffort]
    ) -> tuple[ThinkingEffort, ...]:
        """Return a model's own effort first, then those of `extra_efforts` that it supports."""
        own = ThinkingEffort.NONE
        if name in self.renderers:
            ref = self.teacher_ref(name)
            own, extra_efforts = ref.effort, () if has_fixed_effort(ref) else extra_efforts
        supported = self.renderers.get(name, self.student_renderer).family.efforts
        return tuple(dict.fromkeys([own, *(e for e in extra_efforts if e in supported)]))

    def describe_efforts(self) -> str:
        """Return a clause that lists the efforts of every teacher, for messages."""
        return "; ".join(
            f"{name} supports {', '.join(e for e in ThinkingEffort if self.can_answer_at(name, e))}"
            for name in self.teacher_names
        )

    # --- weights ---

    def load_teacher(self, name: str, batch: int) -> Teacher:
        """Load a teacher's weights, or connect to its server.

        Args:
            name: The teacher's name in the recipe.
            batch: Sequences that are computed at once.

        Raises:
            DataError: The weights cannot be read.
            TeacherError: The server does not offer the recipe's settings, or runs another model.
            MissingRequirementError: The API key or vLLM is missing.
        """
        ref = self.teacher_ref(name)
        if not is_remote(ref):
            return self._load_local(
                name, model_source(ref), self.renderers[name], batch, ref.effort, ref.generation
            )
        from persea.teachers.teacher import Teacher

        engine: Any = self.remote_engines.get(name) or open_remote_engine(
            ref, self.renderers[name], self.folder / "endpoints" / f"{name}.json"
        )
        if ref.endpoint:  # an engine of vLLM holds weights here, which are dropped after the stage
            self.remote_engines[name] = engine
        return Teacher(
            name,
            self.renderers[name],
            engine,
            ref.effort,
            max_answer_tokens=ref.generation.max_new_tokens or 0,
        )

    def open_servers(self, batch: int) -> None:
        """Connect to the server of every teacher that has one, before any of them is asked.

        Raises:
            TeacherError: A server cannot be reached, or does not offer the recipe's settings.
            MissingRequirementError: The API key is missing.
        """
        for teacher in self.recipe.teachers:
            if teacher.endpoint:
                self.load_teacher(teacher.name, batch)

    def load_participant(self, name: str, batch: int) -> Teacher:
        """Load a model that is evaluated: the trained student, its base, or a teacher."""
        if name not in (STUDENT, BASE):
            return self.load_teacher(name, batch)
        return self._load_local(
            name, self._student_source(name), self.student_renderer, batch, ThinkingEffort.NONE
        )

    def _student_source(self, name: str) -> ModelSource:
        if name == STUDENT:
            student = self.folder / "train" / "student"
            refuse_changed_student(student, STUDENT)
            return ModelSource(str(student))
        return model_source(self.recipe.student)

    def _load_local(
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
        max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        generation = generation or GenerationSection()
        engine = TransformersEngine(model, len(renderer.vocabulary), batch, sampling_of(generation))
        return Teacher(
            name,
            renderer,
            engine,
            effort,
            max_context_tokens=max_positions or 0,
            max_answer_tokens=generation.max_new_tokens or 0,
        )

    def load_student(self) -> StudentModel:
        """Load the student with the recipe's adapters, ready to be trained."""
        from persea.models.placement import compute_device, uses_bfloat16
        from persea.training.student import ComputeOptions, LoraSettings, load_student

        ref, training = self.recipe.student, self.recipe.training
        source, lora = model_source(ref), None
        if ref.lora:
            source = replace(source, quantize=ref.lora.quantize)
            lora = LoraSettings(**ref.lora.model_dump(exclude={"quantize"}))
        options = ComputeOptions(
            uses_bfloat16(training.precision, compute_device()),
            training.gradient_checkpointing,
            training.packing,
            training.torch_compile,
        )
        return load_student(source, self.student_renderer, lora, self.recipe.seed, options)

    # --- for evaluation and lineage ---

    def evaluated_model(
        self,
        name: str,
        batch: int,
        extra_efforts: Sequence[ThinkingEffort],
        load: Callable[[str], Teacher],
    ) -> EvaluatedModel:
        """Describe a model that is evaluated, without loading its weights.

        Args:
            name: STUDENT, BASE or a teacher's name.
            batch: Sequences that are computed at once.
            extra_efforts: Efforts to measure besides the model's own, where it supports them.
            load: Loads the model of a name when its first answer is needed. It is called at once
                for a teacher behind a server, whose handshake is part of its identity.
        """
        renderer = self.renderers.get(name, self.student_renderer)
        endpoint = self.teacher_ref(name).endpoint if name in self.renderers else None
        if name in self.renderers:
            identity = self.teacher_identities[name]
        else:
            source = self._student_source(name)
            identity = digest_json(
                [fingerprint(source, name), renderer.digest, *computation_version(source, name)]
            )
        if endpoint:
            load(name)  # another model's answers must not be reused
            identity = digest_json([identity, self.remote_engines[name].fingerprints[0].to_json()])
        return EvaluatedModel(
            name,
            identity,
            self.measured_efforts(name, extra_efforts),
            partial(load, name),
            {"batch": batch, "threads": self.recipe.threads},
            endpoint is not None and endpoint.protocol == "chat",
            not renderer.is_text,
        )

    def max_positions(self, name: str) -> int:
        """Return the positions of a model that is evaluated; 0 if they are not known."""
        if name in (STUDENT, BASE):  # opens no renderer: a context with one cannot be sent
            return max_positions(model_source(self.recipe.student), STUDENT)
        ref = self.teacher_ref(name)
        return 0 if ref.endpoint else max_positions(model_source(ref), name)

    def lineage_parent(self, name: str) -> ParentModel:
        """Describe a teacher, or the base, for the lineage record."""
        ref: ModelRef = self.recipe.student if name == BASE else self.teacher_ref(name)
        renderer = self.student_renderer if name == BASE else self.renderers[name]
        if isinstance(ref, TeacherSection) and ref.endpoint:
            return remote_parent(ref, renderer, self.folder / "endpoints" / f"{name}.json")
        source = model_source(ref)
        gguf = gguf_origin(source, name)
        licence = getattr(ref, "licence", "") or (
            str(gguf["licence"]) if gguf else read_licence(source, name)
        )
        return ParentModel(
            name,
            model_name(ref.model),
            resolved_revision(source, name),
            renderer.family.name,
            licence,
            fingerprint(source, name),
            gguf,
            file_digests(source, name),
            renderer.vocabulary.digest,
            storage.digest_bytes(renderer.template_text.encode()) if renderer.template_text else "",
            read_ancestors(source, name),
        )
