"""What all runs share: teacher, student, texts, caches; and one run from its settings."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from bench.objectives.vocabularies import Speaker
from bench.objectives.words import continued
from bench.real.extension import extend, extended_spec
from bench.real.methods import EVENTS, WHOLE, Lessons, loss_of
from bench.real.models import load, pruned, student_speaker, tokenizer_text
from bench.real.parent import Parent, taught_beside
from bench.real.teacher import RealTeacher, bits_per_byte, bytes_per_position
from bench.real.texts import ENGLISH, LANGUAGES, Text, held_out, train_texts
from bench.real.train import Loss, Run, finish, mean, train
from persea.models.gguf_header import find_gguf
from persea.models.gguf_model import model_folder

AT_ONCE = 48  # texts that the teacher continues at a time
POINTS = 5  # measures on dev along a run on test whose course is compared
CURVES = ("cross-entropy", EVENTS[-1])


def hf_folder(folder: Path) -> Path:
    """Return a folder in Hugging Face form: the folder itself, or its GGUF file's, dequantised."""
    file = find_gguf(str(folder), str(folder))
    return model_folder(file, str(folder)) if file else folder


@dataclass(frozen=True, eq=False)
class World:
    """Folders `gemma3-270m` and `smollm2` in `models`; everything kept lies in `cache`."""

    models: Path
    cache: Path

    @cached_property
    def teacher(self) -> RealTeacher:
        return RealTeacher(hf_folder(self.models / "gemma3-270m"), self.cache / "teacher")

    @cached_property
    def student_folder(self) -> Path:
        return hf_folder(self.models / "smollm2")

    @cached_property
    def tokenizer(self) -> str:
        return tokenizer_text(self.student_folder)

    @cached_property
    def student(self) -> Speaker:
        return student_speaker(self.tokenizer)

    def written(self, language: str, kilobytes: int, more: int) -> list[Text]:
        """Return about `more` kilobytes that the teacher wrote: the first quarter of each training
        text, continued by sampling; again and again with other seeds.
        """
        given, out, size = train_texts(language, kilobytes), list[Text](), 0
        turn = 0
        while size < 1000 * more:
            at = turn * AT_ONCE
            some = [given[k % len(given)] for k in range(at, at + AT_ONCE)]
            name = hashlib.sha256("\0".join([str(turn), *(t.text for t in some)]).encode())
            path = self.cache / "written" / f"{name.hexdigest()[:24]}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                texts = continued(self.teacher.head, some, seed=turn)  # type: ignore[arg-type]
                path.write_text(json.dumps(texts, ensure_ascii=False))
            for of, text in zip(some, json.loads(path.read_text()), strict=True):
                if text.strip() and size < 1000 * more:
                    out.append(Text(language, of.block, text))
                    size += out[-1].size
            turn += 1
        return out

    @cached_property
    def parent(self) -> Parent:
        return Parent(self.student_folder, self.cache / "parent", self.student)

    def texts(self, run: Run) -> list[Text]:
        out = [t for one in run.languages for t in train_texts(one, run.kilobytes)]
        if run.more:
            out += [t for one in run.languages for t in self.written(one, run.kilobytes, run.more)]
        return out

    def spec(self, count: int, languages: Sequence[str], kilobytes: int) -> str:
        """Return the longer tokenizer for some languages, made once."""
        name = f"{count} {' '.join(languages)} {kilobytes}.tokenizer.json"
        path = self.cache / "tokenizers" / name
        if not path.is_file():
            texts = [[t.text for t in train_texts(one, kilobytes)] for one in languages]
            scored = [self.teacher.scored(part) for part in texts]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                extended_spec(self.tokenizer, count, self.teacher.speaker.vocabulary, texts, scored)
            )
        return path.read_text()

    def begun(self, run: Run) -> tuple[Any, Speaker]:
        """Return the student before training, in float32, and its tokenizer."""
        model = load(self.student_folder, torch.float32)
        if run.student == "plain":
            return model, self.student
        if run.student.startswith("pruned"):
            return pruned(model, int(run.student.split()[1])), self.student
        _, count, rows = run.student.split()
        spec = self.spec(int(count), run.languages, run.kilobytes)
        teacher = None if rows == "means" else self.teacher
        return model, extend(model, self.student, spec, rows, teacher)

    def run(self, run: Run) -> dict[str, Any]:
        """Return the line of a run."""
        if run.method == "teacher":
            return self.teacher_line(run)
        return finish(run, *self.trained(run))

    def student_of(self, run: Run) -> tuple[Any, Speaker]:
        """Return the trained student of a run in float32; its weights are kept."""
        path = self.cache / "students" / f"{run.key}.pt"
        if path.is_file():
            model, who = self.begun(run)
            model.load_state_dict(torch.load(path, weights_only=True))
            return model, who
        model, who, _ = self.trained(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        return model, who

    def trained(self, run: Run) -> tuple[Any, Speaker, dict[str, Any]]:
        """Train; return the student, its tokenizer and what that cost."""
        model, who = self.begun(run)
        texts = self.texts(run) if run.passes else []
        taught, cost = len(texts), dict[str, Any]()
        texts += train_texts(ENGLISH, run.replay) if run.replay else []
        lessons = None
        if run.method in (*EVENTS, *WHOLE) and texts:
            lessons, cost = self.lessons(run, who, texts[:taught])
        loss = loss_of(run, lessons)
        if run.method == "parent" or (run.replay and lessons is not None):
            first = 0 if run.method == "parent" else taught
            loss = self.with_parent(run, loss, who, texts, first)
        ids = who.vocabulary.encode_batch([t.text for t in texts]) if texts else []
        old = len(self.student.vocabulary)
        model, trained = train(
            run,
            model,
            who,
            ids,
            [t.size for t in texts],
            loss,
            first_new=old if len(who.vocabulary) > old else None,
            points=POINTS if run.part == "test" and run.method in CURVES else 1,
        )
        return model, who, trained | cost

    def lessons(
        self, run: Run, who: Speaker, texts: Sequence[Text]
    ) -> tuple[Lessons, dict[str, Any]]:
        """Return the taught texts, and what their capture and their targets cost.

        The cost is kept, because a later run finds both on disk.
        """
        strings = [t.text for t in texts]
        scored = self.teacher.scored(strings)
        tag, bytes_each = "", None
        if run.entries or run.temperature != 1:
            scored = self.teacher.redrawn(scored, strings, run.entries, run.temperature)
            tag = f"{run.entries} {run.temperature:g} "
            if run.temperature == 1:
                bytes_each = bytes_per_position(scored, self.teacher.speaker, run.entries)
        begun = time.process_time()
        lessons = Lessons(self.teacher, who, texts, scored, self.cache / "targets", tag)
        if run.method in EVENTS:
            for k in range(len(texts)):
                lessons.targets(k, run.method, run.end)
        targets = time.process_time() - begun
        of = f"{who.vocabulary.digest} {run.method} {run.end} {tag} {' '.join(strings)}"
        cost: dict[str, Any] = {
            "capture_seconds": round(self.teacher.capture_seconds(strings), 1),
            "targets_seconds": self.dearest(f"targets_seconds {of}", targets),
        }
        return lessons, cost | ({} if bytes_each is None else {"bytes_each": bytes_each})

    def dearest(self, what: str, seconds: float) -> float:
        """Keep the CPU seconds of something; return those of the dearest time, the first."""
        path = self.cache / "costs" / hashlib.sha256(what.encode()).hexdigest()[:24]
        if path.is_file():
            seconds = max(seconds, float(path.read_text()))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{seconds}")
        return round(seconds, 1)

    def with_parent(
        self, run: Run, loss: Loss, who: Speaker, texts: Sequence[Text], first: int
    ) -> Loss:
        """Let the untrained student teach the texts from `first` on that both cut alike."""
        strings = [t.text for t in texts[first:]]
        alike = [
            k
            for k, (own, old) in enumerate(
                zip(
                    who.vocabulary.encode_batch(strings),
                    self.student.vocabulary.encode_batch(strings),
                    strict=True,
                )
            )
            if own == old
        ]
        states = self.parent.states([strings[k] for k in alike])
        states_of = {first + k: found for k, found in zip(alike, states, strict=True)}
        return taught_beside(loss, self.parent.head_VD, states_of, run.share)

    def teacher_line(self, run: Run) -> dict[str, Any]:
        """Return the teacher's own bits per byte."""
        measured = {}
        for language in (*run.languages, ENGLISH):
            texts = held_out(language, run.part)
            found = self.teacher.scored([t.text for t in texts])
            measured[language] = {
                "bits_per_byte": round(bits_per_byte(found, [t.size for t in texts]), 4)
            }
        return {
            "key": run.key,
            **vars(run),
            "mean": mean(measured, run.languages),
            "english": measured[ENGLISH]["bits_per_byte"],
            "measured": measured,
        }


__all__ = ["LANGUAGES", "World"]
