"""Measure the cost of boundary masks for on-policy batches with real vocabularies.

    PERSEA_DATA=... python bench/mask_cost.py      (8 minutes; 2 more for event maps at first)

Lines of parallel text stand in for answers of a Llama 3 student. Each teacher row is half the
realised next token and half the token frequencies of that language, which names more likely tokens
than a real, unsure model. Per teacher: milliseconds per common boundary (both sides) over all
boundaries and over the last ones, where most searches are cached; seconds per boundary with a cold
cache when every token of both vocabularies is tested; and the probability mass on impossible
tokens, found among likely tokens and missed below them. Writes bench/results/mask_cost.json.
"""

from __future__ import annotations

import json
import os
import time
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from persea.alignment.boundary_mask import BoundaryMask
from persea.alignment.event_map import load_event_map
from persea.alignment.spans import align
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.chat.messages import Conversation, Text
from persea.chat.renderer import ChatRenderer
from persea.models.loading import ModelSource, load_renderer
from persea.training.on_policy.candidates import MIN_CANDIDATE_PROB

DATA = Path(os.environ.get("PERSEA_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
OUT = Path(__file__).resolve().parent / "results" / "mask_cost.json"
TEACHERS = ("qwen3", "gemma3", "gpt-oss")
LANGUAGES = ("eng", "vie", "zho-CN", "jpn", "tha")
LINES, SEEN = 30, 400  # lines of each language measured; lines that token frequencies come from
WHOLE = 3  # contexts per side at which every token is tested
LOOK = 500  # the mass is measured at one of this many contexts


def renderer(name: str) -> ChatRenderer:
    return load_renderer(ModelSource("random", tokenizer=str(DATA / "tokenizers" / name)), name)


def lines(language: str) -> list[str]:
    text = unicodedata.normalize(
        "NFC", (DATA / "parallel" / f"ntrex.{language}.txt").read_text(encoding="utf-8")
    )
    return [line for line in text.split("\n") if line]


def frequencies(speaker: ChatRenderer, texts: list[str]) -> npt.NDArray[np.float64]:
    counts = Counter(i for text in texts for i in speaker.vocabulary.encode(text))
    found = np.zeros(len(speaker.vocabulary))
    found[list(counts)] = list(counts.values())
    return found / found.sum()


def main() -> None:
    student, out = renderer("llama3"), dict[str, object]()
    common = {language: frequencies(student, lines(language)[:SEEN]) for language in LANGUAGES}
    for name in TEACHERS:
        teacher = renderer(name)
        event_map = load_event_map(teacher, student)
        assert event_map.student_mask is not None and event_map.teacher_mask is not None
        masks = (event_map.student_mask, event_map.teacher_mask)
        spent, boundaries, asked, seen, looked, curve = 0.0, 0, 0, 0, 0, list[tuple[int, float]]()
        missed, found_mass = 0.0, 0.0
        whole = {id(mask): list[float]() for mask in masks}
        elsewhere = {
            id(mask): fresh(mask) for mask in masks
        }  # its lookups must not fill the cache of the timed masks
        rare = {language: frequencies(teacher, lines(language)[:SEEN]) for language in LANGUAGES}
        for k in range(LINES):
            for language in LANGUAGES:
                talk = Conversation.from_question("?").with_answer(Text(lines(language)[k]))
                own, theirs = student.render(talk), teacher.render(talk)
                at = align(own, theirs).boundaries
                begun = time.process_time()
                contexts = [
                    (event_map.student_mask, c, s, own, common[language])
                    for c, s in zip(
                        event_map.student_mask.other.supervised_context_ids(
                            theirs, at.teacher_C
                        ).tolist(),
                        at.student_C.tolist(),
                        strict=True,
                    )
                ]
                contexts += [
                    (event_map.teacher_mask, c, t, theirs, rare[language])
                    for c, t in zip(
                        event_map.teacher_mask.other.supervised_context_ids(
                            own, at.student_C
                        ).tolist(),
                        at.teacher_C.tolist(),
                        strict=True,
                    )
                ]
                spent += time.process_time() - begun
                for mask, context, token, tokens, often in contexts:
                    row = often / 2
                    row[int(tokens.ids_T[token])] += 0.5
                    likely = np.flatnonzero(row >= MIN_CANDIDATE_PROB)
                    if k == 0 and context != UNRESTRICTED_CONTEXT and len(whole[id(mask)]) < WHOLE:
                        whole[id(mask)].append(every(fresh(mask), context))
                    begun = time.process_time()
                    impossible = mask.impossible_tokens(context, likely)
                    spent += time.process_time() - begun
                    asked, seen = asked + len(likely), seen + 1
                    if seen % LOOK == 0:
                        rest = np.flatnonzero((row > 0) & (row < MIN_CANDIDATE_PROB))
                        missed += float(
                            row[elsewhere[id(mask)].impossible_tokens(context, rest)].sum()
                        )
                        found_mass, looked = found_mass + float(row[impossible].sum()), looked + 1
                boundaries += len(at.student_C)
            curve.append((boundaries, spent))
        out[name] = {
            "boundaries": boundaries,
            "likely_tokens": round(asked / 2 / boundaries),
            "ms": round(1e3 * spent / boundaries, 2),
            "ms_last_lines": round(1e3 * (spent - curve[-11][1]) / (boundaries - curve[-11][0]), 2),
            "every_token_s": round(sum(float(np.mean(some)) for some in whole.values()), 2),
            "dead_mass": {
                "contexts": looked,
                "found": round(found_mass / looked, 5),
                "missed": round(missed / looked, 5),
            },
        }
        print(name, out[name], flush=True)
        OUT.write_text(
            json.dumps(
                {"likely": MIN_CANDIDATE_PROB, "student": "llama3", "teachers": out}, indent=1
            )
            + "\n"
        )


def fresh(mask: BoundaryMask) -> BoundaryMask:
    """Return the same mask with an empty cache."""
    return BoundaryMask(mask.other, mask.own, mask.first_token_W)


def every(mask: BoundaryMask, context: int) -> float:
    begun = time.process_time()
    mask.impossible_tokens(context)
    return time.process_time() - begun


if __name__ == "__main__":
    main()
