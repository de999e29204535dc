"""River: what a recipe's words stand for, opened when first needed, and the run folder it all flows into.

Voices (tokenizers, templates) stay open; weights are opened where a stage uses them and dropped after it, so that one
teacher at a time is in memory.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persea import skills, store
from persea.audition import Cast
from persea.bridge import Bridge, open_bridge
from persea.capture import Unit, plan_units
from persea.check import Sample, read_texts
from persea.corpus import Broken, Corpus, Prompt, gather, read_prompts
from persea.errors import DataError, Refused
from persea.lineage import Parent
from persea.measure import Item, Skill, Split
from persea.models import Source, fingerprint, local_folder, notes, open_voice, stamp
from persea.ranks import How, World
from persea.recipe import Recipe
from persea.sections import ModelRef
from persea.voice import Voice

if TYPE_CHECKING:
    from persea.student import Student
    from persea.teacher import Teacher

STUDENT, BASE = "student", "base"
SAMPLE = 64  # reference answers of one skill and language that check lays over each other; they are short and much alike
SMALL = 4_000_000_000  # bytes of weights that check opens unasked: seconds, and 8 GB in float32. The stages after it open any size
Tell = Callable[[str, float, str], None]  # stage, share done in [0, 1], a few words


def source(ref: ModelRef) -> Source:
    """Where a recipe's model comes from."""
    sizes = tuple(sorted(ref.sizes.model_dump().items())) if ref.sizes else ()
    return Source(ref.model, ref.revision, ref.tokenizer, ref.family, sizes)


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
        """Teacher name -> voice, in the recipe's order."""
        return {t.name: open_voice(source(t), f"teachers.{k}.model", self.recipe.today) for k, t in enumerate(self.recipe.teachers)}

    @cached_property
    def student_voice(self) -> Voice:
        return open_voice(source(self.recipe.student), "student.model", self.recipe.today)

    @cached_property
    def families(self) -> dict[str, dict[str, Any]]:
        """Speaker -> its family, whether persea recognised it or the recipe named it, and what a person should know of it."""
        speakers = [(t.name, source(t), self.voices[t.name]) for t in self.recipe.teachers]
        return {name: {"family": voice.family.name, "detected": not where.family, "note": notes(where, voice, name)}
                for name, where, voice in [*speakers, (STUDENT, source(self.recipe.student), self.student_voice)]}

    @cached_property
    def identities(self) -> dict[str, str]:
        """Teacher name -> digest of weights, voice and effort: what an answer depends on."""
        assert self._stamps  # noted first: what is written while it is read is seen afterwards
        return {t.name: digest_of([fingerprint(source(t), t.name), self.voices[t.name].digest, t.effort]) for t in self.recipe.teachers}

    @cached_property
    def _stamps(self) -> dict[str, object]:
        return {t.name: stamp(source(t), t.name) for t in self.recipe.teachers}

    def refuse_changed(self, name: str) -> None:
        """Raises Refused where a teacher's files are no longer those that its identity was made of."""
        ref = next(t for t in self.recipe.teachers if t.name == name)
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
        return {name: open_bridge(voice, self.student_voice) for name, voice in self.voices.items()}

    @cached_property
    def skills(self) -> tuple[Skill, ...]:
        """The corpus' skills, in its order."""
        return tuple(skills.named(name) for name in dict.fromkeys(p.skill for p in self.recipe.corpus))

    def items(self, split: Split) -> list[tuple[Skill, tuple[Item, ...]]]:
        """Held-out items: AUDITION chooses teachers, TEST compares everybody."""
        n = self.recipe.audition.items if split is Split.AUDITION else self.recipe.evaluation.items
        return [(skill, skill.items(split, n, self.recipe.seed)) for skill in self.skills]

    @cached_property
    def asked(self) -> str:
        """Digest of all held-out questions and their answers."""
        return digest_of([[i.prompt.id, i.prompt.conversation.to_json(), i.reference, i.calls, i.choices, i.key]
                        for split in (Split.AUDITION, Split.TEST) for _, items in self.items(split) for i in items])

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """What check lays over each other: every skill's reference answers, by language, and the recipe's texts."""
        samples = []
        for skill, items in self.items(Split.AUDITION):
            for language in dict.fromkeys(i.prompt.language for i in items):
                some = [i for i in items if i.prompt.language == language][:SAMPLE]
                said = tuple(i.answered for i in some)
                samples.append(Sample(skill.name, language, said, tuple(i.prompt.id for i in some)))
        check = self.recipe.check
        return (*samples, *(read_texts(language, file, check.lines) for language, file in check.texts.items()))

    @cached_property
    def measured(self) -> str:
        """Digest of what check lays over each other."""
        return digest_of([[s.skill, s.language, [c.to_json() for c in s.conversations]] for s in self.samples])

    @cached_property
    def corpus(self) -> Corpus:
        """What to ask, without test items."""
        held_out = [i.prompt for split in (Split.AUDITION, Split.TEST) for _, items in self.items(split) for i in items]
        broken: list[Broken] = []
        corpus = gather([self._prompts(k, broken) for k in range(len(self.recipe.corpus))], held_out)
        return replace(corpus, broken=tuple(broken))

    def _prompts(self, k: int, broken: list[Broken]) -> list[Prompt]:
        part = self.recipe.corpus[k]
        if part.file is not None:
            prompts = list(read_prompts(Path(part.file), part.skill, part.language, broken.append if part.broken == "quarantine" else None))
            for prompt in prompts:
                if prompt.skill not in {s.name for s in self.skills}:
                    raise DataError(f"prompt {prompt.id} is of skill {prompt.skill!r}, which the corpus does not name", where=part.file,
                                    remedy=f"one of {', '.join(s.name for s in self.skills)}; or add a part of that skill")
            return prompts
        items = skills.named(part.skill).items(Split.TEACH, part.generate or 0, self.recipe.seed)
        if len(items) < (part.generate or 0):
            raise DataError(f"{part.skill} has only {len(items):,} questions to teach with", where=f"corpus.{k}.generate",
                            remedy=f"ask for at most {len(items):,}")
        return [replace(i.prompt, answer=i.reference) for i in items]

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
        return plan_units(self.corpus.prompts, self.cast, self.identities, c.unit, settings,
                          c.max_new_tokens if c.answers == "ask" else None)

    def teacher(self, name: str, batch: int) -> Teacher:
        """A teacher with its weights."""
        ref = next(t for t in self.recipe.teachers if t.name == name)
        return self._speaker(name, source(ref), self.voices[name], batch, ref.effort)

    def speaker(self, name: str, batch: int) -> Teacher:
        """The student as trained, its base, or a teacher: whoever is measured."""
        from persea.chat import Effort

        if name == STUDENT:
            return self._speaker(name, Source(str(self.folder / "train" / "student")), self.student_voice, batch, Effort.NONE)
        if name == BASE:
            return self._speaker(name, source(self.recipe.student), self.student_voice, batch, Effort.NONE)
        return self.teacher(name, batch)

    def _speaker(self, name: str, where: Source, voice: Voice, batch: int, effort: Any) -> Teacher:
        from persea.engines.local import LocalEngine
        from persea.models import open_model
        from persea.teacher import Teacher

        model = open_model(where, voice, name)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return Teacher(name, voice, LocalEngine(model, len(voice.vocabulary), batch), effort, context=context or 0)

    def student(self) -> Student:
        """The student, ready to be trained."""
        from persea.student import Lora, open_student

        ref = self.recipe.student
        lora = Lora(ref.lora.rank, ref.lora.alpha, ref.lora.targets) if ref.lora else None
        return open_student(source(ref), self.student_voice, lora, self.recipe.seed)

    def parent(self, name: str) -> Parent:
        """A teacher, or the base, for the lineage record."""
        ref: ModelRef = self.recipe.student if name == BASE else next(t for t in self.recipe.teachers if t.name == name)
        voice = self.student_voice if name == BASE else self.voices[name]
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
        """Skip a stage whose output stands; otherwise let it work in its folder and, last, write its record.

        Raises Refused where a finished training of another recipe, base or capture stands there, with what differs.
        """
        folder, key = self.folder / stage, digest_of(inputs)
        if self.stands(stage, key):
            tell(stage, 1.0, "stands")
            return
        record = folder / "done.json"
        if stage == "train" and record.is_file() and self.done("train")["key"] != key:
            from persea.checkpoints import differs

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


def set_threads(threads: int) -> None:
    """Fix torch's threads; the same number gives the same bits. 0 leaves torch's own choice."""
    if threads:
        import torch

        torch.set_num_threads(threads)


def quieten() -> None:
    """Let transformers say only what is an error: persea has bars of its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def digest_of(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, default=str, sort_keys=True).encode()).hexdigest()
