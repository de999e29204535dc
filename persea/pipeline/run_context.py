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
from persea.alignment.event_map import Bridge, open_bridge
from persea.cache.capture import Unit, plan_units
from persea.chat.messages import Effort
from persea.chat.renderer import Voice
from persea.config.recipe import Recipe
from persea.config.schema import WORDS, Generation, ModelRef
from persea.config.schema import Student as StudentRef
from persea.config.schema import Teacher as TeacherRef
from persea.data.prompts import Broken, Corpus, gather
from persea.errors import DataError, RecipeError, Refused
from persea.evaluation.answering import Speaker
from persea.evaluation.audition import Cast
from persea.evaluation.compatibility import Sample
from persea.models.loading import Source, fingerprint, local_folder, notes, open_voice, stamp
from persea.models.loading import set_threads as set_threads
from persea.pipeline import tasks_and_prompts as questions
from persea.pipeline.remote_teachers import far_parent, how_answered, is_far, is_undialled, open_far, sampling_of, what_answers
from persea.report.lineage import Parent
from persea.storage import digest_of as digest_of
from persea.tasks.benchmarks import Opened
from persea.tasks.task import Item, Skill, Split
from persea.training.distributed.world import How, World

if TYPE_CHECKING:
    from persea.teachers.teacher import Teacher
    from persea.training.student import Student

STUDENT, BASE = "student", "base"
SMALL = 4_000_000_000  # bytes of weights that check opens unasked: seconds, and 8 GB in float32. The stages after it open any size
Tell = Callable[[str, float, str], None]  # stage, share done in [0, 1], a few words


def source(ref: ModelRef) -> Source:
    """Where a recipe's model comes from."""
    sizes = tuple(sorted(ref.sizes.model_dump().items())) if ref.sizes else ()
    found = Source(ref.model, ref.revision, ref.tokenizer, ref.family, sizes, isinstance(ref, StudentRef) and ref.thinking)
    return replace(found, quantize=ref.quantize, offload=ref.offload) if isinstance(ref, TeacherRef) else found


def is_small(where: Source) -> bool:
    """Whether weights lie in a folder here and open in seconds. Those of a hub model may have to be fetched; random ones say nothing."""
    folder = None if where.is_random else local_folder(where.model, "check.likelihood")
    return folder is not None and sum(p.stat().st_size for p in folder.glob("*.safetensors")) <= SMALL


@dataclass(frozen=True, eq=False)
class River:
    """A recipe and its run folder; how its training is spread over processes, and which of them this is."""

    recipe: Recipe
    folder: Path
    how: How = field(default_factory=How)
    world: World = field(default_factory=World)

    @cached_property
    def voices(self) -> dict[str, Voice]:
        """Teacher name -> voice, in the recipe's order. Words of a teacher whose tokenizer nobody knows are laid in the student's."""
        return {t.name: self.student_voice if t.model == WORDS else open_voice(source(t), f"teachers.{k}.model", self.recipe.today)
                for k, t in enumerate(self.recipe.teachers)}

    @property
    def teaching(self) -> tuple[str, ...]:
        """Those who teach, yardsticks left out."""
        return tuple(t.name for t in self.recipe.teachers if not t.yardstick)

    @cached_property
    def far(self) -> dict[str, Any]:
        """Teacher name -> engine of its server, filled when it is first asked: one handshake, one budget a run."""
        return {}

    @cached_property
    def student_voice(self) -> Voice:
        return open_voice(source(self.recipe.student), "student.model", self.recipe.today)

    @cached_property
    def families(self) -> dict[str, dict[str, Any]]:
        """Speaker -> its family, whether persea recognised it or the recipe named it, and what a person should know of it."""
        speakers = [(t.name, source(t), self.voices[t.name]) for t in self.recipe.teachers if t.model != WORDS]
        return {name: {"family": voice.family.name, "detected": not where.family, "note": notes(where, voice, name)}
                for name, where, voice in [*speakers, (STUDENT, source(self.recipe.student), self.student_voice)]}

    @cached_property
    def identities(self) -> dict[str, str]:
        """Teacher name -> digest of weights, voice and effort: what an answer depends on."""
        assert self._stamps  # noted first: what is written while it is read is seen afterwards
        return {t.name: digest_of([*(what_answers(t) or [fingerprint(source(t), t.name)]), self.voices[t.name].digest, t.effort, *how_answered(t)])
                for t in self.recipe.teachers}

    @cached_property
    def _stamps(self) -> dict[str, object]:
        return {t.name: () if t.endpoint else stamp(source(t), t.name) for t in self.recipe.teachers}

    def refuse_changed(self, name: str) -> None:
        """Raises Refused where a teacher's files are no longer those that its identity was made of, TeacherError where its server is another's."""
        ref = next(t for t in self.recipe.teachers if t.name == name)
        if ref.endpoint:
            self.far[name].again()
            return
        if stamp(source(ref), name) != self._stamps[name]:
            raise Refused(f"the files of {name} changed while it was asked", where=ref.model,
                          remedy="put back what was there, or give the changed teacher a run of its own (--out): what is committed stays")

    @cached_property
    def student_identity(self) -> str:
        return digest_of([fingerprint(source(self.recipe.student), STUDENT), self.student_voice.digest,
                          self.recipe.student.model_dump(include={"adapt", "lora"})])

    @cached_property
    def bridges(self) -> dict[str, Bridge]:
        """Teacher name -> bridge to the student."""
        return {name: open_bridge(self.voices[name], self.student_voice) for name in self.teaching}

    @cached_property
    def published(self) -> tuple[Opened, ...]:
        """The recipe's published sets, read."""
        by = questions.judge(self.recipe.evaluation.judge, self.recipe.teachers, lambda t: self.voices[t].family.name, partial(self.teacher, batch=1))
        return questions.published(self.recipe.evaluation.sets, by)

    @cached_property
    def skills(self) -> tuple[Skill, ...]:
        """The corpus' skills, in its order; then what published sets measure besides."""
        return questions.measured(self.recipe.taught, self.published)

    def items(self, split: Split) -> list[tuple[Skill, tuple[Item, ...]]]:
        """Held-out items: AUDITION chooses teachers, TEST compares everybody."""
        n = self.recipe.audition.items if split is Split.AUDITION else self.recipe.evaluation.items
        found = [(skill, skill.items(split, n, self.recipe.seed)) for skill in self.skills]
        if empty := [skill.name for skill, some in found if not some]:
            raise DataError(f"no question of {', '.join(empty)} is left for the {split}", where="evaluation.sets", remedy="a set with more rows")
        return found

    @cached_property
    def asked(self) -> str:
        """Digest of all held-out questions and their answers, and of who judges."""
        return digest_of([*filter(None, [self.recipe.evaluation.judge]), *(
            [i.prompt.id, i.prompt.conversation.to_json(), i.reference, i.calls, i.choices, i.key]
            for split in (Split.AUDITION, Split.TEST) for _, items in self.items(split) for i in items)])

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """What check lays over each other: every skill's reference answers, by language, and the recipe's texts."""
        return questions.samples(self.items(Split.AUDITION), self.recipe.check.texts, self.recipe.check.lines)

    @cached_property
    def measured(self) -> str:
        """Digest of what check lays over each other."""
        return digest_of([[s.skill, s.language, [c.to_json() for c in s.conversations]] for s in self.samples])

    @cached_property
    def corpus(self) -> Corpus:
        """What to ask, without test items."""
        held_out = [i.prompt for split in (Split.AUDITION, Split.TEST) for _, items in self.items(split) for i in items]
        held_out += [i.prompt for opened in self.published for i in opened.items]  # asked this time or not
        broken: list[Broken] = []
        parts = [questions.prompts(part, f"corpus.{k}.generate", self.skills, self.recipe.taught, self.recipe.seed, broken.append)
                 for k, part in enumerate(self.recipe.corpus)]
        return replace(gather(parts, held_out, [part.near for part in self.recipe.corpus]), broken=tuple(broken))

    def refuse_modes(self) -> None:
        """Raises RecipeError where the student cannot learn a mode of the corpus, or nobody who may be cast for it can be asked in it."""
        for k, part in enumerate(self.recipe.corpus):
            for effort in part.modes:
                where, pinned = f"corpus.{k}.modes", self.recipe.audition.pinned.get(part.skill)
                if effort not in self.student_voice.family.efforts:
                    raise RecipeError(f"{effort} is asked for, and the student's template cannot tell it", where=where,
                                      remedy="write `thinking: true` under `student:`, or choose another student")
                if not any(self.can_be_asked(name, effort) for name in ([pinned] if pinned else self.teaching)):
                    raise RecipeError(f"{effort} is asked for, and no teacher of {part.skill} knows it: {self._efforts()}", where=where,
                                      remedy="choose among the efforts of the teacher, or add one that knows it")

    def _efforts(self) -> str:
        return "; ".join(f"{name} knows {', '.join(e for e in Effort if self.can_be_asked(name, e))}" for name in self.teaching)

    def can_be_asked(self, name: str, effort: Effort) -> bool:
        """Whether a teacher knows an effort, and is told it: a chat route without `dial` answers in one way, whatever it is asked for."""
        ref = next(t for t in self.recipe.teachers if t.name == name)
        return knows(self.voices[name], effort) and (effort in (Effort.NONE, ref.effort) or not is_undialled(ref))

    @cached_property
    def modes(self) -> dict[str, tuple[Effort, ...]]:
        """Skill -> the efforts that the corpus teaches it in; empty where no part has modes."""
        taught: dict[str, set[Effort]] = {}
        for part in self.recipe.corpus:
            taught.setdefault(part.skill, set()).update(part.modes)
        return {skill: tuple(e for e in Effort if e in efforts) for skill, efforts in taught.items() if efforts}

    def lm_eval(self) -> dict[str, str]:
        """Speaker -> digest of the file of standard results that joins the page. DataError where it is not there."""
        found = {}
        for name, file in self.recipe.evaluation.lm_eval.items():
            if not Path(file).is_file():
                raise DataError("not there", where=file, remedy=f"run lm_eval on {name} first (docs/evaluate.md), or delete the line")
            found[name] = store.digest_file(Path(file))
        return found

    @cached_property
    def cast(self) -> Cast:
        """Who teaches what, as the audition left it."""
        return Cast.from_json(store.read_json(self.folder / "audition" / "cast.json"))

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What the cast is asked, in units named by all that determines their bytes."""
        c = self.recipe.capture
        kind = {"tau": c.tau} if c.rows == "sampled" else {"rows": c.rows, "kl": c.kl}
        settings = {**kind, "answers": c.answers, "max_new_tokens": c.max_new_tokens, "batch": c.batch,
                    "seed": self.recipe.seed, "threads": self.recipe.threads}
        longest = max(t.generation.max_new_tokens or c.max_new_tokens for t in self.recipe.teachers)
        units = plan_units(self.corpus.prompts, self.cast, self.identities, c.unit, settings, longest if c.answers == "ask" else None)
        for name, skill, effort in sorted({(u.teacher, p.skill, p.effort) for u in units for p in u.prompts if p.effort is not None}):
            if not self.can_be_asked(name, effort):
                raise RecipeError(f"{name} was cast for {skill}, which is to be asked at {effort} effort: {self._efforts()}", where="corpus.modes",
                                   remedy=f"change the modes of {skill}, or pin a teacher who knows them: audition.pinned.{skill}")
        return units

    def teacher(self, name: str, batch: int) -> Teacher:
        """A teacher with its weights."""
        ref = next(t for t in self.recipe.teachers if t.name == name)
        if is_far(ref):
            from persea.teachers.teacher import Teacher

            engine: Any = self.far.get(name) or open_far(ref, self.voices[name], self.folder / "endpoints" / f"{name}.json")
            if ref.endpoint:  # weights in vLLM are dropped after their stage, as all that are here
                self.far[name] = engine
            return Teacher(name, self.voices[name], engine, ref.effort, longest=ref.generation.max_new_tokens or 0)
        return self._speaker(name, source(ref), self.voices[name], batch, ref.effort, ref.generation)

    def speaker(self, name: str, batch: int) -> Teacher:
        """The student as trained, its base, or a teacher: whoever is measured."""
        if name == STUDENT:
            return self._speaker(name, Source(str(self.folder / "train" / "student")), self.student_voice, batch, Effort.NONE)
        if name == BASE:
            return self._speaker(name, source(self.recipe.student), self.student_voice, batch, Effort.NONE)
        return self.teacher(name, batch)

    def heard_as(self, name: str, batch: int, efforts: Sequence[Effort], load: Callable[[str], Teacher]) -> Speaker:
        """A speaker to be measured at its own effort and those of `efforts` that it has. Weights are not loaded for that; a server says who it is."""
        voice = self.voices.get(name, self.student_voice)
        where = Source(str(self.folder / "train" / "student")) if name == STUDENT else source(self.recipe.student)
        identity = self.identities[name] if name in self.voices else digest_of([fingerprint(where, name), voice.digest])
        at = next((t.endpoint for t in self.recipe.teachers if t.name == name), None)
        identity = digest_of([identity, load(name) and self.far[name].first[0].to_json()]) if at else identity  # another model's words are its own
        settings = {"batch": batch, "threads": self.recipe.threads}
        return Speaker(name, identity, self.efforts(name, efforts), partial(load, name), settings, at is not None and at.protocol == "chat")

    def efforts(self, name: str, efforts: Sequence[Effort]) -> tuple[Effort, ...]:
        """A speaker's own effort, and those of `efforts` that it has."""
        ref = next((t for t in self.recipe.teachers if t.name == name), None)
        own, efforts = (Effort.NONE, efforts) if ref is None else (ref.effort, () if is_undialled(ref) else efforts)
        return tuple(dict.fromkeys([own, *(e for e in efforts if e in self.voices.get(name, self.student_voice).family.efforts)]))

    def _speaker(self, name: str, where: Source, voice: Voice, batch: int, effort: Any, generation: Generation | None = None) -> Teacher:
        from persea.models.loading import open_model
        from persea.teachers.engines.transformers import LocalEngine
        from persea.teachers.teacher import Teacher

        model = open_model(where, voice, name)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        how = generation or Generation()
        engine = LocalEngine(model, len(voice.vocabulary), batch, sampling_of(how))
        return Teacher(name, voice, engine, effort, context=context or 0, longest=how.max_new_tokens or 0)

    def student(self) -> Student:
        """The student, ready to be trained."""
        from persea.training.student import Lora, Ways, open_student

        ref, t = self.recipe.student, self.recipe.training
        lora = Lora(ref.lora.rank, ref.lora.alpha, ref.lora.targets) if ref.lora else None
        return open_student(source(ref), self.student_voice, lora, self.recipe.seed, Ways(t.precision == "bfloat16", t.recompute, t.packing))

    def parent(self, name: str) -> Parent:
        """A teacher, or the base, for the lineage record."""
        ref: ModelRef = self.recipe.student if name == BASE else next(t for t in self.recipe.teachers if t.name == name)
        voice = self.student_voice if name == BASE else self.voices[name]
        if isinstance(ref, TeacherRef) and ref.endpoint:
            return far_parent(ref, voice, self.folder / "endpoints" / f"{name}.json")
        licence = getattr(ref, "licence", "") or voice.family.licence
        return Parent(name, Path(ref.model).name if Path(ref.model).is_dir() else ref.model, ref.revision, voice.family.name, licence,
                      fingerprint(source(ref), name))

    def done(self, stage: str) -> dict[str, Any]:
        """The record a finished stage leaves. DataError where it has not run."""
        return store.read_sealed(self.folder / stage / "done.json", "delete it and run the stage again")

    def stands(self, stage: str, key: str) -> bool:
        """Whether a stage's output is there for the same inputs, whole."""
        if not (self.folder / stage / "done.json").is_file():
            return False
        record = self.done(stage)
        files = {self.folder / stage / name: sha for name, sha in record["outputs"].items()}
        return record["key"] == key and all(path.is_file() and store.digest_file(path) == sha for path, sha in files.items())

    def pass_through(self, stage: str, inputs: object, work: Callable[[Path, Tell], None], tell: Tell) -> None:
        """Skip a stage whose output stands (--resume never: train it anew); otherwise let it work in its folder and, last, write its record.

        Raises Refused where a finished training of another recipe, base or capture stands there, with what differs.
        """
        folder, key, anew = self.folder / stage, digest_of(inputs), stage == "train" and self.how.resume == "never"
        if not anew and self.stands(stage, key):
            tell(stage, 1.0, "stands")
            return
        record = folder / "done.json"
        if stage == "train" and not anew and record.is_file() and self.done("train")["key"] != key:
            from persea.training.checkpoint import differs

            different = differs(folder, inputs) if isinstance(inputs, dict) else ""
            raise Refused(f"a student of another recipe, base or capture stands here ({different or 'no checkpoint tells which'})",
                          where=str(folder / "student"),
                          remedy=f"give this run another --out, or delete {folder}")
        record.unlink(missing_ok=True)
        for half in folder.rglob(".*.tmp"):  # a killed run's; the lock says that nobody writes them now
            half.unlink()
        store.publish(self.folder / "recipe.yaml", self.recipe.to_yaml().encode())
        begin = time.monotonic()
        tell(stage, 0.0, "")
        work(folder, tell)
        outputs = {str(p.relative_to(folder)): store.digest_file(p) for p in sorted(folder.rglob("*"))
                   if p.is_file() and not {"checkpoints", "units"} & set(p.relative_to(folder).parts)}
        store.publish_sealed(record, {"key": key, "seconds": round(time.monotonic() - begin, 2), "outputs": outputs})
        tell(stage, 1.0, f"{time.monotonic() - begin:.0f} s")


def knows(voice: Voice, effort: Effort) -> bool:
    """Whether a teacher can be asked at an effort. Everybody can be asked to answer at once: gpt-oss, which always thinks, then thinks at
    its lowest effort, and the student does not see what it thought.
    """
    return effort is Effort.NONE or effort in voice.family.efforts


def quieten() -> None:
    """Let transformers say only what is an error: persea has bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
