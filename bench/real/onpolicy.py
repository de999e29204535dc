"""python -m bench.real.onpolicy --models FOLDER: more text, or the student's own words.

The student of the best off-policy recipe continues in two ways. `both`: every other step is on its
own continuations of the first quarter of training texts, scored by the real teacher with persea's
own on-policy loss (whole distributions, reverse KL over events, masks, spans); the other steps are
on the text as before. `text`: as many steps on the text as take the same CPU time.

Measured before and after on held-out texts: bits per byte; of the student's continuations of their
first quarter the length, the share that it ends, and the bits per byte that teacher and student
give them. Their difference is the reverse KL of whole continuations, one sample each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.objectives.data import Window
from bench.objectives.onpolicy import Own, both_tokens, own_words
from bench.objectives.vocabularies import Speaker
from bench.objectives.words import given
from bench.real.__main__ import RESULTS, made_by, read
from bench.real.methods import Lessons, loss_of
from bench.real.models import Trainee, pack, rate_at, states
from bench.real.plan import FULLS, best, tested
from bench.real.texts import Text, held_out
from bench.real.train import Run, batches, mean, measure
from bench.real.world import World
from persea.losses import LMHead
from persea.teachers.engines.transformers import TransformersEngine
from persea.teachers.teacher import Teacher
from persea.training.on_policy.candidates import MIN_CANDIDATE_PROB, candidates_from_hidden
from persea.training.on_policy.loss import build_on_policy_loss
from persea.training.on_policy.teacher_scores import TeacherScorer

REFRESH = 2  # steps on the student's own words per round of sampling
LONGEST = 96  # tokens of a continuation
TOGETHER = 64  # continuations sampled at once


def window(text: Text) -> Window:
    return Window(text.language, str(text.block), text.text)


@dataclass(frozen=True)
class Said:
    """A continuation: as text and tokens of the student, its length, and whether it ended."""

    own: Own | None
    tokens: int
    ended: bool


@dataclass(eq=False)
class Begun:
    """The world, the run that begins, its student's tokenizer and its texts."""

    world: World
    run: Run
    who: Speaker
    texts: Sequence[Text]
    lessons: Lessons
    every: int = 1  # which of the held-out texts are continued

    @cached_property
    def scorer(self) -> TeacherScorer:
        """The real teacher, as persea scores a student's answers with it."""
        speaker = self.world.teacher.speaker
        engine = TransformersEngine(self.world.teacher.model, len(speaker.vocabulary))
        teacher = Teacher(self.world.teacher.name, speaker.renderer, engine)
        return TeacherScorer(teacher, self.lessons.pair.event_map, MIN_CANDIDATE_PROB)

    def said(self, model: Any, texts: Sequence[Text], seed: int) -> list[Said]:
        """Sample a continuation of the first quarter of each text."""
        engine = TransformersEngine(model, len(self.who.vocabulary), batch_size=TOGETHER)
        windows, stops = [window(t) for t in texts], self.who.renderer.stop_ids
        prefixes = [given(w, self.who) for w in windows]
        model.eval()
        found = engine.generate_rollouts(
            [np.array([self.who.start, *prefix], np.int32) for prefix in prefixes],
            stops,
            LONGEST,
            temperature=1.0,
            seed=seed,
        )
        model.train()
        out = []
        for w, prefix, ids in zip(windows, prefixes, found, strict=True):
            ended = bool(len(ids)) and int(ids[-1]) in stops
            # another control token ends the text, not the answer
            controls = np.flatnonzero(self.who.vocabulary.lengths_W[ids] == 0)
            tokens = ids[: controls[0] if len(controls) else len(ids)].tolist()
            own = own_words(self.who, w, [*prefix, *tokens]) if tokens else None
            out.append(Said(own, len(tokens), ended))
        return out

    def on_policy_loss(self, model: Any, some: Sequence[Own]) -> torch.Tensor | None:
        """Return persea's loss on the student's text; None where there is nothing to score."""
        answers = [both_tokens(own, self.who, self.world.teacher.speaker) for own in some]
        answers = [a for a in answers if a[0].loss_mask_T.any() and a[1].loss_mask_T.any()]
        if not answers:
            return None
        ids = [mine.ids_T[1:].tolist() for mine, _ in answers]
        packed = pack(ids, self.who.start, self.who.renderer.stop_ids[0])
        learn_S = torch.from_numpy(
            np.concatenate([np.append(mine.loss_mask_T[1:], False) for mine, _ in answers])
        )
        hidden_LD = states(model, packed)[learn_S].float()
        head = LMHead(model.get_input_embeddings().weight.float(), len(self.who.vocabulary))
        labels_L = packed.labels_S[learn_S]
        found = candidates_from_hidden(hidden_LD, head)
        loss = build_on_policy_loss(self.scorer, answers, "events", found)
        if not loss.num_terms:
            return None
        return loss.loss_fn(hidden_LD[loss.position_P], head, labels_L[loss.position_P]).loss

    def judged(self, model: Any) -> dict[str, Any]:
        """Return the measures of a student: of held-out text, and of its continuations."""
        languages = (*self.run.languages, "eng")
        measured = measure(model, self.who, languages, "test")
        texts = [t for one in self.run.languages for t in held_out(one, "test")][:: self.every]
        found = self.said(model, texts, seed=7)
        pairs = [
            both_tokens(one.own, self.who, self.world.teacher.speaker)
            for one in found
            if one.own is not None
        ]
        pairs = [p for p in pairs if p[0].loss_mask_T.any() and p[1].loss_mask_T.any()]
        sums = np.zeros(3)
        engines = (
            TransformersEngine(model, len(self.who.vocabulary)),
            self.scorer.teacher.engine,
        )
        for pair in pairs:
            first = max(int(side.starts_T[side.loss_mask_T][0]) for side in pair)
            for k, (engine, side) in enumerate(zip(engines, pair, strict=True)):
                counted_T = side.starts_T >= first
                (logprobs_NW,) = engine.compute_logprobs([side.ids_T], [counted_T])
                at = torch.from_numpy(side.ids_T[counted_T]).long()
                sums[k] -= float(logprobs_NW[torch.arange(len(at)), at].double().sum())
            sums[2] += int(pair[0].ends_T[-1]) - first
        own, teacher = sums[:2] / math.log(2) / sums[2]
        return {
            "mean": mean(measured, self.run.languages),
            "english": measured["eng"]["bits_per_byte"],
            "tokens": round(float(np.mean([one.tokens for one in found])), 1),
            "ended": round(float(np.mean([one.ended for one in found])), 3),
            "own_bits": round(float(own), 4),
            "teacher_bits": round(float(teacher), 4),
            "reverse_kl": round(float(teacher - own), 4),
            "not_text": sum(one.own is None for one in found),
            "continued": len(found),
            "measured": measured,
        }


def begin(world: World, run: Run, every: int) -> tuple[Begun, Any]:
    """Return what all ways share, and the student of the run."""
    model, who = world.student_of(run)
    texts = world.texts(run)
    lessons, _ = world.lessons(run, who, texts)
    return Begun(world, run, who, texts, lessons, every), model


def own_batches(begun: Begun, trainee: Trainee, order: Sequence[Sequence[int]]) -> Iterator[Any]:
    """Yield the student's continuations of the texts of each step."""
    for at in range(0, len(order), REFRESH):
        some = order[at : at + REFRESH]
        texts = [begun.texts[k] for chosen in some for k in chosen]
        said = iter(begun.said(trainee.model, texts, seed=1000 * begun.run.seed + at))
        for chosen in some:
            yield [next(said) for _ in chosen]


def continued(begun: Begun, model: Any, on: str, steps: int, rate: float) -> dict[str, Any]:
    """Train a student for more steps; return its measures and what the steps cost."""
    run, sizes = begun.run, [t.size for t in begun.texts]
    ids = begun.who.vocabulary.encode_batch([t.text for t in begun.texts])
    passes = 2 * steps * 1600 / sum(sizes) + 1
    order = batches(sizes, passes, run.seed + 100)
    old = len(begun.world.student.vocabulary)
    trainee = Trainee(model, True, old, run.new_rows)
    own = own_batches(begun, trainee, order[steps : steps + steps // 2])
    text_loss, end = loss_of(run, begun.lessons), begun.who.renderer.stop_ids[0]
    cpu, spent, lines = {"text": 0.0, "own": 0.0}, {"text": 0, "own": 0}, []
    for step in range(steps):
        kind = "own" if on == "both" and step % 2 else "text"
        started = time.process_time()
        if kind == "own":
            said = next(own)
            loss = begun.on_policy_loss(trainee.model, [s.own for s in said if s.own is not None])
            lines.append(
                [
                    step,
                    None if loss is None else round(float(loss.detach()), 4),
                    round(float(np.mean([s.tokens for s in said])), 1),
                    round(float(np.mean([s.ended for s in said])), 3),
                ]
            )
        else:
            packed = pack([ids[k] for k in order[step]], begun.who.start, end)
            logits_SV = trainee.logits(packed)
            loss = text_loss(logits_SV, packed, order[step])
        if loss is not None:
            trainee.step(loss, rate_at(step, steps, rate))
        cpu[kind] += time.process_time() - started
        spent[kind] += 1
    model.float()
    with torch.no_grad():
        for master, mine in zip(trainee.masters, trainee.own, strict=True):
            mine.copy_(master)
    return {
        "on": on,
        "steps": spent,
        "cpu_seconds": {k: round(v, 1) for k, v in cpu.items()},
        "own_steps": lines,
    } | begun.judged(model)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real.onpolicy")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("PERSEA_HOME", "~/.cache/persea")).expanduser() / "real",
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=1, help="continue each N-th held-out text")
    parser.add_argument("--results", type=Path, default=RESULTS / "real.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_onpolicy.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = World(options.models, options.cache)
    run = tested(best(read(options.results), FULLS), seed=options.seed)
    found: dict[str, Any] = {"rate": options.rate, "begins_with": run.key, "made_by": made_by()}
    begun, model = begin(world, run, options.every)
    found["before"] = begun.judged(model)
    found["both"] = continued(begun, model, "both", options.steps, options.rate)
    cost, did = found["both"]["cpu_seconds"], found["both"]["steps"]
    equal = round(sum(cost.values()) / (cost["text"] / did["text"]))
    begun, model = begin(world, run, options.every)
    found["text"] = continued(begun, model, "text", equal, options.rate)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for name in ("before", "both", "text"):
        print(name, {k: v for k, v in found[name].items() if k not in ("measured", "own_steps")})


if __name__ == "__main__":
    main()
