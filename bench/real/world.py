"""What all runs share: teacher, student, texts, caches; and one run from its settings."""

from __future__ import annotations

import hashlib
import json
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
from bench.real.models import load, student_speaker, tokenizer_text
from bench.real.teacher import RealTeacher, bits_per_byte
from bench.real.texts import ENGLISH, LANGUAGES, Text, held_out, train_texts
from bench.real.train import Run, finish, mean, train
from persea.models.gguf_header import find_gguf
from persea.models.gguf_model import model_folder

AT_ONCE = 48  # texts that the teacher continues at a time


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
        _, count, rows = run.student.split()
        spec = self.spec(int(count), run.languages, run.kilobytes)
        teacher = None if rows == "means" else self.teacher
        return model, extend(model, self.student, spec, rows, teacher)

    def run(self, run: Run) -> dict[str, Any]:
        """Return the line of a run."""
        if run.method == "teacher":
            return self.teacher_line(run)
        model, who = self.begun(run)
        texts = self.texts(run) if run.passes else []
        lessons = None
        if run.method in (*EVENTS, *WHOLE) and texts:
            scored = self.teacher.scored([t.text for t in texts])
            lessons = Lessons(self.teacher, who, texts, scored, self.cache / "targets")
            if run.method in EVENTS:
                for k in range(len(texts)):
                    lessons.targets(k, run.method, run.end)
        ids = who.vocabulary.encode_batch([t.text for t in texts]) if texts else []
        model, cost = train(run, model, who, ids, [t.size for t in texts], loss_of(run, lessons))
        return finish(run, model, who, cost)

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
