"""Windows in student and teacher tokens, with the teacher's distribution at each of its tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaForCausalLM

from bench.objectives.data import ASKED, Window
from bench.objectives.models import padded, states
from bench.objectives.vocabularies import Speaker
from persea.alignment.spans import aligned_spans, common_boundaries
from persea.distributions import SparseDistributions, sample_distributions
from persea.tokenization.tokens import RenderedTokens

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Teacher:
    """One teacher: its tokens and its head; its hidden states are cached."""

    speaker: Speaker
    model: LlamaForCausalLM

    def logprobs(self, states_ND: torch.Tensor) -> torch.Tensor:
        """Return natural log-probabilities [N, W]."""
        return torch.log_softmax(states_ND @ self.model.lm_head.weight.T, -1)


@dataclass(frozen=True)
class Lesson:
    """One window. S student tokens, T teacher tokens, C common boundaries.

    student_C, teacher_C    the tokens that start there
    spans_C4                student from, to; teacher from, to: token ranges over the same bytes
    states_TD               the teacher's hidden states before each of its tokens
    realised_T              its natural log-probability of each of its own tokens
    """

    window: Window
    teacher: str
    student: RenderedTokens
    spoken: RenderedTokens
    student_C: Ints
    teacher_C: Ints
    spans_C4: Ints
    states_TD: torch.Tensor
    realised_T: torch.Tensor


def plain(ids: Sequence[int], speaker: Speaker) -> RenderedTokens:
    """Return the tokens of a plain text: all supervised, placed by their bytes."""
    ids_T = np.asarray(ids, np.int32)
    ends_T = np.cumsum(speaker.vocabulary.lengths_W[ids_T]).astype(np.int32)
    return RenderedTokens(
        ids_T, ends_T - speaker.vocabulary.lengths_W[ids_T], ends_T, np.ones(len(ids_T), bool)
    )


def lessons(
    windows: Sequence[Window], student: Speaker, teachers: Mapping[str, Teacher]
) -> list[Lesson]:
    """Return every window with its teacher's data, in the order of the windows."""
    out: dict[int, Lesson] = {}
    for who, teacher in teachers.items():
        chosen = [k for k, w in enumerate(windows) if ASKED[w.domain] == who]
        for at in range(0, len(chosen), 32):
            some = chosen[at : at + 32]
            texts = [windows[k].text for k in some]
            own, spoken = (
                student.vocabulary.encode_batch(texts),
                teacher.speaker.vocabulary.encode_batch(texts),
            )
            ids_BS, learn_BS = padded(spoken, teacher.speaker.start)
            with torch.no_grad():
                states_ND = states(teacher.model, ids_BS, learn_BS)
                targets_N = torch.tensor([i for one in spoken for i in one])
                realised_N = teacher.logprobs(states_ND)[torch.arange(len(targets_N)), targets_N]
            n = 0
            for k, s_ids, t_ids in zip(some, own, spoken, strict=True):
                s, t = plain(s_ids, student), plain(t_ids, teacher.speaker)
                both, ranges = common_boundaries(s, t), aligned_spans(s, t)
                here = slice(n, n + len(t))
                out[k] = Lesson(
                    windows[k],
                    who,
                    s,
                    t,
                    both.student_C,
                    both.teacher_C,
                    np.concatenate([ranges.student_C2, ranges.teacher_C2], 1),
                    states_ND[here].clone(),
                    realised_N[here].clone(),
                )
                n += len(t)
    return [out[k] for k in range(len(windows))]


def open_lessons(
    path: Path, windows: Sequence[Window], student: Speaker, teachers: Mapping[str, Teacher]
) -> list[Lesson]:
    """Load `lessons` from the cache, or build them again if the windows changed."""
    digest = hashlib.sha256("\0".join(w.text for w in windows).encode()).hexdigest()
    if path.is_file():
        kept_digest, kept = torch.load(path, weights_only=False)
        if kept_digest == digest:
            return kept  # type: ignore[no-any-return]
    made = lessons(windows, student, teachers)
    torch.save((digest, made), path)
    return made


def sampled(lesson: Lesson, teacher: Teacher, tau: float) -> SparseDistributions:
    """Sample a row for each teacher token, unbiased, as persea's capture does."""
    return sample_distributions(
        teacher.logprobs(lesson.states_TD), lesson.spoken.ids_T, tau, f"{tau} {lesson.window.text}"
    )


@dataclass(frozen=True)
class Group:
    """The part of one teacher in a batch. Its T tokens are concatenated; C common boundaries.

    row_C    supervised student position (0..N-1) at the boundary; at_C: the teacher token that
        starts there
    spans_C4 as in Lesson, in the batch's numbering; realised_T, states_TD as in Lesson
    examples, first_student, first_teacher  the windows, and the index of their first tokens
    """

    who: str
    row_C: torch.Tensor
    at_C: torch.Tensor
    spans_C4: torch.Tensor
    states_TD: torch.Tensor
    realised_T: torch.Tensor
    examples: tuple[Lesson, ...]
    first_student: tuple[int, ...]
    first_teacher: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Windows in student tokens, N supervised positions in window order; one group per teacher."""

    ids_BS: torch.Tensor
    learn_BS: torch.Tensor
    labels_N: torch.Tensor
    groups: tuple[Group, ...]


def collate(chosen: Sequence[Lesson], student: Speaker) -> Batch:
    ids_BS, learn_BS = padded([one.student.ids_T.tolist() for one in chosen], student.start)
    firsts = np.concatenate([[0], np.cumsum([len(one.student) for one in chosen])]).tolist()
    groups = tuple(
        _group(
            who, [(one, f) for one, f in zip(chosen, firsts, strict=False) if one.teacher == who]
        )
        for who in dict.fromkeys(one.teacher for one in chosen)
    )
    return Batch(ids_BS, learn_BS, ids_BS[:, 1:][learn_BS[:, :-1]], groups)


def _group(who: str, members: Sequence[tuple[Lesson, int]]) -> Group:
    sizes = [len(one.spoken) for one, _ in members]
    begins = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64).tolist()
    shifted = [(one, s, t) for (one, s), t in zip(members, begins, strict=False)]

    def joined(parts: Iterable[Ints]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(parts)))

    return Group(
        who,
        joined(one.student_C + s for one, s, _ in shifted),
        joined(one.teacher_C + t for one, _, t in shifted),
        joined(one.spans_C4 + np.array([s, s, t, t]) for one, s, t in shifted),
        torch.cat([one.states_TD for one, _, _ in shifted]),
        torch.cat([one.realised_T for one, _, _ in shifted]),
        tuple(one for one, _, _ in shifted),
        tuple(s for _, s, _ in shifted),
        tuple(t for _, _, t in shifted),
    )
