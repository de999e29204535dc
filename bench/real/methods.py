"""Losses of a run: bench.objectives' methods on real vocabularies, and persea's event KL.

Every supervised position has weight one, the end of the text included: where a method applies,
share x its divergence + (1 - share) x cross-entropy; elsewhere cross-entropy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from bench.objectives.examples import Batch, Group, Lesson, plain
from bench.objectives.gold import loss_of as gold_of
from bench.objectives.gold import side
from bench.objectives.methods import METHODS, Pair, Setting
from bench.objectives.vocabularies import Speaker
from bench.real.models import Packed
from bench.real.teacher import RealTeacher, Scored
from bench.real.texts import Text
from bench.real.train import Loss, Run, cross_entropy, label_smoothing
from persea.alignment.partial_tokens import token_prefixes
from persea.alignment.spans import align, aligned_spans, common_boundaries
from persea.alignment.token_order import UNRESTRICTED_CONTEXT
from persea.losses import (
    EventTargets,
    build_batch_targets,
    build_event_targets,
    concat_event_targets,
    event_kl_loss,
)

EVENTS = ("events", "events + masks", "events + masks + partial tokens")
WHOLE = ("strict", "strict everywhere", "uld", "gold", "chunk", "bpm")  # on whole distributions
SMOOTHING = {"label smoothing .05": 0.05, "label smoothing .1": 0.1, "label smoothing .2": 0.2}


@dataclass(eq=False)
class Lessons:
    """The training texts of a run, in both tokenizers."""

    teacher: RealTeacher
    student: Speaker
    texts: Sequence[Text]
    scored: Sequence[Scored]
    folder: Path
    tag: str = ""  # of distributions that are not kept as usual
    pair: Pair = field(init=False)
    lessons: list[Lesson] = field(init=False)
    kept: dict[tuple[int, str, str], EventTargets] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pair = Pair(self.teacher.head, self.student)
        own = self.student.vocabulary.encode_batch([t.text for t in self.texts])
        self.lessons = []
        for text, ids, score in zip(self.texts, own, self.scored, strict=True):
            s, t = plain(ids, self.student), plain(score.ids, self.teacher.speaker)
            both, ranges = common_boundaries(s, t), aligned_spans(s, t)
            self.lessons.append(
                Lesson(
                    text,  # type: ignore[arg-type]  # a window is asked for its text only
                    self.teacher.name,
                    s,
                    t,
                    both.student_C,
                    both.teacher_C,
                    np.concatenate([ranges.student_C2, ranges.teacher_C2], 1),
                    score.states_TD,
                    score.realised_T,
                )
            )

    # --- persea's event targets ---

    def targets(self, k: int, method: str, end: str) -> EventTargets:
        """Return the targets of a text; masked ones are kept on disk by the vocabulary's digest."""
        if (k, method, end) not in self.kept:
            name = f"{self.student.vocabulary.digest} {method} {end} {self.tag}{self.texts[k].text}"
            path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.pt"
            if path.is_file():
                self.kept[k, method, end] = torch.load(path, weights_only=False)
            else:
                self.kept[k, method, end] = self._targets(k, method, end)
                self.folder.mkdir(parents=True, exist_ok=True)
                torch.save(self.kept[k, method, end], path)
        return self.kept[k, method, end]

    def _targets(self, k: int, method: str, end: str) -> EventTargets:
        one, drawn, emap = self.lessons[k], self.scored[k].drawn, self.pair.event_map
        at_student, at_teacher = one.student_C, one.teacher_C
        if end == "teacher":
            at_student = np.append(at_student, len(one.student))
            at_teacher = np.append(at_teacher, len(one.spoken))
        begins, ends = drawn.offsets_N1[at_teacher], drawn.offsets_N1[at_teacher + 1]
        at_M = np.concatenate([np.arange(a, b) for a, b in zip(begins, ends, strict=True)])
        row_M = np.repeat(at_student, ends - begins)
        contexts: list[np.ndarray | None] = [None, None]
        if "masks" in method:
            contexts = []
            for mask, ids_T, at_C in (
                (emap.teacher_mask, one.student.ids_T, one.student_C),
                (emap.student_mask, one.spoken.ids_T, one.teacher_C),
            ):
                assert mask is not None
                of_N = np.full(len(one.student) + 1, UNRESTRICTED_CONTEXT, np.int64)
                of_N[one.student_C] = mask.other.context_ids(ids_T, at_C.tolist())
                contexts.append(of_N)
        found = build_event_targets(
            emap,
            row_M,
            drawn.ids_M[at_M].astype(np.int64),
            drawn.probs_M[at_M],
            student_context_N=contexts[0],
            teacher_context_N=contexts[1],
            kind=drawn.kind,
        )
        return (
            concat_event_targets([found, self._inside(k)], [0, 0]) if "partial" in method else found
        )

    def _inside(self, k: int) -> EventTargets:
        """Return the targets of student tokens inside teacher tokens."""
        one, drawn = self.lessons[k], self.scored[k].drawn
        found, completer = align(one.student, one.spoken).partial_tokens, self.pair.completer
        at_I, in_I, said_I = (
            column[found.at_common_boundary_I]
            for column in (found.student_I, found.teacher_I, found.prefix_len_I)
        )
        bytes_I = token_prefixes(completer.teacher_order.vocabulary, one.spoken.ids_T[in_I], said_I)
        contexts = completer.student_order.context_ids(one.student.ids_T, at_I.tolist())
        more = completer.project(drawn, in_I, bytes_I, np.array(contexts, np.int64))
        none = np.empty(0, np.int64)
        return EventTargets(
            at_I[more.student_index_M],
            more.event_M,
            more.probs_M,
            more.entry_D,
            more.token_D,
            none,
            none.astype(np.float32),
            none,
            none,
            drawn.kind,
        )

    def placed(self, packed: Packed, chosen: Sequence[int]) -> list[tuple[int, int]]:
        """Return (text, its first position in the packed row) of the texts that this teacher has.

        Texts behind those of `lessons` have another teacher.
        """
        firsts = np.concatenate([[0], np.cumsum(np.bincount(packed.text_S.numpy()))]).tolist()
        return [(k, at) for k, at in zip(chosen, firsts, strict=False) if k < len(self.lessons)]

    def events(self, run: Run) -> Loss:
        """Return persea's own loss on persea's own distributions."""

        def loss(logits_SV: torch.Tensor, packed: Packed, chosen: Sequence[int]) -> torch.Tensor:
            placed = self.placed(packed, chosen)
            if not placed:
                return cross_entropy(logits_SV, packed, chosen)
            parts = [self.targets(k, run.method, run.end) for k, _ in placed]
            targets = build_batch_targets(
                self.pair.event_map,
                concat_event_targets(parts, [first for _, first in placed]),
                len(packed.labels_S),
            )
            return event_kl_loss(logits_SV, packed.labels_S, [targets], run.share).loss

        return loss

    # --- baselines, on the teacher's whole distributions ---

    def batch(self, packed: Packed, chosen: Sequence[int]) -> Batch:
        """Return the batch as the methods of bench.objectives read it."""
        placed = self.placed(packed, chosen)
        firsts, some = [first for _, first in placed], [self.lessons[k] for k, _ in placed]
        sizes = [len(one.spoken) + 1 for one in some]
        begins = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64).tolist()
        shifts = [np.array([s, s, t, t]) for s, t in zip(firsts, begins, strict=True)]
        group = Group(
            self.teacher.name,
            *(
                torch.from_numpy(np.concatenate(parts))
                for parts in (
                    [one.student_C + s for one, s in zip(some, firsts, strict=True)],
                    [one.teacher_C + t for one, t in zip(some, begins, strict=True)],
                    [one.spans_C4 + x for one, x in zip(some, shifts, strict=True)],
                )
            ),
            torch.cat([one.states_TD for one in some]),
            torch.cat([one.realised_T for one in some]),
            tuple(some),
            tuple(firsts),
            tuple(begins),
        )
        return Batch(
            packed.ids_S[None],
            torch.ones(1, len(packed.ids_S), dtype=torch.bool),
            packed.labels_S,
            (group,),
        )

    def whole(self, run: Run) -> Loss:
        """Return a method of bench.objectives."""
        setting = Setting(run.method, "full", run.share)

        def loss(logits_SV: torch.Tensor, packed: Packed, chosen: Sequence[int]) -> torch.Tensor:
            batch = self.batch(packed, chosen)
            if run.method == "gold":
                return self.gold(logits_SV, batch, chosen, run.share)
            return METHODS[run.method](logits_SV, batch, {self.teacher.name: self.pair}, setting)

        return loss

    def gold(
        self, logits_SV: torch.Tensor, batch: Batch, chosen: Sequence[int], share: float
    ) -> torch.Tensor:
        """Return share x TRL's own GOLD + (1 - share) x cross-entropy."""
        total = torch.zeros(())
        weight = self.teacher.model.lm_head.weight
        for one, first in zip(batch.groups[0].examples, batch.groups[0].first_student, strict=True):
            own_TV = logits_SV[first : first + len(one.student) + 1]
            with torch.no_grad():
                teacher_TV = one.states_TD @ weight.T
            from bench import baselines

            total = total + baselines.gold_loss(
                gold_of(self.pair),
                side(own_TV, one.student.ids_T.tolist(), one.student, self.student.start),
                side(teacher_TV, one.spoken.ids_T.tolist(), one.spoken, self.teacher.speaker.start),
            ) * (len(one.student) + 1)
        ce = torch.nn.functional.cross_entropy(logits_SV, batch.labels_N)
        return share * total / len(batch.labels_N) + (1 - share) * ce


def loss_of(run: Run, lessons: Lessons | None) -> Loss:
    """Return the loss of a run."""
    if run.method in ("cross-entropy", "none", "parent"):
        return cross_entropy
    if run.method in SMOOTHING:
        return label_smoothing(SMOOTHING[run.method])
    assert lessons is not None
    return lessons.events(run) if run.method in EVENTS else lessons.whole(run)
